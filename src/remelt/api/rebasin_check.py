"""Whether the axis groups of archs hold: by a small model that runs, and by the tensors of a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remelt.alignment.checking import CheckReport, check_numerically, check_statically
from remelt.alignment.instances import INSTANCES
from remelt.api.alignment import arch_of, groups_of
from remelt.api.dialect_views import in_original
from remelt.archs.axes.find import axis_groups
from remelt.archs.detect import detect
from remelt.check.inputs import Input
from remelt.core.nearest import nearest_hint
from remelt.errors import OptionError
from remelt.formats.checkpoint import open_checkpoint
from remelt.recipe.node import Model


@dataclass(frozen=True)
class ArchCheck:
    """What a small model of one arch shows of its groups."""

    arch: str
    report: CheckReport

    def record(self) -> dict[str, Any]:
        """The same for programs."""
        worst, error = self.report.worst
        told = {"arch": self.arch, "passed": self.report.passed, "groups": len(self.report.alone)}
        return {**told, "worst": [worst, error], "together": self.report.together, "broken": list(self.report.broken)}


def check_archs(named: str | None = None, *, seed: int = 0) -> list[ArchCheck]:
    """Permute small models at random, and compare what they compute: of one arch, of a file's, or of all.

    Of a file, the groups must fit its tensors, too. Raises `OptionError` for an arch of which there is no small model,
    `MissingExtraError` without the extra ``rebasin-check``, `RefusedError` where the groups do not fit.
    """
    if named is None:
        return [_checked(arch, seed) for arch in INSTANCES]
    arch = named
    if named not in INSTANCES and Path(named).exists():
        arch = _arch_of(Path(named))
    if arch not in INSTANCES:
        hint = nearest_hint(arch, INSTANCES) or f"there are some of {', '.join(INSTANCES)}"
        raise OptionError(f"there is no small model of arch {arch!r}", hint=hint)
    return [_checked(arch, seed)]


def _checked(arch: str, seed: int) -> ArchCheck:
    one = INSTANCES[arch](seed=seed)
    groups = axis_groups(one.arch, one.shapes, one.heads)
    check_statically(arch, groups, one.shapes)
    return ArchCheck(arch, check_numerically(groups, one.tensors, one.function, seed))


def _arch_of(path: Path) -> str:
    """The arch of a file, of which the groups fit its tensors."""
    with open_checkpoint(path) as checkpoint:
        given = Input(path.name, Model(path.name), checkpoint, detect(checkpoint.tensors))
        groups_of(given, in_original(given))
        return arch_of(given)
