"""Spherical methods by row and of several operands, beside mergekit's and sd-mecha's; where they part, why."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import remelt as rm
from remelt.errors import RecipeError
from remelt.methods import METHODS
from remelt.testing import MethodConformance

DTYPES = (torch.float32, torch.float64)
SHAPES = ((), (0,), (1,), (131,), (16, 33), (200, 300), (4, 3, 3, 3))
NAMES = ("nuslerp", "nuslerp_rows", "nuslerp_columns", "slerp_rows", "multislerp", "karcher_mean")
OF_TWO, OF_SEVERAL = NAMES[:4], NAMES[4:]


class TestConformance(MethodConformance):
    @pytest.fixture(params=NAMES)
    def method(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)


class TestWeightedConformance(MethodConformance):
    @pytest.fixture(params=OF_SEVERAL)
    def method(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def values(self) -> dict[str, Any]:
        return {"weights": (0.5, 0.0, -2.0)}


def drawn(count: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def structured(count: int, dtype: torch.dtype) -> Iterator[tuple[str, list[Tensor]]]:
    """Random tensors of every shape, and such as lie in special ways to each other."""
    for shape in SHAPES:
        yield f"shape {shape}", drawn(count, shape, dtype)
    first, *others = drawn(count, (16, 33), dtype)
    for scale, name in ((1e-15, "tiny"), (1e15, "huge"), (1e-4, "as small as the steps of a fine-tune")):
        yield name, [tensor * scale for tensor in drawn(count, (16, 33), dtype, seed=1)]
    yield "equal", [first] * count
    yield "zero", [torch.zeros_like(first)] * count
    yield "first zero", [torch.zeros_like(first), *others]
    yield "second zero", [first, torch.zeros_like(first), *others[1:]]
    yield "opposite", [first * (-1.0) ** number for number in range(count)]
    yield "parallel", [first * (number + 1.0) for number in range(count)]
    yield "close", [first + 1e-3 * other for other in [torch.zeros_like(first), *others]]
    yield "with much in common", [first + other for other in [torch.zeros_like(first), *others]]
    yield "of unlike size", [tensor * 10.0**number for number, tensor in enumerate([first, *others])]


def merged(name: str, tensors: Sequence[Tensor], **parameters: Any) -> Tensor:
    """mergekit's result."""
    methods = pytest.importorskip("mergekit.merge_methods")
    result = methods.merge_tensors([tensor.clone() for tensor in tensors], name, parameters=parameters)
    assert isinstance(result, Tensor)
    return result


