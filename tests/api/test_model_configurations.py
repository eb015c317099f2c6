"""Configurations beside results: what they say is so, and those that contradict each other are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import remelt as rm
from remelt.api.layer_facts import layer_facts, tell_layers
from remelt.archs.shapes import llama_shapes
from remelt.errors import CheckError, FormatError, RecipeError

PLAIN = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
Write = Callable[..., Path]


def tensors_of(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    shapes = llama_shapes(2, hidden=16, heads=4, key_heads=2, intermediate=24, vocabulary=40)
    return {key: torch.randn(info.shape, generator=drawn).to(dtype) for key, info in shapes.items()}


@pytest.fixture
def write(tmp_path: Path, write_model: Write) -> Write:
    """``write(name, config, **more)`` writes a small Llama's folder."""

    def written(name: str, config: Any, tensors: Mapping[str, Tensor] | None = None) -> Path:
        write_model(tmp_path / name / "model", tensors_of(1) if tensors is None else tensors)
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / name / "config.json").write_text(text, encoding="utf-8")
        return tmp_path / name

    return written


def result(folder: Path, recipe: Any, **options: Any) -> Any:
    rm.merge(recipe, folder / "out", overwrite=True, **options)
    return json.loads((folder / "out" / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_element_type_is_that_of_the_result(name: str, write: Write, tmp_path: Path) -> None:
    told = {**PLAIN, name: "float32", "text_config": {name: "float32", "hidden_size": 16}}
    model = write("a", told)
    assert result(tmp_path, rm.model(model)) == told
    found = result(tmp_path, rm.model(model), dtype="bf16")
    assert found == {**told, name: "bfloat16", "text_config": {name: "bfloat16", "hidden_size": 16}}
    assert result(tmp_path, rm.cast(model, dtype="fp16"))[name] == "float16"


def test_a_configuration_that_needs_no_change_stays_to_the_byte(write: Write, tmp_path: Path) -> None:
    text = '{  "model_type":"llama", "torch_dtype": "bfloat16"}  '
    rm.merge(rm.model(write("a", text)), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == text


def test_the_configuration_of_another_folder_tells_the_type_too(write: Write, tmp_path: Path) -> None:
    like = write("like", {**PLAIN, "dtype": "float16"})
    found = result(tmp_path, rm.model(write("a", {**PLAIN, "dtype": "float32"})), like=like)
    assert found == {**PLAIN, "dtype": "float32"}


def test_a_type_that_is_not_told_is_not_added(write: Write, tmp_path: Path) -> None:
    assert result(tmp_path, rm.model(write("a", PLAIN)), dtype="bf16") == PLAIN


def test_what_is_not_quantised_is_not_said_to_be(write: Write, tmp_path: Path) -> None:
    told = {**PLAIN, "quantization_config": {"quant_method": "fp8"}, "text_config": {"compression_config": {}}}
    assert result(tmp_path, rm.model(write("a", told))) == {**PLAIN, "text_config": {}}
    scaled = tensors_of(1) | {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}
    assert result(tmp_path, rm.model(write("b", told, scaled))) == told


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": ' * 5000])
def test_a_configuration_that_is_none_is_refused(text: str, write: Write, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"config\.json is no JSON"):
        rm.merge(rm.model(write("a", text)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 41}, "has vocab_size 41 in its config.json, but model.embed_tokens.weight has 40 rows"),
        ({"hidden_size": 32}, "has hidden_size 32 in its config.json, but model.embed_tokens.weight is 16 wide"),
        ({"num_hidden_layers": 3}, "has num_hidden_layers 3 in its config.json, but model.layers has 2"),
        (
            {"num_attention_heads": 8},
            "attention_heads 8 in its config.json, of 4 rows each, but model.layers.0.self_attn.q_proj.weight has 16",
        ),
        (
            {"num_key_value_heads": 4},
            "key_value_heads 4 in its config.json, of 4 rows each, but model.layers.0.self_attn.k_proj.weight has 8",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_configuration_that_contradicts_the_tensors_is_refused(
    change: dict[str, Any], message: str, write: Write, tmp_path: Path
) -> None:
    recipe = rm.weighted_sum(write("a", PLAIN), write("b", {**PLAIN, **change}))
    with pytest.raises(CheckError) as caught:
        rm.merge(recipe, tmp_path / "out")
    assert "b" in str(caught.value)
    assert message in " ".join(str(caught.value).split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "has hidden_act relu in its config.json, but a has silu"),
        ({"num_experts_per_tok": 4}, "has num_experts_per_tok 4 in its config.json, but a has 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configurations_that_contradict_each_other_are_refused(
    change: dict[str, Any], message: str, write: Write
) -> None:
    told = {**PLAIN, "hidden_act": "silu", "num_experts_per_tok": 2}
    recipe = rm.weighted_sum(write("a", told), write("b", {**told, **change}))
    with pytest.raises(CheckError) as caught:
        rm.plan(recipe)
    assert message in " ".join(str(caught.value).split())


def test_models_that_go_by_other_positions_are_warned_of(write: Write, tmp_path: Path) -> None:
    told = {**PLAIN, "rope_theta": 10000.0}
    recipe = rm.weighted_sum(write("a", told), write("b", {**told, "rope_theta": 1e6}))
    warning = "b has rope_theta 1000000.0, but a 10000.0, as the result will have"
    assert warning in rm.plan(recipe, tmp_path / "out").warnings
    assert result(tmp_path, recipe)["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    "told",
    [
        {**PLAIN, "num_hidden_layers": 1, "num_nextn_predict_layers": 1},
        {**PLAIN, "model_type": "of another kind", "num_attention_heads": 7},
        {"text_config": PLAIN, "vision_config": {**PLAIN, "hidden_size": 99}},
        {"vision_config": {**PLAIN, "hidden_size": 99}},
        {**PLAIN, "hidden_size": 8, "word_embed_proj_dim": 16, "head_dim": 4},
        {},
    ],
    ids=["predicting layers", "unknown kind", "parts", "no language", "projected", "nothing"],
)
def test_what_may_be_so_is_not_refused(told: dict[str, Any], write: Write, tmp_path: Path) -> None:
    assert result(tmp_path, rm.model(write("a", told))) == told


def types(pattern: str) -> list[str]:
    names = {"s": "sliding_attention", "f": "full_attention", "l": "linear_attention"}
    return [names[letter] for letter in pattern]


@pytest.mark.parametrize(
    ("told", "name", "facts"),
    [
        ({"layer_types": ["x", "y", "z", "w", "v"]}, "layer_types", ["x", "y", "z", "w", "v"]),
        ({"model_type": "gemma2"}, "layer_types", types("sfsfs")),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 3}, "layer_types", types("ssfss")),
        ({"model_type": "gemma3_text", "_sliding_window_pattern": 2}, "layer_types", types("sfsfs")),
        ({"model_type": "olmo3"}, "layer_types", types("sssfs")),
        ({"model_type": "qwen3_next", "full_attention_interval": 2}, "layer_types", types("lflfl")),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
            "layer_types",
            types("fffss"),
        ),
        ({"first_k_dense_replace": 2}, "first_k_dense_replace", [True, True, False, False, False]),
        ({"mlp_only_layers": [1, 4]}, "mlp_only_layers", [False, True, False, False, True]),
        (
            {"mlp_only_layers": [1], "decoder_sparse_step": 2},
            "mlp_only_layers",
            [True, True, True, False, True],
        ),
    ],
)
def test_what_is_told_of_each_layer(told: dict[str, Any], name: str, facts: list[Any]) -> None:
    assert layer_facts(told, 5) == {name: facts}


def test_what_is_told_of_no_layer() -> None:
    told = {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 8, "max_window_layers": 3}
    assert layer_facts(told | {"eos_token_id": [1, 2], "architectures": ["A", "B"]}, 2) == {}


def test_layers_are_told_anew() -> None:
    told: dict[str, Any] = {"decoder_sparse_step": 2}
    facts = {"mlp_only_layers": [True, False, True], "first_k_dense_replace": [True, True, False], "kinds": "abc"}
    tell_layers(told, facts)
    assert told == {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0, 2],
        "first_k_dense_replace": 2,
        "kinds": ["a", "b", "c"],
    }
    with pytest.raises(RecipeError, match="layers 0, 2 of the stack have no experts, but a configuration with first_k"):
        tell_layers({}, {"first_k_dense_replace": [True, False, True]})


