"""Sums across all tensors of a result: known before any of it is computed, whatever the threads, slices or executor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import remelt as rm
from remelt.engine.tiles import TaskRun
from remelt.errors import MethodError, RecipeError
from remelt.methods import METHODS
from remelt.methods.selection import ACROSS, HELD, SELECTION, thresholds
from remelt.planning.cost import FOLD
from remelt.recipe.method import Bindings, Delta, Flag, Numbers, Reduction, Same, Sums, merge_method


def rounds(values: Bindings) -> bool | Sequence[Reduction]:
    return ACROSS if values.get("whole") else True


@merge_method(cut="element", reductions=SELECTION, reduces=rounds, conclusion=thresholds, held=HELD, workspace=4.0)
def pruned(*models: Delta, k: Numbers = 0.5, whole: Flag = True, sums: Sums) -> Delta:
    model: Tensor = models[0]
    return torch.where(model.abs() >= sums["threshold0"], model, 0.0)


@merge_method(
    cut="element",
    reductions=(Reduction(lambda a: {"mean": a.double().sum()}, across=True),),
)
def fractional(a: Same, *, sums: Sums) -> Same:
    return a * sums["mean"]


SPECIMENS = True
SIZES = {"a.0.w": 1000, "a.1.w": 300_000, "b.w": 1, "c": 2 * FOLD + 77, "d": 0}


def models(count: int) -> list[dict[str, Tensor]]:
    found = []
    for seed in range(count):
        drawn = torch.Generator().manual_seed(seed)
        scales = {key: 0.1 + place for place, key in enumerate(SIZES)}
        found.append({key: scales[key] * torch.randn(size, generator=drawn) for key, size in SIZES.items()})
    return found


def kept(tensors: dict[str, Tensor], k: float) -> dict[str, Tensor]:
    """The share of all elements of a model that are largest, by sorting."""
    magnitudes = torch.cat([tensor.abs() for tensor in tensors.values()]).sort().values
    threshold = magnitudes[max(int((1.0 - k) * len(magnitudes)), 1) - 1]
    return {key: torch.where(tensor.abs() >= threshold, tensor, 0.0) for key, tensor in tensors.items()}


def delta(tensors: dict[str, Tensor]) -> Any:
    return rm.model(tensors, space="delta")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("k", [0.0, 0.01, 0.3, 0.9])
def test_a_threshold_is_that_of_the_model(executor: str, k: float, threads: int) -> None:
    (tensors,) = models(1)
    found = rm.merge(METHODS["pruned"](delta(tensors), k=k), threads=threads)
    for key, due in kept(tensors, k).items():
        assert torch.equal(found[key], due), key


def test_it_may_follow_others_and_be_followed(executor: str) -> None:
    one, other = models(2)
    prune = METHODS["pruned"]
    inner = rm.slerp(delta(one), delta(other), alpha=0.3)  # has sums of its own
    outer = prune(rm.scale(prune(inner, k=0.5), 2.0) + prune(delta(other), k=0.25), k=0.4)
    found = rm.merge(outer, threads=2)
    met = {key: METHODS["slerp"].on(one[key], other[key], alpha=0.3) for key in SIZES}
    first, second = kept(met, 0.5), kept(other, 0.25)
    due = kept({key: first[key] * 2.0 + second[key] for key in SIZES}, 0.4)
    for key, tensor in due.items():
        assert torch.equal(found[key], tensor), key


def test_shares_are_the_same_for_all_keys() -> None:
    recipe = METHODS["pruned"](delta(models(1)[0]), k=[rm.keys({"c": 0.1}) | 0.6])
    with pytest.raises(RecipeError, match="pruned looks at all tensors together, so 'k' is the same for all of them"):
        rm.merge(recipe)


def test_several_results_each_have_their_own() -> None:
    from remelt.api.merging import Merged, prepare_merges, run_prepared
    from remelt.api.options import MergeOptions
    from remelt.api.recipes import load_recipe

    one, other = models(2)
    recipes = [METHODS["pruned"](delta(one), k=0.2), METHODS["pruned"](delta(one) + delta(other), k=0.2)]
    options = MergeOptions(threads=2)
    with prepare_merges([load_recipe(recipe) for recipe in recipes], [None, None], options) as prepared:
        (*_, merged) = run_prepared(prepared, options)
    assert isinstance(merged, Merged)
    total = {key: one[key] + other[key] for key in SIZES}
    for place, due in enumerate((kept(one, 0.2), kept(total, 0.2))):
        for key, tensor in due.items():
            assert torch.equal(merged.tensors[place][key], tensor), (place, key)


def test_a_plan_counts_the_passes(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    (tensors,) = models(1)
    model = rm.model(write_model(tmp_path / "a", tensors), space="delta")
    whole = rm.plan(METHODS["pruned"](model, k=0.3))
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert whole.bytes_read == 3 * size
    assert rm.plan(METHODS["pruned"](model, k=0.3, whole=False)).bytes_read < 3 * size


def test_what_is_interrupted_after_the_survey_is_continued(
    tmp_path: Path, write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tensors,) = models(1)
    model = rm.model(write_model(tmp_path / "a", tensors), space="delta")
    recipe, output = METHODS["pruned"](model, k=0.3), tmp_path / "out.safetensors"
    finish = TaskRun.finish
    done: list[str] = []

    def breaks(run: TaskRun, *given: Any, **more: Any) -> None:
        if len(done) == 2:
            raise MethodError("stop here")
        done.append(run.task.key)
        finish(run, *given, **more)

    monkeypatch.setattr(TaskRun, "finish", breaks)
    with pytest.raises(MethodError, match="stop here"):
        rm.merge(recipe, output, threads=1)
    monkeypatch.undo()
    rm.merge(recipe, output, threads=1)
    found = rm.merge(rm.model(output, space="delta"))
    for key, due in kept(tensors, 0.3).items():
        assert torch.equal(found[key], due), key


def test_tensors_that_are_replaced_know_the_sums() -> None:
    one, _ = models(2)
    base = {key: torch.ones_like(tensor) for key, tensor in one.items()}
    one["a.0.w"][3] = float("nan")
    recipe = rm.add_difference(rm.model(base), METHODS["pruned"](delta(one), k=0.3))
    found = rm.merge(recipe, nonfinite="missing")
    assert torch.equal(found["a.0.w"], base["a.0.w"])
    assert torch.isfinite(found["c"]).all()


def test_sums_across_tensors_are_counts() -> None:
    with pytest.raises(MethodError, match=r"sums across tensors are counts, but mean of a\.0\.w is none"):
        rm.merge(METHODS["fractional"](rm.model(models(1)[0])))


LEFT_OUT = {
    "a weight of 0 in a block": lambda base, trimmed: rm.add_difference(
        base, trimmed, alpha=rm.keys({"decoder.*": 0.0}) | 1.0
    ),
    "a component that is not picked": lambda base, trimmed: rm.fallback(
        rm.pick_component(base + trimmed, "encoder"), base
    ),
    "a weight of nearly 0": lambda base, trimmed: rm.add_difference(
        base, trimmed, alpha=rm.keys({"decoder.*": 2.0**-100}) | 1.0
    ),
}


@pytest.mark.parametrize("how", LEFT_OUT)
@pytest.mark.parametrize("threads", [1, 3])
def test_what_a_result_leaves_out_counts_all_the_same(how: str, threads: int) -> None:
    """The threshold is that of all tensors of the model, whatever later steps do with some of them."""
    drawn = torch.Generator().manual_seed(0)
    shapes = {"encoder.layers.0.w": 300, "encoder.layers.1.w": 200, "decoder.layers.0.w": 700, "decoder.layers.1.w": 5}
    sizes = {key: 0.1 if key.startswith("encoder") else 1.0 for key in shapes}
    delta = {key: torch.randn(size, generator=drawn) * sizes[key] for key, size in shapes.items()}
    base = rm.model({key: torch.zeros_like(value) for key, value in delta.items()}, name="base")
    trimmed = rm.trim(rm.model(delta, space="delta", name="delta"), k=0.4, over="model")
    found = rm.merge(LEFT_OUT[how](base, trimmed), threads=threads)
    magnitudes = torch.cat(list(delta.values())).abs().sort().values
    threshold = magnitudes[max(int((1 - 0.4) * len(magnitudes)), 1) - 1]
    for key in ("encoder.layers.0.w", "encoder.layers.1.w"):
        assert torch.equal(found[key], torch.where(delta[key].abs() >= threshold, delta[key], 0.0)), key
    plan = rm.plan(LEFT_OUT[how](base, trimmed))
    assert len(plan.counted) == (0 if "nearly" in how else 2)


def test_nothing_is_counted_where_nobody_asks() -> None:
    delta = {"encoder.w": torch.ones(5), "decoder.w": torch.ones(5)}
    trimmed = rm.trim(rm.model(delta, space="delta", name="delta"), k=0.4, over="model")
    plan = rm.plan(rm.add_difference(rm.model(dict(delta), name="base"), trimmed, alpha=0.0))
    assert not plan.counted