def by_mergekit(name: str, tensors: Sequence[Tensor], values: dict[str, Any]) -> Tensor:
    """The result of mergekit's method, its constants that depend on the scale of tensors as small as may be."""
    if name.startswith("nuslerp"):
        ways = {
            "nuslerp": {},
            "nuslerp_rows": {"nuslerp_flatten": False},
            "nuslerp_columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        }
        alpha = values["alpha"]
        return merged("nuslerp", tensors, weight=[1.0 - alpha, alpha], **ways[name])
    weights = values.get("weights", [1.0] * len(tensors))
    if name == "multislerp":
        return merged(name, tensors, weight=weights, eps=1e-8 if tensors[0].dtype == torch.float32 else 1e-16)
    karcher = pytest.importorskip("mergekit.merge_methods.karcher")
    shares = [weight / sum(weights) for weight in weights]
    result = karcher.karcher_merge_tensors(list(tensors), shares, max_iter=values["iterations"], tol=1e-16)
    assert isinstance(result, Tensor)
    return result


UNITS = {"nuslerp": 64, "nuslerp_rows": 64, "nuslerp_columns": 64, "multislerp": 64, "karcher_mean": 64}
"""How many units in the last place of the largest operand the two may differ by: mergekit takes norms, products and
angles in the tensors' own type."""
_ARC = "mergekit takes a tensor without direction to be at a right angle; remelt, as in slerp, goes the straight line"
_SIZE = "mergekit's norms have a least size, below which directions are lost: its result depends on the scale"
_NO_ONE_ARC = "there is no one arc between opposite tensors: mergekit divides by a sine of round-off"
_LINES = "mergekit takes each line of a kernel by itself, remelt all that belongs to one output"
_CANCEL = "where directions cancel out, mergekit refuses, or follows round-off; remelt takes the weighted mean"
_NO_ANGLE = "in float32, the angle between close tensors is round-off: mergekit leaves out those for which it is 0"
INTENDED = {
    ("nuslerp", "first zero"): _ARC,
    ("nuslerp", "second zero"): _ARC,
    ("nuslerp", "tiny"): _SIZE,
    ("nuslerp", "opposite"): _NO_ONE_ARC,
    ("nuslerp_rows", "first zero"): _ARC,
    ("nuslerp_rows", "second zero"): _ARC,
    ("nuslerp_rows", "tiny"): _SIZE,
    ("nuslerp_rows", "shape (4, 3, 3, 3)"): _LINES,
    ("nuslerp_rows", "opposite"): _NO_ONE_ARC,
    ("nuslerp_columns", "first zero"): _ARC,
    ("nuslerp_columns", "second zero"): _ARC,
    ("nuslerp_columns", "tiny"): _SIZE,
    ("nuslerp_columns", "opposite"): _NO_ONE_ARC,
    ("multislerp", "tiny"): _SIZE,
    ("multislerp", "zero"): _CANCEL,
    ("multislerp", "opposite"): _CANCEL,
    ("multislerp", "shape ()"): _CANCEL,
    ("multislerp", "shape (1,)"): _CANCEL,
    ("karcher_mean", "close"): _NO_ANGLE,
    ("karcher_mean", "opposite"): _CANCEL,
    ("karcher_mean", "shape ()"): _CANCEL,
    ("karcher_mean", "shape (1,)"): _CANCEL,
}
"""Where the two are meant to differ, and why."""
CASES: list[tuple[str, int, dict[str, Any]]] = [
    *((name, 2, {"alpha": alpha}) for name in OF_TWO[:3] for alpha in (0.1, 0.3, 0.5, 0.9, 1.5)),
    *(("multislerp", count, {}) for count in (1, 2, 3, 4, 5)),
    *(("multislerp", 3, {"weights": weights}) for weights in ([1.0, 2.0, 0.5], [0.3, 0.0, 0.1])),
    *(("karcher_mean", count, {"iterations": steps}) for count in (1, 2, 3, 5) for steps in (1, 3, 10)),
    *(("karcher_mean", 3, {"iterations": 10, "weights": weights}) for weights in ([1.0, 2.0, 0.5], [0.3, 0.0, 0.1])),
]


def gap_of(name: str, count: int, values: dict[str, Any], what: str, dtype: torch.dtype) -> float:
    """How far the two results are from each other, in units in the last place of the largest operand."""
    tensors = dict(structured(count, dtype))[what]
    ours = METHODS[name].on(*tensors, **values, **({"tolerance": 0.0} if name == "karcher_mean" else {}))
    assert ours.dtype == dtype
    assert ours.shape == tensors[0].shape
    if not ours.numel():
        return 0.0
    assert bool(ours.isfinite().all())
    try:
        due = by_mergekit(name, tensors, values)
    except ValueError:
        return math.inf
    gap = float((ours.double() - due.double()).abs().max())
    largest = max(float(tensor.abs().max()) for tensor in tensors) or 1.0
    return gap / (torch.finfo(dtype).eps * largest) if math.isfinite(gap) else math.inf


WHATS = [what for what, _ in structured(2, torch.float32)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "count", "values"), CASES, ids=[f"{n}-{c}-{v}" for n, c, v in CASES])
def test_results_agree_with_mergekit_to_round_off(
    name: str, count: int, values: dict[str, Any], dtype: torch.dtype
) -> None:
    for what in WHATS:
        if (name, what) not in INTENDED:
            gap = gap_of(name, count, values, what, dtype)
            assert gap <= UNITS[name], f"{what}: {gap:.1f} units"


@pytest.mark.parametrize(("name", "what"), INTENDED, ids=[f"{name} {what}" for name, what in INTENDED])
def test_every_intended_difference_is_one(name: str, what: str) -> None:
    tried = [(count, values) for other, count, values in CASES if other == name]
    gaps = (gap_of(name, count, values, what, dtype) for count, values in tried for dtype in DTYPES)
    assert any(gap > 256 for gap in gaps)


@pytest.mark.parametrize("name", NAMES)
def test_a_base_of_mergekit_is_a_sum_of_differences(name: str) -> None:
    if name in ("slerp_rows", "karcher_mean"):  # mergekit has no such thing
        return
    base, a, b = drawn(3, (16, 33), torch.float64)
    methods = pytest.importorskip("mergekit.merge_methods")
    options = {"nuslerp_rows": {"nuslerp_flatten": False}}.get(name, {})
    if name == "nuslerp_columns":
        options = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
    kind = name.partition("_")[0]
    due = methods.merge_tensors([base, a, b], kind, parameters={"weight": 1.0, **options}, base_index=0)
    torch.testing.assert_close(base + METHODS[name].on(a - base, b - base), due)


