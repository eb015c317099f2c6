"""Runs the jobs of a row in turns, so that what disturbs the machine disturbs all of them, and keeps the figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from files import total_bytes
from machine import memory_bytes
from peers import MERGEKIT_SETTINGS
from processes import Processes, Run
from rows import EXECUTORS, Job, Row

CHOICE = "REMELT_EXECUTOR"
"""The variable by which an executor is chosen; a complaint that names it says that there is no such executor."""

CACHED = 0.8
"""The share of the memory that files may fill and still be expected in the page cache."""


TIMES = ("seconds", "work", "process", "process_work")


@dataclass
class Result:
    """What the runs of a job gave, or why there are none."""

    runs: list[Run] = field(default_factory=list)
    word: str = ""
    """Why there is no figure: what is absent, or how a run failed."""
    setting: str = ""
    """Of mergekit: the quickest of those that were tried."""

    def median(self, name: str) -> float | None:
        """The median of a figure; None where there is none, or where a run failed."""
        found = self._all(name)
        return statistics.median(found) if found else None

    def most(self, name: str) -> float | None:
        """The largest of a figure, likewise."""
        return max(self._all(name), default=None)

    def _all(self, name: str) -> list[float]:
        return [] if self.word else [run[name] for run in self.runs if run.get(name) is not None]

    def raw(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {name: value for name, value in vars(self).items() if value}


@dataclass
class Measured:
    """A row with the results of its jobs."""

    row: Row
    results: dict[Job, Result]
    cached: bool = True
    """Whether all that was read and written fits into the page cache."""

    def ours(self, executor: str) -> Result:
        """What ours gave by an executor."""
        return self.results[self.row.ours.by(executor)]

    def against(self, executor: str) -> Result | None:
        """What ours is held against."""
        return None if self.row.against is None else self.results[self.row.against.by(executor)]


class Bench:
    """Measures rows."""

    def __init__(
        self, processes: Processes, *, repeat: int, peer_repeat: int, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self.processes = processes
        self.repeat, self.peer_repeat = repeat, peer_repeat
        self.say = say
        self.absences: dict[str, str] = {}
        """Executors that are not there, and why."""
        self._shared: dict[Job, Result] = {}
        """What jobs gave that are run for all rows at once."""

    def look(self) -> None:
        """See which executors there are, by a tiny merge."""
        for executor in EXECUTORS:
            tried = self.processes.run(Job("remelt", "weighted_sum", "few", 2, executor=executor))
            if "error" in tried:
                self.absences[executor] = "not there" if CHOICE in tried["error"] else tried["error"]

    def measure(self, row: Row) -> Measured:
        """Run all jobs of a row."""
        files = self.processes.files
        results = {job: self._begun(job) for job in row.jobs}
        paths = {path for job in results for path in files.paths(job.family, job.models)}
        needed = total_bytes(list(paths)) + files.size(row.ours.family)
        for turn in range(max(self.repeat, self.peer_repeat)):
            due = [job for job, result in results.items() if not result.word and self._is_due(job, turn)]
            for place in range(len(due)):
                self._run(due[(place + turn) % len(due)], results)
        self._shared |= {job: result for job, result in results.items() if result.runs and self._is_shared(job)}
        return Measured(row, results, cached=needed <= CACHED * memory_bytes())

    def _begun(self, job: Job) -> Result:
        """The result of a job before its runs in this row."""
        if job in self._shared:
            return self._shared[job]
        return Result(word=self.absences.get(job.executor, "") or self.processes.peers.missing.get(job.tool, ""))

    def _run(self, job: Job, results: dict[Job, Result]) -> None:
        """Run a job once more. Ours come first: others' tools take minutes, for nothing where ours gave no figure."""
        result = results[job]
        if job.is_slow and all(found.word for other, found in results.items() if other.is_ours):
            result.word = "not run"
            return
        if job.tool == "mergekit" and not result.setting:
            self._try_settings(job, result)
        if not result.word:
            self._keep(job, result, self.processes.run(job, result.setting))

    def _is_due(self, job: Job, turn: int) -> bool:
        if job in self._shared:
            return False
        return turn < (self.peer_repeat if job.is_slow else self.repeat)

    def _is_shared(self, job: Job) -> bool:
        """Whether a job is run for one row, and its figures serve the others."""
        return job.is_slow or self.processes.files.small

    def _try_settings(self, job: Job, result: Result) -> None:
        """Run each setting of mergekit once, and choose the quickest."""
        tried: dict[str, float] = {}
        for setting in MERGEKIT_SETTINGS:
            run = self.processes.run(job, setting)
            if "process" in run:
                tried[setting] = run["process"]
                self.say(f"  mergekit, {setting}: {run['process']:.1f} s")
            else:
                result.word = run["error"]
        if tried:
            result.word = ""
            result.setting = min(tried, key=lambda setting: tried[setting])

    def _keep(self, job: Job, result: Result, run: Run) -> None:
        result.word = run.get("absent") or run.get("error") or ""
        if not result.word:
            result.runs.append(run)
        told = result.word or ", ".join(f"{name} {run[name]:.2f}" for name in TIMES if name in run)
        self.say(f"  {' '.join((job.tool, job.executor)).strip()}: {told}")
