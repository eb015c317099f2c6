"""Adapters that are broken, or none of the model's: what is said of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from remelt.adapters.change import Parts
from remelt.adapters.kinds import kind_of
from remelt.core.tensor_info import TensorInfo
from remelt.errors import AdapterError
from remelt.tensors import FROM_TORCH

Shapes = Mapping[str, tuple[int, ...]]

LORA: Shapes = {"lora_up.weight": (24, 4), "lora_down.weight": (4, 12)}
LOHA: Shapes = {"hada_w1_a": (24, 4), "hada_w1_b": (4, 12), "hada_w2_a": (24, 4), "hada_w2_b": (4, 12)}
LOKR: Shapes = {"lokr_w1": (4, 3), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 4)}
GLORA: Shapes = {"a1.weight": (12, 4), "a2.weight": (4, 12), "b1.weight": (24, 4), "b2.weight": (4, 12)}
MATRIX = (24, 12)


def drawn(shapes: Shapes, **more: Tensor) -> dict[str, Tensor]:
    return {name: torch.ones(shape) for name, shape in shapes.items()} | more


def parts_of(tensors: Mapping[str, Tensor], **facts: Any) -> Parts:
    infos = {name: TensorInfo(FROM_TORCH[one.dtype], tuple(one.shape)) for name, one in tensors.items()}
    return Parts("mid.to_q", infos, dict(tensors).__getitem__, **facts)


def refused(tensors: Mapping[str, Tensor], shape: tuple[int, ...], message: str, **facts: Any) -> AdapterError:
    parts = parts_of(tensors, **facts)
    (use,) = kind_of(parts.infos, parts.module)
    with pytest.raises(AdapterError, match=re.escape(message)) as caught:
        use.kind.check(parts, shape)
    return caught.value


@pytest.mark.parametrize(
    ("missing", "there"),
    [("lora_down.weight", {"lora_up.weight": (24, 4)}), ("lora_up.weight", {"lora_down.weight": (4, 12)})],
)
def test_one_factor_alone_is_refused(missing: str, there: Shapes) -> None:
    told = f"mid.to_q: a LoRA is made of lora_up.weight and lora_down.weight, but {missing} is missing"
    error = refused(drawn(there), MATRIX, told)
    assert error.hint == "the file is not whole: take it again from where it came from"


def test_shapes_that_do_not_fit_are_told_with_those_of_the_model() -> None:
    for shapes, shape, made in (
        (LORA, (24, 16), "lora_up.weight [24, 4] and lora_down.weight [4, 12] make [24, 12]"),
        ({**LORA, "lora_down.weight": (4, 12, 3, 3)}, (24, 12, 1, 1), "make [24, 12, 3, 3]"),
        ({**LORA, "lora_down.weight": (4, 12, 3, 3)}, (24, 108), "make [24, 12, 3, 3]"),
        ({**LORA, "lora_down.weight": (4, 12, 1, 3)}, (24, 12, 3, 1), "make [24, 12, 1, 3]"),
        (LOHA, (24, 16), "hada_w1_a [24, 4] and hada_w1_b [4, 12] make [24, 12]"),
        (LOKR, (24, 16), "lokr_w1 [4, 3], lokr_w2_a [6, 2] and lokr_w2_b [2, 4] make [24, 12]"),
        ({"lokr_w1": (4, 3), "lokr_w2": (6, 4, 3, 3)}, MATRIX, "lokr_w1 [4, 3] and lokr_w2 [6, 4, 3, 3] make"),
        (GLORA, (24, 16), "b1.weight [24, 4] and b2.weight [4, 12] make [24, 12]"),
    ):
        error = refused(drawn(shapes), shape, made)
        assert error.message.endswith(f", but the model's tensor is {list(shape)}")
        assert error.hint == "the adapter is of another model"
    turned = {"transposed": True}
    refused(drawn(LORA), MATRIX, "make [12, 24], but the model's tensor is [24, 12]", options=turned)
    refused(drawn(LORA), (12, 24, 3), "make a matrix turned round, but the model's tensor is [12, 24", options=turned)


def test_parts_of_another_size_are_told_with_what_they_must_be() -> None:
    for shapes, shape, wanted in (
        ({"diff": (24, 12, 3, 3)}, (24, 13, 3, 3), "diff [24, 12, 3, 3] must be [24, 13, 3, 3]"),
        ({"diff": (24, 12, 1, 3)}, (24, 12, 3, 1), "diff [24, 12, 1, 3] must be [24, 12, 3, 1]"),
        ({"w_norm": (24,)}, (25,), "w_norm [24] must be [25]"),
        ({"ia3_l": (1, 11)}, (25, 12), "ia3_l [1, 11] must be of 25 outputs or 12 inputs"),
        ({"oft_blocks": (6, 4, 4)}, (28, 12), "oft_blocks [6, 4, 4] must be of 28 outputs in all, not 24"),
        ({"oft_R": (3, 6)}, (24, 16), "oft_R [3, 6] must be of 16 inputs in all, not 12"),
        ({"oft_R": (1, 6)}, (24, 14), "oft_R [1, 6] must be of 14 inputs in all, not 4"),
        ({"oft_blocks": (3, 12, 2, 2)}, (28, 12), "oft_blocks [3, 12, 2, 2] must be of 28 outputs in all, not 24"),
        ({"boft_R": (2, 6, 2, 2), "boft_s": (24, 1)}, (24, 16), "boft_R [2, 6, 2, 2] must be of 16 inputs in all"),
        ({**LORA, "dora_scale": (23, 1)}, MATRIX, "dora_scale [23, 1] must be [24, 1, ...] or [1, 12, ...]"),
        ({**LORA, "dora_scale": (12,)}, MATRIX, "dora_scale [12] must be [24, 1, ...] or [1, 12, ...]"),
    ):
        error = refused(drawn(shapes), shape, wanted)
        assert error.message.endswith(f": the model's tensor is {list(shape)}")
        assert error.hint == "the adapter is of another model"


def test_other_parts_that_do_not_fit() -> None:
    for tensors, message in (
        (
            drawn({"lora_up.weight": (24, 8), "lora_down.weight": (4, 12)}),
            "these are not of one rank: lora_up.weight [24, 8] and lora_down.weight [4, 12]",
        ),
        (
            drawn({**LORA, "lora_mid.weight": (4, 8, 3, 3)}),
            "not of one rank: lora_up.weight [24, 4], lora_down.weight [4, 12] and lora_mid.weight [4, 8, 3, 3]",
        ),
        (
            drawn({"lora_up.weight": (24, 0), "lora_down.weight": (0, 12)}),
            "its rank is 0: lora_up.weight [24, 0] and lora_down.weight [0, 12]",
        ),
        (drawn({**LORA, "lora_up.weight": (24,)}), "lora_up.weight is [24], which is no matrix"),
        (
            drawn({"lora_up.weight": (24, 4, 3, 3), "lora_down.weight": (4, 12, 3, 3)}),
            "one factor may have the kernel of a convolution, but these have: lora_up.weight [24, 4, 3, 3] and lora",
        ),
        (drawn(LORA, alpha=torch.tensor(0.0)), "alpha 0 makes it nothing"),
        (drawn(LORA, alpha=torch.tensor(float("nan"))), "alpha is nan"),
        (drawn(LORA, alpha=torch.ones(2)), "alpha is one number, but it is [2]"),
        (
            drawn(LORA) | {"lora_up.weight": torch.ones(24, 4, dtype=torch.int8)},
            "lora_up.weight is of I8, but factors are floating-point numbers",
        ),
        (drawn({**LORA, "dora_scale": (1, 24)}), "dora_scale [1, 24] must be [24, 1, ...] or [1, 12, ...]"),
        (drawn({**LOHA, "hada_w2_b": (5, 12)}), "not of one rank: hada_w2_a [24, 4] and hada_w2_b [5, 12]"),
        (drawn({**LOHA, "hada_w1_a": (24, 4, 1)}), "hada_w1_a is [24, 4, 1], which is no matrix"),
        (drawn({**LOKR, "lokr_w2": (6, 4)}), "lokr_w2 is there whole, and in factors too: lokr_w2_a, lokr_w2_b"),
        (drawn({"lokr_w1": (4, 3)}), "a LoKr is made of lokr_w2, but lokr_w2 is missing"),
        (drawn({"lokr_w1": (4, 3), "lokr_w2_a": (6, 2)}), "but lokr_w2_b is missing"),
        (
            drawn({**GLORA, "a2.weight": (4, 11)}),
            "a1.weight [12, 4] and a2.weight [4, 11] make [12, 11], but the model's tensor is [24, 12], of 12 inputs",
        ),
        (drawn({"weight": (24,)}, on_input=torch.tensor(1)), "weight [24] must be one number for each input"),
        (drawn({}, on_input=torch.tensor(1)), "an IA3 is made of weight, but weight is missing"),
        (drawn({"oft_blocks": (6, 4, 3)}), "oft_blocks [6, 4, 3] must be square blocks in 3 dimensions"),
        (drawn({"oft_blocks": (6, 4, 4), "rescale": (23, 1)}), "rescale [23, 1] must be one number for each of 24"),
        (drawn({"oft_R": (3, 5)}), "oft_R [3, 5] must be blocks by the numbers above a square's diagonal"),
        (drawn({"oft_R": (3, 4, 4)}), "oft_R [3, 4, 4] must be blocks by the numbers above a square's diagonal"),
        (drawn({"oft_blocks": (4, 6, 4, 4)}), "oft_blocks [4, 6, 4, 4] make no butterfly: blocks have an even side"),
        (drawn({"oft_blocks": (1, 8, 3, 3)}), "oft_blocks [1, 8, 3, 3] make no butterfly"),
        (drawn({"boft_R": (3, 6, 2, 2), "boft_s": (24, 1)}), "3 stages ask for a multiple of 4 blocks"),
        (drawn({"boft_R": (1, 6, 2, 2), "boft_s": (12, 1)}), "boft_s [12, 1] must be one number for each of 24"),
    ):
        refused(tensors, MATRIX, f"mid.to_q: {message}" if message[:3] not in ("not", "but", "3 s") else message)


def test_a_scale_of_nothing_and_a_broken_one_are_refused() -> None:
    refused(drawn(LORA), MATRIX, "mid.to_q: the scale 0 makes it nothing", scale=0.0)
    refused(drawn(LORA), MATRIX, "mid.to_q: the scale is inf", scale=float("inf"))


def test_inputs_that_are_stored_by_outputs_are_not_rotated() -> None:
    told = "mid.to_q: a rotation of the inputs is not defined for weights that are stored inputs by outputs"
    for shapes in ({"oft_R": (3, 6)}, {"boft_R": (2, 6, 2, 2), "boft_s": (24, 1)}):
        refused(drawn(shapes), MATRIX, told, options={"fan_in_fan_out": True})


def test_parts_that_no_kind_knows_are_named() -> None:
    def told(shapes: Shapes) -> str:
        with pytest.raises(AdapterError) as caught:
            kind_of(parts_of(drawn(shapes)).infos, "mid.to_q")
        return caught.value.message

    assert told({"p": (2,), "q": (2,)}) == "mid.to_q: no kind of adapter that is known has the parts p and q"
    assert told({"alpha": (1,)}) == "mid.to_q: no kind of adapter that is known has the parts alpha"
    assert told({}) == "mid.to_q: no kind of adapter that is known has the parts none"
    assert told({**LORA, "reshape_weight": (2,)}) == "mid.to_q: a LoRA has no part reshape_weight"
    assert told({**LORA, "lora_up.bias": (24,), "x": (1,)}) == "mid.to_q: a LoRA and a LoRA with a bias has no part x"
    assert told({"diff": (2,), "hada_w1_a": (2, 2)}) == (
        "mid.to_q: it is a LoHa and a difference at once, by diff and hada_w1_a"
    )
