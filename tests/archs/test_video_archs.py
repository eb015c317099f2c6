"""Models that make videos: names and shapes, what each is recognised as, and conversions held against diffusers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from drawn_models import drawn, infos, name_of, pieced, variants_of
from torch import Tensor

import remelt as rm
from remelt.archs.arch import find_arch
from remelt.archs.detect import detect
from remelt.archs.dialects import Spelling, from_original, to_original
from remelt.archs.facts import layout
from remelt.archs.shapes import other_shapes, without_prefix
from remelt.archs.video_parts import VIDEO_MODELS, hunyuan_video, ltx, ltx2, wan
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import CheckError

diffusers = pytest.importorskip("diffusers")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")

ROOT = "model.diffusion_model."
Infos = dict[str, TensorInfo]
Tensors = dict[str, Tensor]
CONVERTERS: dict[str, Callable[[Tensors], Tensors]] = {
    "wan": single_file.convert_wan_transformer_to_diffusers,
    "hunyuan_video": single_file.convert_hunyuan_video_transformer_to_diffusers,
    "ltx": single_file.convert_ltx_transformer_checkpoint_to_diffusers,
    "ltx2": single_file.convert_ltx2_transformer_to_diffusers,
}


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="diffusers")


def wan_of(
    heads: int, head: int, inner: int, layers: int, text: int = 4096, **more: Any
) -> tuple[dict[str, Any], Infos]:
    """A configuration of diffusers, and the shapes that we say."""
    config = {
        "num_attention_heads": heads, "attention_head_dim": head, "ffn_dim": inner, "num_layers": layers,
        "text_dim": text, "in_channels": more.get("in_channels", 16), "out_channels": more.get("out_channels", 16),
    }  # fmt: skip
    if "image" in more:
        config |= {"image_dim": more["image"], "added_kv_proj_dim": heads * head}
    if "vace_layers" in more:
        config |= {"vace_layers": list(range(more["vace_layers"]))}
    return config, infos(wan(ROOT, layers, heads * head, inner, text, **more))


def hunyuan_of(heads: int, head: int, text: int, pooled: int, double: int, single: int, **more: Any) -> Any:
    config = {
        "num_attention_heads": heads, "attention_head_dim": head, "text_embed_dim": text, "num_layers": double,
        "pooled_projection_dim": pooled, "num_single_layers": single, "in_channels": more.get("in_channels", 16),
        "guidance_embeds": more.get("guidance", True),
    }  # fmt: skip
    return config, infos(hunyuan_video(ROOT, double, single, heads * head, head, text, pooled, **more))


def ltx_of(heads: int, head: int, text: int, layers: int) -> tuple[dict[str, Any], Infos]:
    config = {
        "num_attention_heads": heads, "attention_head_dim": head, "cross_attention_dim": heads * head,
        "caption_channels": text, "num_layers": layers,
    }  # fmt: skip
    return config, infos(ltx(ROOT, layers, heads * head, text))


def ltx2_of(heads: int, head: int, audio_head: int, text: int, layers: int) -> tuple[dict[str, Any], Infos]:
    config, _ = ltx_of(heads, head, text, layers)
    config |= {
        "audio_num_attention_heads": heads, "audio_attention_head_dim": audio_head,
        "audio_cross_attention_dim": heads * audio_head,
    }  # fmt: skip
    return config, infos(ltx2(ROOT, layers, heads * head, heads * audio_head, text))


WAN, VACE = "WanTransformer3DModel", "WanVACETransformer3DModel"
HUNYUAN, LTX, LTX2 = "HunyuanVideoTransformer3DModel", "LTXVideoTransformer3DModel", "LTX2VideoTransformer3DModel"
MODELS: dict[str, tuple[str, str, tuple[dict[str, Any], Infos], list[str]]] = {
    "small wan": ("wan", WAN, wan_of(2, 12, 40, 3, 20), []),
    "small wan that looks at images": (
        "wan", WAN, wan_of(2, 12, 40, 2, 20, in_channels=36, image=16), ["i2v"]
    ),
    "small wan vace": ("wan", VACE, wan_of(2, 12, 40, 3, 20, vace_layers=2), ["vace"]),
    "wan 2.1 t2v 1.3b": ("wan", WAN, wan_of(12, 128, 8960, 30), []),
    "wan 2.1 t2v 14b": ("wan", WAN, wan_of(40, 128, 13824, 40), []),
    "wan 2.1 i2v 14b": ("wan", WAN, wan_of(40, 128, 13824, 40, in_channels=36, image=1280), ["i2v"]),
    "wan 2.2 i2v 14b": ("wan", WAN, wan_of(40, 128, 13824, 40, in_channels=36), ["i2v-2.2"]),
    "wan 2.2 ti2v 5b": (
        "wan", WAN, wan_of(24, 128, 14336, 30, in_channels=48, out_channels=48), ["ti2v-5b"]
    ),
    "wan 2.1 vace 1.3b": ("wan", VACE, wan_of(12, 128, 8960, 30, vace_layers=15), ["vace"]),
    "small hunyuan": ("hunyuan_video", HUNYUAN, hunyuan_of(2, 16, 20, 12, 2, 3), []),
    "small hunyuan unguided": (
        "hunyuan_video", HUNYUAN, hunyuan_of(2, 16, 20, 12, 2, 2, guidance=False), ["unguided"]
    ),
    "hunyuan": ("hunyuan_video", HUNYUAN, hunyuan_of(24, 128, 4096, 768, 20, 40), []),
    "hunyuan i2v": ("hunyuan_video", HUNYUAN, hunyuan_of(24, 128, 4096, 768, 20, 40, in_channels=33), ["i2v"]),
    "small ltx": ("ltx", LTX, ltx_of(2, 16, 24, 3), []),
    "ltx 2b": ("ltx", LTX, ltx_of(32, 64, 4096, 28), []),
    "ltx 13b": ("ltx", LTX, ltx_of(32, 128, 4096, 48), ["13b"]),
    "small ltx2": ("ltx2", LTX2, ltx2_of(2, 16, 8, 24, 2), []),
    "ltx2 19b": ("ltx2", LTX2, ltx2_of(32, 128, 64, 3840, 48), []),
}  # fmt: skip


def of_class(kind: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**config)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_of_the_other_layout_are_those_of_the_class(name: str) -> None:
    arch, kind, (config, shapes), variants = MODELS[name]
    theirs = of_class(kind, config)
    found = from_original(find_arch(arch), Spelling("diffusers", "transformer"), shapes)
    assert (found.unknown, found.left_out) == ([], [])
    assert {key: one.info.shape for key, one in found.tensors.items()} == theirs
    there = {key: TensorInfo(DType.BF16, shape) for key, shape in theirs.items()}
    for dialect, held in (("original", without_prefix(shapes, ROOT)), ("diffusers", there)):
        seen = detect(held)
        assert (name_of(seen), variants_of(seen), seen.problem) == (arch, variants, None)
        assert seen.spelling == Spelling(dialect, "transformer")


@pytest.mark.parametrize("divisor", [1, 4, 64])
@pytest.mark.parametrize("name", VIDEO_MODELS)
def test_a_model_is_recognised_at_any_width_and_with_or_without_prefix(name: str, divisor: int) -> None:
    whole = other_shapes(name, divisor)
    bare = without_prefix(whole, ROOT)
    assert len(bare) == len(whole)
    for shapes in (whole, bare):
        found = detect(shapes)
        assert (name_of(found), found.problem, found.variants) == (name, None, ())


def narrowed(name: str, *, extra: Mapping[str, tuple[int, ...]] | None = None, lacking: str = "") -> Infos:
    held = {key: info for key, info in other_shapes(name, 64).items() if key != lacking}
    assert not lacking or len(held) < len(other_shapes(name, 64))
    return held | {key: TensorInfo(DType.BF16, shape) for key, shape in (extra or {}).items()}


@pytest.mark.parametrize(
    ("held", "arch", "evidence"),
    [
        (narrowed("wan", lacking=f"{ROOT}head.modulation"), None, f"nearest is wan, but {ROOT}head.modulation is not"),
        (
            other_shapes("wan") | {f"{ROOT}text_embedding.0.weight": TensorInfo(DType.BF16, (5120, 2048))},
            None,
            f"nearest is wan, but {ROOT}text_embedding.0.weight is [5120, 2048], expected [*, 4096]",
        ),
        (
            narrowed("hunyuan_video", lacking=f"{ROOT}img_in.proj.weight"),
            None,
            f"nearest is hunyuan_video, but {ROOT}img_in.proj.weight is not there",
        ),
        (
            narrowed("ltx", extra={f"{ROOT}audio_patchify_proj.weight": (32, 128)}),
            None,
            f"{ROOT}audio_patchify_proj.weight is there",
        ),
        (
            narrowed("ltx2", lacking=f"{ROOT}audio_scale_shift_table"),
            None,
            f"nearest is ltx2, but {ROOT}audio_scale_shift_table is not there",
        ),
        (
            narrowed("hunyuan_video", extra={f"{ROOT}clean_x_embedder.proj.weight": (8, 16, 1, 2, 2)}),
            "hunyuan_video",
            "",
        ),
        (narrowed("wan", extra={f"{ROOT}motion_encoder.dec.direction.weight": (8, 2)}), "wan", ""),
        ({"vae.decoder.conv_in.conv.weight": TensorInfo(DType.BF16, (64, 128, 3, 3, 3))}, None, "no known arch has"),
    ],
)  # fmt: skip
def test_near_misses_and_special_models(held: Infos, arch: str | None, evidence: str) -> None:
    found = detect(held)
    assert (name_of(found), found.problem) == (arch, None)
    assert evidence in found.evidence
    assert variants_of(found) in ([], ["framepack"], ["animate"])
    assert bool(found.variants) == (arch is not None)


@pytest.mark.parametrize(
    "target",
    ["diffusion_model.blocks.0.self_attn.q", "transformer.transformer_blocks.0.attn1.to_q", "blocks.0.self_attn.q"],
)
def test_an_adapter_is_no_model(target: str) -> None:
    found = detect(
        {f"{target}.lora_{side}.weight": TensorInfo(DType.BF16, shape) for side, shape in zip("AB", [(4, 8), (8, 4)])}  # noqa: B905
    )
    assert (found.arch, found.problem) == (None, None)
    assert "this is an adapter (LoRA or the like), not a model" in found.evidence


SMALL = [name for name in MODELS if name.startswith("small") and "hunyuan" not in name]


@pytest.mark.parametrize("name", SMALL)
def test_a_model_is_converted_as_diffusers_does_it_and_back_to_its_bits(name: str) -> None:
    arch, _, (_, shapes), _ = MODELS[name]
    tensors = drawn(shapes)
    theirs = CONVERTERS[arch](dict(tensors))
    ours = rm.convert(tensors, to="diffusers")
    assert {key.removeprefix("transformer/") for key in ours} == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[f"transformer/{key}"].shape == tensor.shape
        assert torch.equal(ours[f"transformer/{key}"], tensor), key
    bare = {key.removeprefix(ROOT): tensor for key, tensor in tensors.items()}
    for there, expected in ((ours, tensors), (theirs, bare)):
        back = rm.convert(there, to="original")
        assert back.keys() == expected.keys()
        assert [key for key, tensor in back.items() if not torch.equal(tensor, expected[key])] == []


@pytest.mark.parametrize(("single", "guidance"), [(2, True), (1, False)])
def test_hunyuan_video_is_divided_as_diffusers_divides_it(single: int, guidance: bool) -> None:
    # Their converter knows one width, 3072, by heart. It is given tensors of as many rows with one column, the numbers
    # of the rows; we are told that all columns are there.
    _, whole = hunyuan_of(24, 128, 4096, 768, 2, single, guidance=guidance)
    shapes = without_prefix(whole, ROOT)
    rows = {key: torch.arange(info.shape[0]) + 100_000 * at for at, (key, info) in enumerate(shapes.items())}
    theirs = CONVERTERS["hunyuan_video"](dict(rows))
    arch, spelling = find_arch("hunyuan_video"), Spelling("diffusers", "transformer")
    there = from_original(arch, spelling, whole)
    ours = pieced(there.tensors, {ROOT + key: tensor for key, tensor in rows.items()})
    assert ours.keys() == theirs.keys()
    assert [key for key, tensor in theirs.items() if not torch.equal(ours[key], tensor)] == []
    back = to_original(arch, spelling, {key: one.info for key, one in there.tensors.items()})
    assert {key: one.info for key, one in back.tensors.items()} == whole
    again = pieced(back.tensors, theirs)
    assert [key for key, tensor in rows.items() if not torch.equal(again[ROOT + key], tensor)] == []


@pytest.mark.parametrize("guidance", [True, False])
def test_a_small_hunyuan_video_comes_back_to_its_bits(guidance: bool) -> None:
    _, shapes = hunyuan_of(2, 16, 20, 12, 2, 2, guidance=guidance)
    tensors = drawn(shapes, seed=4)
    there = rm.convert(tensors, to="diffusers")
    back = rm.convert(there, to="original")
    assert back.keys() == tensors.keys()
    assert [key for key, tensor in back.items() if not torch.equal(tensor, tensors[key])] == []


def test_what_has_no_place_in_the_other_layout_is_told() -> None:
    tensors = drawn(narrowed("ltx", extra={"vae.encoder.conv_in.conv.bias": (4,)}))
    with pytest.raises(CheckError, match="1 of its keys are of no part that is known of the original layout of ltx"):
        rm.convert(tensors, to="diffusers")


def test_models_of_both_layouts_are_merged_in_the_first_ones() -> None:
    _, _, (_, shapes), _ = MODELS["small wan"]
    a, b = drawn(shapes, seed=5), drawn(shapes, seed=6)
    mixed = rm.merge(rm.weighted_sum(rm.model(a), rm.model(CONVERTERS["wan"](dict(b))), alpha=rm.blocks(B01=1.0) | 0.0))
    inside = [key for key in a if key.startswith(f"{ROOT}blocks.1.")]
    assert len(inside) == 27
    assert all(torch.equal(mixed[key], (b if key in inside else a)[key]) for key in a)


def test_a_recipe_that_mixes_two_archs_is_refused() -> None:
    ltx_model, wan_model = (rm.model(drawn(MODELS[name][2][1])) for name in ("small ltx", "small wan"))
    with pytest.raises(CheckError, match="a recipe merges models of one arch; the inputs mix them"):
        rm.merge(rm.weighted_sum(ltx_model, wan_model, alpha=0.5))


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("wan", [("blocks.0", "B00", "block0"), ("blocks.39", "B39")]),
        ("hunyuan_video", [("double_blocks.19", "D19"), ("single_blocks.39", "S39"), ("refiner.1",)]),
        ("ltx", [("transformer_blocks.27", "B27")]),
        ("ltx2", [("transformer_blocks.47", "B47")]),
    ],
)
def test_blocks_are_the_stacks_and_no_key_is_in_two(name: str, blocks: list[tuple[str, ...]]) -> None:
    keys = list(other_shapes(name, 64))
    arch = find_arch(name)
    described = layout(keys, arch)
    found = {key for key in keys if described.facts(key).stack is not None}
    for key in keys:
        assert sum(block.match(key) is not None for block in arch.blocks) == (key in found)
        assert ("blocks." in key) == (key in found)
    assert list(described.components) == ["transformer"]
    assert not described.copied
    for names in blocks:
        assert names[0] in described.blocks
        assert set(names) <= described.block_names
