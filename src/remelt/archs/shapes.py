"""Key names and shapes of real models, full size or narrowed, so that tests need neither weights nor downloads.

Every function follows a model's definition with loops; none holds a table. ``width_divisor`` narrows what makes a
model big (widths, vocabularies) and keeps what makes it what it is: names, depths, kernels, latent channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

from remelt.archs.autoencoder_parts import AUTOENCODERS
from remelt.archs.image_parts import IMAGE_MODELS
from remelt.archs.language_parts import LANGUAGE_MODELS, PARTS
from remelt.archs.model_parts import Narrow, clip, flux, llama, mmdit, openclip, t5, unet, vae
from remelt.archs.video_parts import VIDEO_MODELS
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo

TOKENS = 49408
"""CLIP's vocabulary."""


def sd1_shapes(
    width_divisor: int = 1, *, dtype: DType = DType.F32, extras: bool = False, in_channels: int = 4
) -> dict[str, TensorInfo]:
    """Stable Diffusion 1.x in the original layout: 1,130 tensors.

    ``extras`` adds what training leaves behind: noise schedules, position ids, the running average of the weights.
    ``in_channels`` 9 makes an inpainting model.
    """
    narrow = Narrow(width_divisor)
    text = "cond_stage_model.transformer.text_model."
    found = _infos(dtype, unet(narrow(320), narrow(768), linear_ends=False, in_channels=in_channels))
    found |= _infos(dtype, clip(text, 12, narrow(768), narrow(TOKENS)), vae("first_stage_model.", narrow(128), 4))
    return found | _extras(found, dtype, text + "embeddings.position_ids") if extras else found


def sd2_shapes(
    width_divisor: int = 1, *, dtype: DType = DType.F32, extras: bool = False, in_channels: int = 4
) -> dict[str, TensorInfo]:
    """Stable Diffusion 2.x in the original layout: the names of SD1's U-Net, another text encoder."""
    narrow = Narrow(width_divisor)
    found = _infos(dtype, unet(narrow(320), narrow(1024), linear_ends=True, in_channels=in_channels))
    found |= _infos(dtype, openclip("cond_stage_model.model.", 24, narrow(1024), narrow(TOKENS)))
    found |= _infos(dtype, vae("first_stage_model.", narrow(128), 4))
    return found | _extras(found, dtype) if extras else found


def sdxl_shapes(
    width_divisor: int = 1, *, dtype: DType = DType.F32, extras: bool = False, in_channels: int = 4
) -> dict[str, TensorInfo]:
    """Stable Diffusion XL in the original layout: 2,514 tensors. ``extras`` and ``in_channels`` as in `sd1_shapes`."""
    narrow = Narrow(width_divisor)
    clip_l, clip_g = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
    denoiser = unet(
        narrow(320), narrow(2048), linear_ends=True, in_channels=in_channels,
        multiples=(1, 2, 4), depths=(0, 2, 10), label=narrow(2816),
    )  # fmt: skip
    found = _infos(dtype, denoiser, clip(clip_l, 12, narrow(768), narrow(TOKENS)))
    found |= _infos(
        dtype, openclip(clip_g, 32, narrow(1280), narrow(TOKENS)), vae("first_stage_model.", narrow(128), 4)
    )
    return found | _extras(found, dtype, clip_l + "embeddings.position_ids") if extras else found


def sdxl_refiner_shapes(width_divisor: int = 1, *, dtype: DType = DType.F32) -> dict[str, TensorInfo]:
    """The refiner of Stable Diffusion XL: one text encoder, a U-Net of four levels."""
    narrow = Narrow(width_divisor)
    denoiser = unet(
        narrow(384), narrow(1280), linear_ends=True, in_channels=4,
        multiples=(1, 2, 4, 4), depths=(0, 4, 4, 0), middle_depth=4, label=narrow(2560),
    )  # fmt: skip
    clip_g = openclip("conditioner.embedders.0.model.", 32, narrow(1280), narrow(TOKENS))
    return _infos(dtype, denoiser, clip_g, vae("first_stage_model.", narrow(128), 4))


