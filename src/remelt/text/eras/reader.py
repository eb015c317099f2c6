"""Recipes of older grammars, instruction by instruction, into the same graph as today's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from remelt.core.nearest import nearest_hint
from remelt.errors import RecipeError, RecipeSyntaxError, Span
from remelt.recipe.blocks import KEYS, BlockWeights, Rule, literal_glob
from remelt.recipe.node import SPACES, Call, Model, Node, Parameter, Value, model, parameter
from remelt.recipe.walk import topological
from remelt.text.document import Document, Step
from remelt.text.eras.blocks import BLOCK_CONFIGS, BlockConfig, BlockNumbers
from remelt.text.eras.instructions import Instruction, Word, instructions
from remelt.text.eras.methods import (
    CONFIGS,
    HEADERLESS,
    INSTEAD,
    MISSING,
    OLDEST,
    TURNED,
    VERSION_0_1,
    ArgumentError,
    OldMethod,
    differences,
)
from remelt.text.eras.weights import WeightNameError, first_weights
from remelt.text.eras.words import Era, Named, Result, Words
from remelt.text.source import SourceText
from remelt.text.statements import comments_between

ARCHS = {"sd1": "sd1", "sdxl": "sdxl", "sd3": "sd3", "sd35": "sd3", "flux": "flux"}
_SPACES = {"BASE": "weight", "MODEL": "weight", "DELTA": "delta", "LORA": "delta"}
_BLOCKS = {one.config: one for one in BLOCK_CONFIGS.values()}
_CONVERSIONS = {one.conversion: one for one in BLOCK_CONFIGS.values()}
_CONSTANTS = {"null": None, "true": True, "false": False}
_PYTHON = {"None": None, "True": True, "False": False}

VERSION = Era("version 0.1.0", True, "merge", _CONSTANTS, VERSION_0_1, ("dict", "literal", "model", "merge"))
UNVERSIONED = Era("headerless", False, "merge", _PYTHON, HEADERLESS, ("dict", "model", "parameter", "merge"))
FIRST = Era("oldest", False, "call", _PYTHON, OLDEST, ("dict", "model", "lora", "parameter", "call"), first_weights)


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
        comments: tuple[str, ...] = ()
        for last in instructions(self.source, first_line, escapes=self.era.escapes):
            self.line = last.line
            command = last.command
            if command.text not in self.era.commands:
                known = ", ".join(self.era.commands)
                hint = nearest_hint(command.text, self.era.commands) or f"one of {known}"
                raise self.refuse(command, f"{command.text[:40]!r} is no instruction of this grammar", hint)
            result = commands[command.text](last)
            self.results.append(result)
            comments += last.comments
            if comments and isinstance(result, Node) and not isinstance(result, Value):
                name = f"step_{len(self.results) - 1}"
                steps.append(Step(name, last.line, result, result, comments, used=True))
                comments = ()
        if last is None:
            raise self.source.refuse("the recipe says nothing", first_line, hint="its last line is the result")
        root = self.results[-1]
        if not isinstance(root, Node) or isinstance(root, Value):
            raise self.refuse(last.command, "the last line is a recipe's result, but this is no model", "add a merge")
        return Document(
            self.with_copied(root),
            tuple(steps),
            heading=tuple(heading),
            trailing=comments_between(self.source, last.line + 1, len(self.source.lines) + 1),
            grammar=self.era.title,
        )

    def with_copied(self, root: Node) -> Node:
        """The result, with the VAE of the first model: in the headerless era it was never merged.

        A difference has no such model. A parameter may be the first: what fills it has the right VAE, too.
        """
        if self.era is not UNVERSIONED or not isinstance(root, Call):
            return root
        order = topological(root)
        if differences(order)[id(root)] or not (self.archs or any(isinstance(node, Parameter) for node in order)):
            return root
        first: Node = root
        while isinstance(first, Call):
            first = first.args[0]
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

    def literal(self, instruction: Instruction) -> Value | BlockNumbers:
        self.only(instruction, 1, ("model_config", "merge_space"))
        if not instruction.words:
            raise self.refuse(instruction.command, "a literal holds a value or the number of a dict")
        (word,) = instruction.words
        config = self.text(instruction, 1, ("model_config",), "a model config")
        found = self.value(word)
        if isinstance(found, (Value, BlockNumbers)):
            return found
        if not isinstance(found, Named):
            raise self.refuse(word, "a literal holds a value or the number of a dict")
        if config == "singleton-mecha" and list(found.items) == ["key"]:
            return Value(found.items["key"], span=self.source.span(self.line, word.column, word.width))
        numbers = self.numbers(word, found)
        if config in _BLOCKS:
            return self.by_block(_BLOCKS[config], found, numbers)
        escaped = {literal_glob(key): number for key, number in numbers.items()}
        return Value(BlockWeights((Rule(KEYS, named=tuple(escaped.items())),)))

    def by_block(self, config: BlockConfig, found: Named, numbers: Mapping[str, float]) -> BlockNumbers:
        """Numbers by block, whose names the config has."""
        for name in numbers:
            if name not in config.blocks:
                at = found.words[name]
                hint = nearest_hint(name, config.blocks) or f"it has BASE, {config.unet[0]} to {config.blocks[-1]}"
                message = f"{name[:40]!r} is no block of {config.config}"
                raise self.source.refuse(message, found.line, at.column, len(name), hint)
        return BlockNumbers(config, numbers)

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
            names = ("model_config", "config"), ("merge_space",)
            self.only(instruction, 3, (*names[0], *names[1]))
            config = self.text(instruction, 1, names[0], "a model config")
            if config is not None and config.endswith("_lora"):
                return self.reference_to(instruction, "delta", None)
            space = self.text(instruction, 2, names[1], "a merge space") or "weight"
            if space not in SPACES:
                hint = nearest_hint(space, SPACES) or f"one of {', '.join(SPACES)}"
                raise self.refuse(self.word(instruction, 2, names[1]), f"{space!r} is no merge space", hint)
            return self.reference_to(instruction, space, CONFIGS.get(config) if config is not None else None)
        self.only(instruction, 3, ("model_arch", "model_type"))
        old_arch = self.text(instruction, 1, ("model_arch",), "an arch")
        kind = self.text(instruction, 2, ("model_type",), "a model type")
        if kind not in (None, "base", "lora"):
            word = self.word(instruction, 2, ("model_type",))
            raise self.refuse(word, f"this model is of type {kind!r}", "base or lora")
        arch = self.arch(instruction, 1, old_arch)
        return self.reference_to(instruction, "delta" if kind == "lora" else "weight", None if kind == "lora" else arch)

    def lora(self, instruction: Instruction) -> Model:
        """An adapter, which is a difference."""
        self.only(instruction, 2, ("model_arch",))
        self.arch(instruction, 1, self.text(instruction, 1, ("model_arch",), "an arch"))
        return self.reference_to(instruction, "delta", None)

    def arch(self, instruction: Instruction, place: int, name: str | None) -> str | None:
        """Today's name of an arch."""
        if name is None:
            return None
        if name not in ARCHS:
            hint = nearest_hint(name, ARCHS) or f"one of {', '.join(ARCHS)}"
            word = self.word(instruction, place, ("model_arch",))
            raise self.refuse(word, f"{name!r} is no arch of sd-mecha 0", hint)
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
            word = self.word(instruction, 1, ("merge_space",))
            raise self.refuse(word, f"{space!r} is no merge space of this grammar", "BASE or DELTA")
        arch = self.arch(instruction, 2, self.text(instruction, 2, ("model_arch",), "an arch"))
        try:
            found = parameter(name, space=_SPACES[space], arch=arch)
        except RecipeError as error:
            raise self.refuse(instruction.words[0], error.message, error.hint) from None
        return Parameter(found.name, found.space, found.arch, span=self.span_of(instruction))

    # ---- calls ----

    def call(self, instruction: Instruction) -> Result:
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
        return self.made(method, instruction, *self.bound(method, instruction, words))

    def method(self, name: Word, instruction: Instruction) -> OldMethod:
        if name.text == "rotate" and any(word.name == "beta" for word in instruction.named):
            return TURNED
        found = self.era.methods.get(name.text)
        if found is not None:
            return found
        if name.text.startswith(("convert_", "extract_")):
            hint = "leave this step out: layouts of keys meet by themselves, and adapters are differences"
            raise self.refuse(name, f"{name.text[:80]!r} converts a model, which remelt does where it is read", hint)
        if name.text in MISSING:
            raise self.refuse(name, f"{name.text} of sd-mecha is not in remelt yet", MISSING[name.text])
        instead = f"write it in version 1: {INSTEAD[name.text]}" if name.text in INSTEAD else None
        message = f"{name.text[:80]!r} is no method of {self.era.title} recipes"
        raise self.refuse(name, message, instead or nearest_hint(name.text, self.era.methods))

    def without_method(self, name: Word, words: Sequence[Word], instruction: Instruction) -> Result | None:
        """What stands for plain values: they were wrapped to be arguments, and combined as models are."""
        if name.text == "convert_singleton" or name.text in _CONVERSIONS:
            if len(words) != 1 or instruction.named:
                raise self.refuse(name, f"{name.text} takes one value")
            found = self.value(words[0])
            if isinstance(found, (Value, BlockNumbers)):
                return found
            if name.text in _CONVERSIONS and isinstance(found, Named):
                return self.by_block(_CONVERSIONS[name.text], found, self.numbers(words[0], found))
            raise self.refuse(words[0], f"{name.text} takes a literal")
        if name.text != "fallback" or len(words) != 2 or instruction.named:
            return None
        first, second = map(self.value, words)
        if isinstance(first, BlockNumbers):
            if isinstance(second, BlockNumbers) and first.config is second.config:
                return BlockNumbers(first.config, {**second.numbers, **first.numbers})
            if isinstance(second, Value) and _is_number(second.value):
                return Value(first.weights(float(second.value)))  # type: ignore[arg-type]
            raise self.refuse(words[1], "block weights are completed by a number")
        if not isinstance(first, Value) or not isinstance(second, Value):
            return None
        weights, default = first.value, second.value
        if not isinstance(weights, BlockWeights):
            return first
        if isinstance(default, BlockWeights) or _is_number(default):
            return Value(weights | default)  # type: ignore[operator]
        raise self.refuse(words[1], "block weights are completed by a number")

    def bound(
        self, method: OldMethod, instruction: Instruction, words: Sequence[Word]
    ) -> tuple[list[Word], dict[str, Word]]:
        """The words of the operands in order, and those of the values by the names of that time."""
        try:
            return method.bind(words, [(str(word.name), word) for word in instruction.named])
        except ArgumentError as error:
            at = instruction.words[0] if error.place < 0 else [*words, *instruction.named][error.place]
            raise self.refuse(at, error.message, error.hint) from None

    def made(
        self, method: OldMethod, instruction: Instruction, operands: Sequence[Word], values: Mapping[str, Word]
    ) -> Node:
        args = tuple(self.operand(method, word) for word in operands)
        given = {name: self.number(word) for name, word in values.items()}
        span = self.span_of(instruction)
        spans = {name: self.source.span(self.line, word.column, word.width) for name, word in values.items()}
        try:
            call = method.call(args, given, span, **spans)
        except RecipeError as error:
            raise self.refuse(instruction.words[0], error.message, error.hint) from None
        if call.method == "cast" and not call.kwargs:
            return args[0]
        if call.method == "add_difference" and len(args) == 3:
            return self.clamped(args, call.kwargs, span)
        return call

    def clamped(self, args: Sequence[Node], kwargs: Sequence[tuple[str, Node]], span: Span) -> Call:
        """``add_difference`` of three models, which that time kept between the first two."""
        a, b, c = args
        added = Call("add_difference", (a, Call("subtract", (b, c), span=span)), tuple(kwargs), span=span)
        return Call("clamp", (added, a, b), span=span)

    def operand(self, method: OldMethod, word: Word) -> Node:
        found = self.value(word)
        if isinstance(found, Value) and isinstance(found.value, str):
            return Model(found.value, span=found.span)
        if isinstance(found, (Named, Value, BlockNumbers)):
            hint = "give the number of a model"
            raise self.refuse(word, f"{method.name} takes a model here, but this is a value", hint)
        return found

    def number(self, word: Word) -> Node:
        """An argument that is no operand; weights that a dict names become today's."""
        found = self.value(word)
        try:
            if isinstance(found, BlockNumbers):
                return Value(found.weights())
            if not isinstance(found, Named):
                return found
            if self.era is VERSION:
                raise self.refuse(word, "a dict is no argument by itself", "make it a literal")
            return Value(self.era.weights(self.numbers(word, found)))
        except WeightNameError as error:
            at = found.words[error.name]  # type: ignore[union-attr]
            raise self.source.refuse(error.message, found.line, at.column, len(error.name), error.hint) from None  # type: ignore[union-attr]
        except RecipeSyntaxError:
            raise
        except RecipeError as error:
            raise self.refuse(word, error.message, error.hint) from None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
