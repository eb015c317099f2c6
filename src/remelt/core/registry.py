"""The one place where extensions of a kind are found: our folder, entry points, plugin files."""

from __future__ import annotations

import hashlib
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
        self._files: set[Path] = set()

    def add_module(self, module: ModuleType) -> None:
        """Register what a module holds; a name that another module gave already raises `OptionError`."""
        extensions = self._collect(module)
        for name, extension in extensions.items():
            if name in self._found and self._found[name] is not extension:
                raise OptionError(
                    f"two {self.kind}s are named {name!r}: one in {self._origin[name]}, one in {module.__name__}",
                    hint="rename one of them",
                )
        for name, extension in extensions.items():
            self._found[name] = extension
            self._origin.setdefault(name, module.__name__)

    def add_file(self, path: Path) -> None:
        """Register what a Python file holds; a file that was added already stays as it is.

        This runs the file: only on a user's explicit word. Raises `OptionError` where it cannot be loaded.
        """
        if path.resolve() in self._files:
            return
        if not path.is_file():
            raise OptionError(f"plugin {path} is not a file", hint="--plugin takes the path of a Python file")
        # Two plugins of one file name are two modules: the folder is part of the name.
        folder = hashlib.blake2b(str(path.resolve().parent).encode("utf-8", "surrogatepass"), digest_size=4)
        name = f"remelt_plugin_{path.stem}_{folder.hexdigest()}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise OptionError(f"plugin {path} is not a Python file", hint="its name must end in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            raise OptionError(f"plugin {path} cannot be loaded: {type(error).__name__}: {error}") from error
        self._load()
        self.add_module(module)
        self._files.add(path.resolve())

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
        try:
            for point in importlib.metadata.entry_points(group=self._group):
                self.add_module(_module_of(point))
        except OptionError:
            self._loaded = False
            raise

    def __getitem__(self, name: str) -> T:
        self._load()
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._found))

    def __len__(self) -> int:
        self._load()
        return len(self._found)


def _module_of(point: importlib.metadata.EntryPoint) -> ModuleType:
    try:
        return importlib.import_module(point.module)
    except Exception as error:
        owner = "an installed package" if point.dist is None else point.dist.name
        raise OptionError(
            f"{point.module}, which {owner} offers as {point.group}, cannot be loaded: {type(error).__name__}: {error}",
            hint="update or uninstall that package",
        ) from error
