"""What decides a result's bytes, as one digest: work that an earlier run left is continued only if it is the same."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

from remelt.api.group import PreparedGroup
from remelt.api.options import MergeOptions
from remelt.check.program import Apply
from remelt.formats.checkpoint import Checkpoint
from remelt.planning.plan import PlannedOutput

_OURS = "remelt."
_INSTALLED = {"site-packages", "dist-packages"}
_LOADERS = {"importlib", "import_module", "runpy", "__import__", "exec", "eval", "open", "read_text", "read_bytes"}


def fingerprint(group: PreparedGroup, output: PlannedOutput, options: MergeOptions) -> str | None:
    """The digest of one result: its header (recipe, versions, executor, layout), its inputs, its methods.

    Inputs are told apart by path, size and times of change, so that no content is read. None where tensors in memory
    are merged: they cannot be told apart from others after a restart. What to do about NaN and infinities is not in it:
    tensors with any are never kept.
    """
    if output.layout is None:
        return None
    files: list[object] = []
    for given in group.inputs.values():
        if given.checkpoint.path is None:
            return None
        files.append([given.model.space, *_content(given.checkpoint)])
    decisive = {
        "headers": [hashlib.sha256(file.header).hexdigest() for file in output.layout.files],
        "indexes": [name for name, _ in output.layout.indexes],
        "inputs": files,
        "missing": options.missing,
        "methods": sorted(_foreign_methods(group)),
    }
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def identities(group: PreparedGroup) -> dict[int, str | None]:
    """What tells the content of each input from others, without reading it; None for tensors in memory."""
    found: dict[int, str | None] = {}
    for index, given in group.inputs.items():
        known = [*_content(given.checkpoint), repr(given.model.layers)]
        in_memory = given.checkpoint.path is None
        found[index] = None if in_memory else hashlib.sha256(json.dumps(known).encode()).hexdigest()
    return found


def _content(checkpoint: Checkpoint) -> list[object]:
    """What tells a checkpoint's tensors from others, but for what the recipe says of it."""
    return [[_identity(path) for path in checkpoint.files()], checkpoint.view_of()]


def _identity(path: Path) -> list[object]:
    found = path.stat()
    changed = 0 if os.name == "nt" else found.st_ctime_ns
    return [str(path), found.st_size, found.st_mtime_ns, changed, found.st_ino]


def _foreign_methods(group: PreparedGroup) -> Iterable[str]:
    """Methods that are not ours, with a digest of their code: the version of remelt does not tell theirs."""
    seen = set()
    programs = {id(planned.task.program): planned.task.program for planned in group.plan.tasks}
    for program in programs.values():
        for instruction in program.instructions:
            if isinstance(instruction, Apply) and instruction.method.name not in seen:
                seen.add(instruction.method.name)
                module = inspect.getmodule(instruction.method.function)
                if module is None or not module.__name__.startswith(_OURS):
                    unknown = os.urandom(16).hex()  # unknown code is never the same
                    yield f"{instruction.method.name} {code_digest(module) or unknown}"


def code_digest(module: ModuleType | None) -> str | None:
    """One digest of a module's code and of all that it imports, at its top or later; None where that cannot be told.

    Python's own library and remelt are left out, as they are told by their versions; installed packages are told by
    their files' sizes and times. Code that loads other code or reads files by name cannot be told.
    """
    found: dict[str, str] = {}
    specs = [_spec_of(module)]
    while specs:
        spec = specs.pop()
        if spec is None:
            return None
        if spec.name in found or _is_known(spec):
            continue
        if spec.origin is None or spec.loader is None:  # a folder without __init__.py
            found[spec.name] = ""
            continue
        path = Path(spec.origin)
        try:
            if spec.name != getattr(module, "__name__", None) and _INSTALLED & set(path.parts):
                found[spec.name] = json.dumps(_identity(path))
                continue
            content = path.read_bytes()
            found[spec.name] = hashlib.sha256(content).hexdigest()
            if path.suffix == ".py":
                specs += _imported(ast.parse(content), spec)
        except (OSError, ImportError, SyntaxError, ValueError, RecursionError, MemoryError):
            return None
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()


def _spec_of(module: ModuleType | None) -> ModuleSpec | None:
    """Where a module is from; a script that is run has no more than its file."""
    spec: ModuleSpec | None = getattr(module, "__spec__", None)
    file = getattr(module, "__file__", None)
    return spec_from_file_location("__main__", file) if module is not None and spec is None and file else spec


def _is_known(spec: ModuleSpec) -> bool:
    """Whether a version tells this code: remelt's and the standard library's."""
    top = spec.name.partition(".")[0]
    if top + "." == _OURS:
        return True
    if spec.origin in ("built-in", "frozen"):
        return True
    if top not in sys.stdlib_module_names or spec.origin is None:
        return False
    folders = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    return any(Path(folder) in Path(spec.origin).parents for folder in folders if folder)


def _imported(tree: ast.Module, spec: ModuleSpec) -> Iterator[ModuleSpec | None]:
    """What a module's code imports anywhere in it; None for what is not found, and for code that loads other code."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            if (node.id if isinstance(node, ast.Name) else node.attr) in _LOADERS:
                yield None
        elif isinstance(node, ast.Import):
            for name in node.names:
                yield from _specs(name.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = spec.name if spec.submodule_search_locations is not None else spec.parent or ""
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            yield from _specs(base)
            for name in node.names:
                found = _find(f"{base}.{name.name}")
                if found is not None:
                    yield found


def _specs(name: str) -> Iterator[ModuleSpec | None]:
    """A module and the packages that it is in, none of them imported for that."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        yield _find(".".join(parts[:count]))


def _find(name: str) -> ModuleSpec | None:
    """What Python would import by that name, found without running the packages that it is in."""
    if name in sys.modules:
        loaded: ModuleSpec | None = getattr(sys.modules[name], "__spec__", None)
        return loaded
    outer = name.rpartition(".")[0]
    package = _find(outer) if outer else None
    if outer and (package is None or package.submodule_search_locations is None):
        return None
    if not outer and (name in sys.builtin_module_names or name in sys.stdlib_module_names):
        return ModuleSpec(name, None, origin="built-in")
    return PathFinder.find_spec(name, None if package is None else package.submodule_search_locations)
