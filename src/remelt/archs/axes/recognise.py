"""Networks that no named arch stands for, told by their keys: classifiers of images, mixtures of experts, chains."""

from __future__ import annotations

import re

from remelt.archs.axes.mlp import chain_of
from remelt.archs.axes.vit import naming_of
from remelt.archs.axis_groups import Shapes
from remelt.errors import RefusedError

_ROUTER = re.compile(r"model\.layers\.\d+\.(?:block_sparse_moe|mlp)\.gate\.weight")


def recognise_network(shapes: Shapes) -> str | None:
    """The specification of a model that no named arch recognises; None where there is none for it.

    >>> recognise_network({"0.weight": (8, 4), "2.weight": (3, 8)})
    'mlp'
    """
    if any(map(_ROUTER.fullmatch, shapes)):
        return _mixture(shapes)
    if "conv1.weight" in shapes and "layer1.0.conv1.weight" in shapes and "bn1.weight" in shapes:
        return "resnet"
    if naming_of(shapes) is not None:
        return "vit"
    try:
        chain = chain_of(shapes)
    except RefusedError:
        return None
    return "mlp" if len(chain) > 1 else None


def _mixture(shapes: Shapes) -> str | None:
    attention = "model.layers.0.self_attn"
    if not {f"{attention}.q_proj.weight", f"{attention}.k_proj.weight"} <= shapes.keys():
        return None  # DeepSeek's, and others whose attention is not known
    if any(".mlp.shared_expert." in key for key in shapes):
        return "qwen2_moe"
    return "qwen3_moe" if f"{attention}.q_norm.weight" in shapes else "mixtral"
