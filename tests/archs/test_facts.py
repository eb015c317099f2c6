"""Components, blocks, groups and layer classes of every key, under the names of an arch or by structure alone."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remelt.archs.arch import all_archs, find_arch
from remelt.archs.facts import class_matches, layer_names, layout, natural_order
from remelt.archs.shapes import (
    flux_shapes,
    llama_shapes,
    sd1_shapes,
    sd2_shapes,
    sd3_shapes,
    sdxl_refiner_shapes,
    sdxl_shapes,
    without_prefix,
)
from remelt.core.tensor_info import TensorInfo
from remelt.errors import RecipeError

UNET = "model.diffusion_model."
NAMED: list[tuple[str, Callable[..., dict[str, TensorInfo]]]] = [
    ("sd1", sd1_shapes),
    ("sd2", sd2_shapes),
    ("sdxl", sdxl_shapes),
    ("sd3", sd3_shapes),
    ("flux", flux_shapes),
]
MODELS: list[tuple[str | None, Callable[..., dict[str, TensorInfo]]]] = [
    *NAMED,
    (None, llama_shapes),
    ("sdxl_refiner", sdxl_refiner_shapes),
]
VAE_BLOCKS = [f"{half}.{i}" for half in ("down", "up") for i in range(4)]
VAE_BLOCKS += [
    f"vae.{half}.{part}" for half in ("encoder", "decoder") for part in ("conv_in", "mid", "norm_out", "conv_out")
]
QUANTISER = ["vae.quant_conv", "vae.post_quant_conv"]
CLIP = ["embeddings", "final_layer_norm"]
OPEN_CLIP = ["positional_embedding", "text_projection", "logit_scale", "token_embedding", "ln_final"]


def numbered(name: str, count: int) -> list[str]:
    return [name.format(i=i) for i in range(count)]


def of(component: str, modules: list[str]) -> list[str]:
    return [f"{component}.{module}" for module in modules]


def grid(last: int) -> list[str]:
    return [*numbered("IN{i:02d}", last + 1), "M00", *numbered("OUT{i:02d}", last + 1)]


@pytest.mark.parametrize(("name", "shapes"), NAMED[:3])
def test_the_grid_and_base_partition_the_keys(name: str, shapes: Callable[..., dict[str, TensorInfo]]) -> None:
    keys = list(shapes(64, extras=True))
    arch = find_arch(name)
    found = layout(keys, arch)
    held = [key for block in arch.preset[1:] for key in found.blocks[block]] + list(found.groups["BASE"])
    assert sorted(held) == sorted(keys)


@pytest.mark.parametrize(
    ("name", "shapes", "blocks"),
    [
        ("sd1", sd1_shapes, [*grid(11), *VAE_BLOCKS, *QUANTISER, *numbered("txt.{i}", 12), *of("txt", CLIP)]),
        ("sd2", sd2_shapes, [*grid(11), *VAE_BLOCKS, *QUANTISER, *numbered("txt.{i}", 24), *of("txt", OPEN_CLIP)]),
        (
            "sdxl",
            sdxl_shapes,
            [
                *grid(8),
                *VAE_BLOCKS,
                *QUANTISER,
                *numbered("txt.{i}", 12),
                *of("txt", CLIP),
                *numbered("txt2.{i}", 32),
                *of("txt2", OPEN_CLIP),
            ],
        ),
        (
            "sd3",
            sd3_shapes,
            [
                *numbered("joint_blocks.{i}", 24),
                *VAE_BLOCKS,
                *numbered("clip_l.{i}", 12),
                *numbered("clip_g.{i}", 32),
                *numbered("t5xxl.{i}", 24),
                *of("clip_l", [*CLIP, "logit_scale", "text_projection"]),
                *of("clip_g", [*CLIP, "logit_scale", "text_projection"]),
                *of("t5xxl", ["shared", "final_layer_norm", "logit_scale"]),
                *["pos_embed", "x_embedder", "context_embedder", "t_embedder", "y_embedder", "final_layer"],
                "scheduler",
            ],
        ),
        (
            "flux",
            flux_shapes,
            [
                *numbered("double_blocks.{i}", 19),
                *numbered("single_blocks.{i}", 38),
                *VAE_BLOCKS,
                *numbered("clip_l.{i}", 12),
                *numbered("t5xxl.{i}", 24),
                *of("clip_l", CLIP),
                *of("t5xxl", ["shared", "final_layer_norm"]),
                *["img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer"],
            ],
        ),
    ],
)
def test_the_blocks_of_a_named_arch(name: str, shapes: Callable[..., dict[str, TensorInfo]], blocks: list[str]) -> None:
    assert list(layout(list(shapes(64)), find_arch(name)).blocks) == sorted(blocks, key=natural_order)


@pytest.mark.parametrize(
    ("name", "shapes", "components"),
    [
        ("sd1", sd1_shapes, ["txt", "unet", "vae"]),
        ("sdxl", sdxl_shapes, ["txt", "txt2", "unet", "vae"]),
        ("sd3", sd3_shapes, ["clip_g", "clip_l", "scheduler", "t5xxl", "transformer", "vae"]),
        ("flux", flux_shapes, ["clip_l", "t5xxl", "transformer", "vae"]),
    ],
)
def test_the_components_of_a_named_arch(
    name: str, shapes: Callable[..., dict[str, TensorInfo]], components: list[str]
) -> None:
    assert list(layout(list(shapes(64)), find_arch(name)).components) == components


@pytest.mark.parametrize(
    ("name", "key", "blocks"),
    [
        (
            "sd1",
            f"{UNET}input_blocks.3.0.op.weight",
            ("IN03", "in3", "input_blocks.3", f"{UNET}input_blocks.3"),
        ),
        (
            "sd1",
            f"{UNET}middle_block.1.norm.weight",
            ("M00", "mid", "middle_block.1", f"{UNET}middle_block.1"),
        ),
        ("sd1", f"{UNET}time_embed.0.weight", ("IN00", "in0")),
        ("sd1", f"{UNET}out.2.bias", ("OUT11", "out11")),
        ("sdxl", f"{UNET}label_emb.0.2.weight", ("IN00", "in0")),
        ("sdxl", f"{UNET}out.0.weight", ("OUT08", "out8")),
        (
            "sdxl",
            "conditioner.embedders.1.model.transformer.resblocks.31.ln_1.weight",
            ("txt2.31", "resblocks.31", "conditioner.embedders.1.model.transformer.resblocks.31"),
        ),
        (
            "sd1",
            "first_stage_model.decoder.conv_in.weight",
            ("vae.decoder.conv_in", "first_stage_model.decoder.conv_in"),
        ),
        ("flux", f"{UNET}final_layer.linear.weight", ("final_layer", f"{UNET}final_layer")),
        (
            "flux",
            f"{UNET}double_blocks.7.img_attn.qkv.weight",
            ("double_blocks.7", "double7", "D07", f"{UNET}double_blocks.7"),
        ),
        (
            "sd3",
            "text_encoders.t5xxl.transformer.encoder.block.4.layer.1.layer_norm.weight",
            ("t5xxl.4", "block.4", "text_encoders.t5xxl.transformer.encoder.block.4"),
        ),
    ],
)
def test_the_names_of_a_keys_block(name: str, key: str, blocks: tuple[str, ...]) -> None:
    keys = list(dict(NAMED)[name](64))
    assert layout(keys, find_arch(name)).facts(key).blocks == blocks


def test_a_bare_file_has_the_names_of_the_whole_one() -> None:
    whole = layout(list(flux_shapes(64)), find_arch("flux"))
    bare = layout(list(without_prefix(flux_shapes(64), UNET)), find_arch("flux"))
    for key in bare.keys:
        ours, theirs = bare.facts(key), whole.facts(UNET + key)
        assert (ours.component, ours.layer, ours.index, ours.count) == ("transformer", *_rest(theirs))
        assert ours.blocks[: len(theirs.blocks)] == theirs.blocks


def _rest(facts: object) -> tuple[object, ...]:
    return tuple(getattr(facts, name) for name in ("layer", "index", "count"))


def test_a_running_average_goes_with_the_blocks_that_it_averages() -> None:
    found = layout(list(sd1_shapes(64, extras=True)), find_arch("sd1"))
    average = found.facts("model_ema.diffusion_modelinput_blocks11transformer_blocks0attn1to_qweight")
    assert average.component == "ema"
    assert (average.blocks[0], average.layer, average.copied) == ("IN01", ("attn1", "to_q"), False)
    assert found.facts("model_ema.diffusion_modelinput_blocks110out_layers0weight").blocks[0] == "IN11"
    assert found.facts("model_ema.decay").copied
    assert found.facts("model_ema.decay").groups == ("BASE", "base")


@pytest.mark.parametrize(
    ("name", "key", "copied"),
    [
        ("sd1", "betas", True),
        ("sd1", "sqrt_one_minus_alphas_cumprod", True),
        ("sd1", "cond_stage_model.transformer.text_model.embeddings.position_ids", True),
        ("sd1", f"{UNET}out.2.bias", False),
        ("sdxl", "v_pred", True),
        ("sdxl", "edm_vpred.sigma_max", True),
        ("sdxl", "conditioner.embedders.1.model.logit_scale", False),
        ("sd3", f"{UNET}pos_embed", True),
        ("sd3", "pos_embed", True),
        ("sd3", "model.model_sampling.sigmas", True),
        (None, "model.layers.0.self_attn.rotary_emb.inv_freq", True),
        (None, "bn.num_batches_tracked", True),
        (None, "betas", False),
    ],
)
def test_what_is_never_merged(name: str | None, key: str, copied: bool) -> None:
    assert layout([key], None if name is None else find_arch(name)).facts(key).copied is copied


def test_an_unknown_arch_gets_the_shortest_clear_names() -> None:
    found = layout(list(llama_shapes(12)), None)
    assert list(found.blocks) == ["embed_tokens", *numbered("layers.{i}", 12), "lm_head", "norm"]
    facts = found.facts("model.layers.3.self_attn.q_proj.weight")
    assert facts.blocks == ("layers.3", "model.layers.3")
    assert (facts.stack, facts.index, facts.count) == ("model.layers", 3, 12)
    assert (facts.component, facts.layer, facts.groups) == ("model", ("self_attn", "q_proj"), ())
    assert found.facts("lm_head.weight").layer == ("lm_head",)


def test_a_short_name_of_two_stacks_is_ambiguous() -> None:
    keys = [f"{tower}.layers.{i}.attn.q.weight" for tower in ("model.text", "model.vision") for i in range(2)]
    found = layout(keys, None)
    assert found.ambiguous["layers.1"] == ("text.layers.1", "vision.layers.1")
    assert "layers.1" not in found.block_names
    assert {"text.layers.1", "model.vision.layers.0"} <= found.block_names


def test_a_path_in_full_is_never_ambiguous() -> None:
    keys = [f"{stack}.{i}.attn.q.weight" for stack in ("layers", "aux.layers") for i in range(2)]
    found = layout(keys, None)
    assert found.facts("layers.0.attn.q.weight").blocks == ("layers.0",)
    assert found.facts("aux.layers.0.attn.q.weight").blocks == ("aux.layers.0",)
    assert not found.ambiguous


def test_components_answer_to_their_aliases() -> None:
    found = layout(list(sdxl_shapes(64)), find_arch("sdxl"))
    facts = found.facts("conditioner.embedders.1.model.ln_final.weight")
    assert found.component_aliases["clip_g"] == "txt2"
    assert all(found.is_component(facts, name) for name in ("txt2", "clip_g", "te2"))
    assert not found.is_component(facts, "txt")


def test_a_preset_speaks_of_the_grid_with_or_without_base() -> None:
    sd1 = layout(list(sd1_shapes(64)), find_arch("sd1"))
    assert sd1.preset_names(25) == tuple(grid(11))
    assert sd1.preset_names(26) == ("BASE", *grid(11))
    assert layout([], find_arch("sdxl")).preset_names(19) == tuple(grid(8))
    with pytest.raises(RecipeError, match="a preset string for sd1 is 25 or 26 numbers, but this one has 20"):
        sd1.preset_names(20)
    with pytest.raises(RecipeError, match="a model of no known arch has no preset order of blocks"):
        layout([], None).preset_names(25)


def test_block_names_hold_everything_that_may_be_written() -> None:
    found = layout(list(sd1_shapes(64)), find_arch("sd1"))
    written = {"IN00", "in0", "M00", "mid", "OUT11", "BASE", "base", "txt.3", "input_blocks.3"}
    assert written <= found.block_names
    assert "IN12" not in found.block_names


def test_a_key_of_another_model_is_refused() -> None:
    with pytest.raises(RecipeError, match="'x' is none of the 1 keys of this model"):
        layout(["a"], None).facts("x")


@pytest.mark.parametrize(
    ("layer", "pattern", "matches"),
    [
        (("attn1", "to_q"), "attn1.to_q", True),
        (("attn1", "to_q"), "attn.to_q", True),
        (("attn1", "to_q"), "to_q", True),
        (("attn1", "to_q"), "attn", True),
        (("attn1", "to_q"), "attn2", False),
        (("attn1", "to_q"), "q", False),
        (("attn1", "to_q"), "to_q.attn1", False),
        (("conv1",), "conv", True),
        (("self_attn", "q_proj"), "attn.q_proj", True),
        (("SelfAttention", "q"), "attn", True),
        (("img_attn", "qkv"), "attn.qkv", True),
        (("linear_attn", "in_proj"), "attn", True),
        (("post_attention_layernorm",), "attn", False),
        (("post_attention_layernorm",), "norm", True),
        (("input_layernorm",), "norm", True),
        (("layer_norm1",), "norm", True),
        (("norm3",), "norm", True),
        (("ln_1",), "norm", True),
        (("img_attn", "norm", "key_norm"), "attn.norm", True),
        (("normalizer",), "norm", False),
        (("mlp", "fc1"), "mlp", True),
        (("img_mlp",), "mlp", True),
        (("ff", "net", "proj"), "mlp", True),
        (("feed_forward", "w1"), "mlp", True),
        (("DenseReluDense", "wo"), "mlp", True),
        (("diff",), "mlp", False),
        (("attn1", "to_q"), "", False),
        ((), "attn", False),
    ],
)
def test_which_layers_a_class_name_finds(layer: tuple[str, ...], pattern: str, matches: bool) -> None:
    assert class_matches(layer, pattern) is matches


@pytest.mark.parametrize(
    ("inner", "names"),
    [
        ("0.in_layers.2.weight", ("in_layers",)),
        ("1.transformer_blocks.0.attn1.to_q.weight", ("attn1", "to_q")),
        ("1.transformer_blocks.0.norm1.bias", ("norm1",)),
        ("1.transformer_blocks.0.ff.net.0.proj.weight", ("ff", "net", "proj")),
        ("attn.in_proj_weight", ("attn", "in_proj")),
        ("layer.0.SelfAttention.q.weight", ("SelfAttention", "q")),
        ("img_attn.norm.key_norm.scale", ("img_attn", "norm", "key_norm")),
        ("mlp.experts.7.gate_proj.weight", ("mlp", "experts", "gate_proj")),
        ("A_log", ("A_log",)),
        ("weight", ()),
    ],
)
def test_the_names_of_a_layer(inner: str, names: tuple[str, ...]) -> None:
    assert layer_names(inner.split(".")) == names


def test_the_three_kinds_of_layer_are_found_in_every_known_model() -> None:
    for name, shapes in MODELS:
        found = layout(list(shapes()), None if name is None else find_arch(name))
        for kind in ("attn", "mlp", "norm"):
            assert any(found.matches_class(found.facts(key), kind) for key in found.keys), (name, kind)


segments = st.sampled_from(["layers", "attn", "weight", "0", "1", "10", "", "input_blocks", "model", "lora_A"])
any_key = st.one_of(st.text(max_size=30), st.lists(segments, min_size=1, max_size=7).map(".".join))


@given(st.lists(any_key, max_size=30), st.sampled_from([None, *sorted(all_archs())]))
def test_any_set_of_keys_has_a_layout_under_any_arch(keys: list[str], name: str | None) -> None:
    found = layout(keys, None if name is None else find_arch(name))
    assert set(found.keys) == set(keys)
    assert sorted(key for held in found.components.values() for key in held) == sorted(set(keys))
    for key in keys:
        facts = found.facts(key)
        assert facts.key == key
        assert facts.component in facts.component_names
        assert set(facts.blocks) <= found.block_names
        if facts.blocks:
            assert key in found.blocks[facts.blocks[0]]


def test_a_large_layout_is_quick() -> None:
    keys, arch = list(sdxl_shapes()), find_arch("sdxl")
    start = time.perf_counter()
    layout(keys, arch)
    assert time.perf_counter() - start < 1.5  # 0.1 s on an idle core
