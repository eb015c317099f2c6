"""What methods are tried on: shapes, types, structured and wild operands, cuts, groups of keys, other circumstances."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from remelt.core.tensor_info import TensorInfo
from remelt.recipe.method import Group
from remelt.testing.cases import Case
from remelt.testing.laws import raising_nothing, require
from remelt.testing.live import peak_of
from remelt.testing.merging import group_result, models_of

DTYPES = (torch.float32, torch.float64)
TRIED = ((), (0,), (0, 4), (1,), (7,), (131,), (3, 5), (2, 3, 3, 3))
"""Shapes that any model may have: numbers, empty tensors, odd lengths, matrices, kernels."""
LENGTH = 64 * 11 + 37
CUTS = ((64,), (64 * 3, 64, 64 * 5), (64 * 10,), (64 * 11,))
"""Lengths of slices, repeated until the tensor ends: multiples of 64 but for the last."""
LARGEST = {torch.float32: 3.0e38, torch.float64: 1.0e308}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch with one thread, as in the engine: it cuts large tensors by the number of its threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def with_masks(case: Case) -> list[Case]:
    """The case, and with masks as tensors where the method takes any."""
    masks = any(parameter.kind == "mask" for parameter in case.method.parameters)
    return [case, Case(case.method, case.values, case.shapes, masked=True)] if masks else [case]


def trials(
    case: Case, shapes: Sequence[tuple[int, ...]] = TRIED
) -> Iterator[tuple[Case, torch.dtype, tuple[int, ...]]]:
    """What a method that works on one key is tried on; nothing for cut ``model``."""
    if case.method.declaration.cut == "model":
        return
    for one in with_masks(case):
        for dtype in DTYPES:
            for shape in shapes:
                yield one, dtype, shape


def trials_of_groups(case: Case) -> Iterator[tuple[Case, torch.dtype, list[dict[str, Tensor]]]]:
    """What a method of cut ``model`` is tried on; nothing for others."""
    if case.method.declaration.cut == "model":
        for dtype in DTYPES:
            yield case, dtype, models_of(case, dtype)


def groups_of(case: Case, layout: Mapping[str, TensorInfo]) -> Sequence[Group]:
    assert case.method.declaration.keys is not None
    groups = list(case.method.declaration.keys(layout))
    law = "a method of cut 'model' is tried on a model that has its keys"
    require(
        bool(groups), law, f"{case.method.name} finds none in {list(layout)[:4]} ...: override the fixture `shapes`"
    )
    return groups


def slices(length: int, lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    begin, number = 0, 0
    while begin < length:
        end = min(begin + lengths[number % len(lengths)], length)
        yield begin, end
        begin, number = end, number + 1


def structured(case: Case, dtype: torch.dtype) -> Iterator[list[Tensor]]:
    """Finite operands: random, all zero, all equal, one the opposite of the other, very small."""
    drawn = case.operands((131,), dtype)
    yield drawn
    yield [torch.zeros_like(tensor) for tensor in drawn]
    yield [drawn[0].clone() for _ in drawn]
    yield [drawn[0] * (-1) ** number for number in range(len(drawn))]
    yield [tensor * 1e-12 for tensor in drawn]


def wild(case: Case, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[list[Tensor]]:
    """Operands with NaN, infinities, the largest and the least of numbers; everywhere, or here and there."""
    odd = (float("nan"), float("inf"), float("-inf"), LARGEST[dtype], -LARGEST[dtype], 1e-310, -0.0)
    for value in odd:
        yield [torch.full(shape, value, dtype=dtype) for _ in case.slots]
    for position in range(len(case.slots)):
        tensors = case.operands(shape, dtype)
        flat = tensors[position].reshape(-1)
        for place in range(flat.numel()):
            flat[place] = odd[place % len(odd)]
        tensors[position] = flat.reshape(shape)
        yield tensors


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """Another time of day, and other states of the shared generators."""
    state, kept, drawn = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    later: Callable[[], float] = lambda: 4.0e9 + 0.123456789  # noqa: E731
    try:
        torch.manual_seed(12345)
        np.random.seed(12345)  # noqa: NPY002
        random.seed(12345)
        with patch("time.time", later):
            yield
    finally:
        torch.set_rng_state(state)
        np.random.set_state(kept)  # noqa: NPY002
        random.setstate(drawn)


def every_group(case: Case, models: list[dict[str, Tensor]]) -> None:
    for group in groups_of(case, case.layout()):
        with raising_nothing(case, "a group reads its inputs alone", f"the group of {group.outputs[0]}"):
            group_result(case, models, group.inputs, group.outputs[0])


def temporary_bytes(case: Case) -> Iterator[tuple[int, int, list[tuple[int, ...]]]]:
    """Bytes held beside operands and result, those of the largest operand, and the operands' shapes."""
    if case.method.declaration.cut == "model":
        models = models_of(case, torch.float32)
        for group in groups_of(case, case.layout()):
            run = partial(group_result, case, models, group.inputs, group.outputs[0])
            yield peak_of(run), max(held[key].nbytes for held in models for key in group.inputs), []
        return
    for one in with_masks(case):
        tensors = one.operands((96, 512))
        used = peak_of(partial(one.apply, tensors, sums=one.sums(tensors, chunk=2**16)))
        yield used, tensors[0].nbytes, [tuple(tensor.shape) for tensor in tensors]
