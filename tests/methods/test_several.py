"""Methods of several models, beside those of sd-mecha and mergekit and their formulas; where they part, why."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
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
NAMES = ("geometric_median", "median", "model_stock", "model_stock_rows")
MOST = 16


class TestConformance(MethodConformance):
    @pytest.fixture(params=NAMES)
    def method(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)


class TestConformanceWithOtherValues(MethodConformance):
    @pytest.fixture(params=["geometric_median", "model_stock_rows"])
    def method(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def values(self, method: str) -> dict[str, Any]:
        return {"consecutive": True} if method == "model_stock_rows" else {"weights": (0.5, 0.0, 2.0), "iterations": 3}


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
    yield "last zero", [*[first, *others][:-1], torch.zeros_like(first)]
    yield "opposite", [first * (-1.0) ** number for number in range(count)]
    yield "parallel", [first * (number + 1.0) for number in range(count)]
    yield "close", [first + 1e-3 * other for other in [torch.zeros_like(first), *others]]
    yield "with much in common", [first + other for other in [torch.zeros_like(first), *others]]
    yield "of unlike size", [tensor * 10.0**number for number, tensor in enumerate([first, *others])]


def by_sd_mecha(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """The result of sd-mecha's method; its median with seven steps, as it stops to move by round-off otherwise."""
    sd_mecha = pytest.importorskip("sd_mecha")
    if name == "geometric_median":
        result = sd_mecha.geometric_median.__wrapped__(*tensors, maxiter=STEPS, ftol=-1.0)
    else:
        result = sd_mecha.model_stock.__wrapped__(*tensors)
    assert isinstance(result, Tensor)
    return result


