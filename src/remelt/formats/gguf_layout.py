"""Where the bytes of a GGUF output go: its header, and every tensor's offset."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping

from remelt.core.tensor_info import TensorInfo
from remelt.errors import OutputError
from remelt.formats.gguf_header import ALIGNMENT, MAGIC, encoded
from remelt.formats.layout import FileLayout, OutputLayout
from remelt.formats.tensor_names import is_text, shown

_VERSION = 3
_LONGEST_NAME = 63
"""Bytes of a tensor's name that llama.cpp reads."""


def gguf_layout(
    tensors: Mapping[str, TensorInfo],
    stored: Mapping[str, tuple[int, tuple[int, ...]]],
    values: Mapping[str, object],
    name: str,
) -> OutputLayout:
    """The layout of one GGUF file.

    ``stored`` gives the number of each tensor's type and its shape in the file, ``values`` what the header tells:
    texts, whole numbers, lists of them, or bytes that are such a value with its type. Raises `OutputError` for names
    that no such file can hold.
    """
    alignment = _alignment(values)
    pairs = [_text(key) + (value if isinstance(value, bytes) else encoded(value)) for key, value in values.items()]
    starts: dict[str, int] = {}
    infos = []
    offset = 0
    for key, info in tensors.items():
        kind, shape = stored[key]
        if not is_text(key) or (len(key.encode()) > _LONGEST_NAME and not key.startswith(_LONG)):
            raise OutputError(
                f"{name}: a tensor in a GGUF file has a name of at most {_LONGEST_NAME} bytes, but one is {shown(key)}",
                hint="write safetensors, or a part of the model alone",
            )
        starts[key] = offset
        axes = tuple(reversed(shape))
        infos.append(_text(key) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, offset))
        offset += -(-info.nbytes // alignment) * alignment
    header = MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(pairs)) + b"".join(pairs) + b"".join(infos)
    header += bytes(-len(header) % alignment)
    file = FileLayout(name, header, {key: len(header) + start for key, start in starts.items()}, len(header) + offset)
    return OutputLayout((file,), (), is_folder=False)


_LONG = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.")
"""Keys of whole checkpoints, which only programs for images read: those know longer names."""


def _alignment(values: Mapping[str, object]) -> int:
    told = values.get(ALIGNMENT, 32)
    return struct.unpack("<I", told[4:8])[0] if isinstance(told, bytes) else int(str(told))


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def flattened(shape: tuple[int, ...], most: int = 4) -> tuple[int, ...]:
    """A shape of at most so many axes: those after the first as one, where there are more.

    >>> flattened((16, 3, 1, 2, 2)), flattened((4, 4))
    ((16, 12), (4, 4))
    """
    return shape if len(shape) <= most else (shape[0], math.prod(shape[1:]))
