"""A transformer's weights and axis groups for tests of matching: attention, a stream, hidden channels, a GroupNorm."""

from __future__ import annotations

import torch

from remelt.archs.axes.draft import HEAD, QK, QUERY, VALUE, Drafts
from remelt.archs.axis_groups import AxisGroup


def transformer(
    *,
    queries: int = 1,
    rotary: bool = False,
    shared_norm: bool = False,
    width: int = 64,
    layers: int = 2,
    seed: int = 0,
) -> tuple[dict[str, torch.Tensor], tuple[AxisGroup, ...]]:
    """Random tensors of a small one, and its groups; no function stands behind it."""
    heads, size, hidden, words = 4, 16, 2 * width, 100
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"embed.weight": random(words, width), "head.weight": random(words, width)}
    for layer in range(layers):
        shapes = {
            "q.weight": (heads * queries * size, width),
            "k.weight": (heads * size, width),
            "v.weight": (heads * size, width),
            "v.bias": (heads * size,),
            "o.weight": (width, heads * queries * size),
            "o.bias": (width,),
            "gate.weight": (hidden, width),
            "up.weight": (hidden, width),
            "down.weight": (width, hidden),
            "norm.weight": (width,),
            "groups.weight": (hidden,),
        }
        shapes |= {"q_norm.weight": (size,), "k_norm.weight": (size,)} if shared_norm else {}
        tensors |= {f"{layer}.{name}": random(*shape) for name, shape in shapes.items()}
    drafts = Drafts({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    drafts.fixed("words", words).window("embed.weight", 0).window("head.weight", 0)
    stream = drafts.free("stream", width).window("embed.weight", 1).window("head.weight", 1)
    for layer in range(layers):
        for module in ("q", "k", "v", "gate", "up"):
            stream.read_by(f"{layer}.{module}")
        stream.made_by(f"{layer}.o").made_by(f"{layer}.down").normalised_by(f"{layer}.norm")
        attention = drafts.attention(
            f"{layer}.attention", heads, size, queries=queries, rotary=rotary, shared_norm=shared_norm
        )
        each = (HEAD, QUERY) if queries > 1 else (HEAD,)
        attention.made_by(f"{layer}.q", (*each, QK)).made_by(f"{layer}.k", (HEAD, QK))
        attention.made_by(f"{layer}.v", (HEAD, VALUE)).read_by(f"{layer}.o", (*each, VALUE))
        attention.normalised_by(f"{layer}.q_norm", (QK,)).normalised_by(f"{layer}.k_norm", (QK,))
        drafts.free(f"{layer}.hidden", hidden).made_by(f"{layer}.gate").made_by(f"{layer}.up").read_by(
            f"{layer}.down"
        ).grouped_by(f"{layer}.groups", 8)
    return tensors, drafts.finished()
