"""From a statement's syntax tree to nodes: what each expression means; the rest of Python is refused in words."""

from __future__ import annotations

import ast
import math
import re
from dataclasses import replace
from typing import Any, NoReturn

from remelt.core.nearest import nearest_hint
from remelt.errors import RecipeError, RecipeSyntaxError, Span
from remelt.recipe.adapter import ADAPTER
from remelt.recipe.blocks import MAKERS, BlockWeights, Search
from remelt.recipe.layers import LAYERS, STACK
from remelt.recipe.mixture import DRAWN, MIXTURE
from remelt.recipe.node import Call, Literal, Model, Node, Value, multiply
from remelt.recipe.permuting import PERMUTE, REBASIN
from remelt.recipe.vocabulary import ALIGN, BASE, UNION
from remelt.text.constructors import CONSTRUCTORS, USAGE, Mapping, construct
from remelt.text.document import Step
from remelt.text.explanation import CALLED, explain
from remelt.text.source import GRAMMAR, MOST_CHARACTERS, MOST_DIGITS, MOST_OPERATORS, SourceText
from remelt.text.statements import Statement
from remelt.text.tokens import WITH_EXPONENT

Item = Node | Literal | Mapping
_SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.BitOr: "|"}
_METHODS = {"+": "add", "-": "subtract", "|": "fallback"}
_LARGEST = 10**MOST_DIGITS
_REFUSED = {
    ast.Subscript: "an index in square brackets",
    ast.Starred: "a star before an argument",
    ast.Set: "a set in braces",
    ast.Tuple: "a list without square brackets",
    ast.AnnAssign: "a colon after a name",
}
_INSTEAD = {
    ast.Subscript: "give each value a name of its own",
    ast.Starred: "write the arguments one after the other",
    ast.Tuple: "a list is [1, 2]; the arguments of a call stand in its brackets",
    ast.Set: 'names with numbers are {"IN00": 0.2}',
}
_ONLY_WITHIN = f"a mapping stands only within {', '.join(MAKERS)}"
_MAPPING = 'as in blocks({"double_blocks.3": 0.2})'
_LARGE = "the largest is 1.7976931348623157e308"
_PARTS = (LAYERS, STACK, ALIGN, ADAPTER, MIXTURE, PERMUTE, REBASIN)
"""Words whose texts are models: they are no methods, that could say so."""
_SPELLINGS = {"true": "True", "false": "False", "none": "None", "null": "None", "nil": "None"}


