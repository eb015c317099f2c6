"""Adapters that do not fit the model that they are added to: what is said, and what may be left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import remelt as rm
from remelt.adapters.names import modules_of
from remelt.adapters.pairing import Layouts
from remelt.archs.arch import find_arch
from remelt.archs.shapes import flux_shapes, sd1_shapes, sdxl_shapes
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import AdapterError, CheckError
from remelt.recipe.adapter import adapter

ATTENTION = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
SECOND = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
SECOND_KEY = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
SHAPES = {key: info.shape for key, info in sd1_shapes(32).items()}
WIDTH, SECOND_WIDTH = SHAPES[KEY][0], SHAPES[SECOND_KEY][0]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, write_sd1_models: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Models ``a`` and ``b`` in the folder where the test runs."""
    write_sd1_models(tmp_path, ("a", "b"))
    monkeypatch.chdir(tmp_path)


def lora(name: str = ATTENTION, width: int = WIDTH, rank: int = 2, **more: Tensor) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(len(name))
    made = {
        "lora_up.weight": torch.randn(width, rank, generator=drawn),
        "lora_down.weight": torch.randn(rank, width, generator=drawn),
    }
    return {f"{name}.{part}": one for part, one in (made | more).items()}


def write(tensors: Mapping[str, Tensor], name: str = "style") -> Any:
    save_file(dict(tensors), f"{name}.safetensors")
    return adapter(name)


def refused(recipe: Any, message: str, hint: str, **options: Any) -> None:
    with pytest.raises(CheckError) as caught:
        rm.plan(recipe, **options)
    said = str(caught.value)
    assert message in said and hint in said
    assert "refused: 1 problem in " in said


def test_modules_that_the_model_lacks_are_told_with_the_nearest() -> None:
    stranger = write(lora() | lora(ATTENTION.replace("attn1", "attn7")))
    refused(
        rm.model("a") + stranger,
        "1 of its 2 modules are none of the model's, and would be lost:\n"
        "    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn7_to_q (the model has unet/down_blocks.",
        "--ignore-unused leaves them out",
    )


def test_an_adapter_of_another_arch_is_refused_with_some_of_its_modules() -> None:
    modules = [f"transformer.double_blocks.{i}.img_attn.proj" for i in range(7)]
    stranger = write({key: one for name in modules for key, one in lora(name).items()})
    refused(rm.model("a") + stranger, "7 of its 7 modules are none of the model's, and would be lost:", "and 2 more")
    refused(
        rm.model("a") + stranger,
        "none of its modules is one of the model's",
        "it is of another model",
        ignore_unused=True,
    )


def test_what_is_unused_may_be_left_out() -> None:
    base = {key: one.float() for key, one in load_file("a.safetensors").items()}
    some = lora() | lora("lora_unet_nowhere") | {"bundle_emb.word.string_to_params": torch.zeros(2)}
    with pytest.raises(CheckError, match=r"1 of its tensors are no part of any kind of adapter .*: bundle_emb\.word"):
        rm.plan(rm.model("a") + write(some))
    found = rm.merge(rm.model("a") + write(some), dtype="fp32", ignore_unused=True)
    assert [key for key, one in base.items() if not torch.equal(found[key], one)] == [KEY]


def test_an_adapter_of_another_width_is_refused() -> None:
    refused(
        rm.model("a") + write(lora(width=2 * WIDTH)),
        f"{ATTENTION}: lora_up.weight [{2 * WIDTH}, 2] and lora_down.weight [2, {2 * WIDTH}] make "
        f"[{2 * WIDTH}, {2 * WIDTH}], but the model's tensor is [{WIDTH}, {WIDTH}]",
        "the adapter is of another model",
    )


def test_one_factor_alone_is_refused() -> None:
    refused(
        rm.model("a") + write({f"{ATTENTION}.lora_up.weight": torch.ones(WIDTH, 2)}),
        f"{ATTENTION}: a LoRA is made of lora_up.weight and lora_down.weight, but lora_down.weight is missing",
        "the file is not whole",
    )


