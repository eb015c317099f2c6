"""The axis groups of vision transformers, in the names of transformers' files and modules, timm and torchvision."""

from __future__ import annotations

from dataclasses import dataclass

from remelt.archs.axes.draft import HEAD, QK, VALUE, Draft, Drafts
from remelt.archs.axes.heads import HeadRule, Heads
from remelt.archs.axes.transformer import feed_forward, fixed, numbers_after
from remelt.archs.axis_groups import AxisGroup, Shapes
from remelt.errors import RefusedError

_USUAL = {192: 3, 384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1664: 16}
"""The heads of the published sizes, by width: Ti, S, B, L, So, H, g and G."""


@dataclass(frozen=True)
class Naming:
    """What the parts of a vision transformer are called.

    ``tokens`` have the stream on their last axis of three. ``attention`` are the maps that make queries, keys and
    values, or the one that makes all; ``heads`` what reads the stream at the end.
    """

    patches: str
    tokens: tuple[str, ...]
    positions: str
    layers: str
    norms: tuple[str, str]
    attention: tuple[str, ...]
    output: str
    mlp: tuple[str, str]
    scales: tuple[str, ...]
    ends: tuple[str, ...]
    heads: tuple[str, ...]


_HUGGING_FACE = Naming(
    patches="vit.embeddings.patch_embeddings.projection",
    tokens=("vit.embeddings.cls_token", "vit.embeddings.mask_token"),
    positions="vit.embeddings.position_embeddings",
    layers="vit.encoder.layer.",
    norms=("layernorm_before", "layernorm_after"),
    attention=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    output="attention.output.dense",
    mlp=("intermediate.dense", "output.dense"),
    scales=(),
    ends=("vit.layernorm",),
    heads=("classifier", "decoder.0", "vit.pooler.dense"),
)
_MODULES = Naming(
    patches=_HUGGING_FACE.patches,
    tokens=_HUGGING_FACE.tokens,
    positions=_HUGGING_FACE.positions,
    layers="vit.layers.",
    norms=_HUGGING_FACE.norms,
    attention=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    output="attention.o_proj",
    mlp=("mlp.fc1", "mlp.fc2"),
    scales=(),
    ends=_HUGGING_FACE.ends,
    heads=_HUGGING_FACE.heads,
)
_TIMM = Naming(
    patches="patch_embed.proj",
    tokens=("cls_token", "reg_token", "dist_token"),
    positions="pos_embed",
    layers="blocks.",
    norms=("norm1", "norm2"),
    attention=("attn.qkv",),
    output="attn.proj",
    mlp=("mlp.fc1", "mlp.fc2"),
    scales=("ls1.gamma", "ls2.gamma"),
    ends=("norm_pre", "norm", "fc_norm"),
    heads=("head", "head_dist"),
)
_TORCHVISION = Naming(
    patches="conv_proj",
    tokens=("class_token",),
    positions="encoder.pos_embedding",
    layers="encoder.layers.encoder_layer_",
    norms=("ln_1", "ln_2"),
    attention=("self_attention.in_proj",),
    output="self_attention.out_proj",
    mlp=("mlp.0", "mlp.3"),
    scales=(),
    ends=("encoder.ln",),
    heads=("heads.head",),
)
_NAMINGS = (_HUGGING_FACE, _MODULES, _TIMM, _TORCHVISION)


def vit_groups(shapes: Shapes, heads: Heads) -> tuple[AxisGroup, ...]:
    """All groups of a vision transformer. Without a head that names what is seen, its stream is what it puts out.

    Heads are those of the published sizes, or ``heads["vision"]`` tells; of another width, attention stays as it is.
    """
    naming = naming_of(shapes)
    if naming is None:
        raise RefusedError(
            "a vision transformer has patches and numbered layers, but no names for them that are known are there",
            hint="transformers', timm's and torchvision's names are known",
        )
    drafts = Drafts(shapes)
    width = shapes[f"{naming.patches}.weight"][0]
    seen = any(f"{head}.weight" in shapes for head in naming.heads if head != "vit.pooler.dense")
    stream = (drafts.free if seen else drafts.fixed)("stream", width).made_by(naming.patches)
    fixed(drafts, f"{naming.patches}.weight", 1, "pixels")
    for token in (*naming.tokens, naming.positions):
        stream.window(token, 2)
        fixed(drafts, token, 1)
    rule = heads.get("vision") or (HeadRule(count=_USUAL[width]) if width in _USUAL else None)
    for number in numbers_after(shapes, naming.layers):
        _layer(drafts, f"{naming.layers}{number}", f"layers.{number}", naming, stream, rule)
    for norm in naming.ends:
        stream.normalised_by(norm)
    for head in naming.heads:
        stream.read_by(head)
        fixed(drafts, f"{head}.weight", 0)
    return drafts.finished()


def naming_of(shapes: Shapes) -> Naming | None:
    """The names that a model has; None where it is no vision transformer of known names."""
    for naming in _NAMINGS:
        if f"{naming.patches}.weight" in shapes and f"{naming.layers}0.{naming.norms[0]}.weight" in shapes:
            return naming
    return None


def _layer(drafts: Drafts, layer: str, name: str, naming: Naming, stream: Draft, rule: HeadRule | None) -> None:
    for norm in naming.norms:
        stream.normalised_by(f"{layer}.{norm}")
    for scale in naming.scales:
        stream.window(f"{layer}.{scale}", 0)
    into, out = (f"{layer}.{part}" for part in naming.mlp)
    feed_forward(drafts, f"{name}.mlp", into, out)
    stream.read_by(into).made_by(out)
    _attention(drafts, layer, f"{name}.attention", naming, stream, rule)


def _attention(drafts: Drafts, layer: str, name: str, naming: Naming, stream: Draft, rule: HeadRule | None) -> None:
    maps = [f"{layer}.{part}" for part in naming.attention]
    output = f"{layer}.{naming.output}"
    width = drafts.shapes[f"{output}.weight"][1]
    stream.made_by(output)
    for one in maps:
        stream.read_by(one).window(f"{one}_weight", 1)
    rows = [(maps[place % len(maps)], place * width * (len(maps) == 1)) for place in range(3)]
    norm = drafts.shapes.get(f"{layer}.attn.q_norm.weight")
    if rule is None and (norm is None or norm[0] == width):
        drafts.fixed(name, width).read_by(output)
        for place, (one, offset) in enumerate(rows):
            _made(drafts.fixed(f"{name}.{'qkv'[place]}", width), one, (), offset)
        for part in "qk":
            fixed(drafts, f"{layer}.attn.{part}_norm.weight", 0)
        return
    heads = rule.heads(width) if rule is not None else width // (norm or (width,))[0]
    draft = drafts.attention(name, heads, width // heads, shared_norm=norm is not None)
    for level, (one, offset) in zip((QK, QK, VALUE), rows, strict=True):
        _made(draft, one, (HEAD, level), offset)
    draft.normalised_by(f"{layer}.attn.q_norm", (QK,)).normalised_by(f"{layer}.attn.k_norm", (QK,))
    draft.read_by(output, (HEAD, VALUE))


def _made(draft: Draft, module: str, levels: tuple[str, ...], offset: int) -> None:
    """Rows of a linear map, or of the maps that torch's attention has as tensors of its own."""
    draft.made_by(module, levels, offset=offset)
    for tensor in ("weight", "bias"):
        draft.window(f"{module}_{tensor}", 0, levels, offset=offset)
