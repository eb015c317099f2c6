"""Rules for operations that move, join, repeat and choose places, and compute nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from remelt.alignment.derivation.calls import (
    Call,
    Result,
    Rules,
    Traced,
    aligned,
    pin_all,
    place,
    places,
    reshaped,
    settled,
    without,
)
from remelt.alignment.derivation.labels import (
    UNIT,
    Dimensions,
    Expression,
    Label,
    Pinned,
    Product,
    Uniform,
    added,
    multiplied,
    opened,
    pin,
)
from remelt.alignment.derivation.splitting import divide, factored, taken

RULES = Rules()


@RULES.of(
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "_reshape_alias"
)
def viewed(call: Call) -> Result:
    """The same places in the same order, in another shape."""
    tensor, shape = call.tensor(), call.shapes[0]
    return settled(reshaped(tensor.dimensions, shape), tensor)


@RULES.of("transpose", "swapaxes", "swapdims")
def transposed(call: Call) -> Result:
    """Two dimensions exchanged."""
    tensor = call.tensor()
    rank = len(tensor.dimensions)
    names = ("dim0", "dim1") if "dim0" in call.arguments else ("axis0", "axis1")
    one, other = (place(call[name], rank) for name in names)
    found = list(tensor.dimensions)
    found[one], found[other] = found[other], found[one]
    return replace(tensor, dimensions=tuple(found))


@RULES.of("t", "numpy_T", "mT", "adjoint", "matrix_H")
def turned(call: Call) -> Result:
    """The last two dimensions exchanged."""
    tensor = call.tensor()
    return replace(tensor, dimensions=(*tensor.dimensions[:-2], *tensor.dimensions[-2:][::-1]))


@RULES.of("permute")
def permuted(call: Call) -> Result:
    """Dimensions in another order."""
    tensor = call.tensor()
    axes = places(call["dims"], len(tensor.dimensions))
    return replace(tensor, dimensions=tuple(tensor.dimensions[axis] for axis in axes))


@RULES.of("movedim", "moveaxis")
def moved(call: Call) -> Result:
    """Dimensions moved to other places."""
    tensor = call.tensor()
    rank = len(tensor.dimensions)
    sources, targets = places(call["source"], rank), places(call["destination"], rank)
    rest = iter(axis for axis in range(rank) if axis not in sources)
    order = [sources[targets.index(axis)] if axis in targets else next(rest) for axis in range(rank)]
    return replace(tensor, dimensions=tuple(tensor.dimensions[axis] for axis in order))


@RULES.of("expand", "expand_as", "broadcast_to")
def expanded(call: Call) -> Result:
    """Dimensions of size 1 repeated."""
    tensor, shape = call.tensor(), call.shapes[0]
    lead = len(shape) - len(tensor.dimensions)
    old = (*(UNIT for _ in range(lead)), *tensor.dimensions)
    return replace(
        tensor,
        dimensions=tuple(one if one.size == size else Uniform(size) for one, size in zip(old, shape, strict=True)),
    )


@RULES.of("repeat", "tile")
def repeated(call: Call) -> Result:
    """The whole repeated along dimensions."""
    tensor, shape = call.tensor(), call.shapes[0]
    old = (*(UNIT for _ in range(len(shape) - len(tensor.dimensions))), *tensor.dimensions)
    found = [multiplied([Uniform(size // one.size), one]) for one, size in zip(old, shape, strict=True)]
    return settled(found, tensor)


@RULES.of("repeat_interleave")
def repeated_each(call: Call) -> Result:
    """Each place of a dimension repeated."""
    tensor, repeats = call.optional("self"), call.get("repeats")
    if tensor is None or not isinstance(repeats, int) or call.get("dim") is None:
        pin_all(call.tensors)
        return call.pinned()
    axis = place(call["dim"], len(tensor.dimensions))
    found = list(tensor.dimensions)
    found[axis] = multiplied([found[axis], Uniform(repeats)])
    return settled(found, tensor)


@RULES.of("cat", "concat", "concatenate")
def concatenated(call: Call) -> Result:
    """Tensors one after another along a dimension."""
    axis = place(call.get("dim", 0), len(call.shapes[0]))
    tensors = [tensor for tensor in call["tensors"] if 0 not in tensor.shape]
    return _put_together([tensor.dimensions for tensor in tensors], axis)


@RULES.of("stack")
def stacked(call: Call) -> Result:
    """Tensors one after another along a new dimension."""
    axis = place(call.get("dim", 0), len(call.shapes[0]))
    rows = [(*one.dimensions[:axis], UNIT, *one.dimensions[axis:]) for one in call["tensors"]]
    return _put_together(rows, axis)


def _put_together(rows: Sequence[Dimensions], axis: int) -> Traced:
    others = aligned([Traced(without(row, [axis])) for row in rows])
    whole = added(row[axis] for row in rows)
    return settled((*others[:axis], whole, *others[axis:]))


@RULES.of("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "split_copy")
def divided(call: Call) -> Result:
    """Stretches of a dimension, as tensors."""
    tensor = call.tensor()
    axis = place(call.get("dim", 0), len(tensor.dimensions))
    return _stretches(tensor, axis, [shape[axis] for shape in call.shapes])


@RULES.of("unbind")
def unbound(call: Call) -> Result:
    """The places of a dimension, as tensors without it."""
    tensor = call.tensor()
    axis = place(call.get("dim", 0), len(tensor.dimensions))
    pieces = _stretches(tensor, axis, [1] * tensor.dimensions[axis].size)
    return tuple(settled(without(piece.dimensions, [axis]), tensor) for piece in pieces)


@RULES.of("glu")
def gated(call: Call) -> Result:
    """One half of a dimension, gated by the other."""
    tensor = call.tensor()
    axis = place(call.get("dim", -1), len(tensor.dimensions))
    return settled(aligned(_stretches(tensor, axis, [tensor.dimensions[axis].size // 2] * 2)))


def _stretches(tensor: Traced, axis: int, sizes: Sequence[int]) -> tuple[Traced, ...]:
    cuts = (0, *accumulate(sizes))
    _divide_at(tensor.dimensions[axis], cuts)
    return tuple(settled(taken(tensor.dimensions, axis, *pair), tensor) for pair in pairwise(cuts))


def _divide_at(expression: Expression, cuts: Sequence[int]) -> None:
    """Divide a label at all cuts at once, so that it is one sum, not a sum in a sum."""
    whole = opened(expression)
    if isinstance(whole, Label):
        divide(whole, sorted(set(cuts)))
    elif isinstance(whole, Product):
        inner = whole.size // whole.factors[0].size
        if all(cut % inner == 0 for cut in cuts):
            _divide_at(whole.factors[0], [cut // inner for cut in cuts])


@RULES.of("slice")
def sliced(call: Call) -> Result:
    """A stretch of a dimension, or every so many places of it."""
    tensor, step = call.tensor(), call.get("step") or 1
    axis = place(call.get("dim", 0), len(tensor.dimensions))
    size, left = tensor.dimensions[axis].size, call.shapes[0][axis]
    start = min(max(_counted(call.get("start") or 0, size), 0), size)
    if step == 1:
        return settled(taken(tensor.dimensions, axis, start, start + left), tensor)
    found = list(tensor.dimensions)
    whole = found[axis]
    if isinstance(whole, Pinned | Uniform):
        found[axis] = type(whole)(left)
        return settled(found, tensor)
    if size % step == 0 and left == size // step and start < step:
        outer, inner = factored(whole, (left, step))
        _divide_at(inner, range(step + 1))
        rows = taken((*found[:axis], outer, inner, *found[axis + 1 :]), axis + 1, start, start + 1)
        return settled(without(rows, [axis + 1]), tensor)
    pin(whole)
    found[axis] = Pinned(left)
    return settled(found, tensor)


def _counted(index: int, size: int) -> int:
    return index + size if index < 0 else index


@RULES.of("select")
def selected(call: Call) -> Result:
    """One place of a dimension."""
    tensor = call.tensor()
    axis = place(call["dim"], len(tensor.dimensions))
    index = _counted(call["index"], tensor.dimensions[axis].size)
    return settled(without(taken(tensor.dimensions, axis, index, index + 1), [axis]), tensor)


@RULES.of("narrow")
def narrowed(call: Call) -> Result:
    """A stretch of a dimension, by its length."""
    tensor = call.tensor()
    axis = place(call["dim"], len(tensor.dimensions))
    return settled(taken(tensor.dimensions, axis, call["start"], call["start"] + call["length"]), tensor)


@RULES.of("slice_scatter", "select_scatter")
def overwritten(call: Call) -> Result:
    """A tensor with a stretch of another's in place of its own."""
    tensor, source = call.tensor(), call.tensor("src")
    rank = len(tensor.dimensions)
    axis = place(call.get("dim", 0), rank)
    size = tensor.dimensions[axis].size
    if call.get("step", 1) != 1:
        pin_all(call.tensors)
        return call.pinned()
    if call.name == "aten::select_scatter":
        start = _counted(call["index"], size)
        row = (*source.dimensions[:axis], UNIT, *source.dimensions[axis:])
    else:
        start, row = min(_counted(call.get("start") or 0, size), size), source.dimensions
    stop = start + row[axis].size
    pieces = [taken(tensor.dimensions, axis, *pair) for pair in ((0, start), (stop, size)) if pair[0] < pair[1]]
    pieces.insert(1 if start else 0, row)
    return _put_together(pieces, axis) if len(pieces) > 1 else settled(row)


