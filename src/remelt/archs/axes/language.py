"""The axis groups of decoders in transformers' layout: Llama, Mistral, Qwen, Gemma, Phi, GLM, and mixtures."""

from __future__ import annotations

from collections.abc import Mapping

from remelt.archs.axes.draft import HEAD, QK, QUERY, VALUE, Draft, Drafts
from remelt.archs.axes.experts import mixture
from remelt.archs.axes.heads import HeadRule, Heads
from remelt.archs.axes.transformer import fix, fixed, gated, gated_together, numbers_after
from remelt.archs.axis_groups import AxisGroup, Shapes
from remelt.errors import RefusedError

_ROOTS = ("model.", "model.language_model.", "language_model.model.")
_OUTPUTS = ("lm_head", "language_model.lm_head")
_IMAGES = (
    "visual.", "vision_tower.", "multi_modal_projector.", "model.visual.", "model.vision_tower.",
    "model.multi_modal_projector.", "model.mm_projector.", "model.vision_embed_tokens.", "model.image_newline",
)  # fmt: skip
_NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    "post_self_attn_layernorm", "post_mlp_layernorm",
)  # fmt: skip


def language_groups(shapes: Shapes, heads: Heads) -> tuple[AxisGroup, ...]:
    """All groups of a decoder. One without an output head is taken for one whose embeddings are its head.

    How wide a head is, norms of queries tell, or ``heads["model"]`` (`heads_of_configuration`). Where nothing tells,
    the rows of queries, keys and values stay as they are: the rest can be permuted all the same.
    """
    drafts = Drafts(shapes)
    root = next((one for one in _ROOTS if f"{one}embed_tokens.weight" in shapes), None)
    if root is None:
        raise RefusedError(
            "a language model has a table of words, but there is no 'model.embed_tokens.weight'",
            hint="give a whole model, with the keys that transformers writes",
        )
    table = f"{root}embed_tokens.weight"
    stream = drafts.free("stream", shapes[table][1]).window(table, 1).normalised_by(f"{root}norm")
    fixed(drafts, table, 0, "words_in")
    for output in _OUTPUTS:
        stream.read_by(output)
        fixed(drafts, f"{output}.weight", 0, "words_out")
    for number in numbers_after(shapes, f"{root}layers."):
        _layer(drafts, f"{root}layers.{number}", f"layers.{number}", stream, heads.get("model"))
    _images(drafts, stream)
    return drafts.finished()


def heads_of_configuration(configuration: Mapping[str, object]) -> Heads:
    """The head rules of a language model, by what its ``config.json`` says; none where it says nothing.

    >>> heads_of_configuration({"hidden_size": 4096, "num_attention_heads": 32})
    {'model': HeadRule(count=None, size=128, queries=None)}
    """
    inner = configuration.get("text_config")
    told = {**configuration, **inner} if isinstance(inner, Mapping) else configuration
    size, width, count = (told.get(name) for name in ("head_dim", "hidden_size", "num_attention_heads"))
    if not isinstance(size, int) and isinstance(width, int) and isinstance(count, int) and count > 0:
        size = width // count
    return {"model": HeadRule(size=size)} if isinstance(size, int) else {}


def _images(drafts: Drafts, stream: Draft) -> None:
    """What sees images and puts them into the stream: nothing of it is permuted, nor is that stream."""
    for key, shape in drafts.shapes.items():
        if key.startswith(_IMAGES):
            if stream.levels[0].fixed is False:
                fix(stream)
            for axis in range(len(shape)):
                drafts.fixed(f"{key}.{axis}", shape[axis]).window(key, axis)


def _layer(drafts: Drafts, layer: str, name: str, stream: Draft, rule: HeadRule | None) -> None:
    for norm in _NORMS:
        stream.normalised_by(f"{layer}.{norm}")
    _attention(drafts, f"{layer}.self_attn", f"{name}.self_attn", stream, rule)
    if mixture(drafts, layer, name, stream):
        return
    mlp = f"{layer}.mlp"
    gated(drafts, f"{name}.mlp", f"{mlp}.gate_proj", f"{mlp}.up_proj", f"{mlp}.down_proj")
    gated_together(drafts, f"{name}.mlp", f"{mlp}.gate_up_proj", f"{mlp}.down_proj")
    for part in ("gate_proj", "up_proj", "gate_up_proj"):
        stream.read_by(f"{mlp}.{part}")
    stream.made_by(f"{mlp}.down_proj")


def _attention(drafts: Drafts, module: str, name: str, stream: Draft, rule: HeadRule | None) -> None:
    """An attention with rotary embeddings, whose heads of keys and values are shared by several of queries each."""
    shapes = drafts.shapes
    fused, output = f"{module}.qkv_proj", f"{module}.o_proj"
    queries = shapes[f"{output}.weight"][1]
    for part in ("q_proj", "k_proj", "v_proj", "qkv_proj"):
        stream.read_by(f"{module}.{part}")
    stream.made_by(output)
    if f"{fused}.weight" in shapes:
        keys = (shapes[f"{fused}.weight"][0] - queries) // 2
        rows = ((fused, 0), (fused, queries), (fused, queries + keys))
    else:
        keys = shapes[f"{module}.k_proj.weight"][0]
        rows = ((f"{module}.q_proj", 0), (f"{module}.k_proj", 0), (f"{module}.v_proj", 0))
    size = _head_size(shapes, module, queries, rule)
    if size is None or keys % size or queries % keys:
        _fix(drafts, module, name, rows, (queries, keys))
        return
    shared = queries // keys
    draft = drafts.attention(name, keys // size, size, queries=shared, rotary=True)
    several = (HEAD, QUERY) if shared > 1 else (HEAD,)
    for (part, offset), levels in zip(rows, ((*several, QK), (HEAD, QK), (HEAD, VALUE)), strict=True):
        draft.made_by(part, levels, offset=offset)
    for norm, rows_of, levels in (("q_norm", queries, (*several, QK)), ("k_norm", keys, (HEAD, QK))):
        if shapes.get(f"{module}.{norm}.weight") == (rows_of,):  # of all heads together
            draft.normalised_by(f"{module}.{norm}", levels)
        else:
            fixed(drafts, f"{module}.{norm}.weight", 0, f"{name}.{norm}")
    draft.read_by(output, (*several, VALUE))


def _head_size(shapes: Shapes, module: str, queries: int, rule: HeadRule | None) -> int | None:
    """How wide a head is. A norm as wide as all queries may be that of a single head or of all of them."""
    norm = shapes.get(f"{module}.q_norm.weight")
    if norm and norm[0] < queries:
        return norm[0]
    return None if rule is None else queries // rule.heads(queries)


def _fix(drafts: Drafts, module: str, name: str, rows: tuple[tuple[str, int], ...], sizes: tuple[int, int]) -> None:
    """An attention of which nobody knows how many heads it has."""
    queries, keys, _ = (
        drafts.fixed(f"{name}.{called}", size).made_by(part, offset=offset)
        for called, size, (part, offset) in zip(
            ("queries", "keys", "values"), (sizes[0], sizes[1], sizes[1]), rows, strict=True
        )
    )
    queries.read_by(f"{module}.o_proj").normalised_by(f"{module}.q_norm")
    keys.normalised_by(f"{module}.k_norm")
