"""Whether what a merge changes is lost between the numbers that its results can hold: told for those of eight bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from remelt.check.program import Item, Load
from remelt.methods.quantising import EIGHT_BITS, changed_and_lost, half_steps
from remelt.planning.passes import Sweep

if TYPE_CHECKING:
    from remelt.engine.tiles import TaskRun


def look_at_steps(run: TaskRun, sweep: Sweep, begin: int, end: int, size: int) -> None:
    """Tell of a stretch's first tile, for results of eight bits, what is lost of the changes to the first model."""
    narrow = [position for position in sweep.outputs if run.task.outputs[position][2].dtype in EIGHT_BITS]
    if not narrow or run.task.copy or begin >= end:
        return
    base = next((one for one in run.program.instructions if isinstance(one, Load)), None)
    if base is None:
        return
    tile = max(run.planned.cost.tile // run.planned.grain(sweep), 1) * run.planned.grain(sweep)
    last = min(begin + tile, end)
    values = run.evaluate(sweep, begin, last, size)
    there = run.raw(base, begin, last).to(device=run.place.device, dtype=run.place.compute)
    for position in narrow:
        register = run.program.outputs[position].register
        if isinstance(run.program.instructions[register], Item):  # scaled: it tells by itself
            continue
        found = values[register]
        _, key, info = run.task.outputs[position]
        if found.numel() == there.numel():
            run.place.report.add_lost(key, *changed_and_lost(found, there, half_steps(found, info.dtype)))
    values.clear()
    run.place.scratch.reset()
