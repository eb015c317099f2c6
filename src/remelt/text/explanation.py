"""What is wrong with a statement that Python's parser did not understand, in words that are ours.

Python's own messages change from version to version and speak of Python; these come from the tokens alone.
"""

from __future__ import annotations

from remelt.errors import RecipeSyntaxError
from remelt.text.source import GRAMMAR, SourceText
from remelt.text.tokens import ALLOWED_WORDS, Scanner, Token

CALLED = "as in weighted_sum(a, b); a product is written 0.5 * a"
_ON_ONE_LINE = "write the value; a statement goes on in the next line only within brackets"
_VALUES = {
    "=": "write the value, or remove the argument",
    ",": "write a value, or remove the comma",
}


def explain(source: SourceText, first_line: int) -> RecipeSyntaxError:
    """What is wrong with a statement that Python's parser did not understand, by its tokens alone."""
    scanner = Scanner(source)
    try:
        last_line = scanner.scan(first_line)
    except RecipeSyntaxError as error:
        return error
    return _Explanation(source, scanner.tokens).find() or _unknown(source, first_line, last_line)


def _unknown(source: SourceText, first_line: int, last_line: int) -> RecipeSyntaxError:
    """Every word and sign stands where it may: a backslash with nothing after it, or what nobody thought of."""
    for number in range(last_line, first_line - 1, -1):
        line = source.lines[number - 1]
        if line.endswith("\\"):
            return source.refuse(
                "a backslash joins its line with the next, which is empty", number, len(line), hint="remove it"
            )
    return source.refuse("this is not understood", first_line, hint=GRAMMAR)


class _Explanation:
    """A walk over the tokens that knows, at each, whether a value is due, and stops where something else stands."""

    def __init__(self, source: SourceText, tokens: list[Token]) -> None:
        self.source = source
        self.tokens = tokens
        self.calls: list[bool] = []
        """For each open bracket, whether it holds a call's arguments."""
        self.opened: list[str] = []
        """The open brackets."""
        self.named: list[bool] = []
        """For each open bracket, whether an argument by name has been met."""
        self.starts: list[int] = []
        """For each open bracket, where what stands around it began."""
        self.start = 0
        self.due = True

    def find(self) -> RecipeSyntaxError | None:
        for index, token in enumerate(self.tokens):
            found = self.value_due(index, token) if self.due else self.value_done(index, token)
            if found is not None:
                return found
        if self.due and self.tokens:
            last = self.tokens[-1]
            end = last._replace(column=last.column + len(last.text), text=" ")
            return self.refuse(f"a value is due after {last.text!r}", end, _ON_ONE_LINE)
        return None

    def value_due(self, index: int, token: Token) -> RecipeSyntaxError | None:
        before = self.tokens[index - 1] if index else None
        if token.kind in ("name", "number", "string"):
            after = self.tokens[index + 1] if index + 1 < len(self.tokens) else token
            self.due = token.text in ("r", "R") and after.kind == "string" and after[2:] == token.end
        elif token.kind == "open":
            self.enter(call=False, index=index)
        elif token.text == "*":
            return self.refuse("a value is due before '*'", token, "arguments are written one after the other")
        elif token.kind == "close" and before is not None and (before.kind == "open" or before.text == ","):
            return self.leave(index)
        elif token.kind != "operator" or token.text == "|":
            hint = _VALUES.get(token.text) or _VALUES.get(before.text if before else "") or "write the value"
            return self.refuse(f"a value is due before {token.text!r}", token, hint)
        return None

    def value_done(self, index: int, token: Token) -> RecipeSyntaxError | None:
        before = self.tokens[index - 1]
        if token.text == "(":
            if before.kind != "name":
                return self.refuse("only a method's name can be called", before, CALLED)
            self.enter(call=True, index=index)
        elif token.text == "[":
            hint = "give each value a name of its own"
            return self.refuse("an index in square brackets is not part of a recipe", token, hint)
        elif token.kind in ("name", "number", "string", "open"):
            return self.missing(before, token)
        elif token.kind == "close":
            return self.leave(index)
        elif token.text == "=":
            return self.equals(index, token)
        elif token.text == ":" and not (self.opened and self.opened[-1] == "{"):
            hint = "an argument is given as name=value, a step as name = value"
            return self.refuse("a colon stands only between braces", token, hint)
        elif token.text == ",":
            found = self.argument(index)
            self.start, self.due = index + 1, True
            return found
        else:
            self.due = True
        return None

    def equals(self, index: int, token: Token) -> RecipeSyntaxError | None:
        name = self.tokens[index - 1]
        if name.kind != "name" or index - 1 != self.start or name.text in ALLOWED_WORDS:
            if self.opened and self.opened[-1] == "{":
                return self.refuse("'=' stands between braces", token, 'write a colon, as in {"IN00": 0.2}')
            if self.calls:
                return self.refuse("an argument's name stands before '='", token, "as in alpha=0.5")
            hint = "a name is a letter, then letters, digits and _, as in step_2"
            return self.refuse("one name stands before '='", token, hint)
        if self.calls and not self.calls[-1]:
            hint = "a colon stands there" if self.opened[-1] == "{" else "what stands in a list has no name"
            return self.refuse("'=' stands only after an argument's name in a call", token, hint)
        if self.calls:
            self.named[-1] = True
        self.due = True
        return None

    def argument(self, index: int) -> RecipeSyntaxError | None:
        """Whether the argument that ends before a token stands by position after one by name."""
        if self.calls and self.calls[-1] and self.named[-1] and self.start < index:
            first, second = self.tokens[self.start], self.tokens[self.start + 1].text
            if second != "=":
                comma, number = self.tokens[self.start - 1], self.tokens[self.start - 2]
                if number.kind == first.kind == "number" and (number.end, comma.end) == (comma[2:], first[2:]):
                    hint = f"write {number.text}.{first.text}"
                    return self.refuse("a number has a point before its decimals, not a comma", comma, hint)
                hint = "give it its name as well, or move it to the front"
                return self.refuse("an argument by position stands after one by name", first, hint)
        return None

    def enter(self, *, call: bool, index: int) -> None:
        self.calls.append(call)
        self.opened.append(self.tokens[index].text)
        self.named.append(False)
        self.starts.append(self.start)
        self.start, self.due = index + 1, True

    def leave(self, index: int) -> RecipeSyntaxError | None:
        found = self.argument(index)
        self.calls.pop()
        self.opened.pop()
        self.named.pop()
        self.start = self.starts.pop()
        self.due = False
        return found

    def missing(self, before: Token, token: Token) -> RecipeSyntaxError:
        """Two values stand side by side."""
        message = f"a comma or an operator is missing before {token.text!r}"
        if before.text == "version" and token is self.tokens[1]:
            message, hint = "the version is stated once, on the first line", "remove this line"
        elif before.kind == "name" and token.kind == "string":
            hint = f"what is called has brackets, as in {before.text}({token.text})"
        elif self.calls:
            hint = "arguments stand between commas"
        else:
            hint = "each statement stands on a line of its own"
        return self.refuse(message, token, hint)

    def refuse(self, message: str, token: Token, hint: str | None = None) -> RecipeSyntaxError:
        return self.source.refuse(message, token.line, token.column, len(token.text), hint)
