"""What decides a result's bytes, as one digest: work that an earlier run left is continued only if it is the same."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterable
from pathlib import Path

from remelt.api.options import MergeOptions
from remelt.api.prepare import PreparedGroup
from remelt.check.program import Apply
from remelt.planning.plan import PlannedOutput

_OURS = "remelt."


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
        files.append([given.model.space, [_identity(path) for path in given.checkpoint.files()]])
    decisive = {
        "headers": [hashlib.sha256(file.header).hexdigest() for file in output.layout.files],
        "indexes": [name for name, _ in output.layout.indexes],
        "inputs": files,
        "missing": options.missing,
        "methods": sorted(_foreign_methods(group)),
    }
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def _identity(path: Path) -> list[object]:
    found = path.stat()
    changed = 0 if os.name == "nt" else found.st_ctime_ns
    return [str(path), found.st_size, found.st_mtime_ns, changed, found.st_ino]


def _foreign_methods(group: PreparedGroup) -> Iterable[str]:
    """Methods that are not ours, with a digest of their source: the version of remelt does not tell theirs."""
    seen = set()
    for planned in group.plan.tasks:
        for instruction in planned.task.program.instructions:
            if isinstance(instruction, Apply) and instruction.method.name not in seen:
                seen.add(instruction.method.name)
                module = inspect.getmodule(instruction.method.function)
                if module is None or not module.__name__.startswith(_OURS):
                    yield f"{instruction.method.name} {_source_digest(instruction.method.function)}"


def _source_digest(function: object) -> str:
    try:
        source = Path(inspect.getsourcefile(function) or "").read_bytes()  # type: ignore[arg-type]
    except (OSError, TypeError):
        return os.urandom(16).hex()  # unknown code is never the same
    return hashlib.sha256(source).hexdigest()
