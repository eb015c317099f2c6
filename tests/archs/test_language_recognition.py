"""Language models by their keys: which arch a file is, near misses, parts and adapters that are no models, blocks."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from drawn_models import infos, name_of

from remelt.archs.arch import find_arch, read_arch
from remelt.archs.detect import detect
from remelt.archs.facts import layout
from remelt.archs.language_parts import LANGUAGE_MODELS, Decoder, Experts, deepseek
from remelt.archs.shapes import llama_shapes, other_shapes, shapes_of
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import OptionError

Infos = Mapping[str, TensorInfo]


@pytest.mark.parametrize("divisor", [1, 4, 64])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_model_is_recognised_at_any_width(name: str, divisor: int) -> None:
    found = detect(other_shapes(name, divisor))
    assert (name_of(found), found.problem) == (name, None)


@pytest.mark.parametrize("name", sorted(LANGUAGE_MODELS.keys() - {"llava", "gemma3"}))
def test_a_model_without_head_and_prefix_is_recognised(name: str) -> None:
    whole = other_shapes(name, 64)
    bare = {key.removeprefix("model."): info for key, info in whole.items() if key.startswith("model.")}
    found = detect(bare)
    assert (name_of(found), found.spelling.alone) == (name, "language_model")
    facts = layout(list(bare), found.arch, found.spelling).facts("layers.1.input_layernorm.weight")
    assert {"layers.1", "L01"} <= set(facts.blocks)


def test_a_tiny_llama_is_recognised() -> None:
    assert name_of(detect(llama_shapes(2, 8, heads=2, key_heads=1, vocabulary=16, intermediate=8))) == "llama"
    assert name_of(detect(llama_shapes(1, 8, heads=2, key_heads=1, tied=True))) == "llama"


LAYER = "model.layers.0"
NEAR_MISSES: list[tuple[str, dict[str, tuple[int, ...] | None], str | None, str]] = [
    ("llama", {f"{LAYER}.self_attn.q_proj.bias": (64,)}, "qwen2", "qwen2: "),
    ("llama", {f"{LAYER}.self_attn.q_norm.weight": (2,)}, "qwen3", "qwen3: "),
    (
        "llama",
        {f"{LAYER}.self_attn.q_proj.bias": (64,), f"{LAYER}.self_attn.o_proj.bias": (64,)},
        None,
        f"nearest is qwen2, but {LAYER}.self_attn.o_proj.bias is there",
    ),
    ("llama", {f"{LAYER}.input_layernorm.bias": (64,)}, None, f"{LAYER}.input_layernorm.bias is there"),
    ("llama", {"model.embed_tokens.weight": None}, None, "nearest is llama, but model.embed_tokens.weight is not"),
    (
        "llama",
        {f"{LAYER}.mlp.gate_proj.weight": None, f"{LAYER}.block_sparse_moe.gate.weight": (8, 64)},
        None,
        "nearest is llama, but this is a Mixtral: its MLPs are mixtures of experts",
    ),
    (
        "qwen3",
        {f"{LAYER}.mlp.gate_proj.weight": None, f"{LAYER}.mlp.gate.weight": (8, 64)},
        None,
        "nearest is qwen3, but this is a mixture of experts (Qwen 3 MoE)",
    ),
    ("qwen2", {"model.layers.1.mlp.gate.weight": (8, 56)}, None, "nearest is qwen2, but this is a mixture of experts"),
    ("qwen3", {f"{LAYER}.pre_feedforward_layernorm.weight": (64,)}, "gemma3", "gemma3: "),
    ("gemma2", {f"{LAYER}.self_attn.q_norm.weight": (4,)}, "gemma3", "gemma3: "),
    ("gemma2", {f"{LAYER}.post_feedforward_layernorm.weight": None}, None, "nearest is gemma2"),
    ("gemma3", {"multi_modal_projector.mm_input_projection_weight": None}, None, "nearest is gemma3"),
    ("phi3", {f"{LAYER}.mlp.gate_up_proj.weight": None}, None, f"{LAYER}.mlp.gate_up_proj.weight is not there"),
    ("glm", {f"{LAYER}.self_attn.q_proj.bias": None}, None, f"{LAYER}.self_attn.q_proj.bias is not there"),
    ("gpt_oss", {f"{LAYER}.self_attn.sinks": None}, None, f"nearest is gpt_oss, but {LAYER}.self_attn.sinks"),
    ("deepseek", {f"{LAYER}.self_attn.kv_b_proj.weight": None}, None, "nearest is deepseek"),
    ("llava", {"multi_modal_projector.linear_2.weight": None}, None, "nearest is llava"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "arch", "evidence"), NEAR_MISSES)
def test_near_misses(name: str, changes: dict[str, tuple[int, ...] | None], arch: str | None, evidence: str) -> None:
    whole: dict[str, TensorInfo] = other_shapes(name, 64)
    for key, shape in changes.items():
        if shape is None:
            del whole[key]
        else:
            assert key not in whole
            whole[key] = TensorInfo(DType.BF16, shape)
    found = detect(whole)
    assert (name_of(found), found.problem) == (arch, None)
    assert evidence in found.evidence


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_blocks_are_the_layers_and_no_key_is_in_two(name: str) -> None:
    keys = list(other_shapes(name, 64))
    arch = find_arch(name)
    described = layout(keys, arch)
    outside = {key for key in keys if described.facts(key).stack is None}
    assert [key for key in outside if re.search(r"layers\.\d+\.", key)] == []
    for key in keys:
        assert sum(block.match(key) is not None for block in arch.blocks) == (key not in outside)
    layers = {block for block in described.blocks if re.match(r"(layers|language_model)\.\d+$", block)}
    numbers = (re.match(r"(?:model|language_model\.model)\.layers\.(\d+)\.", key) for key in keys)
    assert len(layers) == 1 + max(int(found[1]) for found in numbers if found is not None)
    assert described.copied == frozenset()


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_tied_keys_are_the_embedding_and_the_head(name: str) -> None:
    tied = find_arch(name).tied
    assert tied
    shapes = other_shapes(name)
    for row in tied:
        present = [shapes[key].shape for key in row if key in shapes]
        assert len(set(present)) <= 1
    assert any(key in shapes for row in tied for key in row)


def lora(target: str) -> dict[str, TensorInfo]:
    return infos({f"{target}.lora_A.weight": (4, 64), f"{target}.lora_B.weight": (64, 4)})


@pytest.mark.parametrize(
    "held",
    [
        lora("base_model.model.model.layers.0.self_attn.q_proj"),
        lora("model.layers.0.self_attn.q_proj"),
        infos({"lm_head.weight": (64, 16), "model.embed_tokens.weight": (64, 16), "model.norm.weight": (16,)}),
        {key: info for key, info in other_shapes("llava", 64).items() if key.startswith("vision_tower.")},
        {key: info for key, info in other_shapes("gemma3", 64).items() if key.startswith("multi_modal")},
        {key: info for key, info in other_shapes("llama", 64).items() if not key.startswith("model.layers.0.")},
    ],
    ids=["lora of peft", "lora", "embeddings alone", "eyes alone", "projector alone", "later shards"],
)
def test_an_adapter_or_a_part_is_no_model(held: Infos) -> None:
    found = detect(held)
    assert (found.arch, found.problem) == (None, None)


@pytest.mark.parametrize("known", [True, False])
def test_a_hundred_thousand_keys_take_no_time(known: bool) -> None:
    size = Decoder(5, 8, 2, 1, 4, 8, 16)
    experts = Experts(None, 4, 4, 2, dense=1, count=8400, shared=1, inner=2, corrected=True)
    found = infos(dict(deepseek(size, experts)))
    if not known:
        found = {f"{key}.other": info for key, info in found.items()}
    assert len(found) > 100_000
    detect(other_shapes("llama", 64))
    begun = time.perf_counter()
    assert name_of(detect(found)) == ("deepseek" if known else None)
    assert time.perf_counter() - begun < (0.1 if known else 1.0)


def test_shapes_are_found_by_name() -> None:
    assert all(shapes_of(name) == other_shapes(name) for name in LANGUAGE_MODELS)


@pytest.mark.parametrize("value", ['"lm_head.weight"', '["lm_head.weight"]', '[["lm_head.weight"]]', '[["a", 3]]'])
def test_tied_keys_are_lists_of_two_or_more(tmp_path: Path, value: str) -> None:
    path = tmp_path / "toy.toml"
    start = f'name = "toy"\ntitle = "A toy"\ntied = {value}\n'
    path.write_text(start + '[[recognise]]\nkeys = {"toy.weight" = ["*"]}\n', encoding="utf-8")
    with pytest.raises(OptionError, match=r"toy.toml: 'tied' must be lists of two texts or more, but has "):
        read_arch(path)
