"""Task arithmetic, masks, products and cosines: beside sd-mecha, mergekit and slow formulas, and what each promises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor

import remelt as rm
from remelt.engine import native, sweeps
from remelt.errors import RecipeError, RefusedError
from remelt.methods import METHODS
from remelt.testing import MethodConformance

NAMES = {
    "remelt.methods.task": (
        *("task_arithmetic", "add_difference_clamped", "triple_sum", "sum_twice", "nearswap", "select_max_delta"),
        "passthrough",
    ),
    "remelt.methods.masks": (
        *("train_difference_mask", "add_opposite_mask", "add_strict_opposite_mask"),
        *("train_difference", "add_opposite", "add_strict_opposite"),
    ),
    "remelt.methods.products": (
        *("geometric_sum", "multiply_quotient", "multiply_difference", "similarity_add_difference"),
    ),
    "remelt.methods.cosine": ("add_cosine_a", "add_cosine_b"),
    "remelt.methods.linear": ("n_average",),
}
DTYPES = (torch.float32, torch.float64)
SHAPES = ((), (0,), (0, 4), (4, 0), (1,), (131,), (16, 33), (4, 3, 3, 3), (200, 300))
ALPHAS = (0.0, 0.3, 0.5, 1.0, -0.5, 1.7)


class TestConformance(MethodConformance):
    @pytest.fixture(params=[name for names in NAMES.values() for name in names])
    def method(self, request: pytest.FixtureRequest) -> Any:
        return request.param


@pytest.mark.parametrize("module", NAMES)
def test_the_families_are_complete(module: str) -> None:
    found = {name for name, method in METHODS.items() if method.function.__module__ == module}
    assert found - {"weighted_sum", "add_difference"} == set(NAMES[module])


def structured(count: int, dtype: torch.dtype) -> Iterator[tuple[str, list[Tensor]]]:
    """Random tensors of every shape, and such as lie in special ways to each other."""
    for name, tensors in _structured(max(count, 3), dtype):
        yield name, tensors[:count]


def _structured(count: int, dtype: torch.dtype) -> Iterator[tuple[str, list[Tensor]]]:

    def drawn(shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]

    for shape in SHAPES:
        yield f"shape {shape}", drawn(shape)
    first, *others = drawn((16, 33))
    for scale, name in ((1e-15, "tiny"), (1e15, "huge"), (1e-4, "as small as the steps of a fine-tune")):
        yield name, [tensor * scale for tensor in drawn((16, 33), seed=1)]
    yield "equal", [first] * count
    yield "zero", [torch.zeros_like(first)] * count
    yield "first zero", [torch.zeros_like(first), *others]
    yield "second zero", [first, torch.zeros_like(first), *others[1:]]
    yield "last zero", [first, *others[:-1], torch.zeros_like(first)]
    yield "opposite", [first * (-1.0) ** number for number in range(count)]
    yield "parallel", [first * (number + 1.0) for number in range(count)]
    yield "close", [first + 1e-3 * other for other in [torch.zeros_like(first), *others]]
    yield "of unlike size", [tensor * 10.0**number for number, tensor in enumerate([first, *others])]


def gap_of(found: Tensor, due: Tensor, operands: list[Tensor]) -> float:
    """The largest difference in units in the last place of the largest number; infinite where only one is NaN."""
    assert found.dtype == due.dtype and found.shape == due.shape
    if not found.numel():
        return 0.0
    largest = max(float(one[one.isfinite()].abs().max()) for one in (*operands, due) if one.isfinite().any())
    gap = (found.double() - due.double()).abs().masked_fill(found == due, 0.0)
    gap = gap.masked_fill(found.isnan() & due.isnan(), 0.0).nan_to_num(nan=math.inf)
    return float(gap.max()) / (torch.finfo(found.dtype).eps * (largest or 1.0))


# Beside sd-mecha 1.1.8.

BY_SD_MECHA = {
    "train_difference_mask": (3, 4, "a few roundings"),
    "add_opposite_mask": (3, 64, "sd-mecha takes a + b - 2 c, remelt the differences from c: they cancel less"),
    "add_strict_opposite_mask": (3, 4, "a few roundings"),
    "geometric_sum": (2, 64, "sd-mecha takes complex powers in the type of the operands, remelt real ones in float64"),
    "multiply_quotient": (3, 512, "as above; sd-mecha takes differences of logarithms, which cancel"),
    "add_cosine_a": (2, 16, "sd-mecha takes norms and products in the type of the operands, remelt in float64"),
    "add_cosine_b": (2, 16, "as above"),
}
"""For each method the operands, how many units in the last place the two may differ by, and why."""
ZEROS = ("zero", "first zero", "second zero")
INTENDED = {
    ("add_opposite_mask", "close"): "a + b - 2 c of close models has few digits left in float32",
    **{("geometric_sum", what): "0 to the power 0 is 1, and to a negative one infinite; NaN there" for what in ZEROS},
    **{("add_cosine_b", what): "a tensor of zeros has cosine 0; NaN there" for what in ZEROS},
    ("add_cosine_b", "tiny"): "a cosine does not depend on scale; there, norms below 1e-8 count as 1e-8",
}
"""Where the two are meant to differ, and why."""


def by_sd_mecha(name: str, operands: list[Tensor], alpha: float) -> Tensor:
    sd_mecha = pytest.importorskip("sd_mecha")
    function = getattr(sd_mecha, name).__wrapped__
    result: Tensor = function(*[one.clone() for one in operands], torch.tensor(alpha, dtype=operands[0].dtype))
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BY_SD_MECHA)
def test_results_agree_with_sd_mecha_to_round_off(name: str, dtype: torch.dtype) -> None:
    count, units, reason = BY_SD_MECHA[name]
    for alpha in ALPHAS:
        for what, operands in structured(count, dtype):
            if (name, what) not in INTENDED:
                due = by_sd_mecha(name, operands, alpha)
                scale = [torch.ones_like(due)] if name.endswith("mask") else operands
                gap = gap_of(METHODS[name].on(*operands, alpha=alpha), due, scale)
                assert gap <= units, f"{what}, alpha {alpha}: {gap:.1f} units; {reason}"


@pytest.mark.parametrize(("name", "what"), INTENDED, ids=[f"{name} {what}" for name, what in INTENDED])
def test_every_intended_difference_is_one(name: str, what: str) -> None:
    operands = dict(structured(BY_SD_MECHA[name][0], torch.float32))[what]
    gaps = []
    for alpha in ALPHAS:
        ours = METHODS[name].on(*operands, alpha=alpha)
        gaps.append(gap_of(ours, by_sd_mecha(name, operands, alpha), operands))
        if 0.0 <= alpha <= 1.0:
            assert ours.isfinite().all()
    assert max(gaps) > 64


@pytest.mark.parametrize(("name", "what"), [("add_opposite_mask", "close"), ("multiply_quotient", "tiny")])
def test_where_the_two_part_remelt_is_nearer_to_the_truth(name: str, what: str) -> None:
    operands = dict(structured(3, torch.float32))[what]
    truth = METHODS[name].on(*[one.double() for one in operands])
    ours, theirs = METHODS[name].on(*operands), by_sd_mecha(name, operands, 1.0)
    assert float((ours - truth).abs().max()) < float((theirs - truth).abs().max()) / 30


# Beside mergekit 0.1.5.


def by_mergekit(name: str, operands: list[Tensor], base: int | None, **parameters: Any) -> Tensor:
    methods = pytest.importorskip("mergekit.merge_methods")
    made = methods.merge_tensors([one.clone() for one in operands], name, parameters=parameters, base_index=base)
    assert isinstance(made, Tensor)
    return made


WEIGHTS = ([1.0, 1.0, 1.0], [0.5, 0.25, 0.25], [1.0, -2.0, 0.5], [0.0, 0.0, 3.0], [1e-3, 5.0, 0.7])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_task_arithmetic_is_mergekits(dtype: torch.dtype, normalize: bool) -> None:
    for weights in (*WEIGHTS, [1.0, -1.0, 0.0]):
        for scaling in (1.0, 0.0, 0.3, -1.0):
            for what, (base, *others) in structured(4, dtype):
                ours = METHODS["task_arithmetic"].on(
                    base, *[one - base for one in others], weights=weights, scaling=scaling, normalize=normalize
                )
                given_there = {"weight": {i + 1: one for i, one in enumerate(weights)}, "lambda": scaling}
                due = by_mergekit("task_arithmetic", [base, *others], 0, normalize=normalize, **given_there)
                gap = gap_of(ours, due, [base, *others, *[one - base for one in others]])
                assert gap <= 16, f"{what}, {weights}, {scaling}: {gap:.1f} units"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weighted_average_is_mergekits(dtype: torch.dtype) -> None:
    for weights in WEIGHTS:
        for what, operands in structured(3, dtype):
            due = by_mergekit("linear", operands, None, weight=weights, normalize=True)
            assert gap_of(METHODS["n_average"].on(*operands, weights=weights), due, operands) <= 16, what


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearswap_is_mergekits(dtype: torch.dtype) -> None:
    for t in (0.0, 1e-4, 0.3, 10.0, -1.0):
        for what, operands in structured(2, dtype):
            if t >= 0.0 or (operands[0] != operands[1]).all():
                due = by_mergekit("nearswap", operands, 0, t=t)
                assert gap_of(METHODS["nearswap"].on(*operands, t=t), due, operands) <= 4, f"{what}, {t}"


def test_nearswap_takes_over_what_is_nearer_than_mergekit_can_tell() -> None:
    a, b = tensor([0.0]), tensor([5e-7])
    assert torch.equal(METHODS["nearswap"].on(a, b, t=5e-7), b)  # as in the original; a step of 2.5e-7 in mergekit
    assert float(by_mergekit("nearswap", [a, b], 0, t=5e-7)) == pytest.approx(2.5e-7)


@pytest.mark.parametrize("scale", [None, 0.0, 0.3, 2.0])
def test_passthrough_is_mergekits(scale: float | None) -> None:
    for _, operands in structured(1, torch.float32):
        values = {} if scale is None else {"scale": scale}
        due = by_mergekit("passthrough", operands, None, **{key: [value] for key, value in values.items()})
        assert torch.equal(METHODS["passthrough"].on(*operands, **values), due)


# Beside slow transcriptions, an element at a time in double precision.


def _lerp(a: float, b: float, t: float) -> float:
    return (1.0 - t) * a + t * b


def _opposite_mask(a: float, b: float, c: float) -> float:
    total = abs(a - b) + abs(a + b - 2.0 * c)
    return 2.0 * abs(a - b) / total if total else 0.0


def _strict_mask(a: float, b: float, c: float) -> float:
    limit = max(abs(a - c), abs(b - c))
    return 2.0 * max(0.0, (c - a) * (b - c) / limit**2) if limit else 0.0


def _trained(a: float, b: float, c: float, alpha: float) -> float:
    """As supermerger writes it, with signs and magnitudes apart."""
    to_c, to_a = abs(b - c), abs(b - a)
    share = to_a / (to_c + to_a) if to_c + to_a else 0.0
    return a + math.copysign(share * to_c, b - c) * alpha * 1.8


def _multiplied(a: float, b: float, c: float, alpha: float, beta: float) -> float:
    return c + math.copysign(abs(a - c) ** (1.0 - alpha) * abs(b - c) ** alpha, _lerp(a - c, b - c, beta))


def _similar(a: float, b: float, c: float, alpha: float, beta: float) -> float:
    limit = max(abs(a), abs(b))
    similarity = beta * (a * b / limit**2 + 1.0) / 2.0 if limit else beta
    return _lerp(a + alpha * (b - c), _lerp(a, b, alpha / 2.0), similarity)


SLOWLY: dict[str, Callable[..., float]] = {
    "add_difference_clamped": lambda a, b, c, alpha: min(max(a + alpha * (b - c), min(a, b)), max(a, b)),
    "triple_sum": lambda a, b, c, alpha, beta: (1.0 - alpha - beta) * a + alpha * b + beta * c,
    "sum_twice": lambda a, b, c, alpha, beta: _lerp(_lerp(a, b, alpha), c, beta),
    "train_difference": _trained,
    "add_opposite": lambda a, b, c, alpha: a + (b - c) * alpha * _opposite_mask(a, b, c),
    "add_strict_opposite": lambda a, b, c, alpha: a + (b - c) * alpha * _strict_mask(a, b, c),
    "multiply_difference": _multiplied,
    "similarity_add_difference": _similar,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SLOWLY)
def test_results_are_those_of_the_formula(name: str, dtype: torch.dtype) -> None:
    with_beta = any(parameter.name == "beta" for parameter in METHODS[name].parameters)
    for alpha, beta in ((0.3, 0.2), (0.0, 0.5), (0.5, 0.5), (1.0, 1.0), (0.7, 0.0)):
        values = {"alpha": alpha, **({"beta": beta} if with_beta else {})}
        for what, operands in structured(3, dtype):
            if operands[0].numel() > 1000:
                continue
            rows = zip(*[one.double().flatten().tolist() for one in operands], strict=True)
            due = torch.tensor([SLOWLY[name](*row, **values) for row in rows], dtype=torch.float64)
            found = METHODS[name].on(*operands, **values)
            gap = gap_of(found, due.reshape(found.shape).to(dtype), operands)
            assert gap <= 64, f"{what}, {values}: {gap:.1f} units"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_select_max_delta_compares_in_units_of_deviations(dtype: torch.dtype) -> None:
    for alpha in (0.0, 0.3, 0.5, 1.0):
        for what, (a, b) in structured(2, dtype):
            if a.numel() > 1 and what not in ZEROS and what != "last zero":
                x, y = a.double() / a.double().std(), b.double() / b.double().std()
                chosen = torch.where((1.0 - alpha) * x.abs() >= alpha * y.abs(), a, b)
                near_a_tie = ((1.0 - alpha) * x.abs() - alpha * y.abs()).abs() < 1e-6
                found = METHODS["select_max_delta"].on(a, b, alpha=alpha)
                assert bool(((found == chosen) | (near_a_tie & ((found == a) | (found == b)))).all()), what


def test_select_max_delta_has_an_answer_where_there_is_no_deviation() -> None:
    select, one, zero = METHODS["select_max_delta"], torch.tensor([3.0, -3.0]), torch.zeros(2)
    constant = torch.tensor([5.0, 5.0])
    assert torch.equal(select.on(one, zero), one) and torch.equal(select.on(zero, one), one)
    assert torch.equal(select.on(zero, zero), zero)
    assert torch.equal(select.on(constant, one, alpha=0.4), constant)
    assert torch.equal(select.on(constant, one, alpha=0.9), one)
    assert torch.equal(select.on(tensor(2.0), tensor(-7.0), alpha=0.6), tensor(-7.0))


# What each promises.

NUMBERS = st.floats(-100.0, 100.0, width=32)
SHARES = st.floats(0.0, 1.0, width=32)
SCALES = st.sampled_from([1e-30, 1e-3, 1.0, 1e5, 1e25])


def numbers(*values: float) -> list[Tensor]:
    return [torch.tensor([value], dtype=torch.float32) for value in values]


@given(NUMBERS, NUMBERS, NUMBERS, SHARES, SHARES)
def test_at_the_numbers_of_shortcuts_operands_come_out(a: float, b: float, c: float, alpha: float, beta: float) -> None:
    x, y, z = numbers(a, b, c)
    for name in SLOWLY:
        method = METHODS[name]
        values = {one.name: value for one, value in zip(method.parameters[3:], (alpha, beta), strict=False)}
        for shortcut in method.declaration.shortcuts:
            found = method.on(x, y, z, **{**values, shortcut.parameter: shortcut.value})
            assert torch.equal(found, {"a": x, "b": y, "c": z}[shortcut.result]), name
    assert torch.equal(METHODS["geometric_sum"].on(x, y, alpha=0.0), x)
    assert torch.equal(METHODS["geometric_sum"].on(x, y, alpha=1.0), y)
    assert torch.equal(METHODS["nearswap"].on(x, y, t=0.0), x)


@given(NUMBERS, NUMBERS, NUMBERS, st.floats(-3.0, 3.0), SCALES)
def test_results_stay_where_they_are_said_to(a: float, b: float, c: float, alpha: float, scale: float) -> None:
    x, y, z = (one * scale for one in numbers(a, b, c))
    clamped = METHODS["add_difference_clamped"].on(x, y, z, alpha=alpha)
    assert torch.minimum(x, y) <= clamped <= torch.maximum(x, y)
    moved = METHODS["nearswap"].on(x, y, t=abs(alpha) * scale)
    assert (moved - x).abs() <= (abs(alpha) * scale + 1e-6 * x.abs().maximum(y.abs()))
    assert torch.minimum(x, y) <= moved <= torch.maximum(x, y)
    for name, most in (("train_difference_mask", 1.8), ("add_opposite_mask", 2.0), ("add_strict_opposite_mask", 2.0)):
        assert 0.0 <= METHODS[name].on(x, y, z) <= most * (1.0 + 1e-6)


@given(NUMBERS, NUMBERS, NUMBERS, SHARES, st.sampled_from([2.0**-60, 2.0**-3, 2.0**40]))
def test_a_scale_of_all_operands_is_one_of_the_result(a: float, b: float, c: float, alpha: float, scale: float) -> None:
    operands = numbers(a, b, c)
    if any(0.0 < abs(one) < 1e-10 for one in (a, b, c)):
        return  # denormal numbers have fewer digits
    larger = [one * scale for one in operands]
    for name, values in ((name, {"alpha": alpha, "beta": 0.25}) for name in (*SLOWLY, "multiply_quotient")):
        known = {one.name for one in METHODS[name].parameters}
        given_values = {key: value for key, value in values.items() if key in known}
        plain, found = (METHODS[name].on(*some, **given_values) for some in (operands, larger))
        assert gap_of(found, plain * scale, larger) <= 16, name
    for name in ("train_difference_mask", "add_opposite_mask", "add_strict_opposite_mask"):
        plain, found = (METHODS[name].on(*some, alpha=alpha) for some in (operands, larger))
        assert torch.equal(plain, found), name


@given(st.lists(st.tuples(NUMBERS, st.floats(0.1, 5.0)), min_size=1, max_size=5), st.floats(0.1, 4.0), st.randoms())
def test_a_weighted_mean_depends_on_proportions_alone(
    pairs: list[tuple[float, float]], factor: float, random: Any
) -> None:
    def mean(some: list[tuple[float, float]]) -> float:
        return float(METHODS["n_average"].on(*numbers(*[m for m, _ in some]), weights=[w for _, w in some]))

    shuffled = [(m, w * factor) for m, w in random.sample(pairs, len(pairs))]
    assert mean(pairs) == pytest.approx(mean(shuffled), rel=1e-4, abs=1e-3)
    assert min(m for m, _ in pairs) - 1e-3 <= mean(pairs) <= max(m for m, _ in pairs) + 1e-3


def test_a_mean_without_weights_has_the_bits_that_it_had() -> None:
    for dtype in DTYPES:
        for count in (1, 2, 3, 7):
            for _, operands in structured(count, dtype):
                due = operands[0].clone()
                for one in operands[1:]:
                    due += one
                assert torch.equal(METHODS["n_average"].on(*operands), due / count)
                assert torch.equal(METHODS["n_average"].on(*operands, weights=[1.0] * count), due / count)


@given(NUMBERS, NUMBERS, SHARES)
def test_a_geometric_mean_is_the_same_from_either_side(a: float, b: float, alpha: float) -> None:
    x, y = numbers(a, b)
    one, other = METHODS["geometric_sum"].on(x, y, alpha=alpha), METHODS["geometric_sum"].on(y, x, alpha=1.0 - alpha)
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)
    assert one.abs() <= torch.maximum(x.abs(), y.abs()) * (1.0 + 1e-6)


@given(st.lists(NUMBERS, min_size=2, max_size=4), st.randoms())
def test_the_order_of_deltas_does_not_matter(deltas: list[float], random: Any) -> None:
    weights = [0.5 + place for place in range(len(deltas))]
    order = random.sample(range(len(deltas)), len(deltas))
    plain, shuffled = (
        METHODS["task_arithmetic"].on(
            *numbers(1.0, *[deltas[place] for place in places]), weights=[weights[place] for place in places]
        )
        for places in (range(len(deltas)), order)
    )
    assert torch.allclose(plain, shuffled, rtol=1e-4, atol=1e-3)


def test_select_max_delta_does_not_depend_on_scale() -> None:
    a, b = dict(structured(2, torch.float32))["shape (200, 300)"]
    from_a = METHODS["select_max_delta"].on(a, b) == a
    for scale in (2.0**-60, 2.0**40):
        found = METHODS["select_max_delta"].on(a * scale, b)
        assert torch.equal(found == a * scale, from_a) and torch.equal(found == b, ~from_a)


@pytest.mark.parametrize("name", ["add_cosine_a", "add_cosine_b"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_cosines_are_of_columns(name: str, alpha: float) -> None:
    a, b = dict(structured(2, torch.float64))["shape (4, 3, 3, 3)"]
    due = torch.empty_like(a)
    whole = float((a * b).sum() / a.norm() / b.norm())
    for place in torch.cartesian_prod(*[torch.arange(3)] * 3):
        column = (slice(None), *place.tolist())
        cosine = float((a[column] * b[column]).sum() / a[column].norm() / b[column].norm())
        similarity = cosine if name == "add_cosine_a" else (cosine + whole) / 2.0
        k = 1.0 - min(max(similarity - alpha, 0.0), 1.0)
        due[column] = (1.0 - k) * a[column] + k * b[column]
    torch.testing.assert_close(METHODS[name].on(a, b, alpha=alpha), due)


@pytest.mark.parametrize("name", ["add_cosine_a", "add_cosine_b"])
def test_equal_models_stay_and_a_mask_says_how_far_each_element_goes(name: str) -> None:
    a, b = dict(structured(2, torch.float32))["shape (200, 300)"]
    torch.testing.assert_close(METHODS[name].on(a, a * 3.0, alpha=0.0), a)
    mask = (torch.arange(a.numel()).reshape(a.shape) % 3 == 0).float()
    assert torch.equal(METHODS[name].on(a, b, alpha=mask)[mask == 1.0], b[mask == 1.0])


# In the engine.

KEYS = {"layers.0.w": (130, 33), "layers.1.w": (7, 3, 3, 3), "layers.1.b": (17,), "head.scale": ()}
BY_KEY = {"layers.0.w": 0.2, "layers.1.w": 0.45, "layers.1.b": 0.7, "head.scale": 0.7}


def by_layer() -> Any:
    return rm.keys({"layers.0.*": 0.2, "layers.1.w": 0.45}) | 0.7


def models(count: int) -> list[dict[str, Tensor]]:
    return [
        {key: torch.randn(shape, generator=torch.Generator().manual_seed(97 * place + len(key)))}
        | {other: torch.randn(size, generator=torch.Generator().manual_seed(place)) for other, size in KEYS.items()}
        for place in range(count)
        for key, shape in [next(iter(KEYS.items()))]
    ]


CALLS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "task_arithmetic": (3, ("scaling",)),
    "triple_sum": (3, ("alpha", "beta")),
    "sum_twice": (3, ("alpha", "beta")),
    "nearswap": (2, ("t",)),
    "select_max_delta": (2, ("alpha",)),
    "passthrough": (1, ("scale",)),
    "multiply_difference": (3, ("alpha", "beta")),
    "similarity_add_difference": (3, ("alpha", "beta")),
    "geometric_sum": (2, ("alpha",)),
    **dict.fromkeys(("add_cosine_a", "add_cosine_b"), (2, ("alpha",))),
    **dict.fromkeys(("add_difference_clamped", "multiply_quotient"), (3, ("alpha",))),
    **dict.fromkeys(("train_difference", "add_opposite", "add_strict_opposite"), (3, ("alpha",))),
}


@pytest.mark.parametrize("executor", ["torch", "native"])
@pytest.mark.parametrize("name", CALLS)
def test_the_engine_gives_what_the_method_gives(name: str, executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if executor == "native" and not native.available():
        pytest.skip("not built")
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    made: list[object] = []
    make = sweeps.Kernels._make
    monkeypatch.setattr(sweeps.Kernels, "_make", lambda self, *given: made.append(make(self, *given)) or made[-1])
    count, arguments = CALLS[name]
    held = models(count)
    spaces = {"delta": "delta", "weight": "weight"}
    kinds = [one.kind for one in METHODS[name].parameters if one.is_tensor and one.kind != "mask"]
    kinds += kinds[-1:] * (count - len(kinds))
    operands = [rm.model(one, space=spaces.get(kind, "weight")) for one, kind in zip(held, kinds, strict=True)]
    found = rm.merge(METHODS[name](*operands, **dict.fromkeys(arguments, by_layer())))
    for key, value in BY_KEY.items():
        due = METHODS[name].on(*[one[key] for one in held], **dict.fromkeys(arguments, value))
        torch.testing.assert_close(found[key], due, rtol=1e-6, atol=1e-6)
    if METHODS[name].declaration.cut == "element":
        assert made and all(made), "every sweep is traced"


@pytest.mark.parametrize("executor", ["torch", "native"])
def test_weights_by_block_are_traced(executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if executor == "native" and not native.available():
        pytest.skip("not built")
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    made: list[object] = []
    make = sweeps.Kernels._make
    monkeypatch.setattr(sweeps.Kernels, "_make", lambda self, *given: made.append(make(self, *given)) or made[-1])
    held = models(3)
    a, b, c = map(rm.model, held)
    mean = rm.merge(rm.n_average(a, b, c, weights=[1.0, by_layer(), 0.25]))
    for normalize in (False, True):
        task = METHODS["task_arithmetic"](a, b - a, c - a, weights=[by_layer(), -0.5], normalize=normalize)
        found = rm.merge(task)
        for key, weight in BY_KEY.items():
            x, y, z = (one[key] for one in held)
            due = METHODS["task_arithmetic"].on(x, y - x, z - x, weights=[weight, -0.5], normalize=normalize)
            torch.testing.assert_close(found[key], due, rtol=1e-5, atol=1e-5)
    for key, weight in BY_KEY.items():
        due = METHODS["n_average"].on(*[one[key] for one in held], weights=[1.0, weight, 0.25])
        torch.testing.assert_close(mean[key], due, rtol=1e-6, atol=1e-6)
    assert made and all(made)


@pytest.mark.parametrize("executor", ["torch", "native"])
def test_deltas_whose_weights_cancel_in_a_block_are_not_divided(executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if executor == "native" and not native.available():
        pytest.skip("not built")
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    a, b, c = held = models(3)
    weights = [rm.keys({"layers.0.*": 0.5}) | 1.0, -0.5]
    task = METHODS["task_arithmetic"](
        *map(rm.model, (a,)), rm.model(b, space="delta"), rm.model(c, space="delta"), weights=weights, normalize=True
    )
    found = rm.merge(task)
    for key in KEYS:
        x, y, z = (one[key] for one in held)
        due = x + 0.5 * (y - z) if key.startswith("layers.0") else x + (y - 0.5 * z) / 0.5
        torch.testing.assert_close(found[key], due, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["train_difference", "add_opposite", "add_strict_opposite"])
def test_a_mask_is_a_param_that_multiplies_a_difference(name: str) -> None:
    a, b, c = map(rm.model, models(3))
    mask = METHODS[f"{name}_mask"](a, b, c, alpha=0.7)
    at_once, by_steps = rm.merge(METHODS[name](a, b, c, alpha=0.7)), rm.merge(a + mask * (b - c))
    by_argument = rm.merge(rm.add_difference(a, b - c, alpha=mask))
    for key in KEYS:
        torch.testing.assert_close(by_steps[key], at_once[key])
        torch.testing.assert_close(by_argument[key], at_once[key])
    with pytest.raises(RefusedError, match="a result is a weight"):
        rm.merge(mask)


# What is refused, in its words.


def test_mistakes_are_told() -> None:
    a, b, c = map(rm.model, models(3))
    task, average = METHODS["task_arithmetic"], METHODS["n_average"]
    with pytest.raises(RecipeError, match="task_arithmetic needs at least one model"):
        task(a)
    with pytest.raises(RefusedError, match="task_arithmetic needs a delta for 'deltas', but got a weight"):
        rm.plan(task(a, b))
    with pytest.raises(RecipeError, match="'weights' has a number for each model, but got 3 numbers for 2 models"):
        task(a, b - a, c - a, weights=[1.0, 2.0, 3.0])
    with pytest.raises(RefusedError, match="divides by the sum of the weights, but 1, -1 add up to 0"):
        rm.plan(average(a, b, weights=[1.0, -1.0]))
    with pytest.raises(RecipeError, match=r"divides by the sum of the weights, but 0\.1, 0\.2, -0\.3 add up to 0"):
        average.on(*numbers(1.0, 2.0, 3.0), weights=[0.1, 0.2, -0.3])
    with pytest.raises(RefusedError, match="n_average needs one space, but got a weight and a delta"):
        rm.plan(average(a, b - c))
    with pytest.raises(RecipeError, match="nearswap needs 't'"):
        METHODS["nearswap"](a, b)
    with pytest.raises(RecipeError, match="sum_twice needs 'beta'"):
        METHODS["sum_twice"](a, b, c, alpha=0.5)
    with pytest.raises(RefusedError, match="select_max_delta needs a delta for 'a', but got a weight"):
        rm.plan(METHODS["select_max_delta"](a, b))
    with pytest.raises(RefusedError, match="add_cosine_a needs a weight for 'b', but got a delta"):
        rm.plan(METHODS["add_cosine_a"](a, b - c))


def test_a_scaled_weight_is_a_weight_only_where_that_is_said() -> None:
    (held,) = models(1)
    a = rm.model(held)
    with pytest.raises(RefusedError, match=r"0\.5 of a weight"):
        rm.plan(0.5 * a)
    damped = rm.merge(METHODS["passthrough"](a, 0.5))
    assert all(torch.equal(damped[key], held[key] * 0.5) for key in KEYS)
