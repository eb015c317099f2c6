"""A configuration in YAML: its values, and the place of each in the text.

PyYAML makes a tree of the text, and of each scalar a plain value: nothing else is made, and nothing runs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from remelt.core.nearest import nearest_hint
from remelt.errors import MissingExtraError, RecipeSyntaxError, Span
from remelt.text.source import LONGEST_NUMBER, LONGEST_TEXT, SourceText

_LARGEST = 2**20
_MOST_VALUES = 10**5
_SHOWN = 40
_TAGS = "tag:yaml.org,2002:"
_SCALARS = ("null", "bool", "int", "float", "str")
Path = tuple[str | int, ...]
"""Where a value stands: names and numbers, from the top."""


class Configuration:
    """A mapping in YAML, whose values are asked for by their place.

    Raises `RecipeSyntaxError` for what is no such text, `MissingExtraError` without the extra ``mergekit``.
    """

    def __init__(self, source: SourceText) -> None:
        self.source = source
        text = "\n".join(source.lines)
        if len(text) > _LARGEST:
            raise source.refuse(f"a configuration has at most {_LARGEST} characters, but got {len(text)}", 1)
        self._begins = [0, *accumulate(len(line) + 1 for line in source.lines)]
        self._read: dict[int, tuple[Any, int] | None] = {}
        self.tree = self._load(text)
        try:
            self.told = None if self.tree is None else self._plain(self.tree)[0]
        except RecursionError:
            raise source.refuse("this is no YAML that is read: its brackets are too deep", 1) from None
        if not isinstance(self.told, dict):
            raise source.refuse("a configuration is names with values, such as merge_method: linear", 1)

    def _load(self, text: str) -> Any:
        try:
            import yaml
        except ImportError as error:
            raise MissingExtraError(
                "reading mergekit's YAML needs PyYAML", hint='pip install "remelt[mergekit]"'
            ) from error
        try:
            self._loader = yaml.SafeLoader(text)
            return self._loader.get_single_node()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line, column = (1, 1) if mark is None else self._place(mark)
            raise self.source.refuse(f"this is no YAML: {error.problem or error}", line, column) from None
        except (yaml.YAMLError, RecursionError, ValueError, ArithmeticError) as error:
            raise self.source.refuse(f"this is no YAML: {type(error).__name__}", 1) from None

    def _plain(self, node: Any) -> tuple[Any, int]:
        """A node's plain value, and how many values it holds with what its aliases stand for."""
        if id(node) in self._read:
            found = self._read[id(node)]
            if found is None:
                raise self._refuse_at(node, "a value cannot stand within itself")
            return found
        self._read[id(node)] = None
        kind = node.tag.removeprefix(_TAGS)
        value: Any
        if (node.id, kind) == ("mapping", "map"):
            pairs = self._pairs(node)
            value = {name: one for name, (one, _) in pairs.items()}
            size = 1 + sum(inner for _, inner in pairs.values())
        elif (node.id, kind) == ("sequence", "seq"):
            items = [self._plain(child) for child in node.value]
            value = [one for one, _ in items]
            size = 1 + sum(inner for _, inner in items)
        elif node.id == "scalar" and kind in _SCALARS:
            value, size = self._scalar(node, kind), 1
        else:
            hint = "put quotes around a text" if node.id == "scalar" else None
            raise self._refuse_at(node, f"this is no YAML of texts and numbers, but {kind[:_SHOWN]}", hint)
        if size > _MOST_VALUES:
            message = f"a configuration has at most {_MOST_VALUES} values, with what its aliases stand for"
            raise self._refuse_at(node, f"{message}, but here are {size}", "write out what is needed, without aliases")
        self._read[id(node)] = value, size
        return value, size

    def _pairs(self, node: Any) -> dict[str, tuple[Any, int]]:
        """The values of a mapping by their names, which are texts as they are written."""
        found: dict[str, tuple[Any, int]] = {}
        lines: dict[str, int] = {}
        for key, child in node.value:
            if key.tag == f"{_TAGS}merge":  # each may be as long as all before it together
                raise self._refuse_at(key, "mappings are not put into others here")
            if key.id != "scalar":
                raise self._refuse_at(key, "a name is a text")
            if key.value in found:
                message = f"{shown(key.value)} is told twice: first in line {lines[key.value]}"
                raise self._refuse_at(key, message, "leave one of them out")
            lines[key.value] = self._place(key.start_mark)[0]
            found[key.value] = self._plain(child)
        return found

    def _scalar(self, node: Any, kind: str) -> Any:
        most = LONGEST_TEXT if kind == "str" else LONGEST_NUMBER
        if len(node.value) > most:
            raise self._refuse_at(node, f"a value has at most {most} characters, but this one {len(node.value)}")
        if kind == "str":
            return node.value
        try:
            return self._loader.yaml_constructors[node.tag](self._loader, node)
        except (ValueError, ArithmeticError, LookupError):
            raise self._refuse_at(node, f"this is no YAML: {shown(node.value)} is no {kind}") from None

    # ---- places ----

    def _place(self, mark: Any) -> tuple[int, int]:
        """The line and column of a mark of PyYAML, which parts lines at more characters than a recipe does."""
        line = bisect_right(self._begins, mark.index, hi=len(self.source.lines))
        return line, mark.index - self._begins[line - 1] + 1

    def _span(self, node: Any) -> Span:
        line, column = self._place(node.start_mark)
        last, end = self._place(node.end_mark)
        return self.source.span(line, column, end - column if last == line else 1)

    def _refuse_at(self, node: Any, message: str, hint: str | None = None) -> RecipeSyntaxError:
        return RecipeSyntaxError(message, hint=hint, span=self._span(node))

    def span(self, path: Path, *, name: bool = False) -> Span:
        """The place of a value, or of its name; of what is around it where it is not told."""
        node = self.tree
        for step in path:
            found = None
            if isinstance(step, int):
                found = node.value[step] if node.id == "sequence" and step < len(node.value) else None
            elif node.id == "mapping":
                pair = next((pair for pair in node.value if pair[0].value == step), None)
                found = None if pair is None else pair[0 if name and step == path[-1] else 1]
            if found is None:
                break
            node = found
        return self._span(node)

    def refuse(self, path: Path, message: str, hint: str | None = None, *, name: bool = False) -> RecipeSyntaxError:
        """An error at a value, or at its name."""
        return RecipeSyntaxError(message, hint=hint, span=self.span(path, name=name))

    # ---- values ----

    def at(self, path: Path) -> Any:
        """The value at a place, None where there is none."""
        found: Any = self.told
        for step in path:
            if isinstance(found, dict):
                found = found.get(step)
            elif isinstance(found, list) and isinstance(step, int) and step < len(found):
                found = found[step]
            else:
                return None
        return found

    def known(self, path: Path, names: Sequence[str]) -> None:
        """Refuse names that are not among those."""
        found = self.at(path)
        if not isinstance(found, dict):
            raise self.refuse(path, "names with values are due here")
        for name in found:
            if name not in names:
                raise self.refuse(
                    (*path, name), f"{shown(name)} is not known here", nearest_hint(name, names), name=True
                )

    def listed(self, path: Path) -> list[Any]:
        """The list at a place, which is not empty."""
        found = self.at(path)
        if not isinstance(found, list) or not found:
            raise self.refuse(path, "a list is due here")
        return found


def shown(value: Any) -> str:
    """A value for a message: at most 40 characters of it, and of lists and mappings only what they are."""
    if value is None or isinstance(value, (list, dict)):
        return "nothing" if value is None else "a list" if isinstance(value, list) else "names with values"
    told = repr(value)
    return told if len(told) <= _SHOWN else f"{told[: _SHOWN - 3]}..."
