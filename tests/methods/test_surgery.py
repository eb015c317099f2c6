"""Surgery by method: input channels made to fit, and positions that count again."""

from __future__ import annotations

import pytest
import torch

import remelt as rm
from remelt.errors import RecipeError
from remelt.methods import METHODS
from remelt.testing import MethodConformance

WIDE = "model.diffusion_model.input_blocks.0.0.weight"
POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


class TestMatchChannels(MethodConformance):
    @pytest.fixture
    def method(self) -> str:
        return "match_channels"


class TestRepairPositionIds(MethodConformance):
    @pytest.fixture
    def method(self) -> str:
        return "repair_position_ids"

    @pytest.fixture
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {POSITIONS: (1, 77), "vision_model.embeddings.position_ids": (50,), "x.weight": (3, 4)}


@pytest.mark.parametrize("executor", ["native", "torch"])
@pytest.mark.parametrize(("mine", "other"), [(4, 9), (9, 4), (4, 4)])
def test_channels_are_those_of_the_other(
    mine: int, other: int, executor: str, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    a, like = (
        {WIDE: torch.randn(8, count, 3, 3, generator=generator), "x.bias": torch.randn(8, generator=generator)}
        for count in (mine, other)
    )
    found = rm.merge(rm.match_channels(rm.model(a), rm.model(like)))
    assert found[WIDE].shape == (8, other, 3, 3)
    kept = min(mine, other)
    assert torch.equal(found[WIDE][:, :kept], a[WIDE][:, :kept])
    assert not found[WIDE][:, kept:].any() or mine == other
    assert torch.equal(found["x.bias"], a["x.bias"])


def test_the_other_is_read_where_shapes_differ_only() -> None:
    a = rm.model({WIDE: torch.ones(8, 4, 3, 3), "x.weight": torch.ones(50, 50)}, name="a")
    like = rm.model({WIDE: torch.ones(8, 9, 3, 3), "x.weight": torch.ones(50, 50)}, name="like")
    _, given = rm.plan(rm.match_channels(a, like)).inputs
    assert (given.label, given.idle_tensors) == ("like", 1)


def test_a_difference_stays_one() -> None:
    a, b = (rm.model({WIDE: torch.ones(8, 4, 3, 3)}, name=name) for name in "ab")
    plan = rm.plan(rm.match_channels(a - b, rm.model({WIDE: torch.ones(8, 9, 3, 3)}, name="c")))
    assert plan.outputs[0].space == "delta"


def test_shapes_that_differ_otherwise_are_refused() -> None:
    recipe = rm.match_channels(rm.model({"x": torch.ones(8, 4)}), rm.model({"x": torch.ones(9, 4)}))
    message = r"match_channels changes the number of inputs \(dimension 1\), but has \[8, 4\] to make \[9, 4\] of"
    with pytest.raises(RecipeError, match=message):
        rm.plan(recipe)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float16], ids=str)
def test_positions_count_again_in_the_type_of_the_definition(dtype: torch.dtype) -> None:
    broken = torch.arange(77, dtype=torch.float64).mul(0.99).to(dtype).reshape(1, 77)
    model = {POSITIONS: broken, "x.weight": torch.full((3,), 0.5)}
    found = rm.merge(rm.repair_position_ids(rm.model(model)))
    assert found[POSITIONS].dtype is torch.int64
    assert torch.equal(found[POSITIONS], torch.arange(77).reshape(1, 77))
    assert torch.equal(found["x.weight"], model["x.weight"])


def test_positions_are_repaired_beneath_a_merge() -> None:
    models = [rm.model({POSITIONS: torch.full((1, 77), 3), "x.weight": torch.full((3,), float(n))}) for n in range(2)]
    found = rm.merge(rm.repair_position_ids(rm.weighted_sum(*models, alpha=0.5)))
    assert torch.equal(found[POSITIONS], torch.arange(77).reshape(1, 77))
    assert torch.equal(found["x.weight"], torch.full((3,), 0.5))
    assert METHODS["repair_position_ids"].declaration.cut == "model"
