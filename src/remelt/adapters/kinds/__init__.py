"""The kinds of adapters, a file for each family: what their parts must be, and by how much they change a tensor.

`lora`, `loha`, `lokr` and `full` do not ask for the tensor itself, unless `decomposed` (DoRA) brings them to a
magnitude; `ia3`, `glora`, `oft` and `boft` do. `common` and `rotation` hold what they share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from remelt.adapters.change import Kind
from remelt.adapters.kinds.boft import BOFT, PeftBOFT
from remelt.adapters.kinds.common import listed
from remelt.adapters.kinds.full import Whole
from remelt.adapters.kinds.glora import GLoRA
from remelt.adapters.kinds.ia3 import IA3, PeftIA3, PeftIA3Bias
from remelt.adapters.kinds.loha import LoHa
from remelt.adapters.kinds.lokr import LoKr
from remelt.adapters.kinds.lora import LoRA, LoRABias
from remelt.adapters.kinds.oft import OFT, PeftOFT
from remelt.core.tensor_info import TensorInfo
from remelt.errors import AdapterError

KINDS: tuple[Kind, ...] = (
    LoRA(),
    LoHa(),
    LoKr(),
    GLoRA(),
    IA3(),
    PeftIA3(),
    OFT(),
    PeftOFT(),
    BOFT(),
    PeftBOFT(),
    Whole("a difference", "diff"),
    Whole("a difference of a norm", "w_norm"),
    Whole("a weight", "set_weight", replaces=True),
    LoRABias(),
    PeftIA3Bias(),
    Whole("a difference of a bias", "diff_b", "bias"),
    Whole("a difference of a norm's bias", "b_norm", "bias"),
    Whole("a bias", "set_bias", "bias", replaces=True),
)
"""Kinds that change weights, then those that change biases."""


class Use(NamedTuple):
    """One tensor of a module that an adapter changes: how, which one ("weight" or "bias"), and by which parts."""

    kind: Kind
    target: str
    parts: tuple[str, ...]


def kind_of(parts: Mapping[str, TensorInfo], module: str) -> tuple[Use, ...]:
    """What the parts of a module change: its weight, its bias, or both.

    Raises `AdapterError` where no kind knows them or one of them, or several kinds would change one tensor.
    """
    uses: dict[str, Use] = {}
    for kind in KINDS:
        if not kind.is_of(parts):
            continue
        if kind.target in uses:
            raise AdapterError(
                f"{module}: it is {uses[kind.target].kind.name} and {kind.name} at once, by {listed(sorted(parts))}",
                hint="the file holds several adapters: save one of them",
            )
        uses[kind.target] = Use(kind, kind.target, tuple(name for name in parts if name in kind.names))
    strange = [name for name in parts if not any(name in use.parts for use in uses.values())]
    if not uses:
        raise AdapterError(
            f"{module}: no kind of adapter that is known has the parts {listed(sorted(parts)) if parts else 'none'}",
            hint="known are LoRA, LoCon, DoRA, LoHa, LoKr, IA3, OFT, BOFT, GLoRA and full differences",
        )
    if strange:
        raise AdapterError(
            f"{module}: {listed([use.kind.name for use in uses.values()])} has no part {listed(strange)}",
            hint="it would be lost: the file is of a kind that is not known, or of a newer version",
        )
    return tuple(uses.values())
