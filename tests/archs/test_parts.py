"""Parts of models that are files of their own: names, shapes, recognition, and conversions held against diffusers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_models import drawn, infos, name_of, variants_of
from safetensors import safe_open
from torch import Tensor

import remelt as rm
from remelt.archs.arch import all_archs, find_arch
from remelt.archs.detect import detect
from remelt.archs.dialects import Spelling
from remelt.archs.facts import layout
from remelt.archs.language_parts import PARTS, vit
from remelt.archs.model_parts import clip, openclip, vae
from remelt.archs.shapes import flux_shapes, other_shapes, sd1_shapes, sd3_shapes, sdxl_shapes, without_prefix
from remelt.core.tensor_info import TensorInfo

transformers = pytest.importorskip("transformers")
initialization = pytest.importorskip("transformers.initialization")
diffusers = pytest.importorskip("diffusers")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")

Infos = dict[str, TensorInfo]
Tensors = dict[str, Tensor]
VAE_CONFIG = {"down_block_types": [""] * 4, "up_block_types": [""] * 4}


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="diffusers")


def clip_config(layers: int, width: int, vocabulary: int = 49408) -> Any:
    return transformers.CLIPTextConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 8,
        vocab_size=vocabulary, projection_dim=width,
    )  # fmt: skip


T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
CLASSES: dict[str, tuple[Any, Any]] = {
    "clip_l": (transformers.CLIPTextModel, clip_config(12, 768)),
    "t5": (transformers.T5EncoderModel, transformers.T5Config(**T5_XXL, feed_forward_proj="gated-gelu")),
    "vae": (
        diffusers.AutoencoderKL,
        {
            "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
            "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
        },
    ),
    "open_clip_g": (transformers.CLIPTextModelWithProjection, clip_config(32, 1280)),
    "open_clip_h": (transformers.CLIPTextModelWithProjection, clip_config(24, 1024)),
}  # fmt: skip


def of_class(kind: Any, config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"), initialization.no_init_weights():
        model = kind(**config) if isinstance(config, dict) else kind(config)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", CLASSES)
def test_a_published_part_has_the_names_and_shapes_of_its_class(name: str) -> None:
    theirs = of_class(*CLASSES[name])
    theirs.pop("encoder.embed_tokens.weight", None)  # T5's, that is the shared one
    ours = {key: info.shape for key, info in other_shapes(name).items()}
    if name == "clip_l":
        ours = {key.removeprefix("text_model."): shape for key, shape in ours.items()}
    if name not in ("clip_l", "t5"):
        with torch.device("meta"):
            held = {key: torch.empty(shape) for key, shape in ours.items()}
        made = CONVERTERS[name](held)
        ours = {key: tuple(tensor.shape) for key, tensor in made.items()}
    assert ours == theirs


def test_a_vision_transformer_has_the_names_and_shapes_of_a_file_of_transformers(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=64, num_attention_heads=2, image_size=8, patch_size=4
    )
    head = {"classifier.weight": (2, 16), "classifier.bias": (2,)}
    pooler = {"pooler.dense.weight": (16, 16), "pooler.dense.bias": (16,)}
    for kind, root, more in (
        (transformers.ViTForImageClassification, "vit.", head),
        (transformers.ViTModel, "", pooler),
    ):
        kind(config).save_pretrained(tmp_path / kind.__name__)
        with safe_open(tmp_path / kind.__name__ / "model.safetensors", "pt") as file:
            theirs = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        assert dict(vit(root, 2, 16, 5, 4)) | more == theirs
        found = detect(infos(theirs))
        assert (name_of(found), variants_of(found)) == ("vit", ["classifier"] if root else [])
        described = layout(list(theirs), found.arch, found.spelling)
        assert set(described.blocks) == {
            "layer.0",
            "layer.1",
            "embeddings",
            "layernorm",
            "classifier" if root else "pooler",
        }
    whole = of_class(transformers.ViTForImageClassification, transformers.ViTConfig())
    assert len(whole) - 2 == len(other_shapes("vit"))
    assert sorted(whole.values()) == sorted([*(i.shape for i in other_shapes("vit").values()), (2, 768), (2,)])


def test_a_small_t5_of_transformers_is_recognised_with_its_decoder_and_as_umt5(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
    gated = transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    ungated = transformers.T5Config(**sizes, decoder_start_token_id=0)
    umt5 = transformers.UMT5Config(**sizes)
    for kind, config, variants in (
        (transformers.T5EncoderModel, gated, []),
        (transformers.T5ForConditionalGeneration, gated, ["decoder"]),
        (transformers.UMT5EncoderModel, umt5, ["umt5"]),
    ):
        found = detect(infos(of_class(kind, config)))
        assert (name_of(found), variants_of(found), found.problem) == ("t5", variants, None)
    found = detect(infos(of_class(transformers.T5EncoderModel, ungated)))
    assert found.arch is None
    assert "nearest is t5, but this is T5 of version 1.0" in found.evidence


@pytest.mark.parametrize("divisor", [1, 4, 32])
@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_recognised_at_any_width(name: str, divisor: int) -> None:
    found = detect(other_shapes(name, divisor))
    assert (name_of(found), found.problem, found.variants) == (name, None, ())
    assert found.arch is not None
    assert found.arch.part


def with_projection(layers: int, width: int, vocabulary: int = 49408) -> Infos:
    return infos(of_class(transformers.CLIPTextModelWithProjection, clip_config(layers, width, vocabulary)))


BARE = {key.removeprefix("text_model."): info for key, info in other_shapes("clip_l").items()}
PATCHES = {"vision_model.embeddings.class_embedding": (1024,)}
DEEP = {"encoder.down.4.block.0.norm1.weight": (512,)}


@pytest.mark.parametrize(
    ("held", "arch", "variants"),
    [
        (BARE, "clip_l", []),
        (with_projection(12, 768), "clip_l", []),
        (other_shapes("clip_l") | infos(PATCHES), "clip_l", ["vision"]),
        (infos(clip("text_model.", 12, 512, 49408)), None, []),
        (infos(clip("text_model.", 11, 768, 49408)), None, []),
        (with_projection(32, 1280), "open_clip_g", []),
        (with_projection(24, 1024), "open_clip_h", []),
        (infos(clip("", 23, 1024, 49408)), "open_clip_h", []),
        (infos(openclip("", 12, 768, 49408)), None, []),
        (infos(openclip("", 24, 1024, 49408)) | infos({"visual.class_embedding": (1280,)}), "open_clip_h", ["vision"]),
        (infos(vae("", 128, 16)), "vae", ["16-channels"]),
        (infos(of_class(*CLASSES["vae"])), "vae", []),
        (infos(vae("", 128, 3)), None, []),
        (infos(vae("", 128, 4)) | infos(DEEP), None, []),
        (infos(vae("", 160, 4)), None, []),
        (other_shapes("vae") | infos({"quantize.embedding.weight": (1024, 4)}), None, []),
        (other_shapes("vit") | infos({"vit.embeddings.distillation_token": (1, 1, 768)}), None, []),
        ({key: info for key, info in other_shapes("t5").items() if key != "shared.weight"}, None, []),
    ],
)  # fmt: skip
def test_kin_and_near_misses(held: Infos, arch: str | None, variants: list[str]) -> None:
    found = detect(held)
    assert (name_of(found), variants_of(found), found.problem) == (arch, variants, None)


@pytest.mark.parametrize("divisor", [1, 32])
def test_a_part_inside_of_a_checkpoint_or_a_folder_is_not_taken_for_the_part(divisor: int) -> None:
    for name, shapes in (
        ("sd1", sd1_shapes(divisor)), ("sdxl", sdxl_shapes(divisor)), ("sd3", sd3_shapes(divisor)),
        ("flux", flux_shapes(divisor)),
    ):  # fmt: skip
        found = detect(shapes)
        assert (name_of(found), found.problem) == (name, None)
    folder = {f"vae/{key}": info for key, info in infos(of_class(*CLASSES["vae"])).items()}
    folder |= {f"text_encoder/{key}": info for key, info in BARE.items()}
    assert (detect(folder).arch, detect(folder).problem) == (None, None)


def test_a_vae_under_the_prefix_of_a_checkpoint_is_the_vae_that_several_archs_share() -> None:
    held = {key: info for key, info in sdxl_shapes().items() if key.startswith("first_stage_model.")}
    found = detect(held)
    assert (name_of(found), found.spelling) == ("vae", Spelling(alone="vae", start="first_stage_model."))
    assert found.note is not None
    assert found.note.startswith("its keys begin with first_stage_model., as those of vae of ")
    assert {"vae of sd1", "vae of sd3", "vae of sdxl"} <= set(found.holders)


def open_clip(tensors: Tensors) -> Tensors:
    made: Tensors = single_file.convert_open_clip_checkpoint(
        None, {f"x.{key}": tensor for key, tensor in tensors.items()}, prefix="x."
    )
    return made


def autoencoder(tensors: Tensors) -> Tensors:
    made: Tensors = single_file.convert_ldm_vae_checkpoint(
        {f"first_stage_model.{key}": tensor for key, tensor in tensors.items()}, VAE_CONFIG
    )
    return made


CONVERTERS = {"open_clip_g": open_clip, "open_clip_h": open_clip, "vae": autoencoder}


@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        (other_shapes("open_clip_g", 32), "open_clip_g"),
        (other_shapes("open_clip_h", 32), "open_clip_h"),
        (infos(vae("", 4, 4)), "vae"),
        (infos(vae("", 4, 16)), "vae"),
    ],
    ids=["open_clip_g", "open_clip_h", "vae of 4 channels", "vae of 16 channels"],
)
def test_a_part_is_converted_as_diffusers_does_it_and_back_to_its_bits(shapes: Infos, name: str) -> None:
    tensors = drawn(shapes)
    theirs = CONVERTERS[name](tensors)
    ours = rm.convert(tensors, to="diffusers")
    assert ours.keys() == theirs.keys()
    assert all(ours[key].shape == tensor.shape and torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    back = rm.convert(theirs, to="original")
    assert tensors.keys() - back.keys() <= {"logit_scale"}
    assert [key for key, tensor in back.items() if not torch.equal(tensor, tensors[key])] == []


def test_the_parts_of_a_checkpoint_have_the_names_of_the_files() -> None:
    assert without_prefix(sdxl_shapes(), "conditioner.embedders.1.model.").keys() == other_shapes("open_clip_g").keys()
    assert without_prefix(sd1_shapes(), "first_stage_model.").keys() == other_shapes("vae").keys()
    assert without_prefix(flux_shapes(), "text_encoders.t5xxl.transformer.").keys() == other_shapes("t5").keys()


@pytest.mark.parametrize("name", PARTS)
def test_blocks_of_a_part_are_its_layers_and_no_key_is_in_two(name: str) -> None:
    shapes = other_shapes(name, 32)
    found = detect(shapes)
    described = layout(list(shapes), found.arch, found.spelling)
    arch = find_arch(name)
    inside = [key for key in shapes if arch.block_of(arch.canonical(key))]
    outside = shapes.keys() - set(inside)
    assert [key for key in outside if any(part.isdigit() for part in key.split("."))] == []
    assert all(sum(block.match(arch.canonical(key)) is not None for block in arch.blocks) == 1 for key in inside)
    counts = {"clip_l": 12, "open_clip_g": 32, "open_clip_h": 24, "t5": 24, "vit": 12, "vae": 10}
    assert len({described.facts(key).blocks[0] for key in inside}) == counts[name]
    assert not any(described.facts(key).blocks[0] in arch.block_of(arch.canonical(inside[0])) for key in outside)


def test_only_parts_may_stand_beside_other_archs() -> None:
    assert {name for name, arch in all_archs().items() if arch.part} >= PARTS.keys()
    assert not any(find_arch(name).part for name in ("sd1", "llama", "wan"))
