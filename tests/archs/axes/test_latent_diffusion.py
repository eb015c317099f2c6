"""The axis groups of Stable Diffusion, its autoencoder and its text encoders, on the shapes of the real models."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping

import pytest

from remelt.archs.axes.find import axis_groups
from remelt.archs.axes.heads import HeadRule
from remelt.archs.axis_groups import AxisGroup, Shapes, Window, faults, keys_of
from remelt.archs.shapes import other_shapes, sd1_shapes, sd2_shapes, sdxl_refiner_shapes, sdxl_shapes, without_prefix
from remelt.core.tensor_info import TensorInfo
from remelt.errors import OptionError, RefusedError

UNET, VAE = "model.diffusion_model.", "first_stage_model."

MODELS: Mapping[str, tuple[str, Callable[[], dict[str, TensorInfo]]]] = {
    "sd1": ("sd1", sd1_shapes),
    "sd1 for inpainting, with averages": ("sd1", functools.partial(sd1_shapes, extras=True, in_channels=9)),
    "sd2": ("sd2", sd2_shapes),
    "sdxl": ("sdxl", sdxl_shapes),
    "sdxl with averages": ("sdxl", functools.partial(sdxl_shapes, extras=True)),
    "sdxl_refiner": ("sdxl_refiner", sdxl_refiner_shapes),
    "vae": ("vae", functools.partial(other_shapes, "vae")),
    "clip_l": ("clip_l", functools.partial(other_shapes, "clip_l")),
    "open_clip_h": ("open_clip_h", functools.partial(other_shapes, "open_clip_h")),
    "open_clip_g": ("open_clip_g", functools.partial(other_shapes, "open_clip_g")),
}
# Groups by structure. Attention has one group here, whose heads have an index set for queries and keys, and one for
# values; counted as two, SD1 has 220 and SDXL 574.
COUNTS = {
    "sd1": {"heads": 46, "groups": 64, "cells": 14, "free": 50},
    "sd2": {"heads": 58, "groups": 64, "cells": 14, "free": 63},
    "sdxl": {"heads": 186, "groups": 58, "cells": 11, "free": 133},
    "sdxl_refiner": {"heads": 122, "groups": 66, "cells": 12, "free": 95},
    "vae": {"heads": 2, "groups": 36, "free": 2},
    "clip_l": {"heads": 12, "free": 13},
    "open_clip_h": {"heads": 24, "free": 26},
    "open_clip_g": {"heads": 32, "free": 34},
}


def shapes_alone(infos: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    return {key: info.shape for key, info in infos.items()}


@functools.cache
def model(name: str) -> tuple[Shapes, tuple[AxisGroup, ...]]:
    arch, make = MODELS[name]
    shapes = shapes_alone(make())
    return shapes, axis_groups(arch, shapes)


def found(groups: tuple[AxisGroup, ...], name: str) -> AxisGroup:
    return next(group for group in groups if group.name == name)


def windows_on(groups: tuple[AxisGroup, ...], key: str, axis: int) -> list[tuple[str, int]]:
    """The groups that have a part of an axis, each with where its part begins."""
    pairs = [
        (group.name, one.offset) for group in groups for one in group.windows if (one.key, one.axis) == (key, axis)
    ]
    return sorted(pairs, key=lambda pair: pair[1])


@pytest.mark.parametrize("name", MODELS)
def test_every_element_of_every_axis_is_in_one_group(name: str) -> None:
    shapes, groups = model(name)
    assert list(faults(groups, shapes)) == []


@pytest.mark.parametrize("name", COUNTS)
def test_the_groups_are_as_many_as_were_counted_on_the_real_models(name: str) -> None:
    counted = Counter(group.structure for group in model(name)[1])
    assert {structure: count for structure, count in counted.items() if structure != "fixed"} == COUNTS[name]


@pytest.mark.parametrize("name", COUNTS)
def test_nearly_all_parameters_have_an_axis_that_may_be_permuted(name: str) -> None:
    shapes, groups = model(name)
    moved = {key for group in groups if not group.is_fixed for one in group.windows for key in keys_of(group, one)}
    share = sum(math.prod(shapes[key]) for key in moved) / sum(map(math.prod, shapes.values()))
    assert share > 0.99999
    still = {key.removeprefix(UNET).removeprefix(VAE) for key in shapes.keys() - moved if shapes[key]}
    assert still <= {"out.2.bias", "decoder.conv_out.bias", "quant_conv.bias"}  # what comes out


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl_refiner"])
def test_a_dropped_window_is_reported_by_its_key(name: str) -> None:
    shapes, groups = model(name)
    for at, group in enumerate(groups):
        if group.name == "unet.time_embed.hidden" or group.structure == "heads":
            dropped = group.windows[-1]
            fewer = AxisGroup(group.name, group.levels, group.windows[:-1], group.crosses)
            (said,) = faults((*groups[:at], fewer, *groups[at + 1 :]), shapes)
            assert repr(dropped.key) in said and f"of axis {dropped.axis} that no group has" in said
            if group.structure == "heads":
                break


def test_a_skip_connection_is_two_windows_of_two_streams() -> None:
    _, groups = model("sd1")
    for module in ("in_layers.2", "skip_connection"):
        assert windows_on(groups, f"{UNET}output_blocks.8.0.{module}.weight", 1) == [
            ("unet.output_blocks.7.0.skip_connection", 0),
            ("unet.input_blocks.3.0.op", 640),
        ]
    assert [one for one, _ in windows_on(groups, f"{UNET}output_blocks.8.0.in_layers.0.weight", 0)] == [
        "unet.output_blocks.7.0.skip_connection",
        "unet.input_blocks.3.0.op",
    ]


def test_streams_that_norms_divide_otherwise_are_permuted_within_the_cells_of_all_of_them() -> None:
    group = found(model("sd1")[1], "unet.input_blocks.3.0.op")
    assert group.structure == "cells"
    # The norm of its 320 channels has groups of 10. That of 960, where it comes after 640 others, has groups of 30, of
    # which 10 channels of one are before it: groups of 10 may not change places, as three of them are one there.
    assert group.levels[0].cells == (10,) * 32


def test_halves_of_a_gated_layer_move_together() -> None:
    _, groups = model("sdxl")
    module = f"{UNET}middle_block.1.transformer_blocks.9.ff.net"
    assert windows_on(groups, f"{module}.0.proj.weight", 0) == [
        ("unet.middle_block.1.transformer_blocks.9.ff", 0),
        ("unet.middle_block.1.transformer_blocks.9.ff", 5120),
    ]
    assert windows_on(groups, f"{module}.2.weight", 1) == [("unet.middle_block.1.transformer_blocks.9.ff", 0)]


def test_a_text_encoder_is_tied_to_what_reads_it_and_crosses() -> None:
    _, groups = model("sdxl")
    for projection in ("to_k", "to_v"):
        key = f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.{projection}.weight"
        assert windows_on(groups, key, 1) == [("text.stream", 0), ("text_2.stream", 768)]
    assert windows_on(groups, f"{UNET}label_emb.0.0.weight", 1) == [("text_2.pooled", 0), ("unet.label_emb.0", 1280)]
    assert found(groups, "text_2.pooled").windows[0] == Window(
        "conditioner.embedders.1.model.text_projection", 1, ("channel",)
    )
    crossing = {group.name for group in groups if group.crosses}
    assert crossing == {"text.stream", "text_2.stream", "text_2.pooled"}
    assert all(found(groups, name).crosses == "text unet" for name in crossing)


@pytest.mark.parametrize(("name", "head", "count"), [("sd1", 40, 8), ("sd2", 64, 5)])
def test_heads_are_as_many_or_as_wide_as_the_arch_has_them(name: str, head: int, count: int) -> None:
    group = found(model(name)[1], "unet.input_blocks.1.1.transformer_blocks.0.attn1")
    assert [(level.name, level.size) for level in group.levels] == [("head", count), ("qk", head), ("value", head)]


def test_other_heads_may_be_given() -> None:
    shapes = shapes_alone(sd1_shapes())
    groups = axis_groups("sd1", shapes, {"unet": HeadRule(size=32)})
    assert found(groups, "unet.middle_block.1.transformer_blocks.0.attn2").levels[0].size == 40
    assert found(groups, "text.layers.0.attention").levels[0].size == 12
    with pytest.raises(RefusedError) as refused:
        axis_groups("sd1", shapes, {"unet": HeadRule(count=7)})
    assert str(refused.value) == (
        "an attention of 320 channels cannot have 7 heads\nhint: say how many heads it has, or how wide they are"
    )


def test_running_averages_are_permuted_as_what_they_are_averages_of() -> None:
    _, groups = model("sdxl with averages")
    averaged = "model_ema.diffusion_modelmiddle_block1proj_inweight"
    for axis in (0, 1):
        own = windows_on(groups, f"{UNET}middle_block.1.proj_in.weight", axis)
        assert windows_on(groups, averaged, axis) == own != []


def test_schedules_and_what_is_no_part_of_the_model_stay_as_they_are() -> None:
    shapes, _ = model("sd1 for inpainting, with averages")
    groups = axis_groups("sd1", {**shapes, "embeddings.of.someone": (3, 5)})
    beside = found(groups, "beside")
    assert beside.is_fixed
    assert {one.key for one in beside.windows} >= {"betas", "embeddings.of.someone"}
    assert any("position_ids" in one.key for one in beside.windows)


def test_what_no_rule_knows_inside_a_part_is_a_fault() -> None:
    shapes, _ = model("sd1")
    strange = {**shapes, f"{UNET}input_blocks.1.0.adapter.weight": (7, 5)}
    said = list(faults(axis_groups("sd1", strange), strange))
    assert said == [
        f"'{UNET}input_blocks.1.0.adapter.weight' has {n} elements of axis {a} that no group has"
        for a, n in ((0, 7), (1, 5))
    ]


@pytest.mark.parametrize(
    ("arch", "whole", "prefix"),
    [
        ("sd1", "sd1", UNET),
        ("sdxl", "sdxl", UNET),
        ("vae", "sd2", VAE),
        ("open_clip_h", "sd2", "cond_stage_model.model."),
    ],
)
def test_a_part_alone_has_the_groups_that_it_has_inside_of_a_checkpoint(arch: str, whole: str, prefix: str) -> None:
    shapes = shapes_alone(without_prefix(MODELS[whole][1](), prefix))
    groups = axis_groups(arch, shapes)
    assert list(faults(groups, shapes)) == []
    inside = {
        (group.name, group.levels, tuple(one for one in group.windows if one.key.startswith(prefix)))
        for group in model(whole)[1]
        if not group.is_fixed and not group.crosses
    }
    of_part = {
        (
            group.name,
            group.levels,
            tuple(Window(prefix + one.key, one.axis, one.levels, one.offset) for one in group.windows),
        )
        for group in groups
        if not group.is_fixed and not group.crosses
    }
    assert of_part
    assert of_part == {one for one in inside if one[2]}


def test_what_a_unet_alone_is_told_stays_as_it_is() -> None:
    shapes = shapes_alone(without_prefix(sdxl_shapes(), UNET))
    groups = axis_groups("sdxl", shapes)
    assert found(groups, "unet.context").is_fixed
    assert windows_on(groups, "label_emb.0.0.weight", 1) == [("unet.label_emb.0", 0)]
    assert not any(group.crosses for group in groups)


def test_an_autoencoder_of_sixteen_channels_has_no_convolutions_between() -> None:
    shapes = {key: shape for key, shape in model("vae")[0].items() if "quant_conv" not in key}
    groups = axis_groups("vae", shapes)
    assert list(faults(groups, shapes)) == []
    assert windows_on(groups, "decoder.conv_in.weight", 1) == [("vae.decoder.latents", 0)]
    assert found(groups, "vae.encoder.made").is_fixed


def test_clip_that_sees_has_streams_of_its_own() -> None:
    shapes = shapes_alone(other_shapes("clip_l"))
    vision = {
        "vision_model.embeddings.class_embedding": (64,),
        "vision_model.embeddings.patch_embedding.weight": (64, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": (257, 64),
        **{f"vision_model.{norm}.weight": (64,) for norm in ("pre_layrnorm", "post_layernorm")},
        **{f"vision_model.{norm}.bias": (64,) for norm in ("pre_layrnorm", "post_layernorm")},
        "visual_projection.weight": (768, 64),
        "text_projection.weight": (768, 768),
        "logit_scale": (),
    }  # fmt: skip
    both = {**shapes, **vision}
    groups = axis_groups("clip_l", both)
    assert list(faults(groups, both)) == []
    assert not any(group.crosses for group in groups)
    assert windows_on(groups, "visual_projection.weight", 0) == [("vision.projected", 0)]
    assert windows_on(groups, "text_projection.weight", 1) == [("text.stream", 0)]


@pytest.mark.parametrize("root", ["", "open_clip."])
def test_open_clip_that_sees_is_known_with_its_image_encoder(root: str) -> None:
    layer = {
        "attn.in_proj_weight": (96, 32), "attn.in_proj_bias": (96,), "attn.out_proj.weight": (32, 32),
        "attn.out_proj.bias": (32,), "mlp.c_fc.weight": (64, 32), "mlp.c_fc.bias": (64,), "mlp.c_proj.weight": (32, 64),
        "mlp.c_proj.bias": (32,),
        **{f"{norm}.{one}": (32,) for norm in ("ln_1", "ln_2") for one in ("weight", "bias")},
    }  # fmt: skip
    vision = {
        "class_embedding": (32,), "conv1.weight": (32, 3, 14, 14), "positional_embedding": (257, 32), "proj": (32, 24),
        **{f"{norm}.{one}": (32,) for norm in ("ln_pre", "ln_post") for one in ("weight", "bias")},
        **{f"transformer.resblocks.{number}.{key}": shape for number in range(2) for key, shape in layer.items()},
    }  # fmt: skip
    text = {f"{root}{key}": shape for key, shape in model("open_clip_h")[0].items()}
    shapes = {**text, **{f"{root}visual.{key}": shape for key, shape in vision.items()}}
    groups = axis_groups("open_clip_h", shapes)
    assert list(faults(groups, shapes)) == []
    assert found(groups, "vision.layers.1.attention").levels[0].size == 16
    assert windows_on(groups, f"{root}visual.proj", 1) == [("vision.projected", 0)]


def test_an_embedding_that_scales_and_shifts_has_two_windows_of_the_inner_channels() -> None:
    shapes = dict(model("sd1")[0])
    key = f"{UNET}middle_block.0.emb_layers.1"
    shapes |= {f"{key}.weight": (2560, 1280), f"{key}.bias": (2560,)}
    groups = axis_groups("sd1", shapes)
    assert list(faults(groups, shapes)) == []
    assert windows_on(groups, f"{key}.bias", 0) == [
        ("unet.middle_block.0.inner", 0),
        ("unet.middle_block.0.inner", 1280),
    ]


def refusal(arch: str, shapes: Shapes) -> str:
    with pytest.raises(RefusedError) as refused:
        axis_groups(arch, shapes)
    return str(refused.value)


def test_widths_that_cannot_be_grouped_are_refused() -> None:
    assert refusal("vae", shapes_alone(other_shapes("vae", 32))) == (
        "encoder.down.0.block.0.norm1 has 4 channels, which cannot be in 32 groups\n"
        "hint: models of latent diffusion are aligned whose widths are multiples of 32"
    )


def test_half_a_model_is_refused() -> None:
    shapes, _ = model("sd1")
    assert refusal("sd1", {key: shape for key, shape in shapes.items() if "time_embed.2." not in key}) == (
        f"the model lacks {UNET}time_embed.2.weight\nhint: align whole models, or whole parts of them"
    )
    fewer = {key: shape for key, shape in shapes.items() if not key.startswith(f"{UNET}input_blocks.11.")}
    assert refusal("sd1", fewer) == (
        f"{UNET}output_blocks.11 has no input block to read\nhint: align whole models, or whole parts of them"
    )


def test_a_text_encoder_that_does_not_fit_is_refused() -> None:
    shapes = {
        key: (*shape[:1], 512) if "attn2.to_k" in key or "attn2.to_v" in key else shape
        for key, shape in model("sd1")[0].items()
    }
    assert refusal("sd1", shapes) == (
        "unet.context has 512 channels, where the 768 of text.stream do not fit in\n"
        "hint: align the parts as files of their own"
    )


def test_an_arch_without_specification_is_refused() -> None:
    with pytest.raises(OptionError) as refused:
        axis_groups("sd9", {})
    assert str(refused.value).startswith("there are no axis groups for models of arch 'sd9'\nhint: there are some for ")
