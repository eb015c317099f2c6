"""What happens to each key: which inputs have it, what is computed, what is copied, and what stands in the way.

Keys that the inputs treat alike share one program: a recipe of thousands of calls over thousands of keys is walked once
for each kind of key, not once for each key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from remelt.archs.facts import KeyFacts, Layout
from remelt.check.bound import BoundGraph, Step
from remelt.check.groups import KeyGroups
from remelt.check.inputs import Input
from remelt.check.kinds import Kind, NumberSlot, Place, Shape, Stranded
from remelt.check.program import Program
from remelt.check.specialise import Specialiser
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import RecipeError

Missing = Literal["error", "first", "skip"]


@dataclass(frozen=True)
class Task:
    """One or several tensors of the results, computed together.

    ``key`` is the key that the program leaves open; ``numbers`` fill its slots; ``outputs`` pairs each output of the
    program with its key and what it will be. ``copy`` marks tensors that are taken over as they are.
    """

    key: str
    program: Program
    numbers: tuple[float, ...]
    shape: tuple[int, ...]
    outputs: tuple[tuple[int, str, TensorInfo], ...]
    copy: bool = False


@dataclass
class KeyReport:
    """What checking the keys found: the tasks, and every reason why some cannot be."""

    tasks: list[Task] = field(default_factory=list)
    lacking: dict[tuple[str, str, str], list[str]] = field(default_factory=dict)
    """Keys that are missing, by what lacks them, what has them, and how that was settled: error, first, skip,
    or delta (a difference, which can take nothing from a model)."""
    mismatched: list[tuple[str, str, str]] = field(default_factory=list)
    """Shapes or types that do not fit: the input, the message, the key."""
    unspoken: dict[str, list[str]] = field(default_factory=dict)
    """Keys that no block weight speaks for, by argument: they take its default."""
    idle: dict[str, int] = field(default_factory=dict)
    """Tensors of an input that are not read because a number makes them idle: they are not checked either."""
    labels: set[str] = field(default_factory=set)
    """The inputs that were checked."""
    counted: dict[tuple[str, int], Task] = field(default_factory=dict)
    """By key and step, what has no part in a result there, but counts for sums across all tensors of the step."""


def _looks_across(step: Step) -> bool:
    """Whether a step sums up across all tensors."""
    return step.method is not None and any(one.across for one in step.method.declaration.rounds(dict(step.values)))


@dataclass(frozen=True)
class KeyOptions:
    """How to settle what inputs lack, and what the results' element type is."""

    missing: Missing = "error"
    dtype: DType | None = None
    excused: frozenset[str] = frozenset()
    """Keys that some input lacks as its layout has no place for them: the first model's are taken."""


@dataclass(frozen=True)
class _Infos:
    """How inputs describe a key, those that have it, and whether any has floating-point numbers there."""

    found: Mapping[int, TensorInfo]
    floats: bool


@dataclass(frozen=True)
class _Decision:
    """What is done about keys that are alike: a task for each with these outputs, or why there is none."""

    program: Program | None
    stranded: Sequence[Stranded]
    shape: Shape
    outputs: tuple[tuple[int, TensorInfo], ...] = ()
    idle: tuple[str, ...] = ()
    copy: bool = False
    counted: tuple[tuple[int, Program], ...] = ()


_PLAIN, _COPIED = Kind(None, (), copied=False), Kind(None, (), copied=True)
"""Kinds of keys in a recipe that does not ask what they are called."""


def check_keys(
    graph: BoundGraph,
    roots: Sequence[int],
    inputs: Mapping[int, Input],
    layout: Layout,
    options: KeyOptions,
    masses: Sequence[float | None],
) -> KeyReport:
    """The tasks of some results over the inputs that they use, and every problem of their keys."""
    return _KeyCheck(graph, roots, inputs, layout, options, masses).run()


