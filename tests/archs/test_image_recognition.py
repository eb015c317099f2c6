"""Which image transformer a file is, in any spelling, narrowed or nearly; and what its blocks are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from drawn_models import name_of, variants_of

from remelt.archs.arch import find_arch
from remelt.archs.detect import detect
from remelt.archs.dialects import Conversion, Spelling, from_original
from remelt.archs.facts import layout
from remelt.archs.image_parts import IMAGE_MODELS, ROOT
from remelt.archs.shapes import flux_shapes, image_shapes, sdxl_refiner_shapes, sdxl_shapes, without_prefix
from remelt.check.inputs import Input, arch_of
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import Problem
from remelt.formats.memory import MemoryCheckpoint
from remelt.recipe.node import Model

Tensors = dict[str, TensorInfo]
DIFFUSERS = Spelling("diffusers")
NAMES = [*IMAGE_MODELS, "sdxl_refiner"]


def whole(name: str, divisor: int = 1) -> Tensors:
    return sdxl_refiner_shapes(divisor) if name == "sdxl_refiner" else image_shapes(name, divisor)


def infos(made: Conversion) -> Tensors:
    return {key: one.info for key, one in made.tensors.items()}


@pytest.mark.parametrize("divisor", [1, 4, 64])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_recognised_in_every_spelling_at_any_width(name: str, divisor: int) -> None:
    original, arch = whole(name, divisor), find_arch(name)
    part = "unet" if name == "sdxl_refiner" else "transformer"
    denoiser = {key: info for key, info in original.items() if key.startswith(ROOT)}
    bare = without_prefix(original, ROOT)
    alone = Spelling("diffusers", part)
    same = Spelling(alone=part) if name == "qwen_image" else alone
    for tensors, spelling in (
        (original, Spelling()),
        (denoiser, Spelling()),
        (bare, Spelling(alone=part)),
        (infos(from_original(arch, DIFFUSERS, original)), DIFFUSERS),
        (infos(from_original(arch, alone, denoiser)), same),
    ):
        found = detect(tensors)
        assert (name_of(found), found.spelling, found.problem) == (name, spelling, None)
        assert variants_of(found) == (["alpha-1024"] if name == "pixart" else [])


@pytest.mark.parametrize("divisor", [1, 16])
@pytest.mark.parametrize(
    ("name", "options", "variants"),
    [
        ("flux2", {"depths": (8, 24), "hidden": 4096, "context": 12288, "guidance": False}, ["klein-9b"]),
        ("flux2", {"depths": (5, 20), "hidden": 3072, "context": 7680, "guidance": False}, ["klein-4b"]),
        ("qwen_image", {"layered": True}, ["layered"]),
        ("z_image", {"omni": True}, ["omni"]),
        ("pixart", {"sized": False}, []),
        ("pixart", {"sized": False, "tokens": 300}, ["sigma"]),
        ("auraflow", {"positions": 1024}, ["0.1"]),
        ("auraflow", {"positions": 4096}, ["0.2"]),
    ],
)
def test_a_variant_is_noted(name: str, options: dict[str, Any], variants: list[str], divisor: int) -> None:
    found = detect(image_shapes(name, divisor, **options))
    assert (name_of(found), variants_of(found)) == (name, variants)


def changed(name: str, divisor: int = 1, **shapes: tuple[int, ...]) -> Tensors:
    return whole(name, divisor) | more(**shapes)


def more(**shapes: tuple[int, ...]) -> Tensors:
    return {ROOT + key.replace("__", "."): TensorInfo(DType.BF16, shape) for key, shape in shapes.items()}


def without(tensors: Tensors, *parts: str) -> Tensors:
    return {key: info for key, info in tensors.items() if not any(part in key for part in parts)}


NEAR: list[tuple[Callable[[], Tensors], str]] = [
    (
        lambda: without(changed("chroma", img_in_patch__weight=(3072, 3, 16, 16)), ".img_in.", ".final_layer."),
        (
            "nearest is chroma, but this is Chroma Radiance (pixels instead of latents): it merges with its own kind "
            f"only, by inferred blocks; {ROOT}img_in.weight is not there"
        ),
    ),
    (
        lambda: changed("chroma", double_blocks__0__img_mod__lin__weight=(18432, 3072)),
        (
            "nearest is chroma, but this is Flux.1 (a modulation of its own in each block): it merges with its own "
            f"kind only; {ROOT}double_blocks.0.img_mod.lin.weight is there"
        ),
    ),
    (
        lambda: changed("flux2", txt_in__weight=(6144, 5120)),
        f"nearest is flux2, but {ROOT}txt_in.weight is [6144, 5120], expected [*, 15360|12288|7680]",
    ),
    (
        lambda: changed("z_image", cap_embedder__1__weight=(3840, 4096)),
        f"nearest is z_image, but {ROOT}cap_embedder.1.weight is [3840, 4096], expected [*, 2560]",
    ),
    (
        lambda: without(changed("lumina2", layers__0__attention__wq__weight=(2304, 2304)), "attention.qkv"),
        (
            "nearest is lumina2, but this is Lumina-Next (queries, keys and values apart): it merges with its own kind "
            f"only, by inferred blocks; {ROOT}layers.0.attention.qkv.weight is not there"
        ),
    ),
    (
        lambda: without(changed("pixart", blocks__0__mlp__inverted_conv__conv__weight=(5600, 1152, 1, 1)), ".mlp.fc"),
        (
            "nearest is pixart, but this is Sana (convolutions between its layers): it merges with its own kind only, "
            f"by inferred blocks; {ROOT}blocks.0.mlp.fc1.weight is not there"
        ),
    ),
    (
        lambda: changed("auraflow", double_layers__0__attn__w2q__weight=(4096, 4096)),
        f"nearest is auraflow, but {ROOT}double_layers.0.attn.w2q.weight is [4096, 4096], expected [3072, *]",
    ),
    (
        lambda: changed("sdxl_refiner", input_blocks__0__0__weight=(512, 4, 3, 3)),
        f"nearest is sdxl_refiner, but {ROOT}input_blocks.0.0.weight is [512, 4, 3, 3], expected [384, 4, 3, 3]",
    ),
]


@pytest.mark.parametrize(("made", "evidence"), NEAR)
def test_what_is_said_of_a_near_miss(made: Callable[[], Tensors], evidence: str) -> None:
    found = detect(made())
    assert found.arch is None
    assert found.evidence.startswith(f"no known arch: {evidence}")


@pytest.mark.parametrize("root", [ROOT, ""])
def test_relations_of_qwen_image_are_no_qwen_image(root: str) -> None:
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    said = {
        "QwenImage21Transformer2DModel": "nearest is qwen_image, but this is Qwen-Image 2.1 (one stream, one "
        "modulation): it merges with its own kind only, by inferred blocks; "
        f"{ROOT}img_in.weight is [4096, 64], expected [3072, 64]",
        "QwenImageControlNetModel": f"{root}controlnet_blocks.0.weight says that this is a ControlNet, which stands "
        "beside a model and is merged with its own kind only",
    }
    for name, evidence in said.items():
        with torch.device("meta"):
            keys = getattr(diffusers, name)().state_dict()
        found = detect({root + key: TensorInfo(DType.BF16, tuple(tensor.shape)) for key, tensor in keys.items()})
        assert found.evidence == f"no known arch: {evidence}"


def test_chroma_and_flux_are_told_apart() -> None:
    assert name_of(detect(whole("chroma", 16) | without(flux_shapes(16), "_mod."))) == "chroma"
    assert name_of(detect(flux_shapes(16))) == "flux"
    assert name_of(detect(whole("flux2", 16))) == "flux2"


@pytest.mark.parametrize(
    ("first", "second"),
    [(sdxl_shapes(32), "sdxl_refiner"), (flux_shapes(32), "chroma"), (whole("z_image", 32), "lumina2")],
)
def test_a_recipe_that_mixes_two_is_told_what_each_is(first: Tensors, second: str) -> None:
    problems: list[Problem] = []
    given = {"a": first, "b": whole(second, 32)}
    arch_of([Input(label, Model(label), MemoryCheckpoint({}), detect(one)) for label, one in given.items()], problems)
    assert [problem.subject for problem in problems] == ["a", "b"]
    assert problems[1].message.startswith(f"is {second}: {ROOT}")


BLOCKS: dict[str, tuple[dict[str, int], list[str]]] = {
    "auraflow": (
        {"double_layers": 4, "single_layers": 32},
        ["cond_seq_linear", "final_linear", "init_x_linear", "modF", "positional_encoding", "register_tokens",
         "t_embedder"],
    ),
    "chroma": (
        {"double_blocks": 19, "single_blocks": 38, "distilled_guidance_layer": 5},
        ["distilled_guidance_layer.in_proj", "distilled_guidance_layer.out_proj", "final_layer", "img_in", "txt_in"],
    ),
    "flux2": (
        {"double_blocks": 8, "single_blocks": 48},
        ["double_stream_modulation_img", "double_stream_modulation_txt", "final_layer", "guidance_in", "img_in",
         "single_stream_modulation", "time_in", "txt_in"],
    ),
    "lumina2": (
        {"layers": 26, "noise_refiner": 2, "context_refiner": 2},
        ["cap_embedder", "final_layer", "norm_final", "t_embedder", "x_embedder"],
    ),
    "pixart": (
        {"blocks": 28},
        ["ar_embedder", "csize_embedder", "final_layer", "pos_embed", "t_block", "t_embedder", "x_embedder",
         "y_embedder"],
    ),
    "qwen_image": (
        {"transformer_blocks": 60},
        ["img_in", "norm_out", "proj_out", "time_text_embed", "txt_in", "txt_norm"],
    ),
    "z_image": (
        {"layers": 30, "noise_refiner": 2, "context_refiner": 2},
        ["cap_embedder", "cap_pad_token", "final_layer", "norm_final", "t_embedder", "x_embedder", "x_pad_token"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_blocks_partition_the_keys_of_a_transformer(name: str) -> None:
    stacks, outside = BLOCKS[name]
    found = layout(list(whole(name)), find_arch(name))
    assert set(found.blocks) == {f"{stack}.{i}" for stack, count in stacks.items() for i in range(count)} | set(outside)
    assert list(found.components) == ["transformer"]


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_blocks_have_the_same_names_in_folders(name: str) -> None:
    arch = find_arch(name)
    there = from_original(arch, DIFFUSERS, whole(name, 16))
    kept = [key for key in whole(name, 16) if key not in there.left_out]
    assert set(layout(list(infos(there)), arch, DIFFUSERS).blocks) == set(layout(kept, arch).blocks)


def test_the_grid_of_a_refiner_partitions_its_keys() -> None:
    arch = find_arch("sdxl_refiner")
    keys = list(sdxl_refiner_shapes(32))
    found = layout(keys, arch)
    assert len(arch.preset) == 26
    held = [key for block in arch.preset[1:] for key in found.blocks[block]]
    assert sorted([*held, *found.groups["BASE"]]) == sorted(keys)
    assert sorted(held) == sorted(key for key in keys if key.startswith(ROOT))
    assert list(found.components) == ["txt", "unet", "vae"]


def test_keys_that_no_training_makes_are_copied() -> None:
    pixart = layout(list(whole("pixart", 16)), find_arch("pixart"))
    assert pixart.copied == {f"{ROOT}pos_embed", f"{ROOT}y_embedder.y_embedding"}
    edit = changed("qwen_image", 16) | {f"{ROOT}__index_timestep_zero__": TensorInfo(DType.F32, (0,))}
    assert variants_of(detect(edit)) == ["edit-2511"]
    assert layout(list(edit), find_arch("qwen_image")).copied == {f"{ROOT}__index_timestep_zero__"}
    there = from_original(find_arch("qwen_image"), DIFFUSERS, edit)
    assert (there.unknown, there.left_out) == ([], [f"{ROOT}__index_timestep_zero__"])
    assert name_of(detect(without_prefix(edit, ROOT))) == "qwen_image"
