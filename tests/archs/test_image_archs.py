"""The image transformers: our shapes and layouts, held against the classes and the converters of diffusers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from remelt.archs.arch import find_arch  # noqa: E402
from remelt.archs.detect import detect  # noqa: E402
from remelt.archs.dialects import Conversion, Spelling, from_original, to_original  # noqa: E402
from remelt.archs.facts import layout  # noqa: E402
from remelt.archs.image_parts import IMAGE_MODELS, ROOT  # noqa: E402
from remelt.archs.model_parts import Narrow, llama, t5, vae  # noqa: E402
from remelt.archs.shapes import (  # noqa: E402
    image_shapes,
    sdxl_refiner_shapes,
    shapes_of,
)
from remelt.core.dtype import DType  # noqa: E402
from remelt.core.tensor_info import TensorInfo  # noqa: E402

Tensors = dict[str, TensorInfo]
DIFFUSERS = Spelling("diffusers")
ALONE = Spelling("diffusers", "transformer")


@dataclass(frozen=True)
class Case:
    """A class of diffusers, how it is configured as published and narrowed by 16, and the same for our shapes.

    ``converter`` is what diffusers itself converts with; ``fixed`` where it knows but the published widths.
    """

    class_name: str
    small: dict[str, Any]
    options: dict[str, Any]
    full: dict[str, Any] = field(default_factory=dict)
    converter: str = ""
    fixed: bool = False


CASES = {
    "auraflow": Case(
        "AuraFlowTransformer2DModel",
        {
            "attention_head_dim": 16, "joint_attention_dim": 128, "caption_projection_dim": 192,
            "num_mmdit_layers": 2, "num_single_dit_layers": 3, "pos_embed_max_size": 36,
        },
        {"depths": (2, 3), "positions": 36},
        {"pos_embed_max_size": 9216},
        "convert_auraflow_transformer_checkpoint_to_diffusers",
    ),
    "chroma": Case(
        "ChromaTransformer2DModel",
        {
            "attention_head_dim": 8, "joint_attention_dim": 256, "approximator_hidden_dim": 320,
            "num_layers": 2, "num_single_layers": 3, "approximator_layers": 2,
        },
        {"depths": (2, 3), "guides": 2},
        converter="convert_chroma_transformer_checkpoint_to_diffusers",
        fixed=True,
    ),
    "flux2": Case(
        "Flux2Transformer2DModel",
        {"attention_head_dim": 8, "joint_attention_dim": 960, "num_layers": 2, "num_single_layers": 3},
        {"depths": (2, 3)},
        converter="convert_flux2_transformer_checkpoint_to_diffusers",
    ),
    "lumina2": Case(
        "Lumina2Transformer2DModel",
        {"hidden_size": 144, "multiple_of": 16, "cap_feat_dim": 144, "num_layers": 2, "axes_dim_rope": (2, 2, 2)},
        {"depth": 2},
        {"cap_feat_dim": 2304},
        "convert_lumina2_to_diffusers",
        fixed=True,
    ),
    "pixart": Case(
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 4, "attention_head_dim": 18, "cross_attention_dim": 72, "caption_channels": 256,
            "num_layers": 2, "sample_size": 16, "use_additional_conditions": True,
        },
        {"depth": 2},
        {"caption_channels": 4096},
    ),
    "qwen_image": Case(
        "QwenImageTransformer2DModel",
        {"attention_head_dim": 8, "joint_attention_dim": 224, "num_layers": 2},
        {"depth": 2},
    ),
    "z_image": Case(
        "ZImageTransformer2DModel",
        {"dim": 240, "cap_feat_dim": 160, "n_layers": 2, "axes_dims": [2, 2, 4]},
        {"depth": 2},
        converter="convert_z_image_transformer_checkpoint_to_diffusers",
    ),
}  # fmt: skip

REFINER = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (6, 12, 24, 24),
    "transformer_layers_per_block": 4,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
}


def refiner_configuration(divisor: int) -> dict[str, Any]:
    widths = tuple(width // divisor for width in (384, 768, 1536, 1536))
    sizes = {"cross_attention_dim": 1280 // divisor, "projection_class_embeddings_input_dim": 2560 // divisor}
    return {**REFINER, **sizes, "block_out_channels": widths, "norm_num_groups": 12}


def of_class(name: str, configuration: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = getattr(diffusers, name)(**configuration)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def whole(name: str, divisor: int = 1) -> Tensors:
    return sdxl_refiner_shapes(divisor) if name == "sdxl_refiner" else image_shapes(name, divisor)


def infos(made: Conversion) -> Tensors:
    return {key: one.info for key, one in made.tensors.items()}


def shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {key: info.shape for key, info in tensors.items()}


def test_each_image_model_has_a_case_and_full_shapes() -> None:
    assert CASES.keys() == IMAGE_MODELS.keys()
    for name in CASES:
        assert shapes_of(name) == whole(name)
    assert shapes_of("sdxl_refiner") == whole("sdxl_refiner")


@pytest.mark.parametrize("name", CASES)
def test_converted_shapes_are_those_of_the_published_class(name: str) -> None:
    made = from_original(find_arch(name), ALONE, whole(name))
    assert made.unknown == []
    assert shapes(infos(made)) == of_class(CASES[name].class_name, CASES[name].full)


@pytest.mark.parametrize("name", CASES)
def test_converted_shapes_are_those_of_a_small_class(name: str) -> None:
    made = from_original(find_arch(name), ALONE, image_shapes(name, 16, **CASES[name].options))
    assert shapes(infos(made)) == of_class(CASES[name].class_name, CASES[name].small)


@pytest.mark.parametrize(
    ("name", "options", "configuration"),
    [
        (
            "flux2",
            {"depths": (5, 20), "hidden": 3072, "context": 7680, "guidance": False},
            {
                "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
                "guidance_embeds": False,
            },
        ),
        (
            "flux2",
            {"depths": (8, 24), "hidden": 4096, "context": 12288, "guidance": False},
            {
                "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288,
                "guidance_embeds": False,
            },
        ),
        ("qwen_image", {"depth": 2, "layered": True}, {"num_layers": 2, "use_additional_t_cond": True}),
        ("z_image", {"depth": 2, "omni": True}, {"n_layers": 2, "siglip_feat_dim": 1152}),
        (
            "pixart",
            {"depth": 2, "sized": False, "tokens": 300, "grid": 32},
            {"num_layers": 2, "caption_channels": 4096, "sample_size": 64},
        ),
    ],
)  # fmt: skip
def test_the_shapes_of_a_variant_are_those_of_its_class(
    name: str, options: dict[str, Any], configuration: dict[str, Any]
) -> None:
    made = from_original(find_arch(name), ALONE, image_shapes(name, **options))
    assert shapes(infos(made)) == of_class(CASES[name].class_name, configuration)


@pytest.mark.parametrize("divisor", [1, 32])
def test_the_unet_of_a_refiner_is_that_of_the_class(divisor: int) -> None:
    original = sdxl_refiner_shapes(divisor)
    unet = {key: info for key, info in original.items() if key.startswith(ROOT)}
    made = from_original(find_arch("sdxl_refiner"), Spelling("diffusers", "unet"), unet)
    assert shapes(infos(made)) == of_class("UNet2DConditionModel", refiner_configuration(divisor))


def filled(tensors: Tensors, *, narrow: bool) -> dict[str, Any]:
    """Random tensors of those shapes; ``narrow`` leaves one column each, as a conversion moves whole rows."""
    torch.manual_seed(0)
    return {
        key: torch.rand(info.shape[:1] if narrow and len(info.shape) < 3 else info.shape)
        for key, info in tensors.items()
    }


def put_together(made: Conversion, tensors: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, one in made.tensors.items():
        assert not one.transposed
        found[key] = torch.cat([tensors[piece.key][piece.start : piece.stop] for piece in one.pieces])
    return found


def agree(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.converter])
def test_every_bit_is_where_the_converter_of_diffusers_puts_it(name: str) -> None:
    utilities = pytest.importorskip("diffusers.loaders.single_file_utils")
    case = CASES[name]
    convert = getattr(utilities, case.converter)
    original = image_shapes(name, 1 if case.fixed else 16, **case.options)
    tensors = filled(original, narrow=case.fixed)
    theirs = convert({key.removeprefix(ROOT): tensor for key, tensor in tensors.items()})
    assert agree(put_together(from_original(find_arch(name), ALONE, original), tensors), theirs)


def test_every_bit_of_a_refiner_is_where_the_converter_of_diffusers_puts_it() -> None:
    utilities = pytest.importorskip("diffusers.loaders.single_file_utils")
    original = {key: info for key, info in sdxl_refiner_shapes(32).items() if key.startswith(ROOT)}
    tensors = filled(original, narrow=False)
    configuration = {**refiner_configuration(32), "layers_per_block": 2, "class_embed_type": None}
    theirs = utilities.convert_ldm_unet_checkpoint(dict(tensors), configuration)
    made = from_original(find_arch("sdxl_refiner"), Spelling("diffusers", "unet"), original)
    assert agree(put_together(made, tensors), theirs)


def test_what_shapes_do_not_tell_apart_in_pixart_is_where_its_class_reads_it() -> None:
    made = from_original(find_arch("pixart"), ALONE, whole("pixart", 16)).tensors
    block, other = f"{ROOT}blocks.3.", "transformer_blocks.3."
    assert {key: (made[key].pieces[0].key, made[key].pieces[0].start) for key in made if ".3.attn" in key} == {
        f"{other}{part}.{leaf}": (f"{block}{name}.{leaf}", start)
        for leaf in ("weight", "bias")
        for part, name, start in (
            ("attn1.to_q", "attn.qkv", 0),
            ("attn1.to_k", "attn.qkv", 72),
            ("attn1.to_v", "attn.qkv", 144),
            ("attn1.to_out.0", "attn.proj", 0),
            ("attn2.to_q", "cross_attn.q_linear", 0),
            ("attn2.to_k", "cross_attn.kv_linear", 0),
            ("attn2.to_v", "cross_attn.kv_linear", 72),
            ("attn2.to_out.0", "cross_attn.proj", 0),
        )
    }
    for embedder, name in (("resolution", "csize"), ("aspect_ratio", "ar"), ("timestep", "t")):
        key = f"adaln_single.emb.{embedder}_embedder.linear_2.weight"
        assert made[key].pieces[0].key == f"{ROOT}{name}_embedder.mlp.2.weight"


def test_qwen_image_has_the_names_of_its_class_in_both_layouts() -> None:
    original = whole("qwen_image", 16)
    made = from_original(find_arch("qwen_image"), ALONE, original).tensors
    assert {key: [ROOT + key] for key in made} == {key: [piece.key for piece in made[key].pieces] for key in made}
    assert list(made) == [key.removeprefix(ROOT) for key in original]


LEFT_OUT = {
    "lumina2": [f"{ROOT}norm_final.weight"],
    "pixart": [f"{ROOT}pos_embed", f"{ROOT}y_embedder.y_embedding"],
    "sdxl_refiner": ["conditioner.embedders.0.model.logit_scale"],
    "z_image": [f"{ROOT}norm_final.weight"],
}
NAMES = [*CASES, "sdxl_refiner"]


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_the_same_model(name: str) -> None:
    original, arch = whole(name), find_arch(name)
    there = from_original(arch, DIFFUSERS, original)
    assert (there.unknown, there.left_out) == ([], LEFT_OUT.get(name, []))
    back = to_original(arch, DIFFUSERS, infos(there))
    assert back.unknown == []
    assert infos(back) == {key: info for key, info in original.items() if key not in there.left_out}


def tensors_of(*parts: Any) -> Tensors:
    return {key: TensorInfo(DType.BF16, shape) for part in parts for key, shape in part}


def decoder(root: str) -> Tensors:
    made = tensors_of(llama(2, 16, 16, 8, 32, 64, tied=True))
    return {f"{root}{key}": info for key, info in made.items()}


@pytest.mark.parametrize(
    ("name", "text", "channels"),
    [
        ("chroma", tensors_of(t5("text_encoders.t5xxl.transformer.", Narrow(64))), 16),
        ("auraflow", tensors_of(t5("text_encoders.pile_t5xl.transformer.", Narrow(64))), 4),
        ("lumina2", decoder("text_encoders.gemma2_2b.transformer."), 16),
        ("z_image", decoder("text_encoders.qwen3_4b.transformer."), 16),
    ],
)
def test_a_file_that_holds_all_becomes_a_folder_of_all(name: str, text: Tensors, channels: int) -> None:
    original = whole(name, 16) | text | tensors_of(vae("vae.", 8, channels))
    arch = find_arch(name)
    assert detect(original).arch is arch
    assert len(layout(list(original), arch).components) == 3
    there = from_original(arch, DIFFUSERS, original)
    assert (there.unknown, there.left_out) == ([], LEFT_OUT.get(name, []))
    assert {key.partition("/")[0] for key in there.tensors} == {"transformer", "text_encoder", "vae"}
    back = to_original(arch, DIFFUSERS, infos(there))
    assert infos(back).keys() == original.keys() - set(there.left_out)


def test_a_text_encoder_is_read_with_and_without_its_head() -> None:
    arch = find_arch("lumina2")
    for start in ("model.", ""):
        back = to_original(arch, DIFFUSERS, {f"text_encoder/{start}norm.weight": TensorInfo(DType.BF16, (8,))})
        assert list(back.tensors) == ["text_encoders.gemma2_2b.transformer.model.norm.weight"]


@pytest.mark.parametrize("divisor", [1, 16])
def test_auraflow_is_known_by_the_prefix_of_its_whole_files_too(divisor: int) -> None:
    arch, original = find_arch("auraflow"), whole("auraflow", divisor)
    published = {key.replace(ROOT, "model."): info for key, info in original.items()}
    found = detect(published)
    assert (found.arch, found.spelling) == (arch, Spelling())
    there = from_original(arch, DIFFUSERS, published)
    assert infos(there) == infos(from_original(arch, DIFFUSERS, original))
    assert layout(list(published), arch).blocks.keys() == layout(list(original), arch).blocks.keys()
