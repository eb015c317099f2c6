"""Model folders: an index and its shards, one weight file, or components in subfolders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from remelt.errors import FormatError
from remelt.formats.checkpoint import open_checkpoint


def write_shards(
    folder: Path, shards: Mapping[str, Mapping[str, torch.Tensor]], index: str = "model.safetensors.index.json"
) -> Path:
    """Shards by file name, with the index that lists them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in shards.items():
        if name.endswith(".safetensors"):
            save_file(dict(tensors), folder / name, metadata={"format": "pt"})
        else:
            torch.save(dict(tensors), folder / name)
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return folder


def values_of(path: Path) -> dict[str, list[float]]:
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "sharded" and checkpoint.path == path
        return {key: torch.frombuffer(checkpoint.read(key), dtype=torch.float32).tolist() for key in checkpoint.tensors}


def save_one(path: Path, value: float, key: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({key: torch.tensor([value])}, path)
    else:
        torch.save({key: torch.tensor([value])}, path)


@pytest.mark.parametrize(
    ("index", "suffix"),
    [
        ("model.safetensors.index.json", ".safetensors"),
        ("diffusion_pytorch_model.safetensors.index.json", ".safetensors"),
        ("pytorch_model.bin.index.json", ".bin"),
        ("anything.safetensors.index.json", ".safetensors"),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", ".safetensors"),
    ],
)
def test_a_folder_is_opened_by_its_index(tmp_path: Path, index: str, suffix: str) -> None:
    stem = "diffusion_pytorch_model.fp16" if "fp16" in index else "part"
    first, second = f"{stem}-00001-of-00002{suffix}", f"{stem}-00002-of-00002{suffix}"
    shards = {second: {"b": torch.tensor([2.0])}, first: {"a": torch.tensor([1.0]), "c": torch.tensor([3.0])}}
    folder = write_shards(tmp_path / "sharded", shards, index)
    assert values_of(folder) == {"a": [1.0], "c": [3.0], "b": [2.0]}
    with open_checkpoint(folder) as checkpoint:
        assert [file.name for file in checkpoint.files()] == [first, second]
        positions = [checkpoint.position(key) for key in checkpoint.tensors]
        assert positions == sorted(positions) and positions[-1][0] == 1


def test_metadata_is_what_all_shards_agree_on(tmp_path: Path) -> None:
    for name, extra in (("a", {"only": "here"}), ("b", {"author": "other"})):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors", {"format": "pt", "author": "me"} | extra)
    weight_map = {"a": "a.safetensors", "b": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with open_checkpoint(tmp_path) as checkpoint:
        assert dict(checkpoint.metadata) == {"format": "pt"}


def test_shards_may_be_links_into_a_cache(tmp_path: Path) -> None:
    save_one(tmp_path / "cache" / "3f2a.safetensors", 4.0)
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "model-1.safetensors").symlink_to(tmp_path / "cache" / "3f2a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model-1.safetensors"}}))
    assert values_of(folder) == {"w": [4.0]}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "own_name.safetensors", "old.ckpt"])
def test_a_folder_with_one_weight_file_is_that_file(tmp_path: Path, name: str) -> None:
    save_one(tmp_path / name, 1.5)
    (tmp_path / "config.json").write_text("{}")
    assert values_of(tmp_path) == {"w": [1.5]}


@pytest.mark.parametrize(
    ("wanted", "others"),
    [
        ("model.safetensors", ["pytorch_model.bin", "model.fp16.safetensors", "notes.bin"]),
        ("model.safetensors", ["model.ema.safetensors"]),
        (
            "model.safetensors",
            ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth"],
        ),
        ("diffusion_pytorch_model.safetensors", ["diffusion_pytorch_model.fp16.safetensors"]),
        ("diffusion_pytorch_model.safetensors", ["diffusion_pytorch_model.fp16-00001-of-00002.safetensors"]),
        ("diffusion_pytorch_model.fp16.safetensors", ["diffusion_pytorch_model.bin.partial", ".hidden.safetensors"]),
        ("pytorch_model.bin", ["other.bin"]),
        ("own.safetensors", ["own.fp16.safetensors", "training_args.bin"]),
    ],
)
def test_the_usual_full_precision_safetensors_file_goes_first(tmp_path: Path, wanted: str, others: list[str]) -> None:
    save_one(tmp_path / wanted, 1.0)
    for other in others:
        (tmp_path / other).write_bytes(b"never opened")
    assert values_of(tmp_path) == {"w": [1.0]}


