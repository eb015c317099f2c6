"""Version 0.1.0, for recipes that say no more than it can: an instruction a line, which sd-mecha 1 runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from remelt.core.dtype import DType
from remelt.errors import RecipeError
from remelt.recipe.blocks import BLOCKS, PRESET, BlockWeights, Search, plain_weights
from remelt.recipe.node import Call, Model, Node, Parameter, Value
from remelt.recipe.walk import topological
from remelt.text.eras.methods import BLOCK_CONFIGS, CONFIGS, VERSION_0_1, OldMethod
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
_DELTAS = frozenset(
    {"subtract", "ties_sum", "ties_sum_extended", "ties_sum_with_dropout", "dropout", "model_stock", "geometric_sum"}
)
"""Methods whose result is a difference."""


def write_version_0_1(root: Node) -> str:
    """The recipe in version 0.1.0; `RecipeError` with the node and the reason where that grammar cannot say it.

    >>> from remelt.recipe.node import model
    >>> print(write_version_0_1(model("a") - model("b")), end="")
    version 0.1.0
    model "a" model_config=null merge_space="weight"
    model "b" model_config=null merge_space="weight"
    merge "subtract" &0 &1
    """
    return _Writer(topological(root)).write()


class _Writer:
    def __init__(self, order: Sequence[Node]) -> None:
        self.order = order
        self.lines: list[str] = []
        self.known: dict[str, int] = {}
        self.words: dict[int, str] = {}
        self.is_delta: dict[int, bool] = {}
        self.kept: list[Node] = []
        """Values that no recipe has, whose identities may not be given to others."""
        self.archs = {node.arch for node in order if isinstance(node, Model) and node.arch is not None}

    def write(self) -> str:
        for node in self.order:
            self.is_delta[id(node)] = self.gives_delta(node)
            self.words[id(node)] = self.word(node)
        root = self.order[-1]
        if not isinstance(root, (Model, Call)):
            raise RecipeError(f"the result is {root!r}, which version 0.1.0 cannot say", span=root.span)
        number = int(self.words[id(root)][1:])
        if number != len(self.lines) - 1:  # the last line is the result
            self.lines.append(self.lines[number])
        return "\n".join(["version 0.1.0", *self.lines]) + "\n"

    def gives_delta(self, node: Node) -> bool:
        """Whether a node is a difference of models: some methods take no other, and `+` means another one of them."""
        if isinstance(node, (Model, Parameter)):
            return node.space == "delta"
        if not isinstance(node, Call) or not node.args:
            return False
        if node.method in _DELTAS:
            first, *others = node.args
            if node.method == "subtract" and others and self.is_delta[id(others[0])]:
                return self.is_delta[id(first)]
            return True
        return self.is_delta[id(node.args[0])]

    def word(self, node: Node) -> str:
        """What stands for a node where it is used: a value, or the number of its instruction."""
        if isinstance(node, Model):
            return self.model(node)
        if isinstance(node, Value):
            return self.value(node)
        if isinstance(node, Call):
            return self.call(node)
        why = "it has no holes for models: fill them with compose"
        raise self.refuse(node, "a parameter", why)

    def refuse(self, node: Node, what: str, why: str) -> RecipeError:
        return RecipeError(f"version 0.1.0 cannot say {what} ({node!r}): {why}", span=node.span)

    def add(self, line: str) -> str:
        """The number of an instruction, which is written once."""
        number = self.known.get(line)
        if number is None:
            number = self.known[line] = len(self.lines)
            self.lines.append(line)
        return f"&{number}"

    def model(self, node: Model) -> str:
        if node.tensors is not None:
            raise self.refuse(node, "tensors in memory", "save them to a file, and name that")
        if node.sha256 is not None:
            raise self.refuse(node, "a lock", "it knows models by their paths alone; leave sha256 away")
        if node.arch is not None and node.arch not in _CONFIG_OF:
            raise self.refuse(node, f"the arch {node.arch!r}", f"it has {', '.join(_CONFIG_OF)}")
        config = "null" if node.arch is None else _quoted(_CONFIG_OF[node.arch])
        return self.add(f"model {self.text(node, node.name)} model_config={config} merge_space={_quoted(node.space)}")

    def text(self, node: Node, text: str) -> str:
        if NOT_TEXT.search(text) or "\n" in text or "\r" in text:
            raise self.refuse(node, "this text", "its texts have no control characters")
        return _quoted(text)

    def value(self, node: Value) -> str:
        value = node.value
        if isinstance(value, Search) or (isinstance(value, BlockWeights) and any(value.searches())):
            raise self.refuse(node, "search(...)", "it has no open numbers: a study fills them")
        if isinstance(value, BlockWeights):
            return self.weights(node, value)
        if isinstance(value, str):
            return self.text(node, value)
        if isinstance(value, tuple):
            raise self.refuse(node, "a list", "its arguments are numbers, texts and models")
        if value is None or isinstance(value, bool):
            return {None: "null", True: "true", False: "false"}[value]
        return repr(value)

    def weights(self, node: Value, weights: BlockWeights) -> str:
        """Block weights as a literal by the names of U-Net blocks, completed by the plain number."""
        if len(self.archs) != 1 or (arch := next(iter(self.archs))) not in BLOCK_CONFIGS:
            raise self.refuse(
                node, "block weights", 'it knows the blocks of one arch: state it, as in model("a", arch="sd1")'
            )
        told = BLOCK_CONFIGS[arch]
        depth = told.depth
        known = [
            *("BASE", *(f"IN{i:02d}" for i in range(depth)), "M00", *(f"OUT{i:02d}" for i in range(depth))),
            *(["VAE"] if arch == "sdxl" else []),
        ]
        named: dict[str, float] = {}
        for rule in weights.rules:
            if rule.kind == PRESET and len(rule.listed) in (2 * depth + 1, 2 * depth + 2):
                names = known[1 : 2 * depth + 2] if len(rule.listed) == 2 * depth + 1 else known[: 2 * depth + 2]
                pairs = tuple(zip(names, rule.listed, strict=True))
            elif rule.kind == BLOCKS:
                pairs = tuple((self.block(node, name, known), weight) for name, weight in plain_weights(rule))
            else:
                raise self.refuse(node, f"{rule.kind}(...)", "its weights are by U-Net block, IN00 to OUT11")
            for name, weight in pairs:
                assert not isinstance(weight, Search)
                named.setdefault(name, weight)
        default = weights.default
        if default is None:
            missing = [name for name in known if name not in named]
            if missing:
                why = "nothing stands for the other blocks there: complete them, as in ... | 0.5"
                raise self.refuse(node, "weights of some blocks", why)
        literal = self.add("dict " + " ".join(f"{name}={weight!r}" for name, weight in named.items()))
        literal = self.add(f"literal {literal} model_config={_quoted(told.config)} merge_space=null")
        converted = self.add(f"merge {_quoted(told.conversion)} {literal}")
        return converted if default is None else self.add(f'merge "fallback" {converted} {default!r}')

    def block(self, node: Value, name: str, known: Sequence[str]) -> str:
        """A block's name in capitals with two digits; that of ``in3`` is ``IN03``."""
        letters = name.rstrip("0123456789")
        digits = name[len(letters) :]
        wanted = "M00" if name.lower() in ("mid", "m00") else letters.upper() + (f"{int(digits):02d}" if digits else "")
        if wanted not in known:
            raise self.refuse(node, f"the block {name!r}", f"it has {known[0]}, {known[1]} to {known[-1]}")
        return wanted

    def call(self, node: Call) -> str:
        if node.method in ("add", "subtract", "scale"):
            node = self.arithmetic(node)
        method = VERSION_0_1.get(node.method)
        if method is None:
            why = f"it has {', '.join(sorted(VERSION_0_1))}"
            raise self.refuse(node, f"the method {node.method!r}", why)
        operands, values = self.arguments(node, method)
        for name, child in operands:
            if isinstance(child, Value) and not isinstance(child.value, str):
                raise self.refuse(node, f"a number as {name!r}", "it takes models there")
        parts = [f"merge {_quoted(node.method)}"]
        for _, child in operands:
            named = isinstance(child, Value) and isinstance(child.value, str)
            parts.append(self.model(Model(str(child.value))) if named else self.words[id(child)])  # type: ignore[attr-defined]
        parts += [f"{name}={self.argument(name, child)}" for name, child in values]
        return self.add(" ".join(parts))

    def argument(self, name: str, child: Node) -> str:
        """What stands for an argument; element types have torch's names there."""
        if name == "dtype" and isinstance(child, Value) and isinstance(child.value, str):
            kind = DType.parse(child.value)
            if kind not in _TYPES:
                raise self.refuse(child, f"the element type {child.value!r}", f"it has {', '.join(_TYPES.values())}")
            return _quoted(_TYPES[kind])
        return self.words[id(child)]

    def arguments(self, node: Call, method: OldMethod) -> tuple[list[tuple[str, Node]], list[tuple[str, Node]]]:
        """Operands and values by the names of version 0.1.0, in its order."""
        operands: list[tuple[str, Node]] = []
        values: dict[str, Node] = {}
        today = replace(method, values=tuple(name for name in method.values if name not in method.dropped))
        for place, child in enumerate(node.args):
            at = today.at(place)
            if at is None:
                raise self.refuse(node, f"{len(node.args)} arguments", f"its {node.method} takes {method.fixed}")
            if at in method.operands:
                operands.append((at, child))
            else:
                values[at] = child
        for given, child in node.kwargs:
            name = "default" if (node.method, given) == ("fallback", "b") else given
            if name in method.operands:
                operands.append((name, child))
            elif name in method.values:
                values[name] = child
            else:
                raise self.refuse(node, f"{name!r}", f"its {node.method} has {', '.join(method.values) or 'none such'}")
        return operands, [(name, values[name]) for name in method.values if name in values]

    def arithmetic(self, node: Call) -> Call:
        """Sums and differences as the methods that version 0.1.0 has for them."""
        if node.method == "scale":
            if not self.is_delta[id(node.args[0])]:
                raise self.refuse(node, "a scaled model", "it scales differences of models only")
            return node
        if len(node.args) != 2 or node.kwargs:
            return node
        first, second = node.args
        if any(isinstance(one, Value) for one in node.args):
            raise self.refuse(node, "a number plus a model", "it adds differences to models only")
        if node.method == "add":
            if not self.is_delta[id(second)] and self.is_delta[id(first)]:
                first, second = second, first
            if not self.is_delta[id(second)]:
                raise self.refuse(node, "a sum of models", "it adds differences to models only: use weighted_sum")
            return Call("add_difference", (first, second), (("alpha", self.number(1.0)),), span=node.span)
        if not self.is_delta[id(second)]:
            if self.is_delta[id(first)]:
                raise self.refuse(node, "a difference less a model", "it subtracts models from models only")
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
