"""Plumbing: stacks of tensors, and what stands for omitting keys that are not finite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import remelt as rm
from remelt.errors import NonFiniteError, RecipeError
from remelt.methods import METHODS
from remelt.testing import MethodConformance

stack = METHODS["stack"]


def drawn(*shape: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0), (5,), (3, 4), (2, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_stacks_agree_with_sd_mecha(shape: tuple[int, ...], count: int) -> None:
    sd_mecha = pytest.importorskip("sd_mecha")
    tensors = drawn(*shape, count=count)
    found = stack.on(*tensors)
    assert found.shape == (count, *shape)
    assert torch.equal(found, sd_mecha.stack.__wrapped__(*tensors))


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_a_merge_stacks_keys_of_any_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, executor: str) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    models = [{"w": x, "bias": x[0], "scale": x[0, 0], "kernel": x.reshape(5, 2, 3, 2)} for x in drawn(6, 10, count=3)]
    recipe = stack(*map(rm.model, models))
    out = rm.merge(recipe, tmp_path / "out.safetensors", threads=2)
    for found in (rm.merge(recipe), rm.merge(rm.model(out))):
        for key in models[0]:
            assert torch.equal(found[key], torch.stack([model[key] for model in models]))
    halves = rm.merge(stack(rm.n_average(*map(rm.model, models[:2])), rm.model(models[2])))
    torch.testing.assert_close(halves["w"][0], (models[0]["w"] + models[1]["w"]) / 2)


def test_tensors_of_several_shapes_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"stack needs tensors of one shape, but .* \[3, 4\] .* \[4, 3\]"):
        rm.merge(stack(rm.model({"w": torch.ones(3, 4)}), rm.model({"w": torch.ones(4, 3)})))


def test_keys_that_are_not_finite_are_left_to_an_option() -> None:
    """Which keys a result has is planned from headers: no method can tell by a tensor's elements."""
    base = rm.model({"a": torch.ones(3), "b": torch.ones(3)})
    broken = rm.model({"a": torch.full((3,), math.nan), "b": torch.full((3,), 2.0)})
    recipe = rm.weighted_sum(base, broken, alpha=1.0)
    with pytest.raises(NonFiniteError):
        rm.merge(recipe)
    found = rm.merge(recipe, nonfinite="missing")
    assert found["b"].tolist() == [2.0, 2.0, 2.0]
    assert bool(found["a"].isfinite().all())


def test_a_tensor_that_is_not_finite_is_that_of_another_model() -> None:
    a = {"small": torch.ones(3), "large": torch.ones(300_000), "kernel": torch.ones(2, 3, 3, 3), "sound": torch.ones(5)}
    b = {key: torch.full_like(value, 2.0) for key, value in a.items()}
    a["small"][1], a["large"][299_999], a["kernel"][0, 0, 0, 0] = math.nan, math.inf, -math.inf
    for given in (a, {key: value.half() for key, value in a.items()}):
        found = rm.merge(METHODS["omit_non_finite"](rm.model(given), rm.model(b)), dtype="fp32")
        assert {key: set(value.flatten().tolist()) for key, value in found.items()} == {
            **{key: {2.0} for key in ("small", "large", "kernel")},
            "sound": {1.0},
        }


def test_what_another_step_reads_is_refused_though_one_mends_it() -> None:
    broken, sound = {"w": torch.tensor([math.nan, 1.0])}, {"w": torch.tensor([1.0, 1.0])}
    mend = METHODS["omit_non_finite"]
    assert rm.merge(mend(rm.weighted_sum(rm.model(broken), rm.model(sound)), rm.model(sound)))["w"].tolist() == [1, 1]
    with pytest.raises(NonFiniteError, match="NaN or infinity in 1 tensor: w"):
        rm.merge(rm.weighted_sum(mend(rm.model(broken), rm.model(sound)), rm.model(broken)))
    with pytest.raises(NonFiniteError):
        rm.merge(mend(rm.model(sound), rm.model(broken)))
    large = {"w": torch.tensor([3e38, 1.0])}
    with pytest.raises(NonFiniteError, match="w overflows"):  # nor does what is computed within help
        rm.merge(mend(rm.model(broken), 3.0 * rm.model(large) - 2.0 * mend(rm.model(broken), rm.model(sound))))


class TestOmitNonFinite(MethodConformance):
    @pytest.fixture
    def method(self) -> Any:
        return METHODS["omit_non_finite"]


class TestStack(MethodConformance):
    @pytest.fixture
    def method(self) -> Any:
        return stack
