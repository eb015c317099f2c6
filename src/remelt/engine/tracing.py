"""From the methods of a sweep to one kernel: each function is called once, on symbols, for all keys of one kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from remelt.check.program import Apply, Argument, Bundle, Constant, Listed, Load, Program, Register, Slot
from remelt.core.dtype import DType
from remelt.engine.language import Kernel, Kind, Operand, Partial, Scalar, Source, Target, in_order_of_need
from remelt.engine.symbols import Symbol, SymbolicNumber, SymbolicSum, SymbolicSums
from remelt.engine.writer import Untraceable, Writer
from remelt.planning.passes import Sweep
from remelt.recipe.signature import conclude, reduce_tile


def trace(
    program: Program,
    sweep: Sweep,
    sources: Mapping[int, DType],
    targets: Sequence[DType],
    held: Mapping[int, Any],
    compute: DType,
) -> Kernel | None:
    """The kernel of a sweep, or None where a method does what the language does not say.

    ``sources`` are the stored types of the registers that are loaded, ``targets`` those of the sweep's outputs in
    order, ``held`` the registers that earlier passes left whole.
    """
    try:
        return in_order_of_need(_Tracer(program, sweep, sources, held, compute).kernel(targets))
    except Exception:  # whatever a function does with a symbol, it is run on tensors then, and tells its errors there
        return None


class _Tracer:
    def __init__(
        self, program: Program, sweep: Sweep, sources: Mapping[int, DType], held: Mapping[int, Any], compute: DType
    ) -> None:
        self.program, self.sweep, self.stored, self.held = program, sweep, sources, held
        self.compute = compute
        self.kind: Kind = "double" if compute is DType.F64 else "single"
        self.writer = Writer()
        self.sources: list[Source] = []
        self.values: dict[int, Operand] = {}

    def kernel(self, targets: Sequence[DType]) -> Kernel:
        sweep, instructions = self.sweep, self.program.instructions
        if sweep.rows:
            raise Untraceable("a method by row")
        for register in sweep.order:
            instruction = instructions[register]
            if register in self.held and register not in sweep.gathers:
                self.values[register] = self.load(register, self.compute, held=True)
            elif isinstance(instruction, Load):
                self.values[register] = self.load(register, self.stored[register], held=False)
            elif isinstance(instruction, Apply):
                self.values[register] = self.apply(register, instruction)
            else:
                raise Untraceable("an item of a method")
        partials = [one for register, number in sweep.reductions for one in self.reduce(register, number)]
        stored = [
            Target(self.values[self.program.outputs[position].register], dtype, output=position)
            for position, dtype in zip(sweep.outputs, targets, strict=True)
        ]
        gathered = [Target(self.values[register], self.compute, register=register) for register in sweep.gathers]
        return Kernel(
            self.kind,
            tuple(self.writer.operations),
            tuple(self.writer.scalars),
            tuple(self.sources),
            tuple(stored + gathered),
            tuple(partials),
        )

    def load(self, register: int, dtype: DType, *, held: bool) -> int:
        self.sources.append(Source(register, dtype, held))
        return self.writer.operation("load", (), self.kind, dtype=dtype, place=len(self.sources) - 1)

    def symbol(self, register: int) -> Symbol:
        """A new symbol for a register: what a function does to it in place stays its own."""
        return Symbol.of(self.writer, self.values[register], self.kind)

    def apply(self, register: int, instruction: Apply) -> Operand:
        method = instruction.method
        args = [self.argument(argument) for argument in instruction.args]
        kwargs = {name: self.argument(argument) for name, argument in instruction.kwargs}
        if method.given - {"sums"}:
            raise Untraceable("a method that asks for its key, its place, or random numbers")
        if "sums" in method.given:
            kwargs["sums"] = self.sums(register, instruction, kwargs)
        result = method.function(*args, **kwargs)
        if type(result) is not Symbol or result.truth or result.kind != self.kind:
            raise Untraceable("a result that is no tensor of the compute type")
        if instruction.cast is DType.F8_E4M3:
            raise Untraceable("numbers beyond that type are to be told")
        if instruction.cast is None:
            return result.operand
        return self.writer.operation("round", [result.operand], self.kind, dtype=instruction.cast)

    def sums(self, register: int, instruction: Apply, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a method is given as its sums: known already where its reductions are left out."""
        return (
            SymbolicSums(self.writer, register) if instruction.reductions else conclude(instruction.method, {}, values)
        )

    def argument(self, argument: Argument) -> Any:
        if isinstance(argument, Register):
            return self.symbol(argument.index)
        if isinstance(argument, Constant):
            return argument.value
        if isinstance(argument, Slot):
            return SymbolicNumber(self.writer, self.writer.scalar(Scalar("slot", slot=argument.index)))
        if isinstance(argument, Listed):
            return tuple([self.argument(item) for item in argument.items])
        assert isinstance(argument, Bundle)
        raise Untraceable("several keys")

    def reduce(self, register: int, number: int) -> list[Partial]:
        instruction = self.program.instructions[register]
        assert isinstance(instruction, Apply)
        args = [self.argument(argument) for argument in instruction.args]
        kwargs = {name: self.argument(argument) for name, argument in instruction.kwargs}
        reduction = instruction.reductions[number]
        sums = SymbolicSums(self.writer, register)
        found = reduce_tile(instruction.method, reduction, args, kwargs, sums)
        partials = []
        for name, partial in found.items():
            if type(partial) is not SymbolicSum:
                raise Untraceable("a reduction that is no sum")
            partials.append(Partial(partial.value, register, name, partial.bins, partial.begin))
        return partials
