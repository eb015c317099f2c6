"""Hashes of files and tensors, what is remembered of them, and recipes locked to them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import remelt as rm
from remelt.api.hashing import HashCache, hash_model
from remelt.api.locking import lock_recipe

RECIPE = """# by hand
version 1

# the first
first = model("a")
mixed = weighted_sum(first, "b", alpha=blocks({"layers.1": 0.2}) | 0.33)  # at the end of a line
# then the result
mixed + (model("b") - first)
"""


@pytest.fixture
def folder(tmp_path: Path, write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate("abc"):
        drawn = torch.Generator().manual_seed(seed)
        write_model(tmp_path / name, {f"layers.{i}.proj.weight": torch.randn(4, 4, generator=drawn) for i in range(3)})
    (tmp_path / "mix.mecha").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REMELT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_the_hash_of_a_file_is_that_of_every_other_tool(folder: Path) -> None:
    found = hash_model("a")
    assert found.sha256 == hashlib.sha256((folder / "a.safetensors").read_bytes()).hexdigest()
    assert found.autov2 == found.sha256[:10]


def test_the_hash_of_the_tensors_is_the_same_for_any_layout(folder: Path) -> None:
    tensors = load_file("a.safetensors")
    first = hash_model("a").tensors
    save_file(dict(reversed(tensors.items())), "again.safetensors", metadata={"other": "metadata"})
    rm.merge(rm.model("a"), output="shards", max_shard_size="100")
    assert hash_model("again").tensors == hash_model("shards").tensors == first
    assert hash_model("again").sha256 != hash_model("a").sha256
    for change in ("value", "shape", "dtype", "name"):
        other = dict(tensors)
        key = "layers.1.proj.weight"
        tensor = other.pop(key)
        if change == "value":
            other[key] = tensor.clone().index_fill_(0, torch.tensor([1]), 0)
        elif change == "shape":
            other[key] = tensor.reshape(2, 8)
        elif change == "dtype":
            other[key] = tensor.view(torch.int32)
        else:
            other[key + "s"] = tensor
        save_file(other, f"{change}.safetensors")
        assert hash_model(change).tensors != first


def test_hashes_are_remembered_while_a_file_stays(folder: Path) -> None:
    first = hash_model("a")
    cache, path = HashCache(), folder / "a.safetensors"
    assert cache.get(path, "file") == first.sha256
    cache.put(path, "file", "remembered")
    assert hash_model("a").sha256 == "remembered"
    assert hash_model("a", cached=False).sha256 == first.sha256
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert hash_model("a").sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("state", ["damaged", "a folder", "read-only"])
def test_a_cache_that_does_not_work_costs_nothing_but_time(state: str, folder: Path) -> None:
    place = folder / "cache" / "hashes.sqlite"
    place.parent.mkdir()
    if state == "damaged":
        place.write_bytes(b"no database" * 1000)
    elif state == "a folder":
        place.mkdir()
    else:
        place.parent.chmod(0o500)
    assert hash_model("a").sha256 == hashlib.sha256((folder / "a.safetensors").read_bytes()).hexdigest()


def test_locking_keeps_what_a_person_wrote(folder: Path) -> None:
    locked = lock_recipe("mix.mecha")
    a, b = (hash_model(name).sha256 for name in "ab")
    assert locked.models == {"a": a, "b": b}
    assert locked.text.startswith("# by hand\nversion 1\n# the first\nfirst = model(")
    assert "# then the result\n" in locked.text
    assert locked.text.count(f'sha256="{a}"') == 1
    assert locked.text.count(f'sha256="{b}"') >= 1
    (folder / "locked.mecha").write_text(locked.text)
    plain, again = rm.merge("mix.mecha"), rm.merge("locked.mecha")
    assert all(plain[key].equal(again[key]) for key in plain)
    assert lock_recipe("locked.mecha") == locked


def test_a_locked_recipe_refuses_other_content_until_it_is_locked_anew(folder: Path) -> None:
    (folder / "locked.mecha").write_text(lock_recipe("mix.mecha").text)
    (folder / "b.safetensors").write_bytes((folder / "c.safetensors").read_bytes())
    with pytest.raises(rm.RefusedError, match="b is locked to content") as caught:
        rm.merge("locked.mecha")
    assert "or remelt lock the recipe anew" in str(caught.value)
    (folder / "locked.mecha").write_text(lock_recipe("locked.mecha").text)
    rm.merge("locked.mecha")


def test_a_lock_needs_its_models(folder: Path) -> None:
    (folder / "b.safetensors").unlink()
    with pytest.raises(rm.ModelNameError, match="no model is named 'b'"):
        lock_recipe("mix.mecha")
