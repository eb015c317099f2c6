"""Autoencoders of models that make videos: names, shapes, recognition, and conversions held against diffusers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from drawn_models import drawn, infos, name_of, unlike

import remelt as rm
from remelt.archs.arch import find_arch
from remelt.archs.autoencoder_parts import AUTOENCODERS, hunyuan_video_vae, wan22_vae, wan_vae
from remelt.archs.detect import detect
from remelt.archs.dialects import Spelling, to_original
from remelt.archs.facts import layout
from remelt.archs.shapes import image_shapes, other_shapes
from remelt.core.tensor_info import TensorInfo

diffusers = pytest.importorskip("diffusers")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")

Infos = dict[str, TensorInfo]
Shapes = dict[str, tuple[int, ...]]

WAN, QWEN = "AutoencoderKLWan", "AutoencoderKLQwenImage"
HUNYUAN, LTX = "AutoencoderKLHunyuanVideo", "AutoencoderKLLTXVideo"
NAMES = ["wan_vae", "wan22_vae", "hunyuan_video_vae", "ltx_vae", "ltx_vae_091", "ltx_vae_095"]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="diffusers")


def wan22_of(width: int, decoder: int) -> dict[str, Any]:
    return {
        "base_dim": width, "decoder_base_dim": decoder, "z_dim": 48, "is_residual": True, "in_channels": 12,
        "out_channels": 12, "patch_size": 2,
    }  # fmt: skip


def ltx_of(width: int, version: str) -> dict[str, Any]:
    """The configuration of a version, at a width that is 128 in full."""
    config: dict[str, Any] = {"block_out_channels": [width * multiple for multiple in (1, 2, 4, 4)]}
    if version == "ltx_vae":
        return config | {"decoder_block_out_channels": config["block_out_channels"]}
    config |= {
        "decoder_block_out_channels": [width * multiple for multiple in (2, 4, 8)],
        "decoder_layers_per_block": (5, 6, 7, 8), "decoder_spatio_temporal_scaling": (True,) * 3,
        "decoder_inject_noise": (True, True, True, False), "upsample_residual": (True,) * 3,
        "upsample_factor": (2,) * 3, "timestep_conditioning": True,
    }  # fmt: skip
    if version == "ltx_vae_091":
        return config
    return config | {
        "block_out_channels": [width * multiple for multiple in (1, 2, 4, 8, 16)],
        "down_block_types": ("LTXVideo095DownBlock3D",) * 4, "layers_per_block": (4, 6, 6, 2, 2),
        "decoder_layers_per_block": (5,) * 4, "spatio_temporal_scaling": (True,) * 4,
        "decoder_inject_noise": (False,) * 4,
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    }  # fmt: skip


def of_class(kind: str, config: Mapping[str, Any]) -> Shapes:
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**config)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def widths(base: int) -> dict[str, Any]:
    return {"block_out_channels": [base * multiple for multiple in (1, 2, 4, 4)], "norm_num_groups": min(base, 32)}


CLASSES: dict[str, tuple[str, str, dict[str, Any], Infos]] = {
    "wan 2.1": ("wan_vae", WAN, {}, infos(wan_vae(96, 16))),
    "small wan 2.1": ("wan_vae", WAN, {"base_dim": 4}, infos(wan_vae(4, 16))),
    "qwen image": ("wan_vae", QWEN, {}, infos(wan_vae(96, 16))),
    "small qwen image": ("wan_vae", QWEN, {"base_dim": 4}, infos(wan_vae(4, 16))),
    "wan 2.2": ("wan22_vae", WAN, wan22_of(160, 256), infos(wan22_vae(160, 256, 48))),
    "small wan 2.2": ("wan22_vae", WAN, wan22_of(4, 6), infos(wan22_vae(4, 6, 48))),
    "hunyuan": ("hunyuan_video_vae", HUNYUAN, widths(128), infos(hunyuan_video_vae(128, 16))),
    "small hunyuan": ("hunyuan_video_vae", HUNYUAN, widths(4), infos(hunyuan_video_vae(4, 16))),
    **{
        f"{size}{name}": (name, LTX, ltx_of(width, name), other_shapes(name, 128 // width))
        for name in NAMES
        if name.startswith("ltx")
        for size, width in (("", 128), ("small ", 8))
    },
}


@pytest.mark.parametrize("name", CLASSES)
def test_names_and_shapes_of_the_other_layout_are_those_of_the_class(name: str) -> None:
    arch, kind, config, shapes = CLASSES[name]
    theirs = of_class(kind, config)
    for held, dialect in ((shapes, "original"), (infos(theirs), "diffusers")):
        found = detect(held)
        assert (name_of(found), found.problem) == (arch, None)
        assert found.spelling == Spelling(dialect, "vae")
    if "small" in name:
        made = rm.convert(drawn(shapes), to="diffusers")
        assert {key: tuple(tensor.shape) for key, tensor in made.items()} == theirs
        assert unlike(rm.convert(made, to="original"), drawn(shapes)) == []


def test_wan_is_converted_as_diffusers_does_it() -> None:
    tensors = drawn(infos(wan_vae(4, 16)))
    theirs = single_file.convert_wan_vae_to_diffusers(dict(tensors))
    assert unlike(rm.convert(tensors, to="diffusers"), theirs) == []
    assert unlike(rm.convert(theirs, to="original"), tensors) == []


LTX_NAMES = [name for name in NAMES if name.startswith("ltx")]
TELLS = "encoder.conv_out.conv.weight"


@pytest.mark.parametrize("name", LTX_NAMES)
def test_ltx_is_converted_as_diffusers_does_it(name: str) -> None:
    # Their converter has no way back: what it makes of our originals must be what these were made of, which the class
    # names. It knows the newest version by a width of 2048, which one tensor pretends to have.
    theirs = drawn(infos(of_class(LTX, ltx_of(8, name))))
    ours = rm.convert(theirs, to="original")
    assert unlike(rm.convert(ours, to="diffusers"), theirs) == []
    held = {f"vae.{key}": tensor for key, tensor in ours.items()}
    held |= {f"vae.per_channel_statistics.{one}": torch.ones(128) for one in ("channel", "mean-of-stds")}
    if name == "ltx_vae_095":
        held[f"vae.{TELLS}"] = torch.zeros(1).expand(129, 2048, 1, 1, 1)
    again = single_file.convert_ltx_vae_checkpoint_to_diffusers(held)
    assert [key for key in unlike(again, theirs) if key != TELLS] == []
    assert again.keys() == theirs.keys()


@pytest.mark.parametrize("name", LTX_NAMES)
@pytest.mark.parametrize("width", [8, 128])
def test_a_version_of_ltx_is_told_from_the_others_in_both_layouts(name: str, width: int) -> None:
    theirs = infos(of_class(LTX, ltx_of(width, name)))
    found = detect(theirs)
    assert (name_of(found), found.problem, found.spelling) == (name, None, Spelling("diffusers", "vae"))
    originals = to_original(find_arch(name), found.spelling, theirs)
    assert originals.unknown == [] and len(originals.tensors) == len(theirs)
    bare = {key.removeprefix("autoencoder."): one.info for key, one in originals.tensors.items()}
    again = detect(bare)
    assert (name_of(again), again.problem, again.spelling) == (name, None, Spelling("original", "vae"))


def test_what_only_the_originals_of_ltx_tell_of_latents_is_left_out() -> None:
    there = drawn(infos(of_class(LTX, ltx_of(8, "ltx_vae"))))
    ours = rm.convert(there, to="original")
    more = {f"per_channel_statistics.{one}": torch.ones(128) for one in ("channel", "mean-of-stds")}
    assert unlike(rm.convert(ours | more, to="diffusers"), there) == []


@pytest.mark.parametrize("divisor", [1, 4, 32])
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_autoencoder_is_recognised_at_any_width(name: str, divisor: int) -> None:
    found = detect(other_shapes(name, divisor))
    assert (name_of(found), found.problem, found.variants) == (name, None, ())
    assert find_arch(name).part


def without(shapes: Infos, key: str) -> Infos:
    assert key in shapes
    return {name: info for name, info in shapes.items() if name != key}


def resized(shapes: Infos, key: str, *shape: int) -> Infos:
    assert key in shapes
    return shapes | infos({key: shape})


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (without(other_shapes("wan_vae"), "decoder.upsamples.12.residual.2.weight"), "nearest is wan_vae"),
        (resized(other_shapes("wan_vae"), "decoder.conv1.weight", 384, 8, 3, 3, 3), "expected [*, 16, 3, 3, 3]"),
        (resized(other_shapes("wan_vae"), "encoder.conv1.weight", 128, 3, 3, 3, 3), "expected [96, 3, 3, 3, 3]"),
        (resized(other_shapes("wan22_vae"), "encoder.conv1.weight", 160, 3, 3, 3, 3), "nearest is wan22_vae"),
        (
            resized(other_shapes("hunyuan_video_vae"), "decoder.conv_in.conv.weight", 512, 4, 3, 3, 3),
            "[*, 16, 3, 3, 3]",
        ),
    ],
)
def test_near_misses(held: Infos, said: str) -> None:
    found = detect(held)
    assert (found.arch, found.problem) == (None, None)
    assert said in found.evidence


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_blocks_are_levels_and_no_key_is_in_two(name: str) -> None:
    shapes = other_shapes(name, 32)
    described = layout(list(shapes), find_arch(name), Spelling("original", "vae"))
    levels = {block for block in described.blocks if block.startswith(("down.", "up."))}
    timed = {"decoder.last_time_embedder", "decoder.last_scale_shift_table", "decoder.timestep_scale_multiplier"}
    assert {"down.0", "up.0"} <= levels
    assert sorted(described.blocks.keys() - levels - (timed if name[:3] == "ltx" else set())) == OUTSIDE[name[:3]]


OUTSIDE = {
    "wan": ["conv1", "conv2", "decoder.conv1", "decoder.head", "decoder.mid", "encoder.conv1", "encoder.head",
            "encoder.mid"],
    "ltx": ["decoder.conv_in", "decoder.conv_out", "encoder.conv_in", "encoder.conv_out", "per_channel_statistics"],
    "hun": ["decoder.conv_in", "decoder.conv_out", "decoder.mid", "decoder.norm_out", "encoder.conv_in",
            "encoder.conv_out", "encoder.mid", "encoder.norm_out", "post_quant_conv", "quant_conv"],
}  # fmt: skip


def test_autoencoders_of_two_layouts_are_merged_in_the_first_ones() -> None:
    shapes = infos(hunyuan_video_vae(4, 16))
    a, b = drawn(shapes, seed=1), drawn(shapes, seed=2)
    mixed = rm.merge(
        rm.weighted_sum(rm.model(a), rm.model(rm.convert(b, to="diffusers")), alpha=rm.blocks({"up.1": 1.0}) | 0.0)
    )
    inside = [key for key in a if key.startswith("decoder.up.1.")]
    assert len(inside) == 28
    assert unlike(mixed, a | {key: b[key] for key in inside}) == []


@pytest.mark.parametrize(
    ("arch", "name"), [("wan", "wan_vae"), ("qwen_image", "wan_vae"), ("hunyuan_video", "hunyuan_video_vae")]
)
def test_a_whole_model_takes_its_autoencoder_there_and_back(arch: str, name: str) -> None:
    whole = drawn(infos({key: info.shape for key, info in shapes_of_denoiser(arch).items()}))
    alone = drawn(other_shapes(name, 32), seed=3)
    single = whole | {f"vae.{key}": tensor for key, tensor in alone.items()}
    there = rm.convert(single, to="diffusers")
    assert {key.partition("/")[0] for key in there} == {"transformer", "vae"}
    beside = {key.removeprefix("vae/"): tensor for key, tensor in there.items() if key.startswith("vae/")}
    assert unlike(beside, rm.convert(alone, to="diffusers")) == []
    assert unlike(rm.convert(there, to="original"), single) == []
    donor = drawn(other_shapes(name, 32), seed=4)
    baked = rm.merge(rm.with_component(rm.model(single), rm.model(rm.convert(donor, to="diffusers")), "vae"))
    assert unlike(baked, whole | {f"vae.{key}": tensor for key, tensor in donor.items()}) == []


def shapes_of_denoiser(arch: str) -> Infos:
    return image_shapes(arch, 64) if arch == "qwen_image" else other_shapes(arch, 64)
