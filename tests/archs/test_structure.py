"""Blocks and components inferred from key names alone."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remelt.archs.shapes import flux_shapes, llama_shapes, sd1_shapes, sd2_shapes, sd3_shapes, sdxl_shapes
from remelt.archs.structure import infer, is_number, split_key
from remelt.core.tensor_info import TensorInfo

DIFFUSION = "model.diffusion_model."
VAE = {"first_stage_model.encoder.down": 4, "first_stage_model.decoder.up": 4}


@pytest.mark.parametrize(
    ("shapes", "stacks"),
    [
        (
            sd1_shapes,
            {
                f"{DIFFUSION}input_blocks": 12,
                f"{DIFFUSION}middle_block": 3,
                f"{DIFFUSION}output_blocks": 12,
                "cond_stage_model.transformer.text_model.encoder.layers": 12,
                **VAE,
            },
        ),
        (
            sd2_shapes,
            {
                f"{DIFFUSION}input_blocks": 12,
                f"{DIFFUSION}middle_block": 3,
                f"{DIFFUSION}output_blocks": 12,
                "cond_stage_model.model.transformer.resblocks": 24,
                **VAE,
            },
        ),
        (
            sdxl_shapes,
            {
                f"{DIFFUSION}input_blocks": 9,
                f"{DIFFUSION}middle_block": 3,
                f"{DIFFUSION}output_blocks": 9,
                "conditioner.embedders.0.transformer.text_model.encoder.layers": 12,
                "conditioner.embedders.1.model.transformer.resblocks": 32,
                **VAE,
            },
        ),
        (
            sd3_shapes,
            {
                f"{DIFFUSION}joint_blocks": 24,
                "text_encoders.clip_l.transformer.text_model.encoder.layers": 12,
                "text_encoders.clip_g.transformer.text_model.encoder.layers": 32,
                "text_encoders.t5xxl.transformer.encoder.block": 24,
                **VAE,
            },
        ),
        (
            flux_shapes,
            {
                f"{DIFFUSION}double_blocks": 19,
                f"{DIFFUSION}single_blocks": 38,
                "text_encoders.clip_l.transformer.text_model.encoder.layers": 12,
                "text_encoders.t5xxl.transformer.encoder.block": 24,
                "vae.encoder.down": 4,
                "vae.decoder.up": 4,
            },
        ),
        (llama_shapes, {"model.layers": 4}),
    ],
)
def test_the_stacks_of_known_models_are_found(
    shapes: Callable[[], dict[str, TensorInfo]], stacks: dict[str, int]
) -> None:
    found = infer(shapes())
    assert {stack: len(numbers) for stack, numbers in found.stacks.items()} == stacks


def test_a_block_is_the_outermost_stack_and_its_number() -> None:
    keys = [f"down_blocks.{i}.attentions.{j}.to_q.weight" for i in range(2) for j in range(3)]
    place = infer(keys).places["down_blocks.1.attentions.2.to_q.weight"]
    assert place.block == "down_blocks.1"
    assert (place.index, place.count, place.inner) == (1, 2, ("attentions", "2", "to_q", "weight"))


def test_a_sequence_of_leaves_is_no_stack() -> None:
    found = infer(["mlp.0.weight", "mlp.2.weight", "mlp.4.weight", "img_mlp.0.bias"])
    assert not found.stacks


def test_numbered_parts_that_do_not_resemble_each_other_are_no_stack() -> None:
    keys = ["embedders.0.text.ln.weight", "embedders.0.text.fc.weight", "embedders.1.model.proj.w", "embedders.1.pos.w"]
    assert not infer(keys).stacks


def test_children_that_share_half_of_their_suffixes_are_a_stack() -> None:
    keys = ["parts.0.a.w", "parts.0.b.w", "parts.1.a.w", "parts.1.c.w"]
    assert infer(keys).stacks == {"parts": (0, 1)}


def test_a_container_of_a_stacks_name_needs_no_resemblance() -> None:
    keys = ["model.layers.0.mamba.in.weight", "model.layers.1.attention.q.weight", "model.layers.2.mlp.up.weight"]
    assert infer(keys).stacks == {"model.layers": (0, 1, 2)}


def test_one_child_is_no_stack() -> None:
    assert not infer(["layers.0.attn.weight", "layers.0.mlp.weight"]).stacks


def test_a_stack_with_gaps_keeps_its_numbers_and_counts_what_is_there() -> None:
    found = infer([f"layers.{i}.attn.q.weight" for i in (3, 7, 20)])
    place = found.places["layers.7.attn.q.weight"]
    assert found.stacks == {"layers": (3, 7, 20)}
    assert (place.block, place.number, place.index, place.count) == ("layers.7", 7, 1, 3)


def test_stacks_are_ordered_by_number_and_not_by_text() -> None:
    found = infer([f"layers.{i}.attn.q.weight" for i in (10, 2, 1)])
    assert list(found.blocks) == ["layers.1", "layers.2", "layers.10"]


def test_a_folder_is_a_segment_of_its_own_and_a_component() -> None:
    keys = [f"{folder}/layers.{i}.attn.q.weight" for folder in ("unet", "text_encoder") for i in range(2)]
    found = infer([*keys, "unet/conv_in.weight"])
    assert set(found.stacks) == {"unet/layers", "text_encoder/layers"}
    assert found.places["unet/conv_in.weight"].component == "unet"
    assert found.places["text_encoder/layers.1.attn.q.weight"].component == "text_encoder"


@pytest.mark.parametrize(
    ("shapes", "components"),
    [
        (sd1_shapes, {"cond_stage_model", "first_stage_model", "model"}),
        (flux_shapes, {"model", "text_encoders", "vae"}),
        (llama_shapes, {"model", "lm_head"}),
    ],
)
def test_a_model_falls_into_parts_where_the_paths_to_its_stacks_differ(
    shapes: Callable[[], dict[str, TensorInfo]], components: set[str]
) -> None:
    found = {place.component for place in infer(shapes()).places.values()}
    assert found == components


def test_the_towers_of_a_vision_language_model_are_its_components() -> None:
    towers = ("model.visual.blocks", "model.language_model.layers")
    keys = [f"{stack}.{i}.attn.q.weight" for stack in towers for i in range(2)]
    found = infer([*keys, "model.visual.patch.weight", "model.projector.weight", "lm_head.weight"])
    components = {key: place.component for key, place in found.places.items()}
    assert components["model.visual.patch.weight"] == "model.visual"
    assert components["model.language_model.layers.1.attn.q.weight"] == "model.language_model"
    assert components["model.projector.weight"] == "model"
    assert components["lm_head.weight"] == "lm_head"


def test_a_flat_list_of_tensors_is_one_component() -> None:
    found = infer([f"lora_unet_down_{i}.alpha" for i in range(200)])
    assert {place.component for place in found.places.values()} == {"main"}


@pytest.mark.parametrize("segment", ["007", "-1", "1e5", "", "²", "٣", "1" * 5000])
def test_only_plain_small_numbers_count_children(segment: str) -> None:
    assert not is_number(segment)


segments = st.sampled_from(["layers", "attn", "weight", "0", "1", "2", "10", "", "é", "a_b"])
any_key = st.one_of(st.text(max_size=30), st.lists(segments, min_size=1, max_size=8).map(".".join))


@given(st.lists(any_key, max_size=40), st.sampled_from(["", "unet/"]))
def test_any_set_of_keys_gets_one_place_each(keys: list[str], folder: str) -> None:
    keys = [folder + key for key in keys]
    found = infer(keys)
    assert set(found.places) == set(keys)
    for key, place in found.places.items():
        assert place.component
        if place.stack is None:
            assert (place.index, place.count) == (0, 0)
            continue
        assert key.startswith(f"{place.block}.")
        assert 0 <= place.index < place.count == len(found.stacks[place.stack])
        assert found.stacks[place.stack][place.index] == place.number
        assert len(place.inner) < len(split_key(key))


@given(st.lists(any_key, max_size=30), st.randoms())
def test_the_order_of_the_keys_changes_nothing(keys: list[str], random: object) -> None:
    shuffled = list(keys)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert infer(keys).places == infer(shuffled).places


def test_a_large_checkpoint_is_read_in_a_blink() -> None:
    keys = list(sdxl_shapes())
    best = min(_seconds(keys) for _ in range(3))
    assert best < 0.25  # 0.02 s on an idle core


def test_hostile_keys_take_linear_time() -> None:
    deep = "0.1." * 50_000 + "x"
    wide = [f"a.{i}.{j}.b.c{i}" for i in range(300) for j in range(100)]
    assert _seconds([deep, *wide]) < 20


def _seconds(keys: list[str]) -> float:
    start = time.perf_counter()
    infer(keys)
    return time.perf_counter() - start
