"""Arcee fusion beside mergekit's, and its formula in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
SHAPES = ((), (0,), (0, 4), (4, 0), (1,), (131,), (16, 33), (200, 300), (4, 3, 3, 3))


class TestConformance(MethodConformance):
    @pytest.fixture
    def method(self) -> str:
        return "arcee_fusion"


def pairs(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
        yield f"shape {shape}", a, b
        yield f"fine-tune of shape {shape}", a * 0.05, a * 0.05 + b * 1e-3
    yield "equal", a, a.clone()
    yield "zero", torch.zeros_like(a), torch.zeros_like(a)
    yield "opposite", a, -a
    yield "large", a * 50.0, b * 50.0


def importance(base: Tensor, tuned: Tensor) -> Tensor:
    base, tuned = base.double(), tuned.double()
    rows = max(len(base) if base.dim() > 1 else 1, 1)
    p, q = (one.reshape(rows, -1).softmax(-1) + 1e-8 for one in (tuned, base))
    divergence = (p * (p / q).log()).sum(-1)
    return (tuned - base).abs() * divergence.reshape((rows, *[1] * (base.dim() - 1)) if base.dim() > 1 else ())


def by_formula(base: Tensor, tuned: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and where the importance is not so near to the threshold that round-off decides."""
    if not base.numel():
        return base, torch.ones_like(base, dtype=torch.bool)
    found = importance(base, tuned)
    ordered = found.flatten().sort().values
    low, half, high = (float(ordered[int(share * (len(ordered) - 1))]) for share in (0.25, 0.5, 0.75))
    threshold = half + 1.5 * (high - low)
    clear = (found - threshold).abs() > 1e-5 * float(found.max())
    return torch.where(found >= threshold, tuned, base), clear


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_its_formula(dtype: torch.dtype) -> None:
    for what, base, tuned in pairs(dtype):
        found, (due, clear) = METHODS["arcee_fusion"].on(base, tuned), by_formula(base, tuned)
        assert torch.equal(found[clear], due[clear]), what
        assert ((found == base) | (found == tuned)).all(), what
        assert int((~clear).sum()) <= max(8, base.numel() // 100) or what in ("equal", "zero"), what


INTENDED = {
    torch.float32: "mergekit finds the divergence in float32, where that of close rows is mostly round-off",
}
"""Where remelt and mergekit are meant to differ, and why."""


def test_it_agrees_with_mergekit_in_double_precision() -> None:
    merge = pytest.importorskip("mergekit.merge_methods.api").merge_tensors
    for what, base, tuned in pairs(torch.float64):
        if not base.numel():
            continue
        if base.dim() > 2:  # a row is a line of a kernel there
            base, tuned = base.flatten(1), tuned.flatten(1)
        found = METHODS["arcee_fusion"].on(base, tuned)
        due, (_, clear) = merge([base, tuned], "arcee_fusion", base_index=0), by_formula(base, tuned)
        torch.testing.assert_close(found[clear], due[clear], rtol=1e-12, atol=1e-12, msg=what)


def test_in_single_precision_it_is_nearer_to_the_truth_than_mergekit() -> None:
    merge = pytest.importorskip("mergekit.merge_methods.api").merge_tensors
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(200, 300, generator=generator) * 0.05
    tuned = base + torch.randn(200, 300, generator=generator) * 1e-3
    due = by_formula(base, tuned)[0]
    ours, theirs = METHODS["arcee_fusion"].on(base, tuned), merge([base, tuned], "arcee_fusion", base_index=0)
    assert int((ours != due).sum()) <= 2
    assert int(((theirs - due).abs() > 1e-6).sum()) > 20
    torch.testing.assert_close(theirs, due, rtol=0.0, atol=1e-2)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 9), width=st.integers(1, 9), shift=st.floats(-3.0, 3.0))
def test_a_shift_of_both_changes_no_choice(seed: int, rows: int, width: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    base, tuned = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2))
    if not by_formula(base, tuned)[1].all():
        return
    taken = METHODS["arcee_fusion"].on(base, tuned) == tuned
    moved = METHODS["arcee_fusion"].on(base + shift, tuned + shift) == tuned + shift
    assert torch.equal(moved, taken) or width == 1


def test_what_is_not_finite_harms_nothing_else() -> None:
    base = torch.zeros(3, 4)
    tuned = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    tuned[0, 0] = float("nan")
    found = METHODS["arcee_fusion"].on(base, tuned)
    assert found.isfinite().sum() >= 11


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_merges_give_what_the_method_gives(executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    shapes = {"x.w": (301, 217), "x.k": (4, 3, 3, 3), "x.b": (17,), "x.s": ()}
    generator = torch.Generator().manual_seed(0)
    base, tuned = ({key: torch.randn(shape, generator=generator) for key, shape in shapes.items()} for _ in range(2))
    found = rm.merge(METHODS["arcee_fusion"](rm.model(base), rm.model(tuned)), threads=2)
    for key in shapes:
        assert torch.equal(found[key], METHODS["arcee_fusion"].on(base[key], tuned[key])), key


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: METHODS["arcee_fusion"]("a"), "arcee_fusion needs 'tuned'"),
        (lambda: METHODS["arcee_fusion"]("a", "b", alpha=0.5), "arcee_fusion has no argument 'alpha'"),
    ],
)
def test_wrong_arguments_are_told(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        wrong()
