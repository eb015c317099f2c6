"""Results as GGUF files: which type each tensor has there, and what the header tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from remelt.api.encodings import Encoding, Encodings, is_transformers, refuse_folders
from remelt.api.options import QUANTISED
from remelt.check.inputs import Input
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import OptionError, OutputError
from remelt.formats.checkpoint import Checkpoint
from remelt.formats.gguf import ORIGINAL_SHAPE, PLAIN, Q8_0, GgufCheckpoint, block_sizes, gguf_library
from remelt.formats.gguf_layout import flattened, gguf_layout
from remelt.formats.layout import OutputLayout
from remelt.formats.quantised import DequantisedCheckpoint

_NUMBERS = {dtype: number for number, dtype in PLAIN.items()}
_ARCHITECTURE, _FILE_TYPE = "general.architecture", "general.file_type"
_FILE_TYPES = {"F32": 0, "F16": 1, QUANTISED: 7, "BF16": 32}
_ARCHITECTURES = {
    "auraflow": "aura",
    "hunyuan_video": "hyvid",
    "ltx": "ltxv",
    "sdxl_refiner": "sdxl",
    "z_image": "lumina2",
}
"""What ComfyUI's loader of such files calls archs, where it is another name."""


@dataclass
class GgufEncodings(Encodings):
    """The tensors of a result that is a GGUF file."""

    stored: Mapping[str, tuple[int, tuple[int, ...]]] | None = None
    """The number of each tensor's type, and its shape in the file."""
    values: Mapping[str, object] | None = None
    """What the header tells."""

    def lay_out(self, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], path: Path) -> OutputLayout:
        """The layout of the file."""
        assert self.stored is not None
        told = {key: value for key, value in metadata.items() if key != "format"}
        return gguf_layout(tensors, self.stored, {**(self.values or {}), **told}, path.name)


def gguf_encodings(
    tensors: Mapping[str, TensorInfo], first: Input, folder: Path | None, dtype: str | None, *, keep: bool
) -> GgufEncodings:
    """A result as a GGUF file: in ``dtype``, F16 by default, or each tensor in the first model's type to ``keep`` it.

    Matrices of a ``dtype`` q8_0 whose rows are no multiples of 32 are F16; vectors are F32 as in all such files. Raises
    `OptionError` for types that the package ``gguf`` does not write, and for language models that come from other
    files: their keys and tokens have other names there.
    """
    refuse_folders(tensors, "GGUF files")
    checkpoint = first.checkpoint
    stored_in = checkpoint.checkpoint if isinstance(checkpoint, DequantisedCheckpoint) else checkpoint
    source = stored_in if isinstance(stored_in, GgufCheckpoint) else None
    if source is None and is_transformers(folder):
        raise OptionError(
            "a language model's GGUF file has its tokenizer inside, and other names",
            hint="merge to a folder, and make a GGUF file of it with llama.cpp's convert_hf_to_gguf.py",
        )
    if keep and source is None:
        raise OptionError(f"{first.label} is no GGUF file, so that it has no types to be kept", hint="--dtype q8_0")
    kinds = {key: _kind(key, info, source if keep else None, dtype) for key, info in tensors.items()}
    encodings, dtypes = {}, {}
    stored: dict[str, tuple[int, tuple[int, ...]]] = {}
    shapes: dict[str, object] = {}
    for key, info in tensors.items():
        kind, shape = kinds[key], flattened(info.shape)
        stored[key] = kind, shape
        if shape != info.shape:
            shapes[ORIGINAL_SHAPE + key] = list(info.shape)
        if kind in PLAIN:
            dtypes[key] = PLAIN[kind]
            continue
        block, size = block_sizes(kind, key)
        part = TensorInfo(DType.U8, (*shape[:-1], shape[-1] // block * size))
        encodings[key] = Encoding("gguf", {"kind": kind}, {"weight": (key, part)})
    name = QUANTISED if dtype == QUANTISED else str(DType.parse(dtype or "fp16"))
    return GgufEncodings(
        encodings, dtypes=dtypes, stored=stored, values={**_header(first, source, name, keep=keep), **shapes}
    )


def _kind(key: str, info: TensorInfo, source: GgufCheckpoint | None, dtype: str | None) -> int:
    if not info.dtype.is_float:
        if info.dtype not in _NUMBERS:
            raise OutputError(f"{key} is {info.dtype}, which no GGUF file holds", hint="write safetensors")
        return _NUMBERS[info.dtype]
    if source is not None and key in source.header.tensors:
        kind = source.header.tensors[key].kind
        if kind not in PLAIN and not _is_written(kind):
            raise OptionError(
                f"{key} is {source.quantised[key].described}, which the package gguf reads and does not write",
                hint="--dtype q8_0, or make it so of the result with llama.cpp's llama-quantize",
            )
        return kind
    if len(info.shape) < 2:
        return _NUMBERS[DType.F32]
    if dtype == QUANTISED:
        return Q8_0 if flattened(info.shape)[-1] % 32 == 0 else _NUMBERS[DType.F16]
    wanted = DType.parse(dtype or "fp16")
    if wanted not in _NUMBERS:
        raise OptionError(f"no GGUF file holds {wanted}", hint="--dtype q8_0, fp16, bf16 or fp32")
    return _NUMBERS[wanted]


def _is_written(kind: int) -> bool:
    import numpy as np

    library = gguf_library("quantised tensors")
    block, _ = block_sizes(kind, "a tensor")
    try:
        library.quants.quantize(np.zeros((1, block), dtype=np.float32), library.GGMLQuantizationType(kind))
    except NotImplementedError:
        return False
    return True


def _header(first: Input, source: Checkpoint | None, dtype: str, *, keep: bool) -> dict[str, object]:
    """What the first file's header tells, or what a file of its arch does."""
    if isinstance(source, GgufCheckpoint):
        view, header = source.raw, source.header
        told: dict[str, object] = {}
        for key, (begin, end) in header.spans.items():
            if not key.startswith(("remelt", ORIGINAL_SHAPE)):
                told[key] = bytes(view[begin + 8 + len(key.encode()) : end])
        return told if keep else {**told, _FILE_TYPE: _FILE_TYPES.get(dtype, 1)}
    arch = first.detection.arch
    name = "unknown" if arch is None else _ARCHITECTURES.get(arch.name, arch.name)
    return {_ARCHITECTURE: name, "general.quantization_version": 2, _FILE_TYPE: _FILE_TYPES.get(dtype, 1)}