def sd3_shapes(
    width_divisor: int = 1, *, dtype: DType = DType.F32, depth: int = 24, hidden: int = 1536, qk_norm: bool = False
) -> dict[str, TensorInfo]:
    """Stable Diffusion 3 medium with its three text encoders: 1,672 tensors.

    SD 3.5 large has ``depth`` 38, ``hidden`` 2432 and ``qk_norm``.
    """
    narrow = Narrow(width_divisor)
    text = "text_encoders."
    return _infos(
        dtype,
        mmdit("model.diffusion_model.", depth, narrow(hidden), narrow, qk_norm),
        [("model.model_sampling.sigmas", (1000,))],
        *(
            [(f"{text}{name}.logit_scale", ()), (f"{text}{name}.transformer.text_projection.weight", (width, width))]
            for name, width in (("clip_l", narrow(768)), ("clip_g", narrow(1280)))
        ),
        clip(f"{text}clip_l.transformer.text_model.", 12, narrow(768), narrow(TOKENS)),
        clip(f"{text}clip_g.transformer.text_model.", 32, narrow(1280), narrow(TOKENS)),
        [(f"{text}t5xxl.logit_scale", ())],
        t5(f"{text}t5xxl.transformer.", narrow),
        vae("first_stage_model.", narrow(128), 16),
    )


def flux_shapes(
    width_divisor: int = 1, *, dtype: DType = DType.BF16, in_channels: int = 64, guidance: bool = True
) -> dict[str, TensorInfo]:
    """Flux.1 with its two text encoders and VAE: 1,439 tensors. Without ``guidance`` it is the schnell model."""
    narrow = Narrow(width_divisor)
    return _infos(
        dtype,
        flux("model.diffusion_model.", narrow, in_channels, guidance),
        clip("text_encoders.clip_l.transformer.text_model.", 12, narrow(768), narrow(TOKENS)),
        t5("text_encoders.t5xxl.transformer.", narrow),
        vae("vae.", narrow(128), 16),
    )


def image_shapes(
    arch: str, width_divisor: int = 1, *, dtype: DType = DType.BF16, **options: object
) -> dict[str, TensorInfo]:
    """The transformer of one of `IMAGE_MODELS`, as its files hold it: nothing else. ``options`` are those of its maker.

    >>> len(image_shapes("chroma"))
    643
    """
    return _infos(dtype, IMAGE_MODELS[arch](Narrow(width_divisor), **options))


def llama_shapes(
    layers: int = 4,
    hidden: int = 64,
    *,
    heads: int = 4,
    key_heads: int = 2,
    intermediate: int = 128,
    vocabulary: int = 256,
    tied: bool = False,
    dtype: DType = DType.BF16,
) -> dict[str, TensorInfo]:
    """A Llama, as transformers names it; ``tied`` leaves out the output head."""
    head = hidden // heads
    return _infos(dtype, llama(layers, hidden, heads * head, key_heads * head, intermediate, vocabulary, tied))


def other_shapes(arch: str, width_divisor: int = 1, *, dtype: DType = DType.BF16) -> dict[str, TensorInfo]:
    """A model of videos or language, or a part that is a file of its own, as its files hold it: nothing else.

    >>> len(other_shapes("llama", 64))
    291
    """
    return _infos(dtype, _OTHERS[arch](Narrow(width_divisor)))


_OTHERS = {**LANGUAGE_MODELS, **VIDEO_MODELS, **AUTOENCODERS, **PARTS}


def shapes_of(arch: str) -> dict[str, TensorInfo] | None:
    """The full-size model of a named arch; None for an arch that has no shapes here, as a third party's.

    >>> len(shapes_of("sd1"))
    1130
    """
    makers: dict[str, Callable[[], dict[str, TensorInfo]]] = {
        **{name: functools.partial(image_shapes, name) for name in IMAGE_MODELS},
        **{name: functools.partial(other_shapes, name) for name in _OTHERS},
        "sd1": sd1_shapes,
        "sd2": sd2_shapes,
        "sdxl": sdxl_shapes,
        "sdxl_refiner": sdxl_refiner_shapes,
        "sd3": sd3_shapes,
        "flux": flux_shapes,
    }
    return makers[arch]() if arch in makers else None


def without_prefix(shapes: dict[str, TensorInfo], prefix: str) -> dict[str, TensorInfo]:
    """The tensors under a prefix, without it: how a file of one component alone spells them."""
    return {key.removeprefix(prefix): info for key, info in shapes.items() if key.startswith(prefix)}


def _infos(dtype: DType, *parts: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    return {key: TensorInfo(dtype, shape) for part in parts for key, shape in part}


def _extras(model: dict[str, TensorInfo], dtype: DType, *position_ids: str) -> dict[str, TensorInfo]:
    schedules = [
        "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
        "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
    ]  # fmt: skip
    found = {name: TensorInfo(DType.F32, (1000,)) for name in schedules}
    found |= {name: TensorInfo(DType.I64, (1, 77)) for name in position_ids}
    found |= {"model_ema.decay": TensorInfo(DType.F32, ()), "model_ema.num_updates": TensorInfo(DType.I32, ())}
    for key, info in model.items():
        if key.startswith("model.diffusion_model."):
            found["model_ema." + key.removeprefix("model.").replace(".", "")] = TensorInfo(dtype, info.shape)
    return found
