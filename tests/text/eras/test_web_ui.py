"""What web UIs write into their files is read as a recipe where it tells all, and refused with what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import remelt as rm
from remelt.api.recipes import load_recipe
from remelt.errors import RecipeError
from remelt.recipe.node import Call, Model, Value
from remelt.text.writer import write_recipe

HASHES = {name: name * 64 for name in "abc"}
MODELS = {digest: {"name": f"sub/{name}.safetensors", "legacy_hash": "x"} for name, digest in HASHES.items()}
WEB_UI = {
    "type": "webui",
    "primary_model_hash": HASHES["a"],
    "secondary_model_hash": HASHES["b"],
    "tertiary_model_hash": HASHES["c"],
    "interp_method": "Weighted sum",
    "multiplier": 0.3,
    "save_as_half": False,
    "bake_in_vae": "None",
    "discard_weights": "",
    "is_inpainting": False,
    "is_instruct_pix2pix": False,
}
SUPER_MERGER = {
    "type": "sd-webui-supermerger",
    "weights_alpha": None,
    "weights_beta": None,
    "model_a": HASHES["a"],
    "model_b": HASHES["b"],
    "model_c": HASHES["c"],
    "base_alpha": 0.5,
    "base_beta": 0.25,
    "mode": "Weight sum",
    "mbw": False,
    "elemental_merge": "",
    "calcmode": "normal",
    "Off": [],
}
PRESET = [place / 50 for place in range(25)]


@pytest.fixture
def made(tmp_path: Path, write_model: Callable[..., Path]) -> Callable[..., Path]:
    def make(told: dict[str, Any], models: Any = MODELS) -> Path:
        metadata = {"sd_merge_recipe": json.dumps(told), "sd_merge_models": json.dumps(models)}
        return write_model(tmp_path / "merged", {"w": torch.zeros(2)}, metadata)

    return make


@pytest.mark.parametrize(
    ("told", "last"),
    [
        (WEB_UI, "weighted_sum(a, b, alpha=0.3)"),
        (WEB_UI | {"save_as_half": True}, 'cast(weighted_sum(a, b, alpha=0.3), dtype="fp16")'),
        (WEB_UI | {"interp_method": "Add difference"}, "add_difference(a, b - c, alpha=0.3)"),
        (SUPER_MERGER, "weighted_sum(a, b, alpha=0.5)"),
        (SUPER_MERGER | {"mode": "Add difference"}, "add_difference(a, b - c, alpha=0.5)"),
        (SUPER_MERGER | {"mode": "sum Twice"}, "weighted_sum(weighted_sum(a, b, alpha=0.5), c, alpha=0.25)"),
        (SUPER_MERGER | {"mode": "Triple sum"}, "0.25 * a + 0.5 * b + 0.25 * c"),
    ],
)
def test_a_merge_that_is_told_whole_becomes_a_recipe(
    made: Callable[..., Path], told: dict[str, Any], last: str
) -> None:
    recipe = load_recipe(made(told)).recipe
    text = write_recipe(recipe)
    assert text.splitlines()[-1] == last
    assert HASHES["a"] in text


def test_a_model_that_was_only_saved_anew_is_itself(made: Callable[..., Path]) -> None:
    recipe = load_recipe(made(WEB_UI | {"interp_method": "No interpolation"})).recipe
    assert isinstance(recipe, Model)
    assert (recipe.name, recipe.sha256) == ("sub/a.safetensors", HASHES["a"])


@pytest.mark.parametrize("numbers", [PRESET, [0.9, *PRESET], ",".join(map(str, PRESET))])
def test_weights_by_block_keep_their_places(made: Callable[..., Path], numbers: Any) -> None:
    told = SUPER_MERGER | {"mbw": True, "base_alpha": 0.9, "weights_alpha": numbers}
    expected = rm.blocks(",".join(map(str, [0.9, *PRESET])))
    recipe = load_recipe(made(told)).recipe
    assert isinstance(recipe, Call)
    ((name, alpha),) = recipe.kwargs
    assert name == "alpha"
    assert isinstance(alpha, Value)
    assert alpha.value == expected


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (WEB_UI | {"bake_in_vae": "x.vae.pt"}, "the VAE of 'x.vae.pt' was put in"),
        (WEB_UI | {"discard_weights": "ema"}, "keys that fit 'ema' were left out"),
        (WEB_UI | {"is_inpainting": True}, "inpainting"),
        (WEB_UI | {"interp_method": "Sigmoid"}, "its method 'Sigmoid' is not known"),
        (WEB_UI | {"type": "other"}, "made by 'other'"),
        (WEB_UI | {"secondary_model_hash": None}, "it names no secondary model"),
        (WEB_UI | {"multiplier": None}, "multiplier is None"),
        (WEB_UI | {"multiplier": 10**400}, "multiplier is 1000000000000000000000000000000000000000, and no number"),
        (WEB_UI | {"primary_model_hash": "d" * 64}, "the model with the hash dddddddddd has no name"),
        (SUPER_MERGER | {"calcmode": "cosineA"}, "its calculation 'cosineA' is not known"),
        (SUPER_MERGER | {"elemental_merge": "IN00:attn:0.5"}, "elements were merged"),
        (SUPER_MERGER | {"Exclude": ["IN00"]}, "blocks or elements were chosen"),
        (SUPER_MERGER | {"mbw": True, "weights_alpha": [0.5] * 19}, "it has 19 weights by block"),
        (SUPER_MERGER | {"mbw": True, "weights_alpha": "a,b"}, "weights_alpha are no numbers"),
        (SUPER_MERGER | {"mbw": True, "weights_alpha": [10**400] * 25}, "weights_alpha are no numbers"),
        (SUPER_MERGER | {"mode": "Cubic"}, "its mode 'Cubic' is not known"),
    ],
)
def test_what_is_not_told_is_named(made: Callable[..., Path], told: dict[str, Any], message: str) -> None:
    with pytest.raises(
        RecipeError, match=f"merged.safetensors: the recipe in its metadata is not complete: .*{message}"
    ):
        load_recipe(made(told))


def test_metadata_that_is_no_json_is_refused(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    path = write_model(tmp_path / "merged", {"w": torch.zeros(2)}, {"sd_merge_recipe": "{"})
    with pytest.raises(RecipeError, match="has a sd_merge_recipe that is no JSON object"):
        load_recipe(path)