def by_mergekit(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """The result of mergekit's model_stock of models whose base is zero."""
    methods = pytest.importorskip("mergekit.merge_methods")
    models = [torch.zeros_like(tensors[0]), *tensors]
    options = {"filter_wise": name == "model_stock_rows"}
    result = methods.merge_tensors(models, "model_stock", parameters=options, base_index=0)
    assert isinstance(result, Tensor)
    return result


STEPS = 7
PEERS = {"sd-mecha": by_sd_mecha, "mergekit": by_mergekit}
CASES: list[tuple[str, str, int, dict[str, Any]]] = [
    *(("sd-mecha", "geometric_median", n, {"iterations": STEPS, "tolerance": 0.0}) for n in (1, 2, 3, 5)),
    *(("sd-mecha", "model_stock_rows", count, {"consecutive": True}) for count in (2, 3, 5)),
    *(("mergekit", name, count, {}) for name in ("model_stock", "model_stock_rows") for count in (2, 3, 5)),
]
UNITS = 64
"""How many units in the last place of the largest operand the two may differ by: both peers take norms and products in
the tensors' own type, and divide by what may be near to 0."""
_SCALE = "a least distance or norm that does not know the scale of tensors: the peer's result depends on it"
_EXACT = "where a model is the median, remelt gives it; sd-mecha comes slowly nearer to it"
_HUGE = (
    "opposite deltas leave nothing to trust: sd-mecha's ratio is infinite there, its result the type's largest number"
)
_LINES = "the peer takes each line of a kernel by itself, remelt all that belongs to one output"
INTENDED = {
    ("sd-mecha", "geometric_median", "tiny"): _SCALE,
    ("sd-mecha", "geometric_median", "opposite"): _EXACT,
    ("sd-mecha", "model_stock_rows", "tiny"): _SCALE,
    ("sd-mecha", "model_stock_rows", "shape ()"): _HUGE,
    ("sd-mecha", "model_stock_rows", "shape (1,)"): _HUGE,
    ("sd-mecha", "model_stock_rows", "shape (4, 3, 3, 3)"): _LINES,
    ("mergekit", "model_stock", "tiny"): _SCALE,
    ("mergekit", "model_stock_rows", "tiny"): _SCALE,
    ("mergekit", "model_stock_rows", "as small as the steps of a fine-tune"): _SCALE,
    ("mergekit", "model_stock_rows", "shape (4, 3, 3, 3)"): _LINES,
}
"""Where the two are meant to differ, and why."""


def gap_of(peer: str, name: str, count: int, values: dict[str, Any], what: str, dtype: torch.dtype) -> float:
    """How far the two results are from each other, in units in the last place of the largest operand."""
    tensors = dict(structured(count, dtype))[what]
    ours = METHODS[name].on(*tensors, **values)
    assert ours.dtype == dtype
    assert ours.shape == tensors[0].shape
    if not ours.numel():
        return 0.0
    due = PEERS[peer](name, [tensor.clone() for tensor in tensors]).reshape(ours.shape)  # of shape (1,) for ()
    gap = float((ours.double() - due.double()).abs().max())
    largest = max(float(tensor.abs().max()) for tensor in tensors) or 1.0
    return gap / (torch.finfo(dtype).eps * largest)


WHATS = [what for what, _ in structured(2, torch.float32)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("peer", "name", "count", "values"), CASES, ids=[f"{p}-{n}-{c}" for p, n, c, _ in CASES])
def test_results_agree_with_peers_to_round_off(
    peer: str, name: str, count: int, values: dict[str, Any], dtype: torch.dtype
) -> None:
    for what in WHATS:
        if (peer, name, what) not in INTENDED:
            gap = gap_of(peer, name, count, values, what, dtype)
            assert gap <= UNITS, f"{what}: {gap:.1f} units"


@pytest.mark.parametrize(("peer", "name", "what"), INTENDED, ids=[" ".join(one) for one in INTENDED])
def test_every_intended_difference_is_one(peer: str, name: str, what: str) -> None:
    tried = [(count, values) for by, other, count, values in CASES if (by, other) == (peer, name)]
    gaps = (gap_of(peer, name, count, values, what, dtype) for count, values in tried for dtype in DTYPES)
    assert any(gap > UNITS for gap in gaps)


def test_a_base_of_mergekit_is_a_sum_of_differences() -> None:
    base, a, b, c = drawn(4, (16, 33), torch.float64)
    methods = pytest.importorskip("mergekit.merge_methods")
    for name, by_filter in (("model_stock", False), ("model_stock_rows", True)):
        due = methods.merge_tensors([base, a, b, c], "model_stock", parameters={"filter_wise": by_filter}, base_index=0)
        torch.testing.assert_close(base + METHODS[name].on(a - base, b - base, c - base), due)


# model stock


def stock_of(deltas: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> Tensor:
    """The formula for one tensor, or one row, word by word."""
    flat = [delta.double().flatten() for delta in deltas]
    cosines = []
    for i, j in pairs:
        both = float(flat[i].norm() * flat[j].norm())
        cosines.append(float(flat[i] @ flat[j]) / both if both else 0.0)
    count = len(deltas)
    cosine = sum(cosines) / len(cosines) if cosines else 1.0
    below = 1.0 + (count - 1) * cosine
    ratio = count * cosine / below if abs(below) > 1e-6 else 0.0
    return ratio * sum(deltas[1:], start=deltas[0]) / count


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_model_stock_is_its_formula(dtype: torch.dtype, count: int) -> None:
    every = list(itertools.combinations(range(count), 2))
    next_ones = [(i, i + 1) for i in range(count - 1)]
    for what, deltas in structured(count, dtype):
        largest = max((float(delta.abs().max()) for delta in deltas if delta.numel()), default=0.0)
        near = functools.partial(torch.testing.assert_close, rtol=0.0, atol=64 * torch.finfo(dtype).eps * largest)
        near(METHODS["model_stock"].on(*deltas), stock_of(deltas, every), msg=what)
        for pairs, consecutive in ((every, False), (next_ones, True)):
            found = METHODS["model_stock_rows"].on(*deltas, consecutive=consecutive)
            if deltas[0].numel():
                rows = zip(
                    *(delta.reshape(delta.shape[0] if delta.dim() > 1 else 1, -1) for delta in deltas), strict=True
                )
                due = torch.stack([stock_of(row, pairs) for row in rows]).reshape(deltas[0].shape)
                near(found, due, msg=what)


@pytest.mark.parametrize("name", ["model_stock", "model_stock_rows"])
def test_one_delta_is_trusted_where_sd_mecha_fails(name: str) -> None:
    sd_mecha = pytest.importorskip("sd_mecha")
    (delta,) = drawn(1, (16, 33), torch.float32)
    found = METHODS[name].on(delta)
    assert torch.equal(found, delta)
    assert found.data_ptr() != delta.data_ptr()
    with pytest.raises(RuntimeError):
        sd_mecha.model_stock.__wrapped__(delta)


@pytest.mark.parametrize("name", ["model_stock", "model_stock_rows"])
def test_model_stock_keeps_what_is_alike_and_drops_what_is_perpendicular(name: str) -> None:
    x, y = torch.eye(2)
    assert not METHODS[name].on(x, y).any()
    assert not METHODS[name].on(x, torch.zeros(2)).any()
    assert not METHODS[name].on(x, -x).any()
    torch.testing.assert_close(METHODS[name].on(x, 3 * x), 2 * x)
    for dtype in DTYPES:
        (delta,) = drawn(1, (16, 33), dtype)
        torch.testing.assert_close(METHODS[name].on(*[delta] * 3), delta)


def test_model_stock_by_row_does_not_depend_on_the_order_of_deltas_unless_pairs_are_consecutive() -> None:
    a, b, c = drawn(3, (5, 7), torch.float64)
    run = METHODS["model_stock_rows"].on
    torch.testing.assert_close(run(a, b, c), run(b, a, c))
    assert float((run(a, b, c, consecutive=True) - run(b, a, c, consecutive=True)).abs().max()) > 0.01


def test_a_row_that_is_not_finite_harms_no_other() -> None:
    a, b = drawn(2, (5, 7), torch.float32)
    holed = a.clone()
    holed[2, 3] = math.nan
    found, due = (METHODS["model_stock_rows"].on(one, b) for one in (holed, a))
    assert torch.equal(found[[0, 1, 3, 4]], due[[0, 1, 3, 4]])
    assert found[2].isnan().tolist() == holed[2].isnan().tolist()
    whole = METHODS["model_stock"].on(holed, b)  # no angle is known: the mean
    assert torch.equal(whole[:2], ((a + b) / 2)[:2])


# geometric median


def pull(x: Tensor, models: Sequence[Tensor], weights: Sequence[float]) -> tuple[float, float]:
    """How strongly the models that are not at a point pull it, and the weight of those that are there."""
    total, here = torch.zeros_like(x), 0.0
    for weight, model in zip(weights, models, strict=True):
        apart = (model - x).norm()
        if float(apart) < 1e-5 * float(model.norm()):
            here += weight
        else:
            total += weight * (model - x) / apart
    return float(total.norm()), here


@pytest.mark.parametrize("weights", [[1.0] * 4, [1.0, 2.0, 0.5, 3.0], [1.0, 1.0, 1.0, 4.0], [1.0, 1.0, 0.0, 0.0]])
@pytest.mark.parametrize("what", ["shape (16, 33)", "of unlike size", "with much in common", "tiny", "huge", "close"])
def test_the_geometric_median_is_where_the_models_pull_alike(what: str, weights: list[float]) -> None:
    models = dict(structured(4, torch.float64))[what]
    found = METHODS["geometric_median"].on(*models, weights=weights, iterations=1000)
    strength, here = pull(found, models, weights)
    assert strength <= (here or 1e-9 * sum(weights))


def test_the_geometric_median_is_nearer_to_all_than_sd_mechas() -> None:
    sd_mecha = pytest.importorskip("sd_mecha")
    for seed in range(5):
        models = drawn(3, (64, 64), torch.float32, seed)
        truth = METHODS["geometric_median"].on(*(model.double() for model in models), iterations=1000)
        ours = float((METHODS["geometric_median"].on(*models) - truth).abs().max())
        theirs = float((sd_mecha.geometric_median.__wrapped__(*models) - truth).abs().max())
        assert ours <= 2 * torch.finfo(torch.float32).eps * float(truth.abs().max())
        assert ours < theirs  # it stops as soon as the sum of distances does not change


def test_the_geometric_median_lets_no_stray_pull_it_away() -> None:
    for dtype, place in itertools.product(DTYPES, range(4)):
        near = [1.0 + 0.01 * one for one in drawn(4, (16, 33), dtype)]
        calm = METHODS["geometric_median"].on(*near)
        near[place] = near[place] + 1e6 * drawn(1, (16, 33), dtype, seed=3)[0]
        found = METHODS["geometric_median"].on(*near)
        assert float((found - calm).abs().max()) < 0.1
        assert float((METHODS["n_average"].on(*near) - calm).abs().max()) > 1e5


def test_the_geometric_median_of_many_equal_models_has_their_bits() -> None:
    for dtype, count in itertools.product(DTYPES, (1, 2, 3, 7)):
        (model,) = drawn(1, (16, 33), dtype)
        found = METHODS["geometric_median"].on(*[model] * count, weights=0.7)
        assert torch.equal(found, model)
        assert found.data_ptr() != model.data_ptr()
    a, b = drawn(2, (16, 33), torch.float64)
    torch.testing.assert_close(METHODS["geometric_median"].on(a, b, b), b)


def test_weights_of_the_geometric_median_count_models() -> None:
    a, b, c = drawn(3, (16, 33), torch.float64)
    run = METHODS["geometric_median"].on
    torch.testing.assert_close(run(a, b, c, weights=[2.0, 1.0, 1.0], iterations=9), run(a, a, b, c, iterations=9))
    torch.testing.assert_close(run(a, b, c, weights=[1.0, -3.0, 1.0]), run(a, b, c, weights=[1.0, 0.0, 1.0]))
    torch.testing.assert_close(run(a, b, c, weights=0.0), run(a, b, c))
    torch.testing.assert_close(run(a, b, c, weights=[-1.0, -1.0, -1.0]), run(a, b, c))


@pytest.mark.parametrize("values", [{"iterations": 0}, {"tolerance": 0.0}])
def test_odd_values_give_a_median_or_the_mean(values: dict[str, Any]) -> None:
    models = drawn(3, (16, 33), torch.float64)
    found = METHODS["geometric_median"].on(*models, **values)
    due = METHODS["n_average" if "iterations" in values else "geometric_median"].on(*models)
    torch.testing.assert_close(found, due)
    line = [torch.tensor([float(number)]) for number in (0, 1, 2)]  # the mean is one of them from the start
    torch.testing.assert_close(METHODS["geometric_median"].on(*line, **values), line[1])


def test_distances_that_are_not_finite_give_the_mean() -> None:
    (a,) = drawn(1, (131,), torch.float64)
    big = torch.full((131,), 1e200, dtype=torch.float64)
    torch.testing.assert_close(METHODS["geometric_median"].on(big, a, weights=[1.0, 3.0]), 0.25 * big + 0.75 * a)
    holed = torch.cat((a[:-1], torch.tensor([math.nan], dtype=torch.float64)))
    torch.testing.assert_close(METHODS["geometric_median"].on(holed, 2 * a)[:-1], 1.5 * a[:-1])


@given(st.permutations(range(4)), st.floats(1e-9, 1e9), st.lists(st.floats(0.01, 10.0), min_size=4, max_size=4))
def test_the_geometric_median_knows_no_order_no_scale_and_no_origin(
    order: list[int], scale: float, weights: list[float]
) -> None:
    run = functools.partial(METHODS["geometric_median"].on, iterations=20, tolerance=0.0)
    models = drawn(4, (7, 11), torch.float64)
    found = run(*models, weights=weights)
    moved = run(*(models[place] for place in order), weights=[weights[place] for place in order])
    torch.testing.assert_close(moved, found)
    torch.testing.assert_close(run(*(scale * one for one in models), weights=weights), scale * found)
    torch.testing.assert_close(run(*(one + 5.0 for one in models), weights=weights), found + 5.0)


# median


def check_median(models: Sequence[Tensor]) -> None:
    with np.errstate(all="ignore"):
        due = np.median(np.stack([model.numpy() for model in models]), axis=0)
    found = METHODS["median"].on(*models)
    assert found.dtype == models[0].dtype
    np.testing.assert_array_equal(found.numpy(), due.astype(found.numpy().dtype))


@pytest.mark.parametrize("count", range(1, MOST + 4))
def test_the_median_is_numpys(count: int) -> None:
    for dtype in DTYPES:
        for what, models in structured(count, dtype):
            if what in ("of unlike size", "opposite", "parallel") and count > 9:
                continue
            check_median(models)


@given(st.integers(1, MOST), st.integers(0, 2**32))
def test_the_median_of_ties_zeros_and_infinities_is_numpys(count: int, seed: int) -> None:
    values = np.array([-np.inf, -2.0, -1.0, 0.0, 1.0, 1.5, 3.0, np.inf], dtype=np.float32)
    chosen = np.random.default_rng(seed).choice(values, (count, 64))
    check_median([torch.from_numpy(row) for row in chosen])


@pytest.mark.parametrize("count", range(1, MOST + 1))
def test_every_order_is_sorted_out(count: int) -> None:
    """By the zero-one principle: comparisons that are right for all orders of zeros and ones are right for all."""
    bits = torch.arange(2**count)
    check_median([((bits >> place) & 1).float() for place in range(count)])


@pytest.mark.parametrize("count", range(1, MOST + 1))
def test_nan_in_any_model_is_nan_in_the_median(count: int) -> None:
    for place in range(count):
        models = drawn(count, (131,), torch.float32)
        models[place][7] = math.nan
        found = METHODS["median"].on(*models)
        assert found.isnan().nonzero().flatten().tolist() == [7]


@given(st.permutations(range(5)), st.floats(-1e6, 1e6))
def test_the_median_knows_no_order_and_one_stray_is_nothing(order: list[int], stray: float) -> None:
    models = drawn(5, (7, 11), torch.float64)
    found = METHODS["median"].on(*models)
    assert torch.equal(METHODS["median"].on(*(models[place] for place in order)), found)
    low, high = torch.stack(models[:4]).sort(dim=0).values[1:3]
    astray = METHODS["median"].on(*models[:4], torch.full((7, 11), stray, dtype=torch.float64))
    assert bool(((low <= astray) & (astray <= high)).all())


# the engine


@pytest.mark.parametrize("executor", ["native", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_the_engine_gives_the_result_of_the_function(name: str, executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    base, *tensors = drawn(4, (257, 301), torch.float32)
    models = [rm.model({"w": tensor}) for tensor in tensors]
    values = {"weights": [1.0, 0.5, 2.0]} if name == "geometric_median" else {}
    if name.startswith("model_stock"):
        origin = rm.model({"w": base})
        found = rm.merge(origin + METHODS[name](*(model - origin for model in models)), threads=2)["w"]
        due = base + METHODS[name].on(*(tensor - base for tensor in tensors))
    else:
        found = rm.merge(METHODS[name](*models, **values), threads=2)["w"]
        due = METHODS[name].on(*tensors, **values)
    torch.testing.assert_close(found, due, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "count"), [("geometric_median", 3), ("model_stock", 3), ("median", 3), ("median", 16)]
)
def test_they_are_traced_and_run_natively(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from remelt.engine import native_executor

    made = []
    plain = native_executor.NativeExecutor.__init__
    monkeypatch.setattr(
        native_executor.NativeExecutor, "__init__", lambda self, kernel: (made.append(kernel), plain(self, kernel))[1]
    )
    monkeypatch.setenv("REMELT_EXECUTOR", "native")
    tensors = drawn(count, (257, 301), torch.float32)
    models = [rm.model({"w": tensor}) for tensor in tensors]
    if name == "model_stock":
        models = [model - rm.model({"w": tensors[0] + 1.0}) for model in models]
    found = rm.merge(METHODS[name](*models), threads=1)["w"]
    assert len(made) >= (1 if name == "median" else 2)
    if name == "median":
        assert torch.equal(found, METHODS[name].on(*tensors))


def test_mistakes_are_told() -> None:
    with pytest.raises(RecipeError, match=r"'weights' has a number for each model, but got 1 number for 2 models"):
        METHODS["geometric_median"]("a", "b", weights=[1.0])
    with pytest.raises(RecipeError, match=r"geometric_median needs a whole number for 'iterations', but got 2\.5"):
        METHODS["geometric_median"]("a", "b", iterations=2.5)
    with pytest.raises(RecipeError, match="model_stock_rows needs True or False for 'consecutive', but got 1"):
        METHODS["model_stock_rows"]("a", "b", consecutive=1)
    with pytest.raises(RecipeError, match="median needs at least one model"):
        METHODS["median"]()
    with pytest.raises(RecipeError, match="delta"):
        rm.plan(METHODS["model_stock"](rm.model({"w": torch.ones(3)}), rm.model({"w": torch.ones(3)})))
