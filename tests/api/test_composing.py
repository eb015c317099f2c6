"""Recipes composed of files in several folders, and what may fill a parameter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import remelt as rm
from remelt.api.recipes import compose_source, load_recipe
from remelt.cli.main import run


@pytest.fixture
def folder(tmp_path: Path, write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models k here, of 1, and in sub, of 2; a recipe here with a hole, and one in sub that says k."""
    for value, name in enumerate(("k", "sub/k", "sub/deep/j", "models/shared"), start=1):
        write_model(tmp_path / f"{name}.safetensors", {"w": torch.full((2,), float(value))})
    (tmp_path / "outer.mecha").write_text('version 1\nweighted_sum(parameter("p"), "k", alpha=0.0)\n')
    (tmp_path / "sub" / "inner.mecha").write_text('version 1\nmodel("k")\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REMELT_CONFIG", str(tmp_path / "none.toml"))
    return tmp_path


def test_a_recipe_that_fills_a_parameter_keeps_its_own_models(folder: Path) -> None:
    composed = rm.compose("outer.mecha", p="sub/inner.mecha")
    assert 'model("sub/k")' in rm.serialize(composed)
    assert rm.merge(composed)["w"].tolist() == [2, 2]


def test_so_it_is_on_the_command_line(folder: Path) -> None:
    assert run(["merge", "outer.mecha", "-p", "p", "sub/inner.mecha", "-o", "out.safetensors", "-q"]) == 0
    assert load_file("out.safetensors")["w"].tolist() == [2, 2]
    assert run(["compose", "outer.mecha", "-p", "p", "sub/inner.mecha", "-o", "composed.mecha"]) == 0
    assert rm.merge("composed.mecha")["w"].tolist() == [2, 2]


def test_names_are_as_from_the_outer_recipes_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "other").mkdir()
    (folder / "elsewhere").mkdir()
    (folder / "other" / "outer.mecha").write_text('version 1\nweighted_sum(parameter("p"), "shared", alpha=0.0)\n')
    text = rm.serialize(compose_source(load_recipe("other/outer.mecha"), {"p": "sub/inner.mecha"}))
    assert '"../sub/k"' in text
    assert '"shared"' in text
    (folder / "other" / "composed.mecha").write_text(text)
    monkeypatch.chdir(folder / "elsewhere")
    assert rm.merge(folder / "other" / "composed.mecha", models_dirs=[folder / "models"])["w"].tolist() == [2, 2]


def test_a_composed_recipe_in_python_is_merged_from_the_current_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    composed = rm.compose("../outer.mecha", p="../sub/inner.mecha")
    assert '"../k"' in rm.serialize(composed)
    assert rm.merge(composed)["w"].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        ('weighted_sum("k", "deep/j")', 'weighted_sum("sub/k", "sub/deep/j")'),
        ('cast("k", "fp16")', 'cast("sub/k", "fp16")'),
        ('weighted_sum("../k", "k.safetensors")', 'weighted_sum("k", "sub/k.safetensors")'),
        ('weighted_sum("shared", "nowhere")', 'weighted_sum("shared", "nowhere")'),
        ('model("k", sha256="ab", arch="sdxl")', 'model("sub/k", sha256="ab", arch="sdxl")'),
        ('method_of_a_plugin("k", mode="fp16")', 'method_of_a_plugin("sub/k", mode="fp16")'),
        ('weighted_sum("k", beta=1)', 'weighted_sum("k", beta=1)'),
    ],
)
def test_only_names_of_models_that_are_beside_a_recipe_change(folder: Path, inner: str, expected: str) -> None:
    (folder / "sub" / "inner.mecha").write_text(f"version 1\n{inner}\n")
    (folder / "sub" / "fp16").mkdir()
    (folder / "plain.mecha").write_text('version 1\nparameter("p")\n')
    composed = rm.compose("plain.mecha", p="sub/inner.mecha")
    assert composed.digest() == rm.deserialize(f"version 1\n{expected}\n").digest()


def test_a_text_that_a_file_is_named_after_stays_where_no_model_is_due(
    folder: Path, write_model: Callable[..., Path]
) -> None:
    write_model(folder / "sub" / "fp16.safetensors", {"w": torch.zeros(2)})
    (folder / "sub" / "inner.mecha").write_text('version 1\ncast("k", "fp16")\n')
    composed = rm.compose("outer.mecha", p="sub/inner.mecha")
    assert 'cast("sub/k", "fp16")' in rm.serialize(composed)


def test_an_ambiguous_name_stays_the_inner_recipes(folder: Path) -> None:
    (folder / "sub" / "k.ckpt").write_bytes((folder / "k.safetensors").read_bytes())
    with pytest.raises(rm.RecipeError, match="'sub/k' may be any of 2 models"):
        rm.merge(rm.compose("outer.mecha", p="sub/inner.mecha"))


def test_composing_models_that_are_named_so_never_loads_torch(folder: Path) -> None:
    code = "import sys, remelt; remelt.compose('outer.mecha', p='sub/inner.mecha'); assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(Path(rm.__file__).parent.parent)}
    found = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, check=False)
    assert found.returncode == 0, found.stderr


def test_a_path_fills_a_parameter_of_any_space(folder: Path, write_model: Callable[..., Path]) -> None:
    write_model(folder / "mask", {"w": torch.tensor([0.0, 1.0])})
    (folder / "masked.mecha").write_text('version 1\nweighted_sum("k", "sub/k", alpha=parameter("m", space="param"))\n')
    assert rm.merge(rm.compose("masked.mecha", m="mask"))["w"].tolist() == [1, 2]
    assert run(["merge", "masked.mecha", "-p", "m", "mask", "-o", "out.safetensors", "-q"]) == 0
    assert load_file("out.safetensors")["w"].tolist() == [1, 2]
    (folder / "moved.mecha").write_text('version 1\nmodel("k") + parameter("d", space="delta")\n')
    assert rm.merge(rm.compose("moved.mecha", d=Path("sub/k.safetensors")))["w"].tolist() == [3, 3]
    with pytest.raises(rm.RecipeError, match="weighted_sum needs a mask"):
        rm.merge(rm.compose("masked.mecha", m=rm.weighted_sum("k", "k")))


def test_a_mask_is_given_on_the_command_line_as_the_hint_says(
    folder: Path, write_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(folder / "mask", {"w": torch.tensor([0.0, 1.0])})
    words = ["merge", "k", "sub/k", "-m", "weighted_sum", "-o", "out.safetensors", "-q", "-p", "alpha"]
    assert run([*words, "mask.safetensors"]) == 3
    said = 'a mask from a file is model("mask.safetensors", space="param")'
    assert said in capsys.readouterr().err
    assert run([*words, said.removeprefix("a mask from a file is ")]) == 0
    assert load_file("out.safetensors")["w"].tolist() == [1, 2]
