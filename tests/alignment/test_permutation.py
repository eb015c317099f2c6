"""Permutations of axis groups: their inverses, their products, and what they do to tensors."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from remelt.alignment.permutation import Permutation, TensorPlan, permuted, permuted_tensor, random_permutation
from remelt.archs.axis_groups import AxisGroup, Level, Window, keys_of

Drawn = tuple[AxisGroup, dict[str, Tensor]]
SEEDS = st.integers(0, 2**32)


def numbered(*shape: int) -> Tensor:
    """A tensor in which every element is another number."""
    return torch.arange(int(np.prod(shape))).reshape(shape).double()


@st.composite
def groups_of_heads(draw: st.DrawFn) -> Drawn:
    """An attention: a fused tensor of queries, keys and values, head by head, and the columns of the output."""
    heads, size, value, queries = (draw(st.integers(1, 3)) for _ in range(4))
    levels = (
        Level("head", heads),
        Level("query", queries, ("head",)),
        Level("qk", size, () if draw(st.booleans()) else ("head",), fixed=draw(st.booleans())),
        Level("value", value, ("head",)),
    )
    run, offset = draw(st.integers(1, 2)), draw(st.integers(0, 2))
    each = queries * size + size + value
    windows = (
        Window("fused", 0, ("head", "query", "qk"), 0, strides=(each, size, 1)),
        Window("fused", 0, ("head", "qk"), queries * size, strides=(each, 1)),
        Window("fused", 0, ("head", "value"), (queries + 1) * size, strides=(each, 1)),
        Window("out", 1, ("head", "query", "value"), offset, run),
    )
    tensors = {"fused": numbered(heads * each), "out": numbered(2, offset + heads * queries * value * run)}
    return AxisGroup("attention", levels, windows), tensors


@st.composite
def groups_of_cells(draw: st.DrawFn) -> Drawn:
    cells = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    size = sum(cells)
    windows = (
        Window("rows", 0, ("channel",)),
        Window("columns", 1, ("channel",), 1),
        Window("columns", 1, ("channel",), 1 + size),
    )
    tensors = {"rows": numbered(size, 2), "columns": numbered(2, 1 + 2 * size, 3)}
    return AxisGroup("stream", (Level("channel", size, cells=cells),), windows), tensors


@st.composite
def groups_of_experts(draw: st.DrawFn) -> Drawn:
    """Experts as tensors of their own and as one stacked tensor, each with a router's row."""
    experts, hidden = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    levels = (Level("expert", experts), Level("hidden", hidden, ("expert",)))
    windows = (
        Window("router", 0, ("expert",)),
        Window("experts.{}.up", 0, ("expert", "hidden")),
        Window("experts.{}.norm", 0, ("expert",)),
        Window("down[{}]", 1, ("expert", "hidden")),
    )
    tensors = {"router": numbered(experts, 2), "down": numbered(experts, 2, hidden)}
    for number in range(experts):
        tensors[f"experts.{number}.up"] = numbered(hidden, 2) + 100 * number
        tensors[f"experts.{number}.norm"] = numbered(2) + 100 * number
    return AxisGroup("experts", levels, windows), tensors


GROUPS = groups_of_heads() | groups_of_cells() | groups_of_experts()


def drawn(group: AxisGroup, seed: int) -> Permutation:
    return random_permutation(group, np.random.default_rng(seed))


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@given(GROUPS, SEEDS)
def test_the_inverse_undoes_a_permutation(one: Drawn, seed: int) -> None:
    group, tensors = one
    permutation = drawn(group, seed)
    assert same(permuted(permuted(tensors, [permutation]), [permutation.inverse()]), tensors)
    assert permutation.inverse().after(permutation).is_identity
    assert permutation.after(permutation.inverse()).is_identity


@given(GROUPS, SEEDS, SEEDS)
def test_a_product_does_one_after_the_other(one: Drawn, seed: int, other: int) -> None:
    group, tensors = one
    first, second = drawn(group, seed), drawn(group, other)
    assert same(permuted(tensors, [second.after(first)]), permuted(permuted(tensors, [first]), [second]))
    back = first.inverse().after(second.inverse())
    assert same(permuted(permuted(tensors, [second.after(first)]), [back]), tensors)


