"""Recipes of older grammars, instruction by instruction, into the same graph as today's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from remelt.core.nearest import nearest_hint
from remelt.errors import RecipeError, Span
from remelt.recipe.blocks import KEYS, BlockWeights, Rule, blocks, literal_glob
from remelt.recipe.node import Call, Model, Node, Parameter, Value, model, parameter
from remelt.text.document import Document, Step
from remelt.text.eras.instructions import Instruction, Word, instructions
from remelt.text.eras.methods import (
    ADAPTERS,
    BLOCK_CONFIGS,
    CONFIGS,
    HEADERLESS,
    INSTEAD,
    OLDEST,
    TURNED,
    VERSION_0_1,
    OldMethod,
)
from remelt.text.eras.weights import WeightNameError, first_weights
from remelt.text.eras.words import Era, Named, Result, Words
from remelt.text.source import SourceText
from remelt.text.statements import comments_between

ARCHS = {"sd1": "sd1", "sdxl": "sdxl", "sd3": "sd3", "sd35": "sd3", "flux": "flux"}
_SPACES = {"BASE": "weight", "MODEL": "weight", "DELTA": "delta", "LORA": "delta"}
_BLOCKS = {one.config: one.conversion for one in BLOCK_CONFIGS.values()}
_PLAIN = ("convert_singleton", *_BLOCKS.values())


VERSION = Era("version 0.1.0", True, "merge", True, VERSION_0_1, ("dict", "literal", "model", "merge"))
UNVERSIONED = Era("headerless", False, "merge", False, HEADERLESS, ("dict", "model", "parameter", "merge"))
FIRST = Era("oldest", False, "call", False, OLDEST, ("dict", "model", "lora", "parameter", "call"), first_weights)


def read_version_0_1(source: SourceText, version_line: int) -> Document:
    """A recipe of the grammar that sd-mecha has written since 0.1.0rc5, after the line with the version."""
    return _Reader(source, VERSION).read(version_line + 1, comments_between(source, 1, version_line))


def read_headerless(source: SourceText, first_line: int) -> Document:
    """A recipe without a version: of sd-mecha 0.0.5 to 0.0.29, or of its first releases, which wrote ``call``."""
    oldest = any(line.lstrip(" \t").startswith(("call ", "call\t", "lora ", "lora\t")) for line in source.lines)
    return _Reader(source, FIRST if oldest else UNVERSIONED).read(first_line, comments_between(source, 1, first_line))


@dataclass
class _Reader(Words):
    archs: set[str] = field(default_factory=set)

    def read(self, first_line: int, heading: Sequence[str]) -> Document:
        steps: list[Step] = []
        commands: dict[str, Callable[[Instruction], Result]] = {
            "dict": self.named,
            "literal": self.literal,
            "model": self.model,
            "lora": self.lora,
            "parameter": self.parameter,
            self.era.call: self.call,
        }
        last: Instruction | None = None
        for last in instructions(self.source, first_line, escapes=self.era.escapes):
            self.line = last.line
            command = last.command
            if command.text not in self.era.commands:
                known = ", ".join(self.era.commands)
                hint = nearest_hint(command.text, self.era.commands) or f"one of {known}"
                raise self.refuse(command, f"{command.text[:40]!r} is no instruction of this grammar", hint)
            result = commands[command.text](last)
            self.results.append(result)
            if last.comments and isinstance(result, Node):
                name = f"step_{len(self.results) - 1}"
                steps.append(Step(name, last.line, result, result, last.comments, used=True))
        if last is None:
            raise self.source.refuse("the recipe says nothing", first_line, hint="its last line is the result")
        root = self.results[-1]
        if not isinstance(root, Node) or isinstance(root, Value):
            raise self.refuse(last.command, "the last line is a recipe's result, but this is no model", "add a merge")
        return Document(self.with_copied(root), tuple(steps), heading=tuple(heading), grammar=self.era.title)

    def with_copied(self, root: Node) -> Node:
        """The result, with the VAE of the first model: in the headerless era it was never merged."""
        if self.era is not UNVERSIONED or not self.archs or not isinstance(root, Call):
            return root
        first: Node = root
        while isinstance(first, Call) and first.args:
            first = first.args[0]
        if not isinstance(first, Model):
            return root
        return Call("fallback", (Call("pick_component", (first,), (("component", Value("vae")),)), root))

    # ---- instructions ----

    def named(self, instruction: Instruction) -> Named:
        self.only_named(instruction)
        words = {str(word.name): word for word in instruction.named}
        if len(words) < len(instruction.named):
            twice = next(word for word in instruction.named if words[str(word.name)] is not word)
            raise self.refuse(twice, f"{twice.name!r} is given twice")
        return Named({name: self.plain(word) for name, word in words.items()}, words, self.line)

    def only_named(self, instruction: Instruction) -> None:
        if instruction.words:
            raise self.refuse(instruction.words[0], "a dict holds names with values, as in IN00=0.2")

    def literal(self, instruction: Instruction) -> Value:
        self.only(instruction, 1, ("model_config", "merge_space"))
        if not instruction.words:
            raise self.refuse(instruction.command, "a literal holds a value or the number of a dict")
        (word,) = instruction.words
        config = self.text(instruction, 1, ("model_config",), "a model config")
        found = self.value(word)
        if isinstance(found, Value):
            return found
        if not isinstance(found, Named):
            raise self.refuse(word, "a literal holds a value or the number of a dict")
        if config == "singleton-mecha" and list(found.items) == ["key"]:
            return Value(found.items["key"], span=self.source.span(self.line, word.column, word.width))
        numbers = self.numbers(word, found)
        if config in _BLOCKS:
            return Value(blocks(numbers))
        escaped = {literal_glob(key): number for key, number in numbers.items()}
        return Value(BlockWeights((Rule(KEYS, named=tuple(escaped.items())),)))

    def numbers(self, word: Word, found: Named) -> dict[str, float]:
        """The values of a dict, which are numbers."""
        numbers: dict[str, float] = {}
        for name, value in found.items.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise self.refuse(word, f"weights are numbers, but {name!r} is {value!r}")
            numbers[name] = float(value)
        if not numbers:
            raise self.refuse(word, "this dict holds no weight")
        return numbers

    def model(self, instruction: Instruction) -> Model:
        if self.era is VERSION:
            self.only(instruction, 3, ("model_config", "config", "merge_space"))
            config = self.text(instruction, 1, ("model_config", "config"), "a model config")
            if config is not None and config.endswith("_lora"):
                raise self.refuse(instruction.words[0], f"this model is an adapter ({config})", ADAPTERS)
            space = self.text(instruction, 2, ("merge_space",), "a merge space") or "weight"
            arch = CONFIGS.get(config) if config is not None else None
            return self.reference_to(instruction, space, arch)
        self.only(instruction, 3, ("model_arch", "model_type"))
        old_arch = self.text(instruction, 1, ("model_arch",), "an arch")
        kind = self.text(instruction, 2, ("model_type",), "a model type")
        if kind not in (None, "base"):
            raise self.refuse(instruction.words[-1], f"this model is of type {kind!r}", ADAPTERS)
        return self.reference_to(instruction, "weight", self.arch(instruction, 1, old_arch))

    def lora(self, instruction: Instruction) -> NoReturn:
        raise self.refuse(instruction.command, "this model is an adapter", ADAPTERS)

    def arch(self, instruction: Instruction, place: int, name: str | None) -> str | None:
        """Today's name of an arch."""
        if name is None:
            return None
        if name not in ARCHS:
            word = next((one for one in instruction.named if one.name == "model_arch"), None)
            hint = nearest_hint(name, ARCHS) or f"one of {', '.join(ARCHS)}"
            raise self.refuse(word or instruction.words[place], f"{name!r} is no arch of sd-mecha 0", hint)
        self.archs.add(ARCHS[name])
        return ARCHS[name]

    def reference_to(self, instruction: Instruction, space: str, arch: str | None) -> Model:
        path = self.text(instruction, 0, (), "a model's path")
        if path is None:
            raise self.refuse(instruction.command, "a model needs a path in quotes")
        try:
            found = model(path, space=space, arch=arch)
        except RecipeError as error:
            raise self.refuse(instruction.words[0], error.message, error.hint) from None
        return Model(found.name, space=found.space, arch=found.arch, span=self.span_of(instruction))

    def parameter(self, instruction: Instruction) -> Parameter:
        self.only(instruction, 3, ("model_arch", "merge_space"))
        name = self.text(instruction, 0, (), "a parameter's name")
        if name is None:
            raise self.refuse(instruction.command, "a parameter needs a name in quotes")
        space = self.text(instruction, 1, ("merge_space",), "a merge space") or "BASE"
        if space not in _SPACES:
            raise self.refuse(instruction.words[1], f"{space!r} is no merge space of this grammar", "BASE or DELTA")
        arch = self.arch(instruction, 2, self.text(instruction, 2, ("model_arch",), "an arch"))
        try:
            found = parameter(name, space=_SPACES[space], arch=arch)
        except RecipeError as error:
            raise self.refuse(instruction.words[0], error.message, error.hint) from None
        return Parameter(found.name, found.space, found.arch, span=self.span_of(instruction))

    # ---- calls ----

    def call(self, instruction: Instruction) -> Node:
        if not instruction.words:
            raise self.refuse(instruction.command, f"{self.era.call} needs a method's name in quotes")
        name, *words = instruction.words
        if not name.quoted:
            raise self.refuse(name, f"{self.era.call} needs a method's name in quotes, before its arguments")
        if self.era is VERSION:
            plain = self.without_method(name, words, instruction)
            if plain is not None:
                return plain
        method = self.method(name, instruction)
        operands, values = self.bound(method, instruction, words)
        return self.made(method, instruction, operands, values)

    def method(self, name: Word, instruction: Instruction) -> OldMethod:
        if name.text == "rotate" and any(word.name == "beta" for word in instruction.named):
            return TURNED
        found = self.era.methods.get(name.text)
        if found is not None:
            return found
        if name.text.startswith(("convert_", "extract_")):
            hint = "conversions between key layouts and adapters come later: convert the file first"
            raise self.refuse(name, f"{name.text[:80]!r} converts a model, which this remelt does not", hint)
        instead = f"write it in version 1: {INSTEAD[name.text]}" if name.text in INSTEAD else None
        message = f"{name.text[:80]!r} is no method of {self.era.title} recipes"
        raise self.refuse(name, message, instead or nearest_hint(name.text, self.era.methods))

    def without_method(self, name: Word, words: Sequence[Word], instruction: Instruction) -> Value | None:
        """What stands for plain values: they were wrapped to be arguments, and combined as models are."""
        if name.text in _PLAIN:
            if len(words) != 1 or instruction.named:
                raise self.refuse(name, f"{name.text} takes one value")
            found = self.value(words[0])
            if isinstance(found, Value):
                return found
            if name.text in _BLOCKS.values() and isinstance(found, Named):
                return Value(blocks(self.numbers(words[0], found)))
            raise self.refuse(words[0], f"{name.text} takes a literal")
        if name.text != "fallback" or len(words) != 2 or instruction.named:
            return None
        first, second = map(self.value, words)
        if not isinstance(first, Value) or not isinstance(second, Value):
            return None
        weights, default = first.value, second.value
        if not isinstance(weights, BlockWeights):
            return first
        if isinstance(default, (BlockWeights, int, float)) and not isinstance(default, bool):
            return Value(weights | default)
        raise self.refuse(words[1], "block weights are completed by a number")

    def bound(
        self, method: OldMethod, instruction: Instruction, words: Sequence[Word]
    ) -> tuple[list[tuple[Word, Result]], dict[str, tuple[Word, Result]]]:
        """The operands in order, and the values by the names of that time."""
        operands: list[tuple[Word, Result]] = []
        values: dict[str, tuple[Word, Result]] = {}
        takes_three = method.name == "add_difference" and self.era is not VERSION
        for place, word in enumerate(words):
            found = word, self.value(word)
            at = method.at(place)
            if at in method.operands or (takes_three and place == method.fixed):
                operands.append(found)
            elif at is not None and self.era is VERSION:
                values[at] = found
            else:
                raise self.refuse(word, f"{method.name} takes {len(method.operands)} models, but got more")
        named: dict[str, tuple[Word, Result]] = {}
        for word in instruction.named:
            name = str(word.name)
            if name in named or name in values:
                raise self.refuse(word, f"{name!r} is given twice")
            if name in method.operands[len(operands) : method.fixed]:
                named[name] = word, self.value(word)
            elif name in method.values:
                values[name] = word, self.value(word)
            elif name not in method.dropped:
                known = (*method.operands, *method.values)
                raise self.refuse(word, f"{method.name} had no argument {name!r}", nearest_hint(name, known))
        operands += [named[name] for name in method.operands if name in named]
        return operands, values

    def made(
        self,
        method: OldMethod,
        instruction: Instruction,
        operands: Sequence[tuple[Word, Result]],
        values: Mapping[str, tuple[Word, Result]],
    ) -> Node:
        args = tuple(self.operand(method, word, found) for word, found in operands)
        if len(args) < method.fixed:
            missing = ", ".join(method.operands[len(args) : method.fixed])
            message = f"{method.name} needs {method.fixed} models, but {missing} is missing"
            raise self.refuse(instruction.words[0], message)
        kwargs: list[tuple[str, Node]] = []
        spans = []
        given = {name: self.number(word, found) for name, (word, found) in values.items()}
        for name in method.values:
            value = given.get(name, Value(method.assumed[name]) if name in method.assumed else None)
            if value is None or name in method.dropped or (isinstance(value, Value) and value.value is None):
                continue
            if isinstance(value, Value) and name in method.changed:
                value = Value(method.changed[name](value.value), span=value.span)
            today = method.renamed.get(name, name)
            kwargs.append((today, value))
            if name in values:
                word = values[name][0]
                spans.append((today, self.source.span(self.line, word.column, word.width)))
        span = self.span_of(instruction)
        if method.name == "cast" and not kwargs:
            return args[0]
        if method.name == "add_difference" and len(args) == 3:
            return self.clamped(args, kwargs, span)
        return Call(method.name, args, tuple(kwargs), span=span, spans=tuple(spans))

    def clamped(self, args: Sequence[Node], kwargs: Sequence[tuple[str, Node]], span: Span) -> Call:
        """``add_difference`` of three models, which that time kept between the first two."""
        a, b, c = args
        added = Call("add_difference", (a, Call("subtract", (b, c), span=span)), tuple(kwargs), span=span)
        return Call("clamp", (added, a, b), span=span)

    def operand(self, method: OldMethod, word: Word, found: Result) -> Node:
        if isinstance(found, Value) and isinstance(found.value, str):
            return Model(found.value, span=found.span)
        if isinstance(found, (Named, Value)):
            hint = "give the number of a model"
            raise self.refuse(word, f"{method.name} takes a model here, but this is a value", hint)
        return found

    def number(self, word: Word, found: Result) -> Node:
        """An argument that is no operand; weights that a dict names become today's."""
        if not isinstance(found, Named):
            return found
        if self.era is VERSION:
            raise self.refuse(word, "a dict is no argument by itself", "make it a literal")
        try:
            return Value(self.era.weights(self.numbers(word, found)))
        except WeightNameError as error:
            at = found.words[error.name]
            raise self.source.refuse(error.message, found.line, at.column, len(error.name), error.hint) from None
