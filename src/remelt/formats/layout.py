"""Where output bytes go: every header and every tensor's offset, known before the first byte is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from remelt.core.tensor_info import TensorInfo
from remelt.errors import OutputError
from remelt.formats.safetensors import HEADER_CAP
from remelt.formats.tensor_names import is_text, shown, stays_inside

_ALIGNMENT = 64
_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_quoted = json.encoder.encode_basestring


@dataclass(frozen=True)
class FileLayout:
    """One safetensors file: its header's bytes, each tensor's absolute offset, its size."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    size: int


@dataclass(frozen=True)
class OutputLayout:
    """A whole output: one file, or a folder of files with their index files."""

    files: tuple[FileLayout, ...]
    indexes: tuple[tuple[str, bytes], ...]
    is_folder: bool

    @property
    def total_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files) + sum(len(content) for _, content in self.indexes)


def file_layout(
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    name: str,
    stored_names: Mapping[str, str] | None = None,
) -> FileLayout:
    """The layout of one file: wider element types first, so that every tensor is aligned, else the order given.

    ``stored_names`` gives the names in the file where they differ from the caller's. Raises `OutputError` for what no
    safetensors file can hold.
    """
    sizes = {info.dtype.itemsize for info in tensors.values()}
    order = tensors if len(sizes) == 1 else sorted(tensors, key=lambda key: -tensors[key].dtype.itemsize)
    entries = [f'"__metadata__":{_json(dict(metadata))}'] if metadata else []
    kinds: dict[int, str] = {}
    offset = 0
    starts = {}
    for key in order:
        info = tensors[key]
        stored = key if stored_names is None else stored_names[key]
        if stored == "__metadata__" or not is_text(stored):
            raise OutputError(f"{name}: no tensor in a safetensors file can be named {shown(stored)}")
        kind = kinds.get(id(info))
        if kind is None:
            kind = kinds[id(info)] = f'"dtype":"{info.dtype.name}","shape":{_json(info.shape)}'
        starts[key] = offset
        end = offset + info.nbytes
        entries.append(f'{_quoted(stored)}:{{{kind},"data_offsets":[{offset},{end}]}}')
        offset = end
    text = f"{{{','.join(entries)}}}".encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    if len(text) > HEADER_CAP:
        raise OutputError(f"{name} would need a header of {len(text)} bytes, of {HEADER_CAP} allowed")
    header = len(text).to_bytes(8, "little") + text
    return FileLayout(name, header, {key: len(header) + start for key, start in starts.items()}, len(header) + offset)


def folder_layout(
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    *,
    max_shard_size: int | None,
    weight_names: Mapping[str, str] | None = None,
    shard_of: Mapping[str, int] | None = None,
) -> OutputLayout:
    """The layout of a folder: each component's tensors in its subfolder, in shards with an index where need be.

    Keys ``unet/x`` go to folder ``unet`` under the name ``x``. ``weight_names`` gives the stem of each folder's weight
    files (``""`` is the folder itself), ``model`` by default. Without a ``max_shard_size``, ``shard_of`` tells the
    shard of each key in a model whose layout is followed; where that lacks keys, its largest shard is the limit. Raises
    `OutputError` for a key whose folder would be outside the output's.
    """
    by_folder: dict[str, dict[str, TensorInfo]] = {}
    for key, info in tensors.items():
        by_folder.setdefault(key.rpartition("/")[0], {})[key] = info
    files: list[FileLayout] = []
    indexes: list[tuple[str, bytes]] = []
    for folder, found in by_folder.items():
        _refuse_outside(folder)
        stem = (weight_names or {}).get(folder, "model")
        prefix = f"{folder}/" if folder else ""
        stored = {key: key.rpartition("/")[2] for key in found}
        followed = shard_of if shard_of is not None and max_shard_size is None else {}
        shards = _followed(found, followed) if followed else _shards(found, max_shard_size)
        names = [f"{stem}-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
        if len(shards) == 1:
            names = [f"{stem}.safetensors"]
        else:
            weight_map = {stored[key]: name for name, shard in zip(names, shards, strict=True) for key in shard}
            total = sum(info.nbytes for info in found.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            indexes.append((f"{prefix}{stem}.safetensors.index.json", (json.dumps(index, indent=2) + "\n").encode()))
        files += [
            file_layout(shard, metadata, prefix + name, stored) for name, shard in zip(names, shards, strict=True)
        ]
    return OutputLayout(tuple(files), tuple(indexes), is_folder=True)


def _refuse_outside(folder: str) -> None:
    """Refuse folders that leave the output's: keys come from files, which may be hostile."""
    if folder and not (stays_inside(folder) and "\\" not in folder and is_text(folder)):
        raise OutputError(
            f"a tensor is named {shown(folder + '/...')}, which no subfolder can hold", hint="write to one file instead"
        )


def _shards(tensors: Mapping[str, TensorInfo], limit: int | None) -> list[dict[str, TensorInfo]]:
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for key, info in tensors.items():
        if limit is not None and shards[-1] and size + info.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][key] = info
        size += info.nbytes
    return shards


def _followed(tensors: Mapping[str, TensorInfo], shard_of: Mapping[str, int]) -> list[dict[str, TensorInfo]]:
    """Shards of the keys that another model's have; of no more bytes than the largest where it lacks some of them."""
    kept: dict[int, dict[str, TensorInfo]] = {}
    for key, info in tensors.items():
        if key in shard_of:
            kept.setdefault(shard_of[key], {})[key] = info
    if len(kept) < 2:
        return [dict(tensors)]
    if sum(map(len, kept.values())) == len(tensors):
        return [kept[number] for number in sorted(kept)]
    return _shards(tensors, max(sum(info.nbytes for info in shard.values()) for shard in kept.values()))
