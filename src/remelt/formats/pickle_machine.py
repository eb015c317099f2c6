"""A pickle machine of our own: it builds plain data and descriptions of tensors, and can call nothing.

Every global is only a name here. The few that rebuild torch's tensors and ordinary containers are understood; any other
gives an inert `Opaque`, so that old training checkpoints, full of classes that no longer exist, open all the same.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from remelt.core.dtype import DType
from remelt.errors import FormatError

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
_PLAIN_KEYS = (str, int, float, bytes, type(None))


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


@dataclass
class _State:
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)


def unpickle(data: bytes, name: str) -> Any:
    """What a pickle describes; `FormatError` for one that is malformed or uses what no checkpoint needs."""
    machine = _Machine(name)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.state.stack[-1]
            machine.step(opcode.name, argument)
    except FormatError:
        raise
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, AttributeError, UnicodeDecodeError) as error:
        raise FormatError(f"{name}: its pickle is malformed: {type(error).__name__}: {str(error)[:200]}") from None
    raise FormatError(f"{name}: its pickle has no end")


class _Machine:
    """One opcode at a time, on a stack of plain data."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = _State()

    def step(self, opcode: str, argument: Any) -> None:
        state = self.state
        if opcode in _PUSHES_ARGUMENT:
            state.stack.append(argument)
        elif opcode in _CONSTANTS:
            state.stack.append(_CONSTANTS[opcode]())
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self, argument)
        elif opcode not in ("PROTO", "FRAME"):
            raise FormatError(f"{self.name}: its pickle uses {opcode}, which no checkpoint needs")

    def pop_mark(self) -> list[Any]:
        items = self.state.stack
        self.state.stack = self.state.marks.pop()
        return items

    def mark(self, _: Any) -> None:
        self.state.marks.append(self.state.stack)
        self.state.stack = []

    def pop(self, _: Any) -> None:
        if self.state.stack:
            self.state.stack.pop()
        else:
            self.pop_mark()

    def discard_mark(self, _: Any) -> None:
        self.pop_mark()

    def duplicate(self, _: Any) -> None:
        self.state.stack.append(self.state.stack[-1])

    def append(self, _: Any) -> None:
        value = self.state.stack.pop()
        self.extend_list([value])

    def appends(self, _: Any) -> None:
        self.extend_list(self.pop_mark())

    def extend_list(self, values: list[Any]) -> None:
        target = self.state.stack[-1]
        if isinstance(target, list):
            target.extend(values)

    def set_item(self, _: Any) -> None:
        value, key = self.state.stack.pop(), self.state.stack.pop()
        self.update_dict([key, value])

    def set_items(self, _: Any) -> None:
        self.update_dict(self.pop_mark())

    def update_dict(self, flat: list[Any]) -> None:
        target = self.state.stack[-1]
        if isinstance(target, dict):
            target.update(_pairs(flat))

    def make_list(self, _: Any) -> None:
        items = self.pop_mark()
        self.state.stack.append(items)

    def make_tuple(self, _: Any) -> None:
        items = tuple(self.pop_mark())
        self.state.stack.append(items)

    def make_dict(self, _: Any) -> None:
        found = dict(_pairs(self.pop_mark()))
        self.state.stack.append(found)

    def tuple_of(self, count: int) -> None:
        stack = self.state.stack
        if len(stack) < count:
            raise IndexError("stack underflow")
        stack[-count:] = [tuple(stack[-count:])]

    def put(self, index: Any) -> None:
        self.state.memo[int(index)] = self.state.stack[-1]

    def memoize(self, _: Any) -> None:
        self.state.memo[len(self.state.memo)] = self.state.stack[-1]

    def get(self, index: Any) -> None:
        self.state.stack.append(self.state.memo[int(index)])

    def named_global(self, argument: Any) -> None:
        module, _, name = str(argument).partition(" ")
        self.state.stack.append(Global(module, name))

    def stack_global(self, _: Any) -> None:
        name, module = self.state.stack.pop(), self.state.stack.pop()
        self.state.stack.append(Global(str(module), str(name)))

    def extension(self, code: Any) -> None:
        self.state.stack.append(Global("copyreg", f"extension {code}"))

    def reduce(self, _: Any) -> None:
        args, function = self.state.stack.pop(), self.state.stack.pop()
        self.state.stack.append(call(function, args if isinstance(args, tuple) else ()))

    def new_object_with_keywords(self, _: Any) -> None:
        self.state.stack.pop()
        self.reduce(None)

    def instance(self, argument: Any) -> None:
        args = tuple(self.pop_mark())
        module, _, name = str(argument).partition(" ")
        self.state.stack.append(call(Global(module, name), args))

    def object(self, _: Any) -> None:
        function, *args = self.pop_mark()
        self.state.stack.append(call(function, tuple(args)))

    def build(self, _: Any) -> None:
        self.state.stack.pop()  # the state of an object that was never made

    def persistent(self, _: Any) -> None:
        self.state.stack.append(self.storage(self.state.stack.pop()))

    def storage(self, identity: Any) -> Storage:
        if not (isinstance(identity, tuple) and len(identity) >= 5 and identity[0] == "storage"):
            raise FormatError(f"{self.name}: its pickle refers to something that is no storage")
        kind, key, numel = identity[1], identity[2], identity[4]
        if not isinstance(kind, Global) or not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise FormatError(f"{self.name}: its pickle describes a storage that cannot be")
        if kind.name == "UntypedStorage":
            return Storage(key, None, numel)
        if kind.name not in STORAGES:
            raise FormatError(f"{self.name}: tensors of type {kind} are not supported")
        return Storage(key, STORAGES[kind.name], numel)


