"""Random programs mean the same to every capability, however tensors are divided, as to an interpreter in torch."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
import torch
from assembly import (
    CAPABILITIES,
    KINDS,
    TYPES,
    Output,
    assert_same,
    instruction,
    needs_native,
    program,
    raw,
    special,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from remelt.core.checksum import checksum
from remelt.engine import native
from remelt.methods.selection import magnitude_of, upper_histogram, window_histogram

pytestmark = needs_native

UNARY = ("copy", "neg", "abs", "sign", "logical_not")
BINARY = ("add", "sub", "mul", "div", "minimum", "maximum", "lt", "le", "gt", "ge", "eq", "ne")
LOGIC = ("logical_and", "logical_or", "logical_xor")
COUNTS = st.sampled_from([0, 1, 15, 16, 17, 63, 1023, 1024, 1025, 2500])


@dataclass
class Code:
    """A program in the making, and what its registers and outputs hold by an interpreter in torch."""

    tensors: list[torch.Tensor]
    names: list[str]
    numbers: list[float]
    instructions: list[list[int]] = field(default_factory=list)
    registers: dict[int, torch.Tensor] = field(default_factory=dict)
    stored: list[torch.Tensor] = field(default_factory=list)

    def operand(self, draw: st.DrawFn, kind: int) -> tuple[int, bool, torch.Tensor]:
        """A register of the kind, or a number."""
        places = [place for place, value in self.registers.items() if value.dtype == KINDS[kind]]
        if not places or draw(st.integers(0, 3)) == 0:
            index = draw(st.integers(0, len(self.numbers) - 1))
            count = len(self.tensors[0])
            number = torch.tensor(self.numbers[index], dtype=torch.float64).to(KINDS[kind])
            return index, True, number.expand(count).clone()
        place = draw(st.sampled_from(places))
        return place, False, self.registers[place]

    def load(self, draw: st.DrawFn) -> None:
        kind, out = draw(st.integers(0, 1)), draw(st.integers(0, 5))
        place = draw(st.integers(0, len(self.tensors) - 1))
        self.instructions.append(instruction("load", out, place, kind=kind, extra=self.names[place]))
        self.registers[out] = self.tensors[place].to(KINDS[kind])

    def store(self, draw: st.DrawFn) -> None:
        kind, name = draw(st.integers(0, 1)), draw(st.sampled_from(list(TYPES)))
        index, is_number, value = self.operand(draw, kind)
        flags = native.WITH_CHECKSUM | is_number
        place = len(self.stored)
        self.instructions.append(instruction("store", place, index, kind=kind, flags=flags, extra=name))
        self.stored.append(value.to(TYPES[name]))

    def compute(self, draw: st.DrawFn) -> None:
        kind, out = draw(st.integers(0, 1)), draw(st.integers(0, 5))
        name = draw(st.sampled_from((*UNARY, *BINARY, *LOGIC, "lerp", "select", "widen", "narrow", "round")))
        extra = draw(st.sampled_from(list(TYPES))) if name == "round" else None
        kind = {"widen": 1, "narrow": 0}.get(name, kind)
        count = 3 if name in ("lerp", "select") else 2 if name in BINARY + LOGIC else 1
        source = 1 - kind if name in ("widen", "narrow") else kind
        operands = [self.operand(draw, source) for _ in range(count)]
        flags = sum(1 << place for place, operand in enumerate(operands) if operand[1])
        indices = [operand[0] for operand in operands]
        self.instructions.append(instruction(name, out, *indices, kind=kind, flags=flags, extra=extra))
        self.registers[out] = meaning(name, [operand[2] for operand in operands], kind, extra)


def meaning(name: str, operands: list[torch.Tensor], kind: int, extra: str | None) -> torch.Tensor:
    """An operation in torch, on a multiple of 64 elements: it rounds some differently at a vector's end."""
    count = len(operands[0])
    padded = [torch.nn.functional.pad(operand, (0, -count % 64)) for operand in operands]
    if name == "select":
        found = torch.where(padded[2] != 0, padded[0], padded[1])
    elif name in ("widen", "narrow"):
        found = padded[0]
    elif name == "round":
        assert extra is not None
        found = padded[0].to(TYPES[extra])
    else:
        found = padded[0].clone() if name == "copy" else getattr(torch, name)(*padded)
    return found.to(KINDS[kind])[:count]


@st.composite
def codes(draw: st.DrawFn) -> Code:
    """A program that loads, computes and stores at least once."""
    names = draw(st.lists(st.sampled_from(list(TYPES)), min_size=1, max_size=3))
    count, seed = draw(COUNTS), draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for name in names:
        values = torch.randn(count, generator=generator, dtype=torch.float64) * 10.0 ** draw(st.integers(-3, 3))
        if count and draw(st.booleans()):
            values[torch.randint(count, (5,), generator=generator)] = special(1)[
                torch.randint(32, (5,), generator=generator)
            ]
        tensors.append(values.to(TYPES[name]))
    some = st.sampled_from([0.0, -0.0, 0.3, 0.5, 1.0, -2.5, 1e-45, 1e39, float("inf"), float("nan"), 1 / 3])
    code = Code(tensors, names, draw(st.lists(some, min_size=1, max_size=4)))
    code.load(draw)
    for step in draw(st.lists(st.sampled_from(["load", "store", "compute", "compute", "compute"]), max_size=20)):
        getattr(code, step)(draw)
    code.store(draw)
    return code


