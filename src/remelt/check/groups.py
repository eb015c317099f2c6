"""Methods that need several keys: which keys are computed together, and which tensors that takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from remelt.archs.facts import Layout
from remelt.check.bound import BoundGraph
from remelt.check.inputs import Input, keys_of
from remelt.check.kinds import Kind, Place, Shape
from remelt.check.specialise import Specialiser
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import MethodError, RecipeError
from remelt.recipe.method import Group


class KeyGroups:
    """All keys of some inputs, in the first input's order, in batches that must be computed together."""

    def __init__(
        self,
        specialiser: Specialiser,
        graph: BoundGraph,
        steps: Sequence[int],
        inputs: Mapping[int, Input],
        layout: Layout,
    ) -> None:
        self.specialiser, self.graph, self.steps, self.inputs, self.layout = specialiser, graph, steps, inputs, layout
        self.keys = keys_of(inputs.values())
        self.by_step: dict[int, dict[str, Group]] = {}
        self.joined: dict[str, str] = {}
        for index in steps:
            method = graph.steps[index].method
            if method is not None and method.declaration.keys is not None:
                self._declare(index)

    def _declare(self, index: int) -> None:
        step = self.graph.steps[index]
        method = step.method
        assert method is not None
        assert method.declaration.keys is not None
        layout = self._layout_of(step.operands[0][1])
        groups, needs = method.declaration.keys(layout), method.declaration.needs
        if needs and not groups:
            raise RecipeError(
                f"{method.name} would change nothing: the model has no {needs}", hint="leave it out", span=step.span
            )
        by_key: dict[str, Group] = {}
        for group in groups:
            unknown = [key for key in (*group.inputs, *group.outputs) if key not in layout]
            doubled = [key for key in group.outputs if key in by_key]
            if unknown or doubled:
                what = f"names {unknown[0]!r}, which the model lacks" if unknown else f"computes {doubled[0]!r} twice"
                raise MethodError(f"{method.name} declares a group of keys that {what}")
            by_key.update(dict.fromkeys(group.outputs, group))
            for key in group.outputs:
                self._join(group.outputs[0], key)
        self.by_step[index] = by_key

    def _layout_of(self, step: int) -> dict[str, TensorInfo]:
        """What one step's value looks like: its keys with their shapes, types as the first input stores them."""
        found: dict[str, TensorInfo] = {}
        for key in self.keys:
            needed = self.needed([key], below=step)
            present = {(index, k) for index, given in self.inputs.items() for k in needed if given.info(k) is not None}
            shapes: dict[Place, Shape] = {
                place: self.inputs[place[0]].checkpoint.tensors[str(place[1])].shape for place in present
            }
            groups = self.by_step or {-1: {}}
            program, _ = self.specialiser.specialise((key,), set(present), self._kind, shapes, groups, only=step)
            if program is not None:
                output = program.outputs[0]
                source = output.dtype
                dtype = source if isinstance(source, DType) else self.inputs[source].checkpoint.tensors[key].dtype
                found[key] = TensorInfo(dtype, program.shapes[output.register] or ())
        return found

    def _kind(self, key: str | None) -> Kind:
        """Only presence and shapes are asked for here, so any numbers will do that make no operand idle."""
        return Kind(self.layout.facts(str(key)), [0.5] * len(self.specialiser.slots), False)

    def needed(self, keys: Sequence[str], below: int | None = None) -> list[str]:
        """Every key that may be read for some results: their own, and those of the groups that they stand in."""
        found = dict.fromkeys(keys)
        for index in reversed(self.steps):
            if below is not None and index > below:
                continue
            by_key = self.by_step.get(index)
            if by_key:
                for key in list(found):
                    if key in by_key:
                        found.update(dict.fromkeys((*by_key[key].outputs, *by_key[key].inputs)))
        return list(found)

    def spans(self, key: str) -> bool:
        """Whether any step computes the key from several."""
        return any(key in by_key for by_key in self.by_step.values())

    def batches(self) -> Iterator[list[str]]:
        """The keys, those that are computed together in one batch, at the place of the first."""
        if not self.joined:
            yield from ([key] for key in self.keys)
            return
        members: dict[str, list[str]] = {}
        for key in self.keys:
            members.setdefault(self._root(key), []).append(key)
        yield from members.values()

    def _root(self, key: str) -> str:
        while self.joined.get(key, key) != key:
            key = self.joined[key]
        return key

    def _join(self, left: str, right: str) -> None:
        a, b = self._root(left), self._root(right)
        self.joined[a] = a
        if a != b:
            self.joined[b] = a
