"""Key names and shapes of the autoencoders of models that make videos, in the layout of their single files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from remelt.archs.model_parts import Narrow, Shapes, vae

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


def _cube(name: str, out: int, into: int, kernel: int = 3) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, into, kernel, kernel, kernel)
    yield f"{name}.bias", (out,)


AUTOENCODERS: Mapping[str, Callable[[Narrow], Shapes]] = MappingProxyType(
    {
        "wan_vae": lambda narrow: wan_vae(narrow(96), 16),
        "wan22_vae": lambda narrow: wan22_vae(narrow(160), narrow(256), 48),
        "hunyuan_video_vae": lambda narrow: hunyuan_video_vae(narrow(128), 16),
    }
)
"""Of each arch a published model, narrowed."""