def test_an_alpha_of_0_is_refused() -> None:
    refused(rm.model("a") + write(lora(alpha=torch.tensor(0.0))), "alpha 0 makes it nothing", "or give it an alpha")


def test_a_magnitude_of_a_wrong_shape_is_refused() -> None:
    style = write(lora(dora_scale=torch.ones(WIDTH + 1, 1)))
    refused(rm.model("a") + style, f"{ATTENTION}: dora_scale [{WIDTH + 1}, 1] must be", "of another model")


def test_factors_that_are_not_finite_are_told_before_anything_is_written() -> None:
    up, down = torch.full((WIDTH, 2), torch.nan), torch.full((2, WIDTH), torch.inf)
    style = write(lora() | {f"{ATTENTION}.lora_up.weight": up} | lora(SECOND, SECOND_WIDTH))
    other = write(lora() | {f"{ATTENTION}.lora_down.weight": down.half()}, "other")
    with pytest.raises(AdapterError) as caught:
        rm.merge(rm.model("a") + style + 0.5 * other, "out.safetensors")
    assert caught.value.message.splitlines() == [
        "adapters have numbers that are not finite:",
        f"  style.safetensors  {ATTENTION}: lora_up.weight",
        f"  other.safetensors  {ATTENTION}: lora_down.weight",
    ]
    assert sorted(path.name for path in Path().iterdir() if path.name.startswith("out")) == []
    good = write(lora() | lora(SECOND, SECOND_WIDTH), "good")
    rm.merge(rm.model("a") + rm.weighted_sum(good, style, alpha=0.0), "out.safetensors")  # which reads one alone


def test_one_module_named_in_two_ways_is_refused() -> None:
    names = [prefix + ATTENTION.removeprefix("lora_unet_") for prefix in ("unet.", "lycoris_")]
    twice = write(lora(names[0]) | lora(names[1]))
    refused(rm.model("a") + twice, f"{names[1]} and {names[0]} both change unet/down_blocks.0.", "several adapters")


def test_one_tensor_named_in_two_layouts_is_refused() -> None:
    shapes = {key: info.shape for key, info in flux_shapes(32).items() if "double_blocks.0" in key}
    key = "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"
    whole, width = shapes[key]
    save_file({name: torch.zeros(info.shape) for name, info in flux_shapes(32).items()}, "flux.safetensors")
    fused = {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(whole, 2),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, width),
    }
    part = {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, width),
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(width, 2),
    }
    refused(
        rm.model("flux") + write(fused | part),
        f"{key} is changed by names of the layouts ",
        "an adapter names a model's modules in one way",
    )
    found = rm.merge(rm.model("flux") + write(part))
    assert torch.equal(found[key][:width], torch.full((width, width), 2.0))
    assert not found[key][width:].any()


def test_a_matrix_that_lies_in_the_original_layout_is_changed_as_it_lies() -> None:
    drawn = torch.Generator().manual_seed(0)
    base = {key: torch.randn(info.shape, generator=drawn) for key, info in sdxl_shapes(64).items()}
    save_file(base, "sdxl.safetensors")
    key = "conditioner.embedders.1.model.text_projection"
    made = lora("lora_te2_text_projection", base[key].shape[0])
    found = rm.merge(rm.model("sdxl") + write(made))
    product = made["lora_te2_text_projection.lora_up.weight"] @ made["lora_te2_text_projection.lora_down.weight"]
    torch.testing.assert_close(found[key] - base[key], product.T, rtol=0.0, atol=1e-5)
    assert [one for one in base if not torch.equal(found[one], base[one])] == [key]


def test_a_denoiser_alone_is_changed_by_whatever_names() -> None:
    start = "model.diffusion_model."
    base = {
        key.removeprefix(start): torch.zeros(info.shape)
        for key, info in flux_shapes(32).items()
        if key.startswith(start)
    }
    save_file(base, "bare.safetensors")
    width = base["double_blocks.1.img_attn.proj.weight"].shape[0]
    for name in ("lora_unet_double_blocks_1_img_attn_proj", "transformer.transformer_blocks.1.attn.to_out.0"):
        found = rm.merge(rm.model("bare") + write(lora(name, width)))
        assert [key for key, one in found.items() if one.any()] == ["double_blocks.1.img_attn.proj.weight"]


