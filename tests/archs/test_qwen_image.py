"""Qwen-Image whole: a folder of its three parts and a single file of them are converted into each other and load."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_models import unlike
from safetensors.torch import load_file
from torch import Tensor

import remelt as rm
from remelt.archs.detect import detect
from remelt.archs.dialects import IN_FULL, Spelling
from remelt.archs.facts import layout
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TEXT = "text_encoders.qwen25_7b.transformer."


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="diffusers")


def made_parts() -> dict[str, Any]:
    """A small Qwen-Image as diffusers and transformers build it."""
    torch.manual_seed(0)
    words = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }  # fmt: skip
    images = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen2_5_VLConfig(
        text_config=words, vision_config=images, image_token_id=3, video_token_id=4, vision_start_token_id=5
    )
    return {
        "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(config),
        "transformer": diffusers.QwenImageTransformer2DModel(
            num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6)
        ),
        "vae": diffusers.AutoencoderKLQwenImage(base_dim=4, z_dim=16),
    }


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {
        f"{path.parent.name}/{key}": tensor
        for path in sorted(folder.glob("*/*.safetensors"))
        for key, tensor in load_file(path).items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model as a folder."""
    where = tmp_path_factory.mktemp("qwen")
    for name, part in made_parts().items():
        part.save_pretrained(where / name)
    (where / "model_index.json").write_text("{}")
    return where


def headers(tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    return {key: TensorInfo(DType.F32, tuple(tensor.shape)) for key, tensor in tensors.items()}


def test_a_folder_becomes_a_single_file_with_all_its_parts(folder: Path, tmp_path: Path) -> None:
    single = load_file(rm.convert(folder, tmp_path / "single.safetensors", to="original"))
    assert len(single) == len(tensors_in(folder))
    found = detect(headers(single))
    assert found.arch is not None
    assert (found.arch.name, found.problem, found.spelling) == ("qwen_image", None, IN_FULL)
    described = layout(list(single), found.arch)
    assert set(described.components) == {"transformer", "qwen25_7b", "vae"}
    assert {"transformer_blocks.1", "qwen25_7b.1", "visual.0"} <= set(described.blocks)
    assert described.blocks["qwen25_7b.1"][0].startswith(f"{TEXT}model.layers.1.")
    assert {f"{TEXT}model.embed_tokens.weight", f"{TEXT}visual.blocks.0.attn.qkv.weight"} < single.keys()
    assert {f"{TEXT}lm_head.weight", "vae.encoder.downsamples.0.residual.2.weight"} < single.keys()


def test_there_and_back_the_parts_load_and_are_the_same(folder: Path, tmp_path: Path) -> None:
    single = rm.convert(folder, tmp_path / "single.safetensors", to="original")
    there = rm.convert(single, tmp_path / "there", to="diffusers", like=folder)
    assert unlike(tensors_in(there), tensors_in(folder)) == []
    for name, part in made_parts().items():
        kind = type(part)
        model, report = kind.from_pretrained(there / name, output_loading_info=True)
        assert {what: keys for what, keys in report.items() if keys} == {}
        assert unlike(model.state_dict(), part.state_dict()) == []


@pytest.mark.parametrize("words", ["model.", "model.language_model."])
def test_both_layouts_of_transformers_are_read(folder: Path, words: str) -> None:
    tensors = tensors_in(folder)
    renamed = {}
    for key, tensor in tensors.items():
        place, _, rest = key.partition("text_encoder/")
        rest = rest.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        if words != "model.":
            rest = rest.replace("model.", words) if rest.startswith("model.") else rest
            rest = f"model.{rest}" if rest.startswith("visual.") else rest
        renamed[key if not rest else f"{place}text_encoder/{rest}"] = tensor
    assert detect(headers(renamed)).spelling == Spelling("diffusers")
    assert unlike(rm.convert(renamed, to="original"), rm.convert(tensors, to="original")) == []