def run_in_parts(code: Code, checked: native.Program, cuts: list[int]) -> tuple[list[torch.Tensor], native.Report]:
    """The outputs, of calls that begin at the cuts, and what they found together."""
    count = len(code.tensors[0])
    outputs = [Output(stored.dtype, count) for stored in code.stored]
    loads: set[int] = set()
    stores: set[int] = set()
    sums = [0] * len(outputs)
    for begin, end in zip(cuts, [*cuts[1:], count], strict=True):
        inputs = [raw(tensor[begin:end]) for tensor in code.tensors]
        memories = [out.memory[begin * out.dtype.itemsize : end * out.dtype.itemsize] for out in outputs]
        report = native.run(checked, code.numbers, inputs, memories, end - begin, start=begin)
        loads.update(report.loads)
        stores.update(report.stores)
        sums = [(a + b) % 2**64 for a, b in zip(sums, report.checksums, strict=True)]
    found = native.Report((tuple(sorted(loads)), tuple(sorted(stores)), tuple(sums), 0, 0))
    for out, total in zip(outputs, sums, strict=True):
        assert total == checksum(out.memory)
    return [out.tensor for out in outputs], found


def not_finite(tensors: list[torch.Tensor]) -> tuple[int, ...]:
    return tuple(place for place, tensor in enumerate(tensors) if not tensor.to(torch.float64).isfinite().all())


@settings(max_examples=150, deadline=None)
@given(codes(), st.lists(st.integers(1, 300).map(lambda step: step * 8), max_size=3))
def test_random_programs_mean_what_torch_makes_of_them(code: Code, steps: list[int]) -> None:
    checked = program(*code.instructions, inputs=len(code.tensors), outputs=len(code.stored), numbers=len(code.numbers))
    count = len(code.tensors[0])
    cuts = [0, *sorted({step for step in steps if step < count})]
    loaded = [line[3] for line in code.instructions if line[0] == native.OPERATIONS["load"]]
    before = native.capability()
    reports = []
    try:
        for capability in CAPABILITIES:
            native.use(capability)
            for parts in ([0], cuts):
                found, report = run_in_parts(code, checked, parts)
                for tensor, expected in zip(found, code.stored, strict=True):
                    assert_same(tensor, expected)
                assert report.loads == not_finite([code.tensors[place] for place in loaded])
                assert report.stores == not_finite(code.stored)
                reports.append(report)
    finally:
        native.use(before)
    if not any(stored.to(torch.float64).isnan().any() for stored in code.stored):
        assert len(set(reports)) == 1