def test_a_stack_takes_what_each_model_tells_of_its_layers(tmp_path: Path, write_model: Write) -> None:
    for name, count in (("short", 2), ("long", 4)):
        tensors = {f"model.layers.{layer}.mlp.up.weight": torch.ones(2, 2) for layer in range(count)}
        tensors |= {f"model.layers.{layer}.attn.q.weight": torch.ones(2, 2) for layer in range(count)}
        write_model(tmp_path / name / "model", tensors | {"model.embed_tokens.weight": torch.ones(3, 2)})
        told = {"num_hidden_layers": count, "layer_types": [f"{name} {layer}" for layer in range(count)]}
        (tmp_path / name / "config.json").write_text(json.dumps(told), encoding="utf-8")
    short, long = rm.model(tmp_path / "short"), rm.model(tmp_path / "long")
    recipe = rm.stack_layers(rm.layers(short, 0, 2), rm.layers(long, 2, 4))
    assert result(tmp_path, recipe) == {
        "num_hidden_layers": 4,
        "layer_types": ["short 0", "short 1", "long 2", "long 3"],
    }
    (tmp_path / "long" / "config.json").unlink()
    with pytest.raises(RecipeError, match="tells layer_types of each layer, but that of another part does not"):
        result(tmp_path, recipe)
