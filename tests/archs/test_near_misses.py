"""Files that come close to an arch and are another one, or none: a row for every arch, and what people have beside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import pytest
from drawn_models import infos, name_of, variants_of

from remelt.archs.arch import all_archs, find_arch
from remelt.archs.detect import detect
from remelt.archs.dialects import Spelling, from_original
from remelt.archs.image_parts import IMAGE_MODELS
from remelt.archs.shapes import (
    flux_shapes,
    image_shapes,
    other_shapes,
    sd1_shapes,
    sd2_shapes,
    sd3_shapes,
    sdxl_refiner_shapes,
    sdxl_shapes,
    without_prefix,
)
from remelt.core.tensor_info import TensorInfo

Shapes = dict[str, TensorInfo]
Changes = Mapping[str, tuple[int, ...] | None]
ROOT = "model.diffusion_model."
CLIP_LAYER = "encoder.layers.{}.layer_norm1.weight"
LAYER = "model.layers.0."
CONTROL = "this is a ControlNet, which stands beside a model and is merged with its own kind only"
ADAPTER = "this is an adapter (LoRA or the like), not a model"
WORD = "this is an embedding of textual inversion, not a model"


@functools.cache
def narrowed(name: str) -> Shapes:
    """A narrow model of an arch."""
    whole: dict[str, Callable[[int], Shapes]] = {
        "sd1": sd1_shapes, "sd2": sd2_shapes, "sdxl": sdxl_shapes, "sdxl_refiner": sdxl_refiner_shapes,
        "sd3": sd3_shapes, "flux": flux_shapes,
    }  # fmt: skip
    if name in whole:
        return whole[name](32)
    return image_shapes(name, 32) if name in IMAGE_MODELS else other_shapes(name, 32)


def changed(name: str, changes: Changes) -> Shapes:
    """A model of which some tensors have other shapes, are there beside, or are not there (None)."""
    held = narrowed(name) | infos({key: shape for key, shape in changes.items() if shape is not None})
    assert all(key in narrowed(name) for key, shape in changes.items() if shape is None)
    return {key: info for key, info in held.items() if changes.get(key, ()) is not None}


KIN: list[tuple[str, Changes, str | None, str]] = [
    ("sd1", {f"{ROOT}input_blocks.1.1.proj_in.weight": (10, 10)}, "sd2", "sd2: "),
    ("sd1", {f"{ROOT}input_blocks.0.0.weight": (10, 12, 3, 3)}, None, "is [10, 12, 3, 3], expected [320, 4..9, 3, 3]"),
    ("sd2", {f"{ROOT}input_blocks.1.1.proj_in.weight": (10, 10, 1, 1)}, "sd1", "sd1: "),
    ("sd2", {f"{ROOT}output_blocks.11.0.in_layers.2.weight": None}, None, "nearest is sd2, but "),
    ("sdxl", {f"{ROOT}input_blocks.9.0.op.weight": (40, 40, 3, 3)}, None, "this is an SDXL refiner (12 input blocks)"),
    ("sdxl_refiner", {f"{ROOT}input_blocks.0.0.weight": (12, 9, 3, 3)}, None, "expected [384, 4, 3, 3]"),
    ("sd3", {f"{ROOT}x_embedder.proj.weight": (48, 4, 2, 2)}, None, "[48, 4, 2, 2], expected [1536|2432, 16, 2, 2]"),
    ("flux", {f"{ROOT}double_blocks.0.img_mod.lin.weight": None}, None, "nearest is flux, but "),
    ("flux", {f"{ROOT}img_in.weight": (96, 16)}, None, "img_in.weight is [96, 16], expected [3072, 64..384]"),
    ("flux2", {f"{ROOT}double_stream_modulation_img.lin.weight": None}, None, "nearest is flux2, but "),
    ("chroma", {f"{ROOT}img_in_patch.weight": (96, 3, 16, 16), f"{ROOT}img_in.weight": None}, None, "Chroma Radiance"),
    ("qwen_image", {f"{ROOT}img_in.weight": (96, 32)}, None, "nearest is qwen_image, but "),
    ("z_image", {f"{ROOT}layers.0.attention.qkv.weight": None}, None, "nearest is z_image, but "),
    ("lumina2", {f"{ROOT}layers.0.attention.qkv.weight": None, f"{ROOT}layers.0.attention.wq.weight": (8, 8)}, None,
     "this is Lumina-Next"),
    ("pixart", {f"{ROOT}blocks.0.mlp.fc1.weight": None, f"{ROOT}blocks.0.mlp.inverted_conv.conv.weight": (8, 4, 1, 1)},
     None, "this is Sana"),
    ("auraflow", {f"{ROOT}init_x_linear.weight": (96, 64)}, None, "is [96, 64], expected [*, 16]"),
    ("wan", {f"{ROOT}head.modulation": None}, None, f"nearest is wan, but {ROOT}head.modulation is not there"),
    ("hunyuan_video", {f"{ROOT}img_in.proj.weight": (96, 4, 1, 2, 2)}, None, "expected [3072, 16.., 1, 2, 2]"),
    ("ltx", {f"{ROOT}patchify_proj.weight": (64, 64)}, None, "patchify_proj.weight is [64, 64], expected"),
    ("ltx", {f"{ROOT}audio_patchify_proj.weight": (64, 128)}, None, "nearest is ltx, but "),
    ("ltx2", {f"{ROOT}audio_scale_shift_table": None}, None, "nearest is ltx2, but "),
    ("wan_vae", {"decoder.conv1.weight": (12, 48, 3, 3, 3)}, None, "nearest is wan_vae, but "),
    ("wan22_vae", {"encoder.conv1.weight": (5, 3, 3, 3, 3)}, None, "nearest is wan22_vae, but "),
    ("hunyuan_video_vae", {"decoder.conv_in.conv.weight": (16, 32, 3, 3, 3)}, None, "nearest is hunyuan_video_vae"),
    ("ltx_vae", {"decoder.conv_in.conv.weight": (16, 16, 3, 3, 3)}, None, "nearest is ltx_vae, but "),
    ("ltx_vae_091", {"decoder.last_scale_shift_table": None}, None, "nearest is ltx_vae"),
    ("ltx_vae_095", {"decoder.last_scale_shift_table": None}, None, "nearest is ltx_vae"),
    ("vae", {"quantize.embedding.weight": (64, 4)}, None, "autoencoder.quantize.embedding.weight is there"),
    ("vae", {"decoder.conv_in.weight": (16, 3, 3, 3)}, None, "is [16, 3, 3, 3], expected [*, 4, 3, 3]"),
    ("clip_l", {f"text_model.{CLIP_LAYER.format(12)}": (24,)}, None, f"text_model.{CLIP_LAYER.format(12)} is there"),
    ("open_clip_g", {"transformer.resblocks.32.ln_1.weight": (40,)}, None, "nearest is open_clip_"),
    ("open_clip_h", {"transformer.resblocks.24.ln_1.weight": (32,)}, None, "nearest is open_clip_"),
    ("t5", {"encoder.block.0.layer.1.DenseReluDense.wi_0.weight": None,
            "encoder.block.0.layer.1.DenseReluDense.wi.weight": (8, 8)}, None, "this is T5 of version 1.0"),
    ("vit", {"vit.embeddings.distillation_token": (1, 1, 24)}, None, "vit.embeddings.distillation_token is there"),
    ("llama", {f"{LAYER}self_attn.q_norm.weight": (4,)}, "qwen3", "qwen3: "),
    ("llama", {f"{LAYER}mlp.gate_proj.weight": None, f"{LAYER}block_sparse_moe.gate.weight": (8, 64)}, None, "Mixtral"),
    ("qwen2", {f"{LAYER}self_attn.o_proj.bias": (8,)}, None, "nearest is qwen2, but "),
    ("qwen3", {f"{LAYER}mlp.gate_proj.weight": None, f"{LAYER}mlp.gate.weight": (8, 64)}, None, "Qwen 3 MoE"),
    ("gemma2", {f"{LAYER}self_attn.q_norm.weight": (4,)}, "gemma3", "gemma3: "),
    ("gemma3", {"multi_modal_projector.mm_input_projection_weight": None}, None, "nearest is gemma3"),
    ("phi3", {f"{LAYER}mlp.gate_up_proj.weight": None}, None, "gate_up_proj.weight is not there"),
    ("glm", {f"{LAYER}self_attn.q_proj.bias": None}, None, "q_proj.bias is not there"),
    ("deepseek", {f"{LAYER}self_attn.kv_b_proj.weight": None}, None, "nearest is deepseek"),
    ("gpt_oss", {f"{LAYER}self_attn.sinks": None}, None, "nearest is gpt_oss"),
    ("llava", {"multi_modal_projector.linear_2.weight": None}, None, "nearest is llava"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "arch", "evidence"), KIN)
def test_a_near_miss_is_another_arch_or_told_to_be_near(
    name: str, changes: Changes, arch: str | None, evidence: str
) -> None:
    assert name_of(detect(narrowed(name))) == name
    found = detect(changed(name, changes))
    assert (name_of(found), found.problem) == (arch, None)
    assert evidence in found.evidence


def test_every_arch_has_a_near_miss() -> None:
    assert {name for name, *_ in KIN} == set(all_archs())


@pytest.mark.parametrize("name", sorted(all_archs()))
def test_each_sign_that_a_model_must_have_is_asked_for(name: str) -> None:
    arch = find_arch(name)
    held = {arch.canonical(key): key for key in narrowed(name)}
    for signs in arch.recognise:
        asked = [held[sign.key] for sign in signs if sign.shape is not None and sign.key in held]
        if len(asked) < sum(sign.shape is not None for sign in signs):
            continue  # an alternative for models of another make
        for key in asked:
            found = detect(changed(name, {key: None}))
            others = [one for one in arch.recognise if key not in {held.get(sign.key) for sign in one}]
            assert name_of(found) != name or others, key


def of_class(name: str, **config: object) -> Shapes:
    """The tensors of a class of diffusers."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    with torch.device("meta"):
        return infos(
            {key: tuple(tensor.shape) for key, tensor in getattr(diffusers, name)(**config).state_dict().items()}
        )


