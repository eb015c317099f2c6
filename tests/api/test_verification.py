"""Verifying what is on disk: checksum, finite numbers, and the recipe made again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import remelt as rm
from remelt.api.verification import verify

SHAPES = [(7, 9), (5,), (), (0, 3), (64, 33)]


@pytest.fixture
def folder(tmp_path: Path, write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate("abc"):
        drawn = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.weight": torch.randn(shape, generator=drawn) for i, shape in enumerate(SHAPES)}
        write_model(tmp_path / name, {**tensors, "half": torch.randn(50, generator=drawn).half()})
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def mix(folder: Path) -> Path:
    return Path(rm.merge(rm.slerp(rm.weighted_sum("a", "b", alpha=0.3), "c"), output="mix.safetensors"))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> None:
    """The same file with other tensors or other metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def test_a_merge_verifies_down_to_the_last_bit(mix: Path) -> None:
    found = verify(mix, recipe=True, sample=None)
    assert found.faults == []
    assert (found.checksum, found.tensors, found.recomputed, found.executor) == (True, 6, 6, None)


def test_without_the_recipe_nothing_is_computed(mix: Path, folder: Path) -> None:
    for name in "abc":
        (folder / f"{name}.safetensors").unlink()
    found = verify(mix)
    assert (found.checksum, found.recomputed, found.faults) == (True, 0, [])
    with pytest.raises(rm.CheckError, match="no model is named 'a'"):
        verify(mix, recipe=True)


def test_a_sample_is_spread_over_the_file(mix: Path) -> None:
    assert verify(mix, recipe=True, sample=2).recomputed == 2
    with pytest.raises(rm.OptionError, match="a sample is of at least one tensor, but got 0"):
        verify(mix, recipe=True, sample=0)


@pytest.mark.parametrize("place", [-1, -2000, -5000])
def test_one_flipped_bit_is_found(place: int, mix: Path) -> None:
    content = bytearray(mix.read_bytes())
    content[place] ^= 1
    mix.write_bytes(content)
    found = verify(mix, recipe=True, sample=None)
    assert found.checksum is False
    assert found.faults[0] == "mix.safetensors: the tensors are not those that were written: the checksum differs"
    assert [fault for fault in found.faults[1:] if fault.endswith("is not what the recipe makes")]
    assert len(found.faults) == 2


def test_swapped_tensors_are_found(mix: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
        tensors["layers.1.weight"] = tensors["layers.1.weight"].flip(0)

    rewrite(mix, swap)
    assert verify(mix).checksum is False


def test_a_file_without_a_checksum_says_so(folder: Path) -> None:
    found = verify("a")
    assert (found.checksum, found.faults) == (None, [])
    with pytest.raises(rm.RecipeError, match=r"a.safetensors carries no recipe"):
        verify("a", recipe=True)


def test_nan_is_a_fault(folder: Path, write_model: Callable[..., Path]) -> None:
    write_model(folder / "nan", {"w": torch.tensor([1.0, float("nan")]), "v": torch.ones(2)})
    found = verify("nan")
    assert found.nonfinite == ("w",)
    assert found.faults == ["w: NaN or infinity"]


def test_another_recipe_inside_is_found(mix: Path) -> None:
    def forge(_: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        metadata["remelt_recipe"] = 'version 1\nweighted_sum("a", "b", alpha=0.3)\n'

    rewrite(mix, forge)
    faults = verify(mix, recipe=True, sample=None).faults
    assert "layers.0.weight: is not what the recipe makes" in faults


def test_missing_and_additional_tensors_are_found(mix: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
        tensors["new"] = torch.ones(1)
        del tensors["half"]
        tensors["layers.1.weight"] = tensors["layers.1.weight"].double()

    rewrite(mix, change)
    faults = verify(mix, recipe=True).faults
    assert "half: the recipe makes it, but the file lacks it" in faults
    assert "new: the file has it, but the recipe does not make it" in faults
    assert "layers.1.weight: the file has F64 [5], but the recipe makes F32 [5]" in faults


def test_by_another_executor_the_last_bits_may_differ_and_no_more(mix: Path) -> None:
    def nudge(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        metadata["remelt_executor"] = "torch 9.9 cuda"
        tensors["layers.4.weight"] = torch.nextafter(tensors["layers.4.weight"], torch.tensor(9.0))

    rewrite(mix, nudge)
    found = verify(mix, recipe=True, sample=None)
    assert found.executor == "torch 9.9 cuda"
    assert not [fault for fault in found.faults if fault.startswith("layers")]

    def move(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
        tensors["layers.4.weight"][0, 0] += 1e-3

    rewrite(mix, move)
    faults = verify(mix, recipe=True, sample=None).faults
    assert "layers.4.weight: differs by more than 4 units in the last place" in faults


def test_shards_have_a_checksum_each(folder: Path) -> None:
    rm.merge(rm.n_average("a", "b"), output="shards", max_shard_size="4KB")
    assert verify("shards", recipe=True, sample=None).faults == []
    shard = sorted(Path("shards").glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 64
    shard.write_bytes(content)
    assert verify("shards").faults == [
        f"{shard.name}: the tensors are not those that were written: the checksum differs"
    ]


def test_the_options_that_decide_a_result_are_in_it_and_used_again(folder: Path) -> None:
    first = Path(rm.merge(rm.weighted_sum("a", "b"), output="first.safetensors", dtype="bf16", compute_dtype="float64"))
    with safe_open(first, framework="pt") as file:
        assert json.loads(file.metadata()["remelt_options"]) == {"compute_dtype": "float64", "dtype": "bf16"}
    assert verify(first, recipe=True, sample=None).faults == []
    second = Path(rm.merge(first, output="second.safetensors"))
    assert second.read_bytes() == first.read_bytes()
    third = Path(rm.merge(first, output="third.safetensors", dtype="fp16"))
    assert load_file(third)["layers.0.weight"].dtype is torch.float16


def test_hostile_options_in_a_file_are_refused(mix: Path) -> None:
    for hostile in ("[" * 100_000, '{"device": "cuda"}', '{"dtype": 3}', "no json"):

        def forge(_: dict[str, torch.Tensor], metadata: dict[str, str], text: str = hostile) -> None:
            metadata["remelt_options"] = text

        rewrite(mix, forge)
        with pytest.raises(rm.RecipeError, match="the options in its metadata are not those of a merge"):
            rm.merge(mix)
