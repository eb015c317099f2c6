"""From text to graph: each statement parsed by Python's own grammar, never evaluated, and turned into nodes."""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from remelt.core.nearest import nearest_hint
from remelt.errors import RecipeError, RecipeSyntaxError, Span
from remelt.recipe.blocks import MAKERS, BlockWeights, Search, search
from remelt.recipe.node import Call, Literal, Model, Node, Value, literal, model, multiply, parameter
from remelt.text.statements import MOST_CHARACTERS, SourceText, Statement, split_statements, version_of

Item = Node | Literal | dict[Any, Any]
CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    **MAKERS,
    "search": search,
    "model": model,
    "parameter": parameter,
}
_OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.BitOr: "|"}
_REFUSED = {
    "Attribute": "a dot after a name",
    "Subscript": "an index in square brackets",
    "Compare": "a comparison",
    "BoolOp": "and/or",
    "Lambda": "a function",
    "IfExp": "a condition",
    "ListComp": "a comprehension",
    "SetComp": "a comprehension",
    "DictComp": "a comprehension",
    "GeneratorExp": "a comprehension",
    "JoinedStr": "a formatted text",
    "Starred": "a star before an argument",
    "NamedExpr": "an assignment inside an expression",
    "Set": "a set in braces",
    "Import": "an import",
    "ImportFrom": "an import",
    "FunctionDef": "a definition",
    "ClassDef": "a definition",
    "For": "a loop",
    "While": "a loop",
    "If": "a condition",
    "AugAssign": "an assignment by operator",
    "AnnAssign": "an annotation",
    "Delete": "a deletion",
    "Await": "await",
    "Yield": "yield",
}


def read_recipe(text: str, source: str = "recipe") -> Node:
    """The recipe that a text says.

    Raises `RecipeSyntaxError` with line, column and remedy; no text makes it crash, hang or run anything.

    >>> read_recipe('version 1\\nweighted_sum("a", "b", alpha=0.3)')
    <call weighted_sum(2 arguments, alpha)>
    """
    if len(text) > MOST_CHARACTERS:
        raise RecipeSyntaxError(
            f"{source}: a recipe has at most {MOST_CHARACTERS} characters, but this has {len(text)}"
        )
    lines = SourceText(text, source)
    if "\0" in lines.text:
        line = lines.text[: lines.text.index("\0")].count("\n") + 1
        raise lines.refuse("a recipe is text, but this has a NUL byte", line)
    version, line = version_of(lines)
    if version == "1":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of odd escapes in texts; they are taken as they are
            return _Reader(lines).read(line + 1)
    if version is not None:
        hint = "this reader knows version 1" + ("; version 0.1.0 is sd-mecha's grammar" if version == "0.1.0" else "")
        raise lines.refuse(f"version {version} of the recipe text is not known", line, hint=hint)
    first = lines.lines[line - 1].split(" ")[0]
    if first in ("model", "merge", "call", "dict", "lora", "parameter", "literal"):
        raise lines.refuse("this is a recipe of an older grammar without a version line, which is not known", line)
    raise lines.refuse("a recipe's first line states its version", line, hint="begin with the line: version 1")


def parse_value(text: str) -> Literal:
    """A value as people type it on a command line: a number, true or false, block weights, a search; else a text.

    >>> parse_value("0.3"), parse_value("true"), parse_value("fp16"), parse_value("blocks(IN00=0.2) | 0.33")
    (0.3, True, 'fp16', blocks(IN00=0.2) | 0.33)
    """
    stripped = text.strip()
    if stripped.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[stripped.lower()]
    for number in (int, float):
        try:
            return literal(number(stripped))
        except ValueError:
            continue
    if stripped.split("(")[0].strip() not in (*MAKERS, "search"):
        return text
    lines = SourceText(stripped, "value")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _Reader(lines).value()


