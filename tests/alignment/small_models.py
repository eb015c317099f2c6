"""Small models of known archs whose axis groups are known, with random permutations of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from remelt.alignment.files import SavedPermutations, save_permutations
from remelt.alignment.permutation import Permutation, permuted, random_permutation
from remelt.archs.axes.find import axis_groups
from remelt.archs.axis_groups import AxisGroup
from remelt.archs.model_parts import clip, unet, vae

Tensors = dict[str, torch.Tensor]


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensors:
    """Normal numbers in these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {key: (0.1 * torch.randn(shape, generator=generator)).to(dtype) for key, shape in shapes.items()}


def sd1(seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensors:
    """Stable Diffusion 1 with two layers of its text encoder, 32 channels wide."""
    parts = (
        unet(32, 64, linear_ends=False, in_channels=4),
        clip("cond_stage_model.transformer.text_model.", 2, 64, 100),
        vae("first_stage_model.", 32, 4),
    )
    return drawn({key: tuple(shape) for part in parts for key, shape in part}, seed, dtype)


def clip_l(seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensors:
    """CLIP's text encoder, 64 channels wide."""
    return drawn({key: tuple(shape) for key, shape in clip("text_model.", 12, 64, 20)}, seed, dtype)


def groups_of(arch: str, tensors: Tensors) -> tuple[AxisGroup, ...]:
    """All groups of a model."""
    return axis_groups(arch, {key: tuple(tensor.shape) for key, tensor in tensors.items()})


def shuffled(arch: str, tensors: Tensors, seed: int = 0, *, crossing: bool = True) -> SavedPermutations:
    """A random permutation of every group."""
    generator, groups = np.random.default_rng(seed), groups_of(arch, tensors)
    found: dict[str, Permutation] = {
        group.name: random_permutation(group, generator)
        for group in groups
        if not group.is_fixed and (crossing or not group.crosses)
    }
    return SavedPermutations(found, groups, {key: tuple(one.shape) for key, one in tensors.items()}, arch)


def whole(tensors: Tensors, saved: SavedPermutations) -> Tensors:
    """The permuted model by the definition, in memory."""
    return permuted(tensors, saved.permutations.values())


def write(folder: Path, name: str, tensors: Tensors) -> Path:
    """A model's file."""
    path = folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def write_permutations(folder: Path, name: str, saved: SavedPermutations) -> Path:
    """A permutation file."""
    return save_permutations(saved, folder / f"{name}.safetensors")
