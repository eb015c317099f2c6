"""Results that are adapters: the tasks of a difference's weights, each turned into that of its factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
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
from remelt.adapters.settings import CONFIG
from remelt.adapters.written import WEIGHT, Written
from remelt.api.adapter_views import own_keys
from remelt.api.outputs import SUFFIX, refuse_output
from remelt.check.inputs import Input
from remelt.check.keys import KeyReport, Task
from remelt.check.program import Apply, Constant, Item, Output, Program, Register
from remelt.check.report import fold_keys
from remelt.check.spaces import name_of
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import OptionError, RecipeError
from remelt.formats.layout import OutputLayout, file_layout, folder_layout
from remelt.planning.plan import PlannedOutput
from remelt.recipe.adapter import AdapterForm
from remelt.recipe.method import Method

_PEFT_WEIGHTS = "adapter_model"
_TABLES = frozenset(
    {"token_embedding", "position_embedding", "positional_embedding", "embed_tokens", "embed_positions", "wte", "wpe"}
    | {"word_embeddings", "position_embeddings", "token_type_embeddings", "shared", "relative_attention_bias"}
)
"""Modules that are tables of vectors: loaders of adapters do not look for them."""
_LOKR = {"w1": "lokr_w1", "w2": "lokr_w2", "alpha": "alpha"}


@dataclass
class AdapterOutput:
    """How a difference becomes an adapter; ``ranks`` are those of keys where they were found before.

    Once tasks are made, ``modules`` has the rank of each module by its name, ``keys`` the weight that each is of, and
    ``left`` the keys of the difference that have no place in it.
    """

    form: AdapterForm
    written: Written
    ranks: Mapping[str, int] | None = None
    modules: dict[str, int] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.form.kind == "lokr" and self.written.names != "kohya":
            raise OptionError(f"{self.written.names} has no names for a LoKr", hint="names='kohya'")

    def tasks(self, report: KeyReport) -> KeyReport:
        """The report with a task for the factors of every weight; what has no factors is left out, and noted."""
        if self.form.kind == "lora" and self.form.rank is None and self.ranks is None:
            raise OptionError(
                "a rank by energy is found when the difference is computed, not when it is planned",
                hint="remelt extract-lora does both",
            )
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
        if not self._has_factors(key, info) or name is None or task.copy:
            self.left.append(key)
            return None
        if self.ranks is not None and key not in self.ranks:
            return None
        dtype = info.dtype
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

    def _has_factors(self, key: str, info: TensorInfo) -> bool:
        """Whether a weight is that of a linear map or a convolution, as loaders know."""
        module = key.removesuffix(WEIGHT).rpartition(".")[2]
        return len(info.shape) > 1 and min(matrix_sides(info.shape)) > 1 and module not in _TABLES

    def measuring(self, report: KeyReport) -> KeyReport:
        """The report with a task for the singular values of every weight that has factors, and the norm of others."""
        made = _Tasks()
        tasks = []
        for task in report.tasks:
            ((root, key, info),) = task.outputs if len(task.outputs) == 1 else [(0, "", TensorInfo(DType.F32, ()))]
            if task.copy or not info.dtype.is_float or not key:
                continue
            if self.written.module(key) is not None and self._has_factors(key, info):
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


class Adapted:
    """A result that is asked to be an adapter, on its way to a plan."""

    def __init__(self, form: AdapterForm, ranks: Mapping[str, int] | None, measures: bool) -> None:
        self.form, self.ranks, self.measures = form, ranks, measures
        self.output: AdapterOutput | None = None

    def refuse_others(self, count: int, mass: float | None) -> None:
        """Raise `RecipeError` where it is one of several results that are merged together, or no difference."""
        if count > 1:
            raise RecipeError(
                "recipes that share models are merged together, but one of them is to be an adapter",
                hint="merge it by itself",
            )
        if name_of(mass) != "delta":
            hint = "to_lora(tuned - base, rank=32)"
            raise RecipeError("an adapter is made of a difference, but this is a model", hint=hint)

    def settle(self, first: Input) -> str | None:
        """Choose the names by the arch of the first model; the dialect of which they are made."""
        written = Written.of(self.form.names, first.detection.arch)
        if first.adapter is not None and first.detection.arch is None:
            written = Written.like(own_keys(first))
        self.output = AdapterOutput(self.form, written, self.ranks)
        return self.made.written.dialect

    @property
    def made(self) -> AdapterOutput:
        """The output, once its names are chosen."""
        assert self.output is not None
        return self.output

    def tasks(self, report: KeyReport) -> KeyReport:
        """The tasks of the difference, turned into those of its factors, or of what is to be known of them."""
        return self.made.measuring(report) if self.measures else self.made.tasks(report)

    def path(self, asked: Path, *, overwrite: bool) -> Path:
        """Where it goes: a file; PEFT's adapters are folders, unless a file is asked for."""
        if asked.suffix == SUFFIX or self.made.written.names == "peft":
            return asked
        found = asked.with_name(asked.name + SUFFIX)
        refuse_output(found, overwrite)
        return found

    def lay_out(self, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], path: Path) -> OutputLayout:
        """One file, or for PEFT a folder."""
        told = {**metadata, **self.made.written.metadata(self.made.modules)}
        if path.suffix == SUFFIX:
            return OutputLayout(files=(file_layout(tensors, told, path.name),), indexes=(), is_folder=False)
        return folder_layout(tensors, told, max_shard_size=None, weight_names={"": _PEFT_WEIGHTS})

    def companions(self, output: PlannedOutput) -> Iterator[tuple[bytes, str]]:
        """PEFT's configuration, in a folder."""
        config = self.made.written.config(self.made.modules)
        if config is not None and output.layout is not None and output.layout.is_folder:
            yield config, CONFIG

    def warnings(self) -> Iterator[str]:
        """What the adapter does not hold."""
        left = self.made.left
        if left and self.ranks is None and not self.measures:
            told = "where they differ, they are left out"
            yield f"{len(left)} tensors are no linear maps or convolutions: {told}: {fold_keys(left)}"
