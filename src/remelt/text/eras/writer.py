"""Version 0.1.0, for recipes that say no more than it can: an instruction a line, which sd-mecha 1 runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from remelt.core.dtype import DType
from remelt.errors import RecipeError
from remelt.recipe.blocks import BlockWeights, Search
from remelt.recipe.node import Call, Model, Node, Value
from remelt.recipe.walk import rewrite, topological
from remelt.text.eras.blocks import BLOCK_CONFIGS, block_numbers
from remelt.text.eras.methods import CONFIGS, VERSION_0_1, OldMethod, differences
from remelt.text.source import NOT_TEXT

_CONFIG_OF = {arch: config for config, arch in CONFIGS.items()}
_TYPES = {
    DType.F64: "float64",
    DType.F32: "float32",
    DType.F16: "float16",
    DType.BF16: "bfloat16",
    DType.I64: "int64",
    DType.I32: "int32",
    DType.I16: "int16",
    DType.I8: "int8",
    DType.BOOL: "bool",
}
_TEXTS = ("component", "dtype")
"""Arguments that are texts."""
_SUM = OldMethod("add", ("a", "b"), False, ())


def _written(name: str, method: OldMethod) -> tuple[str, OldMethod, dict[str, str]]:
    """What today's method is called there, its arguments, and their names there by those of today."""
    names = {today: old for old, today in method.renamed.items()}
    names |= {"fallback": {"b": "default"}, "exchange_ema": {"a": "model"}}.get(name, {})
    values = tuple(one for one in method.values if one not in method.dropped)
    return name, replace(method, values=values, dropped=frozenset()), names


_WRITTEN = {
    "add": ("add", _SUM, {}),
    **{method.name: _written(method.name, method) for method in VERSION_0_1.values() if method.composed is None},
}
"""The methods of today that are one of version 0.1.0."""


def write_version_0_1(root: Node) -> str:
    """The recipe in version 0.1.0; `RecipeError` with the node and the reason where that grammar cannot say it.

    >>> from remelt.recipe.node import model
    >>> print(write_version_0_1(model("a") - model("b")), end="")
    version 0.1.0
    model "a" model_config=null merge_space="weight"
    model "b" model_config=null merge_space="weight"
    merge "subtract" &0 &1
    """
    return _Writer(topological(rewrite(root, _in_order))).write()


def _in_order(node: Node) -> Node:
    """The call with its operands in the order of the signature, each of them a node, and its values by name."""
    if not isinstance(node, Call):
        return node
    if node.method not in _WRITTEN:
        raise _refusal(node, f"the method {node.method!r}", f"it has {', '.join(sorted(set(_WRITTEN) - {'add'}))}")
    _, method, names = _WRITTEN[node.method]
    try:
        operands, values = method.bind(node.args, [(names.get(name, name), child) for name, child in node.kwargs])
    except RecipeError as error:
        raise _refusal(node, f"this {node.method}", error.message) from None
    for name, child in values.items():
        if isinstance(child, Value) and isinstance(child.value, str) and name not in _TEXTS:
            why = f'a mask is a model, as in model({child.value!r}, space="param")'
            raise _refusal(node, f"a text as {name!r}", why)
    models = tuple(
        Model(child.value, span=child.span) if isinstance(child, Value) and isinstance(child.value, str) else child
        for child in operands
    )
    kwargs = tuple((name, values[name]) for name in method.values if name in values)
    return replace(node, args=models, kwargs=kwargs)


def _refusal(node: Node, what: str, why: str, hint: str | None = None) -> RecipeError:
    return RecipeError(f"version 0.1.0 cannot say {what} ({node!r}): {why}", hint=hint, span=node.span)


