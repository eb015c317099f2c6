"""The axis groups of whole checkpoints of SD3 and SD3.5: a transformer, CLIP-L, CLIP-G, T5, and a VAE."""

from __future__ import annotations

from remelt.archs.axes.draft import Drafts
from remelt.archs.axes.encoders import OF_ENCODERS, clip_below, reads
from remelt.archs.axes.heads import Heads
from remelt.archs.axes.mmdit import USUAL_HEADS, mmdit
from remelt.archs.axes.t5 import t5, width_of
from remelt.archs.axes.vae import autoencoder
from remelt.archs.axis_groups import AxisGroup, Shapes

_ROOT = "model.diffusion_model."
_T5 = "text_encoders.t5xxl.transformer."


def sd3_groups(shapes: Shapes, heads: Heads) -> tuple[AxisGroup, ...]:
    """All groups of a checkpoint of SD3 or SD3.5; any of its parts may be missing.

    The transformer reads tokens of both CLIPs, side by side and filled up to the width of T5's, and T5's tokens with
    the same map: so the channels of T5's stream are those of CLIP-L, those of CLIP-G, and the rest.
    """
    rules, drafts = {**OF_ENCODERS, "model": USUAL_HEADS, **heads}, Drafts(shapes)
    if f"{_ROOT}x_embedder.proj.weight" in shapes:
        mmdit(drafts, _ROOT, "transformer", rules["model"])
    texts = [
        clip_below(drafts, f"text_encoders.{name}.", name, rules[part])
        for name, part in (("clip_l", "text"), ("clip_g", "text_2"))
    ]
    reads(drafts, f"{_ROOT}y_embedder.mlp.0", [text.pooled if text else None for text in texts])
    streams = [text.stream if text else None for text in texts]
    if f"{_T5}encoder.final_layer_norm.weight" in shapes:
        width = width_of(shapes, _T5)
        known = [stream for stream in streams if stream is not None]
        rest = width - sum(stream.size for stream in known)
        if len(known) == len(streams) and rest > 0:
            own = drafts.free("t5xxl.stream", rest)
            t5(drafts, _T5, "t5xxl", [(known[0], 0), (known[1], known[0].size), (own, width - rest)], rules.get("t5"))
            streams.append(own)
        else:
            t5(drafts, _T5, "t5xxl", [(drafts.fixed("t5xxl.stream", width), 0)], rules.get("t5"))
            streams.append(None)
    reads(drafts, f"{_ROOT}context_embedder", streams if len(streams) > len(texts) else [*streams, None])
    autoencoder(drafts, ("first_stage_model.", "vae."), rules["vae"])
    return drafts.finished()
