"""Many models are aligned to the first and refined: the objective rises, and no model is ever copied."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remelt.alignment.many import SumOfModels, match_many
from remelt.alignment.matching import Visit
from remelt.alignment.permutation import Permutation, permuted, random_permutation
from remelt.alignment.weights import TensorWeights, free_windows
from remelt.archs.axes.draft import Drafts
from remelt.archs.axis_groups import AxisGroup
from remelt.errors import CheckError, OptionError

Tensors = dict[str, torch.Tensor]


def network(width: int, seed: int, heads: int = 4) -> tuple[Tensors, tuple[AxisGroup, ...]]:
    """An attention and two layers beside it, all numbers random."""
    source = torch.Generator().manual_seed(seed)
    linear = {"in": (width, 12), "q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width)}
    linear |= {"up": (2 * width, width), "down": (width, 2 * width), "out": (6, width)}
    tensors = {f"{name}.weight": torch.randn(shape, generator=source) for name, shape in linear.items()}
    tensors |= {f"{name}.bias": torch.randn(shape[0], generator=source) for name, shape in linear.items()}
    drafts = Drafts({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    drafts.fixed("pixels", 12).read_by("in")
    stream = drafts.free("stream", width).made_by("in").made_by("o").made_by("down")
    for name in ("q", "k", "v", "up", "out"):
        stream.read_by(name)
    attention = drafts.attention("attention", heads, width // heads)
    attention.made_by("q", ("head", "qk")).made_by("k", ("head", "qk"))
    attention.made_by("v", ("head", "value")).read_by("o", ("head", "value"))
    drafts.free("hidden", 2 * width).made_by("up").read_by("down")
    drafts.fixed("classes", 6).made_by("out")
    return tensors, drafts.finished()


def spread(
    tensors: Tensors, groups: tuple[AxisGroup, ...], count: int, noise: float
) -> tuple[list[Tensors], list[dict[str, Permutation]]]:
    """Noisy copies of one network, all but the first permuted; and how."""
    models, hidden = [], []
    for seed in range(count):
        drawn, source = np.random.default_rng(seed), torch.Generator().manual_seed(100 + seed)
        own = {group.name: random_permutation(group, drawn) for group in groups if seed and not group.is_fixed}
        noisy = {
            key: tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=source)
            for key, tensor in tensors.items()
        }
        models.append(permuted(noisy, own.values()))
        hidden.append(own)
    return models, hidden


def objective(
    models: list[Tensors], permutations: tuple[Mapping[str, Permutation], ...], groups: tuple[AxisGroup, ...]
) -> float:
    """The sum of the inner products of all pairs, by whole copies, of all tensors that may be permuted."""
    whole = [permuted(model, one.values()) for model, one in zip(models, permutations, strict=True)]
    pairs = [(a, b) for place, a in enumerate(whole) for b in whole[:place]]
    return sum(float((a[key].double() * b[key].double()).sum()) for a, b in pairs for key in free_windows(groups))


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_five_permuted_copies_of_one_network_are_brought_back(noise: float) -> None:
    tensors, groups = network(64, seed=1)
    models, hidden = spread(tensors, groups, 5, noise)
    found = match_many([TensorWeights(model) for model in models], groups)
    for permutations, own in zip(found.permutations, hidden, strict=True):
        for name, one in permutations.items():
            undone = one.after(own[name]) if name in own else one
            assert undone.is_identity, name


@settings(max_examples=12)
@given(seed=st.integers(0, 10_000), count=st.integers(2, 5))
def test_the_objective_never_falls_and_is_what_whole_copies_have(seed: int, count: int) -> None:
    drawn = [network(8, seed=seed + place, heads=2) for place in range(count)]
    models, groups = [tensors for tensors, _ in drawn], drawn[0][1]
    heard: list[tuple[int, Visit]] = []
    found = match_many(
        [TensorWeights(model) for model in models], groups, progress=lambda place, visit: heard.append((place, visit))
    )
    assert found.before == pytest.approx(objective(models, tuple({} for _ in models), groups), rel=1e-4, abs=0.1)
    assert found.after == pytest.approx(objective(models, found.permutations, groups), rel=1e-4, abs=0.1)
    assert found.before <= found.aligned + 0.1
    refined = [visit.agreement for _, visit in heard if visit.start == "others"]
    assert [found.aligned, *refined] == sorted([found.aligned, *refined])
    assert found.after == (refined or [found.aligned])[-1]
    assert all(one.is_identity for one in found.permutations[0].values())


def test_refining_betters_what_the_first_alone_decides() -> None:
    drawn = [network(16, seed=place) for place in range(5)]
    models = [TensorWeights(tensors) for tensors, _ in drawn]
    found = match_many(models, drawn[0][1])
    assert found.after > found.aligned > found.before
    assert found.passes > 1
    plain = match_many(models, drawn[0][1], refine=False)
    assert plain.after == plain.aligned == pytest.approx(found.aligned)
    assert plain.passes == 0


def test_a_second_run_finds_the_same() -> None:
    drawn = [network(16, seed=place) for place in range(4)]
    models = [TensorWeights(tensors) for tensors, _ in drawn]
    first, second = match_many(models, drawn[0][1]), match_many(models, drawn[0][1])
    assert first.after == second.after
    for one, other in zip(first.permutations, second.permutations, strict=True):
        for name in one:
            assert all(np.array_equal(part, other[name].parts[level]) for level, part in one[name].parts.items())


def test_nothing_is_visited_again_once_nothing_around_it_moves() -> None:
    tensors, groups = network(16, seed=3)
    models = [TensorWeights(tensors)] * 4
    heard: list[int] = []
    found = match_many(models, groups, progress=lambda place, visit: heard.append(place))
    free = sum(not group.is_fixed for group in groups)
    assert found.passes == 1
    assert len(heard) == free * (3 + 4)  # once for each of the others, once for each model to refine


def test_the_sum_of_models_is_that_of_permuted_copies_in_float32() -> None:
    tensors, groups = network(16, seed=4)
    models, hidden = spread({key: tensor.half() for key, tensor in tensors.items()}, groups, 3, 0.5)
    summed = SumOfModels([TensorWeights(model) for model in models], hidden, free_windows(groups))
    whole = [permuted(model, own.values()) for model, own in zip(models, hidden, strict=True)]
    for key in tensors:
        total = summed.tensor(key)
        assert total.dtype == torch.float32
        assert torch.allclose(total, sum(one[key].float() for one in whole))


class Counted(TensorWeights):
    """Weights that note how many tensors are asked for and are not yet let go."""

    held = 0
    most = 0

    def tensor(self, key: str) -> torch.Tensor:
        one = super().tensor(key).clone()
        Counted.held += 1
        Counted.most = max(Counted.most, Counted.held)
        weakref.finalize(one, self._let_go)
        return one

    @staticmethod
    def _let_go() -> None:
        Counted.held -= 1


def test_no_more_tensors_are_held_for_more_models() -> None:
    most = []
    for count in (3, 6):
        drawn = [network(8, seed=place, heads=2) for place in range(count)]
        Counted.held = Counted.most = 0
        match_many([Counted(tensors) for tensors, _ in drawn], drawn[0][1])
        most.append(Counted.most)
    assert most[0] == most[1] <= 4


def test_one_model_is_refused() -> None:
    tensors, groups = network(8, seed=0, heads=2)
    with pytest.raises(OptionError, match="several models are aligned to each other, but got 1"):
        match_many([TensorWeights(tensors)], groups)


def test_a_model_of_another_shape_is_refused() -> None:
    tensors, groups = network(8, seed=0, heads=2)
    other, _ = network(16, seed=0, heads=2)
    with pytest.raises(
        CheckError, match=r"in\.weight  is \[8, 12\] in the reference and \[16, 12\] in the model 3: only"
    ):
        match_many([TensorWeights(tensors), TensorWeights(tensors), TensorWeights(other)], groups)
