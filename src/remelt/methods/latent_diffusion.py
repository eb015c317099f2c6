"""Latent diffusion: what a model's attention and its moving averages allow, over several keys at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from remelt.core.tensor_info import TensorInfo
from remelt.recipe.method import Group, Integer, Tensors, merge_method

_PAIRS = (
    (".to_q", ".to_k"),
    (".to_v", ".to_out.0"),
    (".self_attn.q_proj", ".self_attn.k_proj"),
    (".self_attn.v_proj", ".self_attn.out_proj"),
)
"""Layers of an attention that may be transformed against each other: the second of a pair of outputs by columns."""
_BY_COLUMN = (".to_out.0", ".out_proj")
_UNDER = {".self_attn.q_proj": "text_model.encoder.layers.", ".self_attn.v_proj": "text_model.encoder.layers."}
"""What stands in a key whose attention has no rotary positions, for names that others have, too."""
_NORMS = (".norm_q.weight", ".q_norm.weight", ".norm_added_q.weight")
"""Where queries are normalised after their projection, they cannot be transformed."""
_FUSED = (".attn.in_proj_weight", ".attn.in_proj_bias", ".attn.out_proj.weight")
_FLOOR = 1e-12
"""Share of the mean energy of a head's dimensions that each is taken to have at least."""


def _attention(layout: Mapping[str, TensorInfo]) -> Sequence[Group]:
    """The projections of each attention that belong together, weights first, then the biases that there are."""
    groups = []
    for key in layout:
        for first, second in _PAIRS:
            if key.endswith(f"{first}.weight") and _UNDER.get(first, "") in key:
                stem = key.removesuffix(f"{first}.weight")
                weights = [f"{stem}{name}.weight" for name in (first, second)]
                biased = (first,) if second in _BY_COLUMN or second.endswith(_BY_COLUMN) else (first, second)
                biases = [f"{stem}{name}.bias" for name in biased]
                held = [name for name in biases if name in layout]
                normed = any(stem + norm in layout for norm in _NORMS)
                if len(held) in (0, len(biases)) and _fits(weights, layout) and not normed:
                    groups.append(Group((*weights, *held), (*weights, *held)))
        if key.endswith(_FUSED[0]):
            names = tuple(key.removesuffix(_FUSED[0]) + name for name in _FUSED)
            if all(name in layout for name in names) and layout[key].shape == (
                3 * layout[names[2]].shape[-1],
                layout[key].shape[-1],
            ):
                groups.append(Group(names, names))
    return groups


def _fits(weights: Sequence[str], layout: Mapping[str, TensorInfo]) -> bool:
    """Whether two matrices are there and have as many dimensions of heads."""
    if not all(name in layout and len(layout[name].shape) == 2 for name in weights):
        return False
    by_column = weights[1].removesuffix(".weight").endswith(_BY_COLUMN)
    return layout[weights[0]].shape[0] == layout[weights[1]].shape[1 if by_column else 0]


@merge_method(
    cut="model", keys=_attention, limits={"head_size": (1.0, math.inf), "heads": (0.0, math.inf)}, workspace=22.0
)
def balance_attention(a: Tensors, *, head_size: Integer = 64, heads: Integer = 0) -> Tensors:
    """The same model with its attention in balance: queries as strong as keys, values as outputs, in every direction.

    Formula: per head q' = T q and k' = T^-1 k, with T = S^(1/2) and S the symmetric matrix that makes
    S (q q^T) S = k k^T; then q' q'^T = k' k'^T, and q'^T k' = q^T k, so that the model computes what it did. The same
    for values and the columns of the output. Biases count as columns.

    Heads are ``head_size`` rows each, or ``heads`` in number if that is above 0. No file tells them, and with wrong
    ones the model computes something else: 64 rows are right for Stable Diffusion 2, XL and CLIP, and Stable
    Diffusion 1 has 8 heads. It is for attention by softmax whose queries are not rotated by position. Understood are
    ``to_q``, ``to_k``, ``to_v`` and ``to_out.0``, where the queries have no norm of their own, CLIP's ``q_proj`` and
    so on, and OpenCLIP's ``in_proj_weight``. All other keys stay as they are, and so does attention whose rows are no
    whole heads, that is zero or not finite.

    Spaces: weights. Before a merge of models that were trained apart, whose heads may have drifted to other scales
    within themselves. It costs two small decompositions a head.

    Source: sd-mecha, balance_attention, which takes S for T: it exchanges the strengths of queries and keys.

    >>> from torch import tensor
    >>> a = {"attn1.to_q.weight": tensor([[4.0]]), "attn1.to_k.weight": tensor([[1.0]])}
    >>> balance_attention.on(a, head_size=1)
    {'attn1.to_q.weight': tensor([[2.]]), 'attn1.to_k.weight': tensor([[2.]])}
    """
    first = next(iter(a))
    if first.endswith(_FUSED[0]):
        return _balance_fused(a, heads, head_size)
    (_, left), (second, right), *biases = a.items()
    by_column = second.removesuffix(".weight").endswith(_BY_COLUMN)
    parts = [_bundled(left, [bias for _, bias in biases[:1]])]
    parts.append(right.T.double() if by_column else _bundled(right, [bias for _, bias in biases[1:]]))
    balanced = _balanced(parts[0], parts[1], heads, head_size)
    if balanced is None:
        return dict(a)
    x, y = balanced
    result = [x[:, : left.shape[1]], y.T if by_column else y[:, : right.shape[1]]]
    result += [part[:, -1] for part, _ in zip(balanced, biases, strict=False)]
    return {key: tensor.to(a[key].dtype).contiguous() for key, tensor in zip(a, result, strict=True)}