def summed(values: npt.NDArray[np.float64]) -> list[float]:
    """Sums of chunks in the shape that is promised: 16 lanes, then halves upon halves."""
    found = []
    for begin in range(0, len(values), native.CHUNK):
        chunk = values[begin : begin + native.CHUNK]
        rows = np.concatenate([chunk, np.zeros(-len(chunk) % 16)]).reshape(-1, 16)
        lanes = np.add.accumulate(rows, axis=0)[-1]
        for half in (8, 4, 2, 1):
            lanes = lanes[:half] + lanes[half : 2 * half]
        found.append(float(lanes[0]))
    return found


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 15, 16, 1000, 1025, 2**16, 2**16 + 1, 3 * 2**16 + 77])
def test_reductions_have_a_fixed_shape_for_any_division(count: int, kind: int) -> None:
    values = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count)).to(KINDS[kind])
    stored = ("F32", "F64")[kind]
    code = program(
        instruction("load", 0, 0, kind=kind, extra=stored),
        instruction("reduce_sum", 1, 0, kind=kind),
        instruction("reduce_maximum", 0, 0, kind=kind),
        instruction("reduce_minimum", 2, 0, kind=kind),
        instruction("reduce_sum", 3, 0, kind=kind, flags=1),
        numbers=1,
        outputs=0,
        accumulators=4,
    )
    chunks = -(-count // native.CHUNK)
    whole = np.full((chunks, 4), -1.0)
    native.run(code, [0.25], [raw(values)], [], count, sums=whole)
    assert whole[:, 1].tolist() == summed(values.double().numpy())
    pieces = values.split(native.CHUNK) if count else ()
    assert whole[:, 0].tolist() == [piece.max().item() for piece in pieces]
    assert whole[:, 2].tolist() == [piece.min().item() for piece in pieces]
    assert whole[:, 3].tolist() == [0.25 * len(piece) for piece in pieces]
    parts = np.full((chunks, 4), -1.0)
    for place, piece in enumerate(pieces):
        begin = place * native.CHUNK
        native.run(code, [0.25], [raw(piece)], [], len(piece), start=begin, sums=parts[place : place + 1])
    assert parts.tobytes() == whole.tobytes()


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("name", ["reduce_sum", "reduce_maximum", "reduce_minimum"])
def test_reductions_spread_nan(name: str) -> None:
    code = program(instruction("load", 0, 0, extra="F32"), instruction(name, 0, 0), outputs=0, accumulators=1)
    for place in (0, 17, 1023, 1024, 1029):
        values = torch.randn(1030)
        values[place] = float("nan")
        sums = np.zeros(1)
        assert native.run(code, [], [raw(values)], [], 1030, sums=sums).loads == (0,)
        assert np.isnan(sums[0])


@pytest.mark.usefixtures("capability")
def test_histograms_of_upper_halves_and_of_a_window_select_a_quantile_exactly() -> None:
    values = torch.randn(70_001, generator=torch.Generator().manual_seed(1))
    values[100:200] = values[99]
    wanted = 31_234
    both = program(
        instruction("load", 0, 0, extra="F32"),
        instruction("histogram_window", 1, 0, 0, flags=2, extra=16),
        instruction("histogram_upper", 0, 0),
        outputs=0,
        histograms=2,
        numbers=1,
    )
    counts = np.zeros(both.counts, dtype=np.int32)
    assert len(counts) == 2**15 + 2**16 + 1
    native.run(both, [-1.0], [raw(values)], [], len(values), counts=counts)
    bins, window = counts[: 2**15], counts[2**15 :]
    assert np.array_equal(bins, upper_histogram(values))
    assert not window.any()
    upper = int(np.searchsorted(np.cumsum(bins), wanted, side="right"))
    below = int(bins[:upper].sum())
    native.run(both, [float(upper * 2**8)], [raw(values)], [], len(values), counts=counts)
    assert window[-1] == below
    assert window[:-1].sum() * 2 == bins[upper]
    assert np.array_equal(window, window_histogram(values, float(upper * 2**8), 2**16))
    lower = int(np.searchsorted(np.cumsum(window[:-1]), wanted - below, side="right"))
    assert magnitude_of(upper << 16 | lower) == values.abs().sort().values[wanted].item()


@pytest.mark.usefixtures("capability")
@settings(max_examples=40)
@given(
    bits=st.lists(st.integers(0, 2**32 - 1) | st.sampled_from([0, 0x7F800000, 0x7FC00000, 0xFFFFFFFF]), max_size=600),
    row=st.integers(0, 2**23 - 1),
    wide=st.sampled_from([0, 1, 8, 20]),
)
def test_a_window_counts_any_bits(bits: list[int], row: int, wide: int) -> None:
    begin = row * native.ROW
    bits += [begin, begin + 1, max(begin - 1, 0), begin + 2**wide]  # about its ends
    values = np.array(bits, dtype=np.uint64).astype(np.uint32)
    code = program(
        instruction("load", 0, 0, extra="F32"),
        instruction("histogram_window", 0, 0, 0, flags=2, extra=wide),
        outputs=0,
        histograms=1,
        numbers=1,
    )
    counts = np.zeros(code.counts, dtype=np.int32)
    native.run(code, [float(row)], [values.view(np.uint8)], [], len(values), counts=counts)
    magnitudes = values.astype(np.int64) & 0x7FFFFFFF
    inside = magnitudes[(magnitudes >= begin) & (magnitudes < begin + 2**wide)] - begin
    assert np.array_equal(counts[:-1], np.bincount(inside, minlength=2**wide))
    assert counts[-1] == (magnitudes < begin).sum()


def test_other_threads_go_on_while_a_program_runs() -> None:
    """The main thread sees a tensor's beginning written while its end is not: it cannot where the lock is held."""
    count = 2**24
    lines = [instruction("load", 0, 0, extra="F8_E5M2"), *[instruction("sqrt", 0, 0)] * 40]
    code = program(*lines, instruction("store", 0, 0, extra="F8_E5M2"))
    before = native.capability()
    native.use("plain")
    try:
        for _ in range(20):
            data, out = b"\x3c" * count, bytearray(count)
            thread = threading.Thread(target=native.run, args=(code, [], [data], [out], count))
            thread.start()
            seen = False
            while thread.is_alive() and not seen:
                last = out[-1]
                seen = out[0] != 0 and last == 0
            thread.join()
            assert out[0] == out[-1] == 0x3C
            if seen:
                return
    finally:
        native.use(before)
    pytest.fail("no thread ever saw a call halfway")


def test_one_program_runs_in_many_threads_at_once() -> None:
    code = program(
        instruction("load", 0, 0, extra="F32"),
        instruction("mul", 0, 0, 0, flags=2),
        instruction("store", 0, 0, extra="F32"),
        numbers=1,
    )
    values = torch.randn(50_001)
    data = raw(values)
    found: list[torch.Tensor] = [torch.empty(0)] * 8

    def work(place: int) -> None:
        for _ in range(20):
            output = Output(torch.float32, len(values))
            native.run(code, [float(place)], [data], [output.memory], len(values))
        found[place] = output.tensor

    threads = [threading.Thread(target=work, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, tensor in enumerate(found):
        assert_same(tensor, values * place)
