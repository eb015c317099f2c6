"""Which arch a file is recognised as, the near misses among them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from drawn_models import name_of, variants_of
from hypothesis import given
from hypothesis import strategies as st

from remelt.archs.arch import find_arch
from remelt.archs.detect import detect
from remelt.archs.shapes import (
    flux_shapes,
    sd1_shapes,
    sd2_shapes,
    sd3_shapes,
    sdxl_shapes,
    shapes_of,
    without_prefix,
)
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo

UNET = "model.diffusion_model."
Tensors = dict[str, TensorInfo]
MODELS = [("sd1", sd1_shapes), ("sd2", sd2_shapes), ("sdxl", sdxl_shapes), ("sd3", sd3_shapes), ("flux", flux_shapes)]


def tensors(**shapes: tuple[int, ...]) -> Tensors:
    return {key: TensorInfo(DType.F16, shape) for key, shape in shapes.items()}


@pytest.mark.parametrize("divisor", [1, 4, 16, 64])
@pytest.mark.parametrize(("name", "shapes"), MODELS)
def test_a_model_is_recognised_at_any_width(name: str, shapes: Callable[[int], Tensors], divisor: int) -> None:
    found = detect(shapes(divisor))
    assert name_of(found) == name
    assert found.problem is None
    assert found.evidence.startswith(f"{name}: {UNET}")
    assert variants_of(found) == []


@pytest.mark.parametrize("divisor", [1, 32])
@pytest.mark.parametrize(("name", "shapes"), MODELS)
def test_its_denoiser_alone_is_recognised_with_and_without_prefix(
    name: str, shapes: Callable[[int], Tensors], divisor: int
) -> None:
    whole = shapes(divisor)
    bare = without_prefix(whole, UNET)
    assert name_of(detect(bare)) == name
    assert name_of(detect({UNET + key: info for key, info in bare.items()})) == name


@pytest.mark.parametrize(("name", "shapes"), MODELS[:3])
def test_a_pruned_and_a_full_file_are_the_same_arch(name: str, shapes: Callable[..., Tensors]) -> None:
    full = shapes(16, extras=True)
    pruned = {key: info for key, info in full.items() if key.startswith((UNET, "cond", "first"))}
    assert len(pruned) < len(full)
    assert name_of(detect(full)) == name_of(detect(pruned)) == name


@pytest.mark.parametrize(
    ("made", "name", "variants"),
    [
        (sd1_shapes(in_channels=9), "sd1", ["inpainting"]),
        (sd1_shapes(32, in_channels=9), "sd1", ["inpainting"]),
        (sd1_shapes(32, in_channels=8), "sd1", ["instruct-pix2pix"]),
        (sd2_shapes(32, in_channels=5), "sd2", ["depth"]),
        (sdxl_shapes(32, in_channels=9), "sdxl", ["inpainting"]),
        (sdxl_shapes(32) | tensors(v_pred=(0,)), "sdxl", ["v-prediction"]),
        (sd3_shapes(depth=38, hidden=2432, qk_norm=True), "sd3", ["3.5-large"]),
        (flux_shapes(guidance=False), "flux", ["schnell"]),
        (flux_shapes(in_channels=384), "flux", ["fill"]),
        (flux_shapes(32, in_channels=128), "flux", ["control"]),
    ],
)
def test_a_variant_is_of_the_arch_and_noted(made: Tensors, name: str, variants: list[str]) -> None:
    found = detect(made)
    assert name_of(found) == name
    assert variants_of(found) == variants
    assert all(variant.note.startswith("this ") for variant in found.variants)


def test_sd2_is_told_from_sd1_by_its_linear_maps_and_its_context() -> None:
    key = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    found = detect(sd1_shapes() | {key: TensorInfo(DType.F16, (320, 1024))})
    assert found.arch is None
    assert found.evidence == f"no known arch: nearest is sd1, but {key} is [320, 1024], expected [*, 768]"
    assert found.near[:2] == ("sd1", "sd2")


@pytest.mark.parametrize(
    ("made", "evidence"),
    [
        (
            {
                "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": TensorInfo(DType.F16, (320, 4)),
                "lora_unet_down_blocks_0_attentions_0_proj_in.alpha": TensorInfo(DType.F16, ()),
            },
            ("no known arch: lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight says that this is an adapter "
            "(LoRA or the like), not a model"),
        ),
        ({"x.weight": TensorInfo(DType.F16, (3,))}, "no known arch has such keys"),
        ({}, "no known arch has such keys"),
    ],
)  # fmt: skip
def test_what_is_said_of_a_file_of_no_known_arch(made: Tensors, evidence: str) -> None:
    found = detect(made)
    assert found.arch is None
    assert found.problem is None
    assert found.evidence.startswith(evidence)


@pytest.mark.parametrize(
    ("name", "count"),
    [("sd1", 3), ("sd2", 3), ("sdxl_refiner", 3), ("flux", 5), ("hunyuan_video", 4), ("vae", 1), ("open_clip_g", 1)],
)
def test_the_nearest_miss_is_the_arch_that_shares_most_keys(name: str, count: int) -> None:
    arch, shapes = find_arch(name), shapes_of(name)
    assert shapes is not None
    lacking = [sign.key for sign in arch.recognise[0] if sign.shape is not None][:count]
    held = {key: info for key, info in shapes.items() if arch.canonical(key) not in lacking}
    assert len(held) == len(shapes) - count
    found = detect(held)
    assert (found.arch, found.near[0]) == (None, name)
    assert found.evidence.startswith(f"no known arch: nearest is {name}, but {lacking[0]} is not there")


def test_a_model_wider_than_the_arch_is_another_one() -> None:
    key = f"{UNET}input_blocks.0.0.weight"
    found = detect(sd1_shapes() | {key: TensorInfo(DType.F16, (512, 4, 3, 3))})
    assert found.arch is None
    assert f"{key} is [512, 4, 3, 3], expected [320, 4..9, 3, 3]" in found.evidence


def test_chroma_is_no_flux() -> None:
    lacking = {key: info for key, info in flux_shapes().items() if "_mod." not in key and "vector_in" not in key}
    found = detect(lacking | {f"{UNET}distilled_guidance_layer.in_proj.weight": TensorInfo(DType.BF16, (5120, 64))})
    assert name_of(found) == "chroma"


def test_a_file_of_two_archs_is_a_problem() -> None:
    found = detect(sd1_shapes(16) | flux_shapes(16))
    assert found.arch is None
    assert found.problem == "it looks like flux and like sd1 at once"
    assert found.near == ("flux", "sd1")


keys = st.one_of(st.text(max_size=20), st.sampled_from(list(sd1_shapes(64)) + list(flux_shapes(64))))
infos = st.builds(TensorInfo, st.sampled_from(DType), st.lists(st.integers(0, 4096), max_size=5).map(tuple))


@given(st.dictionaries(keys, infos, max_size=20))
def test_any_tensors_are_detected_without_a_fault(made: Tensors) -> None:
    found = detect(made)
    assert found.evidence
    assert found.arch is None or found.problem is None
