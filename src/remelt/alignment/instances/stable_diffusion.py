"""Stable Diffusion: texts, a latent, a time step and an image go in; what the U-Net, the encoder and the decoder make
of them comes out. The structure is that of the real models; widths, depths of transformers and vocabularies are small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from remelt.alignment.instances.instance import Instance, instance_of, missing
from remelt.archs.arch import find_arch
from remelt.archs.axes.heads import HeadRule
from remelt.archs.dialects import Spelling, from_original, to_original, usual_key
from remelt.core.pieces import Converted
from remelt.core.tensor_info import TensorInfo

_DIFFUSERS = Spelling("diffusers")
_WORDS, _POSITIONS, _LATENT, _SIZES, _SIZE = 32, 77, 4, 6, 8
"""Words of the vocabulary, positions as in the real models, latent channels; how many sizes are embedded, how wide."""
_HEAD = 8
"""Channels of a head, where their number is not eight."""
_MULTIPLES = (1, 2, 2, 2)
"""The widths of the levels, in those of the first; the real models have 1, 2, 4 and 4."""
_CROSS, _PLAIN = "CrossAttn", ""


class Pipeline(nn.Module):
    """The parts of a pipeline under the names of their folders, run one after another."""

    unet: Any
    vae: Any

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.texts = tuple(name for name in parts if name.startswith("text"))
        self.is_told_sizes = getattr(self.unet.config, "addition_embed_type", None) == "text_time"

    def forward(
        self, words: Tensor, latent: Tensor, time: Tensor, sizes: Tensor, image: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The noise in a latent, the moments of an image's latents, and the image of a latent."""
        read = [self.get_submodule(name)(input_ids=words) for name in self.texts]
        # The real models take some contexts from the last layer but one. Here all layers count, so that a fault shows.
        context = torch.cat([one.last_hidden_state for one in read], dim=-1)
        told = {"text_embeds": read[-1].text_embeds, "time_ids": sizes} if self.is_told_sizes else None
        (noise,) = self.unet(latent, time, context, added_cond_kwargs=told, return_dict=False)
        return noise, *_coded(self.vae, image, latent)


class Autoencoder(nn.Module):
    """An autoencoder alone, run both ways."""

    autoencoder: Any

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, image: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """The moments of an image's latents, and the image of a latent."""
        return _coded(self.autoencoder, image, latent)


