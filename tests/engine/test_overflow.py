"""Numbers that are too large for what they are stored in: told by key, and settled by no policy but to keep them."""

from __future__ import annotations

import pytest
import torch

import remelt as rm
from remelt.errors import NonFiniteError, RecipeError

LARGE = {"a.w": torch.tensor([449.0, 480.0, 1e5, -3.3]), "b.w": torch.tensor([448.0, -464.0, 0.0])}


@pytest.fixture(params=["native", "torch"])
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("REMELT_EXECUTOR", request.param)
    return str(request.param)


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize("policy", ["error", "missing"])
def test_a_cast_tells_what_it_cuts_off(policy: str) -> None:
    message = "numbers that are too large, and nothing was published:\nresult: a.w overflows F8_E4M3\n"
    with pytest.raises(NonFiniteError, match=message) as caught:
        rm.merge(rm.cast(rm.model(LARGE), "fp8_e4m3"), nonfinite=policy)
    assert "b.w" not in str(caught.value)
    assert caught.value.hint == (
        "--dtype bf16 or fp32 holds larger ones; --nonfinite keep writes infinities, in F8_E4M3 448"
    )


@pytest.mark.usefixtures("executor")
def test_what_a_cast_cuts_off_is_told_wherever_it_goes() -> None:
    halved = rm.scale(rm.cast(rm.model(LARGE, space="delta"), "fp8_e4m3"), alpha=0.5)
    with pytest.raises(NonFiniteError, match=r"result: a\.w overflows"):
        rm.merge(halved)


@pytest.mark.usefixtures("executor")
def test_what_a_cast_rounds_is_rounded() -> None:
    kept = {"w": torch.tensor([448.0, 464.0, -463.9, 3.3, 0.001])}
    found = rm.merge(rm.cast(rm.model(kept), "fp8_e4m3"))["w"]
    assert torch.equal(found.float(), torch.tensor([448.0, 448.0, -448.0, 3.25, 0.001]).to(torch.float8_e4m3fn).float())
    assert torch.equal(
        rm.merge(rm.cast(rm.model(LARGE), "fp8_e4m3"), nonfinite="keep")["a.w"].float()[:3], torch.full((3,), 448.0)
    )


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize("policy", ["error", "missing"])
def test_a_result_that_overflows_is_no_missing_tensor(policy: str) -> None:
    recipe = rm.passthrough(rm.model({"a.w": torch.full((4,), 60000.0).half()}), scale=2.0)
    with pytest.raises(NonFiniteError, match=r"result: a\.w overflows F16"):
        rm.merge(recipe, nonfinite=policy)
    assert torch.isinf(rm.merge(recipe, nonfinite="keep")["a.w"]).all()


@pytest.mark.parametrize("name", ["int8", "uint8", "bool"])
def test_weights_are_not_cast_to_integers(name: str) -> None:
    with pytest.raises(RecipeError, match=f"weights are floating-point numbers, but are cast to '{name}'"):
        rm.plan(rm.cast(rm.model(LARGE), name))