@functools.cache
def sd_mecha_slerp() -> Callable[..., Tensor]:
    sd_mecha = pytest.importorskip("sd_mecha")
    function: Callable[..., Tensor] = sd_mecha.slerp.__wrapped__
    return function


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slerp_by_row_is_sd_mechas_slerp_of_each_row(dtype: torch.dtype, alpha: float) -> None:
    for what, (a, b) in structured(2, dtype):
        ours = METHODS["slerp_rows"].on(a, b, alpha=alpha)
        assert (ours.shape, ours.dtype) == (a.shape, dtype)
        if not a.numel():
            continue
        rows = [a.reshape(1, -1), b.reshape(1, -1)] if a.dim() < 2 else [a.flatten(1), b.flatten(1)]
        by_slerp = [METHODS["slerp"].on(*pair, alpha=alpha) for pair in zip(*rows, strict=True)]
        torch.testing.assert_close(ours, torch.stack(by_slerp).reshape(a.shape), rtol=4e-7, atol=0.0)
        if what in ("opposite", "shape ()", "shape (1,)"):  # no one arc: sd-mecha divides by a sine of round-off
            continue
        due = torch.stack(
            [sd_mecha_slerp()(*pair, torch.tensor(alpha, dtype=dtype)) for pair in zip(*rows, strict=True)]
        )
        largest = max(float(a.abs().max()), float(b.abs().max())) or 1.0
        assert float((ours - due.reshape(a.shape)).abs().max()) <= 64 * torch.finfo(dtype).eps * largest, what


@pytest.mark.parametrize("name", ["slerp_rows", *OF_SEVERAL])
@pytest.mark.parametrize("place", [0, 1])
def test_operands_of_very_unlike_size_lose_nothing(name: str, place: int) -> None:
    """A direction counts as much as any other, however small the tensor that has it."""
    a, b = drawn(2, (1, 131), torch.float32)
    pair = [a * 1e6, b] if place == 0 else [a, b * 1e6]
    truth = METHODS[name].on(*(tensor.double() for tensor in pair))
    largest = float(truth.abs().max())
    assert float((METHODS[name].on(*pair) - truth).abs().max()) <= 4 * torch.finfo(torch.float32).eps * largest


def test_rows_and_columns_are_those_of_each_other_transposed() -> None:
    a, b = drawn(2, (7, 13), torch.float64)
    by_rows = METHODS["nuslerp_rows"].on(a, b, alpha=0.3)
    torch.testing.assert_close(METHODS["nuslerp_columns"].on(a.T, b.T, alpha=0.3), by_rows.T)
    each = [METHODS["nuslerp"].on(*pair, alpha=0.3) for pair in zip(a, b, strict=True)]
    torch.testing.assert_close(by_rows, torch.stack(each))


@pytest.mark.parametrize("what", ["opposite", "parallel", "equal", "zero", "first zero", "shape ()", "shape (1,)"])
@pytest.mark.parametrize("name", ["nuslerp", "nuslerp_rows", "nuslerp_columns", "slerp_rows"])
def test_where_there_is_no_one_arc_the_line_is_taken(name: str, what: str) -> None:
    a, b = dict(structured(2, torch.float64))[what]
    torch.testing.assert_close(METHODS[name].on(a, b, alpha=0.3), torch.lerp(a, b, 0.3))


def test_nuslerp_is_slerp_plain_but_for_small_angles() -> None:
    a, b = drawn(2, (16, 33), torch.float64)
    plain = METHODS["slerp_plain"]
    torch.testing.assert_close(METHODS["nuslerp"].on(a, b, alpha=0.3), plain.on(a, b, alpha=0.3))
    near = a + 0.02 * b
    gap = (METHODS["nuslerp"].on(a, near, alpha=0.3) - plain.on(a, near, alpha=0.3)).abs().max()
    assert 1e-8 < float(gap) < 1e-3


def test_multislerp_of_mergekit_goes_nowhere_in_its_tangent_space() -> None:
    """Its tangent vectors add up to zero: what is left is the mean direction, which is what remelt computes."""
    for weights in ([1.0, 1.0, 1.0], [1.0, 2.0, 0.5]):
        tensors = drawn(3, (16, 33), torch.float64)
        fair = [weight / sum(weights) for weight in weights]
        mean = sum(share * tensor / tensor.norm() for share, tensor in zip(fair, tensors, strict=True))
        norm = sum(share * float(tensor.norm()) for share, tensor in zip(fair, tensors, strict=True))
        due = norm * mean / mean.norm()
        torch.testing.assert_close(METHODS["multislerp"].on(*tensors, weights=weights), due)
        torch.testing.assert_close(merged("multislerp", tensors, weight=weights, eps=1e-16), due)
        whole = merged("multislerp", tensors, weight=weights, eps=1e-16, normalize_weights=False)
        torch.testing.assert_close(sum(weights) * METHODS["multislerp"].on(*tensors, weights=weights), whole)


