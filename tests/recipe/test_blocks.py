"""Block weights: which number each key gets, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import remelt as rm
from remelt.archs.arch import find_arch
from remelt.archs.facts import layout
from remelt.archs.shapes import sd1_shapes, sdxl_shapes
from remelt.recipe.blocks import BlockWeights, interpolate

SD1 = layout(tuple(sd1_shapes(8)), find_arch("sd1"))
ATTENTION = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
TEXT = "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.weight"
VAE = "first_stage_model.decoder.conv_in.weight"


def number(weights: BlockWeights, key: str) -> Any:
    return weights.resolve(SD1.facts(key), SD1)


def test_the_more_specific_kind_wins_whatever_the_order() -> None:
    weights = [
        rm.components(unet=0.1),
        rm.classes({"attn1.to_q": 0.2}),
        rm.blocks(IN01=0.3),
        rm.keys({"*.attn1.*": 0.4}),
    ]
    for count in range(1, 5):
        forwards, backwards = weights[0], weights[count - 1]
        for more in weights[1:count]:
            forwards = forwards | more
        for more in reversed(weights[: count - 1]):
            backwards = backwards | more
        assert number(forwards | 0.9, ATTENTION) == number(backwards | 0.9, ATTENTION) == count / 10
    assert number(weights[3] | 0.9, VAE) == 0.9


def test_at_equal_rank_the_left_one_wins() -> None:
    assert number(rm.blocks(IN01=0.3) | rm.blocks(in1=0.5), ATTENTION) == 0.3
    assert number(rm.blocks(in1=0.5) | rm.blocks(IN01=0.3), ATTENTION) == 0.5
    assert number(rm.depth([0.7]) | rm.blocks(IN01=0.3), ATTENTION) == 0.7
    assert (rm.blocks(IN01=0.3) | 0.1 | 0.2).default == 0.1


def test_a_block_wins_over_the_group_that_it_is_in() -> None:
    weights = rm.blocks(BASE=0.1) | rm.blocks({"layers.3": 0.5}) | 0.9
    assert number(weights, TEXT) == 0.5
    assert number(weights, TEXT.replace(".3.", ".4.")) == 0.1
    assert number(weights, VAE) == 0.1
    assert number(weights, ATTENTION) == 0.9


def test_a_key_that_nobody_speaks_for_has_no_number() -> None:
    assert number(rm.blocks(M00=0.5), VAE) is None


def test_preset_strings_speak_of_all_blocks_with_or_without_base() -> None:
    with_base = rm.blocks(",".join(str(index / 100) for index in range(26)))
    without = rm.blocks(",".join(str(index / 100) for index in range(25)))
    assert number(with_base, TEXT) == 0.0
    assert number(with_base, ATTENTION) == 0.02
    assert number(without, ATTENTION) == 0.01
    assert number(with_base, "model.diffusion_model.middle_block.1.norm.weight") == 0.13
    assert number(without, "model.diffusion_model.output_blocks.11.0.in_layers.2.weight") == 0.24
    assert number(without, TEXT) is None
    xl = layout(tuple(sdxl_shapes(8)), find_arch("sdxl"))
    preset = rm.blocks(",".join(str(index / 100) for index in range(20)))
    key = "model.diffusion_model.output_blocks.8.0.in_layers.2.weight"
    assert preset.resolve(xl.facts(key), xl) == 0.19


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=9), st.integers(1, 60))
def test_depth_starts_at_the_first_value_ends_at_the_last_and_stays_between(values: list[float], count: int) -> None:
    found = [interpolate(tuple(values), index, count) for index in range(count)]
    assert found[0] == values[0]
    if count > 1:
        assert found[-1] == values[-1]
    assert all(min(values) - 1e-9 <= value <= max(values) + 1e-9 for value in found)


@given(st.integers(2, 50))
def test_depth_with_as_many_values_as_layers_gives_each_its_own(count: int) -> None:
    values = tuple(float(index % 7) for index in range(count))
    assert [interpolate(values, index, count) for index in range(count)] == pytest.approx(values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rm.blocks(), "blocks needs at least one name with a number"),
        (lambda: rm.blocks(IN00="x"), "blocks: IN00 needs a finite number, but got 'x'"),
        (lambda: rm.blocks(IN00=math.nan), "blocks: IN00 needs a finite number, but got nan"),
        (lambda: rm.blocks(IN00=True), "blocks: IN00 needs a finite number, but got True"),
        (lambda: rm.blocks("0.1,x"), "a preset string is comma-separated numbers, but 'x' is none"),
        (lambda: rm.blocks("0.1", IN00=1), "blocks takes a preset string or names, not both"),
        (lambda: rm.keys([1]), "keys needs names with numbers, but got [1]"),
        (lambda: rm.depth([]), "depth needs a list of numbers"),
        (lambda: rm.depth("0.1"), "depth needs a list of numbers"),
        (lambda: rm.search(1, 0), "search needs two finite numbers, low below high, but got 1.0 and 0.0"),
    ],
)
def test_what_cannot_be_meant_is_refused(make: Any, message: str) -> None:
    with pytest.raises(rm.RecipeError) as caught:
        make()
    assert message in str(caught.value)


def test_weights_print_as_a_recipe_writes_them() -> None:
    weights = (
        rm.blocks(IN00=0.2) | rm.blocks({"layers.3": rm.search(0, 1)}) | rm.keys({"*.x": 1}) | rm.depth([0, 1]) | 0.5
    )
    assert repr(weights) == (
        "blocks(IN00=0.2) | blocks({'layers.3': search(0.0, 1.0)}) | keys({'*.x': 1.0}) | depth([0.0, 1.0]) | 0.5"
    )
