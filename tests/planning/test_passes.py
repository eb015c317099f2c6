"""Passes: an element recipe streams once, reductions and whole tensors take what they need, and memory is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import remelt as rm
from remelt.api import merging
from remelt.planning.passes import Sweep, WholeCall
from remelt.planning.plan import Plan

SIZE = 50_000


def planned(recipe: Any, **options: Any) -> Plan:
    with merging.prepare_merges([merging.load_recipe(recipe)], [None], rm.MergeOptions(**options)) as prepared:
        return prepared.groups[0].plan


def model(seed: int) -> Any:
    return rm.model({"w": torch.full((SIZE,), float(seed))}, name=f"m{seed}")


def shape_of(plan: Plan) -> list[str]:
    return ["sweep" if isinstance(one, Sweep) else "call" for one in plan.tasks[0].passes.passes]


A, B, C = (model(seed) for seed in (1, 2, 3))


def test_an_element_recipe_of_any_size_is_one_sweep() -> None:
    recipe = A
    for _ in range(50):
        recipe = rm.weighted_sum(recipe, B + (C - A), alpha=0.1)
    plan = planned(recipe)
    assert shape_of(plan) == ["sweep"]
    assert plan.bytes_read == 3 * SIZE * 4


def test_registers_are_let_go_so_that_a_chain_needs_few() -> None:
    recipe = A
    for _ in range(1000):
        recipe = rm.weighted_sum(recipe, B, alpha=0.1)
    (sweep,) = planned(recipe).tasks[0].passes.passes
    assert isinstance(sweep, Sweep)
    assert sweep.live <= 4


def test_reductions_of_one_level_share_a_pass() -> None:
    plan = planned(rm.weighted_sum(rm.slerp(A, B), rm.slerp(A, C)))
    assert shape_of(plan) == ["sweep", "sweep"]
    assert plan.bytes_read == 2 * 3 * SIZE * 4
    nested = planned(rm.slerp(rm.slerp(A, B), C))
    assert shape_of(nested) == ["sweep", "sweep", "sweep"]


def test_a_chain_of_reductions_costs_a_pass_each_and_keeps_one_tensor() -> None:
    works, memory = [], []
    for length in (10, 20, 40):
        recipe = A
        for _ in range(length):
            recipe = rm.slerp(recipe, B, alpha=0.1)
        (task,) = planned(recipe).tasks
        assert len(task.passes.passes) == length + 1
        works.append(sum(len(one.order) for one in task.passes.passes if isinstance(one, Sweep)))
        memory.append(task.cost.memory)
    assert works[2] - works[1] == 2 * (works[1] - works[0])
    assert memory[0] == memory[1] == memory[2]


def test_the_budget_bounds_the_peak_and_tiles_shrink_to_keep_scratch_small() -> None:
    many = rm.n_average(*(model(seed) for seed in range(200)))
    plan = planned(many)
    assert plan.tasks[0].cost.tile < 2**17
    assert plan.peak_memory <= plan.memory_budget
    assert planned(rm.weighted_sum(A, B), threads=1).peak_memory < 4 * 2**20


def test_programs_are_shared_by_keys_of_one_kind() -> None:
    x, y = ({f"k{i}.w": torch.zeros(i + 1) for i in range(100)} for _ in range(2))
    plan = planned(rm.weighted_sum(rm.model(x), rm.model(y, name="other")))
    assert len({id(task.task.program) for task in plan.tasks}) == 1


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_weight_of_zero_or_one_reads_one_model(alpha: float) -> None:
    plan = planned(rm.weighted_sum(A, B + (C - A), alpha=alpha) if alpha == 0 else rm.weighted_sum(B, A, alpha=alpha))
    assert plan.bytes_read == SIZE * 4
    assert plan.tasks[0].task.copy


def test_a_whole_call_holds_its_operands_and_lets_them_go(tmp_path: Any) -> None:
    from remelt.methods import METHODS

    plugin = tmp_path / "whole_for_passes.py"
    plugin.write_text(
        "from __future__ import annotations\n"
        "from remelt.recipe.method import Same, merge_method\n\n\n"
        "@merge_method(cut='tensor', workspace=1.0)\n"
        "def whole_for_passes(a: Same, b: Same) -> Same:\n"
        "    return a.flip(0) + b\n"
    )
    METHODS.add_file(plugin)
    plan = planned(rm.weighted_sum(METHODS["whole_for_passes"](A, B), C))
    assert shape_of(plan) == ["sweep", "call", "sweep"]
    call = plan.tasks[0].passes.passes[1]
    assert isinstance(call, WholeCall)
    assert len(call.drops) == 2
    whole = SIZE * 4
    assert plan.tasks[0].cost.memory >= 4 * whole
