"""What a pickle's globals mean: the few that describe tensors and plain containers; all others are inert names.

Nothing here imports what a pickle names. Tensors become descriptions, `PickledTensor`; whatever only code could make
becomes an `Opaque`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from remelt.core.dtype import DType
from remelt.formats.tensor_names import shown

STORAGES: dict[str, DType] = {
    "DoubleStorage": DType.F64,
    "FloatStorage": DType.F32,
    "HalfStorage": DType.F16,
    "BFloat16Storage": DType.BF16,
    "LongStorage": DType.I64,
    "IntStorage": DType.I32,
    "ShortStorage": DType.I16,
    "CharStorage": DType.I8,
    "ByteStorage": DType.U8,
    "BoolStorage": DType.BOOL,
}
_TORCH_TYPES = {
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint64",
    "uint32",
    "uint16",
    "uint8",
    "bool",
}
MOST_AXES = 32
"""Axes of a pickled tensor at most, as every numpy can gather them."""
_LONGEST_GLOBAL = 500
_LARGEST_KEY = 2**53


class Unsupported(ValueError):
    """Something that a checkpoint may have, but that is no plain tensor."""


@dataclass(frozen=True)
class Global:
    """A name that the pickle would import; here it is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Opaque:
    """Something that only code could make: inert, known by the name of what would have made it."""

    origin: str


@dataclass(frozen=True)
class Storage:
    """A member of the archive with an element type (None: bytes) and a number of elements."""

    key: str
    dtype: DType | None
    numel: int


@dataclass(frozen=True)
class PickledTensor:
    """A view of a storage: offset and strides in elements."""

    storage: Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def global_named(module: Any, name: Any) -> Global:
    """The global of that module and name, which are texts of a reasonable length."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("a global whose name is no text")
    if len(module) > _LONGEST_GLOBAL or len(name) > _LONGEST_GLOBAL:
        raise ValueError(f"a global with a name of {max(len(module), len(name))} characters")
    return Global(module, name)


def storage_of(identity: Any) -> Storage:
    """The storage that a persistent id describes: ``("storage", type, key, device, elements)``."""
    if not (isinstance(identity, tuple) and len(identity) >= 5 and identity[0] == "storage"):
        raise ValueError("a reference to something that is no storage")
    kind, key, numel = identity[1], identity[2], identity[4]
    if not isinstance(kind, Global) or not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 2**63:
        raise ValueError("a storage that cannot be")
    if kind.name == "UntypedStorage":
        return Storage(key, None, numel)
    if kind.name not in STORAGES:
        raise Unsupported(f"tensors of type {kind}")
    return Storage(key, STORAGES[kind.name], numel)


def pairs_of(flat: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Keys with values, from keys and values in turn.

    Keys that name nothing in a checkpoint are left out: hashing a tuple could recurse, and huge or fractional numbers
    can be chosen to collide.
    """
    if len(flat) % 2:
        raise ValueError("a mapping with a key and no value")
    for key, value in zip(flat[::2], flat[1::2], strict=True):
        if isinstance(key, (str, bytes, type(None))) or (isinstance(key, int) and -_LARGEST_KEY < key < _LARGEST_KEY):
            yield key, value


def call(function: Any, args: Any, charge: Callable[[int], None]) -> Any:
    """What a known global makes of its arguments; anything else is opaque.

    ``charge`` is told how many elements are copied, so that a small pickle cannot copy a large container many times.
    """
    while isinstance(function, Global) and (function.module, function.name) == _TYPED:
        function, args = args[0], args[2]  # (function, type, args, state): the type is not made
    if not isinstance(function, Global):
        return Opaque(function.origin if isinstance(function, Opaque) else type(function).__name__)
    maker = _MAKERS.get((function.module, function.name))
    if maker is None:
        return Opaque(str(function))
    args = args if isinstance(args, tuple) else ()
    if args and isinstance(args[0], (list, dict)):
        charge(len(args[0]))
    return maker(args)


def _tensor(args: tuple[Any, ...]) -> PickledTensor:
    storage = args[0]
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise ValueError("a tensor without a typed storage")
    return _view(storage, storage.dtype, args, metadata=args[6:7])


def _tensor_with_type(args: tuple[Any, ...]) -> PickledTensor:
    storage, dtype = args[0], args[6]
    if not isinstance(storage, Storage) or not isinstance(dtype, Global):
        raise ValueError("a tensor without a storage or a type")
    if dtype.name not in _TORCH_TYPES:
        raise Unsupported(f"a tensor of type {dtype}")
    return _view(storage, DType.parse(dtype.name), args, metadata=args[7:8])


def _view(storage: Storage, dtype: DType, args: tuple[Any, ...], metadata: tuple[Any, ...]) -> PickledTensor:
    offset, shape, strides = args[1:4]
    if not isinstance(shape, (tuple, list)) or not isinstance(strides, (tuple, list)) or len(shape) != len(strides):
        raise ValueError("a tensor of impossible shape or strides")
    if len(shape) > MOST_AXES:
        raise Unsupported(f"a tensor of {len(shape)} axes (at most {MOST_AXES} are allowed)")
    if not all(type(number) is int and 0 <= number < 2**63 for number in (offset, *shape, *strides)):
        raise ValueError("a tensor of impossible shape or strides")
    if metadata and isinstance(metadata[0], dict) and any(metadata[0].values()):
        raise Unsupported(f"a tensor that is a lazily computed view ({', '.join(map(shown, list(metadata[0])[:3]))})")
    return PickledTensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _first(args: tuple[Any, ...]) -> Any:
    return args[0] if args else Opaque("nothing")


def _mapping(args: tuple[Any, ...]) -> dict[Any, Any]:
    if not args or not isinstance(args[0], (dict, list, tuple)):
        return {}
    if isinstance(args[0], dict):
        return dict(args[0])
    both = [pair for pair in args[0] if isinstance(pair, (list, tuple)) and len(pair) == 2]
    return dict(pairs_of([item for pair in both for item in pair]))


def _sequence(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(args[0]) if args and isinstance(args[0], (list, tuple)) else ()


_TYPED = ("torch._tensor", "_rebuild_from_type_v2")
_MAKERS: dict[tuple[str, str], Callable[[tuple[Any, ...]], Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_with_type,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("collections", "OrderedDict"): _mapping,
    ("collections", "defaultdict"): lambda args: {},
    ("builtins", "dict"): _mapping,
    ("builtins", "list"): lambda args: list(_sequence(args)),
    ("builtins", "tuple"): _sequence,
    ("torch", "Size"): _sequence,
}
