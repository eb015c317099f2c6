"""Weight matching on tensors in memory: what was planted is found, nothing is lost, nothing is done twice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformer import transformer

from remelt.alignment.assignment import solve
from remelt.alignment.margins import certified, find_margins
from remelt.alignment.matching import Visit, match
from remelt.alignment.permutation import Permutation, permuted, random_permutation
from remelt.alignment.products import inner_products
from remelt.alignment.weights import TensorWeights, free_windows
from remelt.archs.axis_groups import AxisGroup, Level, Window
from remelt.errors import CheckError, OptionError

SHAPES = [
    pytest.param({}, id="heads"),
    pytest.param({"queries": 2}, id="grouped queries"),
    pytest.param({"queries": 2, "rotary": True}, id="rotary"),
    pytest.param({"shared_norm": True}, id="shared norm"),
    pytest.param({"queries": 2, "shared_norm": True}, id="grouped queries, shared norm"),
]


def noisy(tensors: dict[str, torch.Tensor], share: float, seed: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: tensor + share * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for key, tensor in tensors.items()
    }


def planted(groups: tuple[AxisGroup, ...], seed: int) -> dict[str, Permutation]:
    generator = np.random.default_rng(seed)
    return {group.name: random_permutation(group, generator) for group in groups}


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("options", SHAPES)
def test_a_permuted_copy_with_half_as_much_noise_is_undone_exactly(options: dict[str, object], seed: int) -> None:
    tensors, groups = transformer(**options)  # type: ignore[arg-type]
    hidden = planted(groups, seed)
    model = noisy(permuted(tensors, hidden.values()), 0.5)
    found = match(TensorWeights(tensors), TensorWeights(model), groups)
    wrong = [name for name, one in found.permutations.items() if not one.after(hidden[name]).is_identity]
    assert wrong == []
    assert found.after > found.before
    assert found.distances[1] < found.distances[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_changes_no_permutation(dtype: torch.dtype) -> None:
    tensors, groups = transformer(queries=2)
    hidden = planted(groups, 1)
    model = noisy(permuted(tensors, hidden.values()), 0.5)
    halves = [TensorWeights({key: one.to(dtype) for key, one in some.items()}) for some in (tensors, model)]
    found = match(*halves, groups)
    assert [name for name, one in found.permutations.items() if not one.after(hidden[name]).is_identity] == []


def test_matching_again_moves_nothing_and_visits_each_group_once() -> None:
    tensors, groups = transformer()
    model = noisy(permuted(tensors, planted(groups, 1).values()), 0.5)
    first = match(TensorWeights(tensors), TensorWeights(model), groups)
    aligned = permuted(model, first.permutations.values())
    second = match(TensorWeights(tensors), TensorWeights(aligned), groups)
    assert second.moved == ()
    assert sorted(visit.group.name for visit in second.visits) == sorted(second.permutations)
    assert second.before == pytest.approx(first.after, rel=1e-5)


def test_the_agreement_never_falls_and_is_what_the_permuted_model_has() -> None:
    tensors, groups = transformer(queries=2, shared_norm=True)
    other, _ = transformer(queries=2, shared_norm=True, seed=9)
    seen: list[Visit] = []
    found = match(TensorWeights(tensors), TensorWeights(other), groups, start="identity", progress=seen.append)
    assert found.visits == tuple(seen)
    for before, after in itertools.pairwise([found.before, *(visit.agreement for visit in seen)]):
        assert after >= before
    aligned = permuted(other, found.permutations.values())
    lying = {key for group in groups if not group.is_fixed for window in group.windows for key in [window.key]}
    product = sum(float((tensors[key].double() * aligned[key].double()).sum()) for key in lying)
    assert found.after == pytest.approx(product, rel=1e-4)
    assert found.after > found.before


def test_a_group_is_visited_again_only_where_one_beside_it_moved() -> None:
    tensors, groups = transformer()
    other, _ = transformer(seed=9)
    found = match(TensorWeights(tensors), TensorWeights(other), groups, start="identity")
    beside = {"stream": {group.name for group in groups}} | {
        group.name: {"stream"} for group in groups if group.name != "stream"
    }
    last: dict[str, int] = {}
    for place, visit in enumerate(found.visits):
        name = visit.group.name
        if name in last:
            between = found.visits[last[name] + 1 : place]
            assert any(one.gain > 0 and one.group.name in beside[name] for one in between), name
        last[name] = place


def test_the_same_is_found_with_any_number_of_threads() -> None:
    tensors, groups = transformer(queries=2)
    other, _ = transformer(queries=2, seed=9)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            one = match(TensorWeights(tensors), TensorWeights(other), groups)
            found.append({name: {k: v.tolist() for k, v in p.parts.items()} for name, p in one.permutations.items()})
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_a_fine_tune_is_certified_without_a_visit_and_a_permuted_model_is_not() -> None:
    tensors, groups = transformer()
    margins = find_margins(TensorWeights(tensors), groups)
    tuned = match(TensorWeights(tensors), TensorWeights(noisy(tensors, 0.1)), groups, margins=margins)
    free = {group.name for group in groups if not group.is_fixed}
    assert set(tuned.certified) == free
    assert tuned.visits == () and tuned.moved == ()
    assert tuned.after == tuned.before
    model = permuted(tensors, planted(groups, 1).values())
    found = match(TensorWeights(tensors), TensorWeights(model), groups, margins=margins)
    assert found.certified == ()
    assert found.distances[1] == pytest.approx(0.0, abs=1e-1)


def test_what_margins_certify_a_dense_match_leaves_as_it_is() -> None:
    tensors, groups = transformer(width=32)
    margins = find_margins(TensorWeights(tensors), groups)
    weights, lying = TensorWeights(tensors), free_windows(groups)
    counts = set()
    for share in (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.9):
        model = TensorWeights(noisy(tensors, share))
        proven = certified(margins, weights, model, [group for group in groups if not group.is_fixed])
        for group in groups:
            if group.name in proven:
                terms = inner_products(group, weights, model, lying, {})
                assert solve(group, terms, Permutation(group, {}))[1] == 0
        counts.add(len(proven))
    assert len(counts) > 1  # some noise leaves everything certified, and some does not


def test_channels_on_two_axes_of_one_tensor_are_bettered_only_where_that_is_so() -> None:
    generator = torch.Generator().manual_seed(0)
    group = AxisGroup("state", (Level("channel", 12),), (Window("w", 0, ("channel",)), Window("w", 1, ("channel",))))
    ours, theirs = ({"w": torch.randn(12, 12, generator=generator)} for _ in range(2))
    found = match(TensorWeights(ours), TensorWeights(theirs), [group], start="identity")
    aligned = permuted(theirs, found.permutations.values())
    assert found.after == pytest.approx(float((ours["w"] * aligned["w"]).sum()), rel=1e-4)
    assert found.after >= found.before
    planted_copy = permuted(ours, [random_permutation(group, np.random.default_rng(2))])
    again = match(TensorWeights(ours), TensorWeights(planted_copy), [group])
    assert again.after == pytest.approx(float((ours["w"] ** 2).sum()), rel=1e-5)


def test_what_does_not_fit_is_refused_by_name_and_all_at_once() -> None:
    tensors, groups = transformer()
    model = dict(tensors)
    del model["0.norm.weight"]
    model["1.up.weight"] = torch.zeros(128, 32)
    model["1.down.weight"] = torch.zeros(64, 128, dtype=torch.int8)
    with pytest.raises(CheckError) as refused:
        match(TensorWeights(tensors), TensorWeights(model), groups)
    text = str(refused.value)
    assert "refused: 3 problems in 2 inputs" in text
    assert "the model  lacks 0.norm.weight, which is permuted with the group stream" in text
    assert (
        "1.up.weight  is [128, 64] in the reference and [128, 32] in the model: only models of one shape are aligned"
    ) in text
    assert "1.down.weight  of the model holds no floating-point numbers, but lies on a permuted axis" in text


def test_an_unknown_start_is_refused() -> None:
    tensors, groups = transformer()
    with pytest.raises(OptionError, match="a start is identity, signature, both, but got 'warm'"):
        match(TensorWeights(tensors), TensorWeights(tensors), groups, start="warm")


def test_running_statistics_follow_but_are_not_matched() -> None:
    generator = torch.Generator().manual_seed(0)
    windows = ("in.weight", "norm.running_mean", "norm.running_var", "norm.weight")
    group = AxisGroup("channels", (Level("channel", 8),), tuple(Window(key, 0, ("channel",)) for key in windows))
    tensors = {"in.weight": torch.randn(8, 30, generator=generator), "norm.weight": torch.ones(8)}
    tensors |= {"norm.running_mean": torch.arange(8.0) * 100, "norm.running_var": torch.arange(8.0) * 100}
    order = np.array([3, 0, 1, 2, 7, 6, 5, 4], np.int32)
    (moved,) = [Permutation(group, {"channel": order})]
    model = permuted(tensors, [moved])
    model["norm.running_mean"], model["norm.running_var"] = (torch.arange(8.0) * 1000 for _ in range(2))
    found = match(TensorWeights(tensors), TensorWeights(model), [group])
    assert found.permutations["channels"].after(moved).is_identity
    aligned = permuted(model, found.permutations.values())
    assert aligned["norm.running_mean"].tolist() == model["norm.running_mean"][np.argsort(order)].tolist()


def test_margins_of_other_windows_or_of_groups_on_two_axes_prove_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(12, 12, generator=generator) for key in ("x", "y")}
    windows = (Window("x", 0, ("channel",)), Window("y", 0, ("channel",)), Window("x", 1, ("channel",)))
    both, one, twice = (
        AxisGroup("g", (Level("channel", 12),), windows[:2]),
        AxisGroup("g", (Level("channel", 12),), windows[:1]),
        AxisGroup("g", (Level("channel", 12),), windows),
    )
    weights = TensorWeights(tensors)
    margins = find_margins(weights, [both])
    assert certified(margins, weights, weights, [both]) == ("g",)
    assert certified(margins, weights, weights, [one]) == ()
    assert certified(find_margins(weights, [twice]), weights, weights, [twice]) == ()


def test_a_group_on_two_axes_of_a_tensor_is_bettered_until_it_gains_no_more() -> None:
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        levels = (Level("channel", 10),)
        group = AxisGroup("state", levels, (Window("w", 0, ("channel",)), Window("w", 1, ("channel",))))
        ours, theirs = ({"w": torch.randn(10, 10, generator=generator)} for _ in range(2))
        found = match(TensorWeights(ours), TensorWeights(theirs), [group], start="identity")
        aligned = permuted(theirs, found.permutations.values())
        assert match(TensorWeights(ours), TensorWeights(aligned), [group], start="identity").moved == ()


def test_numbers_that_are_none_are_refused_by_name() -> None:
    tensors, groups = transformer()
    model = {**tensors, "0.up.weight": torch.full_like(tensors["0.up.weight"], torch.nan)}
    with pytest.raises(CheckError) as refused:
        match(TensorWeights(tensors), TensorWeights(model), groups)
    assert "0.up.weight  of the model holds NaN or infinity: nothing can be compared with it" in str(refused.value)
