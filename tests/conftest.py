"""What all tests share: small model files, seeded tensors, one torch thread, repeatable properties, slow tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import save_file

from remelt.archs.shapes import sd1_shapes
from remelt.methods import METHODS

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)

settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("local"), derandomize=True, database=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

Tensors = Mapping[str, torch.Tensor]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: runs with --slow")
    for item in items:
        if item.get_closest_marker("slow") is not None:
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="module")
def known_specimens(request: pytest.FixtureRequest) -> Iterator[None]:
    """Merge methods of a test module that says ``SPECIMENS = True`` are known while it runs, and no longer."""
    if not getattr(request.module, "SPECIMENS", False):
        yield
        return
    METHODS.find("weighted_sum")
    before = dict(METHODS._found)
    METHODS.add_module(request.module)
    yield
    METHODS._found.clear()
    METHODS._found.update(before)


@pytest.fixture
def generator() -> torch.Generator:
    """A torch generator that starts the same in every test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def seeded() -> Callable[[int], torch.Generator]:
    """Torch generators by seed."""
    return lambda seed: torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    """``write_model(path, tensors, metadata=None)`` writes a safetensors file and gives its path.

    Folders on the way are made, a missing suffix is added, and views are laid out anew as the format demands.
    """

    def write(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
        path = path if path.suffix else path.with_suffix(".safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        owned = {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
        save_file(owned, path, metadata=dict(metadata) if metadata is not None else {"format": "pt"})
        return path

    return write


@pytest.fixture(scope="session")
def write_sd1_models(write_model: Callable[..., Path]) -> Callable[..., None]:
    """``write_sd1_models(folder, names)`` writes small models of Stable Diffusion's keys, all different."""

    def write(folder: Path, names: Sequence[str]) -> None:
        for seed, name in enumerate(names):
            drawn = torch.Generator().manual_seed(seed)
            shapes = sd1_shapes(32).items()
            write_model(folder / name, {key: (0.1 * torch.randn(i.shape, generator=drawn)).half() for key, i in shapes})

    return write


@pytest.fixture(scope="session")
def random_tensors() -> Callable[..., dict[str, torch.Tensor]]:
    """``random_tensors(shapes, seed=0, dtype=torch.float32)`` gives normal numbers in the shapes of a mapping."""

    def draw(
        shapes: Mapping[str, tuple[int, ...]], *, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> dict[str, torch.Tensor]:
        source = torch.Generator().manual_seed(seed)
        return {key: torch.randn(shape, generator=source).to(dtype) for key, shape in shapes.items()}

    return draw