@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_the_karcher_mean_of_two_is_a_slerp(alpha: float) -> None:
    for _, (a, b) in structured(2, torch.float64):
        if a.numel() > 1 and float(a.norm()) and float(b.norm()):
            found = METHODS["karcher_mean"].on(a, b, weights=[1.0 - alpha, alpha])
            scale = float(torch.maximum(a.abs().max(), b.abs().max()))
            if float((a + b).norm()) > 1e-6 * float(a.norm()):  # else there is no one arc
                torch.testing.assert_close(found, METHODS["slerp"].on(a, b, alpha=alpha), rtol=0.0, atol=1e-12 * scale)
    a, b = drawn(2, (131,), torch.float64)
    torch.testing.assert_close(METHODS["multislerp"].on(a, b), METHODS["slerp"].on(a, b))


def test_the_karcher_mean_of_close_tensors_is_nearer_to_the_truth_than_mergekits() -> None:
    """Their angles are round-off in float32, and mergekit's result may be as far off as the tensors are apart."""
    apart, ours, theirs = 5e-4, 0.0, 0.0
    for seed in range(20):
        first, *others = drawn(3, (64, 64), torch.float32, seed)
        tensors = [first + apart * other for other in [torch.zeros_like(first), *others]]
        truth = METHODS["karcher_mean"].on(*(tensor.double() for tensor in tensors))
        ours = max(ours, float((METHODS["karcher_mean"].on(*tensors) - truth).abs().max()))
        theirs = max(theirs, float((merged("karcher", tensors) - truth).abs().max()))
    assert ours < 2e-3 * apart
    assert theirs > 0.5 * apart


def test_the_karcher_mean_of_small_tensors_is_not_zero() -> None:
    tensors = drawn(3, (16, 33), torch.float64)
    small = [1e-9 * tensor for tensor in tensors]
    torch.testing.assert_close(METHODS["karcher_mean"].on(*small), 1e-9 * METHODS["karcher_mean"].on(*tensors))
    assert not bool(merged("karcher", small).any())  # whatever is smaller than the tolerance is zero there


