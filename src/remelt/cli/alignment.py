"""What is shown while models are matched, and what is told of it after."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import click

from remelt.core.units import format_seconds
from remelt.recipe.permuting import MARGINS, OTHERS

if TYPE_CHECKING:
    from remelt.alignment.matching import Visit
    from remelt.api.prepare import Prepared
    from remelt.api.rebasing import Aligned

_QUIET = 5.0
"""Seconds between two lines of progress in a log."""


class Watch(Protocol):
    """What shows the visit of a group, and of which model it is where there are several."""

    def __call__(self, visit: Visit, model: str = "") -> None:
        """Show it."""


@contextmanager
def matching(*, quiet: bool) -> Iterator[Watch | None]:
    """The group, the objective and the time left: a bar on a terminal, lines in a log, nothing where asked."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar() as watch:
            yield watch
    else:
        yield _Lines().watch


def match_first(prepared: Prepared, *, quiet: bool) -> None:
    """Match what recipes align, before they are merged."""
    alignments = [one for group in prepared.groups for one in group.alignments]
    if alignments:
        with matching(quiet=quiet) as watch:
            for one in alignments:
                one.find(watch)


def shown(visit: Visit, model: str = "") -> str:
    """One visit in words: where matching is, and how near the models lie; or what margins are computed of."""
    whose = f"{model}: " if model else ""
    if visit.start == MARGINS:
        return f"{whose}margins of the reference: {visit.group.name}"
    return f"{whose}{visit.start}, sweep {visit.sweep + 1}: {visit.group.name}, objective {visit.agreement:.6g}"


class _Sweep:
    """How long the groups that are left in a sweep will take, by those before them."""

    def __init__(self) -> None:
        self.place: tuple[str, str, int] = ("", "", -1)
        self.done, self.begun = 0, time.monotonic()

    def left(self, visit: Visit, model: str = "") -> float:
        """The seconds that are left of this sweep."""
        place = model, visit.start, visit.sweep
        if self.place != place:
            self.place, self.done = place, 0
            self.begun = time.monotonic() - visit.seconds
        self.done += 1
        return (time.monotonic() - self.begun) / self.done * visit.pending


@contextmanager
def _bar() -> Iterator[Watch]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("matching"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    sweep = _Sweep()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def watch(visit: Visit, model: str = "") -> None:
            left = format_seconds(sweep.left(visit, model))
            total = sweep.done + visit.pending
            bar.update(task, completed=sweep.done, total=total, description=f"{shown(visit, model)}, {left} left")

        yield watch


class _Lines:
    """Progress for a log: at most a line every few seconds."""

    def __init__(self) -> None:
        self.told, self.sweep = time.monotonic(), _Sweep()

    def watch(self, visit: Visit, model: str = "") -> None:
        """Tell, where it is time."""
        left, now = self.sweep.left(visit, model), time.monotonic()
        if now - self.told >= _QUIET:
            self.told = now
            click.echo(f"{shown(visit, model)}, {format_seconds(left)} left of the sweep", err=True)


def told(found: Aligned) -> Iterator[str]:
    """What matching found, a line for each fact."""
    match, count = found.match, len(found.match.permutations)
    before, after = match.distances
    yield f"{found.model} against {found.reference}: {found.work}"
    if match.moved:
        how = f"{match.sweeps} sweeps from {match.start}"
        how = f"{match.sweeps} passes over all models" if match.start == OTHERS else how
        yield f"{len(match.moved)} of {count} groups moved, in {how}"
    if match.rotations:
        yield f"heads of {len(match.rotations)} groups were rotated"
    if match.moved or match.rotations:
        yield f"objective {match.before:.6g} -> {match.after:.6g}, distance {before:.6g} -> {after:.6g}"
    else:
        yield f"no group by itself can be bettered: nothing moves, at objective {match.before:.6g}"
    if match.certified:
        yield f"{len(match.certified)} of {count} groups were proven by margins alone"
    if found.path is not None:
        yield f"wrote {found.path}"


def record(found: Aligned) -> dict[str, Any]:
    """The same for programs, with every group."""
    match = found.match
    return {
        "reference": found.reference,
        "model": found.model,
        "groups": len(match.permutations),
        "moved": list(match.moved),
        "proven": list(match.certified),
        "start": match.start,
        "sweeps": match.sweeps,
        "objective": [match.before, match.after],
        "distance": list(match.distances),
        "rotated": list(match.rotations),
        "permutations": None if found.path is None else str(found.path),
        "reports": {name: dict(one) for name, one in found.saved.reports.items()},
    }