def test_an_index_of_safetensors_goes_before_one_of_pickles(tmp_path: Path) -> None:
    write_shards(tmp_path, {"model-1.safetensors": {"w": torch.tensor([1.0])}})
    write_shards(tmp_path, {"pytorch_model-1.bin": {"w": torch.tensor([2.0])}}, "pytorch_model.bin.index.json")
    assert values_of(tmp_path) == {"w": [1.0]}


def test_components_are_opened_from_their_subfolders(tmp_path: Path) -> None:
    save_one(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", 1.0)
    write_shards(tmp_path / "text_encoder", {"model-1.safetensors": {"w": torch.tensor([2.0])}})
    save_one(tmp_path / "vae" / "pytorch_model.bin", 3.0)
    save_one(tmp_path / ".cache" / "model.safetensors", 4.0)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text("{}")
    (tmp_path / "model_index.json").write_text("{}")
    assert values_of(tmp_path) == {"text_encoder/w": [2.0], "unet/w": [1.0], "vae/w": [3.0]}


def test_a_model_index_says_that_the_components_are_meant(tmp_path: Path) -> None:
    save_one(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", 1.0)
    (tmp_path / "v1-5-pruned.safetensors").write_bytes(b"never opened")
    (tmp_path / "v1-5-pruned-emaonly.safetensors").write_bytes(b"never opened")
    (tmp_path / "model_index.json").write_text("{}")
    assert values_of(tmp_path) == {"unet/w": [1.0]}


def test_a_model_index_without_components_leaves_the_weight_file(tmp_path: Path) -> None:
    save_one(tmp_path / "model.safetensors", 2.0)
    (tmp_path / "model_index.json").write_text("{}")
    assert values_of(tmp_path) == {"w": [2.0]}


def test_a_folder_with_several_unrelated_weights_is_refused_with_their_names(tmp_path: Path) -> None:
    for name in ("ghost.safetensors", "deli.safetensors", "dream.ckpt"):
        save_one(tmp_path / name, 1.0)
    with pytest.raises(
        FormatError, match=r"3 weight files and no index: deli\.safetensors, dream\.ckpt, ghost"
    ) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.hint == "name one of the files"


def test_two_variants_without_the_full_precision_are_refused(tmp_path: Path) -> None:
    for name in ("model.fp16.safetensors", "model.bf16.safetensors"):
        save_one(tmp_path / name, 1.0)
    with pytest.raises(FormatError, match=r"2 weight files and no index: model\.bf16\.safetensors, model\.fp16"):
        open_checkpoint(tmp_path)


def test_two_unrelated_indexes_are_refused(tmp_path: Path) -> None:
    for name in ("high", "low"):
        write_shards(tmp_path, {f"{name}-1.safetensors": {"w": torch.ones(1)}}, f"{name}.safetensors.index.json")
    with pytest.raises(FormatError, match=r"has 2 index files: high\.safetensors\.index\.json, low\."):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a.safetensors": {"w": torch.ones(1)}, "b.safetensors": {"v": torch.ones(1)}})
    save_file({"v": torch.ones(1), "w": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(
        FormatError, match=r"b\.safetensors has 'w', which model\.safetensors\.index\.json does not list"
    ):
        open_checkpoint(tmp_path)


def test_a_key_that_no_shard_has_is_refused_with_the_nearest(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a.safetensors": {"layer.weight": torch.ones(1)}})
    save_file({"layer.weigth": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=r"says that 'layer\.weight' is in a\.safetensors, but it is not") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.hint == "did you mean 'layer.weigth'?"


def test_a_refused_folder_leaves_no_file_open(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a.safetensors": {"v": torch.ones(1)}, "b.safetensors": {"w": torch.ones(1)}})
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FormatError, match=r"names the shard 'b\.safetensors', which is not there"):
        open_checkpoint(tmp_path)
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(tmp_path) not in mapped.read_text()
