"""The axis groups of CLIP's encoders of texts and images, as transformers and open_clip name them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from remelt.archs.axes.convolutions import pin
from remelt.archs.axes.draft import HEAD, QK, VALUE, Draft, Drafts
from remelt.archs.axes.heads import HeadRule, Heads
from remelt.archs.axis_groups import AxisGroup, Shapes

USUAL: Heads = {"text": HeadRule(size=64), "text_2": HeadRule(size=64), "vision": HeadRule(count=16)}
"""All of CLIP's and OpenCLIP's text encoders have heads of 64 channels; all that are of size L or more see with 16."""
TO_UNET = "text unet"
"""What a text encoder's stream crosses: whoever reads embeddings, be it a U-Net in the file or another one."""


@dataclass(frozen=True)
class Names:
    """What the parts of an encoder are called in one layout; attention has its three projections fused in one."""

    layers: str
    norms: tuple[str, str]
    attention: str
    fused: bool
    mlp: tuple[str, str]


TRANSFORMERS = Names("encoder.layers.", ("layer_norm1", "layer_norm2"), "self_attn", False, ("mlp.fc1", "mlp.fc2"))
OPEN_CLIP = Names("transformer.resblocks.", ("ln_1", "ln_2"), "attn", True, ("mlp.c_fc", "mlp.c_proj"))


@dataclass(frozen=True)
class Text:
    """What others read of a text encoder: its stream, and the projection of its last token, where it has one."""

    stream: Draft
    pooled: Draft | None = None


def clip_text(drafts: Drafts, root: str, name: str, heads: HeadRule, *, alone: bool = False) -> Text:
    """A text encoder as transformers names it; ``root`` ends where ``embeddings.`` begins.

    Its stream crosses to what reads the embeddings, unless the model stands ``alone``, as one of texts and images does.
    """
    table = f"{root}embeddings.token_embedding.weight"
    stream = drafts.free(f"{name}.stream", drafts.shapes[table][1], "" if alone else TO_UNET)
    stream.window(table, 1).window(f"{root}embeddings.position_embedding.weight", 1)
    pin(drafts, f"{name}.vocabulary", table, 0)
    pin(drafts, f"{name}.positions", f"{root}embeddings.position_embedding.weight", 0)
    _layers(drafts, stream, root, name, heads, TRANSFORMERS)
    stream.normalised_by(f"{root}final_layer_norm")
    projection = f"{root.removesuffix('text_model.')}text_projection"
    stream.read_by(projection)
    return Text(stream, _projected(drafts, f"{projection}.weight", 0, name, alone))


def open_clip_text(drafts: Drafts, root: str, name: str, heads: HeadRule) -> Text:
    """A text encoder as open_clip names it; its projection is a matrix with the stream on its rows.

    Some files hold the mask of its attention, which is the same for all models.
    """
    for axis in (0, 1):
        pin(drafts, f"{name}.mask.{axis}", f"{root}attn_mask", axis)
    table = f"{root}token_embedding.weight"
    stream = drafts.free(f"{name}.stream", drafts.shapes[table][1], TO_UNET)
    stream.window(table, 1).window(f"{root}positional_embedding", 1)
    pin(drafts, f"{name}.vocabulary", table, 0)
    pin(drafts, f"{name}.positions", f"{root}positional_embedding", 0)
    _layers(drafts, stream, root, name, heads, OPEN_CLIP)
    stream.normalised_by(f"{root}ln_final").window(f"{root}text_projection", 0)
    return Text(stream, _projected(drafts, f"{root}text_projection", 1, name, alone=False))


def clip_vision(drafts: Drafts, root: str, name: str, heads: HeadRule) -> None:
    """An image encoder as transformers names it; ``root`` ends where ``embeddings.`` begins."""
    embeddings = f"{root}embeddings."
    stream = drafts.free(f"{name}.stream", drafts.shapes[f"{embeddings}class_embedding"][0])
    stream.window(f"{embeddings}class_embedding", 0).made_by(f"{embeddings}patch_embedding")
    stream.window(f"{embeddings}position_embedding.weight", 1)
    pin(drafts, f"{name}.pixels", f"{embeddings}patch_embedding.weight", 1)
    pin(drafts, f"{name}.positions", f"{embeddings}position_embedding.weight", 0)
    stream.normalised_by(f"{root}pre_layrnorm")  # transformers' spelling
    _layers(drafts, stream, root, name, heads, TRANSFORMERS)
    stream.normalised_by(f"{root}post_layernorm")
    projection = f"{root.removesuffix('vision_model.')}visual_projection"
    stream.read_by(projection)
    pin(drafts, f"{name}.projected", f"{projection}.weight", 0)