@given(GROUPS, SEEDS, SEEDS)
def test_levels_that_are_left_out_stay_as_they_are(one: Drawn, seed: int, chosen: int) -> None:
    group, tensors = one
    whole = drawn(group, seed)
    names = [level.name for level in group.levels if not level.fixed]
    some = Permutation(group, {name: whole.parts[name] for at, name in enumerate(names) if chosen >> at & 1})
    assert same(permuted(permuted(tensors, [some]), [some.inverse()]), tensors)
    assert same(permuted(tensors, [whole.after(some)]), permuted(permuted(tensors, [some]), [whole]))


@given(GROUPS, SEEDS)
def test_a_permutation_moves_elements_and_loses_none(one: Drawn, seed: int) -> None:
    group, tensors = one
    moved = permuted(tensors, [drawn(group, seed)])
    assert sorted(torch.cat([one.flatten() for one in moved.values()]).tolist()) == sorted(
        torch.cat([one.flatten() for one in tensors.values()]).tolist()
    )
    assert {key: tensor.shape for key, tensor in moved.items()} == {
        key: tensor.shape for key, tensor in tensors.items()
    }


@given(GROUPS)
def test_what_moves_nothing_is_the_identity(one: Drawn) -> None:
    group, tensors = one
    still = Permutation(group, {})
    assert still.is_identity and still.inverse().is_identity and still.after(still).is_identity
    assert same(permuted(tensors, [still]), tensors)
    for window in group.windows:
        for key in keys_of(group, window):
            assert TensorPlan.of(key, tuple(tensors[key].shape), [(still, window)]).is_identity


@given(groups_of_cells(), SEEDS)
def test_nothing_leaves_its_cell(one: Drawn, seed: int) -> None:
    group, _ = one
    (level,) = group.levels
    cell_of = np.repeat(np.arange(len(level.cells)), level.cells)
    assert np.array_equal(cell_of[drawn(group, seed).parts["channel"]], cell_of)


@given(groups_of_heads(), SEEDS)
def test_a_fixed_level_is_not_permuted(one: Drawn, seed: int) -> None:
    group, _ = one
    assert ("qk" in drawn(group, seed).parts) is not group.by_name["qk"].fixed


@given(groups_of_heads(), SEEDS)
def test_gathering_one_element_at_a_time_gives_the_same(one: Drawn, seed: int) -> None:
    """Each place of a window gets what the parts say, written out with loops."""
    group, tensors = one
    permutation = drawn(group, seed)
    heads, queries, sizes = group.shape(("head", "query", "value"))
    window = group.windows[-1]
    expected = tensors["out"].clone()
    for head in range(heads):
        there = int(permutation.parts["head"][head])
        for query in range(queries):
            asked = int(permutation.parts["query"][head, query])
            for value in range(sizes):
                meant = int(permutation.parts["value"][head, value])
                for step in range(window.run):
                    place = window.offset + ((head * queries + query) * sizes + value) * window.run + step
                    source = window.offset + ((there * queries + asked) * sizes + meant) * window.run + step
                    expected[:, place] = tensors["out"][:, source]
    assert torch.equal(permuted_tensor("out", tensors, [(permutation, window)]), expected)


@given(st.integers(2, 5), SEEDS)
def test_the_order_of_groups_does_not_matter(size: int, seed: int) -> None:
    rows = AxisGroup("rows", (Level("channel", size),), (Window("w", 0, ("channel",)),))
    columns = AxisGroup("columns", (Level("channel", size),), (Window("w", 1, ("channel",)),))
    tensors = {"w": numbered(size, size)}
    first, second = drawn(rows, seed), drawn(columns, seed + 1)
    assert same(permuted(tensors, [first, second]), permuted(tensors, [second, first]))
    assert same(permuted(tensors, [first, second]), permuted(permuted(tensors, [first]), [second]))


@given(st.integers(2, 4))
def test_every_permutation_of_a_small_level_is_drawn(size: int) -> None:
    group = AxisGroup("g", (Level("channel", size),), ())
    generator = np.random.default_rng(0)
    seen = {tuple(random_permutation(group, generator).parts["channel"].tolist()) for _ in range(400)}
    assert len(seen) == np.prod(range(1, size + 1))
