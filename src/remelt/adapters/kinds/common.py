"""What the kinds of adapters share: reading parts, the scale, matrices made of factors, and what does not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from remelt.adapters.change import Change, Kind, Parts, Rows
from remelt.core.tensor_info import TensorInfo
from remelt.errors import AdapterError

_OTHER_MODEL = "the adapter is of another model"
_NOT_WHOLE = "the file is not whole: take it again from where it came from"


class Family(Kind):
    """A kind that is told by the names of its parts: one of ``telling`` is enough."""

    telling: frozenset[str]

    def is_of(self, parts: Mapping[str, TensorInfo]) -> bool:
        return not self.telling.isdisjoint(parts)

    def asks_base(self, parts: Parts) -> bool:
        return False


@dataclass(frozen=True)
class Pair:
    """A matrix as the product of two, or as one where there is no ``right``."""

    left: Tensor
    right: Tensor | None = None

    def rows(self, begin: int, end: int) -> Tensor:
        chosen = self.left[begin:end]
        return chosen if self.right is None else chosen @ self.right

    def times(self, scale: float) -> Pair:
        return Pair(self.left * scale) if self.right is None else Pair(self.left, self.right * scale)


class Product(Change):
    """The product of two matrices."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair

    def rows(self, begin: int, end: int, base: Rows | None) -> Tensor:
        found = self._pair.rows(begin, end)
        return found.clone() if self._pair.right is None else found  # the caller may write to it

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return None if self._pair.right is None else (self._pair.left, self._pair.right)


