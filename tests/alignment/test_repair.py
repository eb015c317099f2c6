"""REPAIR sets the statistics of a merged module from data, and a merged network with batch norms works again."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from remelt.alignment.matching import match
from remelt.alignment.permutation import permuted
from remelt.alignment.repair import repair
from remelt.alignment.weights import TensorWeights
from remelt.archs.axes.draft import Drafts
from remelt.archs.axis_groups import AxisGroup, faults
from remelt.errors import OptionError, RefusedError


class Residual(nn.Module):
    """A small ResNet with batch normalisation."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, stride=2, padding=1), nn.BatchNorm2d(width)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(4))
        self.head = nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        stream = torch.relu(self.norm(self.stem(images)))
        for place in (0, 2):
            inner = torch.relu(self.norms[place](self.convs[place](stream)))
            stream = torch.relu(stream + self.norms[place + 1](self.convs[place + 1](inner)))
        return self.head(stream.mean(dim=(2, 3)))


def groups_of(net: nn.Module) -> tuple[AxisGroup, ...]:
    shapes = {key: tuple(one.shape) for key, one in net.state_dict().items() if one.dim()}
    drafts = Drafts(shapes)
    drafts.fixed("pixels", 1).read_by("stem")
    stream = drafts.free("stream", shapes["stem.weight"][0]).made_by("stem").normalised_by("norm").read_by("head")
    for place in (0, 2):
        stream.read_by(f"convs.{place}").made_by(f"convs.{place + 1}").normalised_by(f"norms.{place + 1}")
        inner = drafts.free(f"inner.{place}", shapes["stem.weight"][0]).made_by(f"convs.{place}")
        inner.normalised_by(f"norms.{place}").read_by(f"convs.{place + 1}")
    drafts.fixed("classes", 10).made_by("head")
    assert list(faults(drafts.finished(), shapes)) == []
    return drafts.finished()


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    found = pytest.importorskip("sklearn.datasets").load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images, labels = (
        torch.tensor(found.images[order] / 16, dtype=torch.float32)[:, None],
        torch.tensor(found.target[order]),
    )
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def trained(net: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> nn.Module:
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(100):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(images[chosen]), labels[chosen]).backward()
            optimiser.step()
    return net.eval()


def merged(first: nn.Module, second: nn.Module) -> nn.Module:
    middle = copy.deepcopy(first)
    theirs = second.state_dict()
    middle.load_state_dict({key: (one + theirs[key]) / 2 for key, one in first.state_dict().items()})
    return middle


@torch.no_grad()
def accuracy(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return float((net(images).argmax(dim=1) == labels).float().mean())


def test_a_merged_network_with_batch_norms_works_again(
    digits: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    images, labels, others, wanted = digits
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        nets.append(trained(Residual(), images, labels, 4))
    first, second = nets
    assert min(accuracy(net, others, wanted) for net in nets) > 0.9
    found = match(TensorWeights(first.state_dict()), TensorWeights(second.state_dict()), groups_of(first))
    second.load_state_dict(permuted(second.state_dict(), found.permutations.values()))
    middle = merged(first, second)
    before = accuracy(middle, others, wanted)
    assert repair(middle, images.split(200)) == ("norm", *(f"norms.{place}" for place in range(4)))
    after = accuracy(middle, others, wanted)
    assert after > before + 0.1
    assert not any(part.training for part in middle.modules())


def test_running_statistics_are_those_of_all_data() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5), nn.ReLU()).eval()
    given = torch.randn(30, 2, 9) * 3 + 50
    count = net[1].num_batches_tracked.clone()
    assert repair(net, iter([given[:7], (given[7:],)])) == ("1",)
    with torch.no_grad():
        made = net[0](given)
    assert torch.allclose(net[1].running_mean, made.mean(dim=(0, 2)), rtol=1e-5)
    assert torch.allclose(net[1].running_var, made.transpose(0, 1).reshape(5, -1).var(dim=1), rtol=1e-4)
    assert net[1].num_batches_tracked.equal(count)
    assert not net.training


def test_a_failing_pass_leaves_the_statistics_as_they_were() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).train()
    before = copy.deepcopy(net.state_dict())

    def batches() -> Iterator[torch.Tensor]:
        yield torch.randn(8, 2)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        repair(net, batches())
    assert all(before[key].equal(one) for key, one in net.state_dict().items())
    assert all(part.training for part in net.modules())


def plain(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


def test_answers_come_to_lie_between_those_of_both_models() -> None:
    ends, given = (plain(0), plain(1)), torch.randn(60, 4, generator=torch.Generator().manual_seed(3))
    middle = merged(*ends)
    last = copy.deepcopy(middle[4].state_dict())
    assert repair(middle, given.split(25), endpoints=ends, alpha=0.25) == ("0", "2")
    with torch.no_grad():
        for stop in (1, 3):
            one, other, between = (net[:stop](given) for net in (*ends, middle))
            for statistic in (torch.mean, torch.std):
                wanted = torch.lerp(statistic(one, dim=0), statistic(other, dim=0), 0.25)
                assert torch.allclose(statistic(between, dim=0), wanted, atol=1e-4)
    assert all(one.equal(last[key]) for key, one in middle[4].state_dict().items())


def test_the_last_layer_is_left_whether_it_has_a_bias_or_not() -> None:
    torch.manual_seed(0)
    ends = [nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3, bias=False)).eval() for _ in range(2)]
    assert repair(merged(*ends), [torch.randn(20, 4)], endpoints=(ends[0], ends[1])) == ("0",)


def test_layers_may_be_named_and_convolutions_are_set_too() -> None:
    torch.manual_seed(0)
    ends = [nn.Sequential(nn.Conv2d(1, 3, 2), nn.ConvTranspose2d(3, 4, 2), nn.Flatten()).eval() for _ in range(2)]
    middle, given = merged(*ends), torch.randn(20, 1, 4, 4)
    assert repair(middle, [given], endpoints=(ends[0], ends[1]), layers=["1"]) == ("1",)
    with torch.no_grad():
        one, other, between = (net[:2](given).mean(dim=(0, 2, 3)) for net in (*ends, middle))
    assert torch.allclose(between, (one + other) / 2, atol=1e-5)
    assert middle[0].weight.equal((ends[0][0].weight + ends[1][0].weight) / 2)


def test_modules_without_statistics_are_refused() -> None:
    with pytest.raises(RefusedError, match="running statistics of batch normalisations anew, and this module has none"):
        repair(plain(0), [torch.randn(3, 4)])
    bare = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(RefusedError, match="that have a bias, but none of them is run"):
        repair(bare, [torch.randn(3, 4)], endpoints=(bare, bare))


def test_no_data_an_iterator_and_a_layer_without_a_bias_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(RefusedError, match="statistics are computed from data, but there are no batches"):
        repair(net, [])
    with pytest.raises(OptionError, match="but got an iterator, which can be used once"):
        repair(plain(0), iter([torch.randn(3, 4)]), endpoints=(plain(1), plain(2)))
    with pytest.raises(OptionError, match="sets linear maps and convolutions that have a bias, but 1 is none"):
        repair(plain(0), [torch.randn(3, 4)], endpoints=(plain(1), plain(2)), layers=["1"])
