"""The axis groups of SD3's transformer: joint blocks of an image's stream and a text's, which attend to each other."""

from __future__ import annotations

from remelt.archs.axes.draft import HEAD, QK, VALUE, Draft, Drafts
from remelt.archs.axes.heads import HeadRule
from remelt.archs.axes.transformer import feed_forward, fixed, made_fused, modulated_by, numbers_after

USUAL_HEADS = HeadRule(size=64)
"""Of SD3 and SD3.5 in all sizes."""


def mmdit(drafts: Drafts, root: str, name: str, rule: HeadRule) -> None:
    """All groups of the transformer, but for columns that read text encoders (`context_embedder`, `y_embedder`).

    The modulation of a block is windows of the stream that it shifts, scales and gates. A last block that has no text
    to put out has no more of the text's tensors than it needs.
    """
    image = drafts.free(f"{name}.image", drafts.shapes[f"{root}x_embedder.proj.weight"][0])
    image.made_by(f"{root}x_embedder.proj").window(f"{root}pos_embed", 2)
    text = drafts.free(f"{name}.text", image.size).made_by(f"{root}context_embedder")
    condition = drafts.free(f"{name}.condition", image.size)
    fixed(drafts, f"{root}x_embedder.proj.weight", 1, f"{name}.latents_in")
    fixed(drafts, f"{root}pos_embed", 1, f"{name}.positions")
    for embedder in ("t_embedder", "y_embedder"):
        into, out = f"{root}{embedder}.mlp.0", f"{root}{embedder}.mlp.2"
        feed_forward(drafts, f"{name}.{embedder}", into, out)
        condition.made_by(out)
    fixed(drafts, f"{root}t_embedder.mlp.0.weight", 1, f"{name}.time")
    for number in numbers_after(drafts.shapes, f"{root}joint_blocks."):
        block, called = f"{root}joint_blocks.{number}", f"{name}.joint_blocks.{number}"
        _attend(drafts, block, f"{called}.attn", rule, ("x_block", image), ("context_block", text))
        for part, stream in (("x_block", image), ("context_block", text)):
            module = f"{block}.{part}"
            modulated_by(stream, f"{module}.adaLN_modulation.1")
            condition.read_by(f"{module}.adaLN_modulation.1")
            feed_forward(drafts, f"{called}.{part}.mlp", f"{module}.mlp.fc1", f"{module}.mlp.fc2")
            stream.read_by(f"{module}.mlp.fc1").made_by(f"{module}.mlp.fc2")
        if f"{block}.x_block.attn2.qkv.weight" in drafts.shapes:
            _attend(drafts, block, f"{called}.attn2", rule, ("x_block", image), attention="attn2")
    modulated_by(image, f"{root}final_layer.adaLN_modulation.1").read_by(f"{root}final_layer.linear")
    condition.read_by(f"{root}final_layer.adaLN_modulation.1")
    fixed(drafts, f"{root}final_layer.linear.weight", 0, f"{name}.latents_out")


def _attend(
    drafts: Drafts, block: str, name: str, rule: HeadRule, *parts: tuple[str, Draft], attention: str = "attn"
) -> None:
    """The heads of an attention in which the parts of a block take part, whose norms all heads share."""
    width = drafts.shapes[f"{block}.{parts[0][0]}.{attention}.qkv.weight"][0] // 3
    norm = drafts.shapes.get(f"{block}.{parts[0][0]}.{attention}.ln_q.weight")
    heads = width // norm[0] if norm else rule.heads(width)
    draft = drafts.attention(name, heads, width // heads, shared_norm=norm is not None)
    for part, stream in parts:
        module = f"{block}.{part}.{attention}"
        made_fused(draft, f"{module}.qkv").normalised_by(f"{module}.ln_q", (QK,)).normalised_by(f"{module}.ln_k", (QK,))
        draft.read_by(f"{module}.proj", (HEAD, VALUE))
        stream.read_by(f"{module}.qkv").made_by(f"{module}.proj")
