"""A configuration in YAML: its values, and the place of each in the text.

YAML is read by PyYAML's safe loader, which makes plain values and runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from remelt.core.nearest import nearest_hint
from remelt.errors import MissingExtraError, RecipeSyntaxError
from remelt.text.source import SourceText

_LARGEST = 2**20
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
        self.tree, self.told = self._load(text)

    def _load(self, text: str) -> tuple[Any, dict[str, Any]]:
        try:
            import yaml
        except ImportError as error:
            raise MissingExtraError(
                "reading mergekit's YAML needs PyYAML", hint='pip install "remelt[mergekit]"'
            ) from error
        try:
            tree = yaml.compose(text, Loader=yaml.SafeLoader)
            for node in _nodes(tree):
                if node.tag == "tag:yaml.org,2002:merge":  # each may be as long as all before it together
                    mark = node.start_mark
                    raise self.source.refuse("mappings are not put into others here", mark.line + 1, mark.column + 1, 2)
            told = yaml.safe_load(text)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line, column = (1, 1) if mark is None else (mark.line + 1, mark.column + 1)
            raise self.source.refuse(f"this is no YAML: {error.problem or error}", line, column) from None
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise self.source.refuse(f"this is no YAML: {type(error).__name__}", 1) from None
        if not isinstance(told, dict):
            raise self.source.refuse("a configuration is names with values, such as merge_method: linear", 1)
        return tree, told

    def refuse(self, path: Path, message: str, hint: str | None = None, *, name: bool = False) -> RecipeSyntaxError:
        """An error at a value, or at its name."""
        node = self.tree
        for step in path:
            found = None
            if isinstance(step, int) and isinstance(node.value, list) and step < len(node.value):
                found = node.value[step]
            elif isinstance(node.value, list):
                pairs = [pair for pair in node.value if isinstance(pair, tuple) and pair[0].value == step]
                if pairs:
                    found = pairs[-1][0] if name and step == path[-1] else pairs[-1][1]
            if found is None:
                break
            node = found
        mark, end = node.start_mark, node.end_mark
        width = end.column - mark.column if end.line == mark.line else 1
        return self.source.refuse(message, mark.line + 1, mark.column + 1, width, hint)

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
                    (*path, name), f"{name!r} is not known here", nearest_hint(str(name), names), name=True
                )

    def listed(self, path: Path) -> list[Any]:
        found = self.at(path)
        if not isinstance(found, list) or not found:
            raise self.refuse(path, "a list is due here")
        return found


def _nodes(tree: Any) -> Iterator[Any]:
    """Every node of a YAML tree once, aliases included."""
    seen: set[int] = set()
    pending = [tree]
    while pending:
        node = pending.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        for child in node.value if isinstance(node.value, list) else ():
            pending += child if isinstance(child, tuple) else (child,)
