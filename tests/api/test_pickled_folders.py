"""Folders whose weights are pickles give what the same folders of safetensors give, and run nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import remelt as rm
from remelt.archs.shapes import llama_shapes, sd1_shapes


def drawn(shapes: Any, seed: int) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {key: torch.randn(info.shape, generator=source) for key, info in shapes.items()}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of diffusers with safetensors, ``plain``, and the same with pickles, ``pickled``."""
    folder = tmp_path_factory.mktemp("pipelines")
    rm.convert(drawn(sd1_shapes(32), 0), folder / "plain", to="diffusers")
    shutil.copytree(folder / "plain", folder / "pickled")
    for path in sorted((folder / "pickled").rglob("*.safetensors")):
        stem = "pytorch_model" if path.stem == "model" else path.stem
        torch.save(load_file(path), path.with_name(f"{stem}.bin"))
        path.unlink()
    return folder


def test_a_pipeline_of_pickles_is_merged_as_one_of_safetensors(pipeline: Path) -> None:
    model = rm.model(drawn(sd1_shapes(32), 1))
    plain, pickled = (rm.merge(rm.weighted_sum(pipeline / name, model, alpha=0.25)) for name in ("plain", "pickled"))
    assert len(list((pipeline / "pickled").rglob("*.bin"))) == 3
    assert not list((pipeline / "pickled").rglob("*.safetensors"))
    assert plain.keys() == pickled.keys()
    assert all(torch.equal(pickled[key], value) for key, value in plain.items())
    vae = rm.merge(rm.with_component(model, pipeline / "pickled" / "vae", "vae"))
    due = rm.merge(rm.with_component(model, pipeline / "plain", "vae"))
    assert all(torch.equal(vae[key], value) for key, value in due.items())


def test_safetensors_go_before_pickles_in_each_component(pipeline: Path, tmp_path: Path) -> None:
    shutil.copytree(pipeline / "plain", tmp_path / "both")
    for path in sorted((tmp_path / "both").rglob("*.safetensors")):
        path.with_suffix(".bin").write_bytes(b"never opened")
    found, due = (rm.convert(path, to="original") for path in (tmp_path / "both", pipeline / "plain"))
    assert all(torch.equal(found[key], value) for key, value in due.items())


def test_shards_of_pickles_are_one_model(tmp_path: Path) -> None:
    tensors = drawn(llama_shapes(2, 8, heads=2, key_heads=1, vocabulary=16, intermediate=8), 0)
    names = [f"pytorch_model-{number:05d}-of-00002.bin" for number in (1, 2)]
    keys = list(tensors)
    for name, part in zip(names, (keys[::2], keys[1::2]), strict=True):
        torch.save({key: tensors[key] for key in part}, tmp_path / name)
    weight_map = {key: names[place % 2] for place, key in enumerate(keys)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = rm.merge(rm.passthrough(tmp_path))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], value) for key, value in tensors.items())


class Hostile:
    """What runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def test_a_pickle_in_a_folder_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "unet").mkdir()
    held = {"layers.0.weight": torch.ones(2), "hostile": Hostile(f"touch {mark}")}
    torch.save(held, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    found = rm.merge(rm.passthrough(tmp_path))
    assert list(found) == ["unet/layers.0.weight"]
    assert not mark.exists()
