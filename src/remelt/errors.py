"""Every exception that remelt raises on purpose, in one tree.

RemeltError                 the law, the facts, the remedy
├── UsageError              the call itself is wrong                            (exit code 2)
│   ├── OptionError         an option, argument or plugin has an impossible value
│   └── MissingExtraError   a feature needs an optional dependency
├── RefusedError            refused before a byte is written                    (exit code 3)
│   ├── FormatError         a file is malformed, hostile, or of no known format
│   ├── AdapterError        an adapter is broken, or is none of the model that it is applied to
│   ├── ModelNameError      a model name fits no file, or several
│   ├── RecipeError         a recipe says something that cannot be meant
│   │   └── RecipeSyntaxError   its text is not a recipe
│   ├── CheckError          all problems of a recipe with its inputs, at once
│   ├── BudgetError         memory or disk would not suffice
│   └── OutputError         the output cannot be written where it was asked for
└── RunError                failed while running; nothing was published         (exit code 4)
    ├── NonFiniteError      NaN or infinity where the policy is to refuse them
    └── MethodError         a merge method raised, or broke its declaration
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Where in a recipe's text something stands.

    Lines and columns count from 1; ``width`` is the number of characters to underline.
    """

    source: str
    text: str
    line: int
    column: int
    width: int = 1

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}"

    def excerpt(self) -> str:
        """The line with a caret under the place, indented by four spaces."""
        shown, column = self.text, self.column
        if len(shown) > 160:
            start = max(0, column - 80)
            shown, column = shown[start : start + 160], column - start
        width = max(1, min(self.width, len(shown) - column + 1))
        gap = "".join("\t" if c == "\t" else " " for c in shown[: column - 1])
        return f"    {shown}\n    {gap}{'^' * width}"


class RemeltError(Exception):
    """Anything that remelt refuses or fails at, in words for a person.

    ``message`` states the law and the facts, ``hint`` the remedy, ``span`` the place in a recipe's text.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, span: Span | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.span = span

    def __str__(self) -> str:
        lines = [self.message if self.span is None else f"{self.span}: {self.message}"]
        if self.span is not None:
            lines.append(self.span.excerpt())
        if self.hint is not None:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.__dict__.copy()))


def _rebuild(cls: type[RemeltError], state: dict[str, object]) -> RemeltError:
    error = cls.__new__(cls)
    error.__dict__.update(state)
    error.args = (state["message"],)
    return error


class UsageError(RemeltError):
    """The call itself is wrong: nothing was looked at."""

    exit_code = 2


class OptionError(UsageError):
    """An option, an argument or a plugin has an impossible value."""


class MissingExtraError(UsageError):
    """A feature needs an optional dependency that is not installed."""


class RefusedError(RemeltError):
    """Refused before a byte was written."""

    exit_code = 3


class FormatError(RefusedError):
    """A file is malformed, hostile, or of no known format."""


class AdapterError(RefusedError):
    """An adapter is broken, or is none of the model that it is applied to."""


class ModelNameError(RefusedError):
    """A model name fits no file, or several."""


class RecipeError(RefusedError):
    """A recipe says something that cannot be meant."""


class RecipeSyntaxError(RecipeError):
    """A text is not a recipe."""


@dataclass(frozen=True)
class Problem:
    """One reason to refuse: whose it is, what is wrong, and what would mend it."""

    subject: str
    message: str
    hint: str | None = None
    span: Span | None = None

    def __str__(self) -> str:
        head = self.message if self.span is None else f"{self.span}: {self.message}"
        lines = [f"{self.subject}  {head}" if self.subject else head]
        if self.span is not None:
            lines += self.span.excerpt().splitlines()
        if self.hint is not None:
            lines.append(f"    {self.hint}")
        return "\n".join(lines)


_SHOWN = 12


def shortened(problems: Sequence[Problem]) -> list[Problem]:
    """The first problems, and how many more there are."""
    more = len(problems) - _SHOWN
    return [*problems[:_SHOWN], *([Problem("", f"and {more} more")] if more > 0 else [])]


class CheckError(RefusedError):
    """All the problems that a recipe has with its inputs, at once."""

    def __init__(self, problems: Sequence[Problem], *, inputs: int) -> None:
        count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
        files = f"{inputs} input" + ("s" if inputs != 1 else "")
        super().__init__(f"refused: {count} in {files}")
        self.problems = tuple(problems)

    def __str__(self) -> str:
        body = "\n".join(f"  {line}" for problem in self.problems for line in str(problem).splitlines())
        return f"{self.message}\n{body}"


class BudgetError(RefusedError):
    """Memory or disk would not suffice."""


class OutputError(RefusedError):
    """The output cannot be written where it was asked for."""


class RunError(RemeltError):
    """Failed while running; nothing was published under the output's name."""

    exit_code = 4


class NonFiniteError(RunError):
    """NaN or infinity where the policy is to refuse them."""


class MethodError(RunError):
    """A merge method raised, or broke what it declares."""
