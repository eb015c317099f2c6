"""The axis groups of whole checkpoints of Stable Diffusion: a U-Net, what it is told by text encoders, and a VAE.

A file may hold any of these parts; a U-Net alone may lack its prefix.
"""

from __future__ import annotations

from collections.abc import Sequence

from remelt.archs.axes.clip import USUAL as OF_TEXT
from remelt.archs.axes.clip import Text, clip_text, open_clip_text
from remelt.archs.axes.draft import Draft, Drafts
from remelt.archs.axes.heads import HeadRule, Heads
from remelt.archs.axes.unet import FIRST, UNet, context_width
from remelt.archs.axes.vae import USUAL as OF_VAE
from remelt.archs.axes.vae import autoencoder
from remelt.archs.axis_groups import AxisGroup, Shapes

_BY_SIZE: Heads = {**OF_TEXT, **OF_VAE, "unet": HeadRule(size=64)}
_EIGHT: Heads = {**_BY_SIZE, "unet": HeadRule(count=8)}
_UNETS = ("model.diffusion_model.", "")
_VAES = ("first_stage_model.",)


def sd1_groups(shapes: Shapes, heads: Heads) -> tuple[AxisGroup, ...]:
    """Stable Diffusion 1: eight heads everywhere, CLIP-L."""
    rules, drafts = {**_EIGHT, **heads}, Drafts(shapes)
    text = _clip(drafts, ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."), rules["text"])
    return _whole(drafts, rules, [text])


def sd2_groups(shapes: Shapes, heads: Heads) -> tuple[AxisGroup, ...]:
    """Stable Diffusion 2: heads of 64 channels, OpenCLIP-H. Images that unCLIP is guided by come from outside."""
    rules, drafts = {**_BY_SIZE, **heads}, Drafts(shapes)
    text = _open_clip(drafts, "cond_stage_model.model.", "text", rules["text"])
    return _whole(drafts, rules, [None if text is None else Text(text.stream)])


def sdxl_groups(shapes: Shapes, heads: Heads) -> tuple[AxisGroup, ...]:
    """Stable Diffusion XL: heads of 64 channels, CLIP-L and OpenCLIP-G one after the other."""
    rules, drafts = {**_BY_SIZE, **heads}, Drafts(shapes)
    folder = "conditioner.embedders.0.transformer."
    small = _clip(drafts, (f"{folder}text_model.", folder), rules["text"])
    large = _open_clip(drafts, "conditioner.embedders.1.model.", "text_2", rules["text_2"])
    return _whole(drafts, rules, [small, large])


def sdxl_refiner_groups(shapes: Shapes, heads: Heads) -> tuple[AxisGroup, ...]:
    """The refiner of Stable Diffusion XL: heads of 64 channels, OpenCLIP-G."""
    rules, drafts = {**_BY_SIZE, **heads}, Drafts(shapes)
    return _whole(drafts, rules, [_open_clip(drafts, "conditioner.embedders.0.model.", "text", rules["text"])])


def _whole(drafts: Drafts, rules: Heads, texts: Sequence[Text | None]) -> tuple[AxisGroup, ...]:
    root = next((one for one in _UNETS if one + FIRST in drafts.shapes), None)
    if root is not None:
        UNet(drafts, root, rules["unet"], _places(texts, context_width(drafts, root)), _pooled(texts))
    autoencoder(drafts, _VAES, rules["vae"])
    return drafts.finished()


def _clip(drafts: Drafts, roots: Sequence[str], rule: HeadRule) -> Text | None:
    root = next((one for one in roots if f"{one}embeddings.token_embedding.weight" in drafts.shapes), None)
    return None if root is None else clip_text(drafts, root, "text", rule)


def _open_clip(drafts: Drafts, root: str, name: str, rule: HeadRule) -> Text | None:
    present = f"{root}token_embedding.weight" in drafts.shapes
    return open_clip_text(drafts, root, name, rule) if present else None


def _places(texts: Sequence[Text | None], width: int) -> list[tuple[Draft, int]]:
    """Where each text encoder's stream lies in the context: the first at its beginning, the second at its end."""
    places = []
    for number, text in enumerate(texts):
        if text is not None:
            places.append((text.stream, 0 if number == 0 else max(width - text.stream.size, 0)))
    return places


def _pooled(texts: Sequence[Text | None]) -> list[tuple[Draft, int]]:
    """What the label embedding reads of the last text encoder comes first, before sizes."""
    last = texts[-1]
    return [] if last is None or last.pooled is None else [(last.pooled, 0)]
