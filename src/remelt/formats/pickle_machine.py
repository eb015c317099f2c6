"""A pickle machine of our own: it builds plain data and descriptions of tensors, and can call nothing.

Every global is only a name here. The few that rebuild torch's tensors and ordinary containers are understood; any other
gives an inert `Opaque`, so that old training checkpoints, full of classes that no longer exist, open all the same.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from remelt.errors import FormatError
from remelt.formats.pickle_globals import Unsupported, call, global_named, pairs_of, storage_of

MOST_OPERATIONS = 10_000_000
_LARGEST_MEMO = 2**32


@dataclass
class _State:
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)


def unpickle(data: bytes, name: str) -> Any:
    """What a pickle describes; `FormatError` for one that is malformed or uses what no checkpoint needs."""
    machine = _Machine(name, budget=len(data))
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name == "STOP":
                return machine.state.stack[-1]
            if count >= MOST_OPERATIONS:
                raise FormatError(f"{name}: its pickle has more than {MOST_OPERATIONS} operations")
            machine.step(opcode.name, argument)
    except Unsupported as error:
        raise FormatError(f"{name}: its pickle has {error}, which is not supported") from None
    except IndexError:
        raise FormatError(f"{name}: its pickle is malformed: an operation finds too little") from None
    except KeyError:
        raise FormatError(f"{name}: its pickle is malformed: it recalls what it never stored") from None
    except (TypeError, ValueError, OverflowError, AttributeError, Warning) as error:  # odd escapes warn
        raise FormatError(f"{name}: its pickle is malformed: {str(error)[:200]}") from None
    raise FormatError(f"{name}: its pickle has no end")


class _Machine:
    """One opcode at a time, on a stack of plain data."""

    def __init__(self, name: str, budget: int) -> None:
        self.name = name
        self.state = _State()
        self.budget = budget

    def charge(self, elements: int) -> None:
        """Count copied elements: what a pickle pushes once, it has no reason to copy more than once."""
        self.budget -= elements
        if self.budget < 0:
            raise FormatError(f"{self.name}: its pickle copies its containers over and over")

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
            target.update(pairs_of(flat))

    def make_list(self, _: Any) -> None:
        items = self.pop_mark()
        self.state.stack.append(items)

    def make_tuple(self, _: Any) -> None:
        items = tuple(self.pop_mark())
        self.state.stack.append(items)

    def make_dict(self, _: Any) -> None:
        found = dict(pairs_of(self.pop_mark()))
        self.state.stack.append(found)

    def tuple_of(self, count: int) -> None:
        stack = self.state.stack
        if len(stack) < count:
            raise IndexError("stack underflow")
        stack[-count:] = [tuple(stack[-count:])]

    def put(self, index: Any) -> None:
        if not 0 <= int(index) < _LARGEST_MEMO:
            raise ValueError("it stores something under an impossible number")
        self.state.memo[int(index)] = self.state.stack[-1]

    def memoize(self, _: Any) -> None:
        self.state.memo[len(self.state.memo)] = self.state.stack[-1]

    def get(self, index: Any) -> None:
        self.state.stack.append(self.state.memo[int(index)])

    def named_global(self, argument: Any) -> None:
        module, _, name = str(argument).partition(" ")
        self.state.stack.append(global_named(module, name))

    def stack_global(self, _: Any) -> None:
        name, module = self.state.stack.pop(), self.state.stack.pop()
        self.state.stack.append(global_named(module, name))

    def extension(self, code: Any) -> None:
        self.state.stack.append(global_named("copyreg", f"extension {code}"))

    def reduce(self, _: Any) -> None:
        args, function = self.state.stack.pop(), self.state.stack.pop()
        self.state.stack.append(call(function, args, self.charge))

    def new_object_with_keywords(self, _: Any) -> None:
        self.state.stack.pop()
        self.reduce(None)

    def instance(self, argument: Any) -> None:
        args = tuple(self.pop_mark())
        module, _, name = str(argument).partition(" ")
        self.state.stack.append(call(global_named(module, name), args, self.charge))

    def object(self, _: Any) -> None:
        function, *args = self.pop_mark()
        self.state.stack.append(call(function, tuple(args), self.charge))

    def build(self, _: Any) -> None:
        self.state.stack.pop()  # the state of an object that was never made

    def persistent(self, _: Any) -> None:
        self.state.stack.append(storage_of(self.state.stack.pop()))


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
