"""Models of the layers of others: merged from files, with a configuration that tells how many there are."""

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
from remelt.cli.main import run
from remelt.errors import RecipeError

LAYERS = 4


def tensors_of(seed: int) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    found = {"model.embed_tokens.weight": torch.randn(8, 4, generator=drawn)}
    for layer in range(LAYERS):
        for name in ("mlp.up.weight", "self_attn.q.weight", "norm.weight"):
            found[f"model.layers.{layer}.{name}"] = torch.randn(4, 4, generator=drawn)
    return found | {"model.norm.weight": torch.randn(4, generator=drawn), "lm_head.weight": torch.ones(8, 4) * seed}


@pytest.fixture
def models(tmp_path: Path, write_model: Callable[..., Path]) -> dict[str, dict[str, Tensor]]:
    found = {name: tensors_of(seed) for seed, name in enumerate("ab", start=1)}
    told: dict[str, Any] = {"num_hidden_layers": LAYERS, "vocab_size": 8, "layer_types": ["full", "sliding"] * 2}
    for name, tensors in found.items():
        write_model(tmp_path / name / "model", tensors)
        (tmp_path / name / "config.json").write_text(json.dumps(told), encoding="utf-8")
    return found


def test_a_stack_reads_each_layer_where_it_is(
    models: dict[str, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stack.mecha").write_text('version 1\nstack_layers(layers("a", 0, 3), layers("b", 1, 4))\n')
    assert run(["merge", "stack.mecha", "-o", "out", "--max-shard-size", "1GB"]) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    a, b = models["a"], models["b"]
    assert len(found) == 2 * 3 * 3 + 3
    for layer in range(6):
        source, number = (a, layer) if layer < 3 else (b, layer - 2)
        for name in ("mlp.up.weight", "self_attn.q.weight", "norm.weight"):
            assert torch.equal(found[f"model.layers.{layer}.{name}"], source[f"model.layers.{number}.{name}"])
    assert torch.equal(found["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(found["lm_head.weight"], b["lm_head.weight"])
    assert torch.equal(found["model.norm.weight"], b["model.norm.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {
        "num_hidden_layers": 6,
        "vocab_size": 8,
        "layer_types": ["full", "sliding", "full", "sliding", "full", "sliding"],
    }
    assert run(["verify", "out"]) == 0


def test_parts_are_merged_and_weighed_by_depth(models: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    a, b = rm.model(tmp_path / "a"), rm.model(tmp_path / "b")
    merged = rm.weighted_sum(rm.layers(a, 0, 2), rm.layers(b, 2, 4), alpha=rm.depth([0.0, 1.0, 0.5]) | 0.25)
    found = rm.merge(rm.stack_layers(merged, rm.layers(a, 3, 4)))
    for layer, alpha in ((0, 0.0), (1, 1.0)):
        first = models["a"][f"model.layers.{layer}.mlp.up.weight"]
        second = models["b"][f"model.layers.{layer + 2}.mlp.up.weight"]
        torch.testing.assert_close(found[f"model.layers.{layer}.mlp.up.weight"], torch.lerp(first, second, alpha))
    assert torch.equal(found["model.layers.2.mlp.up.weight"], models["a"]["model.layers.3.mlp.up.weight"])
    embeddings = [models[name]["model.embed_tokens.weight"] for name in "ab"]
    torch.testing.assert_close(found["model.embed_tokens.weight"], torch.lerp(*embeddings, 0.25))


def test_more_layers_than_there_are_is_refused(models: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    a = rm.model(tmp_path / "a")
    with pytest.raises(RecipeError, match=r"has 4 layers in model\.layers, but layers 2 to 5 are asked for"):
        rm.plan(rm.stack_layers(rm.layers(a, 2, 5)))
    with pytest.raises(RecipeError, match="has no stacks of layers named 'blocks'"):
        rm.plan(rm.layers(a, 0, 1, stack="blocks"))
    with pytest.raises(RecipeError, match="has no stack of layers"):
        rm.plan(rm.layers(rm.model({"w": torch.zeros(2)}), 0, 1))


def test_tensors_in_memory_have_layers_too() -> None:
    held = tensors_of(3)
    found = rm.merge(rm.layers(rm.model(held), 1, 2))
    assert torch.equal(found["model.layers.0.norm.weight"], held["model.layers.1.norm.weight"])
    assert "model.layers.1.norm.weight" not in found
    assert "lm_head.weight" in found


def test_only_the_configuration_of_the_stack_follows_it(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    told = {
        "text_config": {"num_hidden_layers": LAYERS, "layer_types": [0, 1, 2, 3]},
        "vision_config": {"num_hidden_layers": 7, "depths": [1] * 7},
        "audio_config": {"num_hidden_layers": LAYERS},
    }
    tensors = {key.replace("model.", "language_model.text.", 1): value for key, value in tensors_of(1).items()}
    write_model(tmp_path / "a" / "model", tensors)
    (tmp_path / "a" / "config.json").write_text(json.dumps(told), encoding="utf-8")
    recipe = rm.stack_layers(rm.layers("a", 0, 3), rm.layers("a", 1, 4))
    rm.merge(recipe, tmp_path / "out", models_dirs=[tmp_path], max_shard_size="1GB")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["text_config"] == {"num_hidden_layers": 6, "layer_types": [0, 1, 2, 1, 2, 3]}
    assert found["vision_config"] == told["vision_config"]
    assert found["audio_config"] == told["audio_config"]


def test_layers_of_other_names_do_not_follow_one_another() -> None:
    a = rm.model(tensors_of(1), name="a")
    other = {key.replace("model.layers", "transformer.h"): value for key, value in tensors_of(2).items()}
    b = rm.model(other, name="b")
    with pytest.raises(RecipeError) as caught:
        rm.merge(rm.stack_layers(rm.layers(a, 0, 2), rm.layers(b, 2, 4)))
    assert (
        "are named transformer.h, but those of a, layers 0 to 2 model.layers: the layers of one stack are named alike"
        in (str(caught.value))
    )