class _KeyCheck:
    def __init__(
        self,
        graph: BoundGraph,
        roots: Sequence[int],
        inputs: Mapping[int, Input],
        layout: Layout,
        options: KeyOptions,
        masses: Sequence[float | None],
    ) -> None:
        self.graph, self.roots, self.inputs, self.layout, self.options = graph, roots, inputs, layout, options
        self.steps = sorted({step for root in roots for step in graph.reachable(root)})
        self.specialiser = Specialiser(graph, self.steps, roots, inputs, masses)
        self.groups = KeyGroups(self.specialiser, graph, self.steps, inputs, layout)
        self.report = KeyReport()
        self.masses = masses
        self.tensors = {id(given.checkpoint.tensors): given.checkpoint.tensors for given in inputs.values()}
        self.infos: dict[tuple[int, ...], _Infos] = {}
        self.programs: dict[object, tuple[Program | None, list[Stranded]]] = {}
        self.decisions: dict[object, _Decision] = {}
        self.report.labels = {given.label for given in inputs.values()}
        self.used_by_root = [graph.models_of(root) for root in roots]
        self.across = [index for index in self.steps if _looks_across(graph.steps[index])]

    def run(self) -> KeyReport:
        for key in () if self.groups.by_step else self.groups.keys:
            self._single(key)
        for keys in self.groups.batches() if self.groups.by_step else ():
            if len(keys) == 1 and not self.groups.spans(keys[0]):
                self._single(keys[0])
            else:
                self._joint(keys)
        return self.report

    def _single(self, key: str) -> None:
        """A key that is computed by itself: it is decided once for all keys that are described and treated alike."""
        described = tuple([id(tensors.get(key)) for tensors in self.tensors.values()])
        infos = self.infos.get(described)
        if infos is None:
            infos = self.infos[described] = self._infos(key)
        never = key in self.layout.copied
        kind = _COPIED if never or not infos.floats else _PLAIN
        identity: tuple[object, ...] = (described, never)
        if self.specialiser.asks_facts:
            facts = self.layout.facts(key)
            kind = Kind(facts, () if kind.copied else tuple(self._numbers(facts)), kind.copied)
            identity = (*identity, self.specialiser.selected(facts), self._shortcuts(kind))
        decision = self.decisions.get(identity)
        if decision is None:
            decision = self.decisions[identity] = self._decide(key, infos.found, kind)
        if decision.program is not None and decision.outputs:
            for label in decision.idle:
                self.report.idle[label] = self.report.idle.get(label, 0) + 1
            outputs = tuple([(root, key, info) for root, info in decision.outputs])
            self.report.tasks.append(
                Task(key, decision.program, tuple(kind.numbers), decision.shape, outputs, decision.copy)
            )
        for step, program in decision.counted:
            self.report.counted[key, step] = Task(key, program, tuple(kind.numbers), decision.shape, ())
        self._strand(decision.stranded, key)

    def _infos(self, key: str) -> _Infos:
        found = {index: info for index, given in self.inputs.items() if (info := given.info(key)) is not None}
        return _Infos(found, any(info.dtype.is_float for info in found.values()))

    def _shortcuts(self, kind: Kind) -> tuple[float | None, ...]:
        return () if kind.copied else self.specialiser.shortcuts(kind.numbers)

    def _decide(self, key: str, found: Mapping[int, TensorInfo], kind: Kind) -> _Decision:
        """What is done about a key and all that are like it."""
        program, stranded = self._program(found, kind)
        shape = next(iter(found.values())).shape
        counted = tuple(self._counted(program, found, kind))
        if program is None:
            return _Decision(None, stranded, shape, counted=counted)
        outputs = tuple([(root, info) for root, _, info in self._outputs(program, key)])
        idle = tuple(self._idle(program, found, kind.copied))
        return _Decision(program, stranded, shape, outputs, idle, _is_copy(program), counted)

    def _counted(
        self, program: Program | None, found: Mapping[int, TensorInfo], kind: Kind
    ) -> Iterator[tuple[int, Program]]:
        """The steps that look at all tensors, where this one has no part in a result: it counts all the same."""
        present: set[Place] = {(index, None) for index in found}
        shapes: dict[Place, Shape] = {(index, None): info.shape for index, info in found.items()}
        integers: dict[Place, str] = {
            (index, None): str(info.dtype) for index, info in found.items() if not info.dtype.is_float
        }
        for step in self.across:
            if program is None or not program.applies(step):
                alone, _ = self.specialiser.specialise(
                    (None,), present, lambda _: kind, shapes, integers={} if kind.copied else integers, only=step
                )
                if alone is not None and alone.applies(step):
                    yield step, alone

    def _program(self, found: Mapping[int, TensorInfo], kind: Kind) -> tuple[Program | None, list[Stranded]]:
        facts, copied = kind.facts, kind.copied
        first = next(iter(found.values())).shape
        integral = () if copied else tuple((i, str(info.dtype)) for i, info in found.items() if not info.dtype.is_float)
        alike = all(info.shape == first for info in found.values()) and not self.specialiser.asks_shapes
        shapes: dict[Place, Shape] | None = (
            None if alike and not integral else {(index, None): info.shape for index, info in found.items()}
        )
        signature = (
            tuple(found),
            tuple([(info.dtype, info.written) for info in found.values()]),
            copied,
            self.specialiser.selected(facts),
            self._shortcuts(kind),
            None if shapes is None else tuple(shapes.values()),
            integral,
        )
        if signature not in self.programs:
            present: set[Place] = {(index, None) for index in found}
            integers: dict[Place, str] = {(index, None): dtype for index, dtype in integral}
            self.programs[signature] = self.specialiser.specialise(
                (None,), present, lambda _: kind, shapes, integers=integers
            )
        return self.programs[signature]

    def _joint(self, keys: Sequence[str]) -> None:
        """Keys that a method of cut ``model`` computes together have a program of their own."""
        needed = self.groups.needed(keys)
        found = {
            (index, key): info
            for index, given in self.inputs.items()
            for key in needed
            if (info := given.info(key)) is not None
        }
        kinds = {key: self._kind(key) for key in needed}
        shapes: dict[Place, Shape] = {place: info.shape for place, info in found.items()}
        program, stranded = self.specialiser.specialise(
            tuple(keys), set(shapes), lambda key: kinds[str(key)], shapes, self.groups.by_step
        )
        here = {index: info for (index, key), info in found.items() if key == keys[0]}
        outputs = [] if program is None else list(self._outputs(program, keys[0]))
        if program is not None and outputs:
            for label in self._idle(program, here, copied=False):
                self.report.idle[label] = self.report.idle.get(label, 0) + 1
            shape = next(iter(here.values())).shape
            self.report.tasks.append(Task(keys[0], program, (), shape, tuple(outputs), _is_copy(program)))
        self._strand(stranded, keys[0])

    def _kind(self, key: str) -> Kind:
        facts = self.layout.facts(key)
        here = (info for given in self.inputs.values() if (info := given.info(key)) is not None)
        copied = facts.copied or not any(info.dtype.is_float for info in here)
        return Kind(facts, () if copied else tuple(self._numbers(facts)), copied)

    def _strand(self, stranded: Sequence[Stranded], key: str) -> None:
        for trouble in stranded:
            subject = trouble.key or key
            if trouble.shapes is not None:
                label, message = trouble.shapes
                self.report.mismatched.append((label, message.replace("{key}", subject), subject))
            elif any(self.inputs[index].info(subject) is not None for index in self.used_by_root[trouble.root]):
                self._settle(trouble, subject)

    def _outputs(self, program: Program, key: str) -> Iterator[tuple[int, str, TensorInfo]]:
        for output in program.outputs:
            out_key = output.key or key
            source = output.dtype
            stored = source if isinstance(source, DType) else self._stored(source, output.source_key or key)
            dtype = self._cast(stored, out_key)
            shape = program.shapes[output.register]
            yield output.root, out_key, TensorInfo(dtype, self._shape(key) if shape is None else shape)

    def _cast(self, stored: DType, key: str) -> DType:
        """The element type of a result: as asked for, but what is only copied keeps its own."""
        if self.options.dtype is None or not stored.is_float or key in self.layout.copied:
            return stored
        return self.options.dtype

    def _stored(self, index: int, key: str) -> DType:
        info = self.inputs[index].info(key)
        assert info is not None
        return info.written or info.dtype

    def _shape(self, key: str) -> tuple[int, ...]:
        return next(info.shape for given in self.inputs.values() if (info := given.info(key)) is not None)

    def _settle(self, trouble: Stranded, key: str) -> None:
        """A key that some input of a result lacks: an error, the first model's tensor, or no tensor."""
        having = [index for index in self.used_by_root[trouble.root] if self.inputs[index].info(key) is not None]
        weights = [index for index in having if self.inputs[index].model.space == "weight"]
        settled: str = "first" if key in self.options.excused else self.options.missing
        if settled == "first" and (not weights or self.masses[self.roots[trouble.root]] != 1.0):
            settled = "delta"
        first = self.inputs[(weights or having)[0]]
        place = (", ".join(trouble.lacking), first.label, settled)
        self.report.lacking.setdefault(place, [])
        if key not in self.report.lacking[place]:
            self.report.lacking[place].append(key)
        if settled == "first":
            info = first.info(key)
            assert info is not None
            dtype = self._cast(info.written or info.dtype, key)
            program = self.specialiser.copy_of(weights[0], trouble.root)
            outputs = ((trouble.root, key, TensorInfo(dtype, info.shape)),)
            self.report.tasks.append(Task(key, program, (), info.shape, outputs, copy=True))

    def _numbers(self, facts: KeyFacts) -> Iterator[float]:
        for slot in self.specialiser.slots:
            number = slot.weights.resolve(facts, self.layout)
            if number is None:
                if not isinstance(slot.default, (int, float)) or isinstance(slot.default, bool):
                    raise RecipeError(
                        f"{_argument_name(slot)} has no number for {facts.key}, and no default",
                        hint="let a plain number follow the block weights: ... | 0.5",
                        span=slot.step.span,
                    )
                self.report.unspoken.setdefault(f"{_argument_name(slot)} = {slot.default!r}", []).append(facts.key)
                number = float(slot.default)
            assert isinstance(number, float)
            yield number

    def _idle(self, program: Program, found: Mapping[int, TensorInfo], copied: bool) -> Iterator[str]:
        """The inputs that have a key and are not read for it."""
        read = {load.input for load in program.loads}
        for index in () if copied else found:
            if index not in read:
                yield self.inputs[index].label


def _argument_name(slot: NumberSlot) -> str:
    step = slot.step
    assert step.method is not None
    line = f" (line {step.span.line})" if step.span is not None else ""
    place = "" if slot.place is None else f"[{slot.place}]"
    return f"{step.method.name}{line}: {slot.name}{place}"


def _is_copy(program: Program) -> bool:
    """Whether every result is a loaded tensor as it is: such bytes are taken over without arithmetic."""
    loads: list[Any] = program.loads
    return len(loads) == len(program.instructions)
