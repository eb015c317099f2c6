"""Rules for what multiplies and sums: linear maps, convolutions, products of matrices, attention.

A dimension that two tensors are contracted along is tied between them. Its labels may depend only on those of
dimensions that both have and that are aligned with each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_letters

from remelt.alignment.derivation.calls import Call, Result, Rules, Traced, aligned, broadcast, pin_all, settled
from remelt.alignment.derivation.labels import (
    UNIT,
    Dimensions,
    Expression,
    Pick,
    Pinned,
    Uniform,
    give_role,
    leaves,
    multiplied,
    pin,
)
from remelt.alignment.derivation.splitting import factored
from remelt.alignment.derivation.tying import joined, settle

RULES = Rules()


def contracted(operands: Sequence[tuple[Dimensions, Sequence[str]]], kept: Sequence[str]) -> Dimensions:
    """The dimensions ``kept`` of a sum of products, where the dimensions of each operand have letters."""
    columns: dict[str, list[Expression]] = {}
    for dimensions, letters in operands:
        for dimension, letter in zip(dimensions, letters, strict=True):
            columns.setdefault(letter, []).append(dimension)
    found = {letter: broadcast(column) for letter, column in columns.items()}
    for letter in columns:
        sharing = [set(letters) for _, letters in operands if letter in letters]
        if letter not in kept or len(sharing) > 1:
            settle([found[one] for one in sorted(set.intersection(*sharing))])
    return tuple(found[letter] for letter in kept)


def _lead(*tensors: Dimensions, own: int = 2) -> tuple[list[list[str]], list[str]]:
    """Letters for the dimensions before the last ones, aligned from the right, of each tensor and of all."""
    most = max(len(dimensions) for dimensions in tensors) - own
    letters = [f"batch{number:02}" for number in range(most)]
    return [letters[most - (len(dimensions) - own) :] for dimensions in tensors], letters


def multiplied_matrices(one: Dimensions, other: Dimensions) -> Dimensions:
    """The dimensions of a product of matrices, stacked or not."""
    row, column = len(one) == 1, len(other) == 1
    one = (UNIT, *one) if row else one
    other = (*other, UNIT) if column else other
    (first, second), lead = _lead(one, other)
    kept = [*lead, *([] if row else ["row"]), *([] if column else ["column"])]
    return contracted([(one, [*first, "row", "inner"]), (other, [*second, "inner", "column"])], kept)


@RULES.of("matmul", "mm", "bmm", "mv", "dot", "linalg_matmul")
def product(call: Call) -> Result:
    """A product of two tensors of matrices."""
    one, other = call.tensors
    if len(one.dimensions) == len(other.dimensions) > 2:
        _name_attention(one.dimensions, other.dimensions)
    return settled(multiplied_matrices(one.dimensions, other.dimensions))


def _name_attention(one: Dimensions, other: Dimensions) -> None:
    """Name what attention that is written out is made of."""
    if not any(leaves(dimension) for dimension in one[1:-2]):
        return
    for dimension in (*one[1:-2], *other[1:-2]):
        give_role(dimension, "head")
    give_role(one[-1], "qk")
    give_role(other[-1], "value")


@RULES.of("addmm", "baddbmm", "addmv")
def product_with_sum(call: Call) -> Result:
    """A product of matrices, added to something."""
    start, one, other = call.tensors
    found = Traced(multiplied_matrices(one.dimensions, other.dimensions))
    return settled(aligned([start, found]))


@RULES.of("outer", "ger")
def outer(call: Call) -> Result:
    """All products of two vectors' numbers."""
    one, other = call.tensors
    return settled([*one.dimensions, *other.dimensions])


@RULES.of("linear")
def linear(call: Call) -> Result:
    """A linear map of the last dimension."""
    found = multiplied_matrices(call.tensor("input").dimensions, _transposed(call.tensor("weight").dimensions))
    return _with_bias(found, call.optional("bias"), len(found) - 1)


def _transposed(dimensions: Dimensions) -> Dimensions:
    return dimensions[::-1]


def _with_bias(dimensions: Dimensions, bias: Traced | None, axis: int) -> Traced:
    found = list(dimensions)
    if bias is not None and bias.dimensions:
        found[axis] = joined(found[axis], bias.dimensions[0])
    return settled(found)


@RULES.of("bilinear")
def bilinear(call: Call) -> Result:
    """A bilinear map of the last dimensions of two tensors."""
    one, other, weight = (call.tensor(name).dimensions for name in ("input1", "input2", "weight"))
    lead = [f"batch{number:02}" for number in range(len(one) - 1)]
    operands = [(one, [*lead, "i"]), (other, [*lead, "j"]), (weight, ["o", "i", "j"])]
    found = contracted(operands, [*lead, "o"])
    return _with_bias(found, call.optional("bias"), len(found) - 1)