class Expressions:
    """Takes statements one after the other, and knows what each name means."""

    def __init__(self, source: SourceText) -> None:
        self.source = source
        self.steps: dict[str, Step] = {}
        self.statement = Statement("", 1)
        self.charged = 0
        self.charged_in_all = 0

    def take(self, statement: Statement) -> Node | None:
        """Remember what a statement names, or give the node that it is."""
        parsed = self.parse(statement)
        try:
            if type(parsed) is ast.Assign:
                self.assign(parsed)
                return None
            if type(parsed) is not ast.Expr:
                self.refuse_kind(parsed)
            if type(parsed.value) is ast.Name:
                return self.argument(parsed.value, model_text=True)
            return self.node(self.convert(parsed.value), parsed.value, model_text=True)
        except RecursionError:
            raise self.too_deep() from None

    def value(self, statement: Statement) -> Literal | Model:
        """What a statement is that stands for a value or a model, not for a step of a graph."""
        parsed = self.parse(statement)
        found = self.convert(parsed.value) if isinstance(parsed, ast.Expr) else None
        if isinstance(found, Model):
            return found
        if isinstance(found, (Node, Mapping)) or not isinstance(parsed, ast.Expr):
            hint = 'as in 0.3, blocks(IN00=0.2) or model("mask", space="param")'
            self.fail("a value is a number, a text, a list, block weights or a model", parsed, hint)
        return found

    def parse(self, statement: Statement) -> ast.stmt:
        """A statement's syntax tree; tokens and limits were looked at before."""
        self.statement = statement
        self.charged = 0
        try:
            body = ast.parse(statement.text).body
        except (SyntaxError, ValueError):
            raise explain(self.source, statement.line) from None
        except (RecursionError, MemoryError):
            raise self.too_deep() from None
        if len(body) != 1:
            raise explain(self.source, statement.line)
        return body[0]

    def assign(self, statement: ast.Assign) -> None:
        target = statement.targets[0]
        if len(statement.targets) != 1 or type(target) is not ast.Name:
            self.fail("one name stands before '='", target, "each step stands on a line of its own")
        name = target.id
        if name in CONSTRUCTORS:
            self.fail(f"{name!r} is a word of recipes", target, "give this step another name")
        if name in self.steps:
            line = self.steps[name].line
            self.fail(f"{name!r} is already defined at line {line}", target, "give this step another name")
        item = self.convert(statement.value)
        if isinstance(item, Mapping):
            self.fail(_ONLY_WITHIN, statement.value, _MAPPING)
        node = item if isinstance(item, Node) else None
        size = len(self.statement.text) + self.charged
        self.steps[name] = Step(name, self.statement.line, item, node, self.statement.comments, size)

    def convert(self, expression: ast.expr) -> Item:
        """The item that an expression says. Chains of operators are followed in a loop; brackets nest to a limit."""
        kind = type(expression)
        if kind is ast.Constant:
            return self.constant(expression)  # type: ignore[arg-type]
        if kind is ast.Name:
            return self.named(expression)  # type: ignore[arg-type]
        if kind is ast.Call:
            return self.call(expression)  # type: ignore[arg-type]
        if kind is ast.BinOp:
            return self.chain(expression)  # type: ignore[arg-type]
        if kind is ast.UnaryOp:
            return self.signed(expression)
        if isinstance(expression, ast.List):
            return tuple(self.listed(element) for element in expression.elts)
        if isinstance(expression, ast.Dict):
            return self.mapping(expression)
        return self.refuse_kind(expression)

    def constant(self, expression: ast.Constant) -> Literal:
        value: Any = expression.value
        kind = type(value)
        if kind is float:
            if not math.isfinite(value):
                self.fail("this number is too large", expression, _LARGE)
        elif kind is int:
            if value >= _LARGEST:
                self.fail(f"a whole number has at most {MOST_DIGITS} digits", expression, WITH_EXPONENT)
        elif kind is not str and kind is not bool and value is not None:
            self.refuse_kind(expression)
        return value  # type: ignore[no-any-return]

    def named(self, expression: ast.Name) -> Item:
        """What a name stands for. Texts and block weights are copied by it, so that their size is reckoned."""
        step = self.step(expression)
        item = step.item
        if isinstance(item, (str, tuple, BlockWeights)):
            self.charged += step.size
            self.charged_in_all += step.size
            if self.charged_in_all > MOST_CHARACTERS:
                what = f"with its names written out, the recipe has more than {MOST_CHARACTERS} characters"
                self.fail(what, expression)
        return item

    def step(self, expression: ast.Name) -> Step:
        found = self.steps.get(expression.id)
        if found is None:
            name = expression.id
            spelling = _SPELLINGS.get(name.lower())
            if spelling is not None:
                hint: str | None = f"write {spelling}"
            elif len(self.steps) <= 1000 and (near := nearest_hint(name, self.steps)):
                hint = near
            elif later := self.defined_later(name):
                hint = f"line {later} gives it a meaning: move that line up"
            else:
                hint = f'a model stands in quotes: "{name}"; a step is named on a line before: {name} = ...'
            self.fail(f"no step is named {name!r}", expression, hint)
        found.used = True
        return found

    def defined_later(self, name: str) -> int | None:
        """The line after this statement that gives a name a meaning, for a hint."""
        assigned = re.compile(rf"{name}[ \t]*=(?!=)")
        lines = enumerate(self.source.lines[self.statement.line :], start=self.statement.line + 1)
        return next((number for number, line in lines if assigned.match(line)), None)

    def listed(self, expression: ast.expr) -> Literal:
        item = self.convert(expression)
        if isinstance(item, (Node, Mapping)):
            hint = "give models as arguments without the square brackets"
            self.fail("a list holds numbers, block weights and texts, not models", expression, hint)
        if isinstance(item, tuple) and type(expression) is ast.Name:
            self.fail("a list within a list is written there, not by a name", expression, "as in [[0, 1], [1, 0]]")
        return item

    def mapping(self, expression: ast.Dict) -> Mapping:
        found: dict[str, Any] = {}
        places: dict[str, ast.AST] = {}
        for key, value in zip(expression.keys, expression.values, strict=True):
            if key is None:
                self.fail("two stars are not part of a recipe", expression, _MAPPING)
            name = self.convert(key)
            if not isinstance(name, str):
                self.fail("a mapping's names are texts", key, 'as in {"double_blocks.3": 0.2}')
            if name in found:
                self.fail(f"{name!r} is given twice", key, "keep one of them")
            found[name], places[name] = self.convert(value), value
        return Mapping(found, places)

    def signed(self, expression: ast.expr) -> Item:
        outer, negative = expression, False
        while isinstance(expression, ast.UnaryOp):
            if not isinstance(expression.op, (ast.USub, ast.UAdd)):
                self.refuse_kind(expression)
            negative ^= isinstance(expression.op, ast.USub)
            expression = expression.operand
        item = self.convert(expression)
        if _is_number(item):
            return -item if negative else item  # type: ignore[operator]
        if not isinstance(item, (Node, str)):
            self.fail("a sign stands before numbers and models", outer, "write it before each number")
        node = self.node(item, expression, model_text=True)
        return replace(multiply(node, Value(-1.0)), span=self.span(outer)) if negative else node

    def chain(self, expression: ast.BinOp) -> Item:
        operations = [expression]
        while isinstance(operations[-1].left, ast.BinOp):
            operations.append(operations[-1].left)
        item = self.convert(operations[-1].left)
        for operation in reversed(operations):
            sign = _SIGNS.get(type(operation.op))
            if sign is None:
                self.fail("only the operators + - * | are understood", operation, "write a product, or the number")
            item = self.operation(sign, item, self.convert(operation.right), operation)
        return item

    def operation(self, sign: str, left: Item, right: Item, at: ast.BinOp) -> Item:
        for item, place in ((left, at.left), (right, at.right)):
            if item is None or isinstance(item, (bool, tuple, Mapping)):
                self.fail(f"{sign!r} stands between models, texts, numbers and block weights", place)
        if not isinstance(left, (Node, str)) and not isinstance(right, (Node, str)):
            return self.computed(sign, left, right, at)
        if sign == "|" and isinstance(left, (BlockWeights, Search, int, float)):
            self.fail("what stands before '|' is a model here, not a number", at.left)
        a, b = self.operand(left, at.left), self.operand(right, at.right)
        span = self.span(at)
        if sign == "*":
            return replace(multiply(a, b), span=span)
        return Call(_METHODS[sign], (a, b), span=span)

    def operand(self, item: Item, expression: ast.expr) -> Node:
        """One side of an operator as a node: a name gives its step's own, but a text is a model here alone."""
        if type(expression) is ast.Name and not isinstance(item, str):
            return self.argument(expression)
        return self.node(item, expression, model_text=True)

    def computed(self, sign: str, left: Any, right: Any, at: ast.BinOp) -> Literal:
        """Numbers are computed at once; block weights and numbers combine."""
        if sign == "|":
            if not isinstance(left, BlockWeights):
                hint = "the plain number stands last, as in blocks(IN00=0.2) | 0.33"
                self.fail("what stands before '|' is block weights or a model", at.left, hint)
            combined: BlockWeights = left | right
            if len(combined.rules) > MOST_OPERATORS:
                self.fail(f"at most {MOST_OPERATORS} block weights combine", at)
            return combined
        if not (_is_number(left) and _is_number(right)):
            hint = "block weights combine with '|' alone, as in blocks(IN00=0.2) | 0.33"
            self.fail(f"{sign!r} computes with numbers and models, not with block weights or searches", at, hint)
        result = left + right if sign == "+" else left - right if sign == "-" else left * right
        if abs(result) >= _LARGEST if isinstance(result, int) else not math.isfinite(result):
            self.fail("this number is too large", at, _LARGE)
        return result  # type: ignore[no-any-return]

    def call(self, expression: ast.Call) -> Item:
        function, keywords = expression.func, expression.keywords
        if type(function) is not ast.Name:
            self.fail("only a method's name can be called", function, CALLED)
        given: dict[str, ast.keyword] = {}
        for keyword in keywords:
            if keyword.arg is None:
                self.fail("two stars before an argument are not part of a recipe", keyword, "write each as name=value")
            if keyword.arg in given:
                self.fail(f"{function.id} is given {keyword.arg!r} twice", keyword, "keep one of them")
            given[keyword.arg] = keyword
        if function.id in CONSTRUCTORS:
            args = [(self.convert(arg), arg) for arg in expression.args]
            named = {name: (self.convert(keyword.value), keyword.value) for name, keyword in given.items()}
            return self.constructed(function, args, named)
        by_name: list[tuple[str, Node]] = []
        for name, one in given.items():
            by_name.append((name, self.argument(one.value, model_text=_is_model(function.id, one))))
        return Call(
            function.id,
            tuple([self.argument(arg, model_text=function.id in _PARTS) for arg in expression.args]),
            tuple(by_name),
            self.span(function),
            tuple([(name, self.span(keyword, len(name))) for name, keyword in given.items()]),
        )

    def constructed(
        self, function: ast.Name, args: list[tuple[Any, ast.expr]], named: dict[str, tuple[Any, ast.expr]]
    ) -> Node | Literal:
        try:
            made = construct(function.id, args, named)
        except RecipeError as error:
            place = getattr(error, "place", None) or function
            self.fail(error.message, place, error.hint or USAGE[function.id])
        return replace(made, span=self.span(function)) if isinstance(made, Node) else made  # type: ignore[type-var]

    def argument(self, expression: ast.expr, *, model_text: bool = False) -> Node:
        """A call's argument as a node: a name gives its step's own, so that nothing is copied."""
        if type(expression) is not ast.Name:
            return self.node(self.convert(expression), expression, model_text=model_text)
        step = self.step(expression)
        if step.node is None:
            step.node = self.node(step.item, expression, model_text=model_text)
        elif model_text and isinstance(step.node, Value) and isinstance(step.item, str):
            return self.node(step.item, expression, model_text=True)
        return step.node

    def node(self, item: Item, expression: ast.expr, *, model_text: bool = False) -> Node:
        """An item as a node; a bare text is a model where only a model can be meant."""
        if isinstance(item, Node):
            return item
        if isinstance(item, Mapping):
            self.fail(_ONLY_WITHIN, expression, _MAPPING)
        if model_text and isinstance(item, str):
            return Model(item, span=self.span(expression))
        return Value(item, self.span(expression))

    def span(self, at: ast.AST, width: int | None = None) -> Span:
        """The place of a part of the statement; where it goes on in the next line, its first line's part."""
        source = self.source
        line: int = self.statement.line + at.lineno - 1  # type: ignore[attr-defined]
        text = source.lines[line - 1]
        column: int = source.column(line, at.col_offset)  # type: ignore[attr-defined]
        if width is None:
            if at.end_lineno == at.lineno:  # type: ignore[attr-defined]
                width = source.column(line, at.end_col_offset) - column  # type: ignore[attr-defined]
            else:
                width = len(text.rstrip()) - column + 1
        return Span(source.name, text, line, column, max(width, 1))

    def fail(self, message: str, at: ast.AST, hint: str | None = None) -> NoReturn:
        raise RecipeSyntaxError(message, hint=hint, span=self.span(at))

    def refuse_kind(self, at: ast.AST) -> NoReturn:
        """What Python has and a recipe has not; where the tokens say it better, they do."""
        what = _REFUSED.get(type(at))
        if what is None:
            raise explain(self.source, self.statement.line)
        self.fail(f"{what} is not part of a recipe", at, _INSTEAD.get(type(at), GRAMMAR))

    def too_deep(self) -> RecipeSyntaxError:
        hint = "give an inner part a name of its own on a line before"
        return self.source.refuse("this statement nests too deep", self.statement.line, hint=hint)


def _is_number(item: object) -> bool:
    return isinstance(item, (int, float)) and not isinstance(item, bool)


def _is_model(function: str, keyword: ast.keyword) -> bool:
    """Whether a text by keyword is a model's name: a base, an order, a router, a reference; but for the words."""
    value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
    if function == MIXTURE:
        return keyword.arg == "shared" or (keyword.arg == "router" and value not in DRAWN)
    if function == REBASIN:
        return keyword.arg == "to"
    if function != ALIGN:
        return function == ADAPTER
    return keyword.arg == "base" or (keyword.arg == "order" and value not in (BASE, UNION))
