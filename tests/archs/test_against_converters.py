"""Conversions against those of diffusers, tensor for tensor and bit for bit; transformers loads the text encoders."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from drawn_models import drawn, pieced
from torch import Tensor

import remelt as rm
from remelt.archs.arch import find_arch
from remelt.archs.dialects import Spelling, from_original, to_original
from remelt.archs.shapes import flux_shapes, sd1_shapes, sd2_shapes, sd3_shapes, sdxl_refiner_shapes, sdxl_shapes
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo

single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
transformers = pytest.importorskip("transformers")

UNET = "model.diffusion_model."
Shapes = Mapping[str, TensorInfo]
Tensors = dict[str, Tensor]
UNET_CONFIG = {"layers_per_block": 2}
VAE_CONFIG = {"down_block_types": [""] * 4, "up_block_types": [""] * 4}


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="diffusers")


def agree(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], folder: str) -> None:
    """Assert that the tensors of a folder are those that diffusers makes, bit for bit."""
    inside = {key.removeprefix(f"{folder}/"): tensor for key, tensor in ours.items() if key.startswith(f"{folder}/")}
    assert inside.keys() == theirs.keys()
    assert {key: tuple(tensor.shape) for key, tensor in inside.items()} == {
        key: tuple(tensor.shape) for key, tensor in theirs.items()
    }
    assert [key for key, tensor in inside.items() if not torch.equal(tensor, theirs[key])] == []


def under(tensors: Mapping[str, Tensor], *prefixes: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key.startswith(prefixes)}


def open_clip(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    made: Tensors = single_file.convert_open_clip_checkpoint(None, dict(tensors), prefix=prefix)
    return made


def sd1(tensors: Tensors) -> dict[str, Tensors]:
    return {
        "unet": single_file.convert_ldm_unet_checkpoint(dict(tensors), UNET_CONFIG),
        "text_encoder": single_file.convert_ldm_clip_checkpoint(dict(tensors)),
        "vae": single_file.convert_ldm_vae_checkpoint(dict(tensors), VAE_CONFIG),
    }


def sd2(tensors: Tensors) -> dict[str, Tensors]:
    return sd1(tensors) | {"text_encoder": open_clip(tensors, "cond_stage_model.model.")}


def unclip(tensors: Tensors) -> dict[str, Tensors]:
    config = UNET_CONFIG | {"class_embed_type": "projection"}
    return sd2(tensors) | {"unet": single_file.convert_ldm_unet_checkpoint(dict(tensors), config)}


def sdxl(tensors: Tensors) -> dict[str, Tensors]:
    config = UNET_CONFIG | {"addition_embed_type": "text_time"}
    return {
        "unet": single_file.convert_ldm_unet_checkpoint(dict(tensors), config),
        "text_encoder": single_file.convert_ldm_clip_checkpoint(dict(tensors)),
        "text_encoder_2": open_clip(tensors, "conditioner.embedders.1.model."),
        "vae": single_file.convert_ldm_vae_checkpoint(dict(tensors), VAE_CONFIG),
    }


def refiner(tensors: Tensors) -> dict[str, Tensors]:
    config = UNET_CONFIG | {"addition_embed_type": "text_time"}
    return {
        "unet": single_file.convert_ldm_unet_checkpoint(dict(tensors), config),
        "text_encoder_2": open_clip(tensors, "conditioner.embedders.0.model."),
        "vae": single_file.convert_ldm_vae_checkpoint(dict(tensors), VAE_CONFIG),
    }


def clip_of(tensors: Tensors, prefix: str) -> Tensors:
    made: Tensors = single_file.convert_ldm_clip_checkpoint(dict(tensors), prefix)
    return made


def sd3(tensors: Tensors) -> dict[str, Tensors]:
    return {
        "transformer": single_file.convert_sd3_transformer_checkpoint_to_diffusers(under(tensors, UNET)),
        "text_encoder": clip_of(tensors, "text_encoders.clip_l.transformer."),
        "text_encoder_2": clip_of(tensors, "text_encoders.clip_g.transformer."),
        "text_encoder_3": single_file.convert_sd3_t5_checkpoint_to_diffusers(dict(tensors)),
        "vae": single_file.convert_ldm_vae_checkpoint(under(tensors, "first_stage_model."), VAE_CONFIG),
    }


def unclip_shapes() -> dict[str, TensorInfo]:
    """SD2 with the class embedding of models that are guided by images."""
    shapes = sd2_shapes(32)
    for layer, (out, into) in (("0.0", (40, 64)), ("0.2", (40, 40))):
        shapes[f"{UNET}label_emb.{layer}.weight"] = TensorInfo(DType.F32, (out, into))
        shapes[f"{UNET}label_emb.{layer}.bias"] = TensorInfo(DType.F32, (out,))
    return shapes


def sd35_medium_shapes() -> dict[str, TensorInfo]:
    """SD 3.5 medium: norms of queries and keys, and a second attention in the first blocks."""
    shapes = sd3_shapes(32, qk_norm=True, depth=6)
    for block in range(3):
        name = f"{UNET}joint_blocks.{block}.x_block"
        for layer, rows in (("qkv", 144), ("proj", 48)):
            shapes[f"{name}.attn2.{layer}.weight"] = TensorInfo(DType.F32, (rows, 48))
            shapes[f"{name}.attn2.{layer}.bias"] = TensorInfo(DType.F32, (rows,))
        for norm in ("ln_q", "ln_k"):
            shapes[f"{name}.attn2.{norm}.weight"] = TensorInfo(DType.F32, (2,))
        shapes[f"{name}.adaLN_modulation.1.weight"] = TensorInfo(DType.F32, (9 * 48, 48))
        shapes[f"{name}.adaLN_modulation.1.bias"] = TensorInfo(DType.F32, (9 * 48,))
    return shapes


MODELS = {
    "sd1": (sd1_shapes(32), sd1),
    "sd1 with all that training leaves": (sd1_shapes(32, extras=True), sd1),
    "sd1 inpainting": (sd1_shapes(32, in_channels=9), sd1),
    "sd2": (sd2_shapes(32), sd2),
    "sd2 unclip": (unclip_shapes(), unclip),
    "sdxl": (sdxl_shapes(32), sdxl),
    "sdxl refiner": (sdxl_refiner_shapes(32), refiner),
    "sd3 medium": (sd3_shapes(32), sd3),
    "sd3.5 large": (sd3_shapes(32, depth=38, hidden=2432, qk_norm=True), sd3),
    "sd3.5 medium": (sd35_medium_shapes(), sd3),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_converted_as_diffusers_does_it(name: str) -> None:
    shapes, oracle = MODELS[name]
    tensors = drawn(shapes)
    ours = rm.convert(tensors, to="diffusers")
    theirs = oracle(tensors)
    assert {key.partition("/")[0] for key in ours} == set(theirs)
    for folder, converted in theirs.items():
        agree(ours, converted, folder)


@pytest.mark.parametrize("name", MODELS)
def test_what_diffusers_made_is_converted_back_to_the_bits_that_it_was_made_of(name: str) -> None:
    shapes, oracle = MODELS[name]
    tensors = drawn(shapes, seed=1)
    theirs = {f"{folder}/{key}": tensor for folder, made in oracle(tensors).items() for key, tensor in made.items()}
    ours = rm.convert(theirs, to="original")
    assert ours.keys() <= tensors.keys()
    assert [key for key, tensor in ours.items() if not torch.equal(tensor, tensors[key])] == []
    assert rm.convert(ours, to="diffusers").keys() == theirs.keys()


def test_names_of_a_text_encoder_that_lack_a_word_are_known_too() -> None:
    tensors = drawn(sd1_shapes(32), seed=3)
    short = {key.replace("transformer.text_model.", "transformer."): tensor for key, tensor in tensors.items()}
    assert short.keys() != tensors.keys()
    ours, usual = rm.convert(short, to="diffusers"), rm.convert(tensors, to="diffusers")
    assert ours.keys() == usual.keys()
    assert all(torch.equal(ours[key], usual[key]) for key in usual)


@pytest.mark.parametrize("guidance", [True, False])
def test_flux_is_divided_as_diffusers_divides_it(guidance: bool) -> None:
    # Their converter knows one width, 3072, by heart. It is given tensors of as many rows with one column, the numbers
    # of the rows; we are told that all columns are there.
    shapes = {
        key: info
        for key, info in flux_shapes(guidance=guidance).items()
        if key.startswith(UNET) and not any(f"_blocks.{block}." in key for block in range(2, 38))
    }
    rows = {key: torch.arange(info.shape[0]) + 100_000 * at for at, (key, info) in enumerate(shapes.items())}
    theirs = single_file.convert_flux_transformer_checkpoint_to_diffusers(dict(rows))
    arch, spelling = find_arch("flux"), Spelling("diffusers")
    there = from_original(arch, spelling, shapes)
    assert (there.unknown, there.left_out) == ([], [])
    agree(pieced(there.tensors, rows), theirs, "transformer")
    infos = {key: one.info for key, one in there.tensors.items()}
    assert all(info.shape[0] == len(theirs[key.removeprefix("transformer/")]) for key, info in infos.items())
    back = to_original(arch, spelling, infos)
    again = pieced(back.tensors, {f"transformer/{key}": tensor for key, tensor in theirs.items()})
    assert again.keys() == rows.keys()
    assert [key for key in rows if not torch.equal(again[key], rows[key])] == []
    assert {key: one.info for key, one in back.tensors.items()} == shapes


def text_model(layers: int, width: int, vocabulary: int) -> object:
    return transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        vocab_size=vocabulary,
        projection_dim=width,
    )


T5 = transformers.T5Config(
    vocab_size=1004, d_model=128, d_kv=64, d_ff=320, num_layers=24, num_heads=2, feed_forward_proj="gated-gelu"
)
CLIP_L, CLIP_G = text_model(12, 24, 1544), text_model(32, 40, 1544)
ENCODERS = [
    (sd1_shapes(32), sd1, "text_encoder", transformers.CLIPTextModel, CLIP_L),
    (sd2_shapes(32), sd2, "text_encoder", transformers.CLIPTextModel, text_model(23, 32, 1544)),
    (sdxl_shapes(32), sdxl, "text_encoder", transformers.CLIPTextModel, CLIP_L),
    (sdxl_shapes(32), sdxl, "text_encoder_2", transformers.CLIPTextModelWithProjection, CLIP_G),
    (sd3_shapes(32), sd3, "text_encoder", transformers.CLIPTextModelWithProjection, CLIP_L),
    (sd3_shapes(32), sd3, "text_encoder_2", transformers.CLIPTextModelWithProjection, CLIP_G),
    (sd3_shapes(32), sd3, "text_encoder_3", transformers.T5EncoderModel, T5),
]


@pytest.mark.parametrize(("shapes", "oracle", "folder", "kind", "config"), ENCODERS)
def test_transformers_loads_a_converted_text_encoder(
    tmp_path: Path,
    write_model: Callable[..., Path],
    shapes: Shapes,
    oracle: Callable[[Tensors], dict[str, Tensors]],
    folder: str,
    kind: type,
    config: object,
) -> None:
    tensors = drawn(shapes, seed=2)
    path = write_model(tmp_path / "model", tensors)
    rm.convert(path, f"{tmp_path}/made/", to="diffusers")
    model, report = kind.from_pretrained(  # type: ignore[attr-defined]
        tmp_path / "made" / folder, config=config, dtype=torch.bfloat16, output_loading_info=True
    )
    assert {what: found for what, found in report.items() if found} == {}
    state = named_as_now(model.state_dict())
    state.pop("encoder.embed_tokens.weight", None)  # T5's, that is the shared one
    theirs = named_as_now(oracle(tensors)[folder])
    assert state.keys() == theirs.keys()
    assert [key for key in state if not torch.equal(state[key], theirs[key])] == []


def named_as_now(tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors without a beginning of their names that transformers left out in version 5."""
    return {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
