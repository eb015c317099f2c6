"""The one place where extensions of a kind are found: our folder, entry points, plugin files."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar

from remelt.core.nearest import nearest_hint
from remelt.errors import OptionError, RecipeError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Extensions of one kind by name, loaded at first use.

    ``package`` is the folder of ours; ``group`` the entry-point group of third parties'; ``collect`` gives a module's
    extensions by name. Two of one name are refused, so that a recipe means one thing.
    """

    def __init__(
        self, kind: str, *, package: str, group: str, collect: Callable[[ModuleType], Mapping[str, T]]
    ) -> None:
        self.kind = kind
        self._package = package
        self._group = group
        self._collect = collect
        self._found: dict[str, T] = {}
        self._origin: dict[str, str] = {}
        self._loaded = False

    def add_module(self, module: ModuleType) -> None:
        """Register what a module holds; a name that another module gave already raises `OptionError`."""
        for name, extension in self._collect(module).items():
            if name in self._found and self._found[name] is not extension:
                raise OptionError(
                    f"two {self.kind}s are named {name!r}: one in {self._origin[name]}, one in {module.__name__}",
                    hint="rename one of them",
                )
            self._found[name] = extension
            self._origin.setdefault(name, module.__name__)

    def add_file(self, path: Path) -> None:
        """Register what a Python file holds. This runs the file: only on a user's explicit word."""
        if not path.is_file():
            raise OptionError(f"plugin {path} is not a file", hint="--plugin takes the path of a Python file")
        name = f"remelt_plugin_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise OptionError(f"plugin {path} is not a Python file", hint="its name must end in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise OptionError(f"plugin {path} cannot be loaded: {type(error).__name__}: {error}") from error
        self._load()
        self.add_module(module)

    def find(self, name: str) -> T:
        """The extension of that name, or `RecipeError` with the nearest names."""
        self._load()
        if name not in self._found:
            raise RecipeError(f"no {self.kind} is named {name!r}", hint=nearest_hint(name, self._found))
        return self._found[name]

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self._package)
        for found in sorted(pkgutil.iter_modules(package.__path__), key=lambda module: module.name):
            self.add_module(importlib.import_module(f"{self._package}.{found.name}"))
        for point in importlib.metadata.entry_points(group=self._group):
            self.add_module(importlib.import_module(point.module))

    def __getitem__(self, name: str) -> T:
        self._load()
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._found))

    def __len__(self) -> int:
        self._load()
        return len(self._found)