@RULES.of("einsum")
def einsum(call: Call) -> Result:
    """A sum of products told by letters."""
    equation, tensors = call["equation"].replace(" ", ""), call["tensors"]
    left, _, right = equation.partition("->")
    terms = left.split(",")
    if "->" not in equation or any(len(set(term)) != len(term) for term in terms):
        pin_all(tensors)
        return call.pinned()
    width = max(
        (len(tensor.dimensions) - len(term.replace("...", "")) for tensor, term in zip(tensors, terms, strict=True))
    )
    spare = [letter for letter in ascii_letters if letter not in equation][:width]
    operands = []
    for tensor, term in zip(tensors, terms, strict=True):
        count = len(tensor.dimensions) - len(term.replace("...", ""))
        operands.append((tensor.dimensions, term.replace("...", "".join(spare[len(spare) - count :]))))
    return settled(contracted(operands, right.replace("...", "".join(spare))))


@RULES.of("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu")
@RULES.of("_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention")
def attention(call: Call) -> Result:
    """Attention: queries and keys are contracted, then values along the keys' positions."""
    query, key, value = (call.tensor(name).dimensions for name in ("query", "key", "value"))
    if call.get("enable_gqa") and query[-3].size != key[-3].size:
        spread = Uniform(query[-3].size // key[-3].size)
        key, value = ((*one[:-3], multiplied([one[-3], spread]), *one[-2:]) for one in (key, value))
    for dimension in (*query[1:-2], *key[1:-2]):
        give_role(dimension, "head")
    give_role(query[-1], "qk")
    give_role(value[-1], "value")
    if call.get("is_causal"):
        pin(query[-2])
        pin(key[-2])
    scores = multiplied_matrices(query, (*key[:-2], key[-1], key[-2]))
    mask = call.optional("attn_mask")
    if mask is not None:
        scores = aligned([Traced(scores), mask])
    settle(scores)
    settle(scores[:-1])
    found = settled(multiplied_matrices(scores, value))
    rest = call.pinned()[1:]
    return (found, *rest) if rest else found


@RULES.of("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(call: Call) -> Result:
    """A convolution: channels are contracted within groups, what the kernel runs over has a place."""
    tensor, weight = call.tensor("input").dimensions, call.tensor("weight").dimensions
    transposed = call.get("transposed") or "transpose" in call.name
    groups = call.get("groups") or 1
    rank = len(weight) - 2
    batch, channels, space = tensor[: -1 - rank], tensor[-1 - rank], tensor[len(tensor) - rank :]
    for dimension in weight[2:]:
        pin(dimension)
    if _is_pointwise(call, weight):
        kept = list(space)
    else:
        for dimension in space:
            pin(dimension)
        kept = [Pinned(size) for size in call.shapes[0][len(call.shapes[0]) - rank :]]
    first = factored(weight[0], (groups, weight[0].size // groups))
    inner = factored(channels, (groups, channels.size // groups))
    lead = [f"batch{number}" for number in range(len(batch))]
    grid = [f"space{number}" for number in range(rank)]
    rows = ["group", "in", "out"] if transposed else ["group", "out", "in"]
    operands = [((*batch, *inner, *kept), [*lead, "group", "in", *grid]), ((*first, weight[1]), rows)]
    found = contracted(operands, [*lead, "group", "out", *grid])
    count = len(batch)
    made = (*found[:count], multiplied(found[count : count + 2]), *found[count + 2 :])
    if groups > 1:
        give_role(found[count], "group")
        give_role(found[count + 1], "member")
    return _with_bias(made, call.optional("bias"), count)


def _is_pointwise(call: Call, weight: Dimensions) -> bool:
    """Whether each place is mapped for itself."""

    def every(name: str, wanted: int) -> bool:
        value = call.get(name)
        return value is None or all(one == wanted for one in (value if isinstance(value, list | tuple) else [value]))

    still = not isinstance(call.get("padding"), str) and every("padding", 0) and every("output_padding", 0)
    return still and every("stride", 1) and all(one.size == 1 for one in weight[2:])


@RULES.of("_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_product(call: Call) -> Result:
    """Rows in stretches, each with the matrix of one expert; where the stretches end tells the expert of each row."""
    rows, stack, ends = call.tensors[:3]
    if len(rows.dimensions) != 2 or len(stack.dimensions) != 3:
        pin_all(call.tensors)
        return call.pinned()
    pin(stack.dimensions[0])
    give_role(stack.dimensions[0], "expert")
    chosen = Pick(rows.dimensions[0].size, stack.dimensions[0], f"rows of {ends.source}")
    operands = [
        ((joined(rows.dimensions[0], chosen), rows.dimensions[1]), ["row", "in"]),
        ((chosen, *stack.dimensions[1:]), ["row", "in", "out"]),
    ]
    return settled(contracted(operands, ["row", "out"]))
