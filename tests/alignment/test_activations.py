"""Activation matching pairs channels by their answers: permuted copies are recovered without a look at weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from remelt.alignment.activations import match_activations
from remelt.alignment.permutation import permuted, random_permutation
from remelt.archs.axes.draft import Drafts
from remelt.archs.axis_groups import AxisGroup
from remelt.errors import RefusedError


class Network(nn.Module):
    """Convolutions, batch normalisation, one attention with grouped queries, a layer beside it, rotary or not."""

    def __init__(self, width: int = 16, heads: int = 2, queries: int = 2) -> None:
        super().__init__()
        size = width // (heads * queries)
        self.shape = (heads, queries, size)
        self.stem = nn.Conv2d(3, width, 3)
        self.stem_norm = nn.BatchNorm2d(width)
        self.widen = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, heads * size), nn.Linear(width, heads * size)
        self.o = nn.Linear(width, width, bias=False)
        self.up, self.down, self.head = nn.Linear(width, 24), nn.Linear(24, width), nn.Linear(width, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        heads, queries, size = self.shape
        stream = self.widen(torch.relu(self.stem_norm(self.stem(images)))).flatten(2).transpose(1, 2)
        seen = self.norm(stream)
        q = self.q(seen).unflatten(-1, (heads * queries, size)).transpose(1, 2)
        k, v = (
            one(seen).unflatten(-1, (heads, size)).repeat_interleave(queries, dim=2).transpose(1, 2)
            for one in (self.k, self.v)
        )
        stream = stream + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(stream + self.down(torch.relu(self.up(stream)))).mean(dim=1)


def network(seed: int, *, rotary: bool = False) -> tuple[Network, tuple[AxisGroup, ...]]:
    torch.manual_seed(seed)
    net = Network().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    tensors = {key: tuple(one.shape) for key, one in net.state_dict().items() if one.dim()}
    drafts, (heads, queries, size) = Drafts(tensors), net.shape
    drafts.fixed("colours", 3).read_by("stem")
    drafts.free("stem", 16).made_by("stem").normalised_by("stem_norm").window("widen.weight", 0)
    stream = drafts.free("stream", 16).window("widen.weight", 1).window("widen.bias", 0).normalised_by("norm")
    for name in ("q", "k", "v", "up", "head"):
        stream.read_by(name)
    stream.made_by("o").made_by("down")
    attention = drafts.attention("attention", heads, size, queries=queries, rotary=rotary)
    attention.made_by("q", ("head", "query", "qk")).made_by("k", ("head", "qk"))
    attention.made_by("v", ("head", "value")).read_by("o", ("head", "query", "value"))
    drafts.free("hidden", 24).made_by("up").read_by("down")
    drafts.fixed("classes", 5).made_by("head")
    return net, drafts.finished()


def images(seed: int, batches: int = 3) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 3, 6, 6, generator=source) for _ in range(batches)]


def shuffled(net: Network, groups: Sequence[AxisGroup]) -> tuple[Network, dict[str, object]]:
    drawn = np.random.default_rng(0)
    hidden = {group.name: random_permutation(group, drawn) for group in groups if not group.is_fixed}
    other = copy.deepcopy(net)
    other.load_state_dict(permuted(net.state_dict(), hidden.values()))
    return other, hidden


@pytest.mark.parametrize("rotary", [False, True])
def test_a_permuted_copy_is_recovered_by_its_answers(rotary: bool) -> None:
    net, groups = network(0, rotary=rotary)
    other, hidden = shuffled(net, groups)
    if not rotary:  # the rotary embedding itself is not run, only its groups are those of one
        (given,) = images(1, 1)
        assert torch.allclose(net(given), other(given), atol=1e-4)
    found = match_activations(net, other, groups, images(2))
    assert found.unmeasured == ()
    for name, one in found.permutations.items():
        assert one.after(hidden[name]).is_identity, name
        assert found.correlations[name][0] < 0.9
        assert found.correlations[name][1] == pytest.approx(1, abs=1e-3)


def test_it_does_not_look_at_weights() -> None:
    net, groups = network(0)
    other, hidden = shuffled(net, groups)
    with torch.no_grad():  # another gauge, in which weights differ by far and answers only in scale
        scales = torch.rand(24, generator=torch.Generator().manual_seed(0)) * 5 + 0.1
        other.up.weight.mul_(scales[:, None])
        other.up.bias.mul_(scales)
        other.down.weight.div_(scales)
    found = match_activations(net, other, groups, images(2))
    assert found.permutations["hidden"].after(hidden["hidden"]).is_identity


def test_the_batches_may_be_cut_otherwise_and_numbers_far_from_zero() -> None:
    net, groups = network(0)
    other, _ = network(1)
    with torch.no_grad():
        net.up.bias.add_(300.0)
        other.up.bias.add_(-200.0)
    together = torch.cat(images(3))
    whole = match_activations(net, other, groups, [together])
    parts = match_activations(net, other, groups, together.split(7))
    for name, one in whole.correlations.items():
        assert parts.correlations[name] == pytest.approx(one, abs=2e-3)
    ours, theirs = (one.up(one.norm(torch.zeros(1, 16))) for one in (net, other))
    assert ours.mean() > 250
    assert theirs.mean() < -150


def test_correlations_are_those_of_numpy() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].weight.add_(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)))
    drafts = Drafts({key: tuple(one.shape) for key, one in net.state_dict().items()})
    drafts.free("hidden", 6).made_by("0").read_by("2")
    given = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))
    found = match_activations(net, other, drafts.finished(), given.split(20))
    with torch.no_grad():
        whole = np.corrcoef(net[0](given).numpy(), other[0](given).numpy(), rowvar=False)[:6, 6:]
    assert found.correlations["hidden"][0] == pytest.approx(np.trace(whole) / 6, abs=1e-4)
    chosen = found.permutations["hidden"].parts.get("channel", np.arange(6))
    assert found.correlations["hidden"][1] == pytest.approx(whole[np.arange(6), chosen].mean(), abs=1e-4)


def test_dead_channels_say_nothing() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight[1:3] = 0
        net[0].bias[1:3] = torch.tensor([1e4, 0.3])
    drafts = Drafts({key: tuple(one.shape) for key, one in net.state_dict().items()})
    drafts.free("hidden", 4).made_by("0").read_by("1")
    found = match_activations(net, net, drafts.finished(), [torch.randn(30, 4)])
    assert found.permutations["hidden"].is_identity
    assert found.correlations["hidden"][1] == pytest.approx(0.5, abs=1e-3)


def test_modules_are_left_as_they_were_and_groups_without_answers_are_told() -> None:
    net, groups = network(0)
    net.train()
    before = copy.deepcopy(net.state_dict())
    alone = Drafts({"experts.0.up.weight": (8, 4), "experts.1.up.weight": (8, 4)}).experts("experts", 2, 8)
    alone.window("experts.{}.up.weight", 0)
    found = match_activations(net, net, (*groups, alone.finished()), images(2))
    assert found.unmeasured == ("experts",)
    assert net.training
    assert not net.stem._forward_hooks
    assert all(before[key].equal(one) for key, one in net.state_dict().items())


def test_batches_may_be_arguments_by_place_or_by_name() -> None:
    net, groups = network(0)
    (given,) = images(4, 1)
    heard: list[int] = []
    batches = [given, (given,), [given], {"images": given}]
    found = match_activations(net, net, groups, iter(batches), progress=heard.append)
    assert all(one.is_identity for one in found.permutations.values())
    assert heard == [1, 2, 3, 4]


def test_no_batches_are_refused() -> None:
    net, groups = network(0)
    with pytest.raises(RefusedError, match="activations are matched on data, but there are no batches"):
        match_activations(net, net, groups, [])


def test_answers_of_other_shapes_are_refused() -> None:
    net, groups = network(0)
    other = copy.deepcopy(net)
    other.stem.stride = (2, 2)
    with pytest.raises(
        RefusedError, match=r"but stem answers \[\[16, 16, 4, 4\]\] in the reference and \[\[16, 16, 2, 2"
    ):
        match_activations(net, other, groups, images(2))