def control() -> Shapes:
    """A ControlNet of SD1 as its authors publish it, but for their name in front."""
    unet = without_prefix(sd1_shapes(), ROOT)
    held = {key: info for key, info in unet.items() if not key.startswith(("output_blocks.", "out."))}
    more = {f"zero_convs.{number}.0.weight": (320, 320, 1, 1) for number in range(12)}
    return held | infos({**more, "input_hint_block.0.weight": (16, 3, 3, 3)})


def below(start: str, held: Shapes) -> Shapes:
    return {start + key: info for key, info in held.items()}


def averages() -> Shapes:
    return {key: info for key, info in sd1_shapes(extras=True).items() if key.startswith("model_ema.")}


def unet_of_diffusers(**config: object) -> Shapes:
    return of_class("UNet2DConditionModel", cross_attention_dim=768, **config)


Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
BESIDE: dict[str, tuple[Callable[[], Shapes], str]] = {
    "moving averages": (
        averages, "all its keys begin with model_ema.: these are moving averages without the model that they are of"
    ),
    "a ControlNet": (
        lambda: below("control_model.", control()), f"control_model.time_embed.0.weight says that {CONTROL}"
    ),
    "a ControlNet alone": (control, f"zero_convs.0.0.weight says that {CONTROL}"),
    "a ControlNet of a trainer": (
        lambda: below("module.", control()), f"module.zero_convs.0.0.weight says that {CONTROL}"
    ),
    "a ControlNet of diffusers": (
        lambda: of_class("ControlNetModel", cross_attention_dim=768),
        f"controlnet_cond_embedding.conv_in.weight says that {CONTROL}",
    ),
    "a ControlNet of SD3": (lambda: of_class("SD3ControlNetModel"), f"controlnet_blocks.0.weight says that {CONTROL}"),
    "a sparse ControlNet": (
        lambda: of_class("SparseControlNetModel"), f"controlnet_cond_embedding.weight says that {CONTROL}"
    ),
    "a ControlNet of Flux": (
        lambda: of_class("FluxControlNetModel", num_layers=1, num_single_layers=1),
        f"controlnet_blocks.0.weight says that {CONTROL}",
    ),
    "a word": (lambda: infos({"emb_params": (4, 768)}), f"emb_params says that {WORD}"),
    "a word of torch": (lambda: infos({"string_to_param.*": (4, 768)}), f"string_to_param.* says that {WORD}"),
    "a word of SDXL": (lambda: infos({"clip_l": (4, 768), "clip_g": (4, 1280)}), f"clip_l says that {WORD}"),
    "a word of diffusers": (lambda: infos({"<cat>": (1, 1024)}), f"<cat> says that {WORD}"),
    "a word without marks": (
        lambda: infos({"cat": (2, 768)}), "cat is [2, 768] and alone, as an embedding of textual inversion is"
    ),
    "a LoRA": (
        lambda: infos({f"lora_unet_{Q.replace('.', '_')}.lora_up.weight": (320, 4)}),
        f"lora_unet_{Q.replace('.', '_')}.lora_up.weight says that {ADAPTER}",
    ),
    "a LoRA of diffusers": (
        lambda: infos({f"unet.{Q}.lora.down.weight": (4, 320), f"unet.{Q}.lora.up.weight": (320, 4)}),
        f"unet.{Q}.lora.down.weight says that {ADAPTER}",
    ),
    "a LoRA of PEFT": (
        lambda: infos({f"transformer.{Q}.lora_A.weight": (4, 320), f"transformer.{Q}.lora_B.weight": (320, 4)}),
        f"transformer.{Q}.lora_A.weight says that {ADAPTER}",
    ),
    "a LoRA of old processors": (
        lambda: infos({f"{Q.removesuffix('.to_q')}.processor.to_q_lora.down.weight": (4, 320)}),
        f"{Q.removesuffix('.to_q')}.processor.to_q_lora.down.weight says that {ADAPTER}",
    ),
    "a GLoRA": (
        lambda: infos({f"lora_unet_x.{part}.weight": (4, 4) for part in ("a1", "a2", "b1", "b2")}),
        f"lora_unet_x.a1.weight says that {ADAPTER}",
    ),
    "a U-Net of diffusers without its first layer": (
        lambda: {key: info for key, info in unet_of_diffusers().items() if not key.startswith("conv_in.")},
        f"nearest is sd1, but {ROOT}input_blocks.0.0.weight is not there",
    ),
    "a U-Net of diffusers with more channels": (
        lambda: unet_of_diffusers(in_channels=12),
        f"nearest is sd1, but {ROOT}input_blocks.0.0.weight is [320, 12, 3, 3], expected [320, 4..9, 3, 3]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_models_is_told_for_what_it_is(name: str) -> None:
    made, evidence = BESIDE[name]
    found = detect(made())
    assert (found.arch, found.problem) == (None, None)
    assert found.evidence == f"no known arch: {evidence}"


def test_a_checkpoint_that_holds_a_controlnet_too_is_its_model() -> None:
    assert name_of(detect(sd1_shapes() | below("control_model.", control()))) == "sd1"


def test_unets_of_diffusers_with_known_channels_are_recognised() -> None:
    found = detect(unet_of_diffusers(in_channels=9))
    assert (name_of(found), variants_of(found)) == ("sd1", ["inpainting"])


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_vae_has_the_same_part_under_either_of_its_names(name: str) -> None:
    usual, other = ("vae.", "first_stage_model.") if name == "flux" else ("first_stage_model.", "vae.")
    held = narrowed(name)
    named = {other + key.removeprefix(usual) if key.startswith(usual) else key: info for key, info in held.items()}
    assert named.keys() != held.keys()
    assert name_of(detect(named)) == name
    there = [from_original(find_arch(name), Spelling("diffusers"), one) for one in (held, named)]
    assert there[0].tensors.keys() == there[1].tensors.keys()
    assert there[1].unknown == []
