"""One task, tile by tile: load and convert, apply the methods, convert and write."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch

from remelt.check.program import Apply, Argument, Bundle, Constant, Item, Listed, Load, Register, Slot
from remelt.core.checksum import checksum
from remelt.core.dtype import DType
from remelt.core.place import Place
from remelt.core.random import Random
from remelt.core.tensor_info import width_of_rows
from remelt.engine.cache import Recall, stages
from remelt.engine.copying import copy_bytes
from remelt.engine.finite import is_finite, overflows, with_infinities
from remelt.engine.known import Fold, Known, Partials, add_chunks
from remelt.engine.language import Kernel
from remelt.engine.steps import look_at_steps
from remelt.engine.sweeps import plain_values, run_traced
from remelt.engine.units import pieces, stretches
from remelt.engine.workplace import Memory, Reader, Stopped, Workplace
from remelt.errors import MethodError, RemeltError
from remelt.planning.cost import CHUNK
from remelt.planning.passes import Pass, Sweep, WholeCall
from remelt.planning.plan import PlannedTask
from remelt.recipe.declaration import LOST
from remelt.recipe.signature import Prepared, call_by_rows
from remelt.tensors import TORCH, byte_range, bytes_of


class TaskRun(Reader):
    """The execution of one task, whole or a slice of it."""

    def __init__(self, planned: PlannedTask, place: Workplace, known: Known | None = None) -> None:
        super().__init__(planned, place)
        self.whole: dict[int, Any] = {}
        self.known = Known() if known is None else known
        self.partials: Partials = {}
        """What the slice that is swept adds to sums."""
        self.counts: Any = None
        """The counts among it, where the native executor keeps them."""
        self.recall = None if place.cache is None else Recall(place.cache, place.identities, self)
        self.shows_all = self.watches_results()
        self.checksums = [0] * len(self.task.outputs)

    def run(self, start: int = 0, stop: int | None = None, *, keep: bool = True) -> None:
        """Run all passes, or those elements of the only one.

        A later run may keep the result, unless ``keep`` says otherwise or NaN or infinities were met, which may be
        treated in another way then.
        """
        if self.recall is not None:
            self.recall.take_sums()
        self.take(self.planned.passes.passes, start, stop)
        self.finish(start, stop, keep=keep)

    def take(self, passes: Iterable[Pass], start: int = 0, stop: int | None = None) -> None:
        """Run some passes; sums across tensors are known already."""
        for one in passes:
            if not isinstance(one, Sweep):
                self.call(one)
            elif not one.across:
                self.sweep(one, start, stop)

    def finish(self, start: int = 0, stop: int | None = None, *, keep: bool = True) -> None:
        """Tell the results' files that those elements are complete."""
        if self.recall is not None:
            self.recall.keep_sums()
        for (root, key, info), found in zip(self.task.outputs, self.checksums, strict=True):
            begin, end = byte_range(info, start, stop)
            self.place.sinks[root].finished(key, begin, end, found % 2**64, keep=keep and not self.spoiled)

    def watches_results(self) -> bool:
        """Whether looking at results is enough to find NaN and infinities in what is read."""
        known = self.place.watched.get(id(self.program))
        if known is None:
            found = self.planned.passes.simple and not self.task.copy and self.program.shows_all()
            known = self.place.watched[id(self.program)] = self.program, found
        return known[1]

    def sweep(self, sweep: Sweep, start: int, stop: int | None) -> None:
        """One pass over tiles; elements outside ``start`` to ``stop`` are left to others."""
        shape = self.task.shape if sweep.shape is None else sweep.shape
        size = math.prod(shape)
        end = size if stop is None else min(stop, size)
        for register in sweep.gathers:
            self.whole[register] = torch.empty(shape, dtype=self.place.compute, device=self.place.device)
        if sweep.reductions and self.needs(sweep):
            fold = Fold()
            for begin, end in stretches(sweep, size, self.planned.grain(sweep)):
                fold.add(begin, end, self.stretch(sweep, begin, end, size))
            self.known.settle(fold, size)
        elif not sweep.reductions:
            self.stretch(sweep, start, end, size)
        for register in sweep.drops:
            self.whole.pop(register, None)

    def needs(self, sweep: Sweep) -> bool:
        """Whether a sweep is to be done: its rounds of reductions may have become needless by those before."""
        if not sweep.reductions or sweep.gathers or sweep.outputs:
            return True
        return any(
            register not in self.known.recalled and self._is_due(register, number)
            for register, number in sweep.reductions
        )

    def _is_due(self, register: int, number: int) -> bool:
        instruction = self.program.instructions[register]
        assert isinstance(instruction, Apply)
        unless = instruction.reductions[number].unless
        return unless is None or not unless(self.known.so_far(register, instruction, plain_values(instruction, self)))

    def stretch(self, sweep: Sweep, begin: int, end: int, size: int) -> Partials:
        """Some elements of a pass, whose shape has ``size`` of them; what they add to sums."""
        tally = self.place.tallies.mine()
        others = tally.reading + tally.writing
        started = perf_counter()
        if not copy_bytes(self, sweep, begin, end):
            executor = self.place.kernels.of(self, sweep)
            for first, last in pieces(begin, end) if sweep.sampled else [(begin, end)]:
                if executor is None or not run_traced(executor, self, first, last):
                    self.step(sweep, first, last, size)
            look_at_steps(self, sweep, begin, end, size)
        tally.computing += perf_counter() - started - (tally.reading + tally.writing - others)
        found, self.partials, self.counts = self.partials, {}, None
        return found

    def step(self, sweep: Sweep, start: int, end: int, size: int) -> None:
        """Elements of a sweep method by method, as what could not be traced needs."""
        grain = self.planned.grain(sweep)
        tile = max(self.planned.cost.tile, CHUNK) if sweep.reductions else self.planned.cost.tile
        tile = grain if sweep.batched else max(tile // grain, 1) * grain
        for begin in range(start, max(end, start + 1), tile):
            self.pause()
            finish = min(begin + tile, end)
            values = self.evaluate(sweep, begin, finish, size)
            for register, number in sweep.reductions:
                sums = self.partials.setdefault(register, {})
                self.reduce(register, number, values, finish - begin, sums, sweep)
            for register in sweep.gathers:
                self.whole[register].view(-1)[begin:finish] = values[register]
            for position in sweep.outputs:
                self.write(position, values[self.program.outputs[position].register], begin)
            values.clear()
            self.place.scratch.reset()

    def pause(self) -> None:
        """Between two tiles: raise `Stopped` where the merge was told to stop."""
        if self.place.stopped():
            raise Stopped
        self.place.tallies.mine().tiles += 1

    def numbers_of(self, kernel: Kernel) -> list[float] | None:
        """The numbers of this task's kernel; None where they have no value."""
        needed = {scalar.sum_of[0] for scalar in kernel.scalars if scalar.name == "sum"}
        instructions = self.program.instructions
        try:
            sums = {
                register: self.known.concluded(register, found, plain_values(found, self))
                for register in needed
                if isinstance(found := instructions[register], Apply)
            }
            return kernel.numbers(self.task.numbers, sums)
        except (ArithmeticError, ValueError):
            return None

    def evaluate(self, sweep: Sweep, begin: int, end: int, size: int) -> dict[int, torch.Tensor]:
        """The registers of a sweep for one tile; those that nothing needs any more are let go at once."""
        values: dict[int, Any] = {}
        instructions, whole, gathers = self.program.instructions, self.whole, sweep.gathers
        for register, freed in zip(sweep.order, sweep.frees, strict=True):
            instruction = instructions[register]
            if register in whole and register not in gathers:
                values[register] = whole[register].reshape(-1)[begin:end]
            elif isinstance(instruction, Apply):
                values[register] = self.apply(register, instruction, values, begin, end)
            elif isinstance(instruction, Load):
                values[register] = self.load(instruction, begin, end)
            for old in freed:
                value = values.pop(old)
                if type(instructions[old]) is Load and old not in whole:
                    self.place.scratch.give_back(value, values.values())
        return values

    def load(self, load: Load, begin: int, end: int) -> torch.Tensor:
        """A tile of an input in the compute type, looked at for NaN and infinities."""
        raw = self.raw(load, begin, end)
        if self.task.copy:
            if raw.is_floating_point() and not is_finite(raw):
                self.blame(load, raw)
            return raw
        place = self.place
        if raw.dtype is place.compute and place.device.type == "cpu":
            values = raw
        elif place.device.type == "cpu":
            values = place.scratch.take(raw.numel(), place.compute).copy_(raw)
        else:
            values = raw.to(device=place.device, dtype=place.compute)
        if not self.shows_all and not is_finite(values):
            self.blame(load, raw)
        return values

    def held_bytes(self, register: int, begin: int, end: int) -> memoryview:
        """Some elements of a tensor that is held whole."""
        return bytes_of(self.whole[register].view(-1)[begin:end])

    def is_placed(self, position: int) -> bool:
        """Whether a result's bytes can be put in their place without asking its sink."""
        return self.place_of(position, 0, 0) is not None

    def place_of(self, position: int, start: int, stop: int) -> Memory | None:
        """Where bytes of a result belong, if they can be put there without asking its sink."""
        root, key, _ = self.task.outputs[position]
        return self.place.sinks[root].place(key, start, stop)

    def put(self, position: int, start: int, data: memoryview) -> None:
        """Write bytes of a result."""
        root, key, _ = self.task.outputs[position]
        begun = perf_counter()
        self.place.sinks[root].write(key, start, data)
        self.place.tallies.mine().writing += perf_counter() - begun

    def settled_part(self, position: int, size: int, *, finite: bool, checksum: int) -> None:
        """Bytes of a result that were looked at are in their place."""
        _, key, info = self.task.outputs[position]
        if not finite and not self.spoiled:
            wider = info.dtype.itemsize > self.place.compute.itemsize
            self.place.report.add_result(key, self.arithmetic if wider else str(info.dtype))
            self.spoiled = True
        self.checksums[position] += checksum
        self.place.tallies.mine().written += size

    def apply(self, register: int, instruction: Apply, values: Mapping[int, Any], begin: int, end: int) -> torch.Tensor:
        """A method on one tile, with what the engine gives it: sums and random numbers."""
        method = instruction.method
        args, kwargs = self.arguments(instruction, values)
        if method.given:
            self.give(instruction, register, kwargs, begin, end - begin)
        result = self.guard(instruction, args, kwargs, self.shape_of(register))
        if not isinstance(result, torch.Tensor) or result.numel() != end - begin:
            got = list(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
            cut = method.declaration.cut
            raise MethodError(
                f"{method.name} is declared to work by {cut}, but made {got} of {end - begin} of {self.task.key}",
                hint='declare it with cut="tensor"',
            )
        if result.dtype is self.place.compute and instruction.cast is None and result.dim() == 1:
            return result
        return self.settled(result.reshape(-1), instruction.cast)

    def settled(self, result: torch.Tensor, cast: DType | None) -> torch.Tensor:
        """A result in the compute type, rounded to the type of a cast."""
        if cast is None:
            return result.to(self.place.compute)
        rounded = result.to(TORCH[cast]).to(self.place.compute)
        return with_infinities(result, rounded).to(self.place.compute) if cast is DType.F8_E4M3 else rounded

    def arguments(self, instruction: Apply, values: Mapping[int, Any]) -> tuple[list[Any], dict[str, Any]]:
        """The function's arguments, from registers, numbers and constants."""
        args = [
            values[argument.index] if type(argument) is Register else self.argument(argument, values)
            for argument in instruction.args
        ]
        return args, {
            name: argument.value if type(argument) is Constant else self.argument(argument, values)
            for name, argument in instruction.kwargs
        }

    def argument(self, argument: Argument, values: Mapping[int, Any]) -> Any:
        """One argument's value."""
        if isinstance(argument, Register):
            return values[argument.index]
        if isinstance(argument, Slot):
            return self.task.numbers[argument.index]
        if isinstance(argument, Constant):
            return argument.value
        if isinstance(argument, Listed):
            return tuple([self.argument(item, values) for item in argument.items])
        assert isinstance(argument, Bundle)
        return {key: values[register] for key, register in argument.items}

    def give(self, instruction: Apply, register: int, kwargs: dict[str, Any], begin: int, size: int) -> None:
        """Add what a method asks of the engine."""
        given = instruction.method.given
        key = self.key_of(instruction)
        if "sums" in given:
            kwargs["sums"] = self.known.concluded(register, instruction, kwargs)
        if "key" in given:
            kwargs["key"] = key
        if "random" in given:
            seed, name = int(kwargs.get("seed", 0)), instruction.method.name
            kwargs["random"] = Random(seed, name, key, begin, size, instruction.occurrence)
        if "place" in given:
            kwargs["place"] = Place(begin, self.shape_of(register))
        if "prepared" in given and instruction.method.declaration.cut == "row":
            kwargs["prepared"] = self.known.prepared(register, lambda: stages(self, register, (), kwargs))

    def shape_of(self, register: int) -> tuple[int, ...]:
        """The shape of a register's whole tensor."""
        shape = self.program.shapes[register]
        return self.task.shape if shape is None else shape

    def key_of(self, instruction: Apply) -> str:
        """The key that a method is applied to."""
        return instruction.key or self.task.key

    def guard(
        self, instruction: Apply, args: Sequence[Any], kwargs: Mapping[str, Any], shape: Sequence[int] = ()
    ) -> Any:
        """The method's result, or what it raised, named by method and key; ``shape`` is that of the whole tensor."""
        if instruction.method.declaration.cut == "row":
            width = width_of_rows(shape, instruction.method.declaration.vectors) if shape else 0
            return self.asked(instruction, lambda: call_by_rows(instruction.method, args, kwargs, width))
        return self.asked(instruction, lambda: instruction.method.function(*args, **kwargs))

    def asked(self, instruction: Apply, function: Callable[[], Any]) -> Any:
        """What a method's function gives, or raised."""
        try:
            return function()
        except RemeltError:
            raise
        except Exception as error:
            raise MethodError(
                f"{instruction.method.name} failed on {self.key_of(instruction)}: {type(error).__name__}: {error}"
            ) from error

    def reduce(
        self, register: int, number: int, values: Mapping[int, Any], size: int, sums: dict[str, torch.Tensor], by: Sweep
    ) -> None:
        """Add a tile's partial sums."""
        instruction = self.program.instructions[register]
        assert isinstance(instruction, Apply)
        args, kwargs = self.arguments(instruction, values)
        earlier = self.known.so_far(register, instruction, kwargs)
        shape = self.shape_of(register)
        add_chunks(sums, instruction, number, args, kwargs, earlier, size, shape, by.rows, batched=by.batched)

    def call(self, call: WholeCall) -> None:
        """A method on whole tensors, and the items of a method that returns several."""
        instruction = self.program.instructions[call.register]
        assert isinstance(instruction, Apply)
        args, kwargs = self.arguments(instruction, self.whole)
        first = next(arg for arg in args if isinstance(arg, (torch.Tensor, Mapping)))
        sized = first if isinstance(first, torch.Tensor) else first.get(self.key_of(instruction))
        self.give(instruction, call.register, kwargs, 0, 0 if sized is None else sized.numel())
        if "prepared" in instruction.method.given:
            kwargs["prepared"] = Prepared(stages(self, call.register, args, kwargs))
        result = self.guard(instruction, args, kwargs)
        if isinstance(result, Mapping):
            self.keep_items(call.register, instruction, result)
        else:
            self.whole[call.register] = self.checked(call.register, instruction, result)
        for register in call.drops:
            self.whole.pop(register, None)

    def keep_items(self, register: int, instruction: Apply, result: Mapping[str, Any]) -> None:
        """The tensors that a method of cut ``model`` returned, each to the register that stands for it."""
        if LOST in result:
            changed, lost = result[LOST].tolist()
            self.place.report.add_lost(self.task.key, int(changed), int(lost))
        for index, item in enumerate(self.program.instructions):
            if isinstance(item, Item) and item.register == register:
                if item.key not in result:
                    raise MethodError(
                        f"{instruction.method.name} declares {item.key} among its outputs, but left it out"
                    )
                self.whole[index] = self.checked(index, instruction, result[item.key])

    def checked(self, register: int, instruction: Apply, result: Any) -> torch.Tensor:
        """A whole result of the declared shape, in the compute type."""
        wanted = self.shape_of(register)
        if not isinstance(result, torch.Tensor) or tuple(result.shape) != wanted:
            got = list(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
            raise MethodError(
                f"{instruction.method.name} made {got} of {self.key_of(instruction)}, but {list(wanted)} was planned",
                hint="a method that changes shapes declares it: merge_method(shape=...)",
            )
        return self.settled(result, instruction.cast).contiguous()

    def stored(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Values in the type and in the memory from which they are written."""
        if values.dtype is dtype or values.device.type != "cpu":
            return values.to(dtype).cpu()
        return self.place.scratch.take(values.numel(), dtype).copy_(values)

    @staticmethod
    def fits(values: torch.Tensor, stored: torch.Tensor) -> bool:
        """Whether what is stored is finite, and nothing was cut off."""
        return is_finite(stored) and not overflows(values, stored.dtype)

    def write(self, position: int, values: torch.Tensor, begin: int) -> None:
        """A tile of a result in its stored type, at its place."""
        root, key, info = self.task.outputs[position]
        stored = self.stored(values, TORCH[info.dtype])
        if info.dtype.is_float and (self.shows_all or not self.spoiled) and not self.fits(values, stored):
            before = self.spoiled
            self.spoiled = False
            if self.shows_all:
                self.blame_inputs(begin, begin + stored.numel())
            if not self.spoiled and not before:
                self.place.report.add_result(key, str(info.dtype))
            self.spoiled = True
        data, offset = bytes_of(stored), begin * info.dtype.itemsize
        if self.place.sinks[root].checked:
            self.checksums[position] += checksum(data, offset)
        self.put(position, offset, data)
        self.place.tallies.mine().written += len(data)
