"""One run of a job: a fresh process onto a fresh file, and the figures that it gave."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from files import ModelFiles
from pages import freshen, warm
from peers import Peers, mergekit_command, mergekit_config
from rows import Job
from runner import REPORT

RUNNER = Path(__file__).with_name("runner.py")
SHOWN = 300
"""Characters of the last words of a run that failed."""

COPY = ("cp", "--reflink=never") if sys.platform == "linux" else ("cp",)
"""A clone of the blocks would copy nothing."""

FORKED = ("remelt", "plan", "text")
"""Tools of the runner whose small jobs need no process of their own."""

Run = dict[str, Any]
"""What a run gave: ``seconds`` of the merge, of its ``process``, of the processors (``work``, ``process_work``), and
bytes of memory at the ``peak``. Or ``absent`` or ``error``, with a word."""


class Processes:
    """Runs jobs, with the files and the other tools of one run of the benchmark."""

    def __init__(self, files: ModelFiles, peers: Peers, *, threads: int, limit: float) -> None:
        self.files = files
        self.peers = peers
        self.threads = threads
        self.limit = limit
        self.output = files.folder / "output"
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        if self._server is not None:
            self._server.communicate()

    def run(self, job: Job, setting: str = "") -> Run:
        """Run a job once. ``setting`` is one of mergekit's."""
        models = self.files.paths(job.family, job.models)
        self._clear()
        self.output.mkdir(parents=True)
        if job.synced:
            os.sync()  # what others have written is not to be waited for within the time
        warm(models)
        freshen(self.output, self.files.size(job.family))
        try:
            if job.tool == "copy":
                return self._copy(job, models[0])
            if job.tool == "mergekit":
                return self._mergekit(job, models, setting)
            if job.tool == "command":
                written = self._runner(job, models, "text")
                if "process" not in written:
                    return written
            return self._runner(job, models, job.tool)
        finally:
            self._clear()

    def _clear(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)

    def _copy(self, job: Job, model: Path) -> Run:
        target = self._target(job)
        return self._timed([*COPY, str(model), str(target)], {}, flushing(target) if job.synced else None)

    def _mergekit(self, job: Job, models: Sequence[Path], setting: str) -> Run:
        assert self.peers.mergekit is not None
        config = self.output / "config.yaml"
        config.write_text(mergekit_config(job.recipe, models), encoding="utf-8")
        return self._timed(mergekit_command(self.peers.mergekit, config, self._target(job), setting, self.threads), {})

    def _runner(self, job: Job, models: Sequence[Path], tool: str) -> Run:
        """A job of the runner, whose report is the last line that it prints."""
        interpreter = self.peers.sd_mecha if tool == "sd-mecha" and self.peers.sd_mecha else sys.executable
        more = {"REMELT_EXECUTOR": job.executor} if job.executor else {}
        described = self._described(job, models, tool)
        if self.files.small and tool in FORKED and hasattr(os, "fork"):
            return self._served({**described, "environment": more})
        return self._timed([interpreter, str(RUNNER), json.dumps(described)], more)

    def _served(self, described: dict[str, Any]) -> Run:
        """A job run by a fork of a process that has torch: importing it would take most of the time."""
        begun = time.perf_counter()
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, str(RUNNER), "--serve"],
                env=self._environment({}), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(described) + "\n")
        self._server.stdin.flush()
        for line in self._server.stdout:
            if line.startswith(REPORT):
                told: Run = json.loads(line.removeprefix(REPORT))
                return told if "absent" in told or "error" in told else {**told, "process": time.perf_counter() - begun}
        return {"error": "the process that forks has ended"}

    def _timed(self, command: Sequence[str], more: dict[str, str], after: Callable[[], None] | None = None) -> Run:
        begun, worked = time.perf_counter(), work_of_children()
        try:
            done = subprocess.run(
                command, env=self._environment(more), capture_output=True, text=True, check=False, timeout=self.limit
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {self.limit:.0f} s"}
        except OSError as error:
            return {"error": f"cannot run {command[0]}: {error.strerror}"}
        if done.returncode != 0:
            return {"error": f"failed with {done.returncode}: {last_words(done.stderr)}"}
        if after is not None:
            after()
        seconds = time.perf_counter() - begun
        _, _, report = done.stdout.rpartition(REPORT)
        told: Run = json.loads(report) if REPORT in done.stdout else {"seconds": seconds}
        if "absent" in told:
            return told
        return {**told, "process": seconds, "process_work": work_of_children() - worked}

    def _environment(self, more: dict[str, str]) -> dict[str, str]:
        threads = str(self.threads)
        return {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", **more}

    def _target(self, job: Job) -> Path:
        """Where a job writes: a folder for shards, else a file."""
        return self.output / ("merged" if job.family == "llama" else "merged.safetensors")

    def _described(self, job: Job, models: Sequence[Path], tool: str) -> dict[str, Any]:
        """A job as the runner reads it."""
        return {
            "tool": tool,
            "recipe": job.recipe,
            "calls": job.calls,
            "models": [str(path) for path in models],
            "output": str(self._target(job)),
            "text": str(self.output / "recipe.mecha"),
            "threads": self.threads,
            "synced": job.synced,
            "fresh": self.files.size(job.family),
            "options": dict(job.options),
        }


def flushing(path: Path) -> Callable[[], None]:
    """What flushes a file to the device."""

    def flush() -> None:
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    return flush


def work_of_children() -> float:
    """Seconds of processors that finished processes of ours have used."""
    used = os.times()
    return used.children_user + used.children_system


def last_words(text: str) -> str:
    """The end of what a run printed, on one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[-2:])[-SHOWN:]
