"""The table: a line for each row, with the figures of both executors, what they are held against, and the targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from measure import Measured, Result
from rows import EXECUTORS, GAIN, MEMORY, OVER, PER_KEY, RATIOS, SECONDS, Row

MIB = 2**20
HEADS = ("case", "native", "torch", "against", "figure, native", "torch", "target", "met", "memory, MiB")
NONE = "-"
WORDS = 60
"""Characters of the reason why there is no figure; all of it is in the raw figures."""

UNITS = {MEMORY: " MiB", SECONDS: " s", PER_KEY: " us"}


@dataclass(frozen=True)
class Figure:
    """What a row comes to by one executor, and whether it reaches its target."""

    value: float
    met: bool | None


@dataclass(frozen=True)
class Report:
    """All that one run of the benchmark found."""

    measured: Sequence[Measured]
    machine: Mapping[str, str]
    limits: Mapping[str, str]
    keys: int
    """How many keys the row about keys has more than what it is held against."""
    judged: bool
    """Whether the files are large enough for the targets to mean something."""
    repeat: int

    def plain(self) -> str:
        """The tables for a terminal."""
        return self._printed(plain)

    def markdown(self) -> str:
        """The tables for the documentation."""
        return self._printed(markdown)

    def raw(self) -> dict[str, Any]:
        """All figures of all runs, for JSON."""
        return {
            "machine": dict(self.machine),
            "limits": dict(self.limits),
            "repeat": self.repeat,
            "rows": [self._raw(measured) for measured in self.measured],
        }

    def _printed(self, table: Callable[[Sequence[str], Sequence[Sequence[str]]], str]) -> str:
        lines = [cells(measured, self.keys, judged=self.judged) for measured in self.measured]
        parts = [table(HEADS, lines), table(("machine", ""), list(self.machine.items()))]
        if self.limits:
            parts.append(table(("limit", ""), list(self.limits.items())))
        if not self.judged:
            parts.append("Small files: these figures say that all of it works, not how fast it is.\n")
        return "\n".join(parts)

    def _raw(self, measured: Measured) -> dict[str, Any]:
        figures = {executor: figure(measured, executor, self.keys) for executor in EXECUTORS}
        return {
            "name": measured.row.name,
            "title": measured.row.title,
            "targets": measured.row.targets,
            "cached": measured.cached,
            "figures": {executor: found and asdict(found) for executor, found in figures.items()},
            "jobs": [{**asdict(job), **result.raw()} for job, result in measured.results.items()],
        }


def figure(measured: Measured, executor: str, keys: int) -> Figure | None:
    """The figure of a row by an executor; None where a run is missing. ``keys`` is what the row of keys divides by."""
    row = measured.row
    value = value_of(measured, executor, keys)
    if value is None:
        return None
    if row.targets is None:
        return Figure(value, None)
    target = row.targets[EXECUTORS.index(executor)]
    return Figure(value, value >= target if row.figure == GAIN else value <= target)


def value_of(measured: Measured, executor: str, keys: int) -> float | None:
    """The number that is held against a row's target."""
    row, ours, against = measured.row, measured.ours(executor), measured.against(executor)
    if row.figure == MEMORY:
        peak = ours.most("peak")
        return None if peak is None else peak / MIB
    mine = time_of(ours, whole=row.whole)
    theirs = None if against is None else time_of(against, whole=row.whole)
    if mine is None or (against is not None and theirs is None):
        return None
    if theirs is None:
        return mine
    if row.figure == PER_KEY:
        return 1e6 * (mine - theirs) / keys
    return mine / theirs if row.figure == OVER else theirs / mine


def time_of(result: Result, *, whole: bool) -> float | None:
    """The median of the merge's seconds, or of the whole process's."""
    return result.median("process" if whole else "seconds")


def cells(measured: Measured, keys: int, *, judged: bool) -> list[str]:
    """A row as text."""
    row = measured.row
    figures = [figure(measured, executor, keys) for executor in EXECUTORS]
    peaks = [measured.ours(executor).most("peak") for executor in EXECUTORS]
    return [
        row.title + ("" if measured.cached else " (larger than the page cache)"),
        *(shown(measured.ours(executor), whole=row.whole) for executor in EXECUTORS),
        against(measured),
        *(number(found, row.figure) for found in figures),
        targets(row),
        " / ".join(verdict(found) for found in figures) if judged and row.targets is not None else NONE,
        " / ".join(NONE if peak is None else f"{peak / MIB:.0f}" for peak in peaks),
    ]


def targets(row: Row) -> str:
    """A row's targets as text."""
    if row.targets is None:
        return NONE
    sign = ">=" if row.figure == GAIN else "<="
    return f"{sign} {' / '.join(f'{target:g}' for target in row.targets)}{UNITS.get(row.figure, '')}"


def shown(result: Result, *, whole: bool) -> str:
    """The median of a job's time, or the word why there is none."""
    seconds = time_of(result, whole=whole)
    if seconds is None:
        return result.word[:WORDS] or NONE
    return f"{1000 * seconds:.1f} ms" if seconds < 0.1 else f"{seconds:.2f} s"


def against(measured: Measured) -> str:
    """What a row is held against, with its time; both executors' where they differ."""
    job = measured.row.against
    if job is None:
        return NONE
    results = {id(found): found for executor in EXECUTORS if (found := measured.against(executor)) is not None}
    words = " / ".join(dict.fromkeys(shown(found, whole=measured.row.whole) for found in results.values()))
    if job.is_ours:
        return words
    if all(found.word for found in results.values()):
        return words
    name = "cp" if job.tool == "copy" else job.tool
    settings = [found.setting for found in results.values() if found.setting and found.setting != "default"]
    peaks = [peak / MIB for found in results.values() if (peak := found.most("peak")) is not None]
    held = f", {peaks[0]:.0f} MiB" if peaks else ""
    return f"{name}{f' ({settings[0]})' if settings else ''} {words}{held}"


def number(found: Figure | None, kind: str) -> str:
    """A figure as text."""
    if found is None:
        return NONE
    if kind in RATIOS:
        return f"{found.value:.2f}" if found.value < 10 else f"{found.value:.1f}"
    return f"{found.value:.{0 if kind in (MEMORY, PER_KEY) else 2}f}{UNITS.get(kind, ' s')}"


def verdict(found: Figure | None) -> str:
    """Whether a target is met."""
    return NONE if found is None or found.met is None else "yes" if found.met else "no"


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows) + "\n"


def plain(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in columns for a terminal."""
    widths = [max(len(row[place]) for row in (heads, *lines)) for place in range(len(heads))]
    rows = [heads, ["-" * width for width in widths], *lines]
    return (
        "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )
        + "\n"
    )
