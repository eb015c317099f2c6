"""What is fuzzed: every reader of bytes from strangers. Each target may raise `RemeltError` and nothing else."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import remelt.formats.archive
import remelt.formats.pickle
import remelt.formats.pickle_machine
import remelt.formats.safetensors  # noqa: F401  (imported now, so that the fuzzer sees into them)
from remelt.errors import RemeltError
from remelt.formats.checkpoint import open_checkpoint
from remelt.recipe.node import digests
from remelt.recipe.walk import topological
from remelt.text.reader import parse_document, parse_value
from remelt.text.writer import write_document

_FILE = Path(tempfile.gettempdir()) / f"remelt-fuzz-{os.getpid()}.safetensors"


def header(data: bytes) -> None:
    """A safetensors file: refused, or every tensor can be read."""
    try:
        _opened((len(data)).to_bytes(8, "little") + data + bytes(64))
    except RemeltError:
        _opened_or_refused(data)


def _opened_or_refused(data: bytes) -> None:
    try:
        _opened(data)
    except RemeltError as error:
        assert error.message


def _opened(data: bytes) -> None:
    _FILE.write_bytes(data)
    try:
        with open_checkpoint(_FILE) as checkpoint:
            for key, info in checkpoint.tensors.items():
                assert len(checkpoint.read(key)) == info.nbytes
    finally:
        _FILE.unlink()


def archive(data: bytes) -> None:
    """A pickle in the archive that torch writes: refused, or every tensor can be read."""
    import zipfile

    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as file:
        file.writestr("m/data.pkl", data)
        file.writestr("m/data/0", bytes(64))
        file.writestr("m/version", "3\n")
    _opened_or_refused(memory.getvalue())


def recipe(data: bytes) -> None:
    """A recipe: refused, or it reads back as the same graph from the text that is written of it."""
    text = data.decode("utf-8", "surrogateescape" if data[:1] == b"\xff" else "replace")
    for source in (text, f"version 1\n{text}"):
        try:
            document = parse_document(source)
            written = write_document(document)
        except RemeltError as error:
            assert error.message
            continue
        again = parse_document(written)
        first, second = (digests(topological(one.result))[id(one.result)] for one in (document, again))
        assert first == second
        assert write_document(again) == written


def value(data: bytes) -> None:
    """A value on the command line."""
    try:
        parse_value(data.decode("utf-8", "replace"))
    except RemeltError as error:
        assert error.message


TARGETS: dict[str, Callable[[bytes], None]] = {
    "header": header,
    "archive": archive,
    "recipe": recipe,
    "value": value,
}
