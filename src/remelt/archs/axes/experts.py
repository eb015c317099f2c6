"""The axis groups of mixtures of experts, whose experts are tensors of their own or stacked in one."""

from __future__ import annotations

from dataclasses import dataclass

from remelt.archs.axes.draft import EXPERT, Draft, Drafts
from remelt.archs.axes.transformer import gated
from remelt.archs.axis_groups import ITEM, STACKED


@dataclass(frozen=True)
class _Naming:
    """What the parts of a mixture are called below a layer: its router, its experts, and the maps of each."""

    router: str
    experts: str
    gate: str
    up: str
    down: str


_NAMINGS = (
    _Naming("block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2"),
    _Naming("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
)
_SHARED = "mlp.shared_expert"


def mixture(drafts: Drafts, layer: str, name: str, stream: Draft) -> bool:
    """The groups of a mixture of experts in a layer; whether it has one.

    Experts are permuted together with the rows of their router, and the hidden channels of each apart. Files have a
    tensor for each map of each expert, modules of transformers since its fifth version one for those of all.
    """
    for naming in _NAMINGS:
        router, experts = f"{layer}.{naming.router}", f"{layer}.{naming.experts}"
        if f"{router}.weight" not in drafts.shapes:
            continue
        count = drafts.shapes[f"{router}.weight"][0]
        if f"{experts}.gate_up_proj" in drafts.shapes:
            draft = _stacked(drafts, experts, f"{name}.experts", count, stream)
        else:
            draft = _apart(drafts, experts, f"{name}.experts", count, naming, stream)
        draft.made_by(router, (EXPERT,))
        stream.read_by(router)
        _shared(drafts, layer, name, stream)
        return True
    return False


def _apart(drafts: Drafts, experts: str, name: str, count: int, naming: _Naming, stream: Draft) -> Draft:
    hidden = drafts.shapes[f"{experts}.0.{naming.gate}.weight"][0]
    draft = drafts.experts(name, count, hidden)
    draft.made_by(f"{experts}.{ITEM}.{naming.gate}").made_by(f"{experts}.{ITEM}.{naming.up}")
    draft.read_by(f"{experts}.{ITEM}.{naming.down}")
    for number in range(count):
        one = f"{experts}.{number}"
        stream.read_by(f"{one}.{naming.gate}").read_by(f"{one}.{naming.up}").made_by(f"{one}.{naming.down}")
    return draft


def _stacked(drafts: Drafts, experts: str, name: str, count: int, stream: Draft) -> Draft:
    """Gate and values are the halves of one map. The first axis of a stacked tensor counts experts."""
    both, down = f"{experts}.gate_up_proj", f"{experts}.down_proj"
    hidden = drafts.shapes[both][1] // 2
    draft = drafts.experts(name, count, hidden)
    draft.window(both + STACKED, 0).window(both + STACKED, 0, offset=hidden).window(down + STACKED, 1)
    stream.window(both, 2).window(down, 1)
    return draft


def _shared(drafts: Drafts, layer: str, name: str, stream: Draft) -> None:
    """The expert that every token sees, and its gate of one row."""
    gate, up, down = (f"{layer}.{_SHARED}.{part}_proj" for part in ("gate", "up", "down"))
    gated(drafts, f"{name}.shared_expert", gate, up, down)
    stream.read_by(gate).read_by(up).made_by(down).read_by(f"{layer}.{_SHARED}_gate")
