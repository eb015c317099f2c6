"""Recipes that share inputs, on the way from opened models to a plan: checks, results, what belongs beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remelt.api.configurations import CONFIG, Companion, in_keeping
from remelt.api.contradictions import contradictions, differences
from remelt.api.description import Description
from remelt.api.dialect_views import (
    WITHOUT_A_PLACE,
    in_one_spelling,
    keys_without_a_place,
    left_out_of,
    stem_of,
    wanted_dialect,
)
from remelt.api.encodings import Encodings, kept_encodings, scaled_encodings
from remelt.api.gguf_outputs import GgufEncodings, gguf_encodings
from remelt.api.layer_views import refuse_strange_stacks, restacked
from remelt.api.mixture_views import Style, with_parts
from remelt.api.mixtures import Assembled
from remelt.api.opening import Opened
from remelt.api.options import QUANTISED, MergeOptions
from remelt.api.outputs import GGUF, SUFFIX, companions_of, lay_out, shards_of
from remelt.api.recipes import OPTIONS_KEY, RECIPE_KEY
from remelt.api.resources import available_memory, usable_cores
from remelt.api.token_views import shared_vocabulary
from remelt.api.tokenizers import with_vocabulary
from remelt.api.tying import without
from remelt.archs.dialects import IN_FULL
from remelt.archs.facts import layout as arch_layout
from remelt.check.bound import BoundGraph
from remelt.check.inputs import Input, arch_of, keys_of
from remelt.check.joining import join_reports
from remelt.check.keys import KeyOptions, KeyReport, check_keys
from remelt.check.names import check_donors, check_names
from remelt.check.report import fold_keys, problems_of
from remelt.check.spaces import name_of
from remelt.core.checksum import PLACEHOLDER
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.engine.executor import describe_executor
from remelt.errors import CheckError, OptionError, Problem, RecipeError
from remelt.planning.plan import Plan, PlannedOutput, Resources, make_plan
from remelt.recipe.mixture import BASE

if TYPE_CHECKING:
    from remelt.api.adapted import Adapted
    from remelt.api.alignment import Alignment

EXECUTOR_KEY = "remelt_executor"
CHECKSUM_KEY = "remelt_checksum"


@dataclass(frozen=True)
class PreparedGroup:
    """Recipes that share inputs, planned together: the plan, and what the engine needs to run it."""

    plan: Plan
    inputs: Mapping[int, Input]
    positions: tuple[int, ...]
    sources: tuple[tuple[int, ...], ...]
    companions: tuple[tuple[tuple[Path | bytes, str], ...], ...]
    adapted: Adapted | None = None
    """How a result that is an adapter was made."""
    alignments: tuple[Alignment, ...] = ()
    """What finds out how models are aligned, which a merge begins with."""
    again: Callable[[Adapted], PreparedGroup] | None = None
    """The same planned anew, for an adapter of which more is known."""


def refuse(problems: Sequence[Problem], graph: BoundGraph) -> None:
    if len(problems) == 1 and not problems[0].subject:
        only = problems[0]
        hint = None if only.hint is None else only.hint.removeprefix("hint: ")
        raise RecipeError(only.message, hint=hint, span=only.span)
    if problems:
        raise CheckError(problems, inputs=len(graph.models))


class Group:
    """Some recipes over some inputs, on the way to their plan."""

    def __init__(
        self,
        graph: BoundGraph,
        opened: Opened,
        masses: Sequence[float | None],
        positions: Sequence[int],
        used: Sequence[int],
        options: MergeOptions,
        forms: Sequence[Adapted | None],
    ) -> None:
        self.form = next((forms[position] for position in positions if forms[position] is not None), None)
        if self.form is not None:
            self.form.refuse_others(len(positions), masses[graph.roots[positions[0]]])
        self.graph, self.masses, self.positions, self.options = graph, masses, positions, options
        self.roots = [graph.roots[position] for position in positions]
        self.problems: list[Problem] = []
        self.inputs = {index: opened.inputs[index] for index in used}
        self.heads = opened.heads
        self.bases = {index: opened.bases[index] for index in used if index in opened.bases}
        self.permutations = {index: opened.permutations[index] for index in used if index in opened.permutations}
        self.before = opened.before
        self.alignments = tuple(dict.fromkeys(one for index in used for one in opened.alignments.get(index, ())))
        self.spelling = IN_FULL
        self.excused: frozenset[str] = frozenset()
        self.encodings = Encodings()
        self.styles: dict[int, Style] = {}
        """Those of results that are mixtures of experts."""

    def prepare(self, outputs: Sequence[Path | None], texts: Sequence[str]) -> PreparedGroup:
        order = [index for root in self.roots for index in (*self.weights_of(root), *self.graph.models_of(root))]
        own = [outputs[position] for position in self.positions]
        like = None if self.options.like is None else Path(self.options.like)
        if any(given.adapter is not None for given in self.inputs.values()):
            from remelt.api.followers import Followed, with_followers

            followed = Followed(self.permutations, self.before)
            compute, ignore = self.options.compute, self.options.ignore_unused
            self.inputs = with_followers(
                self.inputs, order, self.bases, followed, compute, self.problems, ignore_unused=ignore
            )
            refuse(self.problems, self.graph)
        for root in self.roots:
            self.inputs, style = with_parts(self.inputs, self.graph.models_of(root))
            self.styles |= {} if style is None else {root: style}
        dialect = wanted_dialect(self.options.dialect, own, self.inputs[order[0]])
        if self.form is not None:
            dialect = self.form.settle(self.inputs[order[0]], self.inputs, self.options)
        self.inputs, self.spelling = in_one_spelling(self.inputs, order, dialect, like, self.problems)
        self.excused = keys_without_a_place(self.inputs.values(), self.spelling)
        for root in self.roots:
            refuse_strange_stacks(list(self.inputs_of(root).values()))
        report = self.check()
        if self.form is not None:
            report = self.form.tasks(report)
        else:
            report = self.encoded(report, outputs)
        planned = [
            self.output(place, report, outputs[position], texts[position])
            for place, position in enumerate(self.positions)
        ]
        plan = make_plan(
            report,
            self.inputs,
            planned,
            self.resources(),
            list(self.warnings(report, planned)),
            list(self.notes(report)),
        )
        sources = tuple(tuple(self.weights_of(root)) for root in self.roots)
        companions = tuple(
            tuple(self.companions(root, output)) for root, output in zip(self.roots, planned, strict=True)
        )
        return PreparedGroup(plan, self.inputs, tuple(self.positions), sources, companions, self.form, self.alignments)

    def check(self) -> KeyReport:
        """Archs, names and keys; all their problems at once."""
        problems = list(self.problems)
        layouts = []
        for root in self.roots:
            given = list(self.inputs_of(root).values())
            arch = arch_of(given, problems)
            layouts.append(arch_layout(keys_of(given), arch, self.spelling))
            problems += check_names(self.graph, self.graph.reachable(root), layouts[-1])
            problems += check_donors(self.graph, self.graph.reachable(root), self.inputs, self.spelling)
            problems += contradictions([self.inputs[index] for index in self.weights_of(root)])
        refuse(list(dict.fromkeys(problems)), self.graph)
        missing: Any = self.options.missing
        options = KeyOptions(missing, None if self.options.scaled else self.options.stored, self.excused)
        reports = [
            check_keys(self.graph, [root], self.inputs_of(root), layout, options, self.masses)
            for root, layout in zip(self.roots, layouts, strict=True)
        ]
        report = reports[0] if len(reports) == 1 else join_reports(reports)
        for place, root in enumerate(self.roots):
            if root in self.styles and report.tasks:
                problems += self.mixture(root, tensors_of(report, place)).problems()
        problems += problems_of(report, list(self.inputs.values()))
        for root, found in zip(self.roots, reports, strict=True):
            if not found.tasks and not problems:
                message = "the recipe's result has no tensors: its inputs share no key that it keeps"
                problems.append(Problem("", message, span=self.graph.steps[root].span))
        if self.options.nonfinite == "missing" and any(name_of(self.masses[root]) == "delta" for root in self.roots):
            raise OptionError(
                "nonfinite 'missing' takes a tensor from a model, but this recipe's result is a difference",
                hint="nonfinite 'error' or 'keep'",
            )
        refuse(problems, self.graph)
        return report

    def encoded(self, report: KeyReport, outputs: Sequence[Path | None]) -> KeyReport:
        """The report with the tasks of results that are quantised, or GGUF files."""
        options, paths = self.options, [outputs[position] for position in self.positions]
        is_gguf = any(path is not None and path.suffix == GGUF for path in paths)
        if options.asks_q8_0 and not is_gguf:
            raise OptionError(f"{options.dtype} is a type of GGUF files", hint="-o NAME.gguf")
        if not (is_gguf or options.scaled or options.keep_quantisation):
            return report
        if len(self.roots) > 1:
            raise OptionError("recipes that share models are merged together, but quantised one by one")
        (root,) = self.roots
        tensors = {key: info for task in report.tasks for _, key, info in task.outputs}
        first, folder = self.first_of(root), self.small_files(root)
        if is_gguf:
            if options.max_shard_size is not None:
                raise OptionError("a GGUF file is written whole", hint="leave out --max-shard-size")
            keep = options.keep_quantisation
            dtype = QUANTISED if options.asks_q8_0 else options.dtype
            self.encodings = gguf_encodings(tensors, first, folder, dtype, keep=keep)
        elif options.scaled and options.stored is not None:
            self.encodings = scaled_encodings(tensors, options.stored, folder)
        else:
            self.encodings = kept_encodings(tensors, first.checkpoint, first.label)
        return self.encodings.tasks(report, self.inputs)

    def output(self, place: int, report: KeyReport, path: Path | None, text: str) -> PlannedOutput:
        """One result: its tensors in order, and their layout where it goes to disk."""
        root = self.roots[place]
        tensors = tensors_of(report, place)
        space = name_of(self.masses[root]) or "weight"
        if path is not None and self.form is not None:
            path = self.form.path(path, overwrite=self.options.overwrite)
        if path is None or (self.form is not None and self.form.measures is not None):
            return PlannedOutput(None, space, tensors, None)
        metadata = {
            "format": "pt",
            "remelt_version": _version(),
            EXECUTOR_KEY: describe_executor(self.options.device, self.options.compute_dtype),
            CHECKSUM_KEY: PLACEHOLDER,
            RECIPE_KEY: text,
        }
        first = self.first_of(root)
        metadata |= first.checkpoint.inherited
        if space == "weight":
            hashed = self.options.hashed and path.suffix == SUFFIX
            metadata |= self.described(root, tensors).metadata(hashed=hashed)
        if self.options.decisive:
            metadata[OPTIONS_KEY] = json.dumps(self.options.decisive)
        if self.form is not None:
            return PlannedOutput(str(path), space, tensors, self.form.lay_out(tensors, metadata, path))
        if isinstance(self.encodings, GgufEncodings):
            return PlannedOutput(str(path), space, tensors, self.encodings.lay_out(tensors, metadata, path))
        stem = stem_of(first.detection.arch, self.spelling)
        shards = shards_of(first.checkpoint) if first.detection.spelling == self.spelling else None
        layout = lay_out(tensors, metadata, path, self.small_files(root), self.options.shard_bytes, stem, shards)
        return PlannedOutput(str(path), space, tensors, layout)

    def described(self, root: int, tensors: Mapping[str, TensorInfo]) -> Description:
        """What one result has beside its tensors."""
        models = [self.inputs[index] for index in self.weights_of(root)]
        return Description(models, tensors, self.first_of(root).detection.arch, self.spelling, self.options)

    def companions(self, root: int, output: PlannedOutput) -> Iterator[tuple[Path | bytes, str]]:
        """The small files beside a result; a configuration tells how many layers and tokens it has."""
        if self.form is not None:
            yield from self.form.companions(output)
            return
        folder = self.small_files(root)
        found: list[Companion] = list(companions_of(folder, output))
        told = self.described(root, output.tensors).configurations(output, folder)
        found += [] if told is None else [(content, name) for name, content in told.files.items()]
        used = [self.inputs[index] for index in self.graph.models_of(root)]
        parts = [given for given in used if given.model.layers is not None]
        parts = [given for given in parts if given.model.part is None or given.model.part.role == BASE]
        if parts:
            found = [(restacked(content, parts) if name == CONFIG else content, name) for content, name in found]
        shared = next((view for one in used if (view := shared_vocabulary(one.checkpoint)) is not None), None)
        if shared is not None:
            found = with_vocabulary(found, shared, folder)
        if root in self.styles:
            found = self.mixture(root, output.tensors).configured(found, CONFIG)
        first = self.first_of(root).checkpoint
        described = first.tensors if folder == first.path else {}
        found = list(in_keeping(found, output.tensors, described, untied=root in self.heads.untied))
        yield from self.encodings.companions(found)

    def mixture(self, root: int, tensors: Mapping[str, TensorInfo]) -> Assembled:
        """The mixture of experts that one result is."""
        return Assembled(self.styles[root], list(self.inputs_of(root).values()), tensors)

    def small_files(self, root: int) -> Path | None:
        """The folder whose configurations and tokenizers belong to one result, and whose weight files it names."""
        if self.options.like is not None:
            return Path(self.options.like)
        first = self.first_of(root)
        alike = [one for one in self.inputs_of(root).values() if one.detection.spelling == self.spelling]
        found = first if first.detection.spelling == self.spelling else next(iter(alike), first)
        return found.checkpoint.path if found.detection.spelling == self.spelling else None

    def weights_of(self, root: int) -> Iterator[int]:
        """The models that one result uses, in the recipe's order."""
        yield from (index for index in self.graph.models_of(root) if self.inputs[index].model.space == "weight")

    def inputs_of(self, root: int) -> dict[int, Input]:
        """What one result reads, in the order in which the recipe names it."""
        found = {index: self.inputs[index] for index in self.graph.models_of(root)}
        return without(found, self.heads.hidden[root]) if root in self.heads.hidden else found

    def first_of(self, root: int) -> Input:
        """The first model of one result: its order, companions and layout are the result's."""
        return self.inputs[next(self.weights_of(root), self.graph.models_of(root)[0])]

    def resources(self) -> Resources:
        """Threads and memory: what was asked for, or one thread a core and a quarter of what is available."""
        memory = self.options.memory_bytes
        compute, cache = self.options.compute, self.options.cache
        return Resources(
            threads=self.options.threads or min(usable_cores(), 8),
            memory=(available_memory() // 4 if memory is None else memory) - (cache.size if cache is not None else 0),
            itemsize=compute.itemsize,
            compute_dtype=compute.name,
            device=self.options.device != "cpu",
            scans=self.options.nonfinite == "missing",
        )

    def warnings(self, report: KeyReport, outputs: Sequence[PlannedOutput]) -> Iterator[str]:
        """What a person should know before this is run."""
        if self.form is not None:
            yield from self.form.warnings()
        elif any(output.space == "delta" for output in outputs):
            yield "the result is a difference of models (a delta), which no program can load as a model"
        for root, output in zip(self.roots, outputs, strict=True) if self.form is None else ():
            yield from self.described(root, output.tensors).missing(output, self.small_files(root))
        for (lacking, having, settled), keys in report.lacking.items():
            done = f"taken from {having}" if settled == "first" else "left out"
            plural = "s" if len(keys) != 1 else ""
            yield f"{lacking} lacks {len(keys)} key{plural} that {having} has, {done}: {fold_keys(keys)}"
        if self.options.compute is DType.F32:
            wide = [
                one.label
                for one in self.inputs.values()
                if any(t.dtype is DType.F64 for t in one.checkpoint.tensors.values())
            ]
            if wide:
                yield f"F64 tensors in {', '.join(wide)} are computed in float32; --compute-dtype float64 keeps them"
        for root in self.roots:
            yield from differences([self.inputs[index] for index in self.weights_of(root)])
        for one in self.inputs.values():
            if lost := list(dict.fromkeys(left_out_of(one.checkpoint))):
                count = f"{len(lost)} key{'s' if len(lost) != 1 else ''}"
                yield f"{one.label}: {count} {WITHOUT_A_PLACE}: {fold_keys(lost)}"
            if one.note:
                yield f"{one.label}: {one.note}"

    def notes(self, report: KeyReport) -> Iterator[str]:
        """What the plan tells beside warnings: defaults taken, reads that are not needed."""
        for argument, keys in report.unspoken.items():
            yield f"{argument} by default for {len(keys)} keys that no weight speaks for: {fold_keys(keys)}"
        for alignment in self.alignments:
            yield alignment.told()
        for label, count in report.idle.items():
            yield f"{label}: {count} tensors are not read, and not checked for NaN, as a weight makes them idle"


def tensors_of(report: KeyReport, place: int) -> dict[str, TensorInfo]:
    """The tensors of one result, in order."""
    return {key: info for task in report.tasks for index, key, info in task.outputs if index == place}


def _version() -> str:
    from remelt.version import __version__

    return __version__
