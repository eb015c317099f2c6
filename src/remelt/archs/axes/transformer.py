"""What transformers of every kind are made of: feed-forward maps, fused projections, modulation, numbered layers."""

from __future__ import annotations

import re

from remelt.archs.axes.draft import CHANNEL, HEAD, QK, VALUE, Draft, Drafts
from remelt.archs.axis_groups import Level, Shapes

_HALF = 2


def numbers_after(shapes: Shapes, start: str) -> list[int]:
    """The numbers of the modules in a list, in order, by what their keys begin with.

    >>> numbers_after({"blocks.0.weight": (2,), "blocks.10.weight": (2,), "blocks.2.bias": (2,)}, "blocks.")
    [0, 2, 10]
    """
    pattern = re.compile(re.escape(start) + r"(\d+)(?:\.|$)")
    return sorted({int(found[1]) for key in shapes if (found := pattern.match(key))})


def fixed(drafts: Drafts, key: str, axis: int, name: str = "") -> None:
    """A whole axis of a tensor that means something outside; nothing where the tensor is not there.

    Of a linear map's rows (axis 0 of a ``weight``), the bias too.
    """
    if key not in drafts.shapes:
        return
    draft = drafts.fixed(name or f"{key}.{axis}", drafts.shapes[key][axis]).window(key, axis)
    if axis == 0 and key.endswith(".weight"):
        draft.window(f"{key.removesuffix('weight')}bias", 0)


def fix(draft: Draft) -> None:
    """Pin the channels of a stream after all."""
    draft.levels = (Level(CHANNEL, draft.size, fixed=True),)
    draft.partitions.clear()
    draft.crosses = ""


def feed_forward(drafts: Drafts, name: str, into: str, out: str) -> None:
    """The hidden channels between two linear maps; nothing where the first is not there."""
    rows = drafts.shapes.get(f"{into}.weight")
    if rows is not None:
        drafts.free(name, rows[0]).made_by(into).read_by(out)


def gated(drafts: Drafts, name: str, gate: str, up: str, down: str) -> None:
    """The hidden channels of a gated feed-forward network; nothing where its gate is not there."""
    rows = drafts.shapes.get(f"{gate}.weight")
    if rows is not None:
        drafts.free(name, rows[0]).made_by(gate).made_by(up).read_by(down)


def gated_together(drafts: Drafts, name: str, both: str, down: str) -> None:
    """The same where gate and values are the halves of one map."""
    rows = drafts.shapes.get(f"{both}.weight")
    if rows is not None:
        hidden = rows[0] // _HALF
        drafts.free(name, hidden).made_by(both).made_by(both, offset=hidden).read_by(down)


def made_fused(attention: Draft, module: str) -> Draft:
    """Queries, keys and values that one map makes, one after the other, with as many heads each."""
    sizes = {level.name: level.size for level in attention.levels}
    for place, level in enumerate((QK, QK, VALUE)):
        attention.made_by(module, (HEAD, level), offset=place * sizes[HEAD] * sizes[QK])
    return attention


def modulated_by(stream: Draft, module: str) -> Draft:
    """A map that makes shifts, scales and gates for a stream, one after the other, each as wide as the stream."""
    rows = stream.shapes.get(f"{module}.weight", (0,))[0]
    for offset in range(0, rows, stream.size):
        stream.made_by(module, offset=offset)
    return stream
