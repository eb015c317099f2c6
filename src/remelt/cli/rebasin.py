"""`remelt rebasin`: models aligned by permutations that keep their function, and merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from remelt.cli import options as shared
from remelt.cli.alignment import matching, record, told
from remelt.cli.output import echo_json, progress
from remelt.errors import UsageError
from remelt.recipe.node import Call, Node, Value, as_node
from remelt.recipe.permuting import BOTH, STARTS, permute, rebasin

if TYPE_CHECKING:
    from remelt.api.options import MergeOptions
    from remelt.api.prepare import Prepared
    from remelt.api.rebasing import Aligned

F = TypeVar("F", bound=Callable[..., Any])
_OPTIONS = ("models_dirs", "dtype", "threads", "memory", "overwrite")

_MATCHING = [
    click.option("--start", type=click.Choice(STARTS), default=BOTH, show_default=True, help="Where matching begins."),
    click.option(
        "--include-crossing",
        "crossing",
        is_flag=True,
        help="Permute what ties several components, too: text encoders no longer suit their adapters then.",
    ),
    click.option(
        "--rotations",
        is_flag=True,
        help="Rotate heads of attention, too, where that keeps the function within rounding.",
    ),
    click.option(
        "--margins",
        metavar="FILE",
        help="What is computed once for the reference, and proves that groups of its fine-tunes are best as they are; "
        "made where it is not there.",
    ),
]
_WRITING = [
    click.option("-o", "--output", metavar="PATH", help="The merged model; without it, models are matched only."),
    click.option("--dtype", metavar="TYPE", help="Element type of the output; by default each tensor keeps its own."),
    click.option(
        *("--threads", "--workers", "threads"), type=click.IntRange(min=1), help="By default one a core, at most 8."
    ),
    click.option("--memory", metavar="SIZE", help="Memory budget of the merge, as in 4GiB."),
    click.option("--overwrite", is_flag=True, help="Replace existing files once the new ones are complete."),
    click.option("-q", "--quiet", is_flag=True, help="No progress and no summary."),
]


def _shared(command: F) -> F:
    for option in reversed([*_MATCHING, *_WRITING]):
        command = option(command)
    return shared.models_only(shared.common(command))


@click.group("rebasin", invoke_without_command=True, subcommand_metavar="[many | check ...]")
@click.option("--model-a", "--model_a", "model_a", metavar="A", help="The reference, which stays as it is.")
@click.option("--model-b", "--model_b", "model_b", metavar="B", help="The model that is aligned to it.")
@click.option("--alpha", type=float, default=0.5, show_default=True, help="The share of B in the result.")
@click.option("--permutations", metavar="FILE", help="Use these, which an earlier run saved, and match nothing.")
@click.option("--save-permutations", "save", metavar="FILE", help="Keep the permutations, for permute.")
@_shared
@click.pass_context
def command(
    context: click.Context,
    /,
    model_a: str | None,
    model_b: str | None,
    alpha: float,
    permutations: str | None,
    **given: Any,
) -> None:
    """Align B to A by permutations that keep its function, and merge both. Archs are detected.

    \b
    remelt rebasin --model-a A --model-b B -o mix.safetensors
    remelt rebasin --model-a A --model-b B --alpha 0.3 --save-permutations b-to-a.safetensors -o mix.safetensors
    remelt rebasin --model-a A --model-b B --save-permutations b-to-a.safetensors
    remelt rebasin many A B C -o mean.safetensors
    remelt rebasin check sdxl
    """
    here = _given_here(context)
    if context.invoked_subcommand is not None:
        for name in here.values():
            hint = f"remelt rebasin {context.invoked_subcommand} ... {name}"
            raise UsageError(f"options of {context.invoked_subcommand} stand behind it, but {name} before", hint=hint)
        return
    if model_a is None or model_b is None:
        raise UsageError("two models are aligned", hint="remelt rebasin --model-a A --model-b B -o OUT")
    if permutations is not None and {"save", "margins", "rotations", "start", "crossing"} & here.keys():
        raise UsageError(
            "with --permutations nothing is matched, that could be kept, proven or rotated", hint="leave one out"
        )
    if permutations is not None:
        aligned: Node = permute(model_b, permutations)
    else:
        aligned = _aligned(model_b, model_a, given)
    if given["output"] is None:
        if permutations is not None:
            raise UsageError("there is nothing to do: no matching, and no output", hint="-o OUT")
        if idle := [name for one, name in here.items() if one in ("alpha", "dtype", "threads", "memory")]:
            raise UsageError(f"without an output nothing is merged, and {idle[0]} has no effect", hint="-o OUT")
        _only_match(model_b, model_a, given)
        return
    recipe = Call("weighted_sum", (as_node(model_a), aligned), (("alpha", Value(alpha)),))
    _merge(recipe, given, lambda _, __: given["save"])


def _given_here(context: click.Context) -> dict[str, str]:
    """The options that stand on the command line, before a subcommand where there is one, as they are spelled."""
    return {
        str(one.name): one.opts[0]
        for one in context.command.params
        if context.get_parameter_source(str(one.name)) is ParameterSource.COMMANDLINE
    }


@command.command("many")
@click.argument("models", metavar="MODEL MODEL...", nargs=-1, required=True)
@click.option("--save-permutations", "folder", metavar="FOLDER", help="Keep the permutations of each model there.")
@click.option("--refine", is_flag=True, help="Then align each in turn to all others, until nothing moves.")
@_shared
def many(models: tuple[str, ...], folder: str | None, refine: bool, **given: Any) -> None:
    """Align all models to the first, and average them.

    \b
    remelt rebasin many A B C -o mean.safetensors
    remelt rebasin many A B C --refine --save-permutations found -o mean.safetensors
    """
    if len(models) < 2:
        raise UsageError("at least two models are averaged", hint="remelt rebasin many A B C -o mean.safetensors")
    first, *others = models
    recipe = Call("n_average", (as_node(first), *(_aligned(one, first, given) for one in others)))
    if refine and len(others) > 1:
        _refine(recipe, models, folder, given)
        return
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)

    def place_of(number: int, name: str) -> str | None:
        from remelt.api.rebasing_many import place_in

        return None if folder is None else str(place_in(folder, number + 2, name))

    if given["output"] is None:
        for number, one in enumerate(dict.fromkeys(others)):
            _only_match(one, first, {**given, "save": place_of(number, one)})
        return
    _merge(recipe, given, place_of)


@command.command("check")
@click.argument("arch", metavar="[ARCH | MODEL]", required=False)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the small model and its permutations.")
@shared.common
def check(arch: str | None, seed: int, as_json: bool, debug: bool) -> int:
    """Run a small model of an arch with random permutations: what it computes may not change.

    Without an arch, all are tried; of a model's file, its own, and whether the groups fit its tensors. Needs the extra
    rebasin-check.
    """
    from remelt.api.rebasin_check import check_archs

    reports = check_archs(arch, seed=seed)
    if as_json:
        echo_json([one.record() for one in reports])
    for one in reports if not as_json else ():
        name, error = one.report.worst
        verdict = "holds" if one.report.passed else f"is broken: {', '.join(one.report.broken[:3]) or 'all at once'}"
        click.echo(
            f"{one.arch} {verdict}: {len(one.report.alone)} groups, the worst by itself {error:.1e} ({name}), "
            f"all at once {one.report.together:.1e}"
        )
    return 0 if all(one.report.passed for one in reports) else 1


def _aligned(model: str, reference: str, given: dict[str, Any]) -> Node:
    return rebasin(model, to=reference, start=given["start"], crossing=given["crossing"], rotations=given["rotations"])


def _refine(plain: Node, models: Sequence[str], folder: str | None, given: dict[str, Any]) -> None:
    """Find permutations of all models, and average what they make of them.

    The ``plain`` recipe, in which each is aligned to the first, is planned before: what is wrong is told at once.
    """
    from remelt.api.rebasing_many import align_many

    if given["output"] is not None:
        with _prepared(plain, given):
            pass
    with matching(quiet=given["quiet"] or given["as_json"]) as watch:
        found = align_many(
            models,
            save=folder,
            **{name: given[name] for name in ("margins", "start", "crossing", "rotations", "overwrite", "models_dirs")},
            progress=None if watch is None else lambda model, visit: watch(visit, model),
        )
    if not (given["as_json"] or given["quiet"]):
        shown = " -> ".join(f"{one:.6g}" for one in (found.before, found.aligned, found.after))
        click.echo(f"objective of all pairs: {shown}: as they are, aligned to the first, refined")
    if given["output"] is None:
        _tell(found.models, given, {})
        return
    moved = [permute(model, one.path or one.saved) for model, one in zip(models[1:], found.models, strict=True)]
    _merge(Call("n_average", (as_node(models[0]), *moved)), given, lambda _, __: None, found.models)


@contextmanager
def _prepared(recipe: Node, given: dict[str, Any]) -> Iterator[tuple[Prepared, MergeOptions]]:
    """The planned merge of a recipe."""
    from remelt.api.merging import asked, prepare_merges

    chosen = {name: given[name] for name in _OPTIONS if given[name]}
    source, options = asked(recipe, given["output"], chosen)
    with prepare_merges([replace(source, name="rebasin")], [given["output"]], options) as prepared:
        yield prepared, options


def _only_match(model: str, reference: str, given: dict[str, Any]) -> None:
    from remelt.api.rebasing import align_models

    with matching(quiet=given["quiet"] or given["as_json"]) as watch:
        found = align_models(
            model,
            to=reference,
            save=given["save"],
            margins=given["margins"],
            start=given["start"],
            crossing=given["crossing"],
            rotations=given["rotations"],
            progress=watch,
            overwrite=given["overwrite"],
            models_dirs=given["models_dirs"],
        )
    _tell([found], given, {})


def _merge(
    recipe: Node,
    given: dict[str, Any],
    place_of: Callable[[int, str], str | None],
    before: Sequence[Aligned] = (),
) -> None:
    """Match what the recipe aligns, keep the permutations of each model at its place, if it has one, and merge.

    ``before`` is what was found already, to be told with the rest.
    """
    from remelt.api.merging import drain
    from remelt.api.rebasing import alignments_of, find, refuse_existing

    quiet = given["quiet"] or given["as_json"]
    with _prepared(recipe, given) as (prepared, options):
        for warning in (one for group in prepared.groups for one in group.plan.warnings):
            if not given["as_json"]:
                click.echo(f"warning: {warning}", err=True)
        saves = {one: place_of(number, one.pair.labels[1]) for number, one in enumerate(alignments_of(prepared))}
        for save in saves.values():
            refuse_existing(save, overwrite=given["overwrite"])
        with matching(quiet=quiet) as watch:
            kept = {"progress": watch, "margins": given["margins"], "overwrite": given["overwrite"]}
            found = [find(one, save=save, **kept) for one, save in saves.items()]
        with progress(quiet=quiet) as bytes_watch:
            path = drain(prepared, options, bytes_watch).paths[0]
    _tell([*before, *found], given, {"output": str(path)})


def _tell(found: Sequence[Aligned], given: dict[str, Any], more: dict[str, Any]) -> None:
    if given["as_json"]:
        echo_json({**more, "alignments": [record(one) for one in found]})
        return
    if given["quiet"]:
        return
    for line in (line for one in found for line in told(one)):
        click.echo(line)
    if more:
        click.echo(f"wrote {more['output']}")
