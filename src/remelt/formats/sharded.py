"""Folders: a model in shards with an index, in one file, or several components in subfolders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

from remelt.core.nearest import nearest_hint
from remelt.core.tensor_info import TensorInfo
from remelt.errors import FormatError
from remelt.formats.checkpoint import Checkpoint, open_checkpoint
from remelt.formats.safetensors import refuse_deep_json, without_duplicates

_INDEX = ".index.json"
_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model", "consolidated")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_LARGEST_INDEX = 100_000_000
_VARIANTS = ("fp16", "bf16", "fp32", "non_ema", "fp8", "onnx", "flax")


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
                        f"{path.name}: tensor {name!r} is in two files: {self._name(name)} and {checkpoint.path}"
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


def open_folder(path: Path) -> FolderCheckpoint:
    """Open a model folder by its index, its one weight file, or its components' subfolders.

    Raises `FormatError` where the index and the files disagree, names leave the folder, or several could be meant.
    """
    parts: list[tuple[str, Checkpoint, list[str]]] = []
    try:
        own = _weights_of(path)
        if own is not None:
            _add(parts, "", path, own)
        else:
            for child in sorted(path.iterdir()):
                found = _weights_of(child) if child.is_dir() and not child.name.startswith(".") else None
                if found is not None:
                    _add(parts, f"{child.name}/", child, found)
        if not parts:
            raise FormatError(
                f"{path.name} holds no model: it has no {_STEMS[0]}.safetensors, no *{_INDEX}, and no such subfolder"
            )
        return FolderCheckpoint(path, parts)
    except BaseException as error:
        for _, part, _ in parts:
            part.close()
        if isinstance(error, OSError):
            raise FormatError(f"{path} cannot be read: {error.strerror}") from error
        raise


def _add(parts: list[tuple[str, Checkpoint, list[str]]], prefix: str, folder: Path, found: Path) -> None:
    if not found.name.endswith(_INDEX):
        checkpoint = open_checkpoint(found)
        parts.append((prefix, checkpoint, list(checkpoint.tensors)))
        return
    for name, keys in _read_index(found).items():
        shard = folder / name
        if not shard.is_file():
            raise FormatError(
                f"{found.name} names the shard {name!r}, which is not there", hint="download the missing shard"
            )
        checkpoint = open_checkpoint(shard)
        parts.append((prefix, checkpoint, list(checkpoint.tensors)))
        absent = [key for key in keys if key not in checkpoint.tensors]
        if absent:
            hint = nearest_hint(absent[0], checkpoint.tensors)
            raise FormatError(f"{found.name} says that {absent[0]!r} is in {name}, but it is not", hint=hint)
        extra = [key for key in checkpoint.tensors if key not in keys]
        if extra:
            raise FormatError(f"{name} has {extra[0]!r}, which {found.name} does not list")


def _weights_of(folder: Path) -> Path | None:
    """The index or the one weight file of a folder; None where it has none."""
    files = sorted(entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
    indexes = [file for file in files if file.name.endswith(_INDEX)]
    weights = [file for file in files if file.suffix in _WEIGHTS and not file.name.endswith(".partial")]
    for candidates in (indexes, weights):
        plain = [file for file in candidates if not _is_variant(file)] or candidates
        known = [file for file in plain if file.name.split(".")[0] in _STEMS]
        if known:
            return min(known, key=_preference)
        if len(plain) == 1:
            return plain[0]
        if candidates is weights and len(plain) > 1:
            listed = ", ".join(file.name for file in plain[:8])
            raise FormatError(
                f"{folder.name} has {len(plain)} weight files and no index: {listed}", hint="name one of the files"
            )
    return None


def _preference(file: Path) -> tuple[bool, int]:
    """Safetensors before pickles, then by the order of the usual names."""
    return ".safetensors" not in file.name, _STEMS.index(file.name.split(".")[0])


def _is_variant(file: Path) -> bool:
    parts = file.name.split(".")
    return len(parts) > 2 and any(part in _VARIANTS for part in parts[1:-1])


def _read_index(index: Path) -> dict[str, dict[str, None]]:
    """The keys of each shard by its name, shards in the order in which the index names them."""
    if index.stat().st_size > _LARGEST_INDEX:
        raise FormatError(f"{index.name} has more than {_LARGEST_INDEX} bytes, which no index needs")
    try:
        text = index.read_bytes().decode("utf-8")
        refuse_deep_json(text, index.name)
        parsed = json.loads(text, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{index.name} is not JSON text: {error}") from None
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index.name} needs a weight_map of tensor names to shard names")
    shards: dict[str, dict[str, None]] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str) or not _stays_inside(name):
            raise FormatError(
                f"{index.name} says that {key!r} is in {name!r}: a shard is a file name in the same folder"
            )
        shards.setdefault(name, {})[key] = None
    return dict(sorted(shards.items()))


def _stays_inside(name: str) -> bool:
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    plain = not windows.drive and not windows.root and not posix.is_absolute()
    return bool(name) and plain and ".." not in windows.parts and ".." not in posix.parts and "\0" not in name


def _shared_metadata(parts: list[Checkpoint]) -> dict[str, str]:
    """What the metadata of all files agree on."""
    shared = dict(parts[0].metadata)
    for part in parts[1:]:
        shared = {key: value for key, value in shared.items() if part.metadata.get(key) == value}
    return shared
