"""Aligning models outside recipes: to see what is gained, to keep the permutations, and before a merge begins."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from remelt.alignment.files import SavedPermutations, save_permutations
from remelt.alignment.margin_files import load_margins, save_margins
from remelt.alignment.margins import Margins, find_margins
from remelt.alignment.matching import Visit
from remelt.api.alignment import Alignment, CheckpointWeights, Pair, saved
from remelt.api.group import refuse
from remelt.api.hashing import content_hash
from remelt.api.opening import open_models
from remelt.api.options import PathLike
from remelt.api.prepare import Prepared
from remelt.archs.axis_groups import AxisGroup
from remelt.check.bound import bind_recipes
from remelt.errors import OptionError, OutputError
from remelt.formats.checkpoint import Checkpoint
from remelt.formats.locate import models_folders
from remelt.methods import METHODS
from remelt.recipe.node import Operand
from remelt.recipe.permuting import BOTH, MARGINS, expand_permutations, rebasin

if TYPE_CHECKING:
    from remelt.alignment.matching import Match

Progress = Callable[[Visit], None]


@dataclass(frozen=True)
class Aligned:
    """What aligning a model to another found: ``saved`` is what a permutation file has of it, ``path`` where it is."""

    reference: str
    model: str
    work: str
    match: Match
    saved: SavedPermutations
    path: Path | None = None

    @property
    def moved(self) -> int:
        """The groups of which anything moves."""
        return len(self.match.moved)


def align_models(
    model: Operand,
    *,
    to: Operand,
    save: PathLike | None = None,
    margins: PathLike | None = None,
    start: str = BOTH,
    crossing: bool = False,
    rotations: bool = False,
    progress: Progress | None = None,
    overwrite: bool = False,
    models_dirs: Sequence[PathLike] = (),
) -> Aligned:
    """Find the permutations under which a model lies nearest to another one; nothing is merged.

    ``save`` is where they are kept, for `permute`. ``margins`` is a file of what is computed once for the reference:
    with it, groups of a fine-tune are proven to be best as they are, without a product of matrices; where it is not
    there, it is made. With ``rotations``, heads of attention are rotated, too.

    Raises `CheckError` with all that keeps the models from being matched, `OutputError` for a file that exists.
    """
    refuse_existing(save, overwrite=overwrite)
    recipe = expand_permutations(rebasin(model, to=to, start=start, crossing=crossing, rotations=rotations))
    graph = bind_recipes([recipe], METHODS, ["."])
    with open_models(graph, models_folders([Path(folder) for folder in models_dirs])) as opened:
        refuse([*graph.problems, *opened.problems], graph)
        (alignments,) = opened.alignments.values()
        return find(alignments[-1], save=save, margins=margins, progress=progress, overwrite=overwrite)


def find(
    alignment: Alignment,
    *,
    save: PathLike | None = None,
    margins: PathLike | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Aligned:
    """What an alignment of opened models finds, kept where that is asked for."""
    if margins is not None and alignment.match is None:
        alignment.margins = margins_of(alignment, Path(margins), progress)
    return kept(alignment.pair, alignment.find(progress), save, overwrite=overwrite)


def kept(pair: Pair, match: Match, save: PathLike | None, *, overwrite: bool) -> Aligned:
    """What was found for a pair, written to a permutation file where that is asked for."""
    hashes = {"reference": _hash(pair.reference), "model": _hash(pair.model)} if save is not None else {}
    made = saved(pair, match, **hashes)
    path = None if save is None else save_permutations(made, Path(save), overwrite=overwrite)
    return Aligned(*pair.labels, pair.told(), match, made, path)


def alignments_of(prepared: Prepared) -> list[Alignment]:
    """What is to be found before planned merges begin, each once."""
    return list(dict.fromkeys(one for group in prepared.groups for one in group.alignments))


def margins_of(alignment: Alignment, path: Path, progress: Progress | None = None) -> Margins:
    """The margins of a reference, which are computed where the file is not there."""

    def heard(group: AxisGroup, pending: int, seconds: float) -> None:
        if progress is not None:
            progress(Visit(MARGINS, 0, group, 0.0, 0.0, 0, pending, seconds))

    reference = alignment.pair.reference
    if not reference.files():
        raise OptionError("margins are kept for a reference that is a file", hint="save it, or leave out margins")
    digest = hashlib.sha256((_hash(reference) + reference.view_of()).encode("utf-8", "surrogatepass")).hexdigest()
    if path.exists():
        return load_margins(path, digest)
    found = find_margins(CheckpointWeights(reference), alignment.pair.compared, heard)
    save_margins(found, path, digest)
    return found


def _hash(checkpoint: Checkpoint) -> str:
    return content_hash(checkpoint) if checkpoint.files() else ""


def refuse_existing(save: PathLike | None, *, overwrite: bool) -> None:
    """`OutputError` where permutations are to be kept in a file that is there."""
    if save is not None and Path(save).exists() and not overwrite:
        raise OutputError(f"{save} exists", hint="--overwrite replaces it")
