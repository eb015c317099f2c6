"""Rotations within attention heads, which leave a model's function as permutations do: orthogonal Procrustes.

A head answers ``o v x``: any rotation of its values is undone by the columns that read them. It compares ``q x`` with
``k y``: what rotates both is not seen either, unless a rotary embedding or a normalisation stands between. After the
permutations are found, each head is turned to where it lies nearest to the reference: with ``M`` the inner products of
the reference's channels with the model's and ``u s w`` its singular values, by ``u w`` (Schönemann 1966).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from remelt.alignment.matching import Match
from remelt.alignment.permutation import Permutation, Permutations, Rotations
from remelt.alignment.products import permuted_around
from remelt.alignment.weights import Weights, free_windows
from remelt.archs.axes.draft import HEAD, QK, VALUE
from remelt.archs.axis_groups import AxisGroup, Level, Shapes, Window
from remelt.errors import RefusedError

_NOISE = 1e-6


@dataclass(frozen=True)
class Turn:
    """How one axis of a tensor is turned, head by head."""

    axis: int
    elements: torch.Tensor
    """Where the channels lie on the axis: ``[heads, queries, size]``."""
    matrices: torch.Tensor
    """``[heads, size, size]``."""


def rotatable(group: AxisGroup, shapes: Shapes) -> tuple[str, ...]:
    """The levels of a group that may be rotated: values, queries and keys of heads that nothing else looks at.

    Levels that are fixed (rotary embeddings) or shared by heads are not, nor those on which numbers of a normalisation
    lie. A group does not tell what is done to each number apart between two linear maps: where an attention takes, say,
    the exponential of its queries, they may be permuted, but must not be rotated.
    """
    return tuple(
        level.name for level in group.levels if _stands_below_heads(group, level) and _is_linear(level, group, shapes)
    )


def _stands_below_heads(group: AxisGroup, level: Level) -> bool:
    return level.name in (QK, VALUE) and level.below == (HEAD,) and not level.fixed and not level.cells


def _is_linear(level: Level, group: AxisGroup, shapes: Shapes) -> bool:
    """Whether only linear maps lie on a level: rows or columns of matrices, and the biases that belong to such rows."""
    windows = [window for window in group.windows if level.name in window.levels]
    if any(window.chooses for window in windows):
        return False
    made = {window.key for window in windows if window.axis == 0 and len(shapes[window.key]) > 1}
    for window in windows:
        if window.run > 1 or window.levels[-1] != level.name:
            return False
        if len(shapes[window.key]) == 1 and _matrix_of(window.key) not in made:
            return False
    return bool(windows)


def _matrix_of(bias: str) -> str | None:
    return bias.removesuffix("bias") + "weight" if bias.endswith("bias") else None


def find_rotations(
    reference: Weights, model: Weights, groups: Sequence[AxisGroup], permutations: Permutations
) -> dict[str, dict[str, torch.Tensor]]:
    """The rotations under which each head of a model, permuted so, lies nearest to the reference's, in float64.

    Levels that may not be rotated, and those that no rotation betters, are left out.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for group, name, matrices, _ in _nearest(reference, model, groups, permutations):
        found.setdefault(group.name, {})[name] = matrices
    return found


def turned(found: Match, reference: Weights, model: Weights, groups: Sequence[AxisGroup]) -> Match:
    """A match with its heads turned, too: rotations as a file keeps them, in float32, and the objective with them.

    They are computed on one thread, since the last bits depend on how many there are.
    """
    rotations: dict[str, dict[str, torch.Tensor]] = {}
    after = found.after
    with _one_thread():
        for group, name, matrices, gain in _nearest(reference, model, groups, found.permutations):
            rotations.setdefault(group.name, {})[name] = matrices.float()
            after += gain
    return replace(found, rotations=rotations, after=after)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _nearest(
    reference: Weights, model: Weights, groups: Sequence[AxisGroup], permutations: Permutations
) -> Iterator[tuple[AxisGroup, str, torch.Tensor, float]]:
    """The levels that are better rotated: by what, and how much the sum of the inner products gains."""
    lying = free_windows(groups)
    for group in groups:
        for name in rotatable(group, model.shapes) if not group.is_fixed else ():
            products = torch.zeros((), dtype=torch.float64)
            for window in group.windows:
                if name in window.levels:
                    theirs, axes = permuted_around(window.key, None, None, model, lying, permutations)
                    for axis, index in axes.items():
                        theirs = theirs.index_select(axis, torch.from_numpy(index))
                    elements = _elements(group, window)
                    ours, theirs = (
                        _channels(one, window.axis, elements).double() for one in (reference.tensor(window.key), theirs)
                    )
                    products = products + ours @ theirs.transpose(1, 2)
            left, values, right = torch.linalg.svd(products)
            gain = float(values.sum() - products.diagonal(dim1=1, dim2=2).sum())
            if gain > _NOISE * float(values.sum()):
                yield group, name, left @ right, gain


