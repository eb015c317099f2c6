"""Mixtures of experts: experts and their hidden channels are found together, however many they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import remelt.alignment.experts
from remelt.alignment.matching import match
from remelt.alignment.permutation import permuted, random_permutation
from remelt.alignment.weights import TensorWeights
from remelt.archs.axes.draft import EXPERT, HIDDEN, Drafts
from remelt.archs.axis_groups import AxisGroup, faults


def mixture(
    *, stacked: bool, experts: int = 6, width: int = 64, hidden: int = 64
) -> tuple[dict[str, torch.Tensor], tuple[AxisGroup, ...]]:
    """Random tensors of a layer of experts between an embedding and a head, and its groups."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {
        "embed.weight": random(100, width),
        "gate.weight": random(experts, width),
        "head.weight": random(90, width),
    }
    up, down = [random(2 * hidden, width) for _ in range(experts)], [random(width, hidden) for _ in range(experts)]
    if stacked:
        tensors |= {"up": torch.stack(up), "down": torch.stack(down)}
    else:
        tensors |= {f"experts.{place}.up.weight": one for place, one in enumerate(up)}
        tensors |= {f"experts.{place}.down.weight": one for place, one in enumerate(down)}
    drafts = Drafts({key: tuple(one.shape) for key, one in tensors.items()})
    drafts.fixed("words", 100).window("embed.weight", 0)
    drafts.fixed("classes", 90).window("head.weight", 0)
    stream = drafts.free("stream", width).window("embed.weight", 1).window("gate.weight", 1).window("head.weight", 1)
    group = drafts.experts("experts", experts, hidden).window("gate.weight", 0, (EXPERT,))
    both = (EXPERT, HIDDEN)
    if stacked:
        stream.window("up", 2).window("down", 1)
        group.window("up[{}]", 0, both).window("up[{}]", 0, both, offset=hidden).window("down[{}]", 1, both)
    else:
        for place in range(experts):
            stream.read_by(f"experts.{place}.up").made_by(f"experts.{place}.down")
        group.window("experts.{}.up.weight", 0, both).window("experts.{}.up.weight", 0, both, offset=hidden)
        group.window("experts.{}.down.weight", 1, both)
    return tensors, drafts.finished()


@pytest.mark.parametrize("many", [False, True], ids=["all at once", "pair by pair"])
@pytest.mark.parametrize("stacked", [False, True], ids=["a key each", "stacked"])
def test_experts_and_their_channels_are_found(monkeypatch: pytest.MonkeyPatch, stacked: bool, many: bool) -> None:
    if many:
        monkeypatch.setattr(remelt.alignment.experts, "MOST", 0)
    tensors, groups = mixture(stacked=stacked)
    assert list(faults(groups, {key: tuple(one.shape) for key, one in tensors.items()})) == []
    generator = np.random.default_rng(3)
    hidden = {group.name: random_permutation(group, generator) for group in groups}
    model = permuted(tensors, hidden.values())
    noise = torch.Generator().manual_seed(1)
    model = {key: one + 0.5 * torch.randn(one.shape, generator=noise) for key, one in model.items()}
    found = match(TensorWeights(tensors), TensorWeights(model), groups)
    assert [name for name, one in found.permutations.items() if not one.after(hidden[name]).is_identity] == []
    assert found.after == pytest.approx(found.visits[-1].agreement)
    aligned = permuted(model, found.permutations.values())
    product = sum(float((tensors[key].double() * aligned[key].double()).sum()) for key in tensors)
    assert found.after == pytest.approx(product, rel=1e-4)
