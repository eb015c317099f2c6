"""The axis groups of T5: an encoder, and a decoder where there is one. Nothing but its positions is added to scores."""

from __future__ import annotations

from collections.abc import Sequence

from remelt.archs.axes.draft import HEAD, QK, VALUE, Draft, Drafts
from remelt.archs.axes.heads import HeadRule, Heads
from remelt.archs.axes.transformer import feed_forward, fixed, gated, numbers_after
from remelt.archs.axis_groups import AxisGroup, Level, Shapes

Stream = Sequence[tuple[Draft, int]]
"""The channels of a stream, in stretches: what each is part of, and where it begins."""
_TABLES = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
_SIZE = 64
"""Of a head, in all of T5."""
_BIAS = "relative_attention_bias.weight"


def t5(drafts: Drafts, root: str, name: str, stream: Stream, rule: HeadRule | None = None) -> None:
    """All groups but the stream's, which gains windows; ``root`` ends where ``encoder.`` begins.

    As many heads as positions are told for. Positions of the first block are those of all blocks that have none of
    their own: their heads move together.
    """
    bias = next((key for key in drafts.shapes if key.startswith(root) and key.endswith(_BIAS)), None)
    rule = rule if bias is None else HeadRule(count=drafts.shapes[bias][1])
    for table in _TABLES:
        fixed(drafts, f"{root}{table}.weight", 0, f"{name}.{table}.words")
        _on(stream, f"{root}{table}.weight", 1)
    for stack in ("encoder", "decoder"):
        _stack(drafts, f"{root}{stack}", f"{name}.{stack}", stream, rule or HeadRule(size=_SIZE))
    fixed(drafts, f"{root}lm_head.weight", 0, f"{name}.lm_head.words")
    _on(stream, f"{root}lm_head.weight", 1)


def width_of(shapes: Shapes, root: str) -> int:
    """How wide the stream is."""
    return shapes[f"{root}encoder.final_layer_norm.weight"][0]


def t5_groups(shapes: Shapes, heads: Heads) -> tuple[AxisGroup, ...]:
    """T5 as a file of its own. An encoder's stream is what it puts out, and fixed; a decoder puts out words."""
    drafts = Drafts(shapes)
    begin = drafts.free if "decoder.final_layer_norm.weight" in shapes else drafts.fixed
    t5(drafts, "", "text", [(begin("text.stream", width_of(shapes, "")), 0)], heads.get("text"))
    return drafts.finished()


def _stack(drafts: Drafts, root: str, name: str, stream: Stream, rule: HeadRule) -> None:
    blocks = numbers_after(drafts.shapes, f"{root}.block.")
    tied: list[str] = []
    for block in blocks:
        layers = numbers_after(drafts.shapes, f"{root}.block.{block}.layer.")
        for layer in layers:
            module, called = f"{root}.block.{block}.layer.{layer}", f"{name}.{block}.{layer}"
            _on(stream, f"{module}.layer_norm.weight", 0)
            _feed_forward(drafts, f"{module}.DenseReluDense", called, stream)
            for attention in ("SelfAttention", "EncDecAttention"):
                inside = f"{module}.{attention}"
                if f"{inside}.q.weight" not in drafts.shapes:
                    continue
                for part in "qkv":
                    _on(stream, f"{inside}.{part}.weight", 1)
                _on(stream, f"{inside}.o.weight", 0)
                if attention == "SelfAttention" and (not tied or f"{inside}.{_BIAS}" not in drafts.shapes):
                    tied.append(inside)
                else:
                    _attention(drafts, [inside], called, rule)
    _on(stream, f"{root}.final_layer_norm.weight", 0)
    if tied:
        _attention(drafts, tied, f"{name}.attention", rule)


def _feed_forward(drafts: Drafts, module: str, name: str, stream: Stream) -> None:
    gated(drafts, name, f"{module}.wi_0", f"{module}.wi_1", f"{module}.wo")
    feed_forward(drafts, name, f"{module}.wi", f"{module}.wo")  # T5 1.0
    for part in ("wi", "wi_0", "wi_1"):
        _on(stream, f"{module}.{part}.weight", 1)
    _on(stream, f"{module}.wo.weight", 0)


def _attention(drafts: Drafts, modules: Sequence[str], name: str, rule: HeadRule) -> None:
    """Attentions that read the same positions: a head of one is moved with that of all others."""
    width = drafts.shapes[f"{modules[0]}.q.weight"][0]
    heads = rule.heads(width)
    levels = [Level(HEAD, heads)]
    for place in range(len(modules)):
        levels += [Level(_numbered(level, place, modules), width // heads, (HEAD,)) for level in (QK, VALUE)]
    draft = drafts.of_levels(name, tuple(levels))
    fixed(drafts, f"{modules[0]}.{_BIAS}", 0, f"{name}.distances")
    for place, module in enumerate(modules):
        qk, value = ((HEAD, _numbered(level, place, modules)) for level in (QK, VALUE))
        draft.made_by(f"{module}.q", qk).made_by(f"{module}.k", qk).made_by(f"{module}.v", value)
        draft.read_by(f"{module}.o", value).window(f"{module}.{_BIAS}", 1, (HEAD,))


def _numbered(level: str, place: int, modules: Sequence[str]) -> str:
    return level if len(modules) == 1 else f"{level}.{place}"


def _on(stream: Stream, key: str, axis: int) -> None:
    for draft, offset in stream:
        draft.window(key, axis, offset=offset)
