"""What is wrong with a statement that Python's parser did not understand, in words that are ours.

Python's own messages change from version to version and speak of Python; these come from the tokens alone.
"""

from __future__ import annotations

from remelt.errors import RecipeSyntaxError
from remelt.text.source import SourceText
from remelt.text.tokens import ALLOWED_WORDS, Scanner, Token


def explain(source: SourceText, first_line: int) -> RecipeSyntaxError:
    """What is wrong with a statement that Python's parser did not understand, by its tokens alone."""
    scanner = Scanner(source)
    try:
        scanner.scan(first_line)
    except RecipeSyntaxError as error:
        return error
    return _Explanation(source, scanner.tokens).find()


class _Explanation:
    """A walk over the tokens that knows, at each, whether a value is due, and stops where something else stands."""

    def __init__(self, source: SourceText, tokens: list[Token]) -> None:
        self.source = source
        self.tokens = tokens
        self.calls: list[bool] = []
        """For each open bracket, whether it holds a call's arguments."""
        self.named: list[bool] = []
        """For each open bracket, whether an argument by name has been met."""
        self.starts: list[int] = []
        """For each open bracket, where what stands around it began."""
        self.start = 0
        self.due = True

    def find(self) -> RecipeSyntaxError:
        for index, token in enumerate(self.tokens):
            found = self.value_due(index, token) if self.due else self.value_done(index, token)
            if found is not None:
                return found
        last = self.tokens[-1]
        if self.due:
            end = last._replace(column=last.column + len(last.text), text=" ")
            return self.refuse(f"a value is due after {last.text!r}", end)
        return self.refuse("this is not understood", self.tokens[0])

    def value_due(self, index: int, token: Token) -> RecipeSyntaxError | None:
        before = self.tokens[index - 1] if index else None
        if token.kind in ("name", "number", "string"):
            raw = token.kind == "name" and index + 1 < len(self.tokens) and self.tokens[index + 1].kind == "string"
            self.due = raw
        elif token.kind == "open":
            self.enter(call=False, index=index)
        elif token.text == "*":
            return self.refuse("a value is due before '*'", token)
        elif token.kind == "close" and before is not None and (before.kind == "open" or before.text == ","):
            return self.leave(index)
        elif token.kind != "operator" or token.text == "|":
            return self.refuse(f"a value is due before {token.text!r}", token)
        return None

    def value_done(self, index: int, token: Token) -> RecipeSyntaxError | None:
        before = self.tokens[index - 1]
        if token.text == "(":
            if before.kind != "name":
                return self.refuse("only a method's name can be called", before)
            self.enter(call=True, index=index)
        elif token.text == "[":
            return self.refuse("an index in square brackets is not part of a recipe", token)
        elif token.kind in ("name", "number", "string", "open"):
            return self.refuse(f"a comma or an operator is missing before {token.text!r}", token)
        elif token.kind == "close":
            return self.leave(index)
        elif token.text == "=":
            return self.equals(index, token)
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
            what = "an argument's name" if self.calls else "one name"
            return self.refuse(f"{what} stands before '='", token)
        if self.calls and not self.calls[-1]:
            return self.refuse("'=' stands only after an argument's name in a call", token)
        if self.calls:
            self.named[-1] = True
        self.due = True
        return None

    def argument(self, index: int) -> RecipeSyntaxError | None:
        """Whether the argument that ends before a token stands by position after one by name."""
        if self.calls and self.calls[-1] and self.named[-1] and self.start < index:
            second = self.tokens[self.start + 1].text if self.start + 1 < index else ""
            if second != "=":
                hint = "give it its name as well, or move it to the front"
                return self.refuse("an argument by position stands after one by name", self.tokens[self.start], hint)
        return None

    def enter(self, *, call: bool, index: int) -> None:
        self.calls.append(call)
        self.named.append(False)
        self.starts.append(self.start)
        self.start, self.due = index + 1, True

    def leave(self, index: int) -> RecipeSyntaxError | None:
        found = self.argument(index)
        self.calls.pop()
        self.named.pop()
        self.start = self.starts.pop()
        self.due = False
        return found

    def refuse(self, message: str, token: Token, hint: str | None = None) -> RecipeSyntaxError:
        return self.source.refuse(message, token.line, token.column, len(token.text), hint)
