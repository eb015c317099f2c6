"""What commands print: plans, tables and progress for people, JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from remelt.api.recipes import write_text
from remelt.core.units import format_bytes, format_seconds
from remelt.errors import OutputError
from remelt.planning.plan import Plan

if TYPE_CHECKING:
    from remelt.api.merging import Watch
    from remelt.engine.run import Progress

_QUIET = 5.0
"""Seconds between two lines of progress in a log."""


def echo_json(value: object) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(value, indent=2, default=str))


def deliver(text: str, output: Path | None, *, overwrite: bool, as_json: bool) -> None:
    """Write a text to a file, or print it."""
    save(text, output, overwrite=overwrite)
    if as_json:
        echo_json({"text": text, "output": output and str(output)})
    elif output is None:
        click.echo(text, nl=False)
    else:
        click.echo(f"wrote {output}")


def save(text: str, output: Path | None, *, overwrite: bool) -> None:
    """Write a text to a file, if one is named; `OutputError` where there is one already, or a folder."""
    if output is not None:
        refuse_existing(output, overwrite=overwrite)
        write_text(output, text)


def refuse_existing(output: Path, *, overwrite: bool) -> None:
    """`OutputError` where there is a file already that may not be replaced, or a folder."""
    if output.is_dir():
        raise OutputError(f"{output} is a folder", hint="give a file's name")
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists", hint="--overwrite replaces it")


def folder_of(output: Path | None, otherwise: Path) -> Path:
    """The folder that a file is written to; another one where it is printed."""
    return otherwise if output is None else output.absolute().parent


def plan_record(plan: Plan) -> dict[str, Any]:
    """A plan for programs: everything but the tasks."""
    return {
        "inputs": [asdict(given) for given in plan.inputs],
        "outputs": [
            {
                "path": output.path,
                "space": output.space,
                "tensors": len(output.tensors),
                "size": output.size,
                "files": [file.name for file in output.layout.files] if output.layout is not None else [],
            }
            for output in plan.outputs
        ],
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "peak_memory": plan.peak_memory,
        "peak_step": plan.peak_step,
        "memory_budget": plan.memory_budget,
        "threads": plan.threads,
        "seconds": plan.seconds,
        "warnings": list(plan.warnings),
        "notes": list(plan.notes),
    }


@contextmanager
def progress(*, quiet: bool) -> Iterator[Watch | None]:
    """A bar with rate and time left on a terminal, a line now and then in a log, nothing where asked."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar() as watch:
            yield watch
    else:
        yield _Lines().watch


@contextmanager
def _bar() -> Iterator[Watch]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("merging"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("merging", total=None)

        def watch(progress: Progress) -> None:
            bar.update(task, completed=progress.done, total=progress.total)

        yield watch


class _Lines:
    """Progress for a log: at most a line every few seconds."""

    def __init__(self) -> None:
        self.begun = self.told = time.monotonic()

    def watch(self, progress: Progress) -> None:
        """Tell, where it is time."""
        now = time.monotonic()
        if now - self.told < _QUIET or not progress.done:
            return
        self.told = now
        rate = progress.done / (now - self.begun)
        left = format_seconds((progress.total - progress.done) / rate)
        done, total = format_bytes(progress.done), format_bytes(progress.total)
        click.echo(f"{done} of {total}, {format_bytes(int(rate))}/s, {left} left", err=True)
