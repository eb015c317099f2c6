"""Reading a declarative file: values of the type that is due, or an error that names the file and the entry."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

from remelt.core.nearest import nearest_hint
from remelt.errors import OptionError


class Table:
    """A table of a TOML file that checks what it hands out and remembers what was asked for."""

    def __init__(self, where: str, values: dict[str, object]) -> None:
        self._where = where
        self._values = values
        self._asked: set[str] = set()
        self._inner: list[Table] = []

    def error(self, message: str) -> OptionError:
        """An error about this table."""
        return OptionError(f"{self._where}: {message}")

    def text(self, name: str) -> str:
        """A text that must be there."""
        value = self._value(name)
        if not isinstance(value, str) or not value:
            raise self.error(
                f"{name!r} must be a text, but is {value!r}" if value is not None else f"it lacks {name!r}"
            )
        return value

    def text_or_nothing(self, name: str) -> str:
        """A text, empty where there is none."""
        return "" if self._value(name) is None else self.text(name)

    def flag(self, name: str) -> bool:
        """Whether something is so; not, where nothing is said."""
        value = self._value(name)
        if not isinstance(value, bool | None):
            raise self.error(f"{name!r} must be true or false, but is {value!r}")
        return bool(value)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts, empty where there is none."""
        value = self._value(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(entry, str) and entry for entry in value):
            raise self.error(f"{name!r} must be a list of texts, but is {value!r}")
        return tuple(value)

    def lists(self, name: str) -> Iterator[tuple[str, ...]]:
        """A list of lists of two texts or more, empty where there is none."""
        value = self._value(name)
        if value is None:
            return
        for entry in value if isinstance(value, list) else [value]:
            if not isinstance(entry, list) or len(entry) < 2 or not all(isinstance(text, str) for text in entry):
                raise self.error(f"{name!r} must be lists of two texts or more, but has {entry!r}")
            yield tuple(entry)

    def tables(self, name: str) -> Iterator[Table]:
        """The tables ``[[name]]``, in order."""
        value = self._value(name)
        if value is None:
            return
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise self.error(f"{name!r} must be written as [[{name}]] tables")
        for number, entry in enumerate(value, 1):
            inner = Table(f"{self._where}: [[{name}]] {number}", entry)
            self._inner.append(inner)
            yield inner

    def pairs(self, name: str) -> Iterator[tuple[str, str | tuple[str, ...]]]:
        """The entries of the table ``name``: names with a name, or a list of names."""
        value = self._value(name)
        if value is None:
            return
        if not isinstance(value, dict):
            raise self.error(f"{name!r} must be a table of names")
        for key, found in value.items():
            if isinstance(found, str):
                yield key, found
            elif isinstance(found, list) and found and all(isinstance(entry, str) for entry in found):
                yield key, tuple(found)
            else:
                raise self.error(f"what {key!r} is must be a name or a list of names, but is {found!r}")

    def table(self, name: str) -> Table:
        """The table ``[name]``, empty where there is none."""
        value = self._value(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(f"{name!r} must be a table")
        inner = Table(f"{self._where}: [{name}]", value or {})
        self._inner.append(inner)
        return inner

    def pairs_of_text(self) -> Iterator[tuple[str, str]]:
        """Every entry of the table, all of which are texts."""
        for name in self._values:
            yield name, self.text(name)

    @property
    def names(self) -> tuple[str, ...]:
        """What the table has entries for."""
        return tuple(self._values)

    def shapes(self, name: str) -> Iterator[tuple[str, list[int | str]]]:
        """The entries of the table ``name``: keys with lists of dimensions."""
        value = self._value(name)
        if value is None:
            return
        if not isinstance(value, dict):
            raise self.error(f"{name!r} must be a table of keys with shapes")
        for key, shape in value.items():
            if not isinstance(shape, list) or not all(type(dim) in (int, str) for dim in shape):
                raise self.error(f"the shape of {key!r} must be a list of numbers and texts, but is {shape!r}")
            yield key, shape

    def refuse_unknown(self) -> None:
        """Raise `OptionError` for the first entry that nobody asked for, here or in a table below."""
        waiting = [self]
        while waiting:
            table = waiting.pop()
            for name in table._values:
                if name not in table._asked:
                    raise OptionError(f"{table._where}: unknown entry {name!r}", hint=nearest_hint(name, table._asked))
            waiting += table._inner

    def _value(self, name: str) -> object:
        self._asked.add(name)
        return self._values.get(name)


def read_table(path: Path) -> Table:
    """The outermost table of a TOML file; `OptionError` where it cannot be read."""
    try:
        with path.open("rb") as file:
            return Table(path.name, tomllib.load(file))
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise OptionError(f"{path} is not a TOML file: {error or 'nested too deeply'}") from error
