"""Language models: names and shapes as transformers writes them, what each is recognised as, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_models import infos, name_of, variants_of
from safetensors import safe_open

import remelt as rm
from remelt.archs.detect import detect
from remelt.archs.facts import layout
from remelt.archs.language_parts import (
    DEEPSEEK_V3,
    GEMMA_NORMS,
    GLM_NORMS,
    LANGUAGE_MODELS,
    V3_EXPERTS,
    Decoder,
    Experts,
    decoder,
    deepseek,
    gemma3,
    gpt_oss,
    head,
    llava,
)
from remelt.archs.shapes import other_shapes
from remelt.core.tensor_info import TensorInfo
from remelt.errors import CheckError

transformers = pytest.importorskip("transformers")
initialization = pytest.importorskip("transformers.initialization")

Shapes = dict[str, tuple[int, ...]]
Infos = Mapping[str, TensorInfo]

SMALL = Decoder(layers=3, hidden=16, heads=4, key_heads=2, head=8, inner=24, vocabulary=64)
SMALL_V2 = Experts(None, 8, 4, 4, dense=1, count=4, shared=2, inner=6, corrected=False)
SMALL_V3 = Experts(12, 8, 4, 4, dense=1, count=4, shared=1, inner=6, corrected=True)
EYES = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}


def sizes(size: Decoder, **more: object) -> dict[str, Any]:
    """The sizes of a decoder as configurations of transformers name them."""
    return {
        "num_hidden_layers": size.layers,
        "hidden_size": size.hidden,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_heads,
        "head_dim": size.head,
        "intermediate_size": size.inner,
        "vocab_size": size.vocabulary,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def deepseek_sizes(size: Decoder, experts: Experts) -> dict[str, Any]:
    return sizes(
        size,
        q_lora_rank=experts.query_rank,
        kv_lora_rank=experts.key_rank,
        qk_nope_head_dim=experts.plain,
        qk_rope_head_dim=experts.rotary,
        v_head_dim=size.head,
        head_dim=experts.rotary,
        first_k_dense_replace=experts.dense,
        n_routed_experts=experts.count,
        n_shared_experts=experts.shared,
        moe_intermediate_size=experts.inner,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
    )


def written(folder: Path, model_class: Any, config: Any) -> Shapes:
    """The names and shapes of a file that transformers writes."""
    model_class(config).save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def with_head(size: Decoder, **options: Any) -> Shapes:
    return {**dict(decoder("model.", size, **options)), **dict(head("lm_head", size))}


def text(name: str, size: Decoder = SMALL, **more: object) -> tuple[Any, Any]:
    """A class of transformers with a configuration of those sizes."""
    kind = f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    return getattr(transformers, f"{name}ForCausalLM"), getattr(transformers, kind)(**sizes(size, **more))


def seeing(name: str) -> tuple[Any, Any]:
    """A small model that sees images."""
    own = sizes(SMALL)
    if name in ("Llava", "Gemma3"):
        vision = EYES | {"image_size": 8, "patch_size": 4}
        eyes = transformers.CLIPVisionConfig if name == "Llava" else transformers.SiglipVisionConfig
        words = transformers.LlamaConfig if name == "Llava" else transformers.Gemma3TextConfig
        more = {} if name == "Llava" else {"vision_use_head": False}
        config = getattr(transformers, f"{name}Config")(text_config=words(**own), vision_config=eyes(**vision, **more))
    else:
        own |= {"rope_parameters": MROPE}
        eyes = {"depth": 2, "num_heads": 2, "hidden_size": 16, "embed_dim": 16, "out_hidden_size": 16}
        eyes |= {"intermediate_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        config = getattr(transformers, f"{name}Config")(text_config=own, vision_config=eyes)
    return getattr(transformers, f"{name}ForConditionalGeneration"), config


SMALL_MODELS: dict[str, tuple[str, Callable[[], tuple[Any, Any]], Callable[[], Shapes]]] = {
    "Llama": ("llama", lambda: text("Llama"), lambda: with_head(SMALL)),
    "Mistral": ("llama", lambda: text("Mistral"), lambda: with_head(SMALL)),
    "Qwen2": ("qwen2", lambda: text("Qwen2"), lambda: with_head(SMALL, bias=True)),
    "Qwen3": ("qwen3", lambda: text("Qwen3"), lambda: with_head(SMALL, head_norms=True)),
    "Gemma2": ("gemma2", lambda: text("Gemma2"), lambda: dict(decoder("model.", SMALL, norms=GEMMA_NORMS))),
    "Gemma3": (
        "gemma3",
        lambda: text("Gemma3"),
        lambda: dict(decoder("model.", SMALL, head_norms=True, norms=GEMMA_NORMS)),
    ),
    "Phi3": ("phi3", lambda: text("Phi3"), lambda: with_head(SMALL, fused="am")),
    "Glm": ("glm", lambda: text("Glm", attention_bias=True), lambda: with_head(SMALL, bias=True, fused="m")),
    "Glm4": (
        "glm",
        lambda: text("Glm4", attention_bias=True),
        lambda: with_head(SMALL, bias=True, fused="m", norms=GLM_NORMS),
    ),
    "GptOss": ("gpt_oss", lambda: text("GptOss", num_local_experts=5), lambda: dict(gpt_oss(SMALL, 5))),
    "DeepseekV2": (
        "deepseek",
        lambda: (
            transformers.DeepseekV2ForCausalLM,
            transformers.DeepseekV2Config(**deepseek_sizes(SMALL, SMALL_V2)),
        ),
        lambda: dict(deepseek(SMALL, SMALL_V2)),
    ),
    "DeepseekV3": (
        "deepseek",
        lambda: (
            transformers.DeepseekV3ForCausalLM,
            transformers.DeepseekV3Config(**deepseek_sizes(SMALL, SMALL_V3)),
        ),
        lambda: dict(deepseek(SMALL, SMALL_V3)),
    ),
    "Llava": ("llava", lambda: seeing("Llava"), lambda: dict(llava(SMALL, 16, 32, 2, 5, 4))),
    "Gemma3 that sees": ("gemma3", lambda: seeing("Gemma3"), lambda: dict(gemma3(SMALL, 16, 32, 2, 4, 4))),
}


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_names_and_shapes_are_those_of_files_that_transformers_writes(tmp_path: Path, name: str) -> None:
    arch, made, ours = SMALL_MODELS[name]
    shapes = written(tmp_path, *made())
    # Since version 5, transformers leaves out "vision_model.", that older files have.
    assert {key.replace(".vision_model.", "."): shape for key, shape in ours().items()} == shapes
    for one in (shapes, ours()):
        found = detect(infos(one))
        assert (name_of(found), found.problem) == (arch, None)


def of_class(shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    """Names of a file as the modules have them since transformers 5: experts in one tensor, another order of roots."""
    found: Shapes = {}
    experts: dict[str, list[tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        key = re.sub(r"^language_model\.model\.", "model.language_model.", key)
        key = re.sub(r"^language_model\.lm_head\.", "lm_head.", key)
        key = re.sub(r"^(vision_tower|multi_modal_projector)\.", r"model.\1.", key).replace(".vision_model.", ".")
        gathered = re.sub(r"\.experts\.\d+\.(\w+)\.weight$", r".experts.\1", key)
        if gathered == key:
            found[key] = shape
        else:
            experts.setdefault(gathered, []).append(shape)
    for key, rows in experts.items():
        if key.endswith("down_proj"):
            found[key] = (len(rows), *rows[0])
        elif key.endswith("gate_proj"):
            found[key.replace("gate_proj", "gate_up_proj")] = (len(rows), 2 * rows[0][0], rows[0][1])
    return found


def published() -> dict[str, tuple[Any, Any, Shapes]]:
    """The classes with configurations of published models, and what we say that their files hold."""
    from remelt.archs import language_parts as parts

    clip = transformers.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, image_size=336, patch_size=14,
        num_attention_heads=16,
    )  # fmt: skip
    siglip = transformers.SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, image_size=896, patch_size=14,
        vision_use_head=False, num_attention_heads=16,
    )  # fmt: skip
    llava_config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**sizes(parts.LLAMA_2_7B)), vision_config=clip
    )
    gemma3_config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**sizes(parts.GEMMA_3_4B)), vision_config=siglip
    )
    v2_lite = transformers.DeepseekV2Config(**deepseek_sizes(parts.DEEPSEEK_V2_LITE, parts.V2_LITE_EXPERTS))
    models = {
        "llama": text("Llama", parts.LLAMA_3_8B),
        "qwen2": text("Qwen2", parts.QWEN_25_7B),
        "qwen3": text("Qwen3", parts.QWEN_3_8B),
        "gemma2": text("Gemma2", parts.GEMMA_2_9B),
        "phi3": text("Phi3", parts.PHI_3_MINI),
        "glm": text("Glm4", parts.GLM_4_9B, attention_bias=True),
        "gpt_oss": text("GptOss", parts.GPT_OSS_20B, num_local_experts=32),
        "llava": (transformers.LlavaForConditionalGeneration, llava_config),
        "gemma3": (transformers.Gemma3ForConditionalGeneration, gemma3_config),
        "deepseek": (transformers.DeepseekV2ForCausalLM, v2_lite),
    }
    ours = {name: {key: info.shape for key, info in other_shapes(name).items()} for name in models}
    v3 = transformers.DeepseekV3Config(**deepseek_sizes(DEEPSEEK_V3, V3_EXPERTS))
    return {
        **{name: (*model, ours[name]) for name, model in models.items()},
        "deepseek v3": (transformers.DeepseekV3ForCausalLM, v3, dict(deepseek(DEEPSEEK_V3, V3_EXPERTS))),
    }


def test_published_models_have_the_names_and_shapes_of_the_classes() -> None:
    models = published()
    assert models.keys() >= LANGUAGE_MODELS.keys()
    for name, (model_class, config, ours) in models.items():
        with torch.device("meta"), initialization.no_init_weights():
            model = model_class(config)
        theirs = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings and name in ("gemma2", "gemma3"):
            del theirs["lm_head.weight"]
        assert (name, of_class(ours)) == (name, theirs)


@pytest.mark.parametrize(
    ("name", "arch", "stacks"),
    [
        ("Qwen2VL", "qwen2", ("model.layers", "visual.blocks")),
        ("Qwen2_5_VL", "qwen2", ("model.layers", "visual.blocks")),
        ("Qwen3VL", "qwen3", ("model.language_model.layers", "model.visual.blocks")),
    ],
)
def test_a_model_that_sees_is_a_variant_in_both_layouts(
    tmp_path: Path, name: str, arch: str, stacks: tuple[str, str]
) -> None:
    model_class, config = seeing(name)
    file = written(tmp_path, model_class, config)
    assert all(any(key.startswith(stack) for key in file) for stack in stacks)
    with torch.device("meta"):
        modules = {key: tuple(tensor.shape) for key, tensor in model_class(config).state_dict().items()}
    for shapes in (file, modules):
        found = detect(infos(shapes))
        assert (name_of(found), variants_of(found), found.problem) == (arch, ["vision"], None)
        described = layout(list(shapes), found.arch)
        assert {"language_model", "visual", "embeddings", "lm_head"} <= set(described.components)
        rest = [block for block in described.blocks if not block.startswith(("layers.", "visual."))]
        assert sorted({*rest} - {"deepstack_merger_list.0"}) == ["embeddings", "lm_head", "norm"]


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_the_parts_of_a_model_that_sees_have_names_that_mean_one_thing(name: str) -> None:
    for shapes in (other_shapes(name, 64), infos(of_class({k: i.shape for k, i in other_shapes(name, 64).items()}))):
        found = detect(shapes)
        assert name_of(found) == name
        described = layout(list(shapes), found.arch)
        assert {"language_model", "visual", "projector", "embeddings"} <= set(described.components)
        assert {"language_model.0", "visual.0", "L00", "V00"} <= described.block_names
        assert not described.ambiguous.keys() & set(described.blocks)


def tensors(shapes: Infos, seed: int) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return {key: torch.randn(info.shape, generator=drawn) for key, info in shapes.items()}


def small(name: str) -> Shapes:
    return SMALL_MODELS[name][2]()


def test_a_recipe_that_mixes_two_archs_is_refused() -> None:
    a, b = (rm.model(tensors(infos(small(name)), 0)) for name in ("Llama", "Qwen2"))
    with pytest.raises(CheckError) as caught:
        rm.merge(rm.weighted_sum(a, b, alpha=0.5))
    assert "is llama: " in str(caught.value)
    assert "is qwen2: " in str(caught.value)
    assert "a recipe merges models of one arch; the inputs mix them" in str(caught.value)


def test_llama_and_mistral_are_merged_and_so_is_a_model_with_its_seeing_kin(tmp_path: Path) -> None:
    a, b = (tensors(infos(small(name)), seed) for seed, name in enumerate(("Llama", "Mistral")))
    found = rm.merge(rm.weighted_sum(rm.model(a), rm.model(b), alpha=0.5))
    assert found.keys() == a.keys()
    sees = tensors(infos(written(tmp_path, *seeing("Qwen2VL"))), 2)
    # Qwen2-VL has no width of a head of its own.
    qwen = tensors(infos(with_head(replace(SMALL, head=SMALL.hidden // SMALL.heads), bias=True)), 3)
    mixed = rm.merge(rm.weighted_sum(rm.model(sees), rm.model(qwen), alpha=1.0), missing="first")
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(mixed[key], qwen[key])
    assert torch.equal(mixed["visual.merger.mlp.0.weight"], sees["visual.merger.mlp.0.weight"])


@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen2_5_VL"])
def test_both_spellings_of_a_model_that_sees_meet_and_have_the_same_blocks(tmp_path: Path, name: str) -> None:
    model_class, config = seeing(name)
    file = written(tmp_path, model_class, config)
    with torch.device("meta"):
        modules = {key: tuple(tensor.shape) for key, tensor in model_class(config).state_dict().items()}
    older, newer = tensors(infos(file), 0), tensors(infos(modules), 1)
    assert older.keys() != newer.keys()
    one, other = (layout(list(held), detect(infos(held)).arch) for held in (file, modules))
    assert one.blocks.keys() == other.blocks.keys()
    assert {"layers.2", "visual.1", "norm", "embeddings", "visual.merger", "visual.patch_embed"} <= one.blocks.keys()
    weights = rm.blocks({"layers.1": 1.0, "V00": 1.0}) | 0.0
    mixed = rm.merge(rm.weighted_sum(rm.model(older), rm.model(newer), alpha=weights))
    assert mixed.keys() == older.keys()
    changed = {key for key in mixed if not torch.equal(mixed[key], older[key])}
    assert changed == {*one.blocks["layers.1"], *one.blocks["visual.0"]}
    key = "visual.blocks.0.attn.proj.weight"
    assert torch.equal(mixed[key], newer[f"model.{key}"])
    turned = rm.merge(rm.weighted_sum(rm.model(newer), rm.model(older), alpha=weights))
    assert turned.keys() == newer.keys()


def test_what_no_arch_knows_is_merged_by_inference() -> None:
    shapes = {key.replace(".self_attn.", ".mixer."): shape for key, shape in small("Llama").items()}
    assert detect(infos(shapes)).arch is None
    a, b = (rm.model(tensors(infos(shapes), seed)) for seed in range(2))
    assert rm.merge(rm.weighted_sum(a, b, alpha=rm.blocks({"layers.1": 0.25}) | 0.5)).keys() == shapes.keys()
