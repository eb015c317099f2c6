"""SCE, RAM and RAM+ beside mergekit and their formulas; where they part, why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import remelt as rm
from remelt.errors import RecipeError
from remelt.methods import METHODS
from remelt.testing import MethodConformance

DTYPES = (torch.float32, torch.float64)
SHAPES = ((), (0,), (1,), (131,), (16, 33), (4, 3, 3, 3))
SAMPLED = 400_000
"""Elements of a tensor of which a sample is taken first."""


class TestConformance(MethodConformance):
    @pytest.fixture(params=["sce", "ram", "ram_plus"])
    def method(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def values(self, method: str) -> dict[str, Any]:
        return {"select_topk": 0.4} if method == "sce" else {"epsilon": 0.5}


def drawn(count: int, shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def structured(count: int, dtype: torch.dtype) -> Iterator[tuple[str, list[Tensor]]]:
    for shape in SHAPES:
        yield f"shape {shape}", drawn(count, shape, dtype)
    first, *others = drawn(count, (16, 33), dtype)
    yield "as small as the steps of a fine-tune", [tensor * 1e-4 for tensor in drawn(count, (16, 33), dtype, seed=1)]
    yield "huge", [tensor * 1e9 for tensor in drawn(count, (16, 33), dtype, seed=1)]
    yield "equal", [first] * count
    yield "zero", [torch.zeros_like(first)] * count
    yield "first zero", [torch.zeros_like(first), *others]
    yield "opposite", [first * (-1) ** number for number in range(count)]
    yield "sparse", [torch.where(tensor > 0.8, tensor, 0.0) for tensor in (first, *others)]
    yield "of unlike size", [tensor * 10.0**number for number, tensor in enumerate([first, *others])]


INTENDED = {
    ("sce", "as small as the steps of a fine-tune"): "mergekit gives equal weights where squares add up to under 1e-6",
    ("sce", "opposite"): "a sum of 0 elects no sign; mergekit takes it for positive",
    ("sce", "one delta"): "the variance of one is 0: mergekit selects nothing, remelt by its squares",
}
"""Where remelt and mergekit are meant to differ, and why; the test of the formula says what remelt gives there."""


def by_mergekit(name: str, deltas: Sequence[Tensor], **parameters: Any) -> Tensor:
    api = pytest.importorskip("mergekit.merge_methods.api")
    tensors = [torch.zeros_like(deltas[0]), *deltas]
    called = {"ram_plus": "ramplus_tl"}.get(name, name)
    found: Tensor = api.merge_tensors(tensors, called, parameters=parameters, base_index=0)
    return found


def close(found: Tensor, due: Tensor, deltas: Sequence[Tensor]) -> bool:
    if not due.numel():
        return found.shape == due.shape
    size = max(float(delta.abs().max()) for delta in deltas)
    return float((found.double() - due.double()).abs().max()) <= 32 * torch.finfo(found.dtype).eps * size


def sce_by_formula(deltas: Sequence[Tensor], share: float) -> Tensor:
    if not deltas[0].numel():
        return deltas[0]
    stacked = torch.stack(list(deltas)).double()
    spread = stacked.var(0, unbiased=False) if len(deltas) > 1 else stacked[0].square()
    if share < 1.0:
        count = int(int((spread >= 2.0**-126).sum()) * share)
        least = spread.flatten().sort(descending=True).values[count - 1] if count > 0 else float("inf")
        stacked = torch.where(spread >= least, stacked, 0.0)
    elected = stacked.sum(0).sign()
    energies = stacked.square().flatten(1).sum(1) if stacked.dim() > 1 else stacked.square()
    shares = energies / energies.sum() if energies.sum() else torch.full_like(energies, 1.0 / len(deltas))
    weights = torch.where(stacked.sign() == elected, shares.reshape(-1, *[1] * deltas[0].dim()), 0.0)
    return (weights * stacked).sum(0) / torch.where(weights.sum(0) == 0.0, 1.0, weights.sum(0))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_sce_is_its_formula(count: int, share: float) -> None:
    for dtype in DTYPES:
        for what, deltas in structured(count, dtype):
            found = METHODS["sce"].on(*deltas, select_topk=share)
            assert close(found, sce_by_formula(deltas, share), deltas), (what, dtype)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_sce_agrees_with_mergekit(count: int, share: float) -> None:
    for dtype in DTYPES:
        for what, deltas in structured(count, dtype):
            if deltas[0].numel() and ("sce", what) not in INTENDED:
                found = METHODS["sce"].on(*deltas, select_topk=share)
                assert close(found, by_mergekit("sce", deltas, select_topk=share), deltas), (what, dtype)


def test_every_intended_difference_is_one() -> None:
    cases = dict(structured(2, torch.float32)) | {"one delta": drawn(1, (16, 33), torch.float32)}
    for name, what in INTENDED:
        deltas = cases[what]
        found = METHODS[name].on(*deltas, select_topk=0.5)
        assert not close(found, by_mergekit(name, deltas, select_topk=0.5), deltas), what


def ram_by_formula(deltas: Sequence[Tensor], boosts: Sequence[float], epsilon: float) -> Tensor:
    flat = [delta.double().reshape(-1).tolist() for delta in deltas]
    result = []
    for elements in zip(*flat, strict=True):
        there = [place for place, element in enumerate(elements) if abs(element) > epsilon]
        kept = [elements[place] for place in there]
        result.append(kept[0] * boosts[there[0]] if len(kept) == 1 else sum(kept) / max(len(kept), 1))
    return torch.tensor(result, dtype=torch.float64).reshape(deltas[0].shape)


@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.5])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_ram_and_ram_plus_are_their_formulas_and_mergekits(count: int, epsilon: float) -> None:
    for dtype in DTYPES:
        for what, deltas in structured(count, dtype):
            found = METHODS["ram"].on(*deltas, epsilon=epsilon)
            assert close(found, ram_by_formula(deltas, [1.0] * count, epsilon), deltas), (what, dtype)
            if deltas[0].numel():
                assert close(found, by_mergekit("ram", deltas, epsilon=epsilon), deltas), (what, dtype)
            present = torch.stack([delta.abs() > epsilon for delta in deltas])
            alone = [int((one & (present.sum(0) == 1)).sum()) for one in present]
            shared = [int((one & (present.sum(0) > 1)).sum()) for one in present]
            for gain, limit in ((0.1, 0.2), (0.5, 10.0)):
                boosts = [1.0 + gain * min(s / max(u, 1e-9), limit) for s, u in zip(shared, alone, strict=True)]
                found = METHODS["ram_plus"].on(*deltas, gain=gain, limit=limit, epsilon=epsilon)
                assert close(found, ram_by_formula(deltas, boosts, epsilon), deltas), (what, dtype)
                if deltas[0].numel() and epsilon:  # it divides by epsilon where a delta is nowhere alone
                    due = by_mergekit("ram_plus", deltas, r=gain, alpha=limit, epsilon=epsilon)
                    assert close(found.float(), due.float(), deltas), (what, dtype)  # its factors are in float32


@settings(max_examples=25)
@given(
    name=st.sampled_from(["sce", "ram", "ram_plus"]),
    seed=st.integers(0, 2**31),
    order=st.permutations(range(3)),
    share=st.floats(0.0, 1.0),
)
def test_the_order_does_not_matter(name: str, seed: int, order: Sequence[int], share: float) -> None:
    deltas = drawn(3, (6, 5), torch.float64, seed)
    values = {"select_topk": share} if name == "sce" else {"epsilon": share}
    found = METHODS[name].on(*deltas, **values)
    torch.testing.assert_close(METHODS[name].on(*[deltas[place] for place in order], **values), found)


@given(seed=st.integers(0, 2**31), share=st.floats(0.0, 1.0), factor=st.integers(-30, 30))
def test_scale_goes_through_sce(seed: int, share: float, factor: int) -> None:
    deltas = drawn(3, (6, 5), torch.float64, seed)
    found = METHODS["sce"].on(*deltas, select_topk=share)
    scaled = METHODS["sce"].on(*[delta * 2.0**factor for delta in deltas], select_topk=share)
    torch.testing.assert_close(scaled, found * 2.0**factor, rtol=1e-12, atol=0.0)


def test_one_delta_alone_is_trimmed_by_sce_and_kept_by_ram() -> None:
    (delta,) = drawn(1, (16, 33), torch.float32)
    assert torch.equal(METHODS["sce"].on(delta), delta)
    assert int(METHODS["sce"].on(delta, select_topk=0.25).count_nonzero()) == 16 * 33 // 4
    assert torch.equal(METHODS["ram"].on(delta, epsilon=0.0), delta)
    assert torch.equal(METHODS["ram_plus"].on(delta, epsilon=0.0), delta)


@pytest.mark.parametrize("executor", ["native", "torch"])
@pytest.mark.parametrize("kind", ["plain", "mostly equal", "varying at the end", "equal"])
def test_merges_give_the_same_of_samples_and_of_small_tensors(
    executor: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    sizes = {"a": SAMPLED, "b": 1000, "c": 1}
    deltas = [{key: drawn(3, (size,), torch.float32)[place] for key, size in sizes.items()} for place in range(3)]
    for held in deltas[1:]:
        if kind == "equal":
            held.update(deltas[0])
        elif kind == "mostly equal":
            held["a"] = torch.where(held["a"] > 1.5, held["a"], deltas[0]["a"])
        elif kind == "varying at the end":
            held["a"] = torch.cat((deltas[0]["a"][:-57], held["a"][-57:]))
    base = rm.model({key: torch.zeros(size) for key, size in sizes.items()})
    found = rm.merge(base + METHODS["sce"](*[rm.model(held) - base for held in deltas], select_topk=0.1), threads=2)
    plus = rm.merge(base + METHODS["ram_plus"](*[rm.model(held) - base for held in deltas], epsilon=0.7), threads=2)
    lean = rm.merge(base + METHODS["ram"](*[rm.model(held) - base for held in deltas], epsilon=0.7), threads=2)
    for key in sizes:
        given = [held[key] for held in deltas]
        torch.testing.assert_close(found[key], METHODS["sce"].on(*given, select_topk=0.1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(plus[key], METHODS["ram_plus"].on(*given, epsilon=0.7), rtol=1e-6, atol=1e-6)
        assert torch.equal(lean[key], METHODS["ram"].on(*given, epsilon=0.7))
        varying = int((torch.stack(given).var(0, unbiased=False) > 0.0).sum())
        assert int(found[key].count_nonzero()) <= int(0.1 * varying)
        assert int(found[key].count_nonzero()) >= int(0.1 * varying) - 2 - int(1e-4 * varying)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: METHODS["sce"]("a", select_topk="all"), "sce needs a number or block weights for 'select_topk'"),
        (lambda: METHODS["ram"]("a", gain=0.1), "ram has no argument 'gain'"),
        (lambda: METHODS["ram_plus"]("a", limit=[1]), "ram_plus needs a number or block weights for 'limit'"),
        (lambda: METHODS["ram"](), "ram needs at least one model"),
    ],
)
def test_wrong_arguments_are_told(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        wrong()
