"""What a person may choose about a merge, checked once."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remelt.api.modelspec import refuse_entries
from remelt.core.dtype import DType
from remelt.core.nearest import nearest_hint
from remelt.core.units import parse_bytes
from remelt.errors import OptionError

_DEVICE = re.compile(r"cpu|mps|(?:cuda|xpu)(?::[0-9]+)?")

DECISIVE = (
    "compute_dtype",
    "dialect",
    "dtype",
    "ignore_unused",
    "keep_quantisation",
    "missing",
    "modelspec",
    "nonfinite",
    "scaled",
    "title",
)
"""Options that decide what a result is, beside its recipe: where they are not the default, it carries them too."""

if TYPE_CHECKING:
    from remelt.engine.cache import Cache

_OF_GGUF = re.compile(r"(?i)i?q\d_\w+|tq\d_\d")
QUANTISED = "q8_0"
"""What is no element type, but may be asked for where the result is a GGUF file."""

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """The options of a merge or a plan.

    - ``models_dirs``: folders where models are looked up by name, after the recipe's own.
    - ``compute_dtype``: ``float32`` or ``float64``; what arithmetic is done in.
    - ``dtype``: element type of the results; by default each tensor keeps its own.
    - ``scaled``: whether linear layers are stored as ``dtype``, an eight-bit one, with scales; what else there is keeps
      its own type.
    - ``keep_quantisation``: whether tensors that the first model has quantised are quantised again in its way.
    - ``device``: ``cpu``, ``cuda``, ``cuda:1``, ``xpu``, ``mps``.
    - ``threads``: how many; by default one a core, at most 8.
    - ``memory``: bytes, or text as in ``4GiB``; by default a quarter of what is available.
    - ``max_shard_size``: bytes, or text; the result becomes a folder of shards.
    - ``missing``: what to do about keys that one input lacks: ``error``, ``first``, ``skip``.
    - ``nonfinite``: what to do about NaN and infinities: ``error``, ``keep``, ``missing``.
    - ``overwrite``: whether an existing output may be replaced.
    - ``restart``: whether to begin anew where an interrupted merge of the same could be continued.
    - ``dialect``: the layout of keys that the result shall have, such as ``diffusers``; by default the first model's.
    - ``like``: a model's folder, of which a result that is a folder takes configurations, tokenizers and file names; by
      default an input's.
    - ``title``: what user interfaces call the result; by default the titles of its models.
    - ``modelspec``: further entries of the ModelSpec standard, such as ``author``, by name; by default the models'.
    - ``hashed``: whether a single file's ModelSpec metadata has the SHA-256 of its tensors, for which it is read again.
    - ``ignore_unused``: whether modules of adapters that the model lacks are left out, and not refused.
    - ``fallback``: a model that gives what the recipe's result lacks.
    - ``cache``: a `Cache` that repeated merges of the same models share; its size counts within ``memory``.
    """

    models_dirs: Sequence[PathLike] = ()
    compute_dtype: str = "float32"
    dtype: str | None = None
    scaled: bool = False
    keep_quantisation: bool = False
    device: str = "cpu"
    threads: int | None = None
    memory: int | str | None = None
    max_shard_size: int | str | None = None
    missing: str = "error"
    nonfinite: str = "error"
    overwrite: bool = False
    restart: bool = False
    dialect: str | None = None
    like: PathLike | None = None
    title: str | None = None
    modelspec: Mapping[str, str] | None = None
    hashed: bool = False
    ignore_unused: bool = False
    fallback: PathLike | None = None
    cache: Cache | None = None
    config: Path | None = field(default=None)

    def __post_init__(self) -> None:
        _one_of("missing", self.missing, ("error", "first", "skip"))
        _one_of("nonfinite", self.nonfinite, ("error", "keep", "missing"))
        if self.compute not in (DType.F32, DType.F64):
            raise OptionError(
                f"arithmetic is done in float32 or float64, but compute_dtype is {self.compute_dtype!r}",
                hint="dtype sets the element type of the result",
            )
        if self.stored is not None and not self.stored.is_float:
            raise OptionError(f"a result's weights are floating-point numbers, but dtype is {self.dtype!r}")
        if self.scaled and self.stored not in (DType.F8_E4M3, DType.F8_E5M2):
            raise OptionError(
                f"scales go with numbers of eight bits, but dtype is {self.dtype!r}", hint="--dtype fp8_e4m3fn --scaled"
            )
        if self.scaled and self.keep_quantisation:
            raise OptionError("a result is scaled anew, or keeps the quantisation of its first model, but not both")
        if not _DEVICE.fullmatch(self.device):
            raise OptionError(f"device is cpu, cuda, cuda:1, xpu or mps, but got {self.device!r}")
        if self.threads is not None and self.threads < 1:
            raise OptionError(f"threads must be at least 1, but got {self.threads}")
        refuse_entries(self.modelspec or {})
        for name in ("memory", "max_shard_size"):
            amount = getattr(self, name)
            if amount is not None and _bytes(amount) <= 0:
                raise OptionError(f"{name} must be more than nothing, but got {amount!r}")

    @property
    def makes_folder(self) -> bool:
        """Whether the result is a folder, unless its name is a file's."""
        return self.max_shard_size is not None or self.like is not None or self.dialect not in (None, "original")

    @property
    def decisive(self) -> dict[str, object]:
        """Those of the `DECISIVE` options that are not the default."""
        plain = {one.name: one.default for one in fields(self)}
        chosen = {name: getattr(self, name) for name in DECISIVE}
        return {name: value for name, value in chosen.items() if value != plain[name]}

    @property
    def compute(self) -> DType:
        """The type of arithmetic."""
        return DType.parse(self.compute_dtype)

    @property
    def asks_q8_0(self) -> bool:
        """Whether the element type is the quantisation of GGUF files that is written."""
        return self.dtype is not None and self.dtype.lower() == QUANTISED

    @property
    def stored(self) -> DType | None:
        """The results' element type, or None for each tensor's own, or where it is one of GGUF."""
        if self.dtype is None or self.asks_q8_0:
            return None
        if _OF_GGUF.fullmatch(self.dtype):
            raise OptionError(
                f"{self.dtype} is a type of GGUF files that is read, and not written",
                hint=f"--dtype {QUANTISED} -o NAME.gguf, and make it so with llama.cpp's llama-quantize",
            )
        return DType.parse(self.dtype)

    @property
    def memory_bytes(self) -> int | None:
        """The budget in bytes, where one was given."""
        return None if self.memory is None else _bytes(self.memory)

    @property
    def shard_bytes(self) -> int | None:
        """The largest shard in bytes, where one was given."""
        return None if self.max_shard_size is None else _bytes(self.max_shard_size)


def over_carried(carried: Mapping[str, Any], given: Mapping[str, Any]) -> MergeOptions:
    """The options that are given, and where they are not, those that a file with a recipe was made with.

    Another element type goes without the scales of the one before.
    """
    found = {**carried, **given}
    if "dtype" in given and "scaled" not in given:
        found.pop("scaled", None)
    return MergeOptions(**found)


def _bytes(amount: int | str) -> int:
    return parse_bytes(amount) if isinstance(amount, str) else amount


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        hint = nearest_hint(value, allowed)
        raise OptionError(f"{name} is one of {', '.join(allowed)}, but got {value!r}", hint=hint)
