"""The benchmark of alignment on a small sub-model: that its rows run, and compare what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("rebasin", "usual_matching"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_the_usual_procedure_finds_what_was_planted_where_channels_are_free() -> None:
    import usual_matching

    from remelt.alignment.permutation import permuted, random_permutation
    from remelt.archs.axes.mlp import mlp_groups

    generator = torch.Generator().manual_seed(0)
    shapes = {"0.weight": (32, 16), "2.weight": (32, 32), "4.weight": (8, 32)}
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    groups = [group for group in mlp_groups(shapes, {}) if not group.is_fixed]
    hidden = [random_permutation(group, np.random.default_rng(1)) for group in groups]
    sweeps, found = usual_matching.match_as_usual(tensors, permuted(tensors, hidden), groups)
    assert sweeps > 1
    for number, one in enumerate(hidden):
        assert one.parts["channel"][found[number]].tolist() == list(range(32))


def test_a_sweep_is_measured_beside_its_products() -> None:
    import rebasin

    from remelt.alignment.weights import TensorWeights
    from remelt.archs.axes.mlp import mlp_groups

    generator = torch.Generator().manual_seed(0)
    shapes = {"0.weight": (64, 16), "2.weight": (64, 64), "4.weight": (8, 64)}
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    groups = [group for group in mlp_groups(shapes, {}) if not group.is_fixed]
    weights = TensorWeights(tensors), TensorWeights(rebasin.tuned(tensors, generator))
    row = rebasin.sweep(*weights, groups, "small", 1.15)
    assert row["seconds"] > 0 < row["against"]
    assert row["asked"] == 0
    assert sum(map(rebasin.operations, rebasin.product_sizes(groups, weights[0]).values())) == 2 * 64**2 * (
        16 + 64 + 64 + 8
    )
    margins = rebasin.margins_row(*weights, groups, row["seconds"])
    assert "2 of 2 groups certified" in margins["case"]
