"""The files that merges are measured on: true names and shapes, drawn numbers; made once, and used again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remelt.archs.shapes import llama_shapes, sd1_shapes, sdxl_shapes
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.formats.layout import FileLayout, file_layout, folder_layout

POOL = 1 << 22
"""Numbers drawn for each model; its tensors are pieces of them, begun at random places."""

PIECE = 1 << 20
SCALE = 0.02
LLAMA = {"layers": 22, "hidden": 2048, "heads": 32, "key_heads": 4, "intermediate": 5632, "vocabulary": 32000}
SMALL_LLAMA = {"layers": 2, "hidden": 256, "heads": 8, "key_heads": 2, "intermediate": 512, "vocabulary": 1000}

FAMILIES = {
    "sd1": "Stable Diffusion 1.5, fp16",
    "half": "Stable Diffusion 1.5 at half width, fp16",
    "sdxl": "Stable Diffusion XL, fp16",
    "llama": "a Llama of 1.1 B parameters, bf16, in shards",
    "huge": "one tensor of 2 GiB, fp16",
    "mini": "Stable Diffusion 1.5 narrowed to 1 MB, fp16",
    "keys": "2,500 tensors of 64 numbers, fp16",
    "few": "25 tensors of 64 numbers, fp16",
}
NARROW = {"sd1": (1, 16), "half": (2, 32), "sdxl": (1, 32), "mini": (48, 64)}
"""Divisors of the widths, and those for ``--small``."""

KEYS = {"keys": (2500, 250), "few": (25, 25)}
HUGE = ((1 << 18, 1 << 12), (1 << 13, 1 << 12))
SHARD = (1 << 30, 1 << 20)


class ModelFiles:
    """A folder of models, by family and number; what lacks is made when it is asked for."""

    def __init__(self, folder: Path, *, small: bool = False) -> None:
        self.folder = folder
        self.small = small

    def paths(self, family: str, count: int) -> list[Path]:
        """The first models of a family."""
        return [self.path(family, number) for number in range(count)]

    def path(self, family: str, number: int) -> Path:
        """A model's file, or folder where it is sharded."""
        shapes = self.shapes(family)
        stem = f"{'small-' if self.small else ''}{family}-{number}"
        if family == "llama":
            return self._folder(self.folder / stem, shapes, number)
        layout = file_layout(shapes, {"format": "pt"}, f"{stem}.safetensors")
        make(self.folder, layout, shapes, seed=number)
        return self.folder / layout.name

    def shapes(self, family: str) -> dict[str, TensorInfo]:
        """The tensors of a family's models."""
        half = DType.F16
        if family in KEYS:
            return {f"layers.{number}.weight": TensorInfo(half, (64,)) for number in range(KEYS[family][self.small])}
        if family == "huge":
            return {"embedding.weight": TensorInfo(half, HUGE[self.small]), "norm.weight": TensorInfo(half, (4096,))}
        if family == "llama":
            sizes = dict(SMALL_LLAMA if self.small else LLAMA)
            return llama_shapes(sizes.pop("layers"), sizes.pop("hidden"), **sizes, dtype=DType.BF16)  # type: ignore[arg-type]
        shapes_of = sdxl_shapes if family == "sdxl" else sd1_shapes
        return shapes_of(NARROW[family][self.small], dtype=half)

    def size(self, family: str) -> int:
        """Bytes of the tensors of one model."""
        return sum(info.nbytes for info in self.shapes(family).values())

    def _folder(self, path: Path, shapes: Mapping[str, TensorInfo], seed: int) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        layout = folder_layout(shapes, {"format": "pt"}, max_shard_size=SHARD[self.small])
        for position, file in enumerate(layout.files):
            make(path, file, shapes, seed=1000 * (position + 1) + seed)
        for name, content in (*layout.indexes, ("config.json", self._config())):
            (path / name).write_bytes(content)
        return path

    def _config(self) -> bytes:
        """What transformers, and with it mergekit, reads to know the model's class."""
        sizes = SMALL_LLAMA if self.small else LLAMA
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": sizes["hidden"],
            "intermediate_size": sizes["intermediate"],
            "max_position_embeddings": 2048,
            "num_attention_heads": sizes["heads"],
            "num_hidden_layers": sizes["layers"],
            "num_key_value_heads": sizes["key_heads"],
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": sizes["vocabulary"],
        }
        return (json.dumps(config, indent=2) + "\n").encode()


def make(folder: Path, layout: FileLayout, shapes: Mapping[str, TensorInfo], *, seed: int) -> None:
    """Write a file of drawn numbers, where it is not there with this very header and size."""
    path = folder / layout.name
    if is_right(path, layout):
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".making")
    with open(partial, "wb") as file:
        file.write(layout.header)
        random = np.random.Generator(np.random.SFC64(seed))
        pools: dict[str, NDArray[np.uint16]] = {}
        for key in sorted(layout.offsets, key=lambda key: layout.offsets[key]):
            dtype = shapes[key].dtype
            if dtype.name not in pools:
                pools[dtype.name] = pool(random, dtype)
            for piece in pieces(random, pools[dtype.name], shapes[key].numel):
                file.write(piece.data)
        file.flush()
        os.fsync(file.fileno())  # or its pages would be written while merges are measured
    partial.replace(path)


def is_right(path: Path, layout: FileLayout) -> bool:
    """Whether a file has a layout's size and header."""
    if not path.is_file() or path.stat().st_size != layout.size:
        return False
    with open(path, "rb") as file:
        return file.read(len(layout.header)) == layout.header


def pool(random: np.random.Generator, dtype: DType) -> NDArray[np.uint16]:
    """Normal numbers in a type of two bytes, as their bits."""
    drawn = random.standard_normal(POOL, dtype=np.float32) * np.float32(SCALE)
    if dtype == DType.F16:
        return drawn.astype(np.float16).view(np.uint16)
    return ((drawn.view(np.uint32) + np.uint32(1 << 15)) >> np.uint32(16)).astype(np.uint16)


def pieces(random: np.random.Generator, pool: NDArray[np.uint16], count: int) -> Iterator[NDArray[np.uint16]]:
    """Some numbers, as pieces of a pool."""
    while count:
        size = min(count, PIECE)
        begin = int(random.integers(0, len(pool) - size + 1))
        yield pool[begin : begin + size]
        count -= size


def total_bytes(paths: list[Path]) -> int:
    """Bytes of files, and of the files in folders."""
    files = [file for path in paths for file in (path.iterdir() if path.is_dir() else (path,))]
    return sum(file.stat().st_size for file in files)
