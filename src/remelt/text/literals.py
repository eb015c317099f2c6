"""Numbers, texts, lists and block weights as a recipe's text writes them, so that they read back exactly."""

from __future__ import annotations

import json
import keyword
import unicodedata

from remelt.errors import RecipeError
from remelt.recipe.blocks import DEPTH, KEYS, PRESET, BlockWeights, Rule, Search, render_weight
from remelt.recipe.node import Literal
from remelt.text.source import DEEPEST_BRACKETS, LONGEST_NAME, LONGEST_TEXT, MOST_DIGITS, MOST_OPERATORS

_DEEPEST_LIST = DEEPEST_BRACKETS // 2


def write_literal(value: Literal) -> str:
    """A value as a recipe writes it; `RecipeError` where no text says it.

    >>> write_literal(("a", 0.5, None))
    '["a", 0.5, None]'
    """
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, tuple):
        check_depth(value)
        return f"[{', '.join([write_literal(item) for item in value])}]"
    if isinstance(value, BlockWeights):
        return _block_weights(value)
    if isinstance(value, int) and abs(value) >= 10**MOST_DIGITS:
        raise RecipeError(f"a whole number in a recipe's text has at most {MOST_DIGITS} digits")
    return render_weight(value) if isinstance(value, Search) else repr(value)


def check_depth(value: Literal) -> None:
    """Refuse lists that nest deeper than a text may; without recursion, so that any depth is refused alike."""
    level = [value]
    for _ in range(_DEEPEST_LIST):
        level = [inner for item in level if isinstance(item, tuple) for inner in item]
        if not level:
            return
    raise RecipeError(f"lists in a recipe's text nest at most {_DEEPEST_LIST} deep")


def quoted(text: str) -> str:
    """A text in double quotes; what does not print is escaped."""
    written = json.dumps(text, ensure_ascii=False)
    if not written.isprintable():
        written = "".join([char if char.isprintable() else _escaped(char) for char in written])
    if len(written) > LONGEST_TEXT:
        raise RecipeError(f"a text in a recipe has at most {LONGEST_TEXT} characters, but one has {len(text)}")
    return written


def is_word(name: str) -> bool:
    """Whether a name reads back as itself where it stands without quotes.

    >>> is_word("alpha"), is_word("in"), is_word("double_blocks.3")
    (True, False, False)
    """
    return (
        len(name) <= LONGEST_NAME
        and name.isidentifier()
        and not keyword.iskeyword(name)
        and (name.isascii() or unicodedata.normalize("NFKC", name) == name)
    )


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _block_weights(value: BlockWeights) -> str:
    if not value.rules:
        raise RecipeError("block weights without any rule cannot be written", hint="write the plain number")
    if len(value.rules) > MOST_OPERATORS:
        raise RecipeError(f"at most {MOST_OPERATORS} block weights combine in a recipe's text")
    parts = [_rule(rule) for rule in value.rules]
    if value.default is not None:
        parts.append(_weight(value.default))
    return " | ".join(parts)


def _rule(rule: Rule) -> str:
    if rule.kind == PRESET:
        if any(isinstance(weight, Search) for weight in rule.listed):
            raise RecipeError("a preset string holds numbers, not searches", hint="write blocks by name")
        return f"blocks({quoted(','.join([_weight(weight) for weight in rule.listed]))})"
    if rule.kind == DEPTH:
        stack = "" if rule.stack is None else f", stack={quoted(rule.stack)}"
        return f"depth([{', '.join([_weight(weight) for weight in rule.listed])}]{stack})"
    if rule.kind != KEYS and all(is_word(name) for name, _ in rule.named):
        return f"{rule.kind}({', '.join([f'{name}={_weight(weight)}' for name, weight in rule.named])})"
    named = ", ".join([f"{quoted(name)}: {_weight(weight)}" for name, weight in rule.named])
    return f"{rule.kind}({{{named}}}{', optional=True' if rule.optional else ''})"


def _weight(weight: float | Search | BlockWeights) -> str:
    if isinstance(weight, BlockWeights):
        return _block_weights(weight)
    return render_weight(weight) if isinstance(weight, Search) else repr(float(weight))
