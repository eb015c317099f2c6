"""Rules for what is computed place by place, and for what runs along a dimension without telling its places apart."""

from __future__ import annotations

from remelt.alignment.derivation.calls import (
    Call,
    Result,
    Rules,
    Traced,
    aligned,
    pin_all,
    place,
    places,
    settled,
    without,
)
from remelt.alignment.derivation.labels import UNIT, Expression, Pinned, Uniform, pin
from remelt.alignment.derivation.tying import settle

RULES = Rules()


def by_place(call: Call) -> Result:
    """Anything that is computed place by place, as tags of operations tell."""
    return tuple(settled(aligned(call.tensors)) for _ in call.shapes)


RULES.of("polar", "complex", "type_as", "dropout", "alpha_dropout", "feature_dropout", "native_dropout")(by_place)
RULES.of("where", "masked_fill", "lerp", "addcmul", "addcdiv", "clamp", "nan_to_num")(by_place)


@RULES.of("_to_copy", "to", "clone", "contiguous", "alias", "detach", "lift_fresh_copy", "lift", "positive", "_conj")
def passed(call: Call) -> Result:
    """The same numbers."""
    return settled(call.tensor().dimensions, call.tensor())


@RULES.of("copy", "copy_")
def copied(call: Call) -> Result:
    """The numbers of another, in the shape of the first."""
    source = call.tensor("src")
    return settled(aligned([Traced(tuple(Uniform(size) for size in call.shapes[0])), source]))


@RULES.of("zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "empty_like", "fill", "zero")
@RULES.of("new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor", "empty_permuted")
def filled(call: Call) -> Result:
    """The same number everywhere."""
    if (value := call.optional("value")) is not None and value.dimensions:
        pin_all([value])
    return Traced(tuple(Uniform(size) for size in call.shapes[0]))


@RULES.of("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax")
def along(call: Call) -> Result:
    """What keeps a dimension and mixes along it, whatever the order of its places."""
    tensor = call.tensor()
    settle(without(tensor.dimensions, places(call["dim"], len(tensor.dimensions))))
    return settled(tensor.dimensions)


@RULES.of("sum", "mean", "amax", "amin", "prod", "var", "std", "var_mean", "std_mean", "logsumexp", "any", "all")
@RULES.of("linalg_vector_norm", "norm", "nansum", "nanmean", "count_nonzero", "aminmax", "max", "min")
def reduced(call: Call) -> Result:
    """What is left of a tensor where dimensions are summed, or the like."""
    tensor = call.tensor()
    rank = len(tensor.dimensions)
    if (other := call.optional("other")) is not None:  # max and min of two tensors
        return settled(aligned([tensor, other]))
    axes = places(call.get("dim"), rank)
    kept = [axis not in axes for axis in range(rank)]
    if call.get("keepdim"):
        left: list[Expression] = [one if keep else UNIT for one, keep in zip(tensor.dimensions, kept, strict=True)]
    else:
        left = [one for one, keep in zip(tensor.dimensions, kept, strict=True) if keep]
    if call.name in ("aten::max", "aten::min") and len(call.shapes) == 2:
        for axis in axes:
            pin(tensor.dimensions[axis])  # where the greatest stands is told, too
    return tuple(settled(left) for _ in call.shapes)


@RULES.of("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "flip", "roll")
def ordered(call: Call) -> Result:
    """What depends on the order of places along a dimension."""
    tensor = call.tensor()
    rank = len(tensor.dimensions)
    axes = places(call.get("dims", call.get("dim")), rank)
    found = list(tensor.dimensions)
    for axis in axes:
        if not isinstance(found[axis], Uniform) or "cum" in call.name:
            pin(found[axis])
            found[axis] = Pinned(call.shapes[0][axis])
    return tuple(settled(found) for _ in call.shapes)


@RULES.of("tril", "triu")
def triangular(call: Call) -> Result:
    """What depends on the order of the last two dimensions."""
    tensor = call.tensor()
    for dimension in tensor.dimensions[-2:]:
        pin(dimension)
    return settled([*tensor.dimensions[:-2], *(Pinned(one.size) for one in tensor.dimensions[-2:])])


@RULES.of("argmax", "argmin")
def greatest(call: Call) -> Result:
    """Where the greatest stands: indices into a dimension."""
    tensor = call.tensor()
    rank = len(tensor.dimensions)
    if call.get("dim") is None:
        pin_all([tensor])
        return call.pinned()
    axis = place(call["dim"], rank)
    left = list(tensor.dimensions)
    left[axis : axis + 1] = [UNIT] if call.get("keepdim") else []
    return Traced(settled(left).dimensions, tensor.dimensions[axis], call.source)


@RULES.of("topk", "sort")
def best(call: Call) -> Result:
    """The greatest along a dimension, the greatest first, and the indices of where they stood."""
    tensor = call.tensor()
    axis = place(call.get("dim", -1), len(tensor.dimensions))
    left = list(tensor.dimensions)
    left[axis] = Pinned(call.shapes[0][axis])
    values = settled(left)
    return values, Traced(values.dimensions, tensor.dimensions[axis], call.source)


@RULES.of("argsort")
def order(call: Call) -> Result:
    """The indices that sort a dimension."""
    found = best(call)
    assert isinstance(found, tuple)
    return found[1]
