"""What all kinds of adapters keep to: rows as asked for, no more of the base than needed, and clear refusals."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from remelt.adapters.change import Change, Parts, Rows
from remelt.adapters.kinds import KINDS, Use, kind_of
from remelt.core.tensor_info import TensorInfo
from remelt.errors import AdapterError
from remelt.tensors import FROM_TORCH

Shapes = Mapping[str, tuple[int, ...]]

LORA: Shapes = {"lora_up.weight": (24, 4), "lora_down.weight": (4, 12)}
LOHA: Shapes = {"hada_w1_a": (24, 4), "hada_w1_b": (4, 12), "hada_w2_a": (24, 4), "hada_w2_b": (4, 12)}
LOKR: Shapes = {"lokr_w1": (4, 3), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 4)}
GLORA: Shapes = {"a1.weight": (12, 4), "a2.weight": (4, 12), "b1.weight": (24, 4), "b2.weight": (4, 12)}
MATRIX, KERNEL, BIAS = (24, 12), (24, 12, 3, 3), (24,)

CASES: dict[str, tuple[Shapes, tuple[int, ...], dict[str, Any]]] = {
    "lora": (LORA, MATRIX, {}),
    "lora of a kernel": ({"lora_up.weight": (24, 4, 1, 1), "lora_down.weight": (4, 12, 3, 3)}, KERNEL, {}),
    "lora, kernel above": ({"lora_up.weight": (24, 4, 3, 3), "lora_down.weight": (4, 12, 1, 1)}, KERNEL, {}),
    "lora with a core": ({**LORA, "lora_mid.weight": (4, 4, 3, 3)}, KERNEL, {}),
    "lora, turned": (
        {"lora_up.weight": (12, 4), "lora_down.weight": (4, 24)},
        MATRIX,
        {"options": {"transposed": True}},
    ),
    "dora by row": ({**LORA, "dora_scale": (24, 1)}, MATRIX, {}),
    "dora by column": ({**LORA, "dora_scale": (1, 12)}, MATRIX, {}),
    "dora by column of a kernel": ({**LORA, "lora_mid.weight": (4, 4, 3, 3), "dora_scale": (1, 12, 1, 1)}, KERNEL, {}),
    "loha": (LOHA, MATRIX, {}),
    "loha with cores": (
        {
            "hada_w1_a": (4, 24),
            "hada_w1_b": (4, 12),
            "hada_w2_a": (4, 24),
            "hada_w2_b": (4, 12),
            "hada_t1": (4, 4, 3, 3),
            "hada_t2": (4, 4, 3, 3),
        },
        KERNEL,
        {},
    ),
    "lokr": (LOKR, MATRIX, {}),
    "lokr, both whole": ({"lokr_w1": (4, 3), "lokr_w2": (6, 4, 3, 3)}, KERNEL, {}),
    "lokr, small first": ({"lokr_w1": (1, 1), "lokr_w2_a": (24, 2), "lokr_w2_b": (2, 12)}, MATRIX, {}),
    "lokr, small second": ({"lokr_w1_a": (24, 2), "lokr_w1_b": (2, 12), "lokr_w2": (1, 1)}, MATRIX, {}),
    "lokr with a core": (
        {"lokr_w1": (4, 3), "lokr_w2_a": (2, 6), "lokr_w2_b": (2, 4), "lokr_t2": (2, 2, 3, 3)},
        KERNEL,
        {},
    ),
    "glora": (GLORA, MATRIX, {}),
    "glora of a kernel": ({**GLORA, "b2.weight": (4, 12, 3, 3)}, KERNEL, {}),
    "ia3": ({"ia3_l": (24, 1)}, MATRIX, {}),
    "ia3 of inputs": ({"ia3_l": (1, 12, 1, 1)}, KERNEL, {}),
    "oft": ({"oft_blocks": (6, 4, 4), "rescale": (24, 1)}, MATRIX, {}),
    "oft of one block": ({"oft_blocks": (1, 24, 24)}, MATRIX, {}),
    "oft of inputs": ({"oft_R": (3, 6)}, MATRIX, {}),
    "boft": ({"oft_blocks": (3, 12, 2, 2), "rescale": (24, 1)}, MATRIX, {}),
    "boft of one stage": ({"oft_blocks": (1, 6, 4, 4)}, MATRIX, {}),
    "boft of all rows": ({"oft_blocks": (3, 4, 6, 6)}, KERNEL, {}),
    "boft of inputs": ({"boft_R": (2, 6, 2, 2), "boft_s": (24, 1)}, MATRIX, {}),
    "difference": ({"diff": KERNEL}, KERNEL, {}),
    "weight": ({"set_weight": MATRIX}, MATRIX, {}),
    "norm": ({"w_norm": BIAS}, BIAS, {}),
}


def drawn(shapes: Shapes, dtype: torch.dtype = torch.float32, **more: Tensor) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(0)
    random = {name: torch.randn(shape, generator=made, dtype=torch.float64) * 0.4 for name, shape in shapes.items()}
    return {name: one.to(dtype) for name, one in random.items()} | more


def parts_of(tensors: Mapping[str, Tensor], **facts: Any) -> Parts:
    infos = {name: TensorInfo(FROM_TORCH[one.dtype], tuple(one.shape)) for name, one in tensors.items()}
    return Parts("mid.to_q", infos, dict(tensors).__getitem__, **facts)


def used(parts: Parts, target: str = "weight") -> Use:
    return next(use for use in kind_of(parts.infos, parts.module) if use.target == target)


def opened(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], target: str = "weight", **facts: Any
) -> tuple[Change, Parts]:
    dtype = facts.pop("dtype", torch.float32)
    parts = parts_of(tensors, **facts)
    kind = used(parts, target).kind
    kind.check(parts, shape)
    return kind.open(parts, shape, dtype), parts


def base_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).flatten(1).to(dtype)


def base_rows(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Rows:
    base = base_of((*shape, 1), dtype)
    return lambda begin, end: base[begin:end]


def refused(tensors: Mapping[str, Tensor], shape: tuple[int, ...], message: str, **facts: Any) -> AdapterError:
    parts = parts_of(tensors, **facts)
    with pytest.raises(AdapterError, match=re.escape(message)) as caught:
        used(parts).kind.check(parts, shape)
    return caught.value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_any_rows_are_those_of_the_whole(name: str, dtype: torch.dtype) -> None:
    shapes, shape, facts = CASES[name]
    change, parts = opened(drawn(shapes), shape, dtype=dtype, **facts)
    base = base_rows(shape, dtype)
    whole = change.rows(0, 24, base)
    assert whole.shape == base(0, 24).shape
    assert whole.dtype == dtype
    assert whole.abs().max() > 1e-3
    if not used(parts).kind.asks_base(parts):
        torch.testing.assert_close(change.rows(0, 24, None), whole, rtol=0.0, atol=0.0)
    allowed = float(whole.abs().max()) * (3e-6 if dtype == torch.float32 else 1e-13)

    @settings(max_examples=25)
    @given(st.lists(st.integers(0, 24), max_size=5))
    def holds(cuts: list[int]) -> None:
        ends = [0, *sorted(cuts), 24]
        pieces = [change.rows(a, b, base) for a, b in itertools.pairwise(ends) if b > a]
        torch.testing.assert_close(torch.cat(pieces), whole, rtol=0.0, atol=allowed)

    holds()


@pytest.mark.parametrize("name", CASES)
def test_what_is_given_may_be_written_to(name: str) -> None:
    shapes, shape, facts = CASES[name]
    change, _ = opened(drawn(shapes), shape, **facts)
    base = base_rows(shape)
    first = change.rows(4, 9, base)
    kept = first.clone()
    first.fill_(7.0)
    torch.testing.assert_close(change.rows(4, 9, base), kept, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", CASES)
def test_no_more_of_the_base_is_read_than_the_rows_depend_on(name: str) -> None:
    shapes, shape, facts = CASES[name]
    change, parts = opened(drawn(shapes), shape, **facts)
    base, read = base_rows(shape), []

    def rows(begin: int, end: int) -> Tensor:
        read.append((begin, end))
        return base(begin, end)

    change.rows(9, 11, rows)
    wide = {"oft": [(8, 12)], "oft of one block": [(0, 24)], "boft": [(8, 16)], "boft of one stage": [(8, 12)]}
    wide["boft of all rows"] = [(0, 24)]
    whole = [(0, 24)] if name.startswith("dora by column") else []
    assert read == ([*wide.get(name, [(9, 11)]), *whole] if used(parts).kind.asks_base(parts) else [])


def test_norms_of_columns_are_taken_once_by_however_many_threads() -> None:
    change, _ = opened(drawn({**LORA, "dora_scale": (1, 12)}), MATRIX)
    base, passes, start = base_rows(MATRIX), [], threading.Barrier(4)

    def rows(begin: int, end: int) -> Tensor:
        if (begin, end) == (0, 24):
            passes.append(begin)
        return base(begin, end)

    def work() -> None:
        start.wait()
        for row in range(24):
            change.rows(row, row + 1, rows)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert passes == [0]


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("name", CASES)
def test_factors_of_few_bits_are_computed_with_in_full(name: str, stored: torch.dtype) -> None:
    shapes, shape, facts = CASES[name]
    tensors = drawn(shapes, stored)
    base = base_rows(shape)
    found = opened(tensors, shape, **facts)[0].rows(0, 24, base)
    due = opened({part: one.float() for part, one in tensors.items()}, shape, **facts)[0].rows(0, 24, base)
    assert torch.equal(found, due)


@pytest.mark.parametrize("turned", [False, True])
def test_a_kernel_of_one_may_be_left_out_on_either_side(turned: bool) -> None:
    flat, tall = drawn(LORA), drawn({"lora_up.weight": (24, 4, 1, 1), "lora_down.weight": (4, 12, 1, 1)})
    due = flat["lora_up.weight"] @ flat["lora_down.weight"]
    tensors, shape = (tall, MATRIX) if turned else (flat, (24, 12, 1, 1))
    torch.testing.assert_close(opened(tensors, shape)[0].rows(0, 24, None), due)


def test_a_kernel_in_the_upper_factor_is_a_convolution_after_the_lower_one() -> None:
    shapes, shape, _ = CASES["lora, kernel above"]
    tensors = drawn(shapes)
    delta = opened(tensors | {"alpha": torch.tensor(8.0)}, shape)[0].rows(0, 24, None).reshape(shape) / 2.0
    inputs = torch.randn(1, 12, 6, 6, generator=torch.Generator().manual_seed(2))
    convolved = torch.nn.functional.conv2d(inputs, tensors["lora_down.weight"])
    due = torch.nn.functional.conv2d(convolved, tensors["lora_up.weight"])
    torch.testing.assert_close(torch.nn.functional.conv2d(inputs, delta), due, rtol=1e-5, atol=1e-5)


def test_glora_as_lycoris_saved_it_once() -> None:
    tensors = drawn({"a1.weight": (4, 12), "a2.weight": (12, 4), "b1.weight": (4, 12), "b2.weight": (24, 4)})
    base = base_of(MATRIX)
    due = base @ tensors["a2.weight"] @ tensors["a1.weight"] + tensors["b2.weight"] @ tensors["b1.weight"]
    found = opened(tensors | {"alpha": torch.tensor(8.0)}, MATRIX)[0].rows(0, 24, lambda a, b: base[a:b])
    torch.testing.assert_close(found, 2.0 * due, rtol=1e-5, atol=1e-5)


def test_the_scale_is_that_of_the_configuration_else_alpha_by_rank_else_one() -> None:
    tensors = drawn(LORA)
    due = tensors["lora_up.weight"] @ tensors["lora_down.weight"]
    for more, facts, scale in (
        ({}, {}, 1.0),
        ({"alpha": torch.tensor(2.0)}, {}, 0.5),
        ({"alpha": torch.tensor([[2]])}, {}, 0.5),
        ({"alpha": torch.tensor(2.0, dtype=torch.bfloat16)}, {"scale": 3.0}, 3.0),
    ):
        found = opened(tensors | more, MATRIX, **facts)[0].rows(0, 24, None)
        torch.testing.assert_close(found, scale * due)


def test_alpha_does_not_count_where_a_lokr_has_no_rank() -> None:
    tensors = drawn({"lokr_w1": (4, 3), "lokr_w2": (6, 4)})
    due = torch.kron(tensors["lokr_w1"], tensors["lokr_w2"])
    for more, facts, scale in (({"alpha": torch.tensor(8.0)}, {}, 1.0), ({}, {"scale": 2.0}, 2.0)):
        torch.testing.assert_close(opened(tensors | more, MATRIX, **facts)[0].rows(0, 24, None), scale * due)


def test_a_weight_that_replaces_gives_the_difference_to_it() -> None:
    tensors, base = drawn({"set_weight": MATRIX}), base_of(MATRIX)
    found = opened(tensors, MATRIX)[0].rows(3, 9, lambda a, b: base[a:b])
    torch.testing.assert_close(found, (tensors["set_weight"] - base)[3:9])


def test_a_module_may_change_its_weight_and_its_bias() -> None:
    parts = parts_of(drawn({**LORA, "diff_b": BIAS, "alpha": (1,)}))
    weight, bias = kind_of(parts.infos, parts.module)
    assert (weight.target, weight.parts) == ("weight", ("lora_up.weight", "lora_down.weight", "alpha"))
    assert (bias.target, bias.parts) == ("bias", ("diff_b", "alpha"))
    assert not weight.kind.optional
    assert not bias.kind.optional


def test_the_bias_of_a_lora_is_scaled_as_its_product() -> None:
    tensors = drawn({**LORA, "lora_up.bias": BIAS}, alpha=torch.tensor(2.0))
    change, _ = opened(tensors, BIAS, "bias")
    change.rows(0, 24, None).fill_(7.0)
    torch.testing.assert_close(change.rows(0, 24, None), 0.5 * tensors["lora_up.bias"][:, None])


def test_an_ia3_of_outputs_changes_a_bias_if_there_is_one() -> None:
    """Of a convolution, the configuration may say that its inputs are multiplied: then the bias stays."""
    base = base_rows(BIAS)
    for shape, options, changes in (
        ((24, 1), {}, True),
        ((1, 24, 1, 1), {}, True),
        ((1, 24, 1, 1), {"feedforward_modules": ".*to_q"}, False),
        ((1, 24, 1, 1), {"feedforward_modules": ["to_k"]}, True),
        ((1, 12, 1, 1), {}, False),
    ):
        tensors = drawn({"ia3_l": shape})
        change, parts = opened(tensors, BIAS, "bias", options=options)
        assert used(parts, "bias").kind.optional
        due = (tensors["ia3_l"].reshape(-1, 1) - 1.0) * base(0, 24) if changes else torch.zeros(24, 1)
        torch.testing.assert_close(change.rows(0, 24, base), due)
    assert [use.target for use in kind_of(parts_of(drawn({"ia3_l": (1, 12)})).infos, "mid")] == ["weight"]


def test_a_vector_of_zeros_stays_one_where_a_norm_has_nothing_added() -> None:
    tensors = drawn({**LORA, "dora_scale": BIAS})
    tensors["lora_up.weight"][3] = 0.0
    base = base_of(MATRIX)
    base[3] = 0.0
    found = opened(tensors, MATRIX)[0].rows(0, 24, lambda a, b: base[a:b])
    assert torch.equal(found[3], torch.zeros(12))
    norms = (base + tensors["lora_up.weight"] @ tensors["lora_down.weight"]).norm(dim=1)
    due = tensors["dora_scale"].abs()
    torch.testing.assert_close((base + found).norm(dim=1)[norms > 0.0], due[norms > 0.0])


@pytest.mark.parametrize("name", CASES)
def test_every_factor_is_needed(name: str) -> None:
    """Without one of them, the module is of no kind, is refused, or is one with fewer parts."""
    shapes, shape, facts = CASES[name]
    spare = {"rescale", "dora_scale", "alpha", "lora_mid.weight"}
    for left in set(shapes) - spare:
        tensors = drawn({part: size for part, size in shapes.items() if part != left})
        parts = parts_of(tensors, **facts)
        with pytest.raises(AdapterError, match=r"is missing|no kind of adapter|are not of one rank"):
            used(parts).kind.check(parts, shape)


def test_an_ia3_of_a_convolution_that_may_be_of_inputs_or_outputs_asks_for_the_configuration() -> None:
    tensors, shape = drawn({"ia3_l": (1, 24, 1, 1)}), (24, 24, 3, 3)
    told = "ia3_l [1, 24, 1, 1] may be of the inputs or of the outputs of [24, 24, 3, 3]"
    error = refused(tensors, shape, told)
    assert error.hint is not None
    assert "feedforward_modules" in error.hint
    base = base_rows(shape)
    by = tensors["ia3_l"].flatten() - 1.0
    found = opened(tensors, shape, options={"feedforward": True})[0].rows(0, 24, base)
    torch.testing.assert_close(found, base(0, 24) * by.repeat_interleave(9))
    found = opened(tensors, shape, options={"feedforward": False})[0].rows(0, 24, base)
    torch.testing.assert_close(found, base(0, 24) * by[:, None])


@pytest.mark.parametrize("name", CASES)
def test_factors_that_are_not_finite_are_refused_when_opened(name: str) -> None:
    shapes, shape, facts = CASES[name]
    for part in shapes:
        for bad in (float("nan"), float("inf")):
            tensors = drawn(shapes)
            tensors[part].view(-1)[-1] = bad
            parts = parts_of(tensors, **facts)
            kind = used(parts).kind
            kind.check(parts, shape)
            with pytest.raises(AdapterError, match=f"mid.to_q: {re.escape(part)} has numbers that are not finite"):
                kind.open(parts, shape, torch.float32)


def test_checking_reads_scalars_at_most() -> None:
    for shapes, shape, facts in CASES.values():
        parts = parts_of(drawn(shapes, alpha=torch.tensor(1.0)), **facts)
        reads: list[str] = []

        def read(name: str, parts: Parts = parts, reads: list[str] = reads) -> Tensor:
            reads.append(name)
            return parts.read(name)

        kind = next(kind for kind in KINDS if kind.is_of(parts.infos))
        kind.check(Parts(parts.module, parts.infos, read, parts.scale, parts.options), shape)
        assert set(reads) <= {"alpha"}


def test_every_kind_is_named_and_told_apart() -> None:
    assert {kind.target for kind in KINDS} == {"weight", "bias"}
    for name, (shapes, _, _) in CASES.items():
        weights = [kind for kind in KINDS if kind.target == "weight" and kind.is_of(parts_of(drawn(shapes)).infos)]
        assert len(weights) == 1, name
        assert set(shapes) <= weights[0].names