class _Reader:
    def __init__(self, source: SourceText) -> None:
        self.source = source
        self.names: dict[str, tuple[Item, int]] = {}
        self.line = self.line_of_last = 1

    def read(self, first_line: int) -> Node:
        result: Item = None
        last: ast.stmt | None = None
        unused: ast.stmt | None = None
        for statement in split_statements(self.source, first_line):
            parsed = self.parse(statement)
            if isinstance(last, ast.Expr):
                unused = unused or last
                raise self.error(
                    "this result is never used: only the last line stands without a name", unused, self.line_of_last
                )
            if isinstance(parsed, ast.Assign):
                self.assign(parsed)
            elif isinstance(parsed, ast.Expr):
                result = self.convert(parsed.value)
            else:
                raise self.refused(parsed)
            last, self.line_of_last = parsed, self.line
        if last is None:
            raise self.source.refuse("the recipe is empty", len(self.source.lines), hint="its last line is the result")
        if not isinstance(last, ast.Expr):
            name = (
                last.targets[0].id if isinstance(last, ast.Assign) and isinstance(last.targets[0], ast.Name) else "it"
            )
            raise self.error("a recipe's last line is its result", last, self.line, hint=f"add the line: {name}")
        return self.node(result, last.value, model_text=True)

    def value(self) -> Literal:
        """A single expression that is no node."""
        (statement, *more) = split_statements(self.source, 1)
        parsed = self.parse(statement)
        if more or not isinstance(parsed, ast.Expr):
            raise self.source.refuse("a value is one expression", 1)
        found = self.convert(parsed.value)
        if isinstance(found, (Node, dict)):
            raise self.source.refuse("a value is a number, a text or block weights", 1)
        return found

    def parse(self, statement: Statement) -> ast.stmt:
        self.line = statement.line
        try:
            body = ast.parse(statement.text).body
        except SyntaxError as error:
            line, column = statement.line + (error.lineno or 1) - 1, error.offset or 1
            text = error.msg.removeprefix("invalid syntax. ").lower() if error.msg else "invalid syntax"
            if text == "invalid syntax":
                text = "this is not understood"
            elif text.startswith("exceeds the limit"):
                text = "a whole number has at most 63 bits"
            raise self.source.refuse(text, line, max(column, 1)) from None
        except (RecursionError, MemoryError, ValueError):
            raise self.source.refuse("this nests too deep", statement.line) from None
        if len(body) != 1:
            raise self.source.refuse("one statement a line: a semicolon is not understood", statement.line)
        return body[0]

    def assign(self, statement: ast.Assign) -> None:
        target = statement.targets[0]
        if len(statement.targets) != 1 or not isinstance(target, ast.Name):
            raise self.error("one name stands before '='", target)
        if target.id in self.names:
            first = self.names[target.id][1]
            raise self.error(
                f"{target.id!r} is already defined at line {first}", target, hint="give this step another name"
            )
        self.names[target.id] = (self.convert(statement.value), self.line)

    def convert(self, expression: ast.expr) -> Item:
        """The item that an expression says. Chains of operators are followed in a loop; only brackets nest."""
        pending: list[ast.BinOp] = []
        while isinstance(expression, ast.BinOp):
            pending.append(expression)
            expression = expression.left
        item = self.operand(expression)
        left: ast.expr = expression
        for operation in reversed(pending):
            item = self.operation(operation, item, left)
            left = operation
        return item

    def operand(self, expression: ast.expr) -> Item:
        negative = False
        outer = expression
        while isinstance(expression, ast.UnaryOp) and isinstance(expression.op, (ast.USub, ast.UAdd)):
            negative ^= isinstance(expression.op, ast.USub)
            expression = expression.operand
        item = self.convert(expression) if isinstance(expression, ast.BinOp) else self.atom(expression)
        if outer is expression or not negative:
            return item
        if _is_number(item):
            return -item  # type: ignore[operator]
        return replace(multiply(self.node(item, expression, model_text=True), Value(-1.0)), span=self.span(outer))

    def atom(self, expression: ast.expr) -> Item:
        if isinstance(expression, ast.Constant):
            return self.constant(expression)
        if isinstance(expression, ast.Name):
            if expression.id not in self.names:
                lowered = {"true": "True", "false": "False", "none": "None", "null": "None"}.get(expression.id)
                hint = f"write {lowered}" if lowered else nearest_hint(expression.id, self.names)
                raise self.error(f"no step is named {expression.id!r}", expression, hint=hint)
            return self.names[expression.id][0]
        if isinstance(expression, ast.Call):
            return self.call(expression)
        if isinstance(expression, (ast.List, ast.Tuple)):
            return tuple(self.literal(self.convert(item), item) for item in expression.elts)
        if isinstance(expression, ast.Dict):
            return self.mapping(expression)
        raise self.refused(expression)

    def constant(self, expression: ast.Constant) -> Literal:
        value = expression.value
        if isinstance(value, (bytes, complex)) or value is ...:
            raise self.error("numbers, texts, True, False and None are understood", expression)
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
            raise self.error("a whole number has at most 63 bits", expression)
        return self.literal(value, expression)

    def mapping(self, expression: ast.Dict) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key, value in zip(expression.keys, expression.values, strict=True):
            if key is None:
                raise self.error("two stars are not understood", expression)
            name = self.literal(self.convert(key), key)
            if name in found:
                raise self.error(f"{name!r} is given twice", key)
            found[name] = self.literal(self.convert(value), value)
        return found

    def literal(self, item: Item, expression: ast.expr) -> Literal:
        if isinstance(item, (Node, dict)):
            raise self.error("a list or mapping holds numbers and texts, not models", expression)
        try:
            return literal(item)
        except RecipeError as error:
            raise self.error(error.message, expression, hint=error.hint) from None

    def operation(self, operation: ast.BinOp, left: Item, left_at: ast.expr) -> Item:
        sign = _OPERATORS.get(type(operation.op))
        if sign is None:
            raise self.error("only the operators + - * | are understood", operation)
        right = self.operand(operation.right)
        if sign == "|" and isinstance(left, BlockWeights) and not isinstance(right, Node):
            if isinstance(right, bool) or not isinstance(right, (BlockWeights, Search, int, float)):
                raise self.error("block weights combine with block weights and numbers", operation.right)
            return left | right
        if sign != "|" and _is_number(left) and _is_number(right):
            return self.folded(sign, left, right, operation)
        a, b = self.node(left, left_at, model_text=True), self.node(right, operation.right, model_text=True)
        span = self.span(operation)
        if sign == "*":
            return replace(multiply(a, b), span=span)
        return Call({"+": "add", "-": "subtract", "|": "fallback"}[sign], (a, b), span=span)

    def folded(self, sign: str, left: Any, right: Any, operation: ast.BinOp) -> Literal:
        result = left + right if sign == "+" else left - right if sign == "-" else left * right
        if (isinstance(result, int) and abs(result) >= 2**63) or (
            isinstance(result, float) and not math.isfinite(result)
        ):
            raise self.error("this number is too large", operation)
        return result  # type: ignore[no-any-return]

    def call(self, expression: ast.Call) -> Item:
        if not isinstance(expression.func, ast.Name):
            raise self.refused(expression.func)
        name = expression.func.id
        constructor = CONSTRUCTORS.get(name)
        for keyword in expression.keywords:
            if keyword.arg is None:
                raise self.error("two stars before an argument are not understood", keyword.value)
        if len({keyword.arg for keyword in expression.keywords}) < len(expression.keywords):
            raise self.error(f"{name} is given an argument twice", expression)
        given = {keyword.arg: keyword for keyword in expression.keywords}
        if constructor is not None:
            return self.constructed(constructor, name, expression)
        args = tuple(self.node(self.convert(arg), arg) for arg in expression.args)
        kwargs = tuple((str(key), self.node(self.convert(word.value), word.value)) for key, word in given.items())
        spans = tuple((str(key), self.span(word, len(str(key)))) for key, word in given.items())
        return Call(name, args, kwargs, self.span(expression.func), spans)

    def constructed(self, constructor: Callable[..., Any], name: str, expression: ast.Call) -> Item:
        args = [self.plain(self.convert(arg), arg) for arg in expression.args]
        kwargs = {str(word.arg): self.plain(self.convert(word.value), word.value) for word in expression.keywords}
        try:
            made = constructor(*args, **kwargs)
        except RecipeError as error:
            raise self.error(error.message, expression.func, hint=error.hint) from None
        except (TypeError, ValueError, AttributeError):
            raise self.error(f"{name} does not take these arguments", expression.func, hint=_USAGE[name]) from None
        return replace(made, span=self.span(expression)) if isinstance(made, Node) else made  # type: ignore[type-var]

    def plain(self, item: Item, expression: ast.expr) -> Any:
        if isinstance(item, Node):
            raise self.error("a number, a text or a mapping of numbers is due here, not a model", expression)
        return item

    def node(self, item: Item, expression: ast.expr, *, model_text: bool = False) -> Node:
        """An item as a node; a bare text is a model where only a model can be meant."""
        if isinstance(item, Node):
            return item
        if isinstance(item, dict):
            raise self.error("a mapping stands only in blocks, keys, classes and components", expression)
        if model_text and isinstance(item, str):
            return Model(item, span=self.span(expression))
        return Value(item, span=self.span(expression))

    def span(self, at: ast.AST, width: int | None = None) -> Span:
        line = self.line + getattr(at, "lineno", 1) - 1
        column = self.column(line, getattr(at, "col_offset", 0))
        if width is None:
            same_line = getattr(at, "end_lineno", None) == getattr(at, "lineno", 1)
            width = self.column(line, getattr(at, "end_col_offset", 0)) - column if same_line else 1
        return self.source.span(line, column, width)

    def column(self, line: int, offset: int) -> int:
        """The column in characters, from 1, of an offset in UTF-8 bytes."""
        text = self.source.lines[line - 1]
        if text.isascii():
            return offset + 1
        return len(text.encode("utf-8", "surrogatepass")[:offset].decode("utf-8", "ignore")) + 1

    def error(
        self, message: str, at: ast.AST, line: int | None = None, *, hint: str | None = None
    ) -> RecipeSyntaxError:
        before, self.line = self.line, self.line if line is None else line
        span = self.span(at)
        self.line = before
        return RecipeSyntaxError(message, hint=hint, span=span)

    def refused(self, at: ast.AST) -> RecipeSyntaxError:
        what = _REFUSED.get(type(at).__name__, "this")
        return self.error(
            f"{what} is not part of a recipe", at, hint="a recipe is assignments, calls, literals and + - * |"
        )


_USAGE = {
    "model": 'model("name"), optionally with sha256="...", space="delta", arch="sdxl"',
    "parameter": 'parameter("a"), optionally with space="delta", arch="sdxl"',
    "search": "search(low, high)",
    "blocks": 'blocks(IN00=0.2), blocks({"double_blocks.3": 0.2}) or blocks("0.1,0.2,...")',
    "components": "components(unet=0.2)",
    "classes": 'classes(mlp=0.2) or classes({"attn.to_q": 0.2})',
    "keys": 'keys({"*.attn2.*": 0.3})',
    "depth": "depth([0, 0.5, 1])",
}


def _is_number(item: object) -> bool:
    return isinstance(item, (int, float)) and not isinstance(item, bool)
