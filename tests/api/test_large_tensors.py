"""Tensors beyond the limits of 32 bits, from sparse files, so that no disk has to be large."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

import remelt as rm
from remelt.engine.sink import FileSink
from remelt.formats.checkpoint import open_checkpoint

ROWS, COLUMNS = 5 * 2**15, 2**14
SIZE = ROWS * COLUMNS * 2


def sparse(path: Path, ends: tuple[float, float]) -> Path:
    """A file with one F16 tensor of 5 GiB, zero but for its first and last element."""
    entry = {"big": {"dtype": "F16", "shape": [ROWS, COLUMNS], "data_offsets": [0, SIZE]}}
    header = json.dumps(entry).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        begin = file.tell()
        file.write(np.float16(ends[0]).tobytes())
        file.truncate(begin + SIZE)
        file.seek(begin + SIZE - 2)
        file.write(np.float16(ends[1]).tobytes())
    return path


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="sparse files as on POSIX")
def test_a_tensor_of_5_gib_is_merged_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The result would take 5 GiB of disk if it were reserved; holes stay holes where zeros are not written.
    monkeypatch.delattr(os, "posix_fallocate")
    written = []
    real = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        written.append((offset, len(data)))
        return (
            len(data)
            if not any(data[:1]) and not np.frombuffer(data, np.uint8).any()
            else real(descriptor, data, offset)
        )

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(FileSink, "place", lambda *_: None)  # every write is asked of Python
    a, b = sparse(tmp_path / "a.safetensors", (2.0, 4.0)), sparse(tmp_path / "b.safetensors", (6.0, -4.0))
    plan = rm.plan(rm.weighted_sum(a, b, alpha=0.25), output=tmp_path / "mix.safetensors", memory="256MiB")
    assert plan.bytes_read == 2 * SIZE
    assert plan.peak_memory <= 2**28
    mix = rm.merge(rm.weighted_sum(a, b, alpha=0.25), output=tmp_path / "mix.safetensors", memory="256MiB")
    with open_checkpoint(mix) as found:
        assert found.tensors["big"].shape == (ROWS, COLUMNS)
        assert np.frombuffer(found.read("big", 0, 4), np.float16).tolist() == [3.0, 0.0]
        assert np.frombuffer(found.read("big", SIZE - 4, SIZE), np.float16).tolist() == [0.0, 2.0]
    assert sum(size for _, size in written) >= SIZE
    assert max(offset + size for offset, size in written) == mix.stat().st_size