def sides(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor as a matrix of the first dimension against all others.

    >>> sides((4, 3, 2)), sides((5,)), sides(())
    ((4, 6), (5, 1), (1, 1))
    """
    return (shape[0] if shape else 1), math.prod(shape[1:])


def kernel(shape: Sequence[int]) -> tuple[int, ...]:
    """The kernel of a convolution without ones at its end: none where it is a matrix.

    >>> kernel((8, 4, 1, 1)), kernel((8, 4, 3, 1)), kernel((8, 4))
    ((), (3,), ())
    """
    last = len(shape)
    while last > 2 and shape[last - 1] == 1:
        last -= 1
    return tuple(shape[2:last])


def needs(kind: Kind, parts: Parts, *names: str) -> None:
    """Raise `AdapterError` where one of the parts is missing, or is not made of floating-point numbers."""
    missing = [name for name in names if name not in parts.infos]
    if missing:
        raise AdapterError(
            f"{parts.module}: {kind.name} is made of {listed(names)}, but {listed(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing",
            hint=_NOT_WHOLE,
        )
    for name in names:
        info = parts.infos[name]
        if not info.dtype.is_float:
            raise AdapterError(
                f"{parts.module}: {name} is of {info.dtype}, but factors are floating-point numbers",
                hint="the adapter is quantised: take it in another type",
            )


def matrix(parts: Parts, name: str) -> tuple[int, ...]:
    """The shape of a part, which must be a matrix or a convolution, and not be empty."""
    shape = parts.infos[name].shape
    if len(shape) < 2 or not math.prod(shape):
        raise AdapterError(f"{parts.module}: {name} is {list(shape)}, which is no matrix", hint=_NOT_WHOLE)
    return shape


def made_of(parts: Parts, first: str, second: str, core: str | None = None, *, lying: bool = False) -> tuple[int, ...]:
    """The shape of what two factors make, and a core between them if there is one.

    ``first`` is outputs by rank, or with ``lying`` rank by outputs; ``second`` is rank by inputs. One of them, or the
    core, may have the kernel of a convolution.
    """
    one, two = _factor(parts, first), _factor(parts, second)
    rank, size = (one[0], one[1]) if lying else (one[1], one[0])
    if not rank or not two[0]:
        raise AdapterError(
            f"{parts.module}: its rank is 0: {told(parts, first, second)}",
            hint="it changes nothing: remove it from the file",
        )
    named = (first, second) if core is None else (first, second, core)
    ranks = (rank, rank) if core is None else matrix(parts, core)[:2]
    if ranks != (rank, two[0]):
        raise AdapterError(f"{parts.module}: these are not of one rank: {told(parts, *named)}", hint=_NOT_WHOLE)
    kernels = [found for name in named if (found := kernel(parts.infos[name].shape))]
    if len(kernels) > 1:
        raise AdapterError(
            f"{parts.module}: one factor may have the kernel of a convolution, but these have: {told(parts, *named)}"
        )
    return (size, two[1], *(kernels[0] if kernels else ()))


def _factor(parts: Parts, name: str) -> tuple[int, ...]:
    shape = parts.infos[name].shape
    if len(shape) < 2:
        raise AdapterError(f"{parts.module}: {name} is {list(shape)}, which is no matrix", hint=_NOT_WHOLE)
    return shape


def must_fit(parts: Parts, names: Sequence[str], made: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raise `AdapterError` where what parts make is not of the tensor's shape, but for ones at the end of a kernel.

    A matrix may also have the kernel in its columns.
    """
    folded = not kernel(made)
    if sides(made) != sides(shape) or not (folded or kernel(made) == kernel(shape)):
        raise AdapterError(
            f"{parts.module}: {told(parts, *names)} make {list(made)}, but the model's tensor is {list(shape)}",
            hint=_OTHER_MODEL,
        )


def mismatch(parts: Parts, name: str, wanted: str, shape: tuple[int, ...]) -> AdapterError:
    """What to say where one part is not as the model's tensor asks."""
    return AdapterError(
        f"{parts.module}: {told(parts, name)} must be {wanted}: the model's tensor is {list(shape)}", hint=_OTHER_MODEL
    )


def told(parts: Parts, *names: str) -> str:
    """Parts with their shapes."""
    return listed([f"{name} {list(parts.infos[name].shape)}" for name in names])


def listed(names: Sequence[str]) -> str:
    """
    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def scalar(parts: Parts, name: str) -> float:
    """The one number of a part."""
    info = parts.infos[name]
    if info.numel != 1:
        raise AdapterError(f"{parts.module}: {name} is one number, but it is {list(info.shape)}", hint=_NOT_WHOLE)
    value = float(parts.read(name).to(torch.float64).reshape(()))
    if not math.isfinite(value):
        raise AdapterError(f"{parts.module}: {name} is {value}", hint=_NOT_WHOLE)
    return value


def scaling(parts: Parts, rank: int) -> float:
    """What the factors' product is multiplied by: what a configuration says, else alpha by rank, else 1."""
    if parts.scale is not None:
        name, value = "the scale", parts.scale
        if not math.isfinite(value):
            raise AdapterError(f"{parts.module}: the scale is {value}", hint="mend the adapter's configuration")
    elif "alpha" in parts.infos:
        name, value = "alpha", scalar(parts, "alpha")
    else:
        return 1.0
    if value == 0.0:
        # ComfyUI takes it as a scale of 0, kohya and LyCORIS as an alpha that equals the rank
        raise AdapterError(
            f"{parts.module}: {name} 0 makes it nothing", hint="remove the module from the file, or give it an alpha"
        )
    return value if parts.scale is not None else value / rank


def option(parts: Parts, name: str, default: object = None) -> object:
    """A fact of the adapter's configuration."""
    found = (parts.options or {}).get(name)
    return default if found is None else found


def factor(parts: Parts, name: str, dtype: torch.dtype) -> Tensor:
    """A part in the type that is computed in; `AdapterError` where it is not finite."""
    values = parts.read(name).to(dtype)
    if not bool(values.isfinite().all()):
        raise not_finite(parts, name)
    return values


def not_finite(parts: Parts, name: str) -> AdapterError:
    """What to say of a part with NaN or infinity."""
    return AdapterError(
        f"{parts.module}: {name} has numbers that are not finite",
        hint="its training failed, or its type cannot hold them: take another version",
    )


def pair_of(
    parts: Parts, first: str, second: str, core: str | None, dtype: torch.dtype, *, lying: bool = False
) -> Pair:
    """The factors that `made_of` checked, as matrices; a core goes into the right one, which grows by the kernel."""
    left = factor(parts, first, dtype).flatten(1)
    right = factor(parts, second, dtype).flatten(1)
    if core is not None:
        middle = factor(parts, core, dtype).flatten(2)
        right = torch.einsum("mnk,ni->mik", middle, right).flatten(1)
    return Pair(left.T.contiguous() if lying else left, right)
