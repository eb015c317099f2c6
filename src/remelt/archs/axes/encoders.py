"""Text encoders inside a checkpoint, and the maps of a transformer that read what they put out."""

from __future__ import annotations

from collections.abc import Sequence

from remelt.archs.axes.clip import USUAL as OF_TEXT
from remelt.archs.axes.clip import Text, clip_text
from remelt.archs.axes.draft import Draft, Drafts
from remelt.archs.axes.heads import HeadRule, Heads
from remelt.archs.axes.t5 import t5, width_of
from remelt.archs.axes.transformer import fix, fixed
from remelt.archs.axes.vae import USUAL as OF_VAE

OF_ENCODERS: Heads = {**OF_TEXT, **OF_VAE}
TO_TRANSFORMER = "text transformer"


def clip_below(drafts: Drafts, root: str, name: str, rule: HeadRule) -> Text | None:
    """A CLIP in transformers' layout; None where it is not there."""
    for inner in ("transformer.text_model.", "transformer."):
        if f"{root}{inner}embeddings.token_embedding.weight" in drafts.shapes:
            return clip_text(drafts, f"{root}{inner}", name, rule)
    return None


def t5_below(drafts: Drafts, root: str, name: str, rule: HeadRule | None) -> Draft | None:
    """The encoder of a T5 with a stream of its own; None where it is not there."""
    if f"{root}encoder.final_layer_norm.weight" not in drafts.shapes:
        return None
    stream = drafts.free(f"{name}.stream", width_of(drafts.shapes, root))
    t5(drafts, root, name, [(stream, 0)], rule)
    return stream


def reads(drafts: Drafts, module: str, parts: Sequence[Draft | None]) -> None:
    """A map that reads what encoders put out, one after the other: it ties them to the transformer.

    Where one of them is not there, or the map is not, whatever stands in its place is known by nobody: all are fixed.
    """
    shape = drafts.shapes.get(f"{module}.weight")
    known = [part for part in parts if part is not None]
    if shape is None or len(known) < len(parts) or sum(part.size for part in known) != shape[1]:
        for part in known:
            fix(part)
        fixed(drafts, f"{module}.weight", 1)
        return
    offset = 0
    for part in known:
        part.read_by(module, offset=offset).crosses = TO_TRANSFORMER
        offset += part.size
