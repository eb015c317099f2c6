"""Laws told with the facts that break them, and the requirements that several checks share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from remelt.testing.cases import Case, same_bits, where_different


def require(condition: bool, law: str, facts: str) -> None:
    """Fail with the law, then the facts, where the condition does not hold."""
    if not condition:
        raise AssertionError(f"{law}: {facts}")


@contextlib.contextmanager
def raising_nothing(case: Case, law: str, given: str) -> Iterator[None]:
    """Fail with the law where the block raises."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(
            f"{law}: given {given}, {case.method.name} raised {type(error).__name__}: {error}"
        ) from error


def one_result(
    case: Case, tensors: Sequence[Tensor], settings: Mapping[str, Any] | None = None, **given: Any
) -> Tensor:
    """The method's result, or a failure that says on which shapes it raised."""
    shapes = f"{[list(tensor.shape) for tensor in tensors]} of {tensors[0].dtype}"
    with raising_nothing(case, "a method takes tensors of any shape, in float32 and float64", shapes):
        result = case.apply(tensors, settings, **given)
    law = "a method gives a tensor"
    require(isinstance(result, Tensor), law, f"{case.method.name} gave {type(result).__name__}")
    assert isinstance(result, Tensor)
    return result


def require_unchanged(case: Case, tensors: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    for number, (tensor, kept) in enumerate(zip(tensors, before, strict=True)):
        if not same_bits(tensor, kept):
            place = f"operand {number} of shape {list(kept.shape)} ({kept.dtype})"
            raise AssertionError(f"a method changes no input: {case.method.name} wrote into {place}")


def require_form(case: Case, result: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    law = "a method gives a tensor"
    require(isinstance(result, Tensor), law, f"{case.method.name} gave {type(result).__name__}")
    law = "a result has the shape that is declared, by default the first operand's"
    facts = f"{case.method.name} made {list(result.shape)} where {list(shape)} is due"
    require(tuple(result.shape) == tuple(shape), law, facts)
    law = "a result has the element type of the operands"
    require(result.dtype == dtype, law, f"{case.method.name} made {result.dtype} of {dtype}")


def require_same(case: Case, found: Tensor, expected: Tensor, law: str, how: str) -> None:
    if not same_bits(found, expected):
        raise AssertionError(f"{law}: {case.method.name} differs ({how}): {where_different(found, expected)}")


def require_sums(
    name: str, whole: Mapping[str, Tensor], parts: Mapping[str, Tensor], empty: Mapping[str, Tensor]
) -> None:
    law = "a reduction gives sums in float64, or counts in int64, by the same names for any slice"
    require(set(whole) == set(parts) == set(empty), law, f"{name} gave {sorted(whole)} and {sorted(empty)}")
    for key, value in whole.items():
        right = isinstance(value, Tensor) and value.dtype in (torch.float64, torch.int64)
        require(right, law, f"{name} gave {value.dtype if isinstance(value, Tensor) else type(value).__name__} {key!r}")
        law_of_sums = "a reduction's partial sums add up to the whole's"
        require(
            value.shape == parts[key].shape and bool(torch.allclose(value, parts[key], rtol=1e-9, atol=1e-9)),
            law_of_sums,
            f"{key!r} of {name} is {value.tolist()} whole, but {parts[key].tolist()} added up from slices of 64",
        )
        zero = not bool(empty[key].any())
        require(zero, law_of_sums, f"{key!r} of {name} is {empty[key].tolist()} for an empty slice, not zero")
