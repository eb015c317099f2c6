"""The scripts in examples/compat run with only their import changed, and merge what they say."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import remelt as rm
import remelt.compat.sd_mecha as sd_mecha
from remelt.cli.main import run
from remelt.errors import OptionError, RecipeError
from remelt.recipe.blocks import BlockWeights
from remelt.text.reader import read_recipe

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "compat"
NAMES = ("ghostmix_v20Bakedvae", "dreamshaper_332BakedVaeClipFix", "deliberate_v2", "v1-5-pruned")
EXACT = {"rtol": 2e-3, "atol": 1e-3}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, write_sd1_models: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    write_sd1_models(folder / "models", NAMES)
    return folder


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(models, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def tensors_of(folder: Path, *names: str) -> list[dict[str, Tensor]]:
    return [
        {key: value.double() for key, value in load_file(folder / "models" / f"{name}.safetensors").items()}
        for name in names
    ]


def agree(found: Mapping[str, Tensor], expected: Callable[[str], Tensor]) -> None:
    for key, value in found.items():
        torch.testing.assert_close(value.double(), expected(key), **EXACT)


def test_a_script_of_sd_mecha_0(folder: Path) -> None:
    runpy.run_path(str(EXAMPLES / "basic_merge.py"))
    a, b, found = tensors_of(folder, *NAMES[:2], "basic_merge")
    agree(found, lambda key: (a[key] + b[key]) / 2)
    assert all(value.dtype is torch.float16 for value in load_file(folder / "models/basic_merge.safetensors").values())


def test_a_script_of_the_first_release(folder: Path) -> None:
    runpy.run_path(str(EXAMPLES / "merge_scheduler.py"))
    a, b, c, found = tensors_of(folder, *NAMES[:3], "scheduled_merge")
    agree(found, lambda key: 0.67 * (a[key] + c[key]) / 2 + 0.33 * b[key])


def test_weights_by_block_of_sd_mecha_0(folder: Path) -> None:
    runpy.run_path(str(EXAMPLES / "block_weights.py"))
    a, b, c, found = tensors_of(folder, *NAMES[:3], "block_weights")

    def expected(key: str) -> Tensor:
        alpha = 0.75 if ".layers.2." in key else 0.33 if "text_model" in key else 0.0
        x, y = a[key] - c[key], b[key] - c[key]
        turned = y - x * (x * y).sum() / (x * x).sum()
        return (1 - alpha) * (a[key] + turned) + alpha * (a[key] + b[key]) / 2

    agree({key: value for key, value in found.items() if "position_ids" not in key}, expected)


def test_a_script_of_sd_mecha_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "current_version.py"))
    assert "'sd1-ldm'" in capsys.readouterr().out
    a, b, found = tensors_of(folder, *NAMES[:2], "current_version")

    def expected(key: str) -> Tensor:
        if key.startswith("first_stage_model"):
            return a[key]
        soft = a[key] + 0.2 * (b[key] - a[key]) / (1 + (b[key] - a[key]).abs())
        other = b[key] if key.endswith(".bias") else soft
        if "input_blocks.0." in key:
            alpha = 0.5
        elif "output_blocks.11." in key or "diffusion_model.out." in key:
            alpha = 0.1
        else:
            alpha = 1.0 if "diffusion_model" in key and "time_embed" not in key else 0.3
        return (1 - alpha) * a[key] + alpha * other

    agree(found, expected)


def test_recipes_are_composed_on_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("incompatible_fusion.mecha", "weighted_sum.mecha"):
        shutil.copy(EXAMPLES / name, folder)
    shutil.copy(folder / "models" / "v1-5-pruned.safetensors", folder)
    words = ["compose", "incompatible_fusion.mecha", "-p", "a", "weighted_sum.mecha", "-p", "c"]
    assert run([*words, "v1-5-pruned.safetensors"]) == 0
    text = capsys.readouterr().out
    assert sorted(rm.recipe.compose.parameters_of(read_recipe(text))) == ["a.a", "a.b", "b"]
    assert run([*words, "v1-5-pruned.safetensors", "-p", "alpha", "x"]) == 3
    assert "the recipe has no parameter 'alpha'" in capsys.readouterr().err
    assert run(["compose", "incompatible_fusion.mecha", "-p", "a", "missing.mecha"]) == 2
    assert "there is no recipe 'missing.mecha'" in capsys.readouterr().err
    assert run(["info", "sd1", "-v"]) == 0


def test_three_models_stay_between_two_where_an_old_merger_merges_them(folder: Path) -> None:
    recipe = sd_mecha.add_difference(NAMES[0], NAMES[1], NAMES[2], alpha=3.0)
    merger = sd_mecha.RecipeMerger(models_dir="models", default_device="cpu")
    found: dict[str, Tensor] = {}
    merger.merge_and_save(recipe, output=found, save_dtype=torch.float32, threads=1)
    a, b, c = tensors_of(folder, *NAMES[:3])
    agree(found, lambda key: (a[key] + 3 * (b[key] - c[key])).clamp(a[key].minimum(b[key]), a[key].maximum(b[key])))
    paths = [f"models/{name}.safetensors" for name in NAMES[:3]]
    free = sd_mecha.merge(sd_mecha.add_difference(*paths, alpha=3.0), output_dtype=torch.float32)
    agree(free, lambda key: a[key] + 3 * (b[key] - c[key]))
    kept = sd_mecha.merge(sd_mecha.add_difference(*paths, alpha=3.0, clamp_to_ab=True), output_dtype=torch.float32)
    agree(kept, lambda key: found[key].double())


def test_methods_and_recipes_say_the_same_as_ours() -> None:
    a, b, c = (rm.model(name) for name in "abc")
    pairs = [
        (sd_mecha.weighted_sum(a, b, 0.3), rm.weighted_sum(a, b, alpha=0.3)),
        (sd_mecha.n_average(a, b, c), rm.n_average(a, b, c)),
        (sd_mecha.clamp(a, b, c, stiffness=0.5), rm.clamp(a, b, c, stiffness=0.5)),
        (sd_mecha.cast(a, dtype=torch.bfloat16), rm.cast(a, dtype="bfloat16")),
        (sd_mecha.pick_component(a, "vae") | b, rm.pick_component(a, component="vae") | b),
        (sd_mecha.add_difference(a, sd_mecha.subtract(b, c), alpha=0.5), rm.add_difference(a, b - c, alpha=0.5)),
        (
            sd_mecha.add_difference_ties(a, b, c, alpha=0.7, k=0.2),
            rm.add_difference(a, rm.ties_sum(b - a, c - a, k=0.2), alpha=0.7),
        ),
        (sd_mecha.model("a", "sdxl-sgm", "delta"), rm.model("a", arch="sdxl", space="delta")),
        (sd_mecha.model("a", "sd1", "base"), rm.model("a", arch="sd1")),
        (sd_mecha.parameter("x", sd_mecha.MergeSpace.DELTA, "sd1"), rm.parameter("x", space="delta", arch="sd1")),
        (sd_mecha.deserialize(["version 0.1.0\n", 'model "a"\n', 'model "b"\n', 'merge "subtract" &0 &1\n']), a - b),
    ]
    for found, expected in pairs:
        assert found.digest() == expected.digest()
    assert sd_mecha.convert({"BASE": 0.5, "IN00": 0.5, "VAE": 0.5}, a) | 0.5 == rm.blocks(BASE=0.5, IN00=0.5) | 0.5
    assert isinstance(sd_mecha.literal({"model.w": 0.5}, "sd1-ldm"), BlockWeights)
    assert sd_mecha.blocks("sd1", "unet", *range(25))["sd1_unet_block_mid"] == 12


def test_adapters_are_differences() -> None:
    for one in (
        sd_mecha.lora("a", "sd1"),
        sd_mecha.model("a", "sd1", "lora"),
        sd_mecha.model("a", "sdxl-kohya_kohya_lora"),
    ):
        assert (one.name, one.space, one.arch) == ("a", "delta", None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: sd_mecha.model("a", "sd9-ldm"), "no model config is named 'sd9-ldm'"),
        (lambda: sd_mecha.model("a", merge_space="weights"), "is no merge space"),
        (lambda: sd_mecha.blocks("sd1", "unet", 1, 2), "blocks got 2 numbers, but the unet of sd1 has 25 blocks"),
        (lambda: sd_mecha.blocks("sd1", "unet", in99=1), "'in99' is no block of the unet of sd1"),
        (lambda: sd_mecha.default("sd1", "vae"), "'vae' is no component of sd1"),
        (lambda: sd_mecha.weighted_sum("a", "b", alpha={"sd1_unet_block_in99": 1}), "'in99' is no block"),
        (lambda: sd_mecha.weighted_sum("a", "b", beta=1), "weighted_sum has no argument 'beta'"),
        (lambda: sd_mecha.add_difference("a", "b", clamp_to_ab=True), "it needs a third"),
        (lambda: sd_mecha.convert(rm.model("a", arch="sd1"), "sdxl-sgm"), "is sd1, and has other keys"),
        (lambda: sd_mecha.extensions.model_configs.resolve("sd1-ldn"), "no model config is named 'sd1-ldn'"),
        (lambda: sd_mecha.merge_method(type("Mapped", (), {})), "is a class with a map of keys"),
        (lambda: sd_mecha.Parameter(Tensor, "weights"), "a merge space is one of"),
    ],
)
def test_what_cannot_be_meant_is_refused(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        wrong()


def test_an_argument_that_merge_never_had_is_refused() -> None:
    with pytest.raises(OptionError, match="merge has no argument 'outputs'"):
        sd_mecha.merge(rm.model("a"), outputs="x")
