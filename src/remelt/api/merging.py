"""Merging: plan, run, publish; nothing takes a final name before all of it is complete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from remelt.api.fingerprint import fingerprint, identities
from remelt.api.group import PreparedGroup
from remelt.api.options import MergeOptions, PathLike, over_carried
from remelt.api.outputs import SUFFIX, output_path
from remelt.api.prepare import Prepared, prepare
from remelt.api.recipes import Source, load_recipe
from remelt.api.resources import available_memory
from remelt.core.nearest import nearest_hint
from remelt.errors import OptionError, RemeltError, RunError
from remelt.formats.locate import locate_model, models_folders
from remelt.methods import METHODS
from remelt.planning.plan import Plan
from remelt.recipe.adapter import is_adapter, peel
from remelt.recipe.node import Model, Node
from remelt.recipe.node import model as as_model
from remelt.recipe.signature import name_all_models
from remelt.recipe.walk import topological

if TYPE_CHECKING:
    from torch import Tensor

    from remelt.engine.commit import FileOutput
    from remelt.engine.run import Progress
    from remelt.engine.tally import Tally

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
    tallies: list[Tally] = field(default_factory=list)
    """What the threads did, for each plan."""
    seconds: float = 0.0
    """Of running the plans: neither planning nor publishing is in them."""


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
    source, chosen = asked(recipe, output, options)
    with contextlib.closing(_merging([source], [output], chosen)) as running:
        merged = _drain(running, watch)
    return merged.tensors[0] if output is None else merged.paths[0]


def convert(
    model: Node | Mapping[str, Any] | PathLike,
    output: PathLike | None = None,
    *,
    to: str,
    watch: Watch | None = None,
    **options: Any,
) -> Any:
    """A model of a known arch in another layout of keys, streamed to a file or folder, or as a dictionary of tensors.

    ``to`` is a dialect: ``original`` for single files, ``diffusers`` for folders of components. A folder has the
    configurations that can be made of shapes, or those of the folder ``like``, with its tokenizers. Further options are
    those of `MergeOptions`. Returns what `merge` returns, and raises what it raises; `CheckError` where keys would be
    lost.

    >>> import torch, remelt
    >>> convert({"w": torch.zeros(2)}, to="diffusers")
    Traceback (most recent call last):
    remelt.errors.CheckError: refused: 1 problem in 1 input
      memory  is of no known arch, so that nobody can tell how diffusers names its keys
    """
    recipe = model if isinstance(model, Node) else as_model(model)
    return merge(recipe, output, watch=watch, dialect=to, **options)


def plan(recipe: Node | PathLike, output: PathLike | None = None, **options: Any) -> Plan:
    """What `merge` with the same arguments would do, from headers alone: inputs, bytes, peak memory, time, warnings.

    Raises what `merge` would raise before writing.
    """
    source, chosen = asked(recipe, output, options)
    with prepare_merges([source], [output], chosen) as prepared:
        return prepared.groups[0].plan


def asked(recipe: object, output: object, options: Mapping[str, Any]) -> tuple[Source, MergeOptions]:
    """The recipe and the options of a merge; `OptionError` for arguments that are no such things."""
    if not isinstance(recipe, Node | str | os.PathLike):
        hint = "remelt.model(tensors) makes a recipe of tensors" if isinstance(recipe, Mapping) else None
        raise OptionError(f"a recipe is a node or a file's path, but got {type(recipe).__name__}", hint=hint)
    if not (output is None or isinstance(output, str | os.PathLike)):
        raise OptionError(f"the output is a path, or None for memory, but got {type(output).__name__}")
    known = [one.name for one in fields(MergeOptions)]
    for name in options:
        if name not in known:
            raise OptionError(f"a merge has no option {name!r}", hint=nearest_hint(name, known))
    source = load_recipe(recipe)
    return source, over_carried(source.options, options)


def prepare_merges(sources: Sequence[Source], outputs: Sequence[PathLike | None], options: MergeOptions) -> Prepared:
    """Several merges up to their plans."""
    paths = [
        None if output is None else Path(output) if is_adapter(source.recipe) else resolved(output, options, source)
        for source, output in zip(sources, outputs, strict=True)
    ]
    return prepare(sources, paths, options, METHODS)


def resolved(output: PathLike, options: MergeOptions, source: Source | None = None) -> Path:
    """The path of a result: a folder where the options ask for one, or the recipe's first model is one; else a file."""
    path = Path(output)
    if path.suffix == SUFFIX:
        return path
    wants_folder = path.is_dir() or str(output).endswith(("/", "\\")) or options.makes_folder
    return output_path(path, folder=wants_folder or (source is not None and gives_folder(source, options)))


def gives_folder(source: Source, options: MergeOptions) -> bool:
    """Whether a result that is not named as a file is a folder: as asked for, or as the recipe's first model is one."""
    if options.makes_folder or options.dialect is not None:
        return options.makes_folder
    try:
        recipe, form = peel(source.recipe)
        named = name_all_models(recipe, METHODS)
        order = [node for node in topological(named) if isinstance(node, Model) and node.space == "weight"]
        if form is not None or not order or order[0].tensors is not None:
            return False
        folders = [source.folder, *models_folders([Path(folder) for folder in options.models_dirs])]
        return locate_model(order[0].name, folders).is_dir()
    except RemeltError:  # it is told with all other problems, once the models are opened
        return False


