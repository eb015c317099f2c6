"""A model that runs, and the tensors of the original layout that it is run with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from remelt.archs.axes.heads import Heads
from remelt.archs.axis_groups import Shapes
from remelt.core.pieces import Converted, Piece
from remelt.core.tensor_info import TensorInfo
from remelt.errors import MissingExtraError
from remelt.tensors import FROM_TORCH

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Instance:
    """A small model of an arch. ``tensors`` are those of a file in the original layout, in float64.

    ``module`` runs on ``inputs``. ``parameters`` tells, by its name in the module, of which rows of ``tensors`` each of
    the module's tensors consists. ``heads`` are the head rules that this model needs.
    """

    arch: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    tensors: Tensors
    parameters: Mapping[str, Converted]
    heads: Heads

    @property
    def shapes(self) -> Shapes:
        """The shape of each tensor by its key."""
        return {key: tuple(tensor.shape) for key, tensor in self.tensors.items()}

    def function(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """What the model computes of its inputs with these tensors in place of its own."""
        inside = {name: _put_together(one, tensors) for name, one in self.parameters.items()}
        with torch.no_grad():
            found = torch.func.functional_call(self.module, inside, self.inputs)
        return (found,) if isinstance(found, Tensor) else tuple(found)


def instance_of(
    arch: str,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    heads: Heads,
    *,
    seed: int = 0,
    originals: Callable[[Mapping[str, TensorInfo]], Mapping[str, Converted]] | None = None,
    parameters: Callable[[Mapping[str, TensorInfo]], Mapping[str, Converted]] | None = None,
) -> Instance:
    """An instance of a module, with random numbers in every tensor.

    ``originals`` tells the tensors of the original layout by those of the module, ``parameters`` the other way round;
    by default both have the same names.
    """
    module = module.double().eval()
    own = randomised(module, seed)
    made = (originals or same)(infos_of(own))
    tensors = {key: _put_together(one, own) for key, one in made.items()}
    return Instance(arch, module, inputs, tensors, (parameters or same)(infos_of(tensors)), heads)


def randomised(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """Random numbers for every tensor of a module that is no whole number, each as large as such a tensor's may be.

    Norms and biases differ from channel to channel, so that a permutation that forgets one of them shows.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        last = name.rpartition(".")[2]
        if last == "running_var":
            found[name] = noise.abs() + 0.5
        elif tensor.ndim < 2:
            found[name] = 0.3 * noise + (last == "weight")
        else:
            found[name] = noise / (tensor.numel() // tensor.shape[0]) ** 0.5
    return found


def same(infos: Mapping[str, TensorInfo]) -> dict[str, Converted]:
    """Every tensor as it is, under its own name."""
    return {key: Converted(info, (Piece(key, 0, info.shape[0] if info.shape else 1),)) for key, info in infos.items()}


def infos_of(tensors: Tensors) -> dict[str, TensorInfo]:
    """The types and shapes of tensors."""
    return {key: TensorInfo(FROM_TORCH[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()}


def missing(error: ModuleNotFoundError) -> MissingExtraError:
    """What is said where a package is missing that models are made with."""
    return MissingExtraError(
        f"a model to check a specification with needs {error.name}", hint='pip install "remelt[rebasin-check]"'
    )


def _put_together(made: Converted, tensors: Tensors) -> Tensor:
    rows = [tensors[piece.key] for piece in made.pieces]
    if made.info.shape:
        rows = [row[piece.start : piece.stop] for row, piece in zip(rows, made.pieces, strict=True)]
    found = rows[0] if len(rows) == 1 else torch.cat(rows)
    return (found.T if made.transposed else found).reshape(made.info.shape)
