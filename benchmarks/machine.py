"""The machine, and the limits that it sets, measured in the same run: copies of memory, reads and writes of pages."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

BLOCK = 1 << 20
ROUNDS = 5
GIGA = 1e9


def memory_bytes() -> float:
    """Bytes of memory of the machine, or of its container; infinite where it cannot be told."""
    found = [float("inf")]
    try:
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError, AttributeError):
        pass
    return min(found)


def bind(threads: int) -> None:
    """Leave only as many processors as threads to this process and to all that it starts."""
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[:threads])


def describe(threads: int) -> dict[str, str]:
    """The machine in words."""
    cores = os.cpu_count() or 1
    return {
        "processor": f"{processor()}, {cores} cores, of which {min(threads, cores)} are used",
        "memory": f"{memory_bytes() / 2**30:.1f} GiB",
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "numpy": version("numpy"),
        "remelt": version_of_remelt(),
    }


def version_of_remelt() -> str:
    """The version of the library, installed or not."""
    import remelt

    return remelt.__version__


def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def limits(folder: Path, model: Path, *, small: bool, threads: int) -> dict[str, str]:
    """What the machine can do at most, each the median of some rounds, in GB/s."""
    size = model.stat().st_size
    buffer = (1 << 24) if small else (1 << 28)
    found = {
        "copying memory, one thread": median_of(lambda: copy_memory(buffer, 1)),
        f"copying memory, {threads} threads": median_of(lambda: copy_memory(buffer, threads)),
        "reading cached bytes, one thread": median_of(lambda: read_cached(model, 1)),
        f"reading cached bytes, {threads} threads": median_of(lambda: read_cached(model, threads)),
        "writing into a fresh file, one thread": median_of(lambda: write_fresh(folder / "limit", size, 1)),
        f"writing into a fresh file, {threads} threads": median_of(
            lambda: write_fresh(folder / "limit", size, threads)
        ),
    }
    return {name: f"{speed / GIGA:.1f} GB/s" for name, speed in found.items()}


def median_of(measure: Callable[[], float]) -> float:
    """The median of some rounds."""
    return statistics.median(measure() for _ in range(ROUNDS))


def copy_memory(size: int, threads: int) -> float:
    """Bytes copied a second, between two pieces of memory; what is read and what is written count once together."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    return size / in_threads(threads, size, lambda begin, end: np.copyto(target[begin:end], source[begin:end]))


def read_cached(path: Path, threads: int) -> float:
    """Bytes a second of reading a file in the page cache, a block at a time."""
    size = path.stat().st_size
    descriptor = os.open(path, os.O_RDONLY)

    def read(begin: int, end: int) -> None:
        buffer = bytearray(BLOCK)
        for offset in range(begin, end, BLOCK):
            os.preadv(descriptor, [buffer], offset)

    try:
        return size / in_threads(threads, size, read)
    finally:
        os.close(descriptor)


def write_fresh(path: Path, size: int, threads: int) -> float:
    """Bytes a second of writing a file that is reserved and has no pages yet, a block at a time; not flushed."""
    block = memoryview(bytes(BLOCK))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)

    def write(begin: int, end: int) -> None:
        for offset in range(begin, end, BLOCK):
            os.pwrite(descriptor, block[: min(BLOCK, end - offset)], offset)

    try:
        begun = time.perf_counter()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        reserved = time.perf_counter() - begun
        return size / (reserved + in_threads(threads, size, write))
    finally:
        os.close(descriptor)
        path.unlink()


def in_threads(threads: int, size: int, work: Callable[[int, int], object]) -> float:
    """Seconds until threads have done equal parts of some bytes, in whole blocks."""
    part = -(-size // threads // BLOCK) * BLOCK
    workers = [threading.Thread(target=work, args=(begin, min(begin + part, size))) for begin in range(0, size, part)]
    begun = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - begun


def can_measure() -> bool:
    """Whether this system has what the limits are measured with."""
    return sys.platform != "win32" and hasattr(os, "preadv")
