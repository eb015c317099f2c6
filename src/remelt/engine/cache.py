"""What merges of the same models with other numbers have in common, kept from one to the next.

Decompositions and thresholds depend on the models, and not on how far they are moved: a study that merges one recipe
hundreds of times computes them once.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from remelt.check.program import Apply, Bundle, Item, Load, Register
from remelt.core.checksum import checksum
from remelt.core.units import parse_bytes
from remelt.engine.sweeps import plain_values
from remelt.recipe.signature import Stage, names_asked, preparations

if TYPE_CHECKING:
    from remelt.engine.tiles import TaskRun
    from remelt.formats.checkpoint import Checkpoint

_PART = 2**23
"""Bytes of a tensor that are looked at together."""
_NUMBERS = 1024
"""Bytes that an entry of numbers is reckoned at."""


class Cache:
    """A store of intermediate results in full precision, for repeated merges: ``rm.merge(recipe, cache=cache)``.

    It counts within the memory budget of each merge; what was not used for longest is let go first. Entries are told
    apart by the content of the models, the recipe below them, and the numbers that they depend on.
    """

    def __init__(self, size: int | str = "1GiB") -> None:
        self.size = parse_bytes(size) if isinstance(size, str) else size
        self.held = 0
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()
        self._contents: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Any:
        """What was kept under a key, or None."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return found[0]

    def put(self, key: bytes, value: Mapping[str, Any]) -> None:
        """Keep a value, unless it is larger than the cache."""
        value = {name: _own(one) if isinstance(one, torch.Tensor) else one for name, one in value.items()}
        size = _NUMBERS + sum(one.nbytes for one in value.values() if isinstance(one, torch.Tensor))
        if size > self.size:
            return
        with self._lock:
            if key in self._entries:
                return
            while self.held + size > self.size:
                _, (_, old) = self._entries.popitem(last=False)
                self.held -= old
            self._entries[key] = value, size
            self.held += size

    def content(self, place: tuple[str, str], find: Callable[[], int]) -> int:
        """The checksum of a tensor of a file, found once for as long as the file is not changed."""
        known = self._contents.get(place)
        if known is None:
            known = self._contents[place] = find()
        return known

    def clear(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._entries.clear()
            self.held = 0


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with no more memory than its elements take: a view would keep all that it looks into."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class Recall:
    """The cache as one task uses it: what its calls are known by."""

    def __init__(self, cache: Cache, identities: Mapping[int, str | None], run: TaskRun) -> None:
        self.cache, self.identities, self.run = cache, identities, run
        self._known: dict[int, bytes] = {}

    def take_sums(self) -> None:
        """Take over what earlier merges found of the sums of the task's calls."""
        known = self.run.known
        for register, instruction, key in self._summing():
            found = self.cache.get(key)
            if found is not None:
                (known.conclusions if _keeps_conclusion(instruction) else known.sums)[register] = found
                known.recalled.add(register)

    def keep_sums(self) -> None:
        """Keep what was found of them for later merges: what they come to, where that depends on no other number."""
        known = self.run.known
        for register, instruction, key in self._summing():
            if register not in known.sums or register in known.recalled or self.run.spoiled:
                continue
            if _keeps_conclusion(instruction):
                self.cache.put(key, known.concluded(register, instruction, plain_values(instruction, self.run)))
            else:
                self.cache.put(key, known.sums[register])

    def prepared(self, register: int, place: int, make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """What a method makes of its whole operands in one of its stages, or an earlier merge made of the same."""
        instruction = self.run.program.instructions[register]
        assert isinstance(instruction, Apply)
        key = self.key(register, *instruction.method.declaration.prepares[: place + 1])
        found: Mapping[str, Any] | None = self.cache.get(key)
        if found is None:
            found = make()
            self.cache.put(key, found)
        return found

    def of_round(self, register: int, number: int) -> bytes:
        """What the sums of a round across tensors are known by, as far as this task adds to them."""
        instruction = self.run.program.instructions[register]
        assert isinstance(instruction, Apply)
        functions = [one.function for one in instruction.reductions[: number + 1]]
        conclusion = instruction.method.declaration.conclusion
        asks = any("sums" in names_asked(one) for one in functions)
        return self.key(register, *functions, *([conclusion] if asks and conclusion is not None else ()))

    def _summing(self) -> Iterator[tuple[int, Apply, bytes]]:
        """The calls with sums of one tensor, and what these are known by."""
        for register, instruction in enumerate(self.run.program.instructions):
            if not isinstance(instruction, Apply) or not instruction.reductions:
                continue
            if any(one.across for one in instruction.reductions):
                continue
            functions: list[Any] = [one.function for one in instruction.reductions]
            if _keeps_conclusion(instruction):
                functions.append(instruction.method.declaration.conclusion)
            yield register, instruction, self.key(register, *functions)

    def key(self, register: int, *functions: Any) -> bytes:
        """What names a call's intermediate results: its operands, and the plain arguments that functions ask for."""
        instruction = self.run.program.instructions[register]
        assert isinstance(instruction, Apply)
        asked = {name for function in functions for name in names_asked(function)}
        values = {
            name: self.run.argument(argument, {})
            for name, argument in instruction.kwargs
            if name in asked and not isinstance(argument, (Register, Bundle))
        }
        parts = [instruction.method.name.encode(), repr((sorted(values.items()), instruction.occurrence)).encode()]
        parts += [f"{len(functions)} {function.__qualname__}".encode() for function in functions[-1:]]
        parts += [self._of(operand) for operand in instruction.operands]
        place = self.run.place
        parts += [
            f"{place.compute} {place.device} {place.kernels.executor}".encode(),
            (instruction.key or "").encode("utf-8", "surrogatepass"),
        ]
        return _digest(parts)

    def _of(self, register: int) -> bytes:
        """The identity of a register's content."""
        program = self.run.program
        for place in range(register + 1):
            if place in self._known:
                continue
            instruction = program.instructions[place]
            if isinstance(instruction, Load):
                parts = [b"load", self._stored(instruction)]
            elif isinstance(instruction, Item):
                parts = [b"item", self._known[instruction.register], instruction.key.encode("utf-8", "surrogatepass")]
            else:
                values = [
                    (name, self.run.argument(argument, {}))
                    for name, argument in instruction.kwargs
                    if not isinstance(argument, (Register, Bundle))
                ]
                more = [
                    self.run.argument(one, {}) for one in instruction.args if not isinstance(one, (Register, Bundle))
                ]
                plain = (values, more, instruction.cast, instruction.occurrence)
                parts = [instruction.method.name.encode(), repr(plain).encode()]
                parts += [self._known[operand] for operand in instruction.operands]
                parts.append(self.run.key_of(instruction).encode("utf-8", "surrogatepass"))
            self._known[place] = _digest(parts)
        return self._known[register]

    def _stored(self, load: Load) -> bytes:
        """An input's tensor: by its bytes, wherever it is."""
        key = load.key or self.run.task.key
        identity = self.identities.get(load.input)
        checkpoint = self.run.place.checkpoints[load.input]
        info = checkpoint.tensors[key]

        def found() -> int:
            return content_of(checkpoint, key, self.run.pause)

        number = found() if identity is None else self.cache.content((identity, key), found)
        return f"{number:016x} {info.dtype} {info.shape}".encode()


def stages(run: TaskRun, register: int, args: Sequence[Any], values: Mapping[str, Any]) -> list[Stage]:
    """How a call prepares what it needs, of its operands or of its sums, where no earlier merge did."""
    instruction, recall = run.program.instructions[register], run.recall
    assert isinstance(instruction, Apply)

    def as_kept(place: int, stage: Stage) -> Stage:
        def made(before: Mapping[str, Any]) -> Mapping[str, Any]:
            found: Mapping[str, Any] = run.asked(instruction, lambda: stage(before))
            return found

        return made if recall is None else lambda before: recall.prepared(register, place, lambda: made(before))

    found = preparations(instruction.method, args, values, values.get("sums", {}))
    return [as_kept(place, stage) for place, stage in enumerate(found)]


def _keeps_conclusion(instruction: Apply) -> bool:
    """Whether what sums come to is kept, and not they: rounds build on it, or no further number has a part in it."""
    conclusion = instruction.method.declaration.conclusion
    if conclusion is None:
        return False
    asked = {name for one in instruction.reductions for name in names_asked(one.function)}
    return "sums" in asked or asked.issuperset(names_asked(conclusion))


def content_of(checkpoint: Checkpoint, key: str, pause: Callable[[], None]) -> int:
    """The checksum of a tensor's bytes, read part by part, with a pause between them."""
    size, total = checkpoint.tensors[key].nbytes, 0
    for begin in range(0, size, _PART):
        pause()
        total += checksum(checkpoint.read(key, begin, min(begin + _PART, size)), begin)
    return total % 2**64


def _digest(parts: list[bytes]) -> bytes:
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).digest()
