"""REPAIR: the statistics that a merged model's channels should have, set from data.

After Jordan, Sedghi, Saukh, Entezari and Neyshabur, "REPAIR" (2211.08403). What averaged weights answer varies less
than what either model answers. Where batch normalisations follow, their running statistics are computed anew; elsewhere
each channel is scaled and shifted to the mean and deviation that lie between those of both models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from remelt.alignment.running import call, channels_of, evaluated, rows, watched
from remelt.errors import OptionError, RefusedError


@dataclass
class Statistics:
    """Means and variances of channels, added up in float64."""

    count: int = 0
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    squares: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, numbers: torch.Tensor) -> None:
        """Add rows of numbers, one column for each channel."""
        exact = numbers.double()
        self.count += len(exact)
        self.sums = self.sums + exact.sum(dim=0)
        self.squares = self.squares + exact.square().sum(dim=0)

    @property
    def mean(self) -> torch.Tensor:
        """Of each channel; float64."""
        return self.sums / self.count

    @property
    def variance(self) -> torch.Tensor:
        """Of each channel, the unbiased estimate; float64."""
        spread = self.squares / self.count - self.mean.square()
        return spread.clamp(min=0.0) * (self.count / max(self.count - 1, 1))


def repair(
    module: nn.Module,
    batches: Iterable[Any],
    *,
    endpoints: tuple[nn.Module, nn.Module] | None = None,
    alpha: float = 0.5,
    layers: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """Set the statistics of a merged module from data, in place; the names of the parts that were set.

    ``batches`` are tensors, tuples of positional arguments, or mappings of keyword arguments. Without ``endpoints`` the
    running statistics of all batch normalisations are computed anew, in one pass. With ``endpoints``, the two models of
    which the module is a mean (the second aligned to the first, ``alpha`` its share), each linear map and convolution
    with a bias is scaled and shifted, channel by channel: its answers then have the means and standard deviations that
    lie between those of both. They are set in the order in which they run, one pass over ``batches`` for each; the last
    one, whose answers are the module's, is left as it is. ``layers`` names others than these.

    Raises `RefusedError` where there is nothing to set, or no data; `OptionError` for batches that can be gone through
    once only and are needed more often, and for layers that cannot be set.
    """
    if endpoints is None:
        return _recomputed(module, batches)
    if iter(batches) is batches:
        raise OptionError(
            "REPAIR by two models goes through the batches several times, but got an iterator, which can be used once",
            hint="give a list of batches, or a data loader itself",
        )
    return _rescaled(module, batches, endpoints, alpha, layers)


def _recomputed(module: nn.Module, batches: Iterable[Any]) -> tuple[str, ...]:
    """Running statistics anew: each batch is normalised by its own meanwhile, as in training."""
    norms = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm) and part.running_mean is not None and part.running_var is not None
    }
    if not norms:
        raise RefusedError(
            "REPAIR computes the running statistics of batch normalisations anew, and this module has none",
            hint="give the two models that it is a mean of as endpoints",
        )
    kept = {name: [one.clone() for one in part.buffers()] for name, part in norms.items()}
    found = {name: Statistics() for name in norms}

    def hear(name: str, given: Any, _: torch.Tensor) -> None:
        found[name].add(rows(given[0], 1))

    with evaluated(module):
        try:
            with watched(module, norms, hear):
                for part in norms.values():
                    part.training = True
                _run(module, batches)
        finally:
            for name, part in norms.items():
                for one, before in zip(part.buffers(), kept[name], strict=True):
                    one.copy_(before)
        for name, part in norms.items():
            if found[name].count:
                part.get_buffer("running_mean").copy_(found[name].mean)
                part.get_buffer("running_var").copy_(found[name].variance)
    return tuple(name for name in norms if found[name].count)


def _run(module: nn.Module, batches: Iterable[Any]) -> None:
    done = 0
    for batch in batches:
        call(module, batch)
        done += 1
    if not done:
        raise RefusedError("statistics are computed from data, but there are no batches")


def _rescaled(
    module: nn.Module,
    batches: Iterable[Any],
    endpoints: tuple[nn.Module, nn.Module],
    alpha: float,
    layers: Sequence[str] | None,
) -> tuple[str, ...]:
    parts = dict(module.named_modules())
    linear = [name for name, part in parts.items() if _is_linear(part)]
    settable = [name for name in linear if parts[name].bias is not None]
    strange = [name for name in layers or () if name not in settable]
    if strange:
        raise OptionError(
            f"REPAIR sets linear maps and convolutions that have a bias, but {strange[0]} is none",
            hint=f"one of {', '.join(settable)}" if settable else None,
        )
    with evaluated(module, *endpoints):
        ends = [_statistics(one, linear if layers is None else layers, batches) for one in endpoints]
        order = list(ends[0])
        chosen = [name for name in order[:-1] if name in settable] if layers is None else order
        if not chosen:
            raise RefusedError("REPAIR sets linear maps and convolutions that have a bias, but none of them is run")
        for name in chosen:
            now = _statistics(module, [name], batches)[name]
            _set(parts[name], now, [one[name] for one in ends], alpha)
    return tuple(chosen)


def _is_linear(part: nn.Module) -> bool:
    return channels_of(part) is not None and (isinstance(part, nn.Linear) or "Conv" in type(part).__name__)


def _statistics(module: nn.Module, names: Sequence[str], batches: Iterable[Any]) -> dict[str, Statistics]:
    """Of the answers of some parts, in the order in which they are first run."""
    found: dict[str, Statistics] = {}
    parts = dict(module.named_modules())

    def hear(name: str, _: Any, answer: torch.Tensor) -> None:
        channels = channels_of(parts[name])
        assert channels is not None
        found.setdefault(name, Statistics()).add(rows(answer, channels[1]))

    with watched(module, names, hear):
        _run(module, batches)
    return found


def _set(part: nn.Module, now: Statistics, ends: Sequence[Statistics], alpha: float) -> None:
    """Scale and shift what a part answers; channels that never change are only shifted."""
    channels = channels_of(part)
    assert channels is not None
    mean = torch.lerp(ends[0].mean, ends[1].mean, alpha)
    deviation = torch.lerp(ends[0].variance.sqrt(), ends[1].variance.sqrt(), alpha)
    own = now.variance.sqrt()
    scale = torch.where(own > 1e-5 * deviation, deviation / own, 1.0)
    weight, bias = part.get_parameter("weight"), part.get_parameter("bias")
    shape = [-1 if axis == channels[0] else 1 for axis in range(weight.dim())]
    weight.copy_(weight.double() * scale.view(shape))
    bias.copy_((bias.double() - now.mean) * scale + mean)
