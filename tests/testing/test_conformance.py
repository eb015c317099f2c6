"""The conformance suite accepts what keeps its word: every method of remelt, and one specimen of each cut."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from remelt.core.random import Random
from remelt.core.tensor_info import TensorInfo
from remelt.methods import METHODS
from remelt.recipe.method import Group, Integer, Mask, Method, Number, Same, Sums, Tensors, merge_method
from remelt.testing import Case, MethodConformance

TWO_COMPONENTS = {
    f"{part}.layers.{number}.{layer}": shape
    for part in ("encoder", "decoder")
    for number in range(3)
    for layer, shape in {"attn.weight": (5, 3), "mlp.weight": (7, 5), "norm.weight": (5,)}.items()
}
KEYED = {
    "balance_attention": {
        f"blocks.{number}.attn1.{layer}.weight": (64, 64)
        for number in range(2)
        for layer in ("to_q", "to_k", "to_v", "to_out.0")
    },
    "repair_position_ids": {
        "text_model.embeddings.position_ids": (1, 7),
        "vision_model.embeddings.position_ids": (5,),
        "text_model.final_layer_norm.weight": (5,),
    },
    "exchange_ema": {
        "model.diffusion_model.out.0.weight": (7,),
        "model.diffusion_model.out.2.weight": (5, 3),
        "model_ema.diffusion_modelout0weight": (7,),
        "model_ema.diffusion_modelout2weight": (5, 3),
        "first_stage_model.decoder.conv_in.weight": (3, 2),
    },
}
"""For methods that look for certain keys."""
VALUES: dict[str, dict[str, Any]] = {
    "pick_component": {"component": "decoder"},
    "omit_component": {"component": "decoder"},
}


@pytest.mark.parametrize("name", sorted(METHODS))
class TestMethodsOfRemelt(MethodConformance):
    @pytest.fixture
    def method(self, name: str) -> str:
        return name

    @pytest.fixture
    def values(self, name: str) -> dict[str, Any]:
        return VALUES.get(name, {})

    @pytest.fixture
    def shapes(self, name: str) -> Any:
        return TWO_COMPONENTS if name in VALUES else KEYED.get(name) or Case.of(name).shapes


@merge_method(cut="tensor", workspace=8.0)
def sorted_like(a: Same, b: Same) -> Same:
    """The elements of ``b`` in the order of size that those of ``a`` have.

    Formula: b sorted, at the ranks of a

    >>> from torch import tensor
    >>> sorted_like.on(tensor([5.0, 1.0]), tensor([2.0, 3.0]))
    tensor([3., 2.])
    """
    flat = torch.empty_like(b).reshape(-1)
    flat[a.reshape(-1).argsort(stable=True)] = b.reshape(-1).sort().values
    return flat.reshape(b.shape)


def _queries_and_keys(layout: Mapping[str, TensorInfo]) -> Sequence[Group]:
    groups = []
    for query in layout:
        key = query.replace("q_proj", "k_proj")
        if "q_proj" in query and key in layout:
            groups.append(Group((query, key), (query, key)))
    return groups


@merge_method(cut="model", keys=_queries_and_keys)
def balance(a: Tensors, *, share: Number = 0.5) -> Tensors:
    """Queries and keys of one attention brought nearer to the same norm.

    Formula: q r^share, k / r^share, with r = sqrt(|k| / |q|)

    >>> from torch import tensor
    >>> balance.on({"q_proj": tensor([1.0]), "k_proj": tensor([4.0])}, share=1.0)
    {'q_proj': tensor([2.]), 'k_proj': tensor([2.])}
    """
    (query, q), (key, k) = a.items()
    ratio = float((k.double().norm() / q.double().norm()).sqrt()) ** share
    return {query: q * ratio, key: k / ratio}


@merge_method(cut="element", workspace=6.0)
def drop(a: Same, b: Same, *, probability: Mask = 0.5, seed: Integer = 0, random: Random) -> Same:
    """Each element of ``b`` with a probability, else that of ``a``.

    Formula: b where u < probability, else a, with u uniform in [0, 1)

    >>> from torch import tensor
    >>> from remelt.core.random import Random
    >>> drawn = Random(seed=0, method="drop", key="w", offset=0, size=2)
    >>> drop.on(tensor([1.0, 1.0]), tensor([2.0, 2.0]), probability=0.0, random=drawn)
    tensor([1., 1.])
    """
    uniform = torch.from_numpy(random.uniform()).reshape(a.shape)
    return torch.where(uniform < probability, b, a)


def _moments(a: Tensor) -> Mapping[str, Tensor]:
    return {"sum": a.double().sum(), "count": torch.tensor(float(a.numel()), dtype=torch.float64)}


def _spread(a: Tensor, *, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {"squares": ((a.double() - sums["sum"] / sums["count"]) ** 2).sum()}


@merge_method(cut="element", reductions=(_moments, _spread))
def standardise_all(a: Same, *, sums: Sums) -> Same:
    """The tensor with mean 0 and deviation 1.

    Formula: (a - mean) / deviation, over the whole tensor

    >>> from torch import tensor
    >>> standardise_all.on(tensor([1.0, 3.0]))
    tensor([-1.,  1.])
    """
    deviation = float((sums["squares"] / sums["count"]).sqrt())
    return (a - float(sums["sum"] / sums["count"])) / (deviation or 1.0)


class TestTensorCut(MethodConformance):
    @pytest.fixture
    def method(self) -> Method[..., Any]:
        return sorted_like


class TestModelCut(MethodConformance):
    @pytest.fixture
    def method(self) -> Method[..., Any]:
        return balance


class TestRandom(MethodConformance):
    @pytest.fixture
    def method(self) -> Method[..., Any]:
        return drop


class TestReductions(MethodConformance):
    @pytest.fixture
    def method(self) -> Method[..., Any]:
        return standardise_all


def test_a_class_without_the_fixture_is_told_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        "from remelt.testing import MethodConformance\n\n\nclass TestMine(MethodConformance):\n    pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "test_mine.py"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.returncode == 1
    assert "a conformance class supplies a fixture `method`" in told.stdout
    assert "passed" not in told.stdout.splitlines()[-1]