def _coded(vae: Any, image: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
    moments = vae.encoder(image)
    (picture,) = vae.decode(latent[:, :, :2, :2], return_dict=False)
    return moments if vae.quant_conv is None else vae.quant_conv(moments), picture


def sd1_instance(width: int = 64, seed: int = 0, multiples: Sequence[int] = _MULTIPLES) -> Instance:
    """Stable Diffusion 1. ``width`` is a multiple of 32, the levels of U-Net and VAE are ``multiples`` of it.

    Of 32 channels a GroupNorm would have groups of one, and hide what is added to a whole channel, as the time is.
    """
    parts = {"text_encoder": _text(width, "quick_gelu"), "unet": _unet(multiples, width, width)}
    return _instance("sd1", {**parts, "vae": _vae(width, multiples)}, seed)


def sd2_instance(width: int = 64, seed: int = 0, multiples: Sequence[int] = _MULTIPLES) -> Instance:
    """Stable Diffusion 2, of the same widths."""
    unet = _unet(multiples, width, width, head=_HEAD, use_linear_projection=True)
    return _instance("sd2", {"text_encoder": _text(width, "gelu"), "unet": unet, "vae": _vae(width, multiples)}, seed)


def sdxl_instance(width: int = 64, seed: int = 0, multiples: Sequence[int] = _MULTIPLES) -> Instance:
    """Stable Diffusion XL, of the same widths; its U-Net has three levels, its second text encoder is the wider one."""
    second = width + width // 2
    unet = _unet(multiples[:3], width, width + second, head=_HEAD, depths=(0, 1, 2), pooled=second)
    texts = {"text_encoder": _text(width, "quick_gelu"), "text_encoder_2": _text(second, "gelu", pooled=True)}
    return _instance("sdxl", {**texts, "unet": unet, "vae": _vae(width, multiples)}, seed)


def sdxl_refiner_instance(width: int = 64, seed: int = 0, multiples: Sequence[int] = _MULTIPLES) -> Instance:
    """The refiner of Stable Diffusion XL, of the same widths."""
    unet = _unet(multiples, width, width, head=_HEAD, depths=(0, 1, 1, 0), pooled=width)
    text = _text(width, "gelu", pooled=True)
    return _instance("sdxl_refiner", {"text_encoder_2": text, "unet": unet, "vae": _vae(width, multiples)}, seed)


def vae_instance(width: int = 64, seed: int = 0, multiples: Sequence[int] = _MULTIPLES) -> Instance:
    """An autoencoder alone, with latents of sixteen channels that nothing mixes once more, as SD3 and Flux have it."""
    vae = _vae(width, multiples, latent=16, use_quant_conv=False, use_post_quant_conv=False)
    return _instance("vae", {"autoencoder": vae}, seed)


def _instance(name: str, parts: Mapping[str, nn.Module], seed: int) -> Instance:
    arch, module = find_arch(name), Pipeline(parts) if "unet" in parts else Autoencoder(parts["autoencoder"])
    names = {usual_key(arch, _DIFFUSERS, _in_folder(one)): one for one in module.state_dict()}

    def originals(infos: Mapping[str, TensorInfo]) -> dict[str, Converted]:
        found = to_original(arch, _DIFFUSERS, {_in_folder(one): info for one, info in infos.items()})
        back = {_in_folder(one): one for one in infos}
        return {key: _renamed(made, back) for key, made in found.tensors.items()}

    def parameters(infos: Mapping[str, TensorInfo]) -> dict[str, Converted]:
        return {names[key]: made for key, made in from_original(arch, _DIFFUSERS, infos).tensors.items()}

    eight = HeadRule(count=8) if name == "sd1" else HeadRule(size=_HEAD)
    heads = {"unet": eight, "text": HeadRule(size=_HEAD), "text_2": HeadRule(size=_HEAD)}
    inputs = _inputs(seed) if "unet" in parts else _images(seed, 16)
    return instance_of(name, module, inputs, heads, seed=seed, originals=originals, parameters=parameters)


def _in_folder(name: str) -> str:
    return name.replace(".", "/", 1)


def _renamed(made: Converted, names: Mapping[str, str]) -> Converted:
    return replace(made, pieces=tuple(replace(piece, key=names[piece.key]) for piece in made.pieces))


def _inputs(seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed + 1)
    words = torch.randint(1, _WORDS - 1, (2, 7), generator=generator)
    words[:, -1] = _WORDS - 1  # the end of the text, from which it is pooled
    sizes = torch.randint(1, 100, (2, _SIZES), generator=generator)
    image, latent = _images(seed, _LATENT)
    return words, latent, torch.tensor([17, 641]), sizes, image


def _images(seed: int, channels: int) -> tuple[Tensor, Tensor]:
    """Images, and latents of so many channels: at the lowest level they have two places that attention chooses from."""
    generator = torch.Generator().manual_seed(seed + 2)
    image = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    return image, torch.randn(2, channels, 8, 16, generator=generator, dtype=torch.float64)


def _text(width: int, activation: str, *, pooled: bool = False) -> nn.Module:
    try:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    except ModuleNotFoundError as error:
        raise missing(error) from error
    config = CLIPTextConfig(
        vocab_size=_WORDS, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
        num_attention_heads=width // _HEAD, max_position_embeddings=_POSITIONS, projection_dim=width,
        hidden_act=activation, bos_token_id=0, eos_token_id=_WORDS - 1, pad_token_id=0,
    )  # fmt: skip
    made: nn.Module = (CLIPTextModelWithProjection if pooled else CLIPTextModel)(config)
    return made


def _unet(
    multiples: Sequence[int],
    width: int,
    context: int,
    *,
    head: int = 0,
    depths: Sequence[int] = (1, 1, 1, 0),
    pooled: int = 0,
    **options: Any,
) -> nn.Module:
    """A U-Net of so many levels; eight heads, or heads of ``head`` channels; with ``pooled`` it is told sizes, too."""
    try:
        from diffusers import UNet2DConditionModel
    except ModuleNotFoundError as error:
        raise missing(error) from error
    widths = [width * multiple for multiple in multiples]
    kinds = [_CROSS if depth else _PLAIN for depth in depths]
    if pooled:
        options |= {
            "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": _SIZE,
            "projection_class_embeddings_input_dim": pooled + _SIZES * _SIZE,
            "transformer_layers_per_block": [max(depth, 1) for depth in depths],
        }  # fmt: skip
    made: nn.Module = UNet2DConditionModel(
        sample_size=8, in_channels=_LATENT, out_channels=_LATENT, layers_per_block=2, block_out_channels=widths,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        cross_attention_dim=context, attention_head_dim=[one // head for one in widths] if head else 8, **options,
    )  # fmt: skip
    return made


def _vae(width: int, multiples: Sequence[int], latent: int = _LATENT, **options: Any) -> nn.Module:
    try:
        from diffusers import AutoencoderKL
    except ModuleNotFoundError as error:
        raise missing(error) from error
    made: nn.Module = AutoencoderKL(
        block_out_channels=[width * multiple for multiple in multiples], layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=latent, norm_num_groups=32, **options,
    )  # fmt: skip
    return made
