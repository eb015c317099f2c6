"""How much better merging gets by alignment: small networks trained independently on scikit-learn's digits.

    python benchmarks/barriers.py                      all networks, the table of the documentation; some minutes
    python benchmarks/barriers.py --only perceptron    one of them
    python benchmarks/barriers.py --pairs 1 --epochs 8
    python benchmarks/barriers.py --one-cycle          a learning rate that falls to zero

The barrier is the loss halfway between two models less the mean loss of both, for pairs that differ in nothing but the
seed of their weights and of the order of images. Everything is seeded and runs on one thread. Needs ``remelt[demo]``
and ``remelt[rebasin]``.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, gelu, relu, scaled_dot_product_attention

from remelt.alignment.activations import match_activations
from remelt.alignment.many import match_many
from remelt.alignment.matching import match
from remelt.alignment.permutation import permuted
from remelt.alignment.repair import repair
from remelt.alignment.rotations import find_rotations, rotated
from remelt.alignment.weights import TensorWeights
from remelt.archs.axes.draft import Drafts
from remelt.archs.axis_groups import AxisGroup, Shapes, faults

Tensors = dict[str, torch.Tensor]
Groups = tuple[AxisGroup, ...]
EPOCHS, BATCH, RATE, DECAY = 20, 64, 1e-3, 0.01
PIXELS, CLASSES, TRAINING, MANY = 8, 10, 1437, 5


class Images(NamedTuple):
    """Digits and what they are."""

    images: torch.Tensor
    labels: torch.Tensor


def digits() -> tuple[Images, Images]:
    """Those to train with and those to test with, four fifths and one, in an order that is always the same."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images = torch.tensor(found.images[order] / 16, dtype=torch.float32)
    labels = torch.tensor(found.target[order])
    return Images(images[:TRAINING], labels[:TRAINING]), Images(images[TRAINING:], labels[TRAINING:])


class Perceptron(nn.Module):
    """Three hidden layers."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        widths = (PIXELS * PIXELS, width, width, width)
        self.layers = nn.ModuleList(nn.Linear(one, other) for one, other in pairwise(widths))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of images."""
        found = images.flatten(1)
        for layer in self.layers:
            found = relu(layer(found))
        return self.head(found)


def groups_of_perceptron(shapes: Shapes) -> Groups:
    """What of it is permuted alike."""
    drafts = Drafts(shapes)
    drafts.fixed("pixels", PIXELS * PIXELS).read_by("layers.0")
    for place, after in enumerate(("layers.1", "layers.2", "head")):
        width = shapes[f"layers.{place}.weight"][0]
        drafts.free(f"hidden.{place}", width).made_by(f"layers.{place}").read_by(after)
    drafts.fixed("classes", CLASSES).made_by("head")
    return drafts.finished()


