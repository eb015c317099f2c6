"""What diffusers and transformers must be told of a component before they load it, read off the shapes of its tensors.

Sizes and depths are in the shapes. What is not (numbers of heads, activations, scales of latents) is what the published
models of the arch have; a narrower model of the same make has as many heads, and as few groups as its widths allow.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from math import gcd, isqrt
from typing import Any

Configuration = dict[str, Any]
Sizes = tuple[int, ...]
_GROUPS = 32


class Shapes:
    """The shapes of a component's tensors by their names in diffusers' layout.

    What is asked of a tensor that is not there raises `LookupError`, and so does a dimension that it has not.

    >>> Shapes({"up.0.weight": (4, 2), "up.1.weight": (4,)}).count("up")
    2
    """

    def __init__(self, shapes: Mapping[str, Sizes]) -> None:
        self._shapes = shapes

    def size(self, name: str, dimension: int = 0) -> int:
        """One dimension of a tensor."""
        return self._shapes[name][dimension]

    def has(self, name: str) -> bool:
        """Whether there is such a tensor, or one below that name."""
        return any(key == name or key.startswith(f"{name}.") for key in self._shapes)

    def rank(self, name: str) -> int:
        """How many dimensions a tensor has."""
        return len(self._shapes[name])

    def count(self, container: str) -> int:
        """How many children ``container.0``, ``container.1`` ... there are."""
        return next(number for number in itertools.count() if not self.has(f"{container}.{number}"))


def unet(
    shapes: Shapes, sample: int, heads: int | None, *, transformer_heads: int = 5, upcast: bool = False
) -> Configuration:
    """A U-Net of Stable Diffusion for latents of ``sample`` x ``sample``.

    Attention has ``heads`` at every level, or, without that, ``transformer_heads`` at the first one and as many more at
    the others as these are wider.
    """
    levels = range(shapes.count("down_blocks"))
    widths = [shapes.size(f"down_blocks.{level}.resnets.0.conv1.weight") for level in levels]
    depths = [_depth(shapes, f"down_blocks.{level}") for level in levels]
    middle = _depth(shapes, "mid_block")
    first = next(level for level in levels if depths[level])
    attending = [heads or transformer_heads * width // widths[0] for width in widths]
    for width, count in zip(widths, attending, strict=True):
        _refuse_odd(width, count)
    attention = f"down_blocks.{first}.attentions.0"
    found: Configuration = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample,
        "in_channels": shapes.size("conv_in.weight", 1),
        "out_channels": shapes.size("conv_out.weight"),
        "block_out_channels": widths,
        "layers_per_block": shapes.count("down_blocks.0.resnets"),
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "transformer_layers_per_block": _one_or_all([*(depths[:-1]), depths[-1] or middle], middle),
        "cross_attention_dim": shapes.size(f"{attention}.transformer_blocks.0.attn2.to_k.weight", 1),
        "attention_head_dim": heads or attending,
        "use_linear_projection": shapes.rank(f"{attention}.proj_in.weight") == 2,
        "norm_num_groups": gcd(_GROUPS, *widths),
        "upcast_attention": upcast,
    }
    if shapes.has("class_embedding"):
        size = shapes.size("class_embedding.linear_1.weight", 1)
        found |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": size}
    return found


def sized_unet(shapes: Shapes, sample: int, heads: int, pooled: int, numbers: int) -> Configuration:
    """A U-Net of SDXL, which is told ``numbers`` about an image beside the ``pooled`` width of a text."""
    size = shapes.size("add_embedding.linear_1.weight", 1)
    return unet(shapes, sample, None, transformer_heads=heads) | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (size - pooled) // numbers,
        "projection_class_embeddings_input_dim": size,
    }


def _refuse_odd(width: int, heads: int) -> None:
    """Refuse heads that do not divide a width: the model is none of this make, and has an unknown number of them."""
    if width % heads:
        raise LookupError(f"{heads} heads do not divide {width}")


def _depth(shapes: Shapes, block: str) -> int:
    return shapes.count(f"{block}.attentions.0.transformer_blocks")


def _one_or_all(depths: list[int], middle: int) -> int | list[int]:
    """The number of transformers at every level, or one for each: those of levels without attention do not matter."""
    used = {depth for depth in depths if depth} | ({middle} if middle else set())
    return used.pop() if len(used) == 1 else [depth or 1 for depth in depths]


def autoencoder(shapes: Shapes, sample: int, scale: float, shift: float | None = None) -> Configuration:
    """An autoencoder of latent diffusion, whose latents are multiplied by ``scale`` once ``shift`` is taken off."""
    levels = shapes.count("encoder.down_blocks")
    widths = [shapes.size(f"encoder.down_blocks.{level}.resnets.0.conv1.weight") for level in range(levels)]
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": sample,
        "in_channels": shapes.size("encoder.conv_in.weight", 1),
        "out_channels": shapes.size("decoder.conv_out.weight"),
        "latent_channels": shapes.size("decoder.conv_in.weight", 1),
        "block_out_channels": widths,
        "layers_per_block": shapes.count("encoder.down_blocks.0.resnets"),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": gcd(_GROUPS, *widths),
        "use_quant_conv": shapes.has("quant_conv"),
        "use_post_quant_conv": shapes.has("post_quant_conv"),
        "mid_block_add_attention": shapes.has("encoder.mid_block.attentions"),
        "scaling_factor": scale,
        "shift_factor": shift,
        "force_upcast": True,
    }


def clip(shapes: Shapes, heads: int, activation: str) -> Configuration:
    """A text encoder of CLIP, with its projection where it has one."""
    projected = shapes.has("text_projection")
    width = shapes.size("text_model.embeddings.token_embedding.weight", 1)
    _refuse_odd(width, heads)
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": shapes.size("text_model.embeddings.token_embedding.weight"),
        "max_position_embeddings": shapes.size("text_model.embeddings.position_embedding.weight"),
        "hidden_size": width,
        "intermediate_size": shapes.size("text_model.encoder.layers.0.mlp.fc1.weight"),
        "num_hidden_layers": shapes.count("text_model.encoder.layers"),
        "num_attention_heads": heads,
        "projection_dim": shapes.size("text_projection.weight") if projected else width,
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def t5(shapes: Shapes) -> Configuration:
    """The encoder of T5 1.1."""
    attention = "encoder.block.0.layer.0.SelfAttention"
    heads = shapes.size(f"{attention}.relative_attention_bias.weight", 1)
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": shapes.size("shared.weight"),
        "d_model": shapes.size("shared.weight", 1),
        "d_kv": shapes.size(f"{attention}.q.weight") // heads,
        "d_ff": shapes.size("encoder.block.0.layer.1.DenseReluDense.wi_0.weight"),
        "num_layers": shapes.count("encoder.block"),
        "num_heads": heads,
        "relative_attention_num_buckets": shapes.size(f"{attention}.relative_attention_bias.weight"),
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def sd3_transformer(shapes: Shapes, sample: int) -> Configuration:
    """The transformer of SD3 and 3.5, which has as many heads as blocks, unless the norms of heads tell their width."""
    blocks = range(shapes.count("transformer_blocks"))
    width = shapes.size("context_embedder.weight")
    normed = shapes.has("transformer_blocks.0.attn.norm_q")
    heads = width // shapes.size("transformer_blocks.0.attn.norm_q.weight") if normed else len(blocks)
    patch = shapes.size("pos_embed.proj.weight", 3)
    positions = isqrt(shapes.size("pos_embed.pos_embed", 1)) if shapes.has("pos_embed.pos_embed") else 192
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": sample,
        "patch_size": patch,
        "in_channels": shapes.size("pos_embed.proj.weight", 1),
        "out_channels": shapes.size("proj_out.weight") // patch**2,
        "num_layers": len(blocks),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "joint_attention_dim": shapes.size("context_embedder.weight", 1),
        "caption_projection_dim": width,
        "pooled_projection_dim": shapes.size("time_text_embed.text_embedder.linear_1.weight", 1),
        "pos_embed_max_size": positions,
        "dual_attention_layers": [block for block in blocks if shapes.has(f"transformer_blocks.{block}.attn2")],
        "qk_norm": "rms_norm" if normed else None,
    }


def flux_transformer(shapes: Shapes) -> Configuration:
    """The transformer of Flux.1."""
    width = shapes.size("x_embedder.weight")
    head = shapes.size("transformer_blocks.0.attn.norm_q.weight")
    into, out = shapes.size("x_embedder.weight", 1), shapes.size("proj_out.weight")
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": into,
        "out_channels": out if out != into else None,
        "num_layers": shapes.count("transformer_blocks"),
        "num_single_layers": shapes.count("single_transformer_blocks"),
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "joint_attention_dim": shapes.size("context_embedder.weight", 1),
        "pooled_projection_dim": shapes.size("time_text_embed.text_embedder.linear_1.weight", 1),
        "guidance_embeds": shapes.has("time_text_embed.guidance_embedder"),
        "axes_dims_rope": _axes(head),
    }


def _axes(head: int) -> list[int]:
    """How the width of a head is shared by the number of an image, its rows and its columns: 16, 56, 56 of 128.

    >>> _axes(128), _axes(16)
    ([16, 56, 56], [4, 6, 6])
    """
    first = next((size for size in range(max(head // 8, 2), head) if size % 2 == 0 and (head - size) % 4 == 0), 2)
    return [first, (head - first) // 2, (head - first) // 2]
