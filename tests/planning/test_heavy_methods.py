"""A plan tells which step sets the peak, and which method takes minutes, with what would not."""

from __future__ import annotations

import torch

import remelt as rm
from remelt.methods import METHODS
from remelt.planning.explain import explain
from remelt.recipe.method import Integer, Same, merge_method


@merge_method(
    cut="tensor",
    work=lambda shapes, values: 22.0 * shapes[0][0] * shapes[0][1] ** 2 if len(shapes[0]) == 2 else 0.0,
    faster="another one",
)
def decomposed(a: Same, *, rank: Integer = 1) -> Same:
    return a


SPECIMENS = True


def test_what_takes_minutes_is_warned_of() -> None:
    shapes = {"small": (7, 7), "large": (9000, 3000), "larger": (9000, 3500), "vector": (100,)}
    a = rm.model({key: torch.empty(shape, dtype=torch.float16) for key, shape in shapes.items()})
    plan = rm.plan(METHODS["decomposed"](a), threads=2, memory="8GiB")
    (warning,) = plan.warnings
    operations = 22.0 * (7 * 7**2 + 9000 * 3000**2 + 9000 * 3500**2)
    assert plan.seconds >= operations / 1e10 / 2
    said = "decomposed takes about 3 min 30 s for 3 tensors, the largest larger [9000, 3500]; faster: another one"
    assert warning == said
    assert f"warning: {warning}" in explain(plan)


def test_what_is_quick_is_not_warned_of() -> None:
    plan = rm.plan(METHODS["decomposed"](rm.model({"w": torch.zeros(64, 64)})))
    assert not plan.warnings


def test_the_step_that_sets_the_peak_is_named() -> None:
    a, b = (rm.model({"w": torch.zeros(300, 200), "v": torch.zeros(7)}) for _ in range(2))
    plan = rm.plan(rm.weighted_sum(METHODS["decomposed"](a), b))
    assert plan.peak_step == "w [300, 200] by decomposed, weighted_sum"
    assert "allowed, set by w [300, 200] by decomposed, weighted_sum" in explain(plan)
