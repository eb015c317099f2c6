"""What diffusers is told of models: the published numbers, and configurations whose classes have the very tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from remelt.archs.arch import find_arch  # noqa: E402
from remelt.archs.configurations import Configurations, Use, configurations  # noqa: E402
from remelt.archs.dialects import Spelling, from_original  # noqa: E402
from remelt.archs.shapes import (  # noqa: E402
    flux_shapes,
    sd1_shapes,
    sd2_shapes,
    sd3_shapes,
    sdxl_refiner_shapes,
    sdxl_shapes,
    without_prefix,
)
from remelt.core.dtype import DType  # noqa: E402
from remelt.core.tensor_info import TensorInfo  # noqa: E402

Infos = dict[str, TensorInfo]
MODELS: dict[str, tuple[str, Callable[[], Infos]]] = {
    "sd1": ("sd1", sd1_shapes),
    "sd1 inpainting": ("sd1", lambda: sd1_shapes(in_channels=9)),
    "sd2": ("sd2", sd2_shapes),
    "sdxl": ("sdxl", sdxl_shapes),
    "sdxl_refiner": ("sdxl_refiner", sdxl_refiner_shapes),
    "sd3": ("sd3", sd3_shapes),
    "sd3.5 large": ("sd3", lambda: sd3_shapes(depth=38, hidden=2432, qk_norm=True)),
    "flux": ("flux", flux_shapes),
    "flux schnell": ("flux", lambda: flux_shapes(guidance=False)),
    "flux fill": ("flux", lambda: flux_shapes(in_channels=384)),
    "narrow sd1": ("sd1", lambda: sd1_shapes(8)),
    "narrow sd2": ("sd2", lambda: sd2_shapes(16)),
    "narrow sdxl": ("sdxl", lambda: sdxl_shapes(16)),
    "narrow sdxl_refiner": ("sdxl_refiner", lambda: sdxl_refiner_shapes(16)),
    "narrow sd3": ("sd3", lambda: sd3_shapes(16)),
    "narrow flux": ("flux", lambda: flux_shapes(8)),
}


def there(arch: str, shapes: Infos) -> Infos:
    made = from_original(find_arch(arch), Spelling("diffusers"), shapes)
    assert made.unknown == []
    return {key: one.info for key, one in made.tensors.items()}


def told(found: Configurations | None) -> dict[str, dict[str, Any]]:
    assert found is not None
    return {name: json.loads(content) for name, content in found.files.items()}


def of_class(library: str, kind: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        if library == "diffusers":
            module = getattr(diffusers, kind).from_config(config)
        else:
            made = transformers.AutoConfig.for_model(**config)
            module = getattr(transformers, kind)(made)
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_class_of_every_component_has_the_tensors_of_the_model(name: str) -> None:
    arch, made = MODELS[name]
    tensors = there(arch, made())
    found = configurations(arch, "", tensors, Use())
    assert found is not None and found.untold == ()
    files = told(found)
    index = files["model_index.json"]
    parts = {part: entry for part, entry in index.items() if isinstance(entry, list) and f"{part}/config.json" in files}
    assert {key.partition("/")[0] for key in tensors} == parts.keys()
    assert found.tokenizers == tuple(part.replace("text_encoder", "tokenizer") for part in parts if "text_" in part)
    for part, (library, kind) in parts.items():
        ours = {key.partition("/")[2]: info.shape for key, info in tensors.items() if key.startswith(f"{part}/")}
        theirs = of_class(library, kind, files[f"{part}/config.json"])
        # Since version 5, transformers leaves "text_model." out, and the tied embedding of T5 is one tensor in files.
        theirs.pop("encoder.embed_tokens.weight", None)
        shorter = ({key.removeprefix("text_model."): shape for key, shape in one.items()} for one in (ours, theirs))
        assert next(shorter) == next(shorter)
    assert getattr(diffusers, index["_class_name"]) is not None


PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "sd1": {
        "unet/config.json": {
            "sample_size": 64, "block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8,
            "cross_attention_dim": 768, "norm_num_groups": 32, "layers_per_block": 2, "use_linear_projection": False,
            "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"], "transformer_layers_per_block": 1,
            "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3], "in_channels": 4, "out_channels": 4,
        },
        "vae/config.json": {"scaling_factor": 0.18215, "latent_channels": 4, "sample_size": 512, "shift_factor": None},
        "text_encoder/config.json": {
            "hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
            "num_hidden_layers": 12, "vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": 768,
        },
        "scheduler/scheduler_config.json": {"_class_name": "PNDMScheduler", "prediction_type": "epsilon"},
        "model_index.json": {"_class_name": "StableDiffusionPipeline", "tokenizer": ["transformers", "CLIPTokenizer"]},
    },
    "sd1 inpainting": {"model_index.json": {"_class_name": "StableDiffusionInpaintPipeline"}},
    "sd2": {
        "unet/config.json": {
            "sample_size": 96, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024,
            "use_linear_projection": True, "upcast_attention": True,
        },
        "text_encoder/config.json": {
            "hidden_act": "gelu", "hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 23,
        },
        "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    },
    "sdxl": {
        "unet/config.json": {
            "sample_size": 128, "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10],
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "cross_attention_dim": 2048,
            "projection_class_embeddings_input_dim": 2816, "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        },
        "vae/config.json": {"scaling_factor": 0.13025, "force_upcast": True, "sample_size": 1024},
        "text_encoder_2/config.json": {
            "hidden_act": "gelu", "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20,
            "num_hidden_layers": 32, "projection_dim": 1280, "architectures": ["CLIPTextModelWithProjection"],
        },
        "scheduler/scheduler_config.json": {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear"},
    },
    "sdxl_refiner": {
        "unet/config.json": {
            "attention_head_dim": [6, 12, 24, 24], "transformer_layers_per_block": 4, "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2560, "cross_attention_dim": 1280,
        },
        "model_index.json": {
            "_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True,
        },
    },
    "sd3": {
        "transformer/config.json": {
            "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "caption_projection_dim": 1536,
            "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 192, "qk_norm": None,
            "dual_attention_layers": [], "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16,
        },
        "vae/config.json": {"scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False},
        "text_encoder_3/config.json": {
            "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
            "relative_attention_num_buckets": 32, "feed_forward_proj": "gated-gelu",
        },
        "scheduler/scheduler_config.json": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        "model_index.json": {"tokenizer_3": ["transformers", "T5TokenizerFast"]},
    },
    "sd3.5 large": {"transformer/config.json": {"num_attention_heads": 38, "qk_norm": "rms_norm"}},
    "flux": {
        "transformer/config.json": {
            "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
            "axes_dims_rope": [16, 56, 56], "guidance_embeds": True, "in_channels": 64, "out_channels": None,
            "joint_attention_dim": 4096, "pooled_projection_dim": 768, "patch_size": 1,
        },
        "vae/config.json": {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False},
        "scheduler/scheduler_config.json": {"shift": 3.0, "use_dynamic_shifting": True, "max_shift": 1.15},
        "model_index.json": {"_class_name": "FluxPipeline"},
    },
    "flux schnell": {
        "transformer/config.json": {"guidance_embeds": False},
        "scheduler/scheduler_config.json": {"shift": 1.0, "use_dynamic_shifting": False},
    },
    "flux fill": {
        "transformer/config.json": {"in_channels": 384, "out_channels": 64},
        "model_index.json": {"_class_name": "FluxFillPipeline"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_of_full_size_is_told_as_it_is_published(name: str) -> None:
    arch, made = MODELS[name]
    files = told(configurations(arch, "", there(arch, made()), Use()))
    for file, expected in PUBLISHED[name].items():
        assert {entry: files[file].get(entry) for entry in expected} == expected


@pytest.mark.parametrize(
    ("name", "use", "scheduler", "unet"),
    [
        ("sd1", Use("v"), {"prediction_type": "v_prediction", "_class_name": "PNDMScheduler"}, {}),
        (
            "sd1",
            Use("v", markers={"ztsnr"}),
            {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            {},
        ),
        ("sd2", Use("epsilon"), {"prediction_type": "epsilon"}, {"sample_size": 64, "upcast_attention": False}),
        ("sd2", Use("v", resolution=640), {"prediction_type": "v_prediction"}, {"sample_size": 80}),
        ("sdxl", Use("v", markers={"ztsnr"}), {"_class_name": "EulerDiscreteScheduler"}, {"sample_size": 128}),
    ],
)
def test_the_scheduler_follows_what_is_told_of_a_model(
    name: str, use: Use, scheduler: dict[str, Any], unet: dict[str, Any]
) -> None:
    files = told(configurations(name, "", there(name, MODELS[name][1]()), use))
    found = files["scheduler/scheduler_config.json"]
    assert {entry: found[entry] for entry in scheduler} == scheduler
    assert {entry: files["unet/config.json"][entry] for entry in unet} == unet
    assert dict(getattr(diffusers, found["_class_name"]).from_config(found).config).items() >= scheduler.items() - {
        ("_class_name", found["_class_name"])
    }


def test_what_cannot_be_told_is_named() -> None:
    shapes = there("sdxl", sdxl_shapes(16))
    found = configurations("sdxl", "", shapes, Use(markers={"edm_mean"}))
    assert found is not None and found.untold == ("scheduler", "model_index.json")
    depth = configurations("sd2", "", there("sd2", sd2_shapes(16, in_channels=5)), Use())
    assert depth is not None and depth.untold == ("model_index.json",)
    broken = {key: info for key, info in shapes.items() if key != "unet/conv_in.weight"}
    found = configurations("sdxl", "", broken, Use())
    assert found is not None and found.untold == ("unet",)
    assert "vae/config.json" in found.files and "unet/config.json" not in found.files
    assert configurations("wan", "", {}, Use()) is None
    # As many heads as the published model has do not divide widths of 16 and 39: nothing tells how many there are.
    found = configurations("sd1", "", there("sd1", sd1_shapes(20)), Use())
    assert found is not None and found.untold == ("text_encoder",)
    found = configurations("sd1", "", there("sd1", sd1_shapes(64)), Use())
    assert found is not None and found.untold == ("unet",)


def test_a_component_alone_is_told_at_the_top() -> None:
    alone = without_prefix(there("sdxl", sdxl_shapes()), "unet/")
    found = configurations("sdxl", "unet", alone, Use())
    assert found is not None and list(found.files) == ["config.json"] and found.tokenizers == ()
    # How wide a text is told is known by the second text encoder, or else by the published one.
    assert (
        told(found)["config.json"]
        == told(configurations("sdxl", "", there("sdxl", sdxl_shapes()), Use()))["unet/config.json"]
    )


def test_a_pipeline_without_its_text_encoders_is_told_so() -> None:
    shapes = {key: info for key, info in there("flux", flux_shapes(16)).items() if not key.startswith("text_encoder")}
    index = told(configurations("flux", "", shapes, Use()))["model_index.json"]
    assert [index[part] for part in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")] == [
        [None, None]
    ] * 4
    strange = shapes | {"transformer/x_embedder.weight": TensorInfo(DType.BF16, (3,))}
    assert configurations("flux", "", strange, Use()).untold == ("transformer",)  # type: ignore[union-attr]
