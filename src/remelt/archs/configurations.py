"""The small files that diffusers asks for beside the weights of a pipeline, made of the shapes of its tensors.

Tokenizers are no part of a checkpoint: pipelines are told their classes, and where they are missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from remelt.archs.component_configurations import (
    Configuration,
    Shapes,
    autoencoder,
    clip,
    flux_transformer,
    sd3_transformer,
    sized_unet,
    t5,
    unet,
)
from remelt.core.tensor_info import TensorInfo

_DIFFUSERS, _TRANSFORMERS = "diffusers", "transformers"
_VERSION = "0.31.0"
"""The version of diffusers that knows all that is told here."""


@dataclass(frozen=True)
class Use:
    """What a component's weights do not tell: whether it predicts velocity ("v"), the width of its images, its markers.

    ``pooled`` is the width of a whole text as its second encoder has it.
    """

    prediction: str = ""
    resolution: int = 0
    markers: Collection[str] = ()
    pooled: int = 0

    @property
    def zero_snr(self) -> bool:
        """Whether the noise of its last step hides the image wholly."""
        return "ztsnr" in self.markers


Make = Callable[[Shapes, Use], Configuration]


@dataclass(frozen=True)
class Part:
    """A component of a pipeline: its class, and how it is configured; ``word`` is the class of a tokenizer it needs."""

    library: str
    kind: str
    make: Make
    word: str = ""


@dataclass(frozen=True)
class Pipeline:
    """A class of diffusers: its parts by folder, its scheduler, and what it is told beside.

    ``others`` are classes of models with another number of input channels, by that number; None where there is none for
    them.
    """

    kind: str
    parts: Mapping[str, Part]
    schedule: Callable[[Shapes, Use], Configuration | None]
    told: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[int, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Configurations:
    """The files by their names, the folders of tokenizers that are missing, and components that cannot be told."""

    files: Mapping[str, bytes]
    tokenizers: tuple[str, ...]
    untold: tuple[str, ...]


def configurations(arch: str, alone: str, tensors: Mapping[str, TensorInfo], use: Use) -> Configurations | None:
    """What diffusers must be told of a model of an arch in its layout; None for an arch of which that is not known.

    ``alone`` is the folder that a component alone would be in, whose keys then have none.

    >>> found = configurations("sd1", "vae", {}, Use())
    >>> found.untold
    ('vae',)
    """
    pipeline = _PIPELINES.get(arch)
    if pipeline is None or (alone and alone not in pipeline.parts):
        return None
    shapes = {folder: _inside(tensors, folder, alone) for folder in pipeline.parts}
    pooled = shapes.get("text_encoder_2", {}).get("text_projection.weight", (0,))[0]
    use = replace(use, pooled=pooled)
    held = [folder for folder in pipeline.parts if shapes[folder]]
    made = {folder: _made(pipeline.parts[folder], Shapes(shapes[folder]), use) for folder in held or [alone]}
    files = {(f"{folder}/config.json" if not alone else "config.json"): made[folder] for folder in made if made[folder]}
    untold = [folder for folder in made if made[folder] is None]
    tokenizers = [_tokenizer(folder) for folder in held if pipeline.parts[folder].word and not alone]
    if not alone:
        denoiser = Shapes(shapes[held[0]]) if held else Shapes({})
        schedule = pipeline.schedule(denoiser, use)
        index = _index(pipeline, denoiser, held, schedule)
        untold += [] if schedule is not None else ["scheduler"]
        untold += [] if index is not None else ["model_index.json"]
        files |= {"scheduler/scheduler_config.json": schedule} if schedule is not None else {}
        files |= {"model_index.json": index} if index is not None else {}
    return Configurations({name: _json(found) for name, found in files.items()}, tuple(tokenizers), tuple(untold))


def _inside(tensors: Mapping[str, TensorInfo], folder: str, alone: str) -> dict[str, tuple[int, ...]]:
    start = "" if folder == alone else f"{folder}/"
    if alone and start:
        return {}
    return {key[len(start) :]: info.shape for key, info in tensors.items() if key.startswith(start)}


def _made(part: Part, shapes: Shapes, use: Use) -> Configuration | None:
    try:
        return part.make(shapes, use)
    except (LookupError, ZeroDivisionError, StopIteration):  # it is of another make
        return None


def _index(
    pipeline: Pipeline, denoiser: Shapes, held: Collection[str], schedule: Configuration | None
) -> Configuration | None:
    """What tells a pipeline's parts; None for a model that no pipeline takes."""
    first = next((name for name in ("conv_in.weight", "x_embedder.weight") if denoiser.has(name)), "")
    channels = denoiser.size(first, 1) if first and denoiser.rank(first) > 1 else 0
    kind = pipeline.others.get(channels, pipeline.kind)
    if kind is None or schedule is None or denoiser.has("class_embedding"):
        return None
    found: Configuration = {"_class_name": kind, "_diffusers_version": _VERSION, **pipeline.told}
    found["scheduler"] = [_DIFFUSERS, schedule["_class_name"]]
    for folder, part in pipeline.parts.items():
        found[folder] = [part.library, part.kind] if folder in held else [None, None]
        if part.word:
            found[_tokenizer(folder)] = [_TRANSFORMERS, part.word] if folder in held else [None, None]
    return found