class _Writer:
    def __init__(self, order: Sequence[Node]) -> None:
        self.order = order
        self.lines: list[str] = []
        self.known: dict[str, int] = {}
        self.words: dict[int, str] = {}
        self.is_delta = differences(order)
        self.kept: list[Node] = []
        """Values that no recipe has, whose identities may not be given to others."""
        self.archs = {node.arch for node in order if isinstance(node, Model) and node.arch is not None}

    def write(self) -> str:
        for node in self.order:
            self.words[id(node)] = self.word(node)
        root = self.order[-1]
        if not isinstance(root, (Model, Call)):
            raise RecipeError(f"the result is {root!r}, which version 0.1.0 cannot say", span=root.span)
        number = int(self.words[id(root)][1:])
        if number != len(self.lines) - 1:  # the last line is the result
            self.lines.append(self.lines[number])
        return "\n".join(["version 0.1.0", *self.lines]) + "\n"

    def word(self, node: Node) -> str:
        """What stands for a node where it is used: a value, or the number of its instruction."""
        if isinstance(node, Model):
            return self.model(node)
        if isinstance(node, Value):
            return self.value(node)
        if isinstance(node, Call):
            return self.call(node)
        why = "it has no holes for models: fill them with compose"
        raise _refusal(node, "a parameter", why)

    def add(self, line: str) -> str:
        """The number of an instruction, which is written once."""
        number = self.known.get(line)
        if number is None:
            number = self.known[line] = len(self.lines)
            self.lines.append(line)
        return f"&{number}"

    def model(self, node: Model) -> str:
        if node.tensors is not None:
            raise _refusal(node, "tensors in memory", "save them to a file, and name that")
        if node.sha256 is not None:
            raise _refusal(node, "a lock", "it knows models by their paths alone; leave sha256 away")
        if node.arch is not None and node.arch not in _CONFIG_OF:
            raise _refusal(node, f"the arch {node.arch!r}", f"it has {', '.join(_CONFIG_OF)}")
        config = "null" if node.arch is None else _quoted(_CONFIG_OF[node.arch])
        return self.add(f"model {self.text(node, node.name)} model_config={config} merge_space={_quoted(node.space)}")

    def text(self, node: Node, text: str) -> str:
        if NOT_TEXT.search(text) or "\n" in text or "\r" in text:
            raise _refusal(node, "this text", "its texts have no control characters")
        return _quoted(text)

    def value(self, node: Value) -> str:
        value = node.value
        if isinstance(value, Search) or (isinstance(value, BlockWeights) and any(value.searches())):
            raise _refusal(node, "search(...)", "it has no open numbers: a study fills them")
        if isinstance(value, BlockWeights):
            return self.weights(node, value)
        if isinstance(value, str):
            return self.text(node, value)
        if isinstance(value, tuple):
            raise _refusal(node, "a list", "its arguments are numbers, texts and models")
        if value is None or isinstance(value, bool):
            return {None: "null", True: "true", False: "false"}[value]
        return repr(value)

    def weights(self, node: Value, weights: BlockWeights) -> str:
        """Block weights as a literal by the names of U-Net blocks, completed by the plain number."""
        if len(self.archs) != 1 or (arch := next(iter(self.archs))) not in BLOCK_CONFIGS:
            why = 'it knows the blocks of one arch: state it, as in model("a", arch="sd1")'
            raise _refusal(node, "block weights", why)
        try:
            numbers, default = block_numbers(weights, arch)
        except RecipeError as error:
            raise _refusal(node, "these block weights", error.message, error.hint) from None
        if not numbers:
            return repr(default)
        told = BLOCK_CONFIGS[arch]
        literal = self.add("dict " + " ".join(f"{name}={weight!r}" for name, weight in numbers.items()))
        literal = self.add(f"literal {literal} model_config={_quoted(told.config)} merge_space=null")
        converted = self.add(f"merge {_quoted(told.conversion)} {literal}")
        return converted if default is None else self.add(f'merge "fallback" {converted} {default!r}')

    def call(self, node: Call) -> str:
        if node.method in ("add", "subtract", "scale"):
            node = self.arithmetic(node)
        name, method, _ = _WRITTEN[node.method]
        for place, child in enumerate(node.args):
            if isinstance(child, Value):
                raise _refusal(node, f"a number as {method.at(place)!r}", "it takes models there")
        parts = [f"merge {_quoted(name)}", *(self.words[id(child)] for child in node.args)]
        parts += [f"{name}={self.argument(name, child)}" for name, child in node.kwargs]
        return self.add(" ".join(parts))

    def argument(self, name: str, child: Node) -> str:
        """What stands for an argument; element types have torch's names there."""
        if name == "dtype" and isinstance(child, Value) and isinstance(child.value, str):
            kind = DType.parse(child.value)
            if kind not in _TYPES:
                raise _refusal(child, f"the element type {child.value!r}", f"it has {', '.join(_TYPES.values())}")
            return _quoted(_TYPES[kind])
        return self.words[id(child)]

    def arithmetic(self, node: Call) -> Call:
        """Sums and differences as the methods that version 0.1.0 has for them."""
        if node.method == "scale":
            if not self.is_delta[id(node.args[0])]:
                raise _refusal(node, "a scaled model", "it scales differences of models only")
            return node
        first, second = node.args
        if any(isinstance(one, Value) for one in node.args):
            raise _refusal(node, "a number plus a model", "it adds differences to models only")
        if node.method == "add":
            if not self.is_delta[id(second)] and self.is_delta[id(first)]:
                first, second = second, first
            if not self.is_delta[id(second)]:
                raise _refusal(node, "a sum of models", "it adds differences to models only: use weighted_sum")
            return Call("add_difference", (first, second), (("alpha", self.number(1.0)),), span=node.span)
        if not self.is_delta[id(second)]:
            if self.is_delta[id(first)]:
                raise _refusal(node, "a difference less a model", "it subtracts models from models only")
            return node
        return Call("add_difference", (first, second), (("alpha", self.number(-1.0)),), span=node.span)

    def number(self, number: float) -> Value:
        value = Value(number)
        self.words[id(value)] = repr(number)
        self.kept.append(value)
        return value


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