def logarithms(mean: Tensor, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum of the ways along arcs from a direction to those of tensors, as the formula says."""
    total = torch.zeros_like(mean)
    for weight, tensor in zip(weights, tensors, strict=True):
        direction = tensor / tensor.norm()
        cosine = float((mean * direction).sum().clamp(-1.0, 1.0))
        rest = direction - cosine * mean
        total += weight * math.acos(cosine) * rest / rest.norm()
    return total


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 0.5, 3.0]])
@pytest.mark.parametrize("what", ["shape (16, 33)", "of unlike size", "with much in common", "tiny", "huge", "close"])
def test_the_karcher_mean_solves_its_equation(what: str, weights: list[float]) -> None:
    tensors = dict(structured(4, torch.float64))[what]
    found = METHODS["karcher_mean"].on(*tensors, weights=weights)
    fair = [weight / sum(weights) for weight in weights]
    norm = sum(share * float(tensor.norm()) for share, tensor in zip(fair, tensors, strict=True))
    assert float(found.norm()) == pytest.approx(norm, rel=1e-12)
    assert float(logarithms(found / found.norm(), tensors, fair).norm()) < 1e-11


@pytest.mark.parametrize("name", OF_SEVERAL)
def test_one_operand_is_the_result_and_equal_ones_have_their_bits(name: str) -> None:
    for dtype, weights in itertools.product(DTYPES, (1.0, 0.3, 0.0, -2.0)):
        (tensor,) = drawn(1, (16, 33), dtype)
        for count in (1, 2, 3, 7):
            found = METHODS[name].on(*[tensor] * count, weights=weights)
            assert torch.equal(found, tensor)
            assert found.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("name", OF_SEVERAL)
def test_what_has_no_direction_or_no_finite_norm_gives_the_weighted_mean(name: str) -> None:
    (a,) = drawn(1, (131,), torch.float64)
    run = functools.partial(METHODS[name].on, weights=[1.0, 3.0])
    assert not bool(run(torch.zeros(131), torch.zeros(131)).any())
    torch.testing.assert_close(METHODS[name].on(a, -a, 2 * a, -2 * a), torch.zeros_like(a))
    big = torch.full((131,), 1e200, dtype=torch.float64)
    torch.testing.assert_close(run(big, a), 0.25 * big + 0.75 * a)
    holed = torch.cat((a[:-1], torch.tensor([math.nan], dtype=torch.float64)))
    torch.testing.assert_close(run(holed, 2 * a)[:-1], 1.75 * a[:-1])
    zero = METHODS[name].on(torch.zeros_like(a), a, weights=[1.0, 3.0])
    torch.testing.assert_close(zero, 0.75 * a)  # a zero tensor counts for the norm alone


@pytest.mark.parametrize("name", OF_SEVERAL)
@given(st.permutations(range(4)), st.floats(1e-12, 1e12), st.lists(st.floats(0.01, 10.0), min_size=4, max_size=4))
def test_means_of_directions_know_no_order_and_no_scale(
    name: str, order: list[int], scale: float, weights: list[float]
) -> None:
    tensors = drawn(4, (7, 11), torch.float64)
    found = METHODS[name].on(*tensors, weights=weights)
    moved = METHODS[name].on(*(tensors[place] for place in order), weights=[weights[place] for place in order])
    torch.testing.assert_close(moved, found)
    torch.testing.assert_close(METHODS[name].on(*(scale * one for one in tensors), weights=weights), scale * found)
    torch.testing.assert_close(METHODS[name].on(*tensors, weights=[3.0 * weight for weight in weights]), found)


@given(st.floats(0.0, 1.0), st.integers(0, 100))
def test_slerp_by_row_keeps_norms_between_those_of_its_operands(alpha: float, seed: int) -> None:
    a, b = drawn(2, (5, 17), torch.float64, seed)
    norms = METHODS["slerp_rows"].on(a, 3 * b, alpha=alpha).norm(dim=1)
    torch.testing.assert_close(norms, torch.lerp(a.norm(dim=1), 3 * b.norm(dim=1), alpha))


@pytest.mark.parametrize("executor", ["native", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_the_engine_gives_the_result_of_the_function(name: str, executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    count = 3 if name in OF_SEVERAL else 2
    tensors = drawn(count, (257, 301), torch.float32)
    values = {"weights": [1.0, 0.5, 2.0]} if name in OF_SEVERAL else {"alpha": 0.3}
    found = rm.merge(METHODS[name](*(rm.model({"w": tensor}) for tensor in tensors), **values), threads=2)["w"]
    torch.testing.assert_close(found, METHODS[name].on(*tensors, **values), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*OF_SEVERAL, "geometric_median"])
def test_weights_may_differ_by_block(name: str) -> None:
    tensors = drawn(3, (257, 301), torch.float32)
    models = [rm.model({"w": tensor, "v": tensor[:7]}) for tensor in tensors]
    found = rm.merge(METHODS[name](*models, weights=[rm.keys({"w": 0.2}) | 1.0, 0.5, rm.keys({"v": 0.1}) | 2.0]))
    by_hand = METHODS[name].on
    torch.testing.assert_close(found["w"], by_hand(*tensors, weights=[0.2, 0.5, 2.0]))
    torch.testing.assert_close(found["v"], by_hand(*(tensor[:7] for tensor in tensors), weights=[1.0, 0.5, 0.1]))


@pytest.mark.parametrize("name", ["nuslerp", *OF_SEVERAL])
def test_they_are_traced_and_run_natively(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from remelt.engine import native_executor

    made = []
    plain = native_executor.NativeExecutor.__init__
    monkeypatch.setattr(
        native_executor.NativeExecutor, "__init__", lambda self, kernel: (made.append(kernel), plain(self, kernel))[1]
    )
    monkeypatch.setenv("REMELT_EXECUTOR", "native")
    tensors = drawn(3 if name in OF_SEVERAL else 2, (257, 301), torch.float32)
    rm.merge(METHODS[name](*(rm.model({"w": tensor}) for tensor in tensors)), threads=1)
    assert len(made) >= 2  # the sums, and the sweep


def test_mistakes_are_told() -> None:
    with pytest.raises(RecipeError, match=r"'weights' has a number for each model, but got 3 numbers for 2 models"):
        METHODS["multislerp"]("a", "b", weights=[1.0, 2.0, 3.0])
    with pytest.raises(RecipeError, match=r"karcher_mean needs a whole number for 'iterations', but got 1\.5"):
        METHODS["karcher_mean"]("a", "b", iterations=1.5)
    with pytest.raises(RecipeError, match="karcher_mean needs at least one model"):
        METHODS["karcher_mean"]()
    with pytest.raises(RecipeError, match="nuslerp takes 2 positional arguments, but got 3"):
        METHODS["nuslerp"]("a", "b", "c")
