"""Archives that torch.save writes (.ckpt, .pt, .pth, .bin), streamed like safetensors, without running their pickle."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from remelt.core.tensor_info import TensorInfo
from remelt.errors import FormatError
from remelt.formats.archive import Member, read_members
from remelt.formats.checkpoint import Checkpoint
from remelt.formats.mapped import MappedFile
from remelt.formats.pickle_globals import Opaque, PickledTensor
from remelt.formats.pickle_machine import unpickle
from remelt.formats.tensor_names import LONGEST_NAME, is_text, shown

LARGEST_PICKLE = 256 * 2**20
_NESTS = ("state_dict", "model_state_dict", "model", "module", "params", "params_ema", "ema", "net", "weights")
_MOST_VALUES = 1_000_000
_NAMED = 9
"""What a value counts beyond one where a name is made for it."""
_MOST_CHARACTERS = 2**26
_DEEPEST = 64
_LARGEST_REPEAT = 256 * 2**20
"""Bytes of a tensor at most whose strides repeat a smaller storage."""
_TORCHSCRIPT = "constants.pkl"


class PickleCheckpoint(Checkpoint):
    """A zip archive of a pickled state dict, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.format = "pickle"
        self.metadata: Mapping[str, str] = {}
        try:
            with open(path, "rb") as file:
                members = read_members(file, path)
                prefix = _prefix(members, path.name)
                found = _state_dict(_unpickled(file, members, prefix, path.name), path.name)
                placed = {
                    key: (tensor, _place(tensor, members, prefix, key, path.name)) for key, tensor in found.items()
                }
                self._mapped = MappedFile(file, path)
        except OSError as error:
            raise FormatError(f"{path.name} cannot be read: {error.strerror}") from error
        order = sorted(placed, key=lambda key: placed[key][1])
        self._tensors = {key: placed[key][0] for key in order}
        self._offsets = {key: placed[key][1] for key in order}
        self.tensors: Mapping[str, TensorInfo] = {
            key: TensorInfo(tensor.dtype, tensor.shape) for key, tensor in self._tensors.items()
        }

    def read(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Row-major bytes of a tensor: a view where it is contiguous, else gathered."""
        info, tensor, offset = self.tensors[key], self._tensors[key], self._offsets[key]
        end = info.nbytes if stop is None else stop
        if _is_contiguous(tensor):
            return self._mapped.view[offset + start : offset + end]
        width = info.dtype.itemsize
        span = _span(tensor) * width
        elements = np.frombuffer(self._mapped.view[offset : offset + span], dtype=f"V{width}")
        strides = [stride * width for stride in tensor.strides]
        view = np.lib.stride_tricks.as_strided(elements, tensor.shape, strides, writeable=False)
        gathered = view.flat[start // width : end // width]
        return memoryview(np.ascontiguousarray(gathered).view(np.uint8).reshape(-1))  # type: ignore[arg-type]

    def is_view(self, key: str) -> bool:
        """Where the tensor is contiguous."""
        return _is_contiguous(self._tensors[key])

    def part(self, key: str, start: int, stop: int) -> tuple[int, int, int] | None:
        """The tensor's bytes in the archive, where it is contiguous."""
        return self._mapped.part(self._offsets[key] + start, stop - start) if self.is_view(key) else None

    def position(self, key: str) -> tuple[int, int]:
        """The tensor's offset in the file."""
        return 0, self._offsets[key]

    def files(self) -> tuple[Path, ...]:
        """The archive itself."""
        return (self.path,) if self.path is not None else ()

    def close(self) -> None:
        """Unmap the file, unless views of it are still held: then it goes with the last of them."""
        self._mapped.close()


def _prefix(members: Mapping[str, Member], name: str) -> str:
    """The archive's own folder, which torch.save names after the file."""
    found = [
        member.removesuffix("data.pkl") for member in members if member.endswith("/data.pkl") and member.count("/") == 1
    ]
    if len(found) != 1:
        raise FormatError(f"{name} is a zip archive, but no checkpoint: it has {len(found)} pickles, and one is due")
    if found[0] + _TORCHSCRIPT in members:
        raise FormatError(
            f"{name} is a TorchScript program, not a checkpoint", hint="save its state_dict() as safetensors"
        )
    return found[0]


def _unpickled(file: Any, members: Mapping[str, Member], prefix: str, name: str) -> Any:
    order = members.get(prefix + "byteorder")
    if order is not None:
        file.seek(order.offset)
        if file.read(min(order.size, 16)) != b"little":
            raise FormatError(f"{name} was saved on a big-endian machine", hint="save it again on a usual one")
    pickled = members[prefix + "data.pkl"]
    if pickled.size > LARGEST_PICKLE:
        raise FormatError(f"{name}: its pickle has {pickled.size} bytes, and at most {LARGEST_PICKLE} are allowed")
    file.seek(pickled.offset)
    return unpickle(file.read(pickled.size), name)


def _state_dict(root: Any, name: str) -> dict[str, PickledTensor]:
    """The tensors by name, from the root or from where training tools nest them."""
    if isinstance(root, Opaque):
        raise FormatError(
            f"{name} holds a whole {root.origin} object, not a state dict", hint="save model.state_dict()"
        )
    if not isinstance(root, dict):
        raise FormatError(f"{name} holds {type(root).__name__}, not a state dict")
    if not any(isinstance(value, PickledTensor) for value in root.values()):
        nests = [nest for nest in _NESTS if isinstance(root.get(nest), dict) and _flattened(root[nest], name)]
        if len(nests) > 1 and nests[0] != "state_dict":
            raise FormatError(
                f"{name} holds several state dicts: {', '.join(nests)}", hint="save the one that is meant"
            )
        if nests:
            root = root[nests[0]]
    found = _flattened(root, name)
    if not found:
        raise FormatError(f"{name} holds no tensors")
    return found


def _flattened(root: dict[Any, Any], name: str) -> dict[str, PickledTensor]:
    """Every tensor of nested mappings, names joined by dots; what is no tensor is left out.

    A mapping in two places gives its tensors twice, so the walk is bounded: in depth, values and characters.
    """
    found: dict[str, PickledTensor] = {}
    values = characters = 0
    pending: list[tuple[str, Iterator[tuple[Any, Any]]]] = [("", iter(root.items()))]
    while pending:
        prefix, items = pending[-1]
        entry = next(items, None)
        if entry is None:
            pending.pop()
            continue
        key, value = entry
        values += 1
        if values > _MOST_VALUES or characters > _MOST_CHARACTERS:
            raise FormatError(
                f"{name}: its mappings hold more than {_MOST_VALUES} values, counting shared ones each time"
            )
        if not isinstance(value, (PickledTensor, dict)) and not _is_foreign_tensor(value):
            continue
        full = _joined(prefix, key, name)
        values += _NAMED
        characters += len(full)
        if isinstance(value, Opaque):
            raise FormatError(f"{name}: {shown(full)} is made by {value.origin}, which is not supported")
        if isinstance(value, PickledTensor):
            if full in found:
                raise FormatError(f"{name}: two tensors are named {shown(full)}")
            found[full] = value
        elif len(pending) > _DEEPEST:
            raise FormatError(f"{name}: its mappings nest more than {_DEEPEST} deep")
        else:
            pending.append((f"{full}.", iter(value.items())))
    return found


def _joined(prefix: str, key: Any, name: str) -> str:
    full = f"{prefix}{key.decode('latin-1') if isinstance(key, bytes) else key}"
    if len(full) > LONGEST_NAME:
        raise FormatError(f"{name}: a tensor's name has {len(full)} characters, and at most {LONGEST_NAME} are allowed")
    if not is_text(full):
        raise FormatError(f"{name}: {shown(full)} is not Unicode text, so it can name no tensor")
    return full


def _is_foreign_tensor(value: Any) -> bool:
    return isinstance(value, Opaque) and value.origin.startswith(("torch._utils._rebuild_", "torch._tensor._rebuild_"))


def _place(tensor: PickledTensor, members: Mapping[str, Member], prefix: str, key: str, name: str) -> int:
    """The offset of a tensor's first element in the file, held against its storage."""
    member = members.get(f"{prefix}data/{tensor.storage.key}")
    if member is None:
        raise FormatError(
            f"{name}: the storage {shown(tensor.storage.key)} of {shown(key)} is missing", hint="the file is damaged"
        )
    width = tensor.dtype.itemsize
    stored = tensor.storage.numel * (tensor.storage.dtype.itemsize if tensor.storage.dtype is not None else 1)
    needed = (tensor.offset + _span(tensor)) * width
    if stored > member.size or needed > stored:
        raise FormatError(
            f"{name}: {shown(key)} needs {max(needed, stored)} bytes of its storage, which has {member.size}",
            hint="the file is damaged: download it again",
        )
    size = math.prod(tensor.shape) * width
    if size > stored and size > _LARGEST_REPEAT:
        raise FormatError(f"{name}: {shown(key)} repeats the {stored} bytes of its storage into {size}")
    return member.offset + tensor.offset * width


def _span(tensor: PickledTensor) -> int:
    """Elements from a tensor's first to its last."""
    if 0 in tensor.shape:
        return 0
    return 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.strides, strict=True))


def _is_contiguous(tensor: PickledTensor) -> bool:
    expected = 1
    for length, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if length == 0:
            return True
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True
