"""Merged folders of language models load in transformers and generate what models merged by hand generate."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import remelt as rm

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

LAYERS = 4
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "gpt-oss": (
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4, "rope_parameters": _ROPE},
    ),
}
WORDS = ["<pad>", "<s>", "</s>", "the", "cat", "dog", "sat", "on", "a", "mat", "and", "ran", "to", "some", "house"]


def write(
    folder: Path, kind: str, seed: int, words: Sequence[str] = WORDS, rows: int | None = None, **saved: Any
) -> Path:
    """A small language model with a tokenizer of those words; its parameters are random, none of them plain."""
    name, more = KINDS[kind]
    ids = {"pad_token_id": words.index("<pad>"), "bos_token_id": words.index("<s>")}
    config = getattr(transformers, name)(
        vocab_size=rows or len(words), **SIZES, **more, **ids, eos_token_id=words.index("</s>")
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder, **saved)
    level = tokenizers.models.WordLevel({word: row for row, word in enumerate(words)}, "<pad>")
    made = tokenizers.Tokenizer(level)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


def by_hand(config: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The model of a configuration with those tensors, put there without any file."""
    model = transformers.AutoModelForCausalLM.from_config(config)
    left = model.load_state_dict(dict(tensors), strict=False)
    assert not left.unexpected_keys
    assert set(left.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def generated(model: Any, folder: Path, text: str = "<s> the cat sat on") -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    assert tokenizer.decode(given.input_ids[0]) == text
    return model.generate(**given, max_new_tokens=12, do_sample=False)[0].tolist()


def check_same(model: Any, other: Any, folder: Path) -> None:
    """Both give the same logits for a text, and go on with it in the same way."""
    given = torch.arange(3, 15)[None] % model.config.vocab_size
    torch.testing.assert_close(model(given).logits, other(given).logits, rtol=1e-4, atol=1e-4)
    assert generated(model, folder) == generated(other, folder)
    assert len(generated(model, folder)) > 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_folder_loads_and_generates(kind: str, tmp_path: Path) -> None:
    a, b = (write(tmp_path / name, kind, seed) for seed, name in enumerate("ab"))
    out = rm.merge(rm.weighted_sum(a, b, alpha=0.4), tmp_path / "out")
    first, second = tensors_of(a), tensors_of(b)
    merged = {key: torch.lerp(first[key], second[key], 0.4) for key in first}
    check_same(load(out), by_hand(load(a).config, merged), out)
    assert load(out).config.to_dict() == load(a).config.to_dict() | {"_name_or_path": str(out)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_of_layers_loads_and_generates(kind: str, tmp_path: Path) -> None:
    a, b = (write(tmp_path / name, kind, seed) for seed, name in enumerate("ab"))
    out = rm.merge(rm.stack_layers(rm.layers(a, 0, 3), rm.layers(b, 0, 4)), tmp_path / "out")
    first, second = tensors_of(a), tensors_of(b)
    tied = "lm_head.weight" not in first
    made = {key: (first if tied and "embed" in key else second)[key] for key in first if ".layers." not in key}
    made |= {"model.embed_tokens.weight": first["model.embed_tokens.weight"]}
    order = [(first, layer) for layer in range(3)] + [(second, layer) for layer in range(4)]
    for number, (source, layer) in enumerate(order):
        prefix = f"model.layers.{layer}."
        made |= {f"model.layers.{number}.{k[len(prefix) :]}": v for k, v in source.items() if k.startswith(prefix)}
    config = load(a).config
    config.num_hidden_layers = 7
    if getattr(config, "layer_types", None) is not None:
        types = config.layer_types
        config.layer_types = [*types[:3], *types]
        assert len(set(types)) == 2
    check_same(load(out), by_hand(config, made), out)


@pytest.mark.parametrize("kind", ["llama", "gpt-oss"])
def test_shards_and_another_element_type_load_too(kind: str, tmp_path: Path) -> None:
    a = write(tmp_path / "a", kind, 0, max_shard_size="20KB")
    b = write(tmp_path / "b", kind, 1)
    names = sorted(path.name for path in a.glob("*.safetensors"))
    assert len(names) > 2
    out = rm.merge(rm.weighted_sum(a, b), tmp_path / "out", dtype="bf16")
    assert sorted(path.name for path in out.glob("*.safetensors")) == names
    assert load(out).dtype is torch.bfloat16
    assert len(generated(load(out), out)) > 5
    whole = rm.merge(rm.weighted_sum(a, b), tmp_path / "whole", max_shard_size="1GB")
    assert [path.name for path in whole.glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("first", ["tied", "plain"])
def test_a_tied_model_merged_with_an_untied_one_generates(first: str, tmp_path: Path) -> None:
    folders = {"tied": write(tmp_path / "tied", "llama, tied", 0), "plain": write(tmp_path / "plain", "llama", 1)}
    order = [folders[first], *(folder for name, folder in folders.items() if name != first)]
    out = rm.merge(rm.weighted_sum(*order, alpha=0.3), tmp_path / "out")
    tensors = {name: tensors_of(folder) for name, folder in folders.items()}
    assert "lm_head.weight" not in tensors["tied"]
    tensors["tied"]["lm_head.weight"] = tensors["tied"]["model.embed_tokens.weight"]
    one, other = (tensors[folder.name] for folder in order)
    merged = {key: torch.lerp(one[key], other[key], 0.3) for key in one}
    check_same(load(out), by_hand(load(folders["plain"]).config, merged), out)


OTHER_WORDS = ["<s>", "bird", "</s>", "on", "the", "mat", "cat", "sang", "<pad>", "a", "to", "and", "ran", "sat"]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("order", ["union", "base"])
def test_models_of_other_tokens_say_of_shared_ones_what_a_merge_by_hand_says(
    kind: str, order: str, tmp_path: Path
) -> None:
    """By hand, both models are cut down to the tokens that they share, in one order, and merged."""
    a, b = write(tmp_path / "a", kind, 0, rows=20), write(tmp_path / "b", kind, 1, OTHER_WORDS)
    recipe = rm.align_vocabulary(rm.weighted_sum(a, b, alpha=0.4), order=order)
    out = rm.merge(recipe, tmp_path / "out")
    shared = [word for word in WORDS if word in OTHER_WORDS]
    first, second = tensors_of(a), tensors_of(b)
    for tensors, words in ((first, WORDS), (second, OTHER_WORDS)):
        for key in tensors.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
            tensors[key] = tensors[key][[words.index(word) for word in shared]]
    config = load(a).config
    config.vocab_size = len(shared)
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    hand = by_hand(config, {key: torch.lerp(first[key], second[key], 0.4) for key in first})
    model, tokenizer = load(out), transformers.AutoTokenizer.from_pretrained(out)
    rows = tokenizer.convert_tokens_to_ids(shared)
    text = "the cat sat on a mat and ran to the mat"
    given = torch.tensor([tokenizer.convert_tokens_to_ids(text.split())])
    due = hand(torch.tensor([[shared.index(word) for word in text.split()]])).logits
    torch.testing.assert_close(model(given).logits[..., rows], due, rtol=1e-4, atol=1e-4)
    assert len(model.get_input_embeddings().weight) == model.config.vocab_size == 20
    assert tokenizer(text).input_ids == given[0].tolist()
    assert model.config.eos_token_id == tokenizer.eos_token_id == WORDS.index("</s>")
    assert ("bird" in tokenizer.get_vocab()) is (order == "union")
    assert len(generated(model, out)) > 5


def test_weights_along_the_depth_generate_what_a_merge_by_hand_generates(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", "llama", 0), write(tmp_path / "b", "llama", 1)
    (tmp_path / "mix.mecha").write_text(
        "version 1\n"
        f"mixed = weighted_sum({json.dumps(str(a))}, {json.dumps(str(b))}, "
        'alpha=keys({"*self_attn*": depth([0, 1]) | 0}) | depth([1, 0, 0.5]) | 0.25)\nmixed\n'
    )
    out = rm.merge(tmp_path / "mix.mecha", tmp_path / "out")
    first, second = tensors_of(a), tensors_of(b)
    attention, rest = [0, 1 / 3, 2 / 3, 1], [1, 1 / 3, 1 / 6, 0.5]
    merged = {}
    for key in first:
        layer = int(key.split(".")[2]) if ".layers." in key else None
        alpha = 0.25 if layer is None else (attention if "self_attn" in key else rest)[layer]
        merged[key] = torch.lerp(first[key], second[key], alpha)
    check_same(load(out), by_hand(load(a).config, merged), out)