def dora() -> dict[str, Tensor]:
    return lora(dora_scale=torch.ones(WIDTH, 1))


def test_among_several_models_one_that_multiplies_must_say_which() -> None:
    several = rm.weighted_sum(rm.model("a"), rm.model("b"), alpha=0.5)
    refused(
        several + write(dora()),
        "multiplies a model's own weights, and the recipe has several models",
        'say of which: adapter("style", base="a")',
    )
    chosen = {
        name: rm.merge(several + adapter("style", base=name), dtype="fp32")[KEY] - rm.merge(several, dtype="fp32")[KEY]
        for name in ("a", "b")
    }
    assert (chosen["a"] - chosen["b"]).abs().max() > 1e-2
    for name, found in chosen.items():
        own = rm.merge(rm.model(name) + adapter("style"), dtype="fp32")[KEY] - load_file(f"{name}.safetensors")[KEY]
        torch.testing.assert_close(found, own, rtol=0.0, atol=1e-5)


def test_a_lora_needs_no_word_among_several_models() -> None:
    several = rm.weighted_sum(rm.model("a"), rm.model("b"), alpha=0.5)
    made = lora()
    found = rm.merge(several + 0.5 * write(made), dtype="fp32")[KEY] - rm.merge(several, dtype="fp32")[KEY]
    due = 0.5 * made[f"{ATTENTION}.lora_up.weight"] @ made[f"{ATTENTION}.lora_down.weight"]
    torch.testing.assert_close(found, due, rtol=0.0, atol=1e-5)


def test_without_a_model_a_kind_that_multiplies_one_is_refused() -> None:
    with pytest.raises(CheckError, match="this kind of adapter multiplies a model's own weights"):
        rm.plan(write(dora()) + write(lora(), "other"))


def test_weights_by_block_scale_the_blocks_of_an_adapter() -> None:
    made = lora() | lora(SECOND, SECOND_WIDTH)
    base = {key: one.float() for key, one in load_file("a.safetensors").items()}
    strength = rm.blocks(IN01=0.5) | 2.0
    found = rm.merge(rm.model("a") + strength * write(made), dtype="fp32")
    for key, name, factor in ((KEY, ATTENTION, 0.5), (SECOND_KEY, SECOND, 2.0)):
        delta = factor * made[f"{name}.lora_up.weight"] @ made[f"{name}.lora_down.weight"]
        torch.testing.assert_close(found[key] - base[key], delta, rtol=0.0, atol=1e-5)
    assert {key for key in base if not torch.equal(found[key], base[key])} == {KEY, SECOND_KEY}


def test_a_name_without_a_component_must_be_of_one_alone() -> None:
    info = TensorInfo(DType.F16, (4, 4))
    shapes = {
        f"conditioner.embedders.{place}.{rest}.weight": info
        for place, rest in (
            (0, "transformer.text_model.encoder.layers.0.mlp.fc1"),
            (1, "model.transformer.resblocks.0.mlp.c_fc"),
        )
    }
    layouts = Layouts.of(find_arch("sdxl"), shapes)
    name = "base_model.model.text_model.encoder.layers.0.mlp.fc1"
    (module,) = modules_of({f"{name}.lora_A.weight": info}).values()
    with pytest.raises(AdapterError, match=re.escape(f"{name} may be of text_encoder or text_encoder_2")) as caught:
        layouts.find(module)
    assert caught.value.hint == "put text_encoder. before its names"
    for folder in ("text_encoder", "text_encoder_2"):
        path = name.removeprefix("base_model.model.")
        (module,) = modules_of({f"{folder}.{path}.lora_A.weight": info}).values()
        found = layouts.find(module)
        assert found is not None and found.folder == folder
