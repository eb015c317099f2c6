"""The tasks of a difference's weights, each turned into that of its factors, or of what is to be known of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from remelt.adapters.extraction import (
    ALPHA,
    MEASURES,
    METHODS,
    lokr_shapes,
    lora_shapes,
    matrix_sides,
    squared,
    squares_count,
)
from remelt.adapters.written import WEIGHT, Written
from remelt.check.keys import KeyReport, Task
from remelt.check.program import Apply, Constant, Item, Output, Program, Register
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import OptionError
from remelt.recipe.adapter import AdapterForm
from remelt.recipe.method import Method

_TABLES = frozenset(
    {"token_embedding", "position_embedding", "positional_embedding", "embed_tokens", "embed_positions", "wte", "wpe"}
    | {"word_embeddings", "position_embeddings", "token_type_embeddings", "shared", "relative_attention_bias"}
)
"""Modules that are tables of vectors: loaders of adapters do not look for them."""
_LOKR = {"w1": "lokr_w1", "w2": "lokr_w2", "alpha": "alpha"}


@dataclass
class AdapterOutput:
    """How a difference becomes an adapter; ``ranks`` are those of keys where they were found before.

    ``dtype`` is that of its factors, by default of the difference. Once tasks are made, ``modules`` has the rank of
    each module by its name, ``keys`` the weight that each is of, ``left`` the keys of the difference that have no place
    in it, and ``measured`` those that have, where that is what the tasks are for.
    """

    form: AdapterForm
    written: Written
    ranks: Mapping[str, int] | None = None
    dtype: DType | None = None
    deltas: frozenset[int] = frozenset()
    """Inputs that are differences: a copy of one is one, and not what is never merged."""
    modules: dict[str, int] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    measured: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.form.kind == "lokr" and self.written.names != "kohya":
            raise OptionError(f"{self.written.names} has no names for a LoKr", hint="names='kohya'")

    def tasks(self, report: KeyReport) -> KeyReport:
        """The report with a task for the factors of every weight; what has no factors is left out, and noted."""
        made = _Tasks()
        tasks = []
        for task in report.tasks:
            one = self._task(task, made)
            tasks += [] if one is None else [one]
        return replace(report, tasks=tasks)

    def _task(self, task: Task, made: _Tasks) -> Task | None:
        if len(task.outputs) > 1:
            raise OptionError(
                f"{task.key} and other weights are computed together, which cannot be factorised one by one",
                hint="write the difference to a checkpoint before, and make the adapter of that",
            )
        ((root, key, info),) = task.outputs
        name = self.written.module(key)
        if not self._has_factors(key, info) or name is None or self._is_kept(task):
            self.left.append(key)
            return None
        if self.ranks is not None and key not in self.ranks:
            return None
        dtype = self.dtype or info.dtype
        self.keys[name] = key
        if self.form.kind == "lokr":
            self.modules[name] = 0
            shapes = {**lokr_shapes(info.shape, self.form.factor), "alpha": ()}
            names = {part: f"{name}.{_LOKR[part]}" for part in shapes}
            return made.of(task, METHODS["lokr"], {"factor": self.form.factor}, names, shapes, root, dtype)
        known = self.form.rank if self.ranks is None else self.ranks.get(key, self.form.rank)
        rank = min(known or 1, *matrix_sides(info.shape))
        self.modules[name] = rank
        parts = self.written.parts()
        shapes = {part: shape for part, shape in lora_shapes(info.shape, rank).items() if part in parts}
        names = {part: f"{name}.{parts[part]}" for part in shapes}
        values = {"rank": rank, "alpha": ALPHA if "alpha" in parts else rank}
        return made.of(task, METHODS["lora"], values, names, shapes, root, dtype)

    def _is_kept(self, task: Task) -> bool:
        """Whether a task only takes a model's tensor over, which is no difference."""
        return task.copy and not any(load.input in self.deltas for load in task.program.loads)

    def _has_factors(self, key: str, info: TensorInfo) -> bool:
        """Whether a weight is that of a linear map or a convolution, as loaders know."""
        module = key.removesuffix(WEIGHT).rpartition(".")[2]
        return len(info.shape) > 1 and min(matrix_sides(info.shape)) > 1 and module not in _TABLES

    def measuring(self, report: KeyReport, *, energy: bool) -> KeyReport:
        """The report with a task for the norm of every weight, or for its singular values with ``energy``."""
        made = _Tasks()
        tasks = []
        for task in report.tasks:
            ((root, key, info),) = task.outputs if len(task.outputs) == 1 else [(0, "", TensorInfo(DType.F32, ()))]
            if self._is_kept(task) or not info.dtype.is_float or not key:
                continue
            has_factors = self.written.module(key) is not None and self._has_factors(key, info)
            self.measured |= {key} if has_factors else set()
            if has_factors and energy:
                kind, factor = self.form.kind, self.form.factor
                shapes = {"squares": (squares_count(kind, info.shape, factor),)}
                values = {"factor": factor} if kind == "lokr" else {}
                tasks.append(made.of(task, MEASURES[kind], values, {"squares": key}, shapes, root, DType.F64))
            else:
                tasks.append(made.of(task, squared, {}, {"square": key}, {"square": ()}, root, DType.F64))
        return replace(report, tasks=tasks)


class _Tasks:
    """Tasks of factors; those whose programs are alike share one."""

    def __init__(self) -> None:
        self._programs: dict[object, Program] = {}

    def of(
        self,
        task: Task,
        method: Method[..., Any],
        values: Mapping[str, int],
        names: Mapping[str, str],
        shapes: Mapping[str, tuple[int, ...]],
        root: int,
        dtype: DType,
    ) -> Task:
        """The task that gives the parts of what a task gives, by their names and shapes."""
        identity = (id(task.program), method.name, tuple(values.items()), tuple(shapes.items()), dtype)
        program = self._programs.get(identity)
        if program is None:
            program = self._programs[identity] = _program(task.program, method, values, shapes, dtype)
        outputs = tuple((root, names[part], TensorInfo(dtype, shape)) for part, shape in shapes.items())
        return Task(task.key, program, task.numbers, task.shape, outputs)


def _program(
    program: Program,
    method: Method[..., Any],
    values: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: DType,
) -> Program:
    register = program.outputs[0].register
    call = len(program.instructions)
    plain = tuple((name, Constant(value)) for name, value in values.items())
    applied = Apply(method, (Register(register),), plain, (register,), None)
    items = tuple(Item(call, part) for part in shapes)
    outputs = tuple(Output(0, part, call + 1 + place, dtype, None) for place, part in enumerate(shapes))
    return Program((*program.instructions, applied, *items), outputs, (*program.shapes, None, *shapes.values()))
