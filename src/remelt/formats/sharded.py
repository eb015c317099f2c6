"""Folders: a model in shards with an index, in one file, or several components in subfolders."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from remelt.core.nearest import nearest_hint
from remelt.core.tensor_info import TensorInfo
from remelt.errors import FormatError
from remelt.formats.checkpoint import Checkpoint, open_checkpoint
from remelt.formats.safetensors import Duplicate, refuse_deep_json, without_duplicates
from remelt.formats.tensor_names import shown, stays_inside

_INDEX = re.compile(r"\.index(?:\.(\w+))?\.json$")
_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model", "consolidated")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_LARGEST_INDEX = 100_000_000
_VARIANTS = ("fp16", "bf16", "fp32", "non_ema", "fp8", "onnx", "flax")
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state\w*)\.(bin|pt|pth)")


class FolderCheckpoint(Checkpoint):
    """Several files as one model. Tensors of a component's subfolder are named ``subfolder/key``."""

    def __init__(self, path: Path, parts: list[tuple[str, Checkpoint, list[str]]]) -> None:
        self.path = path
        self.format = "sharded"
        self._parts = [checkpoint for _, checkpoint, _ in parts]
        self._home: dict[str, tuple[int, str]] = {}
        tensors: dict[str, TensorInfo] = {}
        for number, (prefix, checkpoint, keys) in enumerate(parts):
            for key in keys:
                name = prefix + key
                if name in tensors:
                    raise FormatError(
                        f"{_named(path)}: tensor {shown(name)} is in two files: "
                        f"{self._name(name)} and {checkpoint.path}"
                    )
                tensors[name] = checkpoint.tensors[key]
                self._home[name] = (number, key)
        self.tensors: Mapping[str, TensorInfo] = tensors
        self.metadata: Mapping[str, str] = _shared_metadata(self._parts)

    def _name(self, key: str) -> str:
        return str(self._parts[self._home[key][0]].path)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Bytes of a tensor, from the file that holds it."""
        number, stored = self._home[key]
        return self._parts[number].read(stored, start, stop)

    def is_view(self, key: str) -> bool:
        """As the file that holds it does."""
        number, stored = self._home[key]
        return self._parts[number].is_view(stored)

    def part(self, key: str, start: int, stop: int) -> tuple[int, int, int] | None:
        """As the file that holds it does."""
        number, stored = self._home[key]
        return self._parts[number].part(stored, start, stop)

    def position(self, key: str) -> tuple[int, int]:
        """The file's number among the folder's, and the offset there."""
        number, stored = self._home[key]
        return number, self._parts[number].position(stored)[1]

    def files(self) -> tuple[Path, ...]:
        """Every weight file of the folder."""
        return tuple(path for part in self._parts for path in part.files())

    def close(self) -> None:
        """Let go of every file."""
        for part in self._parts:
            part.close()


def _named(folder: Path) -> str:
    """A folder's name, which ``.`` does not tell."""
    return folder.name or folder.resolve().name or str(folder)


def open_folder(path: Path) -> FolderCheckpoint:
    """Open a model folder by its index, its one weight file, or its components' subfolders.

    A ``model_index.json`` says that the components are meant, whatever else is in the folder.

    Raises `FormatError` where the index and the files disagree, names leave the folder, or several could be meant.
    """
    parts: list[tuple[str, Checkpoint, list[str]]] = []
    try:
        if (path / "model_index.json").is_file():
            _add_components(parts, path)
        if not parts and (own := weights_of(path)) is not None:
            _add(parts, "", path, own)
        if not parts:
            _add_components(parts, path)
        if not parts:
            raise FormatError(
                f"{_named(path)} holds no model: it has no {_STEMS[0]}.safetensors, no *.index.json, and no such "
                "subfolder"
            )
        return FolderCheckpoint(path, parts)
    except BaseException as error:
        for _, part, _ in parts:
            part.close()
        if isinstance(error, OSError):
            raise FormatError(f"{_named(path)} cannot be read: {error.strerror}") from error
        raise


def _add_components(parts: list[tuple[str, Checkpoint, list[str]]], path: Path) -> None:
    for child in sorted(path.iterdir()):
        found = weights_of(child) if child.is_dir() and not child.name.startswith(".") else None
        if found is not None:
            _add(parts, f"{child.name}/", child, found)


