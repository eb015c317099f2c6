"""The axis groups of SD3, Flux and Chroma with their encoders, on the shapes of the real models."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import pytest

from remelt.archs.axes.find import axis_groups
from remelt.archs.axis_groups import AxisGroup, Shapes, faults, keys_of
from remelt.archs.shapes import flux_shapes, image_shapes, other_shapes, sd3_shapes
from remelt.core.tensor_info import TensorInfo

MODELS: Mapping[str, tuple[str, Callable[[], dict[str, TensorInfo]]]] = {
    "sd3": ("sd3", sd3_shapes),
    "sd3.5 large": ("sd3", functools.partial(sd3_shapes, depth=38, hidden=2432, qk_norm=True)),
    "flux": ("flux", flux_shapes),
    "chroma": ("chroma", functools.partial(image_shapes, "chroma")),
    "t5": ("t5", functools.partial(other_shapes, "t5")),
}
ROOT = "model.diffusion_model."


@functools.cache
def model(name: str) -> tuple[Shapes, tuple[AxisGroup, ...]]:
    arch, make = MODELS[name]
    shapes = {key: info.shape for key, info in make().items()}
    return shapes, axis_groups(arch, shapes)


def without(name: str, start: str) -> dict[str, AxisGroup]:
    """The groups of a file that lacks what begins so."""
    shapes = {key: shape for key, shape in model(name)[0].items() if not key.startswith(start)}
    groups = axis_groups(MODELS[name][0], shapes)
    assert list(faults(groups, shapes)) == []
    return {group.name: group for group in groups}


def windows_on(name: str, key: str, axis: int) -> list[tuple[str, int, str]]:
    """The groups that have a part of an axis: where it begins, and what it crosses."""
    found = [
        (group.name, one.offset, group.crosses)
        for group in model(name)[1] for one in group.windows if (one.key, one.axis) == (key, axis)
    ]  # fmt: skip
    return sorted(found, key=lambda one: one[1])


@pytest.mark.parametrize("name", MODELS)
def test_every_axis_of_a_real_model_is_in_one_group(name: str) -> None:
    shapes, groups = model(name)
    assert list(faults(groups, shapes)) == []


@pytest.mark.parametrize("name", MODELS)
def test_nearly_all_parameters_have_an_axis_that_may_be_permuted(name: str) -> None:
    shapes, groups = model(name)
    moved = {key for group in groups if not group.is_fixed for one in group.windows for key in keys_of(group, one)}
    # What T5 alone puts out, and so the table of words that it begins with, is fixed.
    share = sum(math.prod(shapes[key]) for key in moved) / sum(map(math.prod, shapes.values()))
    assert share > (0.97 if name == "t5" else 0.9999)


def test_a_modulation_is_windows_of_the_stream_that_it_modulates() -> None:
    for part, stream in (("x_block", "transformer.image"), ("context_block", "transformer.text")):
        found = windows_on("sd3", f"{ROOT}joint_blocks.3.{part}.adaLN_modulation.1.weight", 0)
        assert found == [(stream, 1536 * place, "") for place in range(6)]
    last = windows_on("sd3", f"{ROOT}joint_blocks.23.context_block.adaLN_modulation.1.bias", 0)
    assert last == [("transformer.text", 0, ""), ("transformer.text", 1536, "")]


def test_attention_and_network_of_a_single_block_lie_side_by_side() -> None:
    block = "transformer.single_blocks.5"
    parts = [(f"{block}.attn", 0), (f"{block}.attn", 3072), (f"{block}.attn", 6144), (f"{block}.mlp", 9216)]
    assert windows_on("flux", f"{ROOT}single_blocks.5.linear1.weight", 0) == [(*part, "") for part in parts]
    found = windows_on("flux", f"{ROOT}single_blocks.5.linear2.weight", 1)
    assert found == [(f"{block}.attn", 0, ""), (f"{block}.mlp", 3072, "")]


def test_the_tokens_of_both_clips_and_of_t5_are_read_by_one_map() -> None:
    crossing = "text transformer"
    parts = [("clip_l.stream", 0, crossing), ("clip_g.stream", 768, crossing), ("t5xxl.stream", 2048, crossing)]
    assert windows_on("sd3", f"{ROOT}context_embedder.weight", 1) == parts
    assert windows_on("sd3", "text_encoders.t5xxl.transformer.shared.weight", 1) == parts
    pooled = [("clip_l.pooled", 0, crossing), ("clip_g.pooled", 768, crossing)]
    assert windows_on("sd3", f"{ROOT}y_embedder.mlp.0.weight", 1) == pooled


@pytest.mark.parametrize(
    ("name", "start", "fixed", "crossing"),
    [
        ("sd3", "text_encoders.t5xxl.", {"clip_l.stream", "clip_g.stream"}, {"clip_l.pooled", "clip_g.pooled"}),
        ("sd3", "text_encoders.clip_g.", {"clip_l.stream", "clip_l.pooled", "t5xxl.stream"}, set()),
        ("sd3", ROOT, {"clip_l.stream", "clip_g.stream", "clip_l.pooled", "t5xxl.stream"}, set()),
        ("flux", "text_encoders.clip_l.", set(), {"t5xxl.stream"}),
        ("flux", ROOT, {"clip_l.stream", "t5xxl.stream"}, set()),
    ],
)
def test_what_an_encoder_puts_out_stays_where_who_else_is_read_is_not_known(
    name: str, start: str, fixed: set[str], crossing: set[str]
) -> None:
    groups = without(name, start)
    assert {one for one in fixed if not groups[one].is_fixed} == set()
    assert {one.name for one in groups.values() if one.crosses} == crossing


def test_heads_that_read_the_same_distances_move_together() -> None:
    (attention,) = (group for group in model("t5")[1] if group.structure == "heads")
    assert [(level.name, level.below) for level in attention.levels][:3] == [
        ("head", ()),
        ("qk.0", ("head",)),
        ("value.0", ("head",)),
    ]
    assert len(attention.levels) == 1 + 2 * 24


def test_heads_that_have_distances_of_their_own_move_by_themselves() -> None:
    shapes = dict(model("t5")[0])
    for block in range(1, 24):
        shapes[f"encoder.block.{block}.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 64)
    groups = axis_groups("t5", shapes)
    assert list(faults(groups, shapes)) == []
    assert sum(group.structure == "heads" for group in groups) == 24
