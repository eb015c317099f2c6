"""Rules for what chooses places by numbers: embeddings, indices, routers.

A tensor of indices that were found in a dimension (the experts with the greatest scores) follows a permutation of that
dimension. What is chosen by it is the same as before, so the dimension stays free. What is chosen by any other numbers
has a place.
"""

from __future__ import annotations

from collections.abc import Sequence

from remelt.alignment.derivation.calls import (
    Call,
    Result,
    Rules,
    Traced,
    broadcast,
    pin_all,
    place,
    settled,
)
from remelt.alignment.derivation.labels import Expression, Pick, Pinned, Uniform, give_role, pin
from remelt.alignment.derivation.tying import joined, settle

RULES = Rules()


def _chosen(dimension: Expression, index: Traced) -> tuple[Expression, ...]:
    """The dimensions that stand for one of which places are chosen."""
    if index.picks is None or index.picks.size != dimension.size:
        if index.picks is not None:
            pin(index.picks)
        pin(dimension)
        return index.dimensions
    tied = joined(dimension, index.picks)
    give_role(tied, "expert")
    if len(index.dimensions) == 1 and isinstance(index.dimensions[0], Pinned):
        return (Pick(index.shape[0], tied, index.source),)
    return index.dimensions


@RULES.of("embedding")
def embedding(call: Call) -> Result:
    """Rows of a table by their numbers."""
    table, index = call.tensor("weight"), call.tensor("indices")
    return settled([*_chosen(table.dimensions[0], index), *table.dimensions[1:]])


@RULES.of("index_select")
def chosen_along(call: Call) -> Result:
    """Places of one dimension by their numbers."""
    tensor, index = call.tensor(), call.tensor("index")
    axis = place(call["dim"], len(tensor.dimensions))
    found = list(tensor.dimensions)
    found[axis : axis + 1] = _chosen(found[axis], index)
    return settled(found)


@RULES.of("index", "_unsafe_index")
def indexed(call: Call) -> Result:
    """Places by their numbers along several dimensions."""
    tensor, indices = call.tensor(), list(call["indices"])
    indices += [None] * (len(tensor.dimensions) - len(indices))
    used = [axis for axis, one in enumerate(indices) if one is not None]
    rank = len(call.shapes[0]) - (len(tensor.dimensions) - len(used))
    if len(used) == 1 and len(indices[used[0]].dimensions) == rank:
        axis = used[0]
        middle = _chosen(tensor.dimensions[axis], indices[axis])
        return settled([*tensor.dimensions[:axis], *middle, *tensor.dimensions[axis + 1 :]])
    _pin_indices([one for one in indices if one is not None])
    masks = any(isinstance(one, Traced) and len(one.dimensions) > rank for one in indices if one is not None)
    if masks or len(used) > len(tensor.dimensions) or rank < 0:
        pin_all(call.tensors)
        return call.pinned()
    for axis in used:
        pin(tensor.dimensions[axis])
    together = used == list(range(used[0], used[-1] + 1))
    first = used[0] if together else 0
    kept = [one for axis, one in enumerate(tensor.dimensions) if axis not in used]
    middle = tuple(Pinned(size) for size in call.shapes[0][first : first + rank])
    return settled([*kept[:first], *middle, *kept[first:]])


def _pin_indices(indices: Sequence[Traced]) -> None:
    for index in indices:
        pin_all([index])


@RULES.of("gather", "take_along_dim")
def gathered(call: Call) -> Result:
    """Places of a dimension by numbers of their own for each place of the others."""
    tensor, index = call.tensor(), call.tensor("index" if "index" in call.arguments else "indices")
    axis = place(call["dim"], len(tensor.dimensions))
    found: list[Expression] = []
    for here, (one, other) in enumerate(zip(tensor.dimensions, index.dimensions, strict=True)):
        if here == axis:
            found.append(other)
        elif one.size == other.size:
            found.append(broadcast([one, other]))
        else:
            pin(one)
            pin(other)
            found.append(Pinned(other.size))
    if index.picks is None or index.picks.size != tensor.dimensions[axis].size:
        pin(tensor.dimensions[axis])
        if index.picks is not None:
            pin(index.picks)
    else:
        joined(tensor.dimensions[axis], index.picks)
        settle(found)
    return settled(found)


@RULES.of("one_hot")
def one_hot(call: Call) -> Result:
    """A one at the place of each number."""
    index = call.tensor()
    size = call.shapes[0][-1]
    if index.picks is None or index.picks.size != size:
        pin_all([index])
        return settled([*index.dimensions, Pinned(size)])
    return settled([*index.dimensions, index.picks])


@RULES.of("scatter", "scatter_add", "scatter_reduce")
def scattered(call: Call) -> Result:
    """Numbers put at places of a dimension."""
    tensor, index, source = call.tensor(), call.tensor("index"), call.optional("src")
    axis = place(call["dim"], len(tensor.dimensions))
    whole = tensor.shape
    follows = index.picks is not None and index.picks.size == whole[axis]
    found: list[Expression] = []
    for here, (one, other) in enumerate(zip(tensor.dimensions, index.dimensions, strict=True)):
        beside = [] if source is None or not source.dimensions else [source.dimensions[here]]
        if here == axis:
            _aligned_or_pinned([other, *beside])
            if follows and index.picks is not None:
                found.append(joined(one, index.picks))
            else:
                pin(one)
                found.append(Pinned(one.size))
        elif all(every.size == one.size for every in (other, *beside)):
            found.append(broadcast([one, other, *beside]))
        else:
            pin_all([Traced((one, other, *beside))])
            found.append(Pinned(one.size))
    if index.picks is not None and not follows:
        pin(index.picks)
    return settled(found)


def _aligned_or_pinned(expressions: Sequence[Expression]) -> None:
    if len({one.size for one in expressions}) == 1:
        broadcast(expressions)
    else:
        pin_all([Traced(tuple(expressions))])


@RULES.of("index_add", "index_copy", "index_fill")
def added_at(call: Call) -> Result:
    """Rows of another tensor added at places of a dimension."""
    tensor, index, source = call.tensor(), call.tensor("index"), call.optional("source")
    axis = place(call["dim"], len(tensor.dimensions))
    found = list(tensor.dimensions)
    pin_all([index])
    pin(found[axis])
    if source is not None and source.dimensions:
        pin(source.dimensions[axis])
        for here, other in enumerate(source.dimensions):
            if here != axis:
                found[here] = broadcast([found[here], other])
    found[axis] = Pinned(tensor.shape[axis])
    return settled([Uniform(one.size) if isinstance(one, Uniform) else one for one in found])
