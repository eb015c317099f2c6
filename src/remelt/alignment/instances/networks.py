"""Classifiers that torch alone can build: residual networks in torchvision's names, and chains of linear maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from remelt.alignment.instances.instance import Instance, instance_of

_CLASSES, _PIXELS, _SIZE, _BATCH = 7, 3, 16, 3


class Basic(nn.Module):
    """Two convolutions beside a stream."""

    widening = 1

    def __init__(self, into: int, width: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(into, width, stride)

    def forward(self, stream: Tensor) -> Tensor:
        found = torch.relu(self.bn1(self.conv1(stream)))
        return torch.relu(self.bn2(self.conv2(found)) + self.downsample(stream))


class Bottleneck(nn.Module):
    """A convolution of neighbours, maybe in groups, between two maps of channels."""

    widening = 4

    def __init__(self, into: int, width: int, stride: int, groups: int) -> None:
        super().__init__()
        out = self.widening * width
        self.conv1 = nn.Conv2d(into, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = _shortcut(into, out, stride)

    def forward(self, stream: Tensor) -> Tensor:
        found = torch.relu(self.bn1(self.conv1(stream)))
        found = torch.relu(self.bn2(self.conv2(found)))
        return torch.relu(self.bn3(self.conv3(found)) + self.downsample(stream))


class ResNet(nn.Module):
    """A residual network: of so many blocks a stage, each stage twice as wide as the one before."""

    def __init__(
        self, block: type[Basic] | type[Bottleneck], depths: Sequence[int], width: int, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(_PIXELS, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for stage, depth in enumerate(depths):
            blocks = []
            for number in range(depth):
                blocks.append(block(channels, width << stage, 2 if stage and not number else 1, groups))
                channels = block.widening * (width << stage)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.stages = len(depths)
        self.fc = nn.Linear(channels, _CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        stream = torch.relu(self.bn1(self.conv1(image)))
        for stage in range(self.stages):
            stream = self.get_submodule(f"layer{stage + 1}")(stream)
        found: Tensor = self.fc(stream.mean((2, 3)))
        return found


def resnet_instance(
    width: int = 8, seed: int = 0, *, depths: Sequence[int] = (2, 2), bottleneck: bool = False, groups: int = 1
) -> Instance:
    """A residual network in eval mode: ``width`` is that of the stem.

    Of bottlenecks, the convolutions of neighbours may be in ``groups``.
    """
    module = ResNet(Bottleneck if bottleneck else Basic, depths, width, groups)
    image = torch.randn(_BATCH, _PIXELS, _SIZE, _SIZE, generator=_generator(seed), dtype=torch.float64)
    return instance_of("resnet", module, (image,), {}, seed=seed)


def mlp_instance(width: int = 16, seed: int = 0, *, depth: int = 3) -> Instance:
    """A chain of ``depth`` linear maps, with norms and a pointwise function after each but the last."""
    parts: list[nn.Module] = []
    for number in range(depth - 1):
        norm = nn.BatchNorm1d(width) if number else nn.LayerNorm(width)
        parts += [nn.Linear(width if number else _SIZE, width), norm, nn.GELU()]
    module = nn.Sequential(*parts, nn.Linear(width, _CLASSES))
    vector = torch.randn(_BATCH, _SIZE, generator=_generator(seed), dtype=torch.float64)
    return instance_of("mlp", module, (vector,), {}, seed=seed)


def _shortcut(into: int, out: int, stride: int) -> nn.Module:
    if into == out and stride == 1:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed + 1)
