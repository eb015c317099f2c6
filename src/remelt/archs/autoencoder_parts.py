"""Key names and shapes of the autoencoders of models that make videos, in the layout of their single files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from remelt.archs.model_parts import Narrow, Shapes, linear, norm, vae

_MULTIPLES = (1, 2, 4, 4)
_IN_TIME = (False, True, True)
"""Which levels halve the frames beside the width."""


def wan_vae(width: int, latent: int) -> Shapes:
    """The autoencoder of Wan 2.1 and Qwen-Image: one list of layers each way."""
    yield from _wan_ends(width, width, latent, 3)
    channels, place = width, 0
    for level, out in enumerate(width * multiple for multiple in _MULTIPLES):
        for _ in range(2):
            yield from _wan_block(f"encoder.downsamples.{place}", channels, out)
            channels, place = out, place + 1
        if level < 3:
            yield from _wan_resample(f"encoder.downsamples.{place}", out, out, 1 if _IN_TIME[level] else 0)
            place += 1
    place = 0
    for level, out in enumerate(width * multiple for multiple in reversed(_MULTIPLES)):
        for _ in range(3):
            yield from _wan_block(f"decoder.upsamples.{place}", channels, out)
            channels, place = out, place + 1
        if level < 3:
            yield from _wan_resample(f"decoder.upsamples.{place}", out, out // 2, 2 if _IN_TIME[2 - level] else 0)
            channels, place = out // 2, place + 1


def wan22_vae(width: int, decoder: int, latent: int) -> Shapes:
    """The autoencoder of Wan 2.2: a list of layers for every level; the ``decoder`` is wider."""
    yield from _wan_ends(width, decoder, latent, 12)
    channels = width
    for level, out in enumerate(width * multiple for multiple in _MULTIPLES):
        name = f"encoder.downsamples.{level}.downsamples"
        for place in range(2):
            yield from _wan_block(f"{name}.{place}", channels, out)
            channels = out
        if level < 3:
            yield from _wan_resample(f"{name}.2", out, out, 1 if _IN_TIME[level] else 0)
    channels = decoder * _MULTIPLES[-1]
    for level, out in enumerate(decoder * multiple for multiple in reversed(_MULTIPLES)):
        name = f"decoder.upsamples.{level}.upsamples"
        for place in range(3):
            yield from _wan_block(f"{name}.{place}", channels, out)
            channels = out
        if level < 3:
            yield from _wan_resample(f"{name}.3", out, out, 2 if _IN_TIME[2 - level] else 0)


def _wan_ends(encoder: int, decoder: int, latent: int, colours: int) -> Shapes:
    """All but the levels."""
    top = _MULTIPLES[-1]
    yield from _cube("conv1", 2 * latent, 2 * latent, 1)
    yield from _cube("conv2", latent, latent, 1)
    yield from _cube("encoder.conv1", encoder, colours)
    yield from _cube("decoder.conv1", top * decoder, latent)
    for half, width, last, out in (
        ("encoder", top * encoder, top * encoder, 2 * latent),
        ("decoder", top * decoder, decoder, colours),
    ):
        for place in (0, 2):
            yield from _wan_block(f"{half}.middle.{place}", width, width)
        yield f"{half}.middle.1.norm.gamma", (width, 1, 1)
        for layer, rows in (("to_qkv", 3 * width), ("proj", width)):
            yield f"{half}.middle.1.{layer}.weight", (rows, width, 1, 1)
            yield f"{half}.middle.1.{layer}.bias", (rows,)
        yield f"{half}.head.0.gamma", (last, 1, 1, 1)
        yield from _cube(f"{half}.head.2", out, last)


def _wan_block(name: str, into: int, out: int) -> Shapes:
    yield f"{name}.residual.0.gamma", (into, 1, 1, 1)
    yield from _cube(f"{name}.residual.2", out, into)
    yield f"{name}.residual.3.gamma", (out, 1, 1, 1)
    yield from _cube(f"{name}.residual.6", out, out)
    if into != out:
        yield from _cube(f"{name}.shortcut", out, into, 1)


def _wan_resample(name: str, into: int, out: int, times: int) -> Shapes:
    """A change of size: ``times`` as many frames are made by a convolution in time; none where it is 0."""
    yield f"{name}.resample.1.weight", (out, into, 3, 3)
    yield f"{name}.resample.1.bias", (out,)
    if times:
        yield f"{name}.time_conv.weight", (times * into, into, 3, 1, 1)
        yield f"{name}.time_conv.bias", (times * into,)


def hunyuan_video_vae(width: int, latent: int) -> Shapes:
    """The autoencoder of HunyuanVideo: that of latent diffusion with a third dimension."""
    yield from _cube("quant_conv", 2 * latent, 2 * latent, 1)
    yield from _cube("post_quant_conv", latent, latent, 1)
    for key, shape in vae("", width, latent):
        module, _, leaf = key.rpartition(".")
        layer = module.rpartition(".")[2]
        is_quantiser, is_causal = module.endswith("quant_conv"), layer.startswith(("conv", "nin_"))
        if not is_quantiser:
            yield f"{module}.conv.{leaf}" if is_causal else key, (*shape, shape[-1]) if len(shape) > 1 else shape


def ltx_vae(width: int, latent: int) -> Shapes:
    """The autoencoder of LTX-Video 0.9.0: blocks of layers, and between them what changes size or width."""
    yield from _ltx_encoder(width, latent)
    yield from _causal("decoder.conv_in", 4 * width, latent)
    yield from _ltx_layers("decoder.up_blocks.0", 4 * width, 4)
    yield from _ltx_layers("decoder.up_blocks.1", 4 * width, 3)
    place, channels = 2, 4 * width
    for multiple, layers in ((4, 3), (2, 3), (1, 4)):
        if multiple * width != channels:
            yield from _ltx_change(f"decoder.up_blocks.{place}", channels, multiple * width)
            place, channels = place + 1, multiple * width
        yield from _causal(f"decoder.up_blocks.{place}.conv", 8 * channels, channels)
        yield from _ltx_layers(f"decoder.up_blocks.{place + 1}", channels, layers)
        place += 2
    yield from _causal("decoder.conv_out", _LTX_COLOURS, channels)


def ltx_vae_091(width: int, latent: int) -> Shapes:
    """That of LTX-Video 0.9.1: a decoder that knows the time, and adds noise in all but its first block."""
    yield from _ltx_encoder(width, latent)
    yield from _ltx_timed_decoder(width, latent, (8, 7, 6, 5), noise=True)


def ltx_vae_095(width: int, latent: int) -> Shapes:
    """That of LTX-Video from 0.9.5 on: an encoder of five widths."""
    yield from _ltx_statistics(latent)
    yield from _causal("encoder.conv_in", width, _LTX_COLOURS)
    for level, (layers, folded) in enumerate(((4, 4), (6, 2), (6, 8), (2, 8))):
        channels = width * 2**level
        yield from _ltx_layers(f"encoder.down_blocks.{2 * level}", channels, layers)
        yield from _causal(f"encoder.down_blocks.{2 * level + 1}.conv", 2 * channels // folded, channels)
    yield from _ltx_layers("encoder.down_blocks.8", 16 * width, 2)
    yield from _causal("encoder.conv_out", latent + 1, 16 * width)
    yield from _ltx_timed_decoder(width, latent, (5, 5, 5, 5), noise=False)


_LTX_COLOURS = 48
"""Three colours of patches of 4 x 4 pixels."""


def _ltx_statistics(latent: int) -> Shapes:
    yield from ((f"per_channel_statistics.{one}-of-means", (latent,)) for one in ("mean", "std"))


def _ltx_encoder(width: int, latent: int) -> Shapes:
    """The encoder of 0.9.0 and 0.9.1, and what is known of its latents."""
    yield from _ltx_statistics(latent)
    yield from _causal("encoder.conv_in", width, _LTX_COLOURS)
    place, channels = 0, width
    for level, layers in enumerate((4, 3, 3, 3)):
        yield from _ltx_layers(f"encoder.down_blocks.{place}", channels, layers)
        if level < 3:
            yield from _cube(f"encoder.down_blocks.{place + 1}.conv", channels, channels)
            place += 2
        if level < 2:
            yield from _ltx_change(f"encoder.down_blocks.{place}", channels, 2 * channels)
            place, channels = place + 1, 2 * channels
    yield from _ltx_layers(f"encoder.down_blocks.{place + 1}", channels, 4)
    yield from _causal("encoder.conv_out", latent + 1, channels)


def _ltx_timed_decoder(width: int, latent: int, layers: tuple[int, ...], *, noise: bool) -> Shapes:
    yield "decoder.timestep_scale_multiplier", ()
    yield "decoder.last_scale_shift_table", (2, width)
    yield from _causal("decoder.conv_in", 8 * width, latent)
    for level, count in enumerate(layers):
        channels, name = 8 * width >> level, f"decoder.up_blocks.{2 * level}"
        if level:
            yield from _causal(f"decoder.up_blocks.{2 * level - 1}.conv", 8 * channels, 2 * channels)
        yield from _ltx_time(name, "time_embedder", 4 * channels)
        yield from _ltx_layers(name, channels, count)
        for layer in range(count):
            yield f"{name}.res_blocks.{layer}.scale_shift_table", (4, channels)
            if noise and level:
                yield f"{name}.res_blocks.{layer}.per_channel_scale1", (channels, 1, 1)
                yield f"{name}.res_blocks.{layer}.per_channel_scale2", (channels, 1, 1)
    yield from _causal("decoder.conv_out", _LTX_COLOURS, width)
    yield from _ltx_time("decoder", "last_time_embedder", 2 * width)


def _ltx_time(name: str, embedder: str, width: int) -> Shapes:
    yield from linear(f"{name}.{embedder}.timestep_embedder.linear_1", width, 256)
    yield from linear(f"{name}.{embedder}.timestep_embedder.linear_2", width, width)


def _ltx_layers(name: str, width: int, count: int) -> Shapes:
    for layer in range(count):
        yield from _causal(f"{name}.res_blocks.{layer}.conv1", width, width)
        yield from _causal(f"{name}.res_blocks.{layer}.conv2", width, width)


def _ltx_change(name: str, into: int, out: int) -> Shapes:
    """A layer that changes the width."""
    yield from _causal(f"{name}.conv1", out, into)
    yield from _causal(f"{name}.conv2", out, out)
    yield from norm(f"{name}.norm3.norm", into)
    yield from _cube(f"{name}.conv_shortcut", out, into, 1)


def _causal(name: str, out: int, into: int) -> Shapes:
    yield from _cube(f"{name}.conv", out, into)


def _cube(name: str, out: int, into: int, kernel: int = 3) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, into, kernel, kernel, kernel)
    yield f"{name}.bias", (out,)


AUTOENCODERS: Mapping[str, Callable[[Narrow], Shapes]] = MappingProxyType(
    {
        "wan_vae": lambda narrow: wan_vae(narrow(96), 16),
        "wan22_vae": lambda narrow: wan22_vae(narrow(160), narrow(256), 48),
        "hunyuan_video_vae": lambda narrow: hunyuan_video_vae(narrow(128), 16),
        "ltx_vae": lambda narrow: ltx_vae(narrow(128), 128),
        "ltx_vae_091": lambda narrow: ltx_vae_091(narrow(128), 128),
        "ltx_vae_095": lambda narrow: ltx_vae_095(narrow(128), 128),
    }
)
"""Of each arch a published model, narrowed."""
