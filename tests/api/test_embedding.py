"""The recipe inside its result: names that travel, and models that stay distinct from one another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import remelt as rm
from remelt.api.embedding import portable_names, portable_text
from remelt.methods import METHODS


@pytest.fixture
def folder(tmp_path: Path, write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models of one file name in the folders p and q; the current folder is another one."""
    for value, name in enumerate("pq", start=1):
        write_model(tmp_path / name / "m.safetensors", {"w": torch.full((2, 2), float(value))})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def embedded(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        return str(file.metadata()["remelt_recipe"])


def test_two_models_of_one_file_name_stay_two_in_the_result(folder: Path) -> None:
    recipe = rm.weighted_sum(str(folder / "p" / "m.safetensors"), str(folder / "q" / "m.safetensors"), alpha=0.25)
    output = rm.merge(recipe, output=folder / "p" / "out.safetensors")
    text = embedded(output)
    assert 'model("p/m.safetensors")' in text
    assert 'model("q/m.safetensors")' in text
    assert str(folder) not in text
    again = rm.merge(output, models_dirs=[folder])
    assert torch.equal(again["w"], load_file(output)["w"])
    assert torch.equal(again["w"], torch.full((2, 2), 1.25))
    with pytest.raises(rm.CheckError, match=r"no model is named 'p/m\.safetensors'"):
        rm.merge(output)


def test_a_result_beside_the_folders_of_its_models_is_merged_again_as_it_is(folder: Path) -> None:
    (folder / "mix.mecha").write_text(
        f'version 1\nweighted_sum("{(folder / "p" / "m").as_posix()}", "q/m", alpha=0.25)'
    )
    output = rm.merge(folder / "mix.mecha", output=folder / "out.safetensors")
    assert 'model("p/m")' in embedded(output)
    assert torch.equal(rm.merge(output)["w"], torch.full((2, 2), 1.25))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["/x/p/m", "/x/q/m"], ["p/m", "q/m"]),
        (["../v1/model", "../v2/model"], ["v1/model", "v2/model"]),
        (["/x/p/s/m", "/x/q/s/m", "/x/q/n"], ["p/s/m", "q/s/m", "n"]),
        (["m", "/x/q/m"], ["m", "q/m"]),
        (["m", "../m"], ["m", "../m"]),
        (["../m", "../../m"], ["../m", "../../m"]),
        (["m", "/m"], ["m", "root/m"]),
        (["C:/m", "D:\\m"], ["C/m", "D/m"]),
        (["/x/m.safetensors", "/y/m"], ["x/m.safetensors", "y/m"]),
        (["/x/m.safetensors", "/y/m.ckpt"], ["m.safetensors", "m.ckpt"]),
        (["/x/m.safetensors", "/x/m"], ["m.safetensors", "m"]),
        (["/x/m", "/x/./m", "/x/y/../m"], ["m", "m", "m"]),
        (["/x/M", "/y/m"], ["x/M", "y/m"]),
        (["/x/M", "/x/m"], ["M", "m"]),
        (["/b/m", "/a/b/m", "/m"], ["root/b/m", "a/b/m", "root/m"]),
        (["sdxl/c", "/x/sdxl/c", "/x/b"], ["sdxl/c", "x/sdxl/c", "b"]),
        ([".."], ["model"]),
        ([".", "/x/y"], [".", "y"]),
        (["~nobody_of_that_name/m", "m"], ["nobody_of_that_name/m", "m"]),
        (["/"], ["model"]),
        (["/models/p/m", "/x/m"], ["p/m", "x/m"]),
        (["/models/p/m"], ["p/m"]),
        (["/models/m", "/other/m"], ["models/m", "other/m"]),
    ],
)
def test_names_are_as_long_as_they_must_be_to_stay_distinct(names: list[str], expected: list[str]) -> None:
    found = portable_names(names, [Path("/models"), Path("/other")])
    assert [found[name] for name in names] == expected


PARTS = st.lists(st.sampled_from(["a", "b", "A", "m.ckpt", "m"]), min_size=1, max_size=4)


@given(st.lists(st.tuples(st.sampled_from(["", "/", "../", "C:/"]), PARTS), min_size=1, max_size=6))
def test_distinct_paths_never_become_one_name(drawn: list[tuple[str, list[str]]]) -> None:
    names = list(dict.fromkeys(start + "/".join(parts) for start, parts in drawn))
    found = portable_names(names)
    assert len(set(found.values())) == len(names)
    assert not any(name.startswith(("/", "~")) or ":" in name for name in found.values())


def test_a_name_that_another_resembles_is_made_longer_where_its_folder_is_known(folder: Path) -> None:
    recipe = rm.weighted_sum("m", "../q/m", alpha=0.25)
    text = portable_text(recipe, METHODS, [], folder / "p")
    assert '"p/m"' in text
    assert '"q/m"' in text
    assert '"m"' in portable_text(rm.weighted_sum("m", "../q/n"), METHODS, [], folder / "p")


def test_a_result_of_one_folder_is_merged_again_from_it(folder: Path) -> None:
    recipe = rm.weighted_sum(str(folder / "p" / "m.safetensors"), "../q/m.safetensors", alpha=0.25)
    output = rm.merge(recipe, output=folder / "out.safetensors")
    assert torch.equal(rm.merge(output)["w"], torch.full((2, 2), 1.25))


def test_a_path_of_many_parts_takes_no_time() -> None:
    deep = "/" + "a/" * 20_000
    assert portable_names([f"{deep}m", f"/b/{deep}m"])[f"/b/{deep}m"].count("a/") == 20_000
