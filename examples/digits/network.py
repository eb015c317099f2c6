"""A small residual network on handwritten digits, and its training: what the demonstration has instead of a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

CLASSES = 10
PIXELS = 64
WIDTH = 64
DEPTH = 3


class Block(nn.Module):
    """A residual step: normalise, widen, narrow, add."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """[images, WIDTH] to the same."""
        return x + self.mlp(self.norm(x))  # type: ignore[no-any-return]


class Network(nn.Module):
    """Images of 8 x 8 pixels to a score for each digit."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PIXELS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[images, PIXELS] to [images, CLASSES]."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Split:
    """Images, [count, PIXELS] in 0 to 1, with their digits."""

    images: Tensor
    digits: Tensor

    def only(self, chosen: Tensor) -> Split:
        """Those where the mask is true."""
        return Split(self.images[chosen], self.digits[chosen])

    def first(self, count: int) -> Split:
        """The first ones."""
        return Split(self.images[:count], self.digits[:count])


def load_splits() -> tuple[Split, Split, Split]:
    """The digits of scikit-learn for training, for choosing numbers, and for the final test."""
    found = load_digits()
    order = np.random.RandomState(0).permutation(len(found.target))
    images = torch.tensor(found.data[order] / 16.0, dtype=torch.float32)
    digits = torch.tensor(found.target[order])
    train, choose, test = (slice(0, 900), slice(900, 1300), slice(1300, None))
    return Split(images[train], digits[train]), Split(images[choose], digits[choose]), Split(images[test], digits[test])


def train(network: Network, split: Split, *, epochs: int, rate: float, seed: int) -> Network:
    """The same network after some epochs of AdamW; repeatable."""
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    for _ in range(epochs):
        for batch in torch.randperm(len(split.digits), generator=order).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(split.images[batch]), split.digits[batch]).backward()
            optimizer.step()
    return network


@torch.no_grad()
def accuracy(tensors: dict[str, Tensor], split: Split) -> float:
    """The share of digits that a network with these tensors recognises."""
    network = Network()
    network.load_state_dict(tensors)
    return float((network(split.images).argmax(1) == split.digits).double().mean())