def inverse_rotations(
    groups: Iterable[AxisGroup], permutations: Permutations, rotations: Rotations
) -> dict[str, dict[str, torch.Tensor]]:
    """What undoes rotations once the permutations before them are undone: their transposes, in the order of before."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for group in groups:
        undone = permutations.get(group.name, Permutation(group, {})).inverse()
        for name, matrices in rotations.get(group.name, {}).items():
            below = group.by_name[name].below
            heads, channels = (torch.from_numpy(one.copy()) for one in undone.coordinates((*below, name)))
            back = matrices.transpose(1, 2)[heads[:, :1, None], channels[:, :, None], channels[:, None, :]]
            found.setdefault(group.name, {})[name] = back
    return found


def _elements(group: AxisGroup, window: Window) -> torch.Tensor:
    positions = torch.from_numpy(group.positions(window))
    return positions.reshape(positions.shape[0], -1, positions.shape[-1])


def _channels(tensor: torch.Tensor, axis: int, elements: torch.Tensor) -> torch.Tensor:
    """What a tensor has at each channel of each head: ``[heads, size, all else]``."""
    heads, queries, size = elements.shape
    chosen = tensor.movedim(axis, 0)[elements.reshape(-1)].reshape(heads, queries, size, -1)
    return chosen.transpose(1, 2).reshape(heads, size, -1)


def turns_by_key(groups: Iterable[AxisGroup], rotations: Rotations, shapes: Shapes) -> dict[str, list[Turn]]:
    """For each tensor that rotations change, how.

    Raises `RefusedError` for a level that may not be rotated, and for a group that is not there.
    """
    by_name = {group.name: group for group in groups}
    found: dict[str, list[Turn]] = {}
    for name, levels in rotations.items():
        if name not in by_name:
            raise RefusedError(f"rotations belong to groups of the model, but it has no group {name}")
        group = by_name[name]
        for level, matrices in levels.items():
            _refuse_unrotatable(group, level, matrices, shapes)
            for window in group.windows:
                if level in window.levels:
                    found.setdefault(window.key, []).append(Turn(window.axis, _elements(group, window), matrices))
    return found


def _refuse_unrotatable(group: AxisGroup, level: str, matrices: torch.Tensor, shapes: Shapes) -> None:
    if level not in rotatable(group, shapes):
        raise RefusedError(
            f"level {level} of {group.name} may only be permuted: something lies on it that is no linear map, "
            "or a rotary embedding fixes it",
            hint=f"leave {level} out of the rotations of this group",
        )
    heads, size = group.extent(group.by_name[level])
    if tuple(matrices.shape) != (heads, size, size):
        raise RefusedError(
            f"level {level} of {group.name} is rotated by [{heads}, {size}, {size}], got {list(matrices.shape)}"
        )


def rotated_tensor(tensor: torch.Tensor, turns: Sequence[Turn]) -> torch.Tensor:
    """A permuted tensor with the axes turned that are: a new one, of the same type.

    It is computed in float32, of float64 in float64.
    """
    exact = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    found = tensor.to(exact, copy=True)
    for turn in turns:
        heads, queries, size = turn.elements.shape
        view = found.movedim(turn.axis, 0)
        channels = view[turn.elements.reshape(-1)].reshape(heads, queries, size, -1)
        turned = turn.matrices[:, None].to(exact) @ channels
        view[turn.elements.reshape(-1)] = turned.reshape(heads * queries * size, *view.shape[1:])
    return found.to(tensor.dtype)


def rotated(
    tensors: Mapping[str, torch.Tensor], groups: Iterable[AxisGroup], rotations: Rotations
) -> dict[str, torch.Tensor]:
    """A permuted model with its heads turned; tensors that no rotation changes are the same."""
    turns = turns_by_key(groups, rotations, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    return dict(tensors) | {key: rotated_tensor(tensors[key], found) for key, found in turns.items()}
