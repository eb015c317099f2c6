"""Recipes that are written as version 0.1.0 are run by sd-mecha itself, to the tensors that remelt gives."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import remelt as rm
from remelt.recipe.node import Call, Node
from remelt.text.eras.writer import write_version_0_1

GRAPHS = 200
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


def test_sd_mecha_gives_the_same_tensors(models: list[Path]) -> None:
    sd_mecha = pytest.importorskip("sd_mecha")
    compared = 0
    for seed in range(GRAPHS):
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
    assert compared > 3 * GRAPHS


class Quiet:
    """A bar that shows nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *args: object) -> None: ...

    def update(self, *args: object) -> None: ...

    def set_postfix(self, *args: object, **kwargs: object) -> None: ...

    def close(self) -> None: ...
