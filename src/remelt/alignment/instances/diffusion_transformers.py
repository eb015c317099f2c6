"""SD3, SD3.5, Flux.1 and Chroma: texts, a latent and a time step go in, what the transformer makes of them comes out.

The structure is that of the real models, text encoders included; widths, depths and vocabularies are small. Their VAE
is Stable Diffusion's with other latents.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from remelt.alignment.instances.instance import Instance, instance_of, missing
from remelt.alignment.instances.layouts import of_pipeline
from remelt.alignment.instances.precision import InDouble
from remelt.archs.axes.heads import HeadRule

_WORDS, _POSITIONS, _LATENT, _LENGTH = 32, 77, 16, 7
_HEAD = 8
"""Channels of a head, everywhere."""


class _Told(nn.Module):
    """The parts of a pipeline under the names of their folders."""

    transformer: nn.Module
    text_encoder: nn.Module
    text_encoder_2: nn.Module
    text_encoder_3: nn.Module

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class StableDiffusion3(_Told):
    """Two CLIPs and T5 are read by the transformer: tokens of the CLIPs side by side, then those of T5."""

    def forward(self, words: Tensor, latent: Tensor, time: Tensor) -> Tensor:
        with InDouble():
            small, large = self.text_encoder(words), self.text_encoder_2(words)
            own = self.text_encoder_3(words).last_hidden_state
            both = torch.cat([small.last_hidden_state, large.last_hidden_state], dim=-1)
            both = nn.functional.pad(both, (0, own.shape[-1] - both.shape[-1]))
            context = torch.cat([both, own], dim=1)
            pooled = torch.cat([small.text_embeds, large.text_embeds], dim=-1)
            found: Tensor = self.transformer(latent, context, pooled, time, return_dict=False)[0]
        return found


class Flux(_Told):
    """T5's tokens are read by the transformer, and CLIP's last one, where there is a CLIP."""

    def forward(self, words: Tensor, latent: Tensor, time: Tensor, places: Tensor, order: Tensor) -> Tensor:
        with InDouble():
            context = self.text_encoder_2(words).last_hidden_state
            told = {"encoder_hidden_states": context, "timestep": time, "img_ids": places, "txt_ids": order}
            if hasattr(self, "text_encoder"):
                told |= {"pooled_projections": self.text_encoder(words).pooler_output, "guidance": 3 * time}
            found: Tensor = self.transformer(latent, return_dict=False, **told)[0]
        return found


class Chroma(_Told):
    """T5's tokens are read by the transformer."""

    def forward(self, words: Tensor, latent: Tensor, time: Tensor, places: Tensor, order: Tensor) -> Tensor:
        with InDouble():
            context = self.text_encoder(words).last_hidden_state
            found: Tensor = self.transformer(latent, context, time, places, order, return_dict=False)[0]
        return found


def sd3_instance(width: int = 32, seed: int = 0, *, medium: bool = False) -> Instance:
    """Stable Diffusion 3: ``width`` is that of the transformer, a multiple of 8.

    With ``medium`` it is SD3.5 medium, with norms of queries and keys, and a second attention in its first block.
    """
    try:
        from diffusers import SD3Transformer2DModel
    except ModuleNotFoundError as error:
        raise missing(error) from error
    pooled, context = width + 2 * width, 4 * width
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=_LATENT, out_channels=_LATENT, num_layers=3,
        attention_head_dim=_HEAD, num_attention_heads=width // _HEAD, caption_projection_dim=width,
        joint_attention_dim=context, pooled_projection_dim=pooled, pos_embed_max_size=4,
        qk_norm="rms_norm" if medium else None, dual_attention_layers=(0,) if medium else (),
    )  # fmt: skip
    parts = {
        "transformer": transformer, "text_encoder": _clip(width, projected=True),
        "text_encoder_2": _clip(2 * width, projected=True), "text_encoder_3": _t5(context),
    }  # fmt: skip
    words, time = _words(seed), torch.tensor([17.0, 641.0])
    latent = _normal(seed, 2, _LATENT, 8, 8)
    return _instance("sd3", StableDiffusion3(parts), (words, latent, time), seed)


def flux_instance(width: int = 32, seed: int = 0) -> Instance:
    """Flux.1 with guidance: ``width`` is that of the transformer, a multiple of 8."""
    try:
        from diffusers import FluxTransformer2DModel
    except ModuleNotFoundError as error:
        raise missing(error) from error
    transformer = FluxTransformer2DModel(
        in_channels=_LATENT, num_layers=2, num_single_layers=2, attention_head_dim=_HEAD,
        num_attention_heads=width // _HEAD, joint_attention_dim=2 * width, pooled_projection_dim=width,
        guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    parts = {"transformer": transformer, "text_encoder": _clip(width), "text_encoder_2": _t5(2 * width)}
    return _instance("flux", Flux(parts), _in_sequence(seed), seed)


def chroma_instance(width: int = 32, seed: int = 0) -> Instance:
    """Chroma: ``width`` is that of the transformer, a multiple of 8."""
    try:
        from diffusers import ChromaTransformer2DModel
    except ModuleNotFoundError as error:
        raise missing(error) from error
    transformer = ChromaTransformer2DModel(
        in_channels=_LATENT, num_layers=1, num_single_layers=2, attention_head_dim=_HEAD,
        num_attention_heads=width // _HEAD, joint_attention_dim=2 * width, axes_dims_rope=(2, 2, 4),
        approximator_num_channels=16, approximator_hidden_dim=2 * width, approximator_layers=2,
    )  # fmt: skip
    parts = {"transformer": transformer, "text_encoder": _t5(2 * width)}
    return _instance("chroma", Chroma(parts), _in_sequence(seed), seed)


def _instance(arch: str, module: nn.Module, inputs: tuple[Tensor, ...], seed: int) -> Instance:
    originals, parameters = of_pipeline(arch, module)
    heads = dict.fromkeys(("model", "text", "text_2"), HeadRule(size=_HEAD))
    return instance_of(arch, module, inputs, heads, seed=seed, originals=originals, parameters=parameters)


def _words(seed: int) -> Tensor:
    words = torch.randint(1, _WORDS - 1, (2, _LENGTH), generator=torch.Generator().manual_seed(seed + 1))
    words[:, -1] = _WORDS - 1  # the end of the text, from which it is pooled
    return words


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 2), dtype=torch.float64)


def _in_sequence(seed: int) -> tuple[Tensor, ...]:
    """Words, a latent of 3 x 3 as a sequence, times, and the places of both in the image."""
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(3.0))
    return _words(seed), _normal(seed, 2, 9, _LATENT), torch.tensor([0.3, 0.8]), places, torch.zeros(_LENGTH, 3)


def _clip(width: int, *, projected: bool = False) -> nn.Module:
    try:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    except ModuleNotFoundError as error:
        raise missing(error) from error
    config = CLIPTextConfig(
        vocab_size=_WORDS, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=width // _HEAD, max_position_embeddings=_POSITIONS, projection_dim=width,
        bos_token_id=0, eos_token_id=_WORDS - 1, pad_token_id=0,
    )  # fmt: skip
    made: nn.Module = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    return made


def _t5(width: int) -> nn.Module:
    try:
        from transformers import T5Config, T5EncoderModel
    except ModuleNotFoundError as error:
        raise missing(error) from error
    config = T5Config(
        vocab_size=_WORDS, d_model=width, d_kv=_HEAD, d_ff=2 * width, num_layers=2, num_heads=width // _HEAD,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    made: nn.Module = T5EncoderModel(config)
    return made
