"""Recipes that are run together: each is checked by itself, then what they compute of one key becomes one task.

So a tensor that several recipes need is read once, and no recipe changes what another one makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from remelt.check.keys import KeyReport, Task
from remelt.check.program import Apply, Argument, Bundle, Instruction, Listed, Load, Output, Program, Register, Slot


def join_reports(reports: Sequence[KeyReport]) -> KeyReport:
    """The reports of several results as one, in which their place among the results is the root of each output."""
    joined = KeyReport()
    by_key: dict[str, list[Task]] = {}
    for place, report in enumerate(reports):
        for task in report.tasks:
            outputs = tuple((place, key, info) for _, key, info in task.outputs)
            by_key.setdefault(task.key, []).append(replace(task, outputs=outputs))
        for reason, keys in report.lacking.items():
            joined.lacking[reason] = list(dict.fromkeys([*joined.lacking.get(reason, ()), *keys]))
        joined.mismatched += [found for found in report.mismatched if found not in joined.mismatched]
        for argument, keys in report.unspoken.items():
            joined.unspoken[argument] = list(dict.fromkeys([*joined.unspoken.get(argument, ()), *keys]))
    for label in {label for report in reports for label in report.idle}:
        joined.idle[label] = min(report.idle.get(label, 0) for report in reports if label in report.labels)
    joined.labels = set().union(*(report.labels for report in reports))
    joiner = _Joiner()
    for tasks in by_key.values():
        joined.tasks += joiner.join(tasks)
    computed = {
        (task.key, one.step) for task in joined.tasks for one in task.program.instructions if isinstance(one, Apply)
    }
    for report in reports:
        joined.counted.update({place: task for place, task in report.counted.items() if place not in computed})
    return joined


class _Joiner:
    """Joins programs, each combination once."""

    def __init__(self) -> None:
        self.programs: dict[tuple[tuple[int, int], ...], Program] = {}
        self.kept: list[Program] = []

    def join(self, tasks: Sequence[Task]) -> list[Task]:
        """The tasks of one key, with those in one that are alike enough."""
        alike: dict[tuple[object, ...], list[Task]] = {}
        for number, task in enumerate(tasks):
            identity = (task.shape, task.copy) if _is_open(task.program) else (number,)
            alike.setdefault(identity, []).append(task)
        return [self.one(found) for found in alike.values()]

    def one(self, tasks: Sequence[Task]) -> Task:
        if len(tasks) == 1:
            return tasks[0]
        identity = tuple((id(task.program), len(task.numbers)) for task in tasks)
        if identity not in self.programs:
            self.kept += [task.program for task in tasks]
            self.programs[identity] = _joined([(task.program, len(task.numbers)) for task in tasks])
        first = tasks[0]
        numbers = tuple(number for task in tasks for number in task.numbers)
        outputs = tuple(output for task in tasks for output in task.outputs)
        return Task(first.key, self.programs[identity], numbers, first.shape, outputs, first.copy)


def _is_open(program: Program) -> bool:
    """Whether a program is about one key, which it leaves open."""
    return all(
        instruction.key is None and (isinstance(instruction, Load) or _is_plain(instruction))
        for instruction in program.instructions
    )


def _is_plain(instruction: Instruction) -> bool:
    if not isinstance(instruction, Apply):
        return False
    given = [*instruction.args, *(argument for _, argument in instruction.kwargs)]
    return all(not isinstance(argument, Bundle) for argument in given)


def _joined(programs: Sequence[tuple[Program, int]]) -> Program:
    """The instructions of all, what is read once, and the outputs of all in order."""
    instructions: list[Instruction] = []
    shapes: list[tuple[int, ...] | None] = []
    outputs: list[Output] = []
    loaded: dict[Load, int] = {}
    numbers = 0
    for program, count in programs:
        moved: list[int] = []
        for instruction, shape in zip(program.instructions, program.shapes, strict=True):
            if isinstance(instruction, Load) and instruction in loaded:
                moved.append(loaded[instruction])
                continue
            if isinstance(instruction, Load):
                loaded[instruction] = len(instructions)
            moved.append(len(instructions))
            shapes.append(shape)
            instructions.append(_moved(instruction, moved, numbers) if isinstance(instruction, Apply) else instruction)
        outputs += [replace(output, register=moved[output.register]) for output in program.outputs]
        numbers += count
    return Program(tuple(instructions), tuple(outputs), tuple(shapes))


def _moved(instruction: Apply, moved: Sequence[int], numbers: int) -> Apply:
    return replace(
        instruction,
        args=tuple(_argument(argument, moved, numbers) for argument in instruction.args),
        kwargs=tuple((name, _argument(argument, moved, numbers)) for name, argument in instruction.kwargs),
        operands=tuple(moved[operand] for operand in instruction.operands),
    )


def _argument(argument: Argument, moved: Sequence[int], numbers: int) -> Argument:
    if isinstance(argument, Register):
        return Register(moved[argument.index])
    if isinstance(argument, Slot):
        return Slot(argument.index + numbers)
    if isinstance(argument, Listed):
        return Listed(tuple(_argument(item, moved, numbers) for item in argument.items))  # type: ignore[misc]
    return argument
