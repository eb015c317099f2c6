"""The models that a recipe names, opened: headers, detected archs, and whether they can meet in one recipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from remelt.archs.arch import Arch, find_arch
from remelt.archs.detect import Detection
from remelt.check.bound import BoundGraph
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import Problem
from remelt.formats.checkpoint import Checkpoint
from remelt.recipe.node import AdapterUse, Model


@dataclass(frozen=True)
class Input:
    """A model of the recipe with its opened checkpoint; ``label`` names it in messages."""

    label: str
    model: Model
    checkpoint: Checkpoint
    detection: Detection
    adapter: AdapterUse | None = None
    """Set where it is an adapter: it is zero where it has no key."""

    @property
    def note(self) -> str | None:
        """In which ways the model is special among its arch, in words."""
        return "; ".join(variant.note for variant in self.detection.variants) or None

    def has(self, dtype: DType) -> bool:
        """Whether any tensor is of that element type."""
        return any(info.dtype is dtype for info in self.checkpoint.tensors.values())

    def info(self, key: str) -> TensorInfo | None:
        """The tensor's type and shape, or None where the file lacks it."""
        return self.checkpoint.tensors.get(key)


def keys_of(inputs: Iterable[Input]) -> list[str]:
    """Every key that any of the inputs has, in the order of the first that has it."""
    found: dict[str, None] = {}
    for tensors in {id(given.checkpoint.tensors): given.checkpoint.tensors for given in inputs}.values():
        found.update(dict.fromkeys(tensors))
    return list(found)


def ambiguity_of(given: Input) -> Problem | None:
    """The problem of a file that fits several archs, of which none is stated."""
    if given.detection.problem is None or given.model.arch is not None:
        return None
    stated = " or ".join(f'arch="{name}"' for name in given.detection.near)
    return Problem(given.label, given.detection.problem, f"state which it is: model(..., {stated}), or convert --arch")


def arch_of(inputs: Sequence[Input], problems: list[Problem]) -> Arch | None:
    """The one arch that the inputs share; a problem with the evidence where they do not.

    An input that matches no named arch may meet any other: its keys decide. A model that states its arch is believed
    over what was detected, unless another arch was detected.
    """
    found: dict[str, tuple[Arch, Input, str]] = {}
    for given in inputs:
        detected = given.detection.arch
        if (ambiguity := ambiguity_of(given)) is not None:
            problems.append(ambiguity)
        if given.model.arch is not None:
            stated = find_arch(given.model.arch)
            if detected is not None and detected.name != stated.name:
                problems.append(
                    Problem(
                        given.label,
                        f"is stated to be {stated.name}, but looks like {given.detection.evidence}",
                        span=given.model.span,
                    )
                )
            found.setdefault(stated.name, (stated, given, f"{stated.name}: stated in the recipe"))
        elif detected is not None:
            found.setdefault(detected.name, (detected, given, given.detection.evidence))
    if len(found) > 1:
        for name, (_, given, evidence) in found.items():
            known = (near.note for other, _, _ in found.values() for near in other.near if near.name == name)
            hint = next(known, "a recipe merges models of one arch; the inputs mix them")
            problems.append(Problem(given.label, f"is {evidence}", hint))
    return next((arch for arch, _, _ in found.values()), None)


def input_groups(graph: BoundGraph) -> list[tuple[list[int], list[int]]]:
    """Recipes that share an input, together: pairs of root positions and input indices, in order."""
    groups: list[tuple[list[int], set[int]]] = []
    for position, root in enumerate(graph.roots):
        if root < 0:
            continue
        used = set(graph.models_of(root))
        joined = [group for group in groups if group[1] & used]
        merged = (sorted([position, *(p for group in joined for p in group[0])]), used.union(*(g[1] for g in joined)))
        groups = [group for group in groups if not group[1] & used] + [merged]
    return [(positions, sorted(used)) for positions, used in sorted(groups, key=lambda group: group[0])]
