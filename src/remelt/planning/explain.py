"""A plan in words, for `remelt plan`."""

from __future__ import annotations

from collections.abc import Iterator

from remelt.core.units import format_bytes, format_seconds
from remelt.planning.plan import Plan


def explain(plan: Plan, free_disk: int | None = None) -> str:
    """The plan for a person: inputs, results, bytes, memory, time, then warnings and notes."""
    return "\n".join(_lines(plan, free_disk))


def _lines(plan: Plan, free_disk: int | None) -> Iterator[str]:
    yield "inputs"
    for given in plan.inputs:
        arch = given.arch or "no named arch"
        yield f"  {given.label}  {given.tensors} tensors, {format_bytes(given.size)}; {arch}: {given.evidence}"
        if given.path is not None:
            yield f"      {given.path}"
        if given.read_tensors < given.tensors:
            yield f"      {given.read_tensors} of {given.tensors} tensors are read"
    yield "results"
    for output in plan.outputs:
        place = output.path or "in memory"
        files = len(output.layout.files) if output.layout is not None else 0
        shards = f" in {files} files" if files > 1 else ""
        yield f"  {place}  {len(output.tensors)} tensors, {format_bytes(output.size)}{shards}"
    disk = "" if free_disk is None else f" ({format_bytes(free_disk)} free)"
    yield f"reads        {format_bytes(plan.bytes_read)}"
    yield f"writes       {format_bytes(plan.bytes_written)}{disk}"
    yield f"peak memory  {format_bytes(plan.peak_memory)} of {format_bytes(plan.memory_budget)} allowed"
    plural = "s" if plan.threads != 1 else ""
    yield f"time         about {format_seconds(plan.seconds)} with {plan.threads} thread{plural}"
    yield from (f"warning: {warning}" for warning in plan.warnings)
    yield from (f"note: {note}" for note in plan.notes)