def _tokenizer(folder: str) -> str:
    return folder.replace("text_encoder", "tokenizer")


def _json(found: Configuration | None) -> bytes:
    return (json.dumps(found, indent=2, sort_keys=True) + "\n").encode()


_NOISE = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}


def _diffusion(shapes: Shapes, use: Use, kind: str, default: str, **more: Any) -> Configuration | None:
    """A schedule of noise; None where the markers say that another one was learned."""
    if any(marker.startswith("edm_") for marker in use.markers):
        return None
    prediction = "v_prediction" if (use.prediction or default) in ("v", "v_prediction") else "epsilon"
    found = {"_class_name": kind, **_NOISE, "prediction_type": prediction, **more}
    if use.zero_snr:
        kind = "DDIMScheduler" if kind == "PNDMScheduler" else kind
        found |= {"_class_name": kind, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        found.pop("skip_prk_steps", None)
    return found


def _flow(shift: float, shapes: Shapes, use: Use) -> Configuration:
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": shift}


def _guided_flow(shapes: Shapes, use: Use) -> Configuration:
    """Flux's schedule: a model with guidance shifts it by the size of the image, the few-step one does not."""
    guided = shapes.has("time_text_embed.guidance_embedder")
    return {
        **_flow(3.0 if guided else 1.0, shapes, use),
        "use_dynamic_shifting": guided,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    }


def _latents(use: Use, usual: int) -> int:
    return (use.resolution or usual) // 8


def _vae(sample: int, scale: float, shift: float | None = None) -> Part:
    return Part(_DIFFUSERS, "AutoencoderKL", lambda shapes, use: autoencoder(shapes, sample, scale, shift))


def _clip(kind: str, heads: int, activation: str = "quick_gelu") -> Part:
    return Part(_TRANSFORMERS, kind, lambda shapes, use: clip(shapes, heads, activation), "CLIPTokenizer")


def _sd1(shapes: Shapes, use: Use) -> Configuration:
    return unet(shapes, _latents(use, 512), 8)


def _sd2(shapes: Shapes, use: Use) -> Configuration:
    velocity = use.prediction in ("", "v", "v_prediction")
    return unet(shapes, _latents(use, 768 if velocity else 512), None, upcast=velocity)


def _sdxl(numbers: int, heads: int, shapes: Shapes, use: Use) -> Configuration:
    pooled = use.pooled or shapes.size("add_embedding.linear_1.weight", 1) * 1280 // (1280 + numbers * 256)
    return sized_unet(shapes, _latents(use, 1024), heads, pooled, numbers)


def _sd3(shapes: Shapes, use: Use) -> Configuration:
    return sd3_transformer(shapes, _latents(use, 1024))


_UNET = "UNet2DConditionModel"
_T5 = Part(_TRANSFORMERS, "T5EncoderModel", lambda shapes, use: t5(shapes), "T5TokenizerFast")
_PLAIN, _PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"
_EULER: dict[str, Any] = {"interpolation_type": "linear", "timestep_spacing": "leading", "use_karras_sigmas": False}
_SD1 = Pipeline(
    "StableDiffusionPipeline",
    {
        "unet": Part(_DIFFUSERS, _UNET, _sd1),
        "vae": _vae(512, 0.18215),
        "text_encoder": _clip(_PLAIN, 12),
    },
    partial(_diffusion, kind="PNDMScheduler", default="epsilon", set_alpha_to_one=False, skip_prk_steps=True),
    told={"requires_safety_checker": False},
    others={9: "StableDiffusionInpaintPipeline", 8: "StableDiffusionInstructPix2PixPipeline"},
)
_SDXL = Pipeline(
    "StableDiffusionXLPipeline",
    {
        "unet": Part(_DIFFUSERS, _UNET, partial(_sdxl, 6, 5)),
        "vae": _vae(1024, 0.13025),
        "text_encoder": _clip(_PLAIN, 12),
        "text_encoder_2": _clip(_PROJECTED, 20, "gelu"),
    },
    partial(_diffusion, kind="EulerDiscreteScheduler", default="epsilon", **_EULER),
    told={"force_zeros_for_empty_prompt": True},
    others={9: "StableDiffusionXLInpaintPipeline", 8: "StableDiffusionXLInstructPix2PixPipeline"},
)
_PIPELINES: Mapping[str, Pipeline] = MappingProxyType(
    {
        "sd1": _SD1,
        "sd2": replace(
            _SD1,
            parts={
                "unet": Part(_DIFFUSERS, _UNET, _sd2),
                "vae": _vae(768, 0.18215),
                "text_encoder": _clip(_PLAIN, 16, "gelu"),
            },
            schedule=partial(_diffusion, kind="DDIMScheduler", default="v", set_alpha_to_one=False),
            others={9: "StableDiffusionInpaintPipeline", 8: "StableDiffusionInstructPix2PixPipeline", 5: None},
        ),
        "sdxl": _SDXL,
        "sdxl_refiner": replace(
            _SDXL,
            kind="StableDiffusionXLImg2ImgPipeline",
            parts={
                "unet": Part(_DIFFUSERS, _UNET, partial(_sdxl, 5, 6)),
                "vae": _vae(1024, 0.13025),
                "text_encoder_2": _clip(_PROJECTED, 20, "gelu"),
            },
            told={"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
            others={},
        ),
        "sd3": Pipeline(
            "StableDiffusion3Pipeline",
            {
                "transformer": Part(
                    _DIFFUSERS,
                    "SD3Transformer2DModel",
                    lambda shapes, use: sd3_transformer(shapes, _latents(use, 1024)),
                ),
                "vae": _vae(1024, 1.5305, 0.0609),
                "text_encoder": _clip(_PROJECTED, 12),
                "text_encoder_2": _clip(_PROJECTED, 20, "gelu"),
                "text_encoder_3": _T5,
            },
            partial(_flow, 3.0),
        ),
        "flux": Pipeline(
            "FluxPipeline",
            {
                "transformer": Part(_DIFFUSERS, "FluxTransformer2DModel", lambda shapes, use: flux_transformer(shapes)),
                "vae": _vae(1024, 0.3611, 0.1159),
                "text_encoder": _clip(_PLAIN, 12),
                "text_encoder_2": _T5,
            },
            _guided_flow,
            others={384: "FluxFillPipeline", 128: "FluxControlPipeline"},
        ),
    }
)
"""Of each arch what diffusers runs it with."""
