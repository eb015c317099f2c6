"""Rotations made of skew matrices by Cayley's transform, and what limits them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from remelt.adapters.change import Parts
from remelt.adapters.kinds.common import factor, option, scalar, told
from remelt.errors import AdapterError


def cayley(skew: Tensor) -> Tensor:
    """``(I + S) @ inverse(I - S)`` for each skew matrix S.

    >>> cayley(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    tensor([[ 0.,  1.],
            [-1.,  0.]])
    """
    one = torch.eye(skew.shape[-1], dtype=skew.dtype)
    found: Tensor = torch.linalg.solve(one - skew, one + skew)
    return found


def limited(parts: Parts, name: str, outputs: int, dtype: torch.dtype) -> Tensor:
    """The rotations of LyCORIS and kohya: ``B - B.T`` for each block B, no longer together than alpha by outputs.

    Without an alpha above 0 they are not limited. The two programs differ by no more than 1e-8 of the limit.
    """
    blocks = factor(parts, name, dtype)
    skew = blocks - blocks.mT
    limit = scalar(parts, "alpha") * outputs if "alpha" in parts.infos else 0.0
    if limit > 0.0:
        length = float(torch.linalg.vector_norm(skew, dtype=torch.float64)) + 1e-8
        if length > limit:
            skew = skew * (limit / length)
    return cayley(skew)


def side_of(parts: Parts, name: str) -> int:
    """The side of the skew matrices whose upper triangles are the rows of a part."""
    shape = parts.infos[name].shape
    side = (1 + math.isqrt(1 + 8 * shape[1])) // 2 if len(shape) == 2 else 0
    if len(shape) != 2 or not shape[0] or not shape[1] or side * (side - 1) != 2 * shape[1]:
        raise AdapterError(
            f"{parts.module}: {told(parts, name)} must be blocks by the numbers above a square's diagonal",
            hint="the file is of another version of PEFT, or not whole",
        )
    return side


def of_peft(parts: Parts, name: str, dtype: torch.dtype) -> Tensor:
    """The rotations of PEFT, from the numbers above the diagonals, as the options of its configuration say.

    ``use_cayley_neumann`` (as a rule) takes the first ``num_cayley_neumann_terms`` terms of a series for Cayley's
    transform. Without it, PEFT's rotations turn the other way. With ``coft``, no block is longer than ``eps`` by the
    root of their number.
    """
    side = side_of(parts, name)
    upper = factor(parts, name, dtype)
    rows, columns = torch.triu_indices(side, side, 1)
    skew = upper.new_zeros(len(upper), side, side)
    skew[:, rows, columns] = upper
    skew = skew - skew.mT
    if option(parts, "coft", False):
        longest = _number(parts, "eps", 6e-5) / math.sqrt(len(upper))
        length = torch.linalg.vector_norm(skew, dim=(1, 2), keepdim=True)
        skew = torch.where(length <= longest, skew, skew * (longest / length))
    if not option(parts, "use_cayley_neumann", True):
        return cayley(-skew)
    return _series(skew, int(_number(parts, "num_cayley_neumann_terms", 5)))


def _series(skew: Tensor, terms: int) -> Tensor:
    """``I + 2 S + 2 S^2 + ...`` with the last term once, as PEFT has it: so three terms are as four."""
    found = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew)
    if terms < 2:
        return found.clone()
    found = found + 2.0 * skew
    if terms == 2:
        return found
    power = skew @ skew
    found = found + 2.0 * power
    for _ in range(3, terms - 1):
        power = power @ skew
        found += 2.0 * power
    return found + power @ skew


def _number(parts: Parts, name: str, default: float) -> float:
    found = option(parts, name, default)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        raise AdapterError(f"{parts.module}: {name} of the configuration is a number, but it is {found!r}")
    return float(found)