def open_clip_vision(drafts: Drafts, root: str, name: str, heads: HeadRule) -> None:
    """An image encoder as open_clip names it, if it is there; ``root`` ends where ``conv1.`` begins."""
    if f"{root}class_embedding" not in drafts.shapes:
        return
    stream = drafts.free(f"{name}.stream", drafts.shapes[f"{root}class_embedding"][0])
    stream.window(f"{root}class_embedding", 0).made_by(f"{root}conv1").window(f"{root}positional_embedding", 1)
    pin(drafts, f"{name}.pixels", f"{root}conv1.weight", 1)
    pin(drafts, f"{name}.positions", f"{root}positional_embedding", 0)
    stream.normalised_by(f"{root}ln_pre")
    _layers(drafts, stream, root, name, heads, OPEN_CLIP)
    stream.normalised_by(f"{root}ln_post").window(f"{root}proj", 0)
    pin(drafts, f"{name}.projected", f"{root}proj", 1)


def _layers(drafts: Drafts, stream: Draft, root: str, name: str, heads: HeadRule, names: Names) -> None:
    """The layers of an encoder, as many as there are."""
    for number in _numbers(drafts.shapes, f"{root}{names.layers}", f".{names.norms[0]}.weight"):
        layer, called = f"{root}{names.layers}{number}", f"{name}.layers.{number}"
        for norm in names.norms:
            stream.normalised_by(f"{layer}.{norm}")
        _attention(drafts, stream, f"{layer}.{names.attention}", f"{called}.attention", heads, fused=names.fused)
        into, out = (f"{layer}.{one}" for one in names.mlp)
        drafts.free(f"{called}.mlp", drafts.shapes[f"{into}.weight"][0]).made_by(into).read_by(out)
        stream.read_by(into).made_by(out)


def _numbers(shapes: Shapes, start: str, end: str) -> Iterator[int]:
    number = 0
    while f"{start}{number}{end}" in shapes:
        yield number
        number += 1


def _attention(drafts: Drafts, stream: Draft, module: str, name: str, rule: HeadRule, *, fused: bool) -> None:
    width = drafts.shapes[f"{module}.out_proj.weight"][1]
    heads = rule.heads(width)
    attention = drafts.attention(name, heads, width // heads)
    for place, (projection, level) in enumerate((("q_proj", QK), ("k_proj", QK), ("v_proj", VALUE))):
        if fused:
            for tensor in ("in_proj_weight", "in_proj_bias"):
                attention.window(f"{module}.{tensor}", 0, (HEAD, level), offset=place * width)
        else:
            attention.made_by(f"{module}.{projection}", (HEAD, level))
            stream.read_by(f"{module}.{projection}")
    stream.window(f"{module}.in_proj_weight", 1).made_by(f"{module}.out_proj")
    attention.read_by(f"{module}.out_proj", (HEAD, VALUE))


def _projected(drafts: Drafts, key: str, axis: int, name: str, alone: bool) -> Draft | None:
    """What a text is projected to: it crosses to what reads it. One that is compared with images is fixed."""
    if key not in drafts.shapes:
        return None
    if alone:
        pin(drafts, f"{name}.projected", key, axis)
        return None
    return drafts.free(f"{name}.pooled", drafts.shapes[key][axis], TO_UNET).window(key, axis)


def clip_groups(shapes: Shapes, heads: Heads) -> tuple[AxisGroup, ...]:
    """A file of CLIP in transformers' layout: texts alone, or texts and images."""
    rules, drafts = {**USUAL, **heads}, Drafts(shapes)
    sees = "vision_model.embeddings.class_embedding" in shapes
    root = next((one for one in ("text_model.", "") if f"{one}embeddings.token_embedding.weight" in shapes), None)
    if root is not None:
        clip_text(drafts, root, "text", rules["text"], alone=sees)
    if sees:
        clip_vision(drafts, "vision_model.", "vision", rules["vision"])
    return drafts.finished()


def open_clip_groups(shapes: Shapes, heads: Heads) -> tuple[AxisGroup, ...]:
    """A file of OpenCLIP: texts alone, or texts and images."""
    rules, drafts = {**USUAL, **heads}, Drafts(shapes)
    for root in ("open_clip.", ""):
        if f"{root}token_embedding.weight" in shapes:
            open_clip_text(drafts, root, "text", rules["text"])
        open_clip_vision(drafts, f"{root}visual.", "vision", rules["vision"])
    return drafts.finished()