def _add(parts: list[tuple[str, Checkpoint, list[str]]], prefix: str, folder: Path, found: Path) -> None:
    if not _is_index(found):
        checkpoint = open_checkpoint(found)
        parts.append((prefix, checkpoint, list(checkpoint.tensors)))
        return
    for name, keys in _read_index(found).items():
        shard = folder / name
        if not os.path.isfile(shard):
            raise FormatError(
                f"{found.name} names the shard {shown(name)}, which is not there", hint="download the missing shard"
            )
        checkpoint = open_checkpoint(shard)
        parts.append((prefix, checkpoint, list(checkpoint.tensors)))
        absent = [key for key in keys if key not in checkpoint.tensors]
        if absent:
            hint = nearest_hint(absent[0], checkpoint.tensors)
            raise FormatError(f"{found.name} says that {shown(absent[0])} is in {name}, but it is not", hint=hint)
        extra = [key for key in checkpoint.tensors if key not in keys]
        if extra:
            raise FormatError(f"{name} has {shown(extra[0])}, which {found.name} does not list")


def weights_of(folder: Path) -> Path | None:
    """The index or the one weight file of a folder; None where it has none.

    Full precision goes before its variants, the usual names before others, safetensors before pickles, an index before
    a single file. Raises `FormatError` where that leaves several.
    """
    files = sorted(entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
    files = [file for file in files if _is_index(file) or file.suffix in _WEIGHTS]
    files = [file for file in files if not _NO_WEIGHTS.fullmatch(file.name)]
    plain = [file for file in files if not _variants(file)] or files
    known = [file for file in plain if _stem(file) in _STEMS]
    best = min(map(_preference, known), default=None)
    found = [file for file in known if _preference(file) == best]
    found = found or [file for file in plain if _is_index(file)] or plain
    if len(found) > 1:
        listed = ", ".join(file.name for file in found[:8]) + (", ..." if len(found) > 8 else "")
        kind = "index files" if _is_index(found[0]) else "weight files and no index"
        raise FormatError(f"{_named(folder)} has {len(found)} {kind}: {listed}", hint="name one of the files")
    return found[0] if found else None


def _is_index(file: Path) -> bool:
    return _INDEX.search(file.name) is not None


def _core(file: Path) -> str:
    """A file's name without its suffixes."""
    name = _INDEX.sub("", file.name)
    return next((name.removesuffix(suffix) for suffix in _WEIGHTS if name.endswith(suffix)), name)


def _stem(file: Path) -> str:
    return ".".join(part for part in _core(file).split(".") if part not in _VARIANTS)


def _variants(file: Path) -> list[str]:
    """The variants that a file's name states: ``model.fp16.safetensors``, ``model.safetensors.index.fp16.json``."""
    index = _INDEX.search(file.name)
    named = [index[1]] if index is not None and index[1] else []
    return named + [part for part in re.split(r"[.-]", _core(file))[1:] if part in _VARIANTS]


def _preference(file: Path) -> tuple[bool, int, bool]:
    """Safetensors before pickles, then by the order of the usual names, then an index before a single file."""
    return ".safetensors" not in file.name, _STEMS.index(_stem(file)), not _is_index(file)


def _read_index(index: Path) -> dict[str, dict[str, None]]:
    """The keys of each shard by its name, shards in the order in which the index names them."""
    if index.stat().st_size > _LARGEST_INDEX:
        raise FormatError(f"{index.name} has more than {_LARGEST_INDEX} bytes, which no index needs")
    try:
        text = index.read_bytes().decode("utf-8")
        refuse_deep_json(text, index.name)
        parsed = json.loads(text, object_pairs_hook=without_duplicates)
    except Duplicate as error:
        raise FormatError(f"{index.name} names {shown(error.args[0])} twice") from None
    except ValueError as error:
        raise FormatError(f"{index.name} is not JSON text: {error}") from None
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index.name} needs a weight_map of tensor names to shard names")
    shards: dict[str, dict[str, None]] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str) or not stays_inside(name):
            raise FormatError(
                f"{index.name} says that {shown(key)} is in {shown(name)}: a shard is a file name in the same folder"
            )
        shards.setdefault(name, {})[key] = None
    return dict(sorted(shards.items()))


def _shared_metadata(parts: list[Checkpoint]) -> dict[str, str]:
    """What the metadata of all files agree on."""
    shared = dict(parts[0].metadata)
    for part in parts[1:]:
        shared = {key: value for key, value in shared.items() if part.metadata.get(key) == value}
    return shared
