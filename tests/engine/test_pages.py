"""Reading instead of mapping, and pages let go: the same bytes, and no cache filled by what nobody needs again."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import remelt as rm
from remelt.api import merging
from remelt.engine import native
from remelt.engine.units import Queue, Unit
from remelt.formats.checkpoint import open_checkpoint

EXECUTORS = ("native", "torch") if native.available() else ("torch",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("a", "b", "c")):
        drawn = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.w": torch.randn(300, 301, generator=drawn).half() for i in range(4)}
        tensors |= {"large": torch.randn(2**22 + 70_001, generator=drawn).half(), "scalar": torch.tensor(float(seed))}
        tensors |= {"empty": torch.empty(0, 3), "whole": torch.arange(5) + seed}
        save_file(tensors, folder / f"{name}.safetensors")
    torch.save({"w": torch.randn(7, 9).t(), "v": torch.randn(50_000)}, folder / "d.pt")
    torch.save({"w": torch.randn(9, 7), "v": torch.randn(50_000)}, folder / "e.pt")
    return folder


def recipes(folder: Path) -> dict[str, rm.Recipe]:
    a, b, c, d, e = (
        rm.model(folder / name) for name in ("a.safetensors", "b.safetensors", "c.safetensors", "d.pt", "e.pt")
    )
    return {
        "element": rm.weighted_sum(a, b, alpha=0.3) + 0.5 * (b - c),
        "reduced": rm.slerp(a, b, alpha=0.3),
        "ranked": a + rm.ties_sum(b - a, c - a, k=0.3),
        "pickled": rm.weighted_sum(d, e, alpha=0.3),
    }


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", ["element", "reduced", "ranked", "pickled"])
@pytest.mark.parametrize("cached", [True, False])
def test_inputs_that_are_read_give_the_bytes_of_those_that_are_mapped(
    executor: str, name: str, cached: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    recipe = recipes(folder)[name]
    expected = rm.merge(recipe, output=tmp_path / "mapped.safetensors", threads=1).read_bytes()
    monkeypatch.setattr(merging, "fits_in_memory", lambda _: cached)
    if cached:
        monkeypatch.setenv("REMELT_READ", "read")
    for threads in (1, 3):
        found = rm.merge(recipe, output=tmp_path / f"read{threads}.safetensors", threads=threads).read_bytes()
        assert found == expected


def test_a_way_to_read_that_is_unknown_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMELT_READ", "guess")
    with pytest.raises(rm.OptionError, match="REMELT_READ is map or read, but it is 'guess'"):
        rm.merge(recipes(folder)["element"])


@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_input_that_shrinks_is_told_and_nothing_is_published(
    executor: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    monkeypatch.setenv("REMELT_READ", "read")
    shrinking = tmp_path / "shrinking.safetensors"
    shrinking.write_bytes((folder / "b.safetensors").read_bytes())
    take = Queue.take

    def shrink(queue: Queue, *given: Any) -> Unit | None:
        os.truncate(shrinking, 100_000)
        return take(queue, *given)

    monkeypatch.setattr(Queue, "take", shrink)
    recipe = rm.weighted_sum(rm.model(folder / "a.safetensors"), rm.model(shrinking))
    with pytest.raises(rm.FormatError, match=r"\w+ of shrinking.* was cut short while it was read"):
        rm.merge(recipe, output=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems hold pages as they like")
def test_pages_of_files_that_exceed_the_memory_are_let_go(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, output = recipes(folder)["element"], tmp_path / "mix.safetensors"
    paths = [folder / f"{name}.safetensors" for name in "abc"]
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.read_bytes()
    if min(cached_share(path) for path in paths) < 0.9:
        pytest.skip("the system does not keep what was read")
    monkeypatch.setattr(merging, "fits_in_memory", lambda _: False)
    rm.merge(recipe, output=output)
    assert max(cached_share(path) for path in paths) < 0.5, [cached_share(path) for path in paths]


def cached_share(path: Path) -> float:
    """Which share of a file's pages is in memory."""
    library = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        begin = ctypes.c_char.from_buffer(mapped)
        try:
            failed = library.mincore(ctypes.byref(begin), ctypes.c_size_t(len(mapped)), pages)
        finally:
            del begin
    if failed:
        pytest.skip("the system does not tell what it holds")
    return sum(page & 1 for page in pages) / len(pages)


def test_a_file_that_another_has_replaced_is_not_read(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes((folder / "a.safetensors").read_bytes())
    with open_checkpoint(path) as checkpoint:
        (tmp_path / "other").write_bytes(path.read_bytes())
        os.replace(tmp_path / "other", path)
        with pytest.raises(rm.FormatError, match=r"a\.safetensors was replaced while it was read"):
            checkpoint.part("large", 0, 8)
