"""Results that are folders: because their first model is one, and in the shards that it has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import remelt as rm
from remelt.cli.main import run

SHARDS = {
    "model-00001-of-00003.safetensors": ["model.embed_tokens.weight"],
    "model-00002-of-00003.safetensors": ["model.layers.1.mlp.weight", "model.layers.0.mlp.weight"],
    "model-00003-of-00003.safetensors": ["model.layers.2.mlp.weight", "lm_head.weight"],
}
"""In an order that no greedy filling would give."""


def tensors_of(seed: int) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    keys = [key for keys in SHARDS.values() for key in keys]
    return {key: torch.randn(8, 8, generator=drawn) for key in keys}


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_model: Callable[..., Path]) -> Path:
    """A model in three shards, one in a single file of a folder, and one that is a file."""
    sharded = tensors_of(1)
    (tmp_path / "sharded").mkdir()
    for name, keys in SHARDS.items():
        save_file({key: sharded[key] for key in keys}, tmp_path / "sharded" / name)
    index = {"metadata": {}, "weight_map": {key: name for name, keys in SHARDS.items() for key in keys}}
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "sharded" / "config.json").write_text('{"of": "sharded"}')
    write_model(tmp_path / "whole" / "model", tensors_of(2))
    (tmp_path / "whole" / "config.json").write_text('{"of": "whole"}')
    write_model(tmp_path / "file", tensors_of(3))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shards(folder: Path) -> dict[str, list[str]]:
    return {path.name: sorted(load_file(path)) for path in sorted(folder.glob("*.safetensors"))}


def test_a_result_has_the_shards_of_its_first_model(models: Path) -> None:
    assert rm.merge(rm.weighted_sum("sharded", "whole", alpha=0.25), "out") == Path("out")
    assert shards(models / "out") == {name: sorted(keys) for name, keys in SHARDS.items()}
    told = json.loads((models / "out" / "model.safetensors.index.json").read_text())
    assert told["weight_map"] == {key: name for name, keys in SHARDS.items() for key in keys}
    assert json.loads((models / "out" / "config.json").read_text()) == {"of": "sharded"}
    found = {key: value for path in (models / "out").glob("*.safetensors") for key, value in load_file(path).items()}
    for key, value in tensors_of(1).items():
        torch.testing.assert_close(found[key], torch.lerp(value, tensors_of(2)[key], 0.25))


@pytest.mark.parametrize("other", ["consolidated.safetensors", "a.fp16.safetensors", "pytorch_model.bin"])
def test_the_names_are_those_of_the_files_that_are_read(other: str, models: Path) -> None:
    """Some models are published twice in one folder."""
    (models / "sharded" / other).write_bytes((models / "file.safetensors").read_bytes())
    rm.merge(rm.weighted_sum("sharded", "whole"), "out")
    assert list(shards(models / "out")) == list(SHARDS)


def test_another_element_type_leaves_the_shards(models: Path) -> None:
    rm.merge(rm.weighted_sum("sharded", "whole"), "out", dtype="bf16")
    assert list(shards(models / "out")) == list(SHARDS)


def test_the_first_model_decides(models: Path) -> None:
    rm.merge(rm.weighted_sum("whole", "sharded"), "whole-out")
    assert list(shards(models / "whole-out")) == ["model.safetensors"]
    rm.merge(rm.weighted_sum("file", "sharded"), "file-out")
    assert (models / "file-out.safetensors").is_file()


@pytest.mark.parametrize(("asked", "count"), [("1GB", 1), (256, 5), (512, 3)])
def test_a_size_that_is_asked_for_goes_before(asked: str | int, count: int, models: Path) -> None:
    rm.merge(rm.weighted_sum("sharded", "whole"), "out", max_shard_size=asked)
    assert len(shards(models / "out")) == count


def test_a_name_with_the_suffix_is_a_file(models: Path) -> None:
    rm.merge(rm.weighted_sum("sharded", "whole"), "out.safetensors")
    assert len(load_file(models / "out.safetensors")) == len(tensors_of(1))


def test_more_layers_fill_shards_no_larger_than_the_first_models(models: Path) -> None:
    rm.merge(rm.stack_layers(rm.layers("sharded", 0, 3), rm.layers("sharded", 1, 3)), "out")
    found = shards(models / "out")
    assert sum(map(len, found.values())) == 7
    assert {len(keys) for keys in found.values()} == {1, 2}


def test_what_the_first_model_left_out_leaves_no_empty_shard(models: Path) -> None:
    rm.merge(rm.layers("sharded", 2, 3), "out")
    assert shards(models / "out") == {
        "model-00001-of-00002.safetensors": ["model.embed_tokens.weight"],
        "model-00002-of-00002.safetensors": ["lm_head.weight", "model.layers.0.mlp.weight"],
    }


def test_the_command_writes_folders_too(models: Path) -> None:
    (models / "mix.mecha").write_text('version 1\nweighted_sum("sharded", "whole")\n')
    (models / "file.mecha").write_text('version 1\nweighted_sum("file", "whole")\n')
    assert run(["merge", "mix.mecha", "-q"]) == 0
    assert list(shards(models / "mix")) == list(SHARDS)
    assert run(["merge", "sharded", "whole", "-m", "weighted_sum", "-o", "named", "-q"]) == 0
    assert list(shards(models / "named")) == list(SHARDS)
    assert run(["merge", "mix.mecha", "file.mecha", "-o", "both", "-q"]) == 0
    assert sorted(path.name for path in (models / "both").iterdir()) == ["file.safetensors", "mix"]


def test_a_model_that_is_not_there_is_told_as_ever(models: Path) -> None:
    assert run(["merge", "shrded", "whole", "-m", "weighted_sum", "-o", "out"]) == 3
    assert not (models / "out").exists()
