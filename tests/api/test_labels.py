"""What inputs are called in messages: as they were asked for, and each distinctly."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import remelt as rm
from remelt.api.merging import prepare_merges
from remelt.api.recipes import load_recipe

W = {"w": torch.ones(2)}


def labels(recipe: rm.Node) -> list[str]:
    with prepare_merges([load_recipe(recipe)], [None], rm.MergeOptions()) as prepared:
        return [given.label for group in prepared.groups for given in group.inputs.values()]


@pytest.fixture
def snapshot(tmp_path: Path, write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of links to files that are named by their hashes, as download caches keep them."""
    write_model(tmp_path / "blobs" / "0f1e.safetensors", W).rename(tmp_path / "blobs" / "0f1e")
    folder = tmp_path / "snapshots" / "main"
    folder.mkdir(parents=True)
    try:
        (folder / "model.safetensors").symlink_to(os.path.join("..", "..", "blobs", "0f1e"))
    except OSError:
        pytest.skip("links need a right here")
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_link_is_called_by_its_own_name(snapshot: Path, write_model: Callable[..., Path]) -> None:
    write_model(snapshot.parent.parent / "other", W)
    assert labels(rm.weighted_sum("snapshots/main/model", "other")) == ["model.safetensors", "other.safetensors"]
    write_model(snapshot.parent.parent / "short", {"v": torch.ones(2)})
    with pytest.raises(rm.CheckError) as caught:
        rm.merge(rm.weighted_sum("snapshots/main/model", "short"))
    assert "model.safetensors" in str(caught.value)
    assert "0f1e" not in str(caught.value)


def test_a_link_and_its_file_are_one_input(snapshot: Path) -> None:
    assert labels(rm.weighted_sum("snapshots/main/model", "blobs/0f1e")) == ["model.safetensors"]


def test_a_folder_of_links_is_opened_by_their_names(snapshot: Path) -> None:
    blobs = snapshot.parent.parent / "blobs"
    (blobs / "77aa").write_text(json.dumps({"metadata": {}, "weight_map": {"w": "model-00001-of-00001.safetensors"}}))
    (snapshot / "model.safetensors").rename(snapshot / "model-00001-of-00001.safetensors")
    (snapshot / "model.safetensors.index.json").symlink_to(blobs / "77aa")
    assert labels(rm.weighted_sum("snapshots/main", "snapshots/main", alpha=0.0) | rm.model(W)) == ["main", "memory"]


def test_labels_are_as_long_as_they_must_be(
    tmp_path: Path, write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["p/s/m", "q/s/m", "q/t/m", "n"]
    for number, name in enumerate(names):
        write_model(tmp_path / f"{name}.safetensors", {"w": torch.full((2,), float(number))})
    monkeypatch.chdir(tmp_path)
    expected = ["p/s/m.safetensors", "q/s/m.safetensors", "t/m.safetensors", "n.safetensors"]
    assert labels(rm.n_average(*names)) == expected
    assert labels(rm.n_average(*names[1:])) == ["s/m.safetensors", "t/m.safetensors", "n.safetensors"]
    assert labels(rm.model("n") + rm.model("n", space="delta")) == ["n.safetensors", "n.safetensors (delta)"]
    held = rm.model({"w": torch.zeros(2)}, name="x") + (
        rm.model(W, name="y") - rm.model({"w": torch.ones(2)}, name="y")
    )
    assert labels(held) == ["x", "y #2", "y #3"]


@pytest.mark.parametrize("name", [".", "../here"])
def test_a_folder_is_called_by_its_name_however_it_is_written(
    name: str, tmp_path: Path, write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "here" / "model", W)
    monkeypatch.chdir(tmp_path / "here")
    assert labels(rm.model(name) + 0.5 * rm.model(W, space="delta")) == ["here", "memory"]
    (tmp_path / "here" / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "here" / "inner")
    assert labels(rm.model("..") + rm.model(W, space="delta")) == ["here", "memory"]
