"""The parts that image and language models are made of, as generators of key names and shapes for `shapes`."""

from __future__ import annotations

from collections.abc import Iterator

from remelt.errors import OptionError

Shapes = Iterator[tuple[str, tuple[int, ...]]]


class Narrow:
    """Divides a width, rounding up, so that nothing vanishes."""

    def __init__(self, divisor: int) -> None:
        if divisor < 1:
            raise OptionError(f"a width is divided by 1 or more, but not by {divisor}")
        self._divisor = divisor

    def __call__(self, width: int) -> int:
        return -(-width // self._divisor)


def linear(name: str, out: int, into: int, *, bias: bool = True) -> Shapes:
    yield f"{name}.weight", (out, into)
    if bias:
        yield f"{name}.bias", (out,)


def conv(name: str, out: int, into: int, kernel: int = 3) -> Shapes:
    yield f"{name}.weight", (out, into, kernel, kernel)
    yield f"{name}.bias", (out,)


def norm(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def unet(
    width: int,
    context: int,
    *,
    linear_ends: bool,
    in_channels: int,
    multiples: tuple[int, ...] = (1, 2, 4, 4),
    depths: tuple[int, ...] = (1, 1, 1, 0),
    middle_depth: int | None = None,
    label: int | None = None,
) -> Shapes:
    """The U-Net of latent diffusion: per level two residual blocks down, three up, each with so many transformers."""
    root, time = "model.diffusion_model.", 4 * width
    for name, into in [("time_embed", width)] + ([("label_emb.0", label)] if label is not None else []):
        yield from linear(f"{root}{name}.0", time, into)
        yield from linear(f"{root}{name}.2", time, time)
    yield from conv(f"{root}input_blocks.0.0", width, in_channels)
    skips, channels, block = [width], width, 1
    for level, multiple in enumerate(multiples):
        for _ in range(2):
            yield from unet_block(f"{root}input_blocks.{block}", channels, multiple * width, time)
            channels = multiple * width
            yield from transformer(f"{root}input_blocks.{block}.1", channels, context, depths[level], linear_ends)
            skips.append(channels)
            block += 1
        if level < len(multiples) - 1:
            yield from conv(f"{root}input_blocks.{block}.0.op", channels, channels)
            skips.append(channels)
            block += 1
    middle = middle_depth if middle_depth is not None else max(depths[-1], 1)
    yield from unet_block(f"{root}middle_block", channels, channels, time)
    yield from transformer(f"{root}middle_block.1", channels, context, middle, linear_ends)
    yield from unet_block(f"{root}middle_block", channels, channels, time, child=2)
    block = 0
    for level in reversed(range(len(multiples))):
        for step in range(3):
            yield from unet_block(
                f"{root}output_blocks.{block}", channels + skips.pop(), multiples[level] * width, time
            )
            channels = multiples[level] * width
            yield from transformer(f"{root}output_blocks.{block}.1", channels, context, depths[level], linear_ends)
            if level and step == 2:
                yield from conv(f"{root}output_blocks.{block}.{2 if depths[level] else 1}.conv", channels, channels)
            block += 1
    yield from norm(f"{root}out.0", width)
    yield from conv(f"{root}out.2", 4, width)


def unet_block(name: str, into: int, out: int, time: int, *, child: int = 0) -> Shapes:
    yield from norm(f"{name}.{child}.in_layers.0", into)
    yield from conv(f"{name}.{child}.in_layers.2", out, into)
    yield from linear(f"{name}.{child}.emb_layers.1", out, time)
    yield from norm(f"{name}.{child}.out_layers.0", out)
    yield from conv(f"{name}.{child}.out_layers.3", out, out)
    if into != out:
        yield from conv(f"{name}.{child}.skip_connection", out, into, 1)


def transformer(name: str, width: int, context: int, depth: int, linear_ends: bool) -> Shapes:
    if depth == 0:
        return
    yield from norm(f"{name}.norm", width)
    for end in ("proj_in", "proj_out"):
        yield from linear(f"{name}.{end}", width, width) if linear_ends else conv(f"{name}.{end}", width, width, 1)
    for layer in range(depth):
        root = f"{name}.transformer_blocks.{layer}"
        for attention, source in (("attn1", width), ("attn2", context)):
            yield from linear(f"{root}.{attention}.to_q", width, width, bias=False)
            yield from linear(f"{root}.{attention}.to_k", width, source, bias=False)
            yield from linear(f"{root}.{attention}.to_v", width, source, bias=False)
            yield from linear(f"{root}.{attention}.to_out.0", width, width)
        yield from linear(f"{root}.ff.net.0.proj", 8 * width, width)
        yield from linear(f"{root}.ff.net.2", width, 4 * width)
        for number in (1, 2, 3):
            yield from norm(f"{root}.norm{number}", width)


def vae(root: str, width: int, latent: int) -> Shapes:
    """The autoencoder of latent diffusion: four levels of ``width`` times 1, 2, 4 and 4."""
    widths = [width * multiple for multiple in (1, 2, 4, 4)]
    top = widths[-1]
    yield from conv(f"{root}encoder.conv_in", width, 3)
    channels = width
    for level, out in enumerate(widths):
        for block in range(2):
            yield from vae_block(f"{root}encoder.down.{level}.block.{block}", channels, out)
            channels = out
        if level < 3:
            yield from conv(f"{root}encoder.down.{level}.downsample.conv", out, out)
    yield from conv(f"{root}decoder.conv_in", top, latent)
    for level, out in reversed(list(enumerate(widths))):
        for block in range(3):
            yield from vae_block(f"{root}decoder.up.{level}.block.{block}", channels, out)
            channels = out
        if level:
            yield from conv(f"{root}decoder.up.{level}.upsample.conv", out, out)
    for half, last, out in (("encoder", top, 2 * latent), ("decoder", width, 3)):
        for block in (1, 2):
            yield from vae_block(f"{root}{half}.mid.block_{block}", top, top)
        yield from norm(f"{root}{half}.mid.attn_1.norm", top)
        for layer in ("q", "k", "v", "proj_out"):
            yield from conv(f"{root}{half}.mid.attn_1.{layer}", top, top, 1)
        yield from norm(f"{root}{half}.norm_out", last)
        yield from conv(f"{root}{half}.conv_out", out, last)
    if latent == 4:
        yield from conv(f"{root}quant_conv", 2 * latent, 2 * latent, 1)
        yield from conv(f"{root}post_quant_conv", latent, latent, 1)


def vae_block(name: str, into: int, out: int) -> Shapes:
    yield from norm(f"{name}.norm1", into)
    yield from conv(f"{name}.conv1", out, into)
    yield from norm(f"{name}.norm2", out)
    yield from conv(f"{name}.conv2", out, out)
    if into != out:
        yield from conv(f"{name}.nin_shortcut", out, into, 1)


def clip_layers(root: str, layers: int, width: int, inner: int) -> Shapes:
    """The layers of CLIP's encoders of texts and images as transformers names them."""
    for layer in range(layers):
        name = f"{root}encoder.layers.{layer}"
        for number in (1, 2):
            yield from norm(f"{name}.layer_norm{number}", width)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from linear(f"{name}.self_attn.{projection}", width, width)
        yield from linear(f"{name}.mlp.fc1", inner, width)
        yield from linear(f"{name}.mlp.fc2", width, inner)


def clip(root: str, layers: int, width: int, vocabulary: int) -> Shapes:
    """CLIP's text encoder as transformers names it."""
    yield f"{root}embeddings.token_embedding.weight", (vocabulary, width)
    yield f"{root}embeddings.position_embedding.weight", (77, width)
    yield from clip_layers(root, layers, width, 4 * width)
    yield from norm(f"{root}final_layer_norm", width)


def openclip(root: str, layers: int, width: int, vocabulary: int) -> Shapes:
    """CLIP's text encoder as open_clip names it."""
    yield f"{root}positional_embedding", (77, width)
    yield f"{root}text_projection", (width, width)
    yield f"{root}logit_scale", ()
    yield f"{root}token_embedding.weight", (vocabulary, width)
    for layer in range(layers):
        name = f"{root}transformer.resblocks.{layer}"
        yield f"{name}.attn.in_proj_weight", (3 * width, width)
        yield f"{name}.attn.in_proj_bias", (3 * width,)
        yield from linear(f"{name}.attn.out_proj", width, width)
        for number in (1, 2):
            yield from norm(f"{name}.ln_{number}", width)
        yield from linear(f"{name}.mlp.c_fc", 4 * width, width)
        yield from linear(f"{name}.mlp.c_proj", width, 4 * width)
    yield from norm(f"{root}ln_final", width)


def t5(root: str, narrow: Narrow) -> Shapes:
    """The encoder of T5-XXL, version 1.1."""
    width, inner = narrow(4096), narrow(10240)
    yield f"{root}shared.weight", (narrow(32128), width)
    yield f"{root}encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, narrow(64))
    for block in range(24):
        name = f"{root}encoder.block.{block}.layer"
        for letter in "qkvo":
            yield from linear(f"{name}.0.SelfAttention.{letter}", width, width, bias=False)
        yield from linear(f"{name}.1.DenseReluDense.wi_0", inner, width, bias=False)
        yield from linear(f"{name}.1.DenseReluDense.wi_1", inner, width, bias=False)
        yield from linear(f"{name}.1.DenseReluDense.wo", width, inner, bias=False)
        for number in (0, 1):
            yield f"{name}.{number}.layer_norm.weight", (width,)
    yield f"{root}encoder.final_layer_norm.weight", (width,)


def mmdit(root: str, depth: int, width: int, narrow: Narrow, qk_norm: bool) -> Shapes:
    """The transformer of SD3: image and text in joint blocks; the last block has no text to put out."""
    yield f"{root}pos_embed", (1, narrow(36864), width)
    yield from conv(f"{root}x_embedder.proj", width, 16, 2)
    yield from linear(f"{root}context_embedder", width, narrow(4096))
    for name, into in (("t_embedder", 256), ("y_embedder", narrow(2048))):
        yield from linear(f"{root}{name}.mlp.0", width, into)
        yield from linear(f"{root}{name}.mlp.2", width, width)
    for block in range(depth):
        for stream in ("x_block", "context_block"):
            name = f"{root}joint_blocks.{block}.{stream}"
            last = block == depth - 1 and stream == "context_block"
            yield from linear(f"{name}.adaLN_modulation.1", (2 if last else 6) * width, width)
            yield from linear(f"{name}.attn.qkv", 3 * width, width)
            if qk_norm:
                yield from ((f"{name}.attn.{which}.weight", (narrow(64),)) for which in ("ln_q", "ln_k"))
            if not last:
                yield from linear(f"{name}.attn.proj", width, width)
                yield from linear(f"{name}.mlp.fc1", 4 * width, width)
                yield from linear(f"{name}.mlp.fc2", width, 4 * width)
    yield from linear(f"{root}final_layer.adaLN_modulation.1", 2 * width, width)
    yield from linear(f"{root}final_layer.linear", 64, width)


def flux(root: str, narrow: Narrow, in_channels: int, guidance: bool) -> Shapes:
    """The transformer of Flux: 19 blocks with two streams, 38 with one."""
    width, head = narrow(3072), narrow(128)
    yield from linear(f"{root}img_in", width, in_channels)
    yield from linear(f"{root}txt_in", width, narrow(4096))
    embedded = [("time_in", 256), ("vector_in", narrow(768))] + ([("guidance_in", 256)] if guidance else [])
    for name, into in embedded:
        yield from linear(f"{root}{name}.in_layer", width, into)
        yield from linear(f"{root}{name}.out_layer", width, width)
    for block in range(19):
        for stream in ("img", "txt"):
            name = f"{root}double_blocks.{block}.{stream}"
            yield from linear(f"{name}_mod.lin", 6 * width, width)
            yield from linear(f"{name}_attn.qkv", 3 * width, width)
            yield from ((f"{name}_attn.norm.{part}_norm.scale", (head,)) for part in ("query", "key"))
            yield from linear(f"{name}_attn.proj", width, width)
            yield from linear(f"{name}_mlp.0", 4 * width, width)
            yield from linear(f"{name}_mlp.2", width, 4 * width)
    for block in range(38):
        name = f"{root}single_blocks.{block}"
        yield from linear(f"{name}.linear1", 7 * width, width)
        yield from linear(f"{name}.linear2", width, 5 * width)
        yield from ((f"{name}.norm.{part}_norm.scale", (head,)) for part in ("query", "key"))
        yield from linear(f"{name}.modulation.lin", 3 * width, width)
    yield from linear(f"{root}final_layer.adaLN_modulation.1", 2 * width, width)
    yield from linear(f"{root}final_layer.linear", 64, width)


def llama(layers: int, hidden: int, queries: int, keys: int, intermediate: int, vocabulary: int, tied: bool) -> Shapes:
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers):
        name = f"model.layers.{layer}"
        yield f"{name}.input_layernorm.weight", (hidden,)
        for projection, out in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield f"{name}.self_attn.{projection}.weight", (out, hidden)
        yield f"{name}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{name}.post_attention_layernorm.weight", (hidden,)
        for projection in ("gate_proj", "up_proj"):
            yield f"{name}.mlp.{projection}.weight", (intermediate, hidden)
        yield f"{name}.mlp.down_proj.weight", (hidden, intermediate)
    yield "model.norm.weight", (hidden,)
    if not tied:
        yield "lm_head.weight", (vocabulary, hidden)
