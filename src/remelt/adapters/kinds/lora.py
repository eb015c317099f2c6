"""LoRA, LoCon and DoRA: a product of two factors, of a matrix or a convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from remelt.adapters.change import Change, Parts, Rows
from remelt.adapters.kinds.common import (
    Family,
    Pair,
    Product,
    factor,
    kernel,
    made_of,
    mismatch,
    must_fit,
    needs,
    option,
    pair_of,
    scaling,
    sides,
    told,
)
from remelt.adapters.kinds.decomposed import PART, check_magnitude, decomposed
from remelt.errors import AdapterError

_UP, _DOWN, _MID = "lora_up.weight", "lora_down.weight", "lora_mid.weight"
_BIASES = ("lora_up.bias", "lora_B.bias")


class LoRA(Family):
    """``scale * up @ down``, with a core between them if there is ``lora_mid.weight``.

    ``scale`` is alpha by rank. Factors of convolutions are stored as such, the kernel in one of them. The options
    ``transposed`` (PEFT's embeddings) and ``fan_in_fan_out`` (layers that keep inputs by outputs) turn the product
    round; with ``of_first_rows`` it has three rows for each input, which are the first of the tensor's. With
    ``dora_scale`` it is a DoRA.
    """

    name = "a LoRA"
    telling = frozenset({_UP, _DOWN, _MID})
    names = telling | {"alpha", PART}

    def asks_base(self, parts: Parts) -> bool:
        return PART in parts.infos

    def check(self, parts: Parts, shape: tuple[int, ...]) -> None:
        core = _core(parts)
        used = (_UP, _DOWN, *([core] if core else []))
        needs(self, parts, *used)
        made = made_of(parts, _UP, _DOWN, core)
        turned = is_turned(parts, shape)
        if turned and len(shape) != 2:
            raise AdapterError(
                f"{parts.module}: {told(parts, *used)} make a matrix turned round, but the model's tensor is "
                f"{list(shape)}"
            )
        must_fit(parts, used, (made[1], made[0], *made[2:]) if turned else made, _changed(parts, shape))
        scaling(parts, parts.infos[_DOWN].shape[0])
        check_magnitude(self, parts, shape, transposed=turned)

    def open(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Change:
        scale = scaling(parts, parts.infos[_DOWN].shape[0])
        turned, up = is_turned(parts, shape), parts.infos[_UP].shape
        inner: Change
        if kernel(up):
            inner = _Spread(factor(parts, _UP, dtype).flatten(2), factor(parts, _DOWN, dtype).flatten(1) * scale)
        else:
            pair = pair_of(parts, _UP, _DOWN, _core(parts), dtype)
            assert pair.right is not None
            left = pair.left
            if option(parts, "of_first_rows"):
                left = torch.cat((left, left.new_zeros(shape[0] - len(left), left.shape[1])))
            pair = Pair(pair.right.T.contiguous(), left.T) if turned else Pair(left, pair.right)
            inner = Product(pair.times(scale))
        return decomposed(inner, parts, shape, dtype, transposed=turned)


class LoRABias(Family):
    """PEFT's ``lora_bias``: the bias changes by ``scale * bias``."""

    name = "a LoRA with a bias"
    target = "bias"
    telling = frozenset(_BIASES)
    names = telling | {_UP, "alpha"}

    def check(self, parts: Parts, shape: tuple[int, ...]) -> None:
        part = self._part(parts)
        needs(self, parts, part, _UP)
        if parts.infos[part].shape != shape:
            raise mismatch(parts, part, f"{list(shape)}", shape)
        scaling(parts, _rank(parts))

    def open(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Change:
        values = factor(parts, self._part(parts), dtype).reshape(sides(shape))
        return Product(Pair(values).times(scaling(parts, _rank(parts))))

    def _part(self, parts: Parts) -> str:
        found = [name for name in _BIASES if name in parts.infos]
        if len(found) > 1:
            raise AdapterError(f"{parts.module}: {told(parts, *found)} are two names for one part")
        return found[0]


class _Spread(Change):
    """Factors of a convolution whose kernel is in the first: outputs by rank by kernel."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        self._up, self._down = up, down

    def rows(self, begin: int, end: int, base: Rows | None) -> Tensor:
        return torch.einsum("omk,mi->oik", self._up[begin:end], self._down).flatten(1)


def _core(parts: Parts) -> str | None:
    return _MID if _MID in parts.infos else None


def _changed(parts: Parts, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The rows that are changed, as a tensor: all of it, or those of queries, keys and values at its beginning."""
    if not option(parts, "of_first_rows") or len(shape) != 2 or shape[0] <= 3 * shape[1]:
        return shape
    return 3 * shape[1], shape[1]


def is_turned(parts: Parts, shape: tuple[int, ...]) -> bool:
    """Whether the product is of inputs by outputs where the tensor is of outputs by inputs, or the other way round.

    PEFT sets ``fan_in_fan_out`` for an adapter, but it does not count for convolutions.
    """
    return bool(option(parts, "transposed") or (option(parts, "fan_in_fan_out") and len(shape) == 2))


def _rank(parts: Parts) -> int:
    shape = parts.infos[_UP].shape
    if len(shape) < 2 or not shape[1]:
        raise AdapterError(f"{parts.module}: {told(parts, _UP)} has no rank")
    return shape[1]
