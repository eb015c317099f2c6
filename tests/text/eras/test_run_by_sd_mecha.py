"""Recipes that are written as version 0.1.0 are run by sd-mecha itself, to the tensors that remelt gives."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import remelt as rm
from remelt.recipe.node import Call, Node
from remelt.text.eras.blocks import BLOCK_CONFIGS, BlockNumbers
from remelt.text.eras.writer import write_version_0_1

GRAPHS = 200
_FEW = 20
"""Of them, those that every run compares."""
SHAPES = {"layers.0.weight": (5, 3), "layers.0.bias": (5,), "layers.1.weight": (4, 3, 2, 2), "scale": ()}
NEAR = {"rtol": 1e-4, "atol": 1e-4}
"""In float32: of float64, sd-mecha rounds the thresholds of TIES to float32, and drops the numbers that they are of."""
INTENDED = {
    "scale": "slerp and perpendicular_component of tensors of one element: they are parallel or opposite",
}
"""Keys that are left out where a recipe has such a method, and why."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    paths = []
    for seed in range(4):
        drawn = torch.Generator().manual_seed(seed)
        tensors = {key: torch.randn(shape, generator=drawn) for key, shape in SHAPES.items()}
        paths.append(write_model(folder / f"model {seed}", tensors))
    return paths


MAKERS: dict[str, Callable[[Sequence[Node], Sequence[Node], float], Node]] = {
    "weighted_sum": lambda w, d, x: rm.weighted_sum(w[0], w[1], alpha=x),
    "n_average": lambda w, d, x: rm.n_average(*w),
    "add": lambda w, d, x: w[0] + d[0],
    "less": lambda w, d, x: w[0] - d[0],
    "add_difference": lambda w, d, x: rm.add_difference(w[0], d[0], alpha=x),
    "slerp": lambda w, d, x: rm.slerp(w[0], w[1], alpha=x),
    "clamp": lambda w, d, x: rm.clamp(w[0], w[1], w[2], stiffness=0.25),
    "fallback": lambda w, d, x: w[0] | w[1],
    "cast": lambda w, d, x: rm.cast(w[0], "float32"),
}
DELTA_MAKERS: dict[str, Callable[[Sequence[Node], Sequence[Node], float], Node]] = {
    "subtract": lambda w, d, x: w[0] - w[1],
    "scale": lambda w, d, x: x * d[0],
    "of_deltas": lambda w, d, x: d[0] - d[1],
    "ties_sum": lambda w, d, x: rm.ties_sum(d[0], d[1], k=min(abs(x) + 0.1, 1.0), vote_sgn=x > 0.5),
    "perpendicular_component": lambda w, d, x: rm.perpendicular_component(d[0], d[1]),
}
ONE_ELEMENT = {"slerp", "perpendicular_component"}


def graph(seed: int, models: list[Path]) -> tuple[Node, set[str]]:
    """A recipe of up to ten steps over the models, and the methods in it."""
    drawn = random.Random(seed)
    weights: list[Node] = [rm.model(path) for path in models]
    deltas: list[Node] = [weights[0] - weights[1]]
    used: set[str] = set()
    for _ in range(drawn.randrange(1, 10)):
        operands, differences = drawn.choices(weights, k=3), drawn.choices(deltas, k=2)
        number = round(drawn.uniform(-0.5, 1.5), 3)
        name = drawn.choice([*MAKERS, *DELTA_MAKERS])
        used.add(name)
        if name in MAKERS:
            weights.append(MAKERS[name](operands, differences, number))
        else:
            deltas.append(DELTA_MAKERS[name](operands, differences, number))
    result = weights[-1]
    return (result if isinstance(result, Call) else result + deltas[-1]), used


@pytest.mark.parametrize("seeds", [range(_FEW), pytest.param(range(_FEW, GRAPHS), marks=pytest.mark.slow)], ids=str)
def test_sd_mecha_gives_the_same_tensors(models: list[Path], seeds: range) -> None:
    sd_mecha = pytest.importorskip("sd_mecha")
    compared = 0
    for seed in seeds:
        recipe, used = graph(seed, models)
        text = write_version_0_1(recipe)
        theirs = sd_mecha.merge(
            sd_mecha.deserialize(text.rstrip("\n")),  # it refuses a newline at the end
            merge_dtype=torch.float32, output_dtype=torch.float64, threads=0, tqdm=Quiet,
        )  # fmt: skip
        ours = rm.merge(recipe, dtype="float64")
        for key, value in ours.items():
            if key in INTENDED and used & ONE_ELEMENT:
                continue
            assert torch.allclose(theirs[key], value, **NEAR), f"{key}\n{text}\n{theirs[key]}\n{value}"
            compared += 1
    assert compared > 3 * len(seeds)


def test_weights_by_block_are_those_of_sd_mecha(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    sd_mecha = pytest.importorskip("sd_mecha")
    config = sd_mecha.extensions.model_configs.resolve("sd1-ldm")
    keys = [key for key in list(config.keys()) if key.endswith("weight")]
    zeros, ones = {key: torch.zeros(2, 2) for key in keys}, {key: torch.ones(2, 2) for key in keys}
    a, b = (write_model(tmp_path / name, tensors) for name, tensors in (("a", zeros), ("b", ones)))
    told = BLOCK_CONFIGS["sd1"]
    for seed in range(5):
        drawn = random.Random(seed)
        named = {name: drawn.choice((0.0, 0.125, 0.25, 1.0)) for name in drawn.sample(told.blocks, 9)}
        weights = BlockNumbers(told, named).weights(0.5)
        recipe = rm.weighted_sum(rm.model(a, arch="sd1"), rm.model(b, arch="sd1"), alpha=weights)
        theirs = sd_mecha.merge(
            sd_mecha.deserialize(write_version_0_1(recipe).rstrip("\n")),
            merge_dtype=torch.float32, output_dtype=torch.float32, threads=0, tqdm=Quiet,
        )  # fmt: skip
        ours = rm.merge(recipe)
        assert set(ours) == set(keys)
        wrong = [key for key in keys if not torch.equal(ours[key], theirs[key])]
        assert not wrong


class Quiet:
    """A bar that shows nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *args: object) -> None: ...

    def update(self, *args: object) -> None: ...

    def set_postfix(self, *args: object, **kwargs: object) -> None: ...

    def close(self) -> None: ...
