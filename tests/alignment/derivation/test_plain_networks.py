"""Networks in plain torch, like those of timm and torchvision: all that can be permuted is derived, and no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

IMAGE = (1, 3, 16, 16)


class Residual(nn.Module):
    """A path beside a shortcut."""

    def __init__(self, path: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.path = path
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.path(x) + self.shortcut(x)


class Pooled(nn.Module):
    """Features, their mean over the image, classes."""

    def __init__(self, features: nn.Module, width: int) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def conv(inner: int, outer: int, kernel: int = 3, groups: int = 1, stride: int = 1) -> nn.Sequential:
    """A convolution with BatchNorm and ReLU."""
    maps = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(maps, nn.BatchNorm2d(outer), nn.ReLU())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3))


def resnet() -> nn.Module:
    def block(inner: int, outer: int) -> nn.Module:
        path = nn.Sequential(conv(inner, outer), nn.Conv2d(outer, outer, 3, padding=1), nn.BatchNorm2d(outer))
        shortcut = None if inner == outer else nn.Sequential(nn.Conv2d(inner, outer, 1), nn.BatchNorm2d(outer))
        return nn.Sequential(Residual(path, shortcut), nn.ReLU())

    return Pooled(nn.Sequential(conv(3, 8), block(8, 8), block(8, 8), block(8, 12), block(12, 12)), 12)


def vgg() -> nn.Module:
    features = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(2),
    )
    return nn.Sequential(features, nn.Flatten(), nn.Linear(32, 10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 5))


class DenseBlock(nn.Module):
    def __init__(self, width: int, growth: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(width + growth * number),
                nn.ReLU(),
                conv(width + growth * number, 8, 1),
                nn.Conv2d(8, growth, 3, padding=1),
            )
            for number in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        return torch.cat(found, 1)


def densenet() -> nn.Module:
    norm = nn.Sequential(nn.BatchNorm2d(14), nn.ReLU())
    return Pooled(nn.Sequential(conv(3, 6), DenseBlock(6, 4, 2), norm, nn.Conv2d(14, 6, 1), DenseBlock(6, 4, 1)), 10)


def mobilenet_v2() -> nn.Module:
    def inverted(inner: int, outer: int) -> nn.Module:
        hidden = inner * 2
        return nn.Sequential(
            conv(inner, hidden, 1),
            conv(hidden, hidden, 3, groups=hidden),
            nn.Conv2d(hidden, outer, 1),
            nn.BatchNorm2d(outer),
        )

    return Pooled(nn.Sequential(conv(3, 6), inverted(6, 8), Residual(inverted(8, 8)), inverted(8, 10)), 10)


class Fire(nn.Module):
    def __init__(self, inner: int, squeeze: int, outer: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inner, squeeze, 1)
        self.one = nn.Conv2d(squeeze, outer, 1)
        self.three = nn.Conv2d(squeeze, outer, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.one(x).relu(), self.three(x).relu()], 1)


def squeezenet() -> nn.Module:
    return nn.Sequential(Fire(3, 4, 6), nn.MaxPool2d(2), Fire(12, 5, 7), nn.Conv2d(14, 5, 1), nn.AdaptiveAvgPool2d(1))


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width * 2)
        self.down = nn.Linear(width * 2, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.down(functional.gelu(self.up(y)))).permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    return Pooled(nn.Sequential(nn.Conv2d(3, 6, 4, 4), ConvNeXtBlock(6), ConvNeXtBlock(6), nn.Conv2d(6, 8, 2, 2)), 8)


class MixerBlock(nn.Module):
    def __init__(self, places: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.tokens = nn.Sequential(nn.Linear(places, 7), nn.GELU(), nn.Linear(7, places))
        self.channels = nn.Sequential(nn.Linear(width, 9), nn.GELU(), nn.Linear(9, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norms[0](x).mT).mT
        return x + self.channels(self.norms[1](x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, 4)
        self.blocks = nn.Sequential(MixerBlock(16, 6), MixerBlock(16, 6))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class FusedAttention(nn.Module):
    """Attention of timm: queries, keys and values in one map, norms of queries and keys if wanted."""

    def __init__(self, width: int, heads: int, norm: bool = False, bias_in_parts: bool = False) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width, bias=not bias_in_parts)
        self.q_bias = nn.Parameter(torch.zeros(width)) if bias_in_parts else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if bias_in_parts else None
        self.q_norm, self.k_norm = (nn.LayerNorm(self.size) if norm else nn.Identity() for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        batch, places, width = x.shape
        parts = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            parts = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        fused = functional.linear(x, self.qkv.weight, parts).reshape(batch, places, 3, self.heads, self.size)
        q, k, v = fused.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (self.q_norm(q) * self.size**-0.5) @ self.k_norm(k).transpose(-2, -1)
        scores = scores if bias is None else scores + bias
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, places, width))


class Block(nn.Module):
    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class FusedViT(nn.Module):
    """A vision transformer with a class token and positions."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.token, self.places = nn.Parameter(torch.zeros(1, 1, 12)), nn.Parameter(torch.zeros(1, 17, 12))
        self.blocks = nn.Sequential(*(Block(12, FusedAttention(12, 3, **options)) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


class WindowAttention(nn.Module):
    """Attention in shifted windows with a bias by relative place and head."""

    def __init__(self, width: int, heads: int, shift: int) -> None:
        super().__init__()
        self.attention, self.shift = FusedAttention(width, heads), shift
        self.table = nn.Parameter(torch.zeros(9, heads))
        row = torch.arange(4)
        places = (row[:, None] // 2 - row // 2 + 1) * 3 + row[:, None] % 2 - row % 2 + 1
        self.register_buffer("index", places)

    def forward(self, x: Tensor) -> Tensor:
        size, width = x.shape[1], x.shape[-1]
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = x.view(-1, size // 2, 2, size // 2, 2, width).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, width)
        bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
        x = self.attention(x, bias.unsqueeze(0))
        x = x.view(-1, size // 2, size // 2, 2, 2, width).permute(0, 1, 3, 2, 4, 5).reshape(-1, size, size, width)
        return torch.roll(x, (self.shift, self.shift), (1, 2))


class Merging(nn.Module):
    """Four neighbours as one place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, -1)))


class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 2, 2)
        self.first = nn.Sequential(*(Block(6, WindowAttention(6, 2, shift)) for shift in (0, 1)))
        self.merging = Merging(6)
        self.second = Block(12, WindowAttention(12, 3, 0))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.patches(x).permute(0, 2, 3, 1))
        return self.head(self.second(self.merging(x)).mean((1, 2)))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(functional.silu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


def efficientnet() -> nn.Module:
    def block(inner: int, outer: int) -> nn.Module:
        hidden = 2 * inner
        return nn.Sequential(
            conv(inner, hidden, 1),
            conv(hidden, hidden, 3, hidden),
            SqueezeExcite(hidden, 3),
            nn.Conv2d(hidden, outer, 1),
        )

    return Pooled(nn.Sequential(conv(3, 6), Residual(block(6, 6)), block(6, 8)), 8)


def resnext() -> nn.Module:
    def block(width: int, inner: int, groups: int) -> nn.Module:
        return Residual(nn.Sequential(conv(width, inner, 1), conv(inner, inner, 3, groups), nn.Conv2d(inner, width, 1)))

    return Pooled(nn.Sequential(conv(3, 8), block(8, 12, 3), block(8, 12, 3)), 8)


class ShuffleUnit(nn.Module):
    """Half of the channels is passed on, half goes through a path; then both are interleaved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        depthwise = nn.Sequential(nn.Conv2d(half, half, 3, padding=1, groups=half), nn.BatchNorm2d(half))
        self.path = nn.Sequential(conv(half, half, 1), depthwise, conv(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        x = torch.cat([left, self.path(right)], 1)
        batch, width, rows, columns = x.shape
        return x.view(batch, 2, width // 2, rows, columns).transpose(1, 2).reshape(x.shape)


def shufflenet() -> nn.Module:
    return Pooled(nn.Sequential(conv(3, 8), ShuffleUnit(8), ShuffleUnit(8)), 8)


class Conv1D(nn.Module):
    """A linear map stored the other way round."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(inner, outer)), nn.Parameter(torch.zeros(outer))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], len(self.bias))


class CausalAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.fused, self.proj = heads, Conv1D(width, 3 * width), Conv1D(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.fused(x).split(x.shape[-1], 2)
        q, k, v = (one.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for one in parts)
        found = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(found.transpose(1, 2).reshape(x.shape))


class GPT2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 8), nn.Embedding(16, 8)
        self.blocks = nn.Sequential(*(Block(8, CausalAttention(8, 2)) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        found = self.words(x) + self.places(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(found)))


class NeoXAttention(nn.Module):
    """Queries, keys and values beside each other in every head, with rotary places over a part of each."""

    def __init__(self, width: int, heads: int, rotary: int) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.fused, self.dense = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("turns", 1.0 / 100 ** (torch.arange(0, rotary, 2) / rotary), persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2])[:, None] * self.turns.repeat(2)
        turn, rest = x[..., : self.rotary], x[..., self.rotary :]
        half = self.rotary // 2
        other = torch.cat([-turn[..., half:], turn[..., :half]], -1)
        return torch.cat([turn * angles.cos() + other * angles.sin(), rest], -1)

    def forward(self, x: Tensor) -> Tensor:
        batch, places, _ = x.shape
        q, k, v = self.fused(x).view(batch, places, self.heads, -1).transpose(1, 2).chunk(3, -1)
        found = functional.scaled_dot_product_attention(self.turned(q), self.turned(k), v, is_causal=True)
        return self.dense(found.transpose(1, 2).reshape(x.shape))


class NeoX(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.block = nn.Embedding(11, 12), Block(12, NeoXAttention(12, 2, 4))
        self.head = nn.Linear(12, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.words(x)))


class Level(nn.Module):
    """A residual block with GroupNorm."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.shortcut = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(functional.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(functional.silu(self.norm2(y)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.one, self.two, self.up, self.end = Level(8, 8), Level(8, 16), Level(24, 8), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(self.start(x))
        two = functional.interpolate(self.two(self.down(one)), scale_factor=2, mode="nearest")
        return self.end(self.up(torch.cat([two, one], 1)))


def autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(6, 4, 4, 2, 1),
        nn.Flatten(),
        nn.Linear(64, 5),
        nn.Tanh(),
        nn.Linear(5, 64),
        nn.Unflatten(1, (4, 4, 4)),
        nn.ConvTranspose2d(4, 6, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 6, 3, 1, 1, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 3, 4, 2, 1),
    )


class SuperResolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start, self.up, self.end = (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Conv2d(6, 20, 3, padding=1),
            nn.Conv2d(5, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.end(functional.pixel_shuffle(self.up(self.start(x).relu()), 2).relu())


class GatedConvolutions(nn.Module):
    """A sequence model: causal convolutions with gates, and channels that are padded with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.conv = nn.Embedding(11, 6), nn.Conv1d(6, 16, 3)
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        found = self.words(x).transpose(1, 2)
        gated = functional.glu(self.conv(functional.pad(found, (2, 0))), 1)
        return self.head(self.norm(gated + functional.pad(found, (0, 0, 0, 2))).transpose(1, 2))


IMAGES = torch.randn(2, *IMAGE[1:], generator=torch.Generator().manual_seed(1))
WORDS = torch.arange(14).reshape(2, 7) % 11
TRANSFORMER = ["24", "24", "3(4 4)", "3(4 4)"]

# What can be permuted, counted by hand, and the tensors of which nothing can.
NETWORKS: list[tuple[Callable[[], nn.Module], Tensor, list[str], set[str]]] = [
    (mlp, torch.ones(1, 4), ["8", "6"], {"5.bias"}),
    (resnet, IMAGES, ["8", "8", "8", "12", "12", "12"], {"head.bias"}),
    (vgg, IMAGES, ["6", "8", "10"], {"5.bias"}),
    (densenet, IMAGES, ["6", "8", "4", "8", "4", "6", "8", "4"], {"head.bias"}),
    (mobilenet_v2, IMAGES, ["6", "12", "8", "16", "16", "10"], {"head.bias"}),
    (squeezenet, IMAGES, ["4", "6", "6", "5", "7", "7"], {"3.bias"}),
    (convnext, IMAGES, ["6", "12", "12", "8"], {"head.bias"}),
    (Mixer, IMAGES, ["6", "7", "9", "7", "9"], {"blocks.0.tokens.2.bias", "blocks.1.tokens.2.bias", "head.bias"}),
    (FusedViT, IMAGES, ["12", *TRANSFORMER], {"head.bias"}),
    (lambda: FusedViT(norm=True), IMAGES, ["12", "24", "24", "3(4) 4", "3(4) 4"], {"head.bias"}),
    (lambda: FusedViT(bias_in_parts=True), IMAGES, ["12", *TRANSFORMER], {"head.bias"}),
    (Swin, IMAGES, ["6", "12", "2(3 3)", "2(3 3)", "12", "12", "24", "3(4 4)"], {"head.bias"}),
    (efficientnet, IMAGES, ["6", "12", "12", "3", "3", "8"], {"head.bias"}),
    (resnext, IMAGES, ["8", "3(4) 4", "3(4) 4"], {"head.bias"}),
    (shufflenet, IMAGES, ["2", "2", "2", "2", "4", "4", "4", "4"], {"head.bias"}),
    (GPT2, WORDS, ["8", "16", "16", "2(4 4)", "2(4 4)"], set()),
    (NeoX, WORDS, ["12", "24", "2(2 6)"], {"head.bias"}),
    (UNet, IMAGES, ["2+2+2+2", "4(2)", "4(2)", "4(4)", "4(2)", "6+6+4", "8"], {"end.bias"}),
    (autoencoder, IMAGES, ["6", "4", "5", "4", "2(3) 3"], {"12.bias"}),
    (SuperResolution, IMAGES, ["6", "5"], {"end.bias"}),
    (GatedConvolutions, WORDS, ["6", "2"], {"head.bias"}),
]


@pytest.mark.parametrize(("make", "example", "groups", "still"), NETWORKS)
def test_all_that_can_be_permuted_is_found_and_keeps_the_function(
    make: Callable[[], nn.Module],
    example: Tensor,
    groups: list[str],
    still: set[str],
    trial: Callable[..., Any],
    assert_caught: Callable[[Any], None],
) -> None:
    found = trial(make(), example)
    assert found.spelled == sorted(groups)
    assert found.still == still
    assert found.error_of(found.free, seeds=3) < 1e-10
    assert_caught(found)
