"""IA3: a weight's rows or columns are multiplied, each by its own number."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from remelt.adapters.change import Change, Parts, Rows
from remelt.adapters.kinds.common import Family, factor, mismatch, needs, option, scalar, sides
from remelt.core.tensor_info import TensorInfo
from remelt.errors import AdapterError

_FACTORS = "ia3_l"


class IA3(Family):
    """LyCORIS' IA3: ``weight`` times the tensor is added, by column if ``on_input``, else by row."""

    name = "an IA3"
    telling = frozenset({"on_input"})
    names = frozenset({"weight", "on_input"})

    def asks_base(self, parts: Parts) -> bool:
        return True

    def check(self, parts: Parts, shape: tuple[int, ...]) -> None:
        needs(self, parts, "weight")
        self._axis(parts, shape)

    def open(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Change:
        return Multiplied(factor(parts, "weight", dtype).flatten(), self._axis(parts, shape), shape)

    def _axis(self, parts: Parts, shape: tuple[int, ...]) -> int:
        axis = int(scalar(parts, "on_input") != 0.0)
        found, size = parts.infos["weight"].shape, parts.infos["weight"].numel
        if len(shape) < 2 or size != shape[axis] or max((*found, 0)) != size:
            raise mismatch(parts, "weight", f"one number for each {('output', 'input')[axis]}", shape)
        return axis


class PeftIA3(Family):
    """PEFT's IA3: the tensor times ``ia3_l``, by column in feedforward layers, else by row.

    The shape of ``ia3_l`` tells which; for convolutions with as many inputs as outputs, the option ``feedforward`` or
    ``feedforward_modules`` does.
    """

    name = "an IA3"
    telling = frozenset({_FACTORS})
    names = telling

    def asks_base(self, parts: Parts) -> bool:
        return True

    def check(self, parts: Parts, shape: tuple[int, ...]) -> None:
        needs(self, parts, _FACTORS)
        self._axis(parts, shape)

    def open(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Change:
        values = factor(parts, _FACTORS, dtype).flatten()
        return Multiplied(values - 1.0, self._axis(parts, shape), shape)

    def _axis(self, parts: Parts, shape: tuple[int, ...]) -> int:
        found, size = parts.infos[_FACTORS].shape, parts.infos[_FACTORS].numel
        output = int(bool(option(parts, "fan_in_fan_out")))
        if len(shape) < 2 or len(found) < 2 or size not in found[:2]:
            raise mismatch(parts, _FACTORS, "[out, 1] or [1, in, ...]", shape)
        if len(found) == 2:
            fitting = [output] if found == (shape[output], 1) else []
            fitting += [1 - output] if found == (1, shape[1 - output]) else []
        else:
            forward = _feedforward(parts)
            fitting = [axis for axis in (0, 1) if size == shape[axis] and forward in (None, bool(axis))]
        if not fitting:
            raise mismatch(parts, _FACTORS, f"of {shape[output]} outputs or {shape[1 - output]} inputs", shape)
        if len(fitting) > 1 and len(found) > 2:
            raise AdapterError(
                f"{parts.module}: {_FACTORS} {list(found)} may be of the inputs or of the outputs of {list(shape)}",
                hint="the adapter's adapter_config.json tells it by feedforward_modules: put it beside the file",
            )
        return fitting[0]


class PeftIA3Bias(Family):
    """What PEFT's IA3 does to the bias of a layer whose outputs it multiplies: the same. There need not be any."""

    name = "an IA3 of a bias"
    target = "bias"
    optional = True
    telling = frozenset({_FACTORS})
    names = telling

    def is_of(self, parts: Mapping[str, TensorInfo]) -> bool:
        found = parts[_FACTORS].shape if _FACTORS in parts else ()
        return len(found) > 2 or found[1:] == (1,)

    def asks_base(self, parts: Parts) -> bool:
        return True

    def check(self, parts: Parts, shape: tuple[int, ...]) -> None:
        needs(self, parts, _FACTORS)
        if len(parts.infos[_FACTORS].shape) == 2 and not self._is_of_outputs(parts, shape):
            raise mismatch(parts, _FACTORS, "one number for each output", shape)

    def open(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Change:
        if not self._is_of_outputs(parts, shape):
            return Multiplied(torch.zeros(sides(shape)[0], dtype=dtype), 0, shape)
        return Multiplied(factor(parts, _FACTORS, dtype).flatten() - 1.0, 0, shape)

    def _is_of_outputs(self, parts: Parts, shape: tuple[int, ...]) -> bool:
        forward = len(parts.infos[_FACTORS].shape) > 2 and _feedforward(parts)
        return not forward and parts.infos[_FACTORS].numel == sides(shape)[0]


class Multiplied(Change):
    """Each row of the tensor, or each slice of its second dimension, times its own number."""

    def __init__(self, by: Tensor, axis: int, shape: tuple[int, ...]) -> None:
        self._axis = axis
        self._by = by if axis == 0 else by.repeat_interleave(sides(shape)[1] // max(shape[1], 1))

    def rows(self, begin: int, end: int, base: Rows | None) -> Tensor:
        assert base is not None
        return base(begin, end) * (self._by[begin:end, None] if self._axis == 0 else self._by)


def _feedforward(parts: Parts) -> bool | None:
    """Whether a configuration says that the module's inputs are multiplied; None where there is none."""
    told, modules = option(parts, "feedforward"), option(parts, "feedforward_modules")
    if told is not None:
        return bool(told)
    if isinstance(modules, str):
        return re.fullmatch(rf"(?:.*\.)?(?:{modules})", parts.module) is not None
    if isinstance(modules, (list, tuple, set, frozenset)):
        return any(parts.module.endswith(str(name)) for name in modules)
    return None
