"""The transformers of image models as generators of key names and shapes for `shapes`, by the names of their archs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from remelt.archs.model_parts import Narrow, Shapes, conv, linear

ROOT = "model.diffusion_model."
TIME = 256
"""Channels of a time step, before anything is learned of it."""


def chroma(narrow: Narrow, *, depths: tuple[int, int] = (19, 38), guides: int = 5) -> Shapes:
    """Chroma: the blocks of Flux, modulated by one network of ``guides`` layers."""
    width, head, guide = narrow(3072), narrow(128), narrow(5120)
    yield from linear(f"{ROOT}img_in", width, 64)
    yield from linear(f"{ROOT}txt_in", width, narrow(4096))
    name = f"{ROOT}distilled_guidance_layer"
    yield from linear(f"{name}.in_proj", guide, 64)
    for layer in range(guides):
        yield from linear(f"{name}.layers.{layer}.in_layer", guide, guide)
        yield from linear(f"{name}.layers.{layer}.out_layer", guide, guide)
        yield f"{name}.norms.{layer}.scale", (guide,)
    yield from linear(f"{name}.out_proj", width, guide)
    yield from stream_blocks(depths, width, head, 4 * width, 4 * width, bias=True)
    yield from linear(f"{ROOT}final_layer.linear", 64, width)


def flux2(
    narrow: Narrow,
    *,
    depths: tuple[int, int] = (8, 48),
    hidden: int = 6144,
    context: int = 15360,
    guidance: bool = True,
) -> Shapes:
    """Flux.2 dev: one modulation for all blocks, no biases.

    Klein has no ``guidance``; of 9B, ``depths`` are 8 and 24, ``hidden`` 4096, ``context`` 12288; of 4B, 5 and 20, 3072
    and 7680.
    """
    width, head = narrow(hidden), narrow(128)
    yield from linear(f"{ROOT}img_in", width, 128, bias=False)
    yield from linear(f"{ROOT}txt_in", width, narrow(context), bias=False)
    for name in ("time_in", "guidance_in") if guidance else ("time_in",):
        yield from linear(f"{ROOT}{name}.in_layer", width, TIME, bias=False)
        yield from linear(f"{ROOT}{name}.out_layer", width, width, bias=False)
    for name, parts in (("double_stream_modulation_img", 6), ("double_stream_modulation_txt", 6)):
        yield from linear(f"{ROOT}{name}.lin", parts * width, width, bias=False)
    yield from linear(f"{ROOT}single_stream_modulation.lin", 3 * width, width, bias=False)
    yield from stream_blocks(depths, width, head, 6 * width, 3 * width, bias=False)
    yield from linear(f"{ROOT}final_layer.adaLN_modulation.1", 2 * width, width, bias=False)
    yield from linear(f"{ROOT}final_layer.linear", 128, width, bias=False)


def stream_blocks(depths: tuple[int, int], width: int, head: int, fed: int, hidden: int, *, bias: bool) -> Shapes:
    """Blocks with two streams, then blocks with one, whose feed-forward network takes ``fed`` and gives ``hidden``."""
    for block in range(depths[0]):
        for stream in ("img", "txt"):
            name = f"{ROOT}double_blocks.{block}.{stream}"
            yield from linear(f"{name}_attn.qkv", 3 * width, width, bias=bias)
            yield from ((f"{name}_attn.norm.{part}_norm.scale", (head,)) for part in ("query", "key"))
            yield from linear(f"{name}_attn.proj", width, width, bias=bias)
            yield from linear(f"{name}_mlp.0", fed, width, bias=bias)
            yield from linear(f"{name}_mlp.2", width, hidden, bias=bias)
    for block in range(depths[1]):
        name = f"{ROOT}single_blocks.{block}"
        yield from linear(f"{name}.linear1", 3 * width + fed, width, bias=bias)
        yield from linear(f"{name}.linear2", width, width + hidden, bias=bias)
        yield from ((f"{name}.norm.{part}_norm.scale", (head,)) for part in ("query", "key"))


def qwen_image(narrow: Narrow, *, depth: int = 60, layered: bool = False) -> Shapes:
    """Qwen-Image: 60 blocks with two streams. ``layered`` adds the embedding that tells layers from the whole."""
    width, head, context = narrow(3072), narrow(128), narrow(3584)
    yield from linear(f"{ROOT}img_in", width, 64)
    yield from linear(f"{ROOT}txt_in", width, context)
    yield f"{ROOT}txt_norm.weight", (context,)
    yield from linear(f"{ROOT}time_text_embed.timestep_embedder.linear_1", width, TIME)
    yield from linear(f"{ROOT}time_text_embed.timestep_embedder.linear_2", width, width)
    if layered:
        yield f"{ROOT}time_text_embed.addition_t_embedding.weight", (2, width)
    for block in range(depth):
        name = f"{ROOT}transformer_blocks.{block}"
        for layer in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            yield from linear(f"{name}.attn.{layer}", width, width)
        for layer in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            yield f"{name}.attn.{layer}.weight", (head,)
        for stream in ("img", "txt"):
            yield from linear(f"{name}.{stream}_mod.1", 6 * width, width)
            yield from linear(f"{name}.{stream}_mlp.net.0.proj", 4 * width, width)
            yield from linear(f"{name}.{stream}_mlp.net.2", width, 4 * width)
    yield from linear(f"{ROOT}norm_out.linear", 2 * width, width)
    yield from linear(f"{ROOT}proj_out", 64, width)


def z_image(narrow: Narrow, *, depth: int = 30, omni: bool = False) -> Shapes:
    """Z-Image: 30 layers, and 2 to refine noise and caption each; ``omni`` adds those for pictures that are given."""
    width, caption, seen = narrow(3840), narrow(2560), narrow(1152)
    time = min(width, TIME)
    yield from linear(f"{ROOT}x_embedder", width, 64)
    for name, into in (("cap", caption), ("siglip", seen)) if omni else (("cap", caption),):
        yield f"{ROOT}{name}_embedder.0.weight", (into,)
        yield from linear(f"{ROOT}{name}_embedder.1", width, into)
        yield f"{ROOT}{name}_pad_token", (1, width)
    yield f"{ROOT}x_pad_token", (1, width)
    yield from linear(f"{ROOT}t_embedder.mlp.0", 1024, TIME)
    yield from linear(f"{ROOT}t_embedder.mlp.2", time, 1024)
    stacks = [("layers", depth), ("noise_refiner", 2), ("context_refiner", 2)] + ([("siglip_refiner", 2)] * omni)
    for stack, count in stacks:
        for block in range(count):
            name = f"{ROOT}{stack}.{block}"
            yield from refined_block(name, width, 3 * width, width // 30, width * 8 // 3)
            if stack in ("layers", "noise_refiner"):
                yield from linear(f"{name}.adaLN_modulation.0", 4 * width, time)
    yield f"{ROOT}norm_final.weight", (width,)
    yield from linear(f"{ROOT}final_layer.adaLN_modulation.1", width, time)
    yield from linear(f"{ROOT}final_layer.linear", 64, width)


def lumina2(narrow: Narrow, *, depth: int = 26) -> Shapes:
    """Lumina-Image 2.0: 26 layers, and 2 to refine noise and caption each; three queries share a key."""
    width, caption, several = narrow(2304), narrow(2304), narrow(256)
    time, hidden = min(width, 1024), -(-4 * width // several) * several
    yield from linear(f"{ROOT}x_embedder", width, 64)
    yield f"{ROOT}cap_embedder.0.weight", (caption,)
    yield from linear(f"{ROOT}cap_embedder.1", width, caption)
    yield from linear(f"{ROOT}t_embedder.mlp.0", time, TIME)
    yield from linear(f"{ROOT}t_embedder.mlp.2", time, time)
    for stack, count in (("layers", depth), ("noise_refiner", 2), ("context_refiner", 2)):
        for block in range(count):
            name = f"{ROOT}{stack}.{block}"
            head = width // 24
            yield from refined_block(name, width, (24 + 2 * 8) * head, head, hidden)
            if stack != "context_refiner":
                yield from linear(f"{name}.adaLN_modulation.1", 4 * width, time)
    yield f"{ROOT}norm_final.weight", (width,)
    yield from linear(f"{ROOT}final_layer.adaLN_modulation.1", width, time)
    yield from linear(f"{ROOT}final_layer.linear", 64, width)


def refined_block(name: str, width: int, fused: int, head: int, hidden: int) -> Shapes:
    """A block of Lumina and its kin: norms before and after, queries, keys and values of ``fused`` rows together."""
    yield from linear(f"{name}.attention.qkv", fused, width, bias=False)
    yield from linear(f"{name}.attention.out", width, width, bias=False)
    yield from ((f"{name}.attention.{part}_norm.weight", (head,)) for part in ("q", "k"))
    for layer, out, into in (("w1", hidden, width), ("w2", width, hidden), ("w3", hidden, width)):
        yield from linear(f"{name}.feed_forward.{layer}", out, into, bias=False)
    for part in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        yield f"{name}.{part}.weight", (width,)


def pixart(narrow: Narrow, *, depth: int = 28, sized: bool = True, tokens: int = 120, grid: int = 64) -> Shapes:
    """PixArt-Alpha for 1024 pixels. Sigma is not ``sized`` (told of sizes), and has 300 ``tokens``."""
    width, caption = narrow(1152), narrow(4096)
    yield f"{ROOT}pos_embed", (1, grid * grid, width)
    yield from conv(f"{ROOT}x_embedder.proj", width, 4, 2)
    embedders = [("t_embedder", width)] + ([("csize_embedder", width // 3), ("ar_embedder", width // 3)] * sized)
    for name, out in embedders:
        yield from linear(f"{ROOT}{name}.mlp.0", out, TIME)
        yield from linear(f"{ROOT}{name}.mlp.2", out, out)
    yield from linear(f"{ROOT}t_block.1", 6 * width, width)
    yield f"{ROOT}y_embedder.y_embedding", (tokens, caption)
    yield from linear(f"{ROOT}y_embedder.y_proj.fc1", width, caption)
    yield from linear(f"{ROOT}y_embedder.y_proj.fc2", width, width)
    for block in range(depth):
        name = f"{ROOT}blocks.{block}"
        yield f"{name}.scale_shift_table", (6, width)
        yield from linear(f"{name}.attn.qkv", 3 * width, width)
        yield from linear(f"{name}.attn.proj", width, width)
        yield from linear(f"{name}.cross_attn.q_linear", width, width)
        yield from linear(f"{name}.cross_attn.kv_linear", 2 * width, width)
        yield from linear(f"{name}.cross_attn.proj", width, width)
        yield from linear(f"{name}.mlp.fc1", 4 * width, width)
        yield from linear(f"{name}.mlp.fc2", width, 4 * width)
    yield f"{ROOT}final_layer.scale_shift_table", (2, width)
    yield from linear(f"{ROOT}final_layer.linear", 32, width)


def auraflow(narrow: Narrow, *, depths: tuple[int, int] = (4, 32), positions: int = 9216) -> Shapes:
    """AuraFlow 0.3; 0.2 has 4096 ``positions``, 0.1 has 1024."""
    width = narrow(3072)
    hidden = -(-(8 * width // 3) // 256) * 256
    yield f"{ROOT}positional_encoding", (1, positions, width)
    yield f"{ROOT}register_tokens", (1, 8, width)
    yield from linear(f"{ROOT}init_x_linear", width, 16)
    yield from linear(f"{ROOT}cond_seq_linear", width, narrow(2048), bias=False)
    yield from linear(f"{ROOT}t_embedder.mlp.0", width, TIME)
    yield from linear(f"{ROOT}t_embedder.mlp.2", width, width)
    kinds = [("double_layers", depths[0], ("1", "2"), ("C", "X")), ("single_layers", depths[1], ("1",), ("CX",))]
    for stack, count, sides, streams in kinds:
        for block in range(count):
            name = f"{ROOT}{stack}.{block}"
            for side in sides:
                for letter in "qkvo":
                    yield from linear(f"{name}.attn.w{side}{letter}", width, width, bias=False)
            for stream in streams:
                network = f"{name}.mlp{stream}" if len(streams) > 1 else f"{name}.mlp"
                yield from linear(f"{network}.c_fc1", hidden, width, bias=False)
                yield from linear(f"{network}.c_fc2", hidden, width, bias=False)
                yield from linear(f"{network}.c_proj", width, hidden, bias=False)
                yield from linear(f"{name}.mod{stream}.1", 6 * width, width, bias=False)
    yield from linear(f"{ROOT}modF.1", 2 * width, width, bias=False)
    yield from linear(f"{ROOT}final_linear", 16, width, bias=False)


IMAGE_MODELS: Mapping[str, Callable[..., Shapes]] = MappingProxyType(
    {one.__name__: one for one in (auraflow, chroma, flux2, lumina2, pixart, qwen_image, z_image)}
)
"""What makes the transformer of an arch, by its name."""