@RULES.of("pad", "constant_pad_nd")
def padded(call: Call) -> Result:
    """Dimensions made longer: by one number everywhere, or by what stands at their ends."""
    tensor, pads = call.tensor(), list(call["pad"])
    found = list(tensor.dimensions)
    constant = call.get("mode", "constant") == "constant"
    for number in range(len(pads) // 2):
        axis, (before, after) = len(found) - 1 - number, pads[2 * number : 2 * number + 2]
        if before == after == 0:
            continue
        if constant and before >= 0 and after >= 0:
            found[axis] = added([Uniform(before), found[axis], Uniform(after)])
        else:
            pin(found[axis])
            found[axis] = Pinned(call.shapes[0][axis])
    return settled(found)


@RULES.of("pixel_shuffle")
def shuffled(call: Call) -> Result:
    """Channels turned into pixels: the inner factor of the channels gets a place."""
    tensor, factor = call.tensor(), call["upscale_factor"]
    *lead, channels, _, _ = tensor.dimensions
    outer, inner = factored(channels, (channels.size // factor**2, factor**2))
    pin(inner)
    return _with_pixels(tensor, [*lead, outer], call.shapes[0])


@RULES.of("pixel_unshuffle")
def unshuffled(call: Call) -> Result:
    """Pixels turned into channels, as their inner factor."""
    tensor, factor = call.tensor(), call["downscale_factor"]
    *lead, channels, _, _ = tensor.dimensions
    return _with_pixels(tensor, [*lead, multiplied([channels, Pinned(factor**2)])], call.shapes[0])


def _with_pixels(tensor: Traced, kept: Sequence[Expression], shape: Sequence[int]) -> Traced:
    for dimension in tensor.dimensions[-2:]:
        pin(dimension)
    return settled([*kept, *(Pinned(size) for size in shape[-2:])])


@RULES.of("im2col")
def unfolded(call: Call) -> Result:
    """Patches of an image: pixels of each as the inner factor of the channels."""
    tensor = call.tensor()
    for dimension in tensor.dimensions[-2:]:
        pin(dimension)
    *lead, channels, _, _ = tensor.dimensions
    patch = call.shapes[0][-2] // channels.size
    return settled([*lead, multiplied([channels, Pinned(patch)]), Pinned(call.shapes[0][-1])])


@RULES.of("view_as_complex")
def made_complex(call: Call) -> Result:
    """Pairs of numbers, as one each: which of a pair is which has a meaning."""
    tensor = call.tensor()
    pin(tensor.dimensions[-1])
    return settled(tensor.dimensions[:-1])


@RULES.of("view_as_real")
def made_real(call: Call) -> Result:
    """Complex numbers as pairs."""
    return settled([*call.tensor().dimensions, Pinned(2)])


@RULES.of("real", "imag")
def part(call: Call) -> Result:
    """One of each pair."""
    return settled(call.tensor().dimensions)


@RULES.of("unfold")
def windowed(call: Call) -> Result:
    """Overlapping stretches of a dimension."""
    tensor = call.tensor()
    axis = place(call["dimension"], len(tensor.dimensions))
    pin(tensor.dimensions[axis])
    found: list[Expression] = [*tensor.dimensions, Pinned(call["size"])]
    found[axis] = Pinned(call.shapes[0][axis])
    return settled(found)


@RULES.of("meshgrid")
def grid(call: Call) -> Result:
    """Each tensor's one dimension among those of all."""
    ones = [tensor.dimensions[0] if tensor.dimensions else UNIT for tensor in call["tensors"]]
    if call.get("indexing") == "xy":
        pin_all(call.tensors)
        return call.pinned()
    return tuple(
        Traced(tuple(one if here == number else Uniform(one.size) for here, one in enumerate(ones)))
        for number in range(len(ones))
    )
