"""Tied embeddings: models whose head is their embedding meet each other, and models with a head of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import remelt as rm
from remelt.api.merging import prepare_merges, run_prepared
from remelt.api.options import MergeOptions
from remelt.api.recipes import load_recipe
from remelt.archs.shapes import llama_shapes
from remelt.errors import CheckError

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
Write = Callable[..., Path]


def tensors_of(seed: int, *, tied: bool) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return {key: torch.randn(info.shape, generator=drawn) for key, info in llama_shapes(2, tied=tied).items()}


@pytest.fixture
def models(tmp_path: Path, write_model: Write) -> tuple[Path, Path]:
    """A small Llama with an output head of its own, and one whose head is its embeddings."""
    found = [write_model(tmp_path / name, tensors_of(0, tied=name == "tied")) for name in ("plain", "tied")]
    return found[0], found[1]


def write_folder(folder: Path, write_model: Write, tensors: dict[str, Tensor], tied: bool | None) -> Path:
    write_model(folder / "model", tensors)
    told = {"model_type": "llama", "num_hidden_layers": 2} | ({} if tied is None else {"tie_word_embeddings": tied})
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def test_a_tied_head_is_the_embeddings(models: tuple[Path, Path]) -> None:
    plain, tied = map(load_file, models)
    assert HEAD in plain
    assert HEAD not in tied
    found = rm.merge(rm.weighted_sum(*models, alpha=0.25))
    assert found.keys() == plain.keys()
    torch.testing.assert_close(found[HEAD], torch.lerp(plain[HEAD], tied[EMBEDDINGS], 0.25))
    torch.testing.assert_close(found[EMBEDDINGS], torch.lerp(plain[EMBEDDINGS], tied[EMBEDDINGS], 0.25))


def test_a_tied_model_that_comes_first_has_a_head_beside_others(models: tuple[Path, Path]) -> None:
    plain, tied = map(load_file, models)
    found = rm.merge(rm.weighted_sum(models[1], models[0], alpha=0.25))
    assert found.keys() == plain.keys()
    torch.testing.assert_close(found[HEAD], torch.lerp(tied[EMBEDDINGS], plain[HEAD], 0.25))


@pytest.mark.parametrize("tied_first", [True, False])
def test_the_configuration_says_that_the_result_is_untied(tied_first: bool, tmp_path: Path, write_model: Write) -> None:
    tied = write_folder(tmp_path / "tied", write_model, tensors_of(1, tied=True), True)
    plain = write_folder(tmp_path / "plain", write_model, tensors_of(2, tied=False), False)
    order = (tied, plain) if tied_first else (plain, tied)
    rm.merge(rm.weighted_sum(*order), tmp_path / "out")
    assert config(tmp_path / "out")["tie_word_embeddings"] is False
    rm.merge(rm.model(tied if tied_first else plain), tmp_path / "alone")
    assert config(tmp_path / "alone") == config(tied if tied_first else plain)


def test_a_copy_of_the_embeddings_in_a_tied_file_is_no_head_of_its_own(tmp_path: Path, write_model: Write) -> None:
    lean, full = tensors_of(1, tied=True), tensors_of(2, tied=True)
    a = write_folder(tmp_path / "lean", write_model, lean, True)
    b = write_folder(tmp_path / "full", write_model, full | {HEAD: full[EMBEDDINGS]}, True)
    assert HEAD not in rm.merge(rm.weighted_sum(a, b, alpha=0.25))
    found = rm.merge(rm.weighted_sum(b, a, alpha=0.25))
    assert torch.equal(found[HEAD], found[EMBEDDINGS])
    rm.merge(rm.weighted_sum(b, a), tmp_path / "out")
    assert config(tmp_path / "out")["tie_word_embeddings"] is True


def test_a_model_that_is_not_tied_and_has_no_head_gets_none(tmp_path: Path, write_model: Write) -> None:
    headless = write_folder(tmp_path / "headless", write_model, tensors_of(1, tied=True), False)
    plain = write_folder(tmp_path / "plain", write_model, tensors_of(2, tied=False), False)
    with pytest.raises(CheckError, match=r"lacks 1 key that plain has: lm_head\.weight"):
        rm.plan(rm.weighted_sum(headless, plain))


def test_results_together_are_what_they_are_alone(tmp_path: Path, write_model: Write) -> None:
    """A tied model that meets an untied one in one recipe stays tied in another."""
    tied = write_folder(tmp_path / "tied", write_model, tensors_of(1, tied=True), True)
    plain = write_folder(tmp_path / "plain", write_model, tensors_of(2, tied=False), False)
    other = write_folder(tmp_path / "other", write_model, tensors_of(3, tied=True), True)
    recipes = {"mixed": rm.weighted_sum(tied, plain), "pure": rm.weighted_sum(tied, other)}
    for name, recipe in recipes.items():
        rm.merge(recipe, tmp_path / f"{name}-alone")
    sources = [load_recipe(recipe) for recipe in recipes.values()]
    with prepare_merges(sources, [tmp_path / name for name in recipes], MergeOptions()) as prepared:
        for _ in run_prepared(prepared, MergeOptions()):
            pass
    for name in recipes:
        assert config(tmp_path / name) == config(tmp_path / f"{name}-alone")
        together, alone = (load_file(tmp_path / one / "model.safetensors") for one in (name, f"{name}-alone"))
        assert together.keys() == alone.keys()
        assert all(torch.equal(together[key], alone[key]) for key in alone)


def test_a_head_that_is_left_out_is_not_told(tmp_path: Path, write_model: Write) -> None:
    tied = write_folder(tmp_path / "tied", write_model, tensors_of(1, tied=True), True)
    plain = write_folder(tmp_path / "plain", write_model, tensors_of(2, tied=False), False)
    rm.merge(rm.omit_component(rm.weighted_sum(tied, plain), component="lm_head"), tmp_path / "out")
    assert HEAD not in load_file(tmp_path / "out" / "model.safetensors")
    assert config(tmp_path / "out") == config(tied)


def test_a_stack_that_ends_in_a_tied_model_has_its_embeddings_as_head(tmp_path: Path, write_model: Write) -> None:
    tied = write_folder(tmp_path / "tied", write_model, tensors_of(1, tied=True), True)
    plain = write_folder(tmp_path / "plain", write_model, tensors_of(2, tied=False), False)
    rm.merge(rm.stack_layers(rm.layers(plain, 0, 2), rm.layers(tied, 1, 2)), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found[HEAD], tensors_of(1, tied=True)[EMBEDDINGS])
    assert torch.equal(found[EMBEDDINGS], tensors_of(2, tied=False)[EMBEDDINGS])
    assert config(tmp_path / "out") == {"model_type": "llama", "num_hidden_layers": 3, "tie_word_embeddings": False}