class ResidualBlock(nn.Module):
    """Two normalised convolutions beside the stream."""

    def __init__(self, width: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        """The stream with what the block adds."""
        inner = self.conv1(relu(normalised(self.norm1, stream)))
        return stream + self.conv2(relu(normalised(self.norm2, inner)))


def normalised(norm: nn.Module, stream: torch.Tensor) -> torch.Tensor:
    """A stream of images normalised, by LayerNorm over the channels of each pixel."""
    if isinstance(norm, nn.LayerNorm):
        return norm(stream.movedim(1, -1)).movedim(-1, 1)
    return norm(stream)


class Residual(nn.Module):
    """Three residual blocks of convolutions, on images of half the size."""

    def __init__(self, width: int = 128, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(width, norm) for _ in range(3))
        self.norm = norm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of images."""
        stream = self.stem(images[:, None])
        for block in self.blocks:
            stream = block(stream)
        return self.head(relu(normalised(self.norm, stream)).mean(dim=(2, 3)))


def groups_of_residual(shapes: Shapes) -> Groups:
    """What of it is permuted alike."""
    drafts, width = Drafts(shapes), shapes["stem.weight"][0]
    drafts.fixed("pixels", 1).read_by("stem")
    stream = drafts.free("stream", width).made_by("stem").normalised_by("norm").read_by("head")
    for place in range(3):
        block = f"blocks.{place}"
        stream.normalised_by(f"{block}.norm1").read_by(f"{block}.conv1").made_by(f"{block}.conv2")
        inner = drafts.free(f"{block}.inner", width).made_by(f"{block}.conv1")
        inner.normalised_by(f"{block}.norm2").read_by(f"{block}.conv2")
    drafts.fixed("classes", CLASSES).made_by("head")
    return drafts.finished()


class TransformerLayer(nn.Module):
    """Attention and two linear maps beside the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        """The stream with what the layer adds."""
        seen = self.norm1(stream)
        q, k, v = (one(seen).unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (self.q, self.k, self.v))
        stream = stream + self.o(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return stream + self.down(gelu(self.up(self.norm2(stream))))


class Transformer(nn.Module):
    """Two layers that read an image's eight rows as words."""

    HEADS = 4

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.embed = nn.Linear(PIXELS, width)
        self.places = nn.Parameter(0.02 * torch.randn(PIXELS, width))
        self.layers = nn.ModuleList(TransformerLayer(width, self.HEADS) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of images."""
        stream = self.embed(images) + self.places
        for layer in self.layers:
            stream = layer(stream)
        return self.head(self.norm(stream).mean(dim=1))


def groups_of_transformer(shapes: Shapes) -> Groups:
    """What of it is permuted alike."""
    drafts, width = Drafts(shapes), shapes["embed.weight"][0]
    drafts.fixed("pixels", PIXELS).read_by("embed")
    drafts.fixed("rows", PIXELS).window("places", 0)
    stream = drafts.free("stream", width).made_by("embed").window("places", 1).normalised_by("norm").read_by("head")
    for place in range(2):
        layer = f"layers.{place}"
        stream.normalised_by(f"{layer}.norm1").normalised_by(f"{layer}.norm2")
        stream.made_by(f"{layer}.o").made_by(f"{layer}.down")
        for name in ("q", "k", "v", "up"):
            stream.read_by(f"{layer}.{name}")
        heads = drafts.attention(f"{layer}.heads", Transformer.HEADS, width // Transformer.HEADS)
        heads.made_by(f"{layer}.q", ("head", "qk")).made_by(f"{layer}.k", ("head", "qk"))
        heads.made_by(f"{layer}.v", ("head", "value")).read_by(f"{layer}.o", ("head", "value"))
        drafts.free(f"{layer}.hidden", 2 * width).made_by(f"{layer}.up").read_by(f"{layer}.down")
    drafts.fixed("classes", CLASSES).made_by("head")
    return drafts.finished()


@dataclass(frozen=True)
class Kind:
    """A kind of network and how it is merged beside plain averages and weight matching."""

    title: str
    make: Callable[[], nn.Module]
    groups: Callable[[Shapes], Groups]
    rotations: bool = False
    repaired: bool = False
    many: int = 0
    """How many networks are merged together; 0 for pairs."""


KINDS = {
    "perceptron": Kind("perceptron, 3 x 512", Perceptron, groups_of_perceptron),
    "perceptrons": Kind(f"{MANY} perceptrons, 3 x 512", Perceptron, groups_of_perceptron, many=MANY),
    "residual": Kind("residual, LayerNorm, width 128", Residual, groups_of_residual),
    "transformer": Kind("transformer, 2 layers, width 256", Transformer, groups_of_transformer, rotations=True),
    "batchnorm": Kind(
        "residual, BatchNorm, width 64", lambda: Residual(64, nn.BatchNorm2d), groups_of_residual, repaired=True
    ),
}


class Training(NamedTuple):
    """How long networks are trained, and whether the rate rises and falls on the way."""

    epochs: int
    one_cycle: bool


def trained(kind: Kind, seed: int, data: Images, training: Training) -> nn.Module:
    """A network trained from a seed."""
    torch.manual_seed(seed)
    net = kind.make()
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=DECAY)
    steps = training.epochs * -(-len(data.labels) // BATCH)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, steps) if training.one_cycle else None
    for _ in range(training.epochs):
        for chosen in torch.randperm(len(data.labels)).split(BATCH):
            optimiser.zero_grad()
            cross_entropy(net(data.images[chosen]), data.labels[chosen]).backward()
            optimiser.step()
            if cycle is not None:
                cycle.step()
    return net.eval()


class Score(NamedTuple):
    """The losses of a network, and the share of test images that it names rightly."""

    training: float
    test: float
    accuracy: float


@torch.no_grad()
def score(net: nn.Module, tensors: Tensors, data: tuple[Images, Images]) -> Score:
    """What a network with these tensors makes of the digits."""
    logits = [torch.func.functional_call(net, tensors, (one.images,)) for one in data]
    losses = [float(cross_entropy(given, one.labels)) for given, one in zip(logits, data, strict=True)]
    return Score(*losses, float((logits[1].argmax(dim=1) == data[1].labels).float().mean()))


def mean(models: Sequence[Tensors]) -> Tensors:
    """The mean of models."""
    return {key: sum((one[key] for one in models[1:]), models[0][key]) / len(models) for key in models[0]}


def tensors_of(net: nn.Module) -> Tensors:
    """What is merged: weights and running statistics."""
    return {key: one.detach() for key, one in net.state_dict().items() if one.is_floating_point()}


class Result(NamedTuple):
    """A way to merge, and what it gives."""

    way: str
    middle: Score
    ends: Score


def merges_of_pair(kind: Kind, nets: Sequence[nn.Module], data: tuple[Images, Images]) -> Iterator[Result]:
    """Two networks merged in all ways."""
    net, other = nets
    ours, theirs = tensors_of(net), tensors_of(other)
    groups = kind.groups({key: tuple(one.shape) for key, one in ours.items()})
    batches = list(data[0].images.split(256))

    def result(way: str, moved: Tensors, *, mended: bool = False) -> Result:
        ends = [score(net, one, data) for one in (ours, moved)]
        middle = mean([ours, moved])
        if mended:
            merged = copy.deepcopy(net)
            merged.load_state_dict(middle, strict=False)
            repair(merged, batches)
            middle = tensors_of(merged)
        return Result(way, score(net, middle, data), Score(*(sum(pair) / 2 for pair in zip(*ends, strict=True))))

    yield result("as they are", theirs)
    if kind.repaired:
        yield result("as they are, REPAIR", theirs, mended=True)
    found = match(TensorWeights(ours), TensorWeights(theirs), groups)
    aligned = permuted(theirs, found.permutations.values())
    yield result("weight matching", aligned)
    if kind.rotations:
        turns = find_rotations(TensorWeights(ours), TensorWeights(theirs), groups, found.permutations)
        yield result("weight matching, rotations", rotated(aligned, groups, turns))
    if kind.repaired:
        yield result("weight matching, REPAIR", aligned, mended=True)
    answers = match_activations(net, other, groups, batches)
    aligned = permuted(theirs, answers.permutations.values())
    yield result("activation matching", aligned)
    if kind.repaired:
        yield result("activation matching, REPAIR", aligned, mended=True)


def merges_of_many(kind: Kind, nets: Sequence[nn.Module], data: tuple[Images, Images]) -> Iterator[Result]:
    """Several networks merged in all ways."""
    models = [tensors_of(net) for net in nets]
    groups = kind.groups({key: tuple(one.shape) for key, one in models[0].items()})
    ends = [score(nets[0], one, data) for one in models]
    end = Score(*(sum(all_of) / len(ends) for all_of in zip(*ends, strict=True)))
    yield Result("as they are", score(nets[0], mean(models), data), end)
    for way, refine in (("each matched to the first", False), ("each matched to the first, MergeMany", True)):
        found = match_many([TensorWeights(model) for model in models], groups, refine=refine)
        moved = [permuted(one, own.values()) for one, own in zip(models, found.permutations, strict=True)]
        yield Result(way, score(nets[0], mean(moved), data), end)


def rows_of(kind: Kind, data: tuple[Images, Images], pairs: int, training: Training) -> Iterator[str]:
    """The lines of the table for one kind of network: means over the pairs."""
    begun = time.monotonic()
    nets = [trained(kind, seed, data[0], training) for seed in range(kind.many or 2 * pairs)]
    shapes = {key: tuple(one.shape) for key, one in tensors_of(nets[0]).items()}
    assert not list(faults(kind.groups(shapes), shapes))
    print(f"{kind.title}: {len(nets)} networks trained, {time.monotonic() - begun:.0f} s", file=sys.stderr)
    if kind.many:
        results = [merges_of_many(kind, nets, data)]
    else:
        results = [merges_of_pair(kind, nets[2 * pair : 2 * pair + 2], data) for pair in range(pairs)]
    for same in zip(*results, strict=True):
        yield line(kind.title, same)
    print(f"{kind.title}: merged, {time.monotonic() - begun:.0f} s", file=sys.stderr)


def line(title: str, results: Sequence[Result]) -> str:
    """A line of the table: means over pairs."""
    barriers = [
        sum(getattr(one.middle, name) - getattr(one.ends, name) for one in results) / len(results)
        for name in ("training", "test")
    ]
    middle, ends = (
        sum(one.accuracy for one in every) / len(results) for every in zip(*(one[1:] for one in results), strict=True)
    )
    numbers = [f"{one:.3f}" for one in barriers] + [f"{100 * one:.1f} %" for one in (middle, ends)]
    return f"| {' | '.join([title, results[0].way, *numbers])} |"


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=KINDS, action="append", help="kinds of networks; all by default")
    parser.add_argument("--pairs", type=int, default=2, help="pairs that each number is a mean of (2)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"epochs of training ({EPOCHS})")
    parser.add_argument("--one-cycle", action="store_true", help="let the rate rise to its value and fall to zero")
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    data = digits()
    print("| networks | merged | barrier, training | barrier, test | accuracy of the merge | of its parts |")
    print("|---|---|---|---|---|---|")
    for name in given.only or KINDS:
        for row in rows_of(KINDS[name], data, given.pairs, Training(given.epochs, given.one_cycle)):
            print(row, flush=True)
    rate = f"rate up to {RATE} in one cycle" if given.one_cycle else f"rate {RATE}"
    print(f"\nAdamW, {rate}, weight decay {DECAY}, batches of {BATCH}, {given.epochs} epochs of {TRAINING} images;")
    print(f"pairs trained: {given.pairs}.")


if __name__ == "__main__":
    main()
