"""Merging: plan, run, publish; nothing takes a final name before all of it is complete."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remelt.api.fingerprint import fingerprint
from remelt.api.options import MergeOptions, PathLike
from remelt.api.outputs import output_path
from remelt.api.prepare import Prepared, PreparedGroup, prepare
from remelt.api.recipes import Source, load_recipe
from remelt.methods import METHODS
from remelt.planning.plan import Plan
from remelt.recipe.node import Node

if TYPE_CHECKING:
    from torch import Tensor

    from remelt.engine.run import Progress

Watch = Callable[["Progress"], None]


@dataclass
class Merged:
    """What merging did: the plans, where each result is, its tensors where it stays in memory, and what was noticed."""

    plans: list[Plan] = field(default_factory=list)
    paths: dict[int, Path] = field(default_factory=dict)
    tensors: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    nonfinite: list[str] = field(default_factory=list)
    kept: int = 0
    """Bytes of results that an earlier, interrupted run had finished."""


def merge(
    recipe: Node | PathLike, output: PathLike | None = None, *, watch: Watch | None = None, **options: Any
) -> Any:
    """Merge a recipe to a file or folder, or, without ``output``, to a dictionary of tensors.

    ``recipe`` is a node, the path of a recipe file, or that of a checkpoint that carries its recipe, and the options
    that it was made with where they are not given. The options are those of `MergeOptions`. Returns the output's path,
    or the tensors by key. ``watch`` is called with the progress. A merge to disk that was interrupted is continued.

    Raises `CheckError` with every problem at once, `BudgetError`, `OutputError` before anything is written;
    `NonFiniteError`, `MethodError` while running, and then nothing is published.

    >>> import torch, remelt
    >>> a, b = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    >>> merge(remelt.weighted_sum(remelt.model(a), remelt.model(b), alpha=0.25))
    {'w': tensor([0.2500, 0.2500])}
    """
    source = load_recipe(recipe)
    chosen = MergeOptions(**{**source.options, **options})
    with contextlib.closing(_merging([source], [output], chosen)) as running:
        merged = _drain(running, watch)
    return merged.tensors[0] if output is None else merged.paths[0]


def plan(recipe: Node | PathLike, output: PathLike | None = None, **options: Any) -> Plan:
    """What `merge` with the same arguments would do, from headers alone: inputs, bytes, peak memory, time, warnings.

    Raises what `merge` would raise before writing.
    """
    source = load_recipe(recipe)
    with prepare_merges([source], [output], MergeOptions(**{**source.options, **options})) as prepared:
        return prepared.groups[0].plan


def prepare_merges(sources: Sequence[Source], outputs: Sequence[PathLike | None], options: MergeOptions) -> Prepared:
    """Several merges up to their plans."""
    paths = [None if output is None else _resolved(output, options) for output in outputs]
    return prepare(sources, paths, options, METHODS)


def _resolved(output: PathLike, options: MergeOptions) -> Path:
    path = Path(output)
    wants_folder = options.max_shard_size is not None or path.is_dir() or str(output).endswith(("/", "\\"))
    return output_path(path, folder=wants_folder and path.suffix != ".safetensors")


def _drain(running: Iterator[Progress | Merged], watch: Watch | None) -> Merged:
    merged = Merged()
    for event in running:
        if isinstance(event, Merged):
            merged = event
        elif watch is not None:
            watch(event)
    return merged


def _merging(sources: Sequence[Source], outputs: Sequence[PathLike | None], options: MergeOptions) -> Any:
    with prepare_merges(sources, outputs, options) as prepared:
        yield from run_prepared(prepared, options)


def run_prepared(prepared: Prepared, options: MergeOptions) -> Iterator[Progress | Merged]:
    """Run planned merges: progress as it happens, and at the end what was done."""
    merged = Merged()
    for group in prepared.groups:
        yield from _run_group(group, options, merged)
    yield merged


def _run_group(group: PreparedGroup, options: MergeOptions, merged: Merged) -> Iterator[Progress]:
    from remelt.engine.commit import FileOutput
    from remelt.engine.finite import FiniteReport
    from remelt.engine.run import Execution, run
    from remelt.engine.sink import MemorySink

    report = FiniteReport()
    files: list[FileOutput] = []
    sinks: list[Any] = []
    try:
        for output, companions in zip(group.plan.outputs, group.companions, strict=True):
            if output.path is None or output.layout is None:
                sinks.append(MemorySink(output.tensors))
            else:
                files.append(
                    FileOutput(
                        output.layout,
                        Path(output.path),
                        companions,
                        fingerprint=fingerprint(group, output, options),
                        restart=options.restart,
                    )
                )
                sinks.append(files[-1])
                merged.kept += files[-1].kept
        execution = Execution(
            checkpoints={index: given.checkpoint for index, given in group.inputs.items()},
            labels={index: given.label for index, given in group.inputs.items()},
            sinks=sinks,
            nonfinite=options.nonfinite,  # type: ignore[arg-type]
            device=options.device,
            sources=group.sources,
        )
        yield from run(group.plan, execution, report)
        for file in files:
            file.publish()
    except BaseException:
        for file in files:
            file.abandon()
        raise
    merged.plans.append(group.plan)
    merged.nonfinite += report.describe()
    for position, output, sink in zip(group.positions, group.plan.outputs, sinks, strict=True):
        if output.path is None:
            merged.tensors[position] = sink.tensors
        else:
            merged.paths[position] = Path(output.path)