def _balance_fused(a: Mapping[str, Tensor], heads: int, head_size: int) -> dict[str, Tensor]:
    """Attention whose queries, keys and values are one matrix."""
    weight, bias, out = a.values()
    inner = _bundled(weight, [bias])
    query, key, value = inner.chunk(3)
    pairs = [_balanced(query, key, heads, head_size), _balanced(value, out.T.double(), heads, head_size)]
    queries, values = (now or old for now, old in zip(pairs, ((query, key), (value, out.T)), strict=True))
    inner = torch.cat((*queries, values[0]))
    result = [inner[:, :-1], inner[:, -1], values[1].T]
    return {name: tensor.to(a[name].dtype).contiguous() for name, tensor in zip(a, result, strict=True)}


def _bundled(weight: Tensor, biases: Sequence[Tensor]) -> Tensor:
    """A matrix in float64, with its bias for another column."""
    columns = [weight.double(), *(bias.double().unsqueeze(1) for bias in biases)]
    return torch.cat(columns, 1) if biases else columns[0]


def _balanced(left: Tensor, right: Tensor, heads: int, head_size: int) -> tuple[Tensor, Tensor] | None:
    """Two matrices with the same products of rows in each head, and with the products of the two as before.

    None where there are no such heads, or nothing to be balanced.
    """
    size = len(left) // heads if heads > 0 else head_size
    if size < 1 or not len(left) or len(left) % size or (heads > 0 and size * heads != len(left)):
        return None
    x, y = (rows.reshape(-1, size, rows.shape[1]) for rows in (left, right))
    energies = [_energy(x), _energy(y)]
    if not all(bool(energy.isfinite().all()) and bool((_mean(energy) > 0.0).all()) for energy in energies):
        return None
    half, half_inverse = _roots(energies[0], (0.5, -0.5))
    (middle,) = _roots(half @ energies[1] @ half, (0.5,))
    there, back = _roots(half_inverse @ middle @ half_inverse, (0.5, -0.5))
    return (there @ x).flatten(0, 1), (back @ y).flatten(0, 1)


def _mean(energy: Tensor) -> Tensor:
    return energy.diagonal(dim1=-2, dim2=-1).mean(-1)


def _energy(rows: Tensor) -> Tensor:
    """Products of the rows of each head; directions that a head does not use count as much as round-off."""
    energy = rows @ rows.mT
    energy.diagonal(dim1=-2, dim2=-1).add_(_FLOOR * _mean(energy).unsqueeze(-1))
    return energy


def _roots(matrices: Tensor, powers: Sequence[float]) -> list[Tensor]:
    """Powers of symmetric positive matrices."""
    values, vectors = torch.linalg.eigh((matrices + matrices.mT) / 2.0)
    values = values.clamp(min=torch.finfo(values.dtype).tiny)
    return [(vectors * (values**power).unsqueeze(-2)) @ vectors.mT for power in powers]


def _averages(layout: Mapping[str, TensorInfo]) -> Sequence[Group]:
    """Each tensor with its moving average: the key without its dots, but for the first, under ``model_ema``."""
    groups = []
    for key, info in layout.items():
        average = "model_ema." + key.removeprefix("model.").replace(".", "")
        if key.startswith("model.") and average in layout and layout[average].shape == info.shape:
            groups.append(Group((key, average), (key, average)))
    doubled = {key for group in groups for key in group.outputs[1:]}
    found = {group.outputs[1]: group for group in sorted(groups, key=lambda group: group.outputs[0])}
    return [found[key] for key in sorted(doubled)]


_EMA = "moving averages: keys that begin with model_ema., as full checkpoints in the original layout have them"


@merge_method(cut="model", keys=_averages, needs=_EMA, workspace=0.0)
def exchange_ema(a: Tensors) -> Tensors:
    """The moving averages of a checkpoint in the place of its weights, and the weights in theirs.

    Formula: a'["model.x.y"] = a["model_ema.xy"], and the reverse, for every key that has an average of its shape

    Spaces: weights. For full checkpoints of Stable Diffusion 1 and 2, whose ``model_ema`` keys hold averages over the
    training: those are what most files without such keys have. A model without any is refused. It costs a copy.

    Source: sd-mecha, exchange_ema.

    >>> from torch import tensor
    >>> exchange_ema.on({"model.out.weight": tensor([1.0]), "model_ema.outweight": tensor([2.0])})
    {'model.out.weight': tensor([2.]), 'model_ema.outweight': tensor([1.])}
    """
    (key, weight), (average_key, average) = a.items()
    return {key: average, average_key: weight}
