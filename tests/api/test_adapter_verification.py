"""Whether adapters landed: found out tensor by tensor, in any layout, by what rounding allows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import remelt as rm
from remelt.archs.shapes import sd1_shapes
from remelt.errors import AdapterError, OptionError

UNET = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0"
TEXT = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1"
MODULES = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": f"{UNET}.attn1.to_q.weight",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": f"{UNET}.attn2.to_k.weight",
    "lora_te_text_model_encoder_layers_0_mlp_fc1": f"{TEXT}.weight",
}


def lora(base: dict[str, Tensor], seed: int, modules: dict[str, str] = MODULES) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    found = {}
    for name, key in modules.items():
        rows, columns = base[key].shape
        found[f"{name}.lora_up.weight"] = torch.randn(rows, 4, generator=drawn)
        found[f"{name}.lora_down.weight"] = torch.randn(4, columns, generator=drawn) * 0.1
        found[f"{name}.alpha"] = torch.tensor(2.0)
    return found


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """A folder with a small model of SD1, ``base``, and two adapters of it, ``style`` and ``subject``."""
    drawn = torch.Generator().manual_seed(0)
    base = {key: torch.randn(info.shape, generator=drawn) for key, info in sd1_shapes(32).items()}
    save_file({key: tensor.half() for key, tensor in base.items()}, tmp_path / "base.safetensors")
    save_file(lora(base, 1), tmp_path / "style.safetensors")
    save_file(lora(base, 2, dict(list(MODULES.items())[1:])), tmp_path / "subject.safetensors")
    monkeypatch.chdir(tmp_path)
    return base


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_each_tensor_shows_the_strength_that_the_adapter_was_added_by(here: dict[str, Tensor], dtype: str) -> None:
    rm.merge(rm.model("base") + 0.8 * rm.adapter("style"), "out.safetensors", dtype=dtype)
    found = rm.verify_adapters("out", ["style"], "base", strengths=[0.8])
    assert not found.faults
    assert sorted(one.key for one in found.landings) == sorted(MODULES.values())
    assert all(abs(one.strengths[0] - 0.8) < 0.02 for one in found.landings)
    wrong = rm.verify_adapters("out", ["style"], "base", strengths=[0.5])
    assert len(wrong.faults) == len(MODULES)
    assert re.search(r": style is there by 0\.(8|79)\d*, stated 0\.5$", wrong.faults[0])


def test_a_tensor_that_was_skipped_is_found_out_without_a_stated_strength(here: dict[str, Tensor]) -> None:
    rm.merge(rm.model("base") + 0.8 * rm.adapter("style"), "out.safetensors")
    tensors = load_file("out.safetensors")
    tensors[f"{UNET}.attn1.to_q.weight"] = here[f"{UNET}.attn1.to_q.weight"].half()  # as a tool that lost it would
    save_file(tensors, "broken.safetensors")
    found = rm.verify_adapters("broken", ["style"], "base")
    assert any(f"{UNET}.attn1.to_q.weight: style is there by 0, of all 0." in fault for fault in found.faults)


def test_several_adapters_are_told_apart(here: dict[str, Tensor]) -> None:
    recipe = rm.model("base") + 0.8 * rm.adapter("style") - 0.3 * rm.adapter("subject")
    rm.merge(recipe, "out.safetensors", dtype="fp32")
    found = rm.verify_adapters("out", ["style", "subject"], "base", strengths=[0.8, -0.3])
    assert not found.faults
    assert found.adapters == ("style", "subject")
    assert found.strengths == pytest.approx((0.8, -0.3), abs=1e-3)


def test_a_merge_in_another_layout_is_verified_as_well(here: dict[str, Tensor]) -> None:
    rm.merge(rm.model("base") + 0.5 * rm.adapter("style"), "out", dialect="diffusers")
    assert not rm.verify_adapters("out", ["style"], "base", strengths=[0.5]).faults


def test_what_is_no_adapter_or_of_another_model_is_refused(here: dict[str, Tensor]) -> None:
    with pytest.raises(AdapterError, match="base is no adapter: its tensors are those of a model"):
        rm.verify_adapters("base", ["base"], "base")
    with pytest.raises(OptionError, match="there are 1 adapters, but 2 strengths"):
        rm.verify_adapters("base", ["style"], "base", strengths=[1.0, 2.0])
    tensors = load_file("style.safetensors")
    save_file({f"lora_unet_nowhere{key[9:]}": tensor for key, tensor in tensors.items()}, "strange.safetensors")
    with pytest.raises(AdapterError, match=r"strange: 3 of its 3 modules are none of the model's"):
        rm.verify_adapters("base", ["strange"], "base")


def test_what_was_left_out_of_a_merge_may_be_left_out_of_its_verification(here: dict[str, Tensor]) -> None:
    strange = {
        f"lora_unet_nowhere.{key.partition('.')[2]}": one for key, one in load_file("subject.safetensors").items()
    }
    save_file(load_file("style.safetensors") | strange, "more.safetensors")
    rm.merge(rm.model("base") + 0.8 * rm.adapter("more"), "out.safetensors", ignore_unused=True)
    with pytest.raises(AdapterError, match="more: 1 of its 4 modules are none of the model's") as caught:
        rm.verify_adapters("out", ["more"], "base", strengths=[0.8])
    assert caught.value.hint == "--ignore-unused leaves them out"
    assert not rm.verify_adapters("out", ["more"], "base", strengths=[0.8], ignore_unused=True).faults


def test_a_merge_that_lacks_the_tensor_says_so(here: dict[str, Tensor]) -> None:
    tensors = load_file("base.safetensors")
    del tensors[f"{TEXT}.weight"]
    save_file(tensors, "lacking.safetensors")
    faults = rm.verify_adapters("lacking", ["style"], "base", strengths=[0.0]).faults
    assert faults == [f"{TEXT}.weight: an adapter changes it, but the merge has no such tensor"]
