"""Modules that go down to float32 inside, as norms and routers of transformers do, kept in float64 all the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class InDouble(TorchFunctionMode):
    """While it is entered, what asks for float32 gets float64: a sum in another order then differs by 1e-16 of itself.

    >>> with InDouble():
    ...     torch.ones(1, dtype=torch.float64).float().dtype
    torch.float64
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        raised = {name: _raised(value) for name, value in (kwargs or {}).items()}
        return func(*map(_raised, args), **raised)


def _raised(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
