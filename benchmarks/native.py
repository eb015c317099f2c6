"""How fast the native executor is in the cache, on one thread, beside torch: ``python benchmarks/native.py``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from remelt.core.checksum import checksum
from remelt.engine import native

COUNT = 2**16
REPEATS = 41
NUMBER = {name: place for place, name in enumerate(("third", "tenth"))}


def line(
    name: str, out: int, a: int = 0, b: int = 0, c: int = 0, flags: int = 0, kind: int = 0, extra: str = "F64"
) -> list[int]:
    """One instruction."""
    return [native.OPERATIONS[name], kind, out, a, b, c, flags, native.TYPES[extra]]


def lerp_of_two(stored: str, flags: int = native.WITH_CHECKSUM, kind: int = 0) -> list[list[int]]:
    """What a weighted sum of two models runs."""
    loads = [line("load", place, place, kind=kind, extra=stored) for place in (0, 1)]
    return [*loads, line("lerp", 0, 0, 1, 0, 4, kind=kind), line("store", 0, 0, flags=flags, kind=kind, extra=stored)]


def average_of_ten() -> list[list[int]]:
    lines = [line("load", 0, 0, extra="F16")]
    for place in range(1, 10):
        lines += [line("load", 1, place, extra="F16"), line("add", 0, 0, 1)]
    return [*lines, line("mul", 0, 0, 1, flags=2), line("store", 0, 0, flags=native.WITH_CHECKSUM, extra="F16")]


def chain_of_twenty() -> list[list[int]]:
    lines = [line("load", place, place, extra="F16") for place in range(4)]
    lines += [line("lerp", 0, 0, 1 + place % 3, 0, 4) for place in range(20)]
    return [*lines, line("store", 0, 0, flags=native.WITH_CHECKSUM, extra="F16")]


CASES: dict[str, tuple[list[list[int]], int, int]] = {
    "lerp of 2, fp16, checksum": (lerp_of_two("F16"), 2, 2),
    "lerp of 2, fp16, no checksum": (lerp_of_two("F16", 0), 2, 2),
    "lerp of 2, bf16, checksum": (lerp_of_two("BF16"), 2, 2),
    "lerp of 2, fp8 e4m3, checksum": (lerp_of_two("F8_E4M3"), 2, 1),
    "lerp of 2, fp16 in float64": (lerp_of_two("F16", kind=1), 2, 2),
    "mean of 10, fp16": (average_of_ten(), 10, 2),
    "20 chained lerps of 4, fp16": (chain_of_twenty(), 4, 2),
}


def seconds(work: Callable[[], object]) -> float:
    """The median of many runs, each long enough to be timed."""
    found = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        for _ in range(10):
            work()
        found.append((time.perf_counter() - begin) / 10)
    return statistics.median(found)


def speed_of(lines: list[list[int]], inputs: int, width: int) -> float:
    """Billions of elements a second."""
    code = native.Program(np.array(lines, dtype=np.uint16), 8, len(NUMBER), inputs, 1)
    generator = np.random.default_rng(1)
    values = [generator.standard_normal(COUNT).astype(np.float16) for _ in range(inputs)]
    data = [(value if width == 2 else value.view(np.uint8)[1::2].copy()) for value in values]
    out, numbers = np.empty(COUNT * width, np.uint8), np.array([1 / 3, 0.1])
    return COUNT / seconds(lambda: native.run(code, numbers, data, [out], COUNT)) / 1e9


def main() -> None:
    """Print one table."""
    if not native.available():
        print(f"the native executor is {native.capability()}")
        return
    capabilities = native.capabilities()
    print(f"{'billions of elements a second':34}" + "".join(f"{name:>9}" for name in capabilities))
    for title, (lines, inputs, width) in CASES.items():
        speeds = []
        for name in capabilities:
            native.use(name)
            speeds.append(f"{speed_of(lines, inputs, width):9.2f}")
        print(f"{title:34}" + "".join(speeds))
    torch.set_num_threads(1)
    a, b, out = (torch.randn(COUNT).half() for _ in range(3))
    print(f"{'torch.lerp on halves':34}{COUNT / seconds(lambda: torch.lerp(a, b, 1 / 3, out=out)) / 1e9:9.2f}")
    data = np.random.default_rng(1).integers(0, 255, 2**20, dtype=np.uint8)
    print(f"{'GB/s':34}" + "".join(f"{name:>9}" for name in (*capabilities, "numpy")))
    for title, kind in (("checksum", "OPAQUE"), ("finite and checksum, fp16", "F16")):
        rates: list[float] = []
        for name in capabilities:
            native.use(name)
            rates.append(len(data) / seconds(partial(native.inspect, data, native.TYPES[kind])) / 1e9)
        if kind == "OPAQUE":
            rates.append(len(data) / seconds(lambda: checksum(data.data)) / 1e9)
        print(f"{title:34}" + "".join(f"{speed:9.1f}" for speed in rates))
    native.use(capabilities[0])
    code = native.Program(np.array(lerp_of_two("F16"), dtype=np.uint16), 2, 1, 2, 1)
    few = [a[:16].numpy(), b[:16].numpy()]
    each = seconds(lambda: [native.run(code, [0.5], few, [out.numpy()[:16]], 16) for _ in range(100)]) / 100
    print(f"a call with 3 buffers of 16 elements: {each * 1e6:.2f} microseconds")


if __name__ == "__main__":
    main()
