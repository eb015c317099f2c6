"""A plan in words, for `remelt plan`."""

from __future__ import annotations

from collections.abc import Iterator

from remelt.core.units import format_bytes, format_seconds
from remelt.planning.plan import Plan


def explain(plan: Plan, free_disk: int | None = None) -> str:
    """The plan for a person: inputs, results, bytes, memory, time, then warnings and notes."""
    return "\n".join(_lines(plan, free_disk))


def name_arch(arch: str | None, evidence: str) -> str:
    """The arch and the first thing that tells it, or why it is none that remelt has names for.

    >>> name_arch("sd1", "sd1: in.weight is [320, 4, 3, 3]; mid.weight is [8, 8]; out.weight is [4, 8]")
    'sd1, as in.weight is [320, 4, 3, 3]; 2 more keys agree'
    >>> name_arch(None, "no known arch has such keys")
    'no known arch has such keys; its blocks are inferred from them'
    """
    if arch is None:
        return f"{evidence}; its blocks are inferred from them"
    first, *more = evidence.removeprefix(f"{arch}: ").split("; ")
    agreeing = "" if not more else f"; {len(more)} more key{'s agree' if len(more) > 1 else ' agrees'}"
    return f"{arch}, as {first}{agreeing}"


def _lines(plan: Plan, free_disk: int | None) -> Iterator[str]:
    yield "inputs"
    for given in plan.inputs:
        yield f"  {given.label}  {given.tensors} tensors, {format_bytes(given.size)}"
        if given.path is not None:
            yield f"      {given.path}"
        yield f"      {name_arch(given.arch, given.evidence)}"
        part = "all" if given.read_tensors == given.tensors else f"{given.read_tensors} of {given.tensors}"
        yield f"      {part} tensors are read"
    yield "results"
    for output in plan.outputs:
        place = output.path or "in memory"
        files = len(output.layout.files) if output.layout is not None else 0
        shards = f" in {files} files" if files > 1 else ""
        yield f"  {place}  {len(output.tensors)} tensors, {format_bytes(output.size)}{shards}"
    disk = "" if free_disk is None else f" ({format_bytes(free_disk)} free)"
    yield f"reads        {format_bytes(plan.bytes_read)}"
    yield f"writes       {format_bytes(plan.bytes_written)}{disk}"
    step = f", set by {plan.peak_step}" if plan.peak_step else ""
    yield f"peak memory  {format_bytes(plan.peak_memory)} of {format_bytes(plan.memory_budget)} allowed{step}"
    plural = "s" if plan.threads != 1 else ""
    yield f"time         about {format_seconds(plan.seconds)} with {plan.threads} thread{plural}"
    yield from (f"warning: {warning}" for warning in plan.warnings)
    yield from (f"note: {note}" for note in plan.notes)
