"""Surgery: what makes a model fit another one, or repairs what earlier tools broke."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import RecipeError
from remelt.recipe.method import AnySpace, Bindings, Group, Mass, Tensors, merge_method

_POSITIONS = "position_ids"


def _first_mass(masses: Sequence[Mass], values: Bindings) -> Mass:
    return masses[0]


def _are_alike(shapes: Sequence[tuple[int, ...]]) -> bool:
    return shapes[0] == shapes[1]


def _with_channels(shapes: Sequence[tuple[int, ...]], values: Bindings) -> tuple[int, ...]:
    shape, like = shapes
    if shape == like:
        return shape
    if len(shape) != len(like) or len(shape) < 2 or (shape[0], shape[2:]) != (like[0], like[2:]):
        raise RecipeError(
            f"match_channels changes the number of inputs (dimension 1), but has {list(shape)} to make {list(like)} of",
            hint="models of one arch, of which one has more input channels",
        )
    return like


@merge_method(cut="tensor", shape=_with_channels, unchanged=_are_alike, mass=_first_mass, workspace=1.0)
def match_channels(a: AnySpace, like: AnySpace) -> AnySpace:
    """A model with as many input channels as another: further ones are 0, and those that the other lacks are left out.

    Formula: r[:, i] = a[:, i] where a has the input i, else 0, for all i that ``like`` has; a where shapes are equal

    Spaces: any. Of ``like`` the shapes count alone, and its tensors are read only where they differ. An inpainting
    model of Stable Diffusion has 9 input channels, the normal one 4: ``inpainting + match_channels(a - base,
    inpainting)`` makes an inpainting model of ``a``.

    Source: what web UIs do when they merge inpainting models.

    >>> from torch import tensor
    >>> match_channels.on(tensor([[1.0, 2.0]]), tensor([[3.0, 4.0, 5.0]]))
    tensor([[1., 2., 0.]])
    """
    if a.shape == like.shape:
        return a.clone()
    found = torch.zeros(like.shape, dtype=a.dtype, device=a.device)
    count = min(a.shape[1], like.shape[1])
    found[:, :count] = a[:, :count]
    return found


def _positions(layout: Mapping[str, TensorInfo]) -> Sequence[Group]:
    return [
        Group((key,), (key,))
        for key, info in layout.items()
        if key.rpartition(".")[2] == _POSITIONS and len(info.shape) in (1, 2) and info.shape[:-1] in ((), (1,))
    ]


@merge_method(cut="model", keys=_positions, stores=DType.I64, workspace=1.0)
def repair_position_ids(a: Tensors) -> Tensors:
    """A model whose text encoders count their positions 0, 1, 2 and so on.

    Formula: p[i] = i, stored as int64, for every tensor named ``position_ids``; all others as they are

    Spaces: weights. Tools that averaged these numbers left some like 75.99 in many files of Stable Diffusion 1, which
    shift the words of a prompt; cut off to a whole number, they do so unseen. They are int64 where the text encoder is
    defined, and so they are here, whatever they were stored as. It costs nothing beside a copy.

    Source: the "fix clip ids" of web UIs.

    >>> from torch import tensor
    >>> repair_position_ids.on({"text_model.embeddings.position_ids": tensor([[0.0, 1.0, 1.99]])})
    {'text_model.embeddings.position_ids': tensor([[0., 1., 2.]])}
    """
    ((key, positions),) = a.items()
    counted = torch.arange(positions.shape[-1], dtype=positions.dtype, device=positions.device)
    return {key: counted.reshape(positions.shape)}