def _pairs(flat: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Keys with values; keys that are no plain data are left out, as hashing them could recurse."""
    if len(flat) % 2:
        raise ValueError("a mapping with a key and no value")
    for key, value in zip(flat[::2], flat[1::2], strict=True):
        if isinstance(key, _PLAIN_KEYS):
            yield key, value


def call(function: Any, args: tuple[Any, ...]) -> Any:
    """What a known global makes of its arguments; anything else is opaque."""
    if not isinstance(function, Global):
        return Opaque(type(function).__name__)
    maker = _MAKERS.get((function.module, function.name))
    return Opaque(str(function)) if maker is None else maker(args)


def _tensor(args: tuple[Any, ...]) -> PickledTensor:
    storage, offset, shape, strides = args[:4]
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise ValueError("a tensor without a typed storage")
    return _view(storage, storage.dtype, offset, shape, strides)


def _tensor_with_type(args: tuple[Any, ...]) -> PickledTensor:
    storage, offset, shape, strides, dtype = *args[:4], args[6]
    if not isinstance(storage, Storage) or not isinstance(dtype, Global) or dtype.name not in _TORCH_TYPES:
        raise ValueError(f"a tensor of type {dtype}")
    return _view(storage, DType.parse(dtype.name), offset, shape, strides)


def _view(storage: Storage, dtype: DType, offset: Any, shape: Any, strides: Any) -> PickledTensor:
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError("a tensor of impossible shape or strides")
    return PickledTensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _first(args: tuple[Any, ...]) -> Any:
    return args[0] if args else Opaque("nothing")


def _typed(args: tuple[Any, ...]) -> Any:
    return call(args[0], args[2] if isinstance(args[2], tuple) else ())


def _mapping(args: tuple[Any, ...]) -> dict[Any, Any]:
    pairs = args[0] if args and isinstance(args[0], (list, tuple)) else ()
    if args and isinstance(args[0], dict):
        return dict(args[0])
    return dict(_pairs([item for pair in pairs if isinstance(pair, (list, tuple)) and len(pair) == 2 for item in pair]))


def _sequence(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(args[0]) if args and isinstance(args[0], (list, tuple)) else ()


_MAKERS: dict[tuple[str, str], Callable[[tuple[Any, ...]], Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_with_type,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _typed,
    ("collections", "OrderedDict"): _mapping,
    ("collections", "defaultdict"): lambda args: {},
    ("builtins", "dict"): _mapping,
    ("builtins", "list"): lambda args: list(_sequence(args)),
    ("builtins", "tuple"): _sequence,
    ("torch", "Size"): _sequence,
}
_PUSHES_ARGUMENT = {
    "INT",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG",
    "LONG1",
    "LONG4",
    "FLOAT",
    "BINFLOAT",
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
    "UNICODE",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
    "BYTEARRAY8",
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
}
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.discard_mark,
    "DUP": _Machine.duplicate,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "LIST": _Machine.make_list,
    "FROZENSET": _Machine.make_list,
    "TUPLE": _Machine.make_tuple,
    "DICT": _Machine.make_dict,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.named_global,
    "STACK_GLOBAL": _Machine.stack_global,
    "EXT1": _Machine.extension,
    "EXT2": _Machine.extension,
    "EXT4": _Machine.extension,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.new_object_with_keywords,
    "INST": _Machine.instance,
    "OBJ": _Machine.object,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}
