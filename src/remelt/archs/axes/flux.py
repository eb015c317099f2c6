"""The axis groups of Flux.1: blocks with a stream for images and one for texts, then blocks in which both are one."""

from __future__ import annotations

from remelt.archs.axes.draft import HEAD, VALUE, Draft, Drafts
from remelt.archs.axes.encoders import OF_ENCODERS, clip_below, reads, t5_below
from remelt.archs.axes.heads import HeadRule, Heads
from remelt.archs.axes.transformer import feed_forward, fix, fixed, made_fused, modulated_by, numbers_after
from remelt.archs.axes.vae import autoencoder
from remelt.archs.axis_groups import AxisGroup, Shapes

USUAL_HEADS = HeadRule(size=128)
_ROOT = "model.diffusion_model."
_GUIDE = "distilled_guidance_layer"
_NORMS = ("query_norm", "key_norm")


def flux_groups(shapes: Shapes, heads: Heads) -> tuple[AxisGroup, ...]:
    """A checkpoint of Flux.1, or of Chroma: the transformer, CLIP-L (its last token, as it is), T5, and a VAE."""
    rules, drafts = {**OF_ENCODERS, "model": USUAL_HEADS, **heads}, Drafts(shapes)
    if f"{_ROOT}img_in.weight" in shapes:
        flux(drafts, _ROOT, "transformer", rules["model"])
    text = clip_below(drafts, "text_encoders.clip_l.", "clip_l", rules["text"])
    if text is not None and text.pooled is not None:
        fix(text.pooled)
    reads(drafts, f"{_ROOT}vector_in.in_layer", [text.stream if text else None])
    reads(drafts, f"{_ROOT}txt_in", [t5_below(drafts, "text_encoders.t5xxl.transformer.", "t5xxl", rules.get("t5"))])
    autoencoder(drafts, ("vae.", "first_stage_model."), rules["vae"])
    return drafts.finished()


def flux(drafts: Drafts, root: str, name: str, rule: HeadRule) -> None:
    """All groups of the transformer, but for the columns that read the text encoders (`txt_in`, `vector_in`).

    The single blocks read texts and images one after the other, so that the streams of both have the same channels.
    Rotary embeddings forbid that channels of queries and keys move.
    """
    stream = drafts.free(f"{name}.stream", drafts.shapes[f"{root}img_in.weight"][0])
    condition = drafts.free(f"{name}.condition", stream.size)
    stream.made_by(f"{root}img_in").made_by(f"{root}txt_in")
    fixed(drafts, f"{root}img_in.weight", 1, f"{name}.latents_in")
    for embedder in ("time_in", "vector_in", "guidance_in"):
        into, out = f"{root}{embedder}.in_layer", f"{root}{embedder}.out_layer"
        feed_forward(drafts, f"{name}.{embedder}", into, out)
        condition.made_by(out)
        if embedder != "vector_in":
            fixed(drafts, f"{into}.weight", 1, f"{name}.{embedder}.time")
    _guide(drafts, f"{root}{_GUIDE}", f"{name}.{_GUIDE}", stream)
    for number in numbers_after(drafts.shapes, f"{root}double_blocks."):
        _double(drafts, f"{root}double_blocks.{number}", f"{name}.double_blocks.{number}", stream, condition, rule)
    for number in numbers_after(drafts.shapes, f"{root}single_blocks."):
        _single(drafts, f"{root}single_blocks.{number}", f"{name}.single_blocks.{number}", stream, condition, rule)
    modulated_by(stream, f"{root}final_layer.adaLN_modulation.1").read_by(f"{root}final_layer.linear")
    condition.read_by(f"{root}final_layer.adaLN_modulation.1")
    fixed(drafts, f"{root}final_layer.linear.weight", 0, f"{name}.latents_out")


def _guide(drafts: Drafts, module: str, name: str, stream: Draft) -> None:
    """Chroma's network that makes the modulation of all blocks, each part of which is as wide as the stream."""
    if f"{module}.in_proj.weight" not in drafts.shapes:
        return
    guide = drafts.free(name, drafts.shapes[f"{module}.in_proj.weight"][0]).made_by(f"{module}.in_proj")
    fixed(drafts, f"{module}.in_proj.weight", 1, f"{name}.time")
    for number in numbers_after(drafts.shapes, f"{module}.layers."):
        layer = f"{module}.layers.{number}"
        feed_forward(drafts, f"{name}.layers.{number}", f"{layer}.in_layer", f"{layer}.out_layer")
        guide.read_by(f"{layer}.in_layer").made_by(f"{layer}.out_layer").window(f"{module}.norms.{number}.scale", 0)
    guide.read_by(f"{module}.out_proj")
    stream.made_by(f"{module}.out_proj")


def _double(drafts: Drafts, block: str, name: str, stream: Draft, condition: Draft, rule: HeadRule) -> None:
    width = drafts.shapes[f"{block}.img_attn.proj.weight"][1]
    attention = _heads(drafts, f"{name}.attn", width, f"{block}.img_attn", rule)
    for part in ("img", "txt"):
        made_fused(attention, f"{block}.{part}_attn.qkv").read_by(f"{block}.{part}_attn.proj", (HEAD, VALUE))
        _fix_norms(drafts, f"{block}.{part}_attn", f"{name}.{part}_attn")
        feed_forward(drafts, f"{name}.{part}_mlp", f"{block}.{part}_mlp.0", f"{block}.{part}_mlp.2")
        stream.read_by(f"{block}.{part}_attn.qkv").made_by(f"{block}.{part}_attn.proj")
        stream.read_by(f"{block}.{part}_mlp.0").made_by(f"{block}.{part}_mlp.2")
        modulated_by(stream, f"{block}.{part}_mod.lin")
        condition.read_by(f"{block}.{part}_mod.lin")


def _single(drafts: Drafts, block: str, name: str, stream: Draft, condition: Draft, rule: HeadRule) -> None:
    """A block whose attention and feed-forward network lie side by side: one map in, one map out."""
    width = stream.size
    hidden = drafts.shapes[f"{block}.linear2.weight"][1] - width
    attention = made_fused(_heads(drafts, f"{name}.attn", width, block, rule), f"{block}.linear1")
    attention.read_by(f"{block}.linear2", (HEAD, VALUE))
    _fix_norms(drafts, block, name)
    drafts.free(f"{name}.mlp", hidden).made_by(f"{block}.linear1", offset=3 * width).read_by(
        f"{block}.linear2", offset=width
    )
    stream.read_by(f"{block}.linear1").made_by(f"{block}.linear2")
    modulated_by(stream, f"{block}.modulation.lin")
    condition.read_by(f"{block}.modulation.lin")


def _heads(drafts: Drafts, name: str, width: int, module: str, rule: HeadRule) -> Draft:
    norm = drafts.shapes.get(f"{module}.norm.{_NORMS[0]}.scale")
    heads = width // norm[0] if norm else rule.heads(width)
    return drafts.attention(name, heads, width // heads, rotary=True)


def _fix_norms(drafts: Drafts, module: str, name: str) -> None:
    """Channels of queries and keys stay where rotary embeddings turn them."""
    for norm in _NORMS:
        fixed(drafts, f"{module}.norm.{norm}.scale", 0, f"{name}.{norm}")
