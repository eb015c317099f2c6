"""Modules run on a user's data, while what some of their parts answer is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_LAST, _SECOND = -1, 1
_KINDS: Mapping[type[nn.Module], tuple[int, int]] = {
    nn.Linear: (0, _LAST),
    nn.Embedding: (1, _LAST),
    nn.LayerNorm: (0, _LAST),
    nn.RMSNorm: (0, _LAST),
    nn.GroupNorm: (0, _SECOND),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), (0, _SECOND)),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), (1, _SECOND)),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), (0, _SECOND)),
}
"""Of torch's own modules the axis of ``weight`` that makes the channels of what they answer, and where those lie."""


def channels_of(module: nn.Module) -> tuple[int, int] | None:
    """The axis of a module's weight that makes the channels of its answers, and the answers' dimension of them.

    None of other modules than torch's own, and of those that answer in a way of their own.

    >>> channels_of(nn.Conv2d(1, 4, 3))
    (0, 1)
    """
    for kind, found in _KINDS.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            whole = isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) > 1
            return None if whole else found
    return None


def rows(answer: torch.Tensor, dimension: int) -> torch.Tensor:
    """Answers as a matrix, one column for each channel.

    >>> rows(torch.zeros(2, 3, 5, 5), 1).shape
    torch.Size([50, 3])
    """
    return answer.detach().movedim(dimension, -1).reshape(-1, answer.shape[dimension])


def call(module: nn.Module, batch: Any) -> Any:
    """Run a module on a batch: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments."""
    if isinstance(batch, Mapping):
        return module(**batch)
    if isinstance(batch, tuple | list):
        return module(*batch)
    return module(batch)


@contextmanager
def evaluated(*modules: nn.Module) -> Iterator[None]:
    """Within it modules are in evaluation mode and no gradients are kept; then each is as it was."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for part, _ in modes:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def watched(
    module: nn.Module, names: Iterable[str], hear: Callable[[str, Any, torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
    """Within it ``hear`` is told the name, the inputs and the answer of some parts whenever they are run."""
    parts = dict(module.named_modules())

    def of(name: str) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor | None]:
        return lambda part, given, answer: hear(name, given, answer)

    handles = [parts[name].register_forward_hook(of(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