def _drain(running: Iterator[Progress | Merged], watch: Watch | None) -> Merged:
    merged = Merged()
    for event in running:
        if isinstance(event, Merged):
            merged = event
        elif watch is not None:
            watch(event)
    return merged


def drain(prepared: Prepared, options: MergeOptions, watch: Watch | None) -> Merged:
    """Run planned merges to their end."""
    running: Any = run_prepared(prepared, options)
    with contextlib.closing(running):
        return _drain(running, watch)


def _merging(sources: Sequence[Source], outputs: Sequence[PathLike | None], options: MergeOptions) -> Any:
    with prepare_merges(sources, outputs, options) as prepared:
        yield from run_prepared(prepared, options)


def run_prepared(prepared: Prepared, options: MergeOptions) -> Iterator[Progress | Merged]:
    """Run planned merges: progress as it happens, and at the end what was done.

    No result takes its final name before all of them are complete.
    """
    merged = Merged()
    files: list[FileOutput] = []
    try:
        for place, group in enumerate(prepared.groups):
            begun = perf_counter()
            for alignment in group.alignments:
                alignment.find()
            _refuse_broken_adapters(group)
            group = prepared.groups[place] = yield from _settling(group, options)
            yield from _run_group(group, options, merged, files)
            merged.seconds += perf_counter() - begun
        for file in files:
            file.complete()
        _publish(files)
    except BaseException:
        for file in files:
            file.abandon()
        raise
    yield merged


def _refuse_broken_adapters(group: PreparedGroup) -> None:
    """Look at the numbers of adapters, which are few, before anything is written."""
    read = {load.input for planned in group.plan.tasks for load in planned.task.program.loads}
    adapters = [given for index, given in group.inputs.items() if given.adapter is not None and index in read]
    if adapters:
        from remelt.api.adapter_views import refuse_broken

        refuse_broken(adapters)


def settled(group: PreparedGroup, options: MergeOptions) -> PreparedGroup:
    """A group whose tensors are those that a merge of it would make, which for adapters takes computing them."""
    running = _settling(group, options)
    while True:
        try:
            next(running)
        except StopIteration as stop:
            found: PreparedGroup = stop.value
            return found


def _settling(group: PreparedGroup, options: MergeOptions) -> Generator[Progress, None, PreparedGroup]:
    """A group as it is, or where its result is an adapter, planned with the modules that change, and their ranks.

    Which they are is only known once the difference is computed.
    """
    if group.adapted is None or group.adapted.is_settled:
        return group
    assert group.again is not None
    measuring = group.adapted.measuring()
    planned = group if measuring is group.adapted else group.again(measuring)
    found = Merged()
    yield from _run_group(planned, options, found, [])
    (squares,) = found.tensors.values()
    return group.again(measuring.settled(squares))


def _publish(files: Sequence[FileOutput]) -> None:
    published: list[str] = []
    try:
        for file in files:
            file.publish()
            published.append(str(file.path))
    except (RunError, KeyboardInterrupt) as error:
        if not published:
            raise
        done = f"published before that: {', '.join(published)}"
        if isinstance(error, RunError):
            raise RunError(f"{error.message}; {done}") from error
        raise KeyboardInterrupt(done) from error


def fits_in_memory(group: PreparedGroup) -> bool:
    """Whether all files of a group can stay in the system's cache, beside what the merge itself holds."""
    files = sum(given.size for given in group.plan.inputs) + sum(output.size for output in group.plan.outputs)
    return files + group.plan.peak_memory <= available_memory()


def _run_group(
    group: PreparedGroup, options: MergeOptions, merged: Merged, files: list[FileOutput]
) -> Iterator[Progress]:
    """Run one group up to complete results; those that go to disk are added to ``files``."""
    from remelt.engine.commit import FileOutput
    from remelt.engine.executor import executor_for, maps_inputs
    from remelt.engine.finite import FiniteReport
    from remelt.engine.run import Execution, run
    from remelt.engine.sink import MemorySink

    report = FiniteReport()
    sinks: list[Any] = []
    for output, companions in zip(group.plan.outputs, group.companions, strict=True):
        if output.path is None or output.layout is None:
            sinks.append(MemorySink(output.tensors))
            continue
        key = fingerprint(group, output, options)
        file = FileOutput(output.layout, Path(output.path), companions, fingerprint=key, restart=options.restart)
        files.append(file)
        sinks.append(file)
        merged.kept += file.kept
    cached = fits_in_memory(group)
    execution = Execution(
        checkpoints={index: given.checkpoint for index, given in group.inputs.items()},
        labels={index: given.label for index, given in group.inputs.items()},
        sinks=sinks,
        nonfinite=options.nonfinite,  # type: ignore[arg-type]
        device=options.device,
        executor=executor_for(options.device),
        mapped=maps_inputs(cached=cached),
        cached=cached,
        sources=group.sources,
        cache=options.cache,
        identities={} if options.cache is None else identities(group),
    )
    yield from run(group.plan, execution, report)
    merged.tallies.append(execution.tallies.total())
    merged.plans.append(group.plan)
    merged.nonfinite += report.describe()
    for position, output, sink in zip(group.positions, group.plan.outputs, sinks, strict=True):
        if output.path is None:
            merged.tensors[position] = sink.tensors
        else:
            merged.paths[position] = Path(output.path)
