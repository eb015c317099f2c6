"""Key names and shapes of models that make videos, in the layout of their authors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from remelt.archs.model_parts import Narrow, Shapes, linear, norm


def wan(
    root: str,
    layers: int,
    width: int,
    inner: int,
    text: int,
    *,
    in_channels: int = 16,
    out_channels: int = 16,
    image: int | None = None,
    vace_layers: int = 0,
) -> Shapes:
    """The transformer of Wan 2.1 and 2.2.

    ``image`` is the width of CLIP's picture of the first frame, which Wan 2.1 looks at to go on from an image;
    ``vace_layers`` are blocks of a VACE, which is guided by a video of 96 channels.
    """
    yield from _patches(f"{root}patch_embedding", width, in_channels)
    for name, into in (("text_embedding", text), ("time_embedding", 256)):
        yield from linear(f"{root}{name}.0", width, into)
        yield from linear(f"{root}{name}.2", width, width)
    yield from linear(f"{root}time_projection.1", 6 * width, width)
    for layer in range(layers):
        yield from _wan_block(f"{root}blocks.{layer}", width, inner, image is not None)
    yield from linear(f"{root}head.head", 4 * out_channels, width)
    yield f"{root}head.modulation", (1, 2, width)
    if image is not None:
        yield from norm(f"{root}img_emb.proj.0", image)
        yield from linear(f"{root}img_emb.proj.1", image, image)
        yield from linear(f"{root}img_emb.proj.3", width, image)
        yield from norm(f"{root}img_emb.proj.4", width)
    if vace_layers:
        yield from _patches(f"{root}vace_patch_embedding", width, 96)
    for layer in range(vace_layers):
        name = f"{root}vace_blocks.{layer}"
        yield from _wan_block(name, width, inner, image is not None)
        for end in ("before_proj", "after_proj") if layer == 0 else ("after_proj",):
            yield from linear(f"{name}.{end}", width, width)


def _wan_block(name: str, width: int, inner: int, image: bool) -> Shapes:
    yield f"{name}.modulation", (1, 6, width)
    for attention in ("self_attn", "cross_attn"):
        for letter in "qkvo":
            yield from linear(f"{name}.{attention}.{letter}", width, width)
        yield from ((f"{name}.{attention}.norm_{letter}.weight", (width,)) for letter in "qk")
    if image:
        for letter in "kv":
            yield from linear(f"{name}.cross_attn.{letter}_img", width, width)
        yield f"{name}.cross_attn.norm_k_img.weight", (width,)
    yield from norm(f"{name}.norm3", width)
    yield from linear(f"{name}.ffn.0", inner, width)
    yield from linear(f"{name}.ffn.2", width, inner)


def _patches(name: str, out: int, into: int) -> Shapes:
    yield f"{name}.weight", (out, into, 1, 2, 2)
    yield f"{name}.bias", (out,)


def hunyuan_video(
    root: str,
    double: int,
    single: int,
    width: int,
    head: int,
    text: int,
    pooled: int,
    *,
    in_channels: int = 16,
    guidance: bool = True,
) -> Shapes:
    """The transformer of HunyuanVideo: blocks of two streams, then of one; the text is refined in two blocks."""
    yield from _patches(f"{root}img_in.proj", width, in_channels)
    yield from linear(f"{root}txt_in.input_embedder", width, text)
    yield from linear(f"{root}txt_in.c_embedder.linear_1", width, text)
    yield from linear(f"{root}txt_in.c_embedder.linear_2", width, width)
    for name in ("txt_in.t_embedder", "time_in", *(("guidance_in",) if guidance else ())):
        yield from linear(f"{root}{name}.mlp.0", width, 256)
        yield from linear(f"{root}{name}.mlp.2", width, width)
    for block in range(2):
        name = f"{root}txt_in.individual_token_refiner.blocks.{block}"
        for number in (1, 2):
            yield from norm(f"{name}.norm{number}", width)
        yield from linear(f"{name}.self_attn_qkv", 3 * width, width)
        yield from linear(f"{name}.self_attn_proj", width, width)
        yield from linear(f"{name}.mlp.fc1", 4 * width, width)
        yield from linear(f"{name}.mlp.fc2", width, 4 * width)
        yield from linear(f"{name}.adaLN_modulation.1", 2 * width, width)
    yield from linear(f"{root}vector_in.in_layer", width, pooled)
    yield from linear(f"{root}vector_in.out_layer", width, width)
    for block in range(double):
        for stream in ("img", "txt"):
            name = f"{root}double_blocks.{block}.{stream}"
            yield from linear(f"{name}_mod.linear", 6 * width, width)
            yield from linear(f"{name}_attn_qkv", 3 * width, width)
            yield from ((f"{name}_attn_{letter}_norm.weight", (head,)) for letter in "qk")
            yield from linear(f"{name}_attn_proj", width, width)
            yield from linear(f"{name}_mlp.fc1", 4 * width, width)
            yield from linear(f"{name}_mlp.fc2", width, 4 * width)
    for block in range(single):
        name = f"{root}single_blocks.{block}"
        yield from linear(f"{name}.linear1", 7 * width, width)
        yield from linear(f"{name}.linear2", width, 5 * width)
        yield from ((f"{name}.{letter}_norm.weight", (head,)) for letter in "qk")
        yield from linear(f"{name}.modulation.linear", 3 * width, width)
    yield from linear(f"{root}final_layer.linear", 4 * 16, width)
    yield from linear(f"{root}final_layer.adaLN_modulation.1", 2 * width, width)


def ltx(root: str, layers: int, width: int, text: int, channels: int = 128) -> Shapes:
    """The transformer of LTX-Video."""
    yield from linear(f"{root}patchify_proj", width, channels)
    yield from linear(f"{root}proj_out", channels, width)
    yield f"{root}scale_shift_table", (2, width)
    yield from _embedded_time(f"{root}adaln_single", width, 6)
    yield from _captions(f"{root}caption_projection", width, text)
    for layer in range(layers):
        name = f"{root}transformer_blocks.{layer}"
        yield f"{name}.scale_shift_table", (6, width)
        for attention in ("attn1", "attn2"):
            yield from _attention(f"{name}.{attention}", width, width, width)
        yield from _feed_forward(f"{name}.ff", width)


def ltx2(root: str, layers: int, video: int, audio: int, text: int, channels: int = 128) -> Shapes:
    """The transformer of LTX-2: a stream of video, a narrower one of sound, and attention between them."""
    for start, width in (("", video), ("audio_", audio)):
        yield from linear(f"{root}{start}patchify_proj", width, channels)
        yield from linear(f"{root}{start}proj_out", channels, width)
        yield f"{root}{start}scale_shift_table", (2, width)
        yield from _embedded_time(f"{root}{start}adaln_single", width, 6)
        yield from _captions(f"{root}{start}caption_projection", width, text)
    for name, width, rows in (("video_scale_shift", video, 4), ("a2v_gate", video, 1)):
        yield from _embedded_time(f"{root}av_ca_{name}_adaln_single", width, rows)
    for name, width, rows in (("audio_scale_shift", audio, 4), ("v2a_gate", audio, 1)):
        yield from _embedded_time(f"{root}av_ca_{name}_adaln_single", width, rows)
    for layer in range(layers):
        block = f"{root}transformer_blocks.{layer}"
        for start, width, other in (("", video, "video"), ("audio_", audio, "audio")):
            yield f"{block}.{start}scale_shift_table", (6, width)
            yield f"{block}.scale_shift_table_a2v_ca_{other}", (5, width)
            for attention in ("attn1", "attn2"):
                yield from _attention(f"{block}.{start}{attention}", width, width, width)
            yield from _feed_forward(f"{block}.{start}ff", width)
        yield from _attention(f"{block}.audio_to_video_attn", video, audio, audio)
        yield from _attention(f"{block}.video_to_audio_attn", audio, video, audio)


def _attention(name: str, into: int, other: int, width: int) -> Shapes:
    """Attention of a stream to an ``other`` one, at a ``width`` of its own, with norms over all heads."""
    for letter, source in (("q", into), ("k", other), ("v", other)):
        yield from linear(f"{name}.to_{letter}", width, source)
    yield from linear(f"{name}.to_out.0", into, width)
    yield from ((f"{name}.{letter}_norm.weight", (width,)) for letter in "qk")


def _feed_forward(name: str, width: int) -> Shapes:
    yield from linear(f"{name}.net.0.proj", 4 * width, width)
    yield from linear(f"{name}.net.2", width, 4 * width)


def _embedded_time(name: str, width: int, rows: int) -> Shapes:
    yield from linear(f"{name}.emb.timestep_embedder.linear_1", width, 256)
    yield from linear(f"{name}.emb.timestep_embedder.linear_2", width, width)
    yield from linear(f"{name}.linear", rows * width, width)


def _captions(name: str, width: int, text: int) -> Shapes:
    yield from linear(f"{name}.linear_1", width, text)
    yield from linear(f"{name}.linear_2", width, width)


_ROOT = "model.diffusion_model."

VIDEO_MODELS: Mapping[str, Callable[[Narrow], Shapes]] = MappingProxyType(
    {
        "wan": lambda narrow: wan(_ROOT, 40, narrow(5120), narrow(13824), narrow(4096)),
        "hunyuan_video": lambda narrow: hunyuan_video(
            _ROOT, 20, 40, narrow(3072), narrow(128), narrow(4096), narrow(768)
        ),
        "ltx": lambda narrow: ltx(_ROOT, 28, narrow(2048), narrow(4096)),
        "ltx2": lambda narrow: ltx2(_ROOT, 48, narrow(4096), narrow(2048), narrow(3840)),
    }
)
"""Of each arch a published model, narrowed."""
