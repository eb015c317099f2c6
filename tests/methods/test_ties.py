"""TIES in its variants beside sd-mecha, mergekit and slow transcriptions of the formulas; where they part, why."""

from __future__ import annotations

import functools
import itertools
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
NAMES = ("ties", "ties_by_count", "ties_with_stock", "ties_with_median")


class TestConformance(MethodConformance):
    @pytest.fixture(params=NAMES)
    def method(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def values(self, method: str) -> dict[str, Any]:
        return {"by_count": True} if "with" in method else {"k": (0.3, 1.0, 0.6), "weights": (1.0, 0.5, 2.0)}


def drawn(count: int, shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def structured(count: int, dtype: torch.dtype) -> Iterator[tuple[str, list[Tensor]]]:
    for shape in SHAPES:
        yield f"shape {shape}", drawn(count, shape, dtype)
    first, *others = drawn(count, (16, 33), dtype)
    for scale, name in ((1e-15, "tiny"), (1e15, "huge"), (1e-4, "as small as the steps of a fine-tune")):
        yield name, [tensor * scale for tensor in drawn(count, (16, 33), dtype, seed=1)]
    yield "equal", [first] * count
    yield "zero", [torch.zeros_like(first)] * count
    yield "first zero", [torch.zeros_like(first), *others]
    yield "opposite", [first * (-1) ** number for number in range(count)]


def close(found: Tensor, due: Tensor, tensors: Sequence[Tensor], units: float = 8.0) -> bool:
    """Whether two results differ by some units in the last place of the largest operand."""
    if not due.numel():
        return found.shape == due.shape
    size = max(float(tensor.abs().max()) for tensor in tensors)
    return float((found.double() - due.double()).abs().max()) <= units * torch.finfo(found.dtype).eps * size


INTENDED = {
    ("ties", "opposite"): "a sum of 0 elects no sign; mergekit takes it for positive: increases win over decreases",
    ("ties_by_count", "opposite"): "as above, where there are as many signs of either kind",
    ("ties_by_count", "shape (131,)"): "as above: of two deltas, half of all elements",
}
"""Where remelt and mergekit are meant to differ, and why: only where votes cancel out, and there remelt gives 0."""


def tied(name: str, deltas: Sequence[Tensor]) -> Tensor:
    """Where the votes cancel out."""
    return functools.reduce(torch.add, [delta if name == "ties" else delta.sign() for delta in deltas]) == 0.0


def by_mergekit(name: str, deltas: Sequence[Tensor], **parameters: Any) -> Tensor:
    """TIES of mergekit on deltas, to either election; the base is zero."""
    api = pytest.importorskip("mergekit.merge_methods.api")
    if name == "ties":
        tensors = [torch.zeros_like(deltas[0]), *deltas]
        found: Tensor = api.merge_tensors(tensors, "ties", parameters=parameters, base_index=0)
        return found
    mask = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic").get_mask
    magnitude = pytest.importorskip("mergekit.sparsify").magnitude
    each = zip(deltas, parameters["weight"], parameters["density"], strict=True)
    weighted = torch.stack([magnitude(delta, density) * weight for delta, weight, density in each])
    agree = mask(weighted, method="count").to(weighted.dtype)
    weights = torch.tensor(parameters["weight"], dtype=weighted.dtype).reshape(-1, *[1] * deltas[0].dim())
    divisor = (agree * weights).sum(0)
    divisor[divisor == 0] = 1
    return (weighted * agree).sum(0) / divisor


def kept_by_trim(delta: Tensor, k: float) -> float:
    """The density at which mergekit keeps as many elements as `trim`."""
    size = delta.numel()
    return 1.0 if k >= 1.0 else (size - max(int((1 - k) * size), 1) + 1 + 0.5) / size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["ties", "ties_by_count"])
def test_both_elections_agree_with_mergekit(name: str, dtype: torch.dtype) -> None:
    trim = METHODS["trim"]
    for count in (1, 2, 3, 5):
        for what, deltas in structured(count, dtype):
            for k, weights in (
                (1.0, [1.0] * count),
                (1.0, [0.5] * count),
                (0.4, [1.0 + place for place in range(count)]),
            ):
                if not deltas[0].numel():
                    continue
                found = METHODS[name].on(*deltas, k=k, weights=weights)
                density = [kept_by_trim(delta, k) for delta in deltas]
                due = by_mergekit(name, deltas, weight=weights, density=density)
                kept = [trim.on(delta, k=k) * weight for delta, weight in zip(deltas, weights, strict=True)]
                elected = ~tied(name, kept)
                assert close(found[elected], due[elected], deltas), (what, count, k, weights)
                assert not found[~elected].any()


@pytest.mark.parametrize(("name", "what"), INTENDED, ids=" ".join)
def test_every_intended_difference_is_one(name: str, what: str) -> None:
    deltas = dict(structured(2, torch.float32))[what]
    found = METHODS[name].on(*deltas)
    assert not close(found, by_mergekit(name, deltas, weight=[1.0, 1.0], density=[1.0, 1.0]), deltas)
    assert not found[tied(name, deltas)].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_elections_are_those_of_sd_mecha_and_of_ties_sum(dtype: torch.dtype) -> None:
    theirs = pytest.importorskip("sd_mecha").ties_sum.__wrapped__
    for count in (1, 2, 3, 5):
        for what, single in structured(count, torch.float32):  # in float64, its threshold may be rounded up
            deltas = [delta.to(dtype) for delta in single]
            for k in (0.3, 1.0):
                for name, flag in (("ties", True), ("ties_by_count", False)):
                    found = METHODS[name].on(*deltas, k=k)
                    assert torch.equal(found, METHODS["ties_sum"].on(*deltas, k=k, vote_sgn=flag))
                    due = theirs(*[delta.clone() for delta in deltas], k=k, vote_sgn=flag)
                    assert close(found, due, deltas), (what, count, k, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stock_and_median_agree_with_sd_mecha(dtype: torch.dtype) -> None:
    extended = pytest.importorskip("sd_mecha").ties_sum_extended.__wrapped__
    trim = METHODS["trim"]
    for what, single in structured(2, torch.float32):
        deltas = [delta.to(dtype) for delta in single]
        if not deltas[0].dim() or deltas[0].dim() > 2 or what == "tiny":
            continue  # it makes [1] of a number, takes lines of kernels for rows, and adds 1e-6 to norms
        for k, by_count in itertools.product((0.4, 1.0), (False, True)):
            trimmed = [trim.on(delta, k=k) for delta in deltas]
            options = {"k": k, "vote_sgn": not by_count}
            copies = [delta.clone() for delta in deltas]
            stock = METHODS["ties_with_stock"].on(*trimmed, by_count=by_count)
            due = extended(*copies, **options, apply_stock=False)  # its flag is inverted
            assert close(stock, due, deltas, 256.0), (what, k, by_count)
            median = METHODS["ties_with_median"].on(*trimmed, by_count=by_count)
            if deltas[0].numel():
                due = extended(*copies, **options, apply_median=True, cos_eps=1e-12)
                assert cost(median, agreeing(trimmed, by_count)) <= cost(due, agreeing(trimmed, by_count)) * (1 + 1e-5)


def agreeing(deltas: Sequence[Tensor], by_count: bool) -> list[Tensor]:
    votes = sum(delta.sign() if by_count else delta for delta in deltas)
    return [torch.where(delta.sign() == votes.sign(), delta, 0.0) for delta in deltas]


def cost(point: Tensor, deltas: Sequence[Tensor]) -> float:
    """The sum of the distances that a geometric median makes least."""
    return sum(float((point.double() - delta.double()).norm()) for delta in deltas)


def stock_by_formula(deltas: Sequence[Tensor], by_count: bool) -> Tensor:
    kept = [delta.double() for delta in agreeing(deltas, by_count)]
    count = len(kept)
    result = torch.zeros(deltas[0].shape, dtype=torch.float64).reshape(len(deltas[0]), -1)
    for row in range(len(result)):
        rows = [delta.reshape(len(result), -1)[row] for delta in kept]
        cosines = [
            float(a @ b / (a.norm() * b.norm())) if a.norm() and b.norm() else 0.0
            for a, b in itertools.combinations(rows, 2)
        ]
        c = sum(cosines) / len(cosines) if cosines else 1.0
        agree = sum((one != 0.0).double() for one in rows)
        result[row] = count * c / (1 + (count - 1) * c) * sum(rows) / agree.clamp(min=1.0)
    return result.reshape(deltas[0].shape)


@pytest.mark.parametrize("by_count", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_stock_is_its_formula_by_rows_of_the_first_dimension(count: int, by_count: bool) -> None:
    for dtype in DTYPES:
        for shape in ((5, 7), (4, 3, 3, 3)):
            deltas = drawn(count, shape, dtype)
            found = METHODS["ties_with_stock"].on(*deltas, by_count=by_count)
            assert close(found, stock_by_formula(deltas, by_count), deltas)


@pytest.mark.parametrize("by_count", [False, True])
def test_a_median_has_the_least_distances(by_count: bool) -> None:
    for dtype in DTYPES:
        deltas = drawn(4, (16, 33), dtype)
        found = METHODS["ties_with_median"].on(*deltas, by_count=by_count)
        points = agreeing(deltas, by_count)
        least = cost(found, points)
        generator = torch.Generator().manual_seed(1)
        for size in (1e-2, 1e-3):
            step = torch.randn(16, 33, generator=generator).to(dtype) * size
            assert least < cost(found + step, points)
            assert least < cost(found - step, points)


@pytest.mark.parametrize("name", NAMES)
def test_one_delta_is_the_result_and_zeros_give_zeros(name: str) -> None:
    for dtype in DTYPES:
        (delta,) = drawn(1, (5, 7), dtype)
        assert torch.equal(METHODS[name].on(delta), delta)
        assert not METHODS[name].on(*[torch.zeros_like(delta)] * 3).any()
        torch.testing.assert_close(METHODS[name].on(delta, delta, delta), delta, rtol=1e-5, atol=1e-7)


@settings(max_examples=25)
@given(
    name=st.sampled_from(NAMES), seed=st.integers(0, 2**31), order=st.permutations(range(3)), factor=st.integers(-9, 9)
)
def test_the_order_does_not_matter_and_scale_goes_through(
    name: str, seed: int, order: Sequence[int], factor: int
) -> None:
    deltas = drawn(3, (6, 5), torch.float64, seed)
    found = METHODS[name].on(*deltas)
    torch.testing.assert_close(METHODS[name].on(*[deltas[place] for place in order]), found, rtol=1e-6, atol=1e-7)
    scaled = METHODS[name].on(*[delta * 2.0**factor for delta in deltas])
    torch.testing.assert_close(scaled, found * 2.0**factor, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("executor", ["native", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_merges_give_what_the_method_gives(name: str, executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    shapes = {"x.w": (301, 17), "x.b": (17,), "x.s": ()}
    models = [{key: drawn(3, shape, torch.float32)[place] for key, shape in shapes.items()} for place in range(3)]
    last = rm.keys({"*.w": 2.0}) | 0.25
    base = rm.model({key: torch.zeros(shape) for key, shape in shapes.items()})
    deltas = [METHODS["trim"](rm.model(one) - base, k=0.6) for one in models]
    values = {"by_count": True} if "with" in name else {"k": [0.3, 1.0, 0.5], "weights": [1.0, 0.5, last]}
    found = rm.merge(base + METHODS[name](*deltas, **values), threads=2)
    for key in shapes:
        trimmed = [METHODS["trim"].on(one[key], k=0.6) for one in models]
        told = values if "with" in name else values | {"weights": [1.0, 0.5, 2.0 if key == "x.w" else 0.25]}
        torch.testing.assert_close(found[key], METHODS[name].on(*trimmed, **told), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: METHODS["ties"]("a", "b", k=[0.5]), "'k' has a number for each model, but got 1 number for 2 models"),
        (lambda: METHODS["ties_by_count"]("a", weights="x"), "ties_by_count needs a number, block weights, or a list"),
        (lambda: METHODS["ties"](), "ties needs at least one model"),
        (lambda: METHODS["ties_with_stock"]("a", k=0.5), "ties_with_stock has no argument 'k'"),
        (lambda: METHODS["ties_with_median"]("a", by_count=1), "ties_with_median needs True or False for 'by_count'"),
    ],
)
def test_wrong_arguments_are_told(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        wrong()


@pytest.mark.parametrize("name", ["ties", "ties_by_count", "trim"])
def test_trimming_over_the_whole_model(name: str) -> None:
    drawn = torch.Generator().manual_seed(3)
    sizes = {"a": 3000, "b": 50_000, "c": 1}
    deltas = [
        {key: (place + 1) * torch.randn(size, generator=drawn) for place, (key, size) in enumerate(sizes.items())}
        for _ in range(1 if name == "trim" else 3)
    ]
    models = [rm.model(delta, space="delta") for delta in deltas]
    over = {"over" if name == "trim" else "trim": "model"}
    found = rm.merge(METHODS[name](*models, k=0.3, **over))
    kept = []
    for delta in deltas:
        magnitudes = torch.cat([tensor.abs() for tensor in delta.values()]).sort().values
        threshold = magnitudes[int(0.7 * len(magnitudes)) - 1]
        kept.append({key: torch.where(tensor.abs() >= threshold, tensor, 0.0) for key, tensor in delta.items()})
    for key in sizes:
        torch.testing.assert_close(found[key], METHODS[name].on(*[delta[key] for delta in kept]))
    assert (found["a"] == 0.0).double().mean() > 0.75 > (found["b"] == 0.0).double().mean()


def test_what_is_neither_tensor_nor_model_is_refused() -> None:
    with pytest.raises(RecipeError, match="trim is 'tensor' or 'model', but got 'modle'"):
        rm.merge(METHODS["ties"](rm.model({"w": torch.ones(3)}, space="delta"), k=0.3, trim="modle"))
