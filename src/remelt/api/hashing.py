"""Hashes of models, as model sites and recipes use them, remembered by path, size and times of change."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from remelt.api.options import PathLike
from remelt.errors import FormatError
from remelt.formats.checkpoint import Checkpoint, open_checkpoint
from remelt.formats.locate import find_models, locate_model, models_folders

_STEP = 2**22
_SCHEMA = "CREATE TABLE IF NOT EXISTS hashes (path TEXT, kind TEXT, stamp TEXT, digest TEXT, PRIMARY KEY (path, kind))"


@dataclass(frozen=True)
class Hashes:
    """A model's hashes in hexadecimal: of its file, in the short form of model sites, and of its tensors alone.

    ``tensors`` does not depend on metadata, on the order of keys or on how a model is cut into shards.
    """

    path: str
    sha256: str
    autov2: str
    tensors: str


def hash_model(path: PathLike, *, models_dirs: tuple[PathLike, ...] = (), cached: bool = True) -> Hashes:
    """The hashes of a model: SHA-256 of its file, its first ten digits, and SHA-256 of its tensors.

    A folder's SHA-256 is that of its weight files' hashes and names. Raises `ModelNameError` and `FormatError`.
    """
    folders = models_folders([Path(folder) for folder in models_dirs])
    found = locate_model(str(path), [Path.cwd(), *folders]).resolve()
    with open_checkpoint(found) as checkpoint:
        whole = content_hash(checkpoint, cached=cached)
        return Hashes(str(found), whole, whole[:10], tensors_hash(checkpoint, cached=cached))


def content_hash(checkpoint: Checkpoint, *, cached: bool = True) -> str:
    """The SHA-256 of a model's file; of a folder, that of its files' names and hashes in order of name."""
    cache = HashCache() if cached else None
    hashes = []
    for path in sorted(checkpoint.files()):
        digest = cache.get(path, "file") if cache is not None else None
        if digest is None:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if cache is not None:
                cache.put(path, "file", digest)
        hashes.append((path.name, digest))
    if len(hashes) == 1:
        return hashes[0][1]
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in hashes).encode()).hexdigest()


def tensors_hash(checkpoint: Checkpoint, *, cached: bool = True) -> str:
    """The SHA-256 of names, element types, shapes and contents of all tensors, in order of name."""
    files = checkpoint.files()
    cache = HashCache() if cached and len(files) == 1 else None
    digest = cache.get(files[0], "tensors") if cache is not None else None
    if digest is not None:
        return digest
    running = hashlib.sha256()
    for key in sorted(checkpoint.tensors):
        info = checkpoint.tensors[key]
        shape = ",".join(map(str, info.shape))
        running.update(f"{key}\0{info.dtype.name}\0{shape}\0".encode("utf-8", "surrogatepass"))
        for begin in range(0, info.nbytes, _STEP):
            running.update(checkpoint.read(key, begin, min(begin + _STEP, info.nbytes)))
    digest = running.hexdigest()
    if cache is not None:
        cache.put(files[0], "tensors", digest)
    return digest


def cache_path(environment: Mapping[str, str] = os.environ) -> Path:
    """Where hashes are remembered: ``REMELT_CACHE``, or ``remelt`` in the user's folder of caches."""
    if "REMELT_CACHE" in environment:
        return Path(environment["REMELT_CACHE"]) / "hashes.sqlite"
    if sys.platform == "win32":
        base = Path(environment.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "remelt" / "hashes.sqlite"


def find_by_hash(digest: str, folders: Sequence[Path]) -> Path | None:
    """The model with this content beside the recipe or in the models folders; what is not remembered is hashed.

    Files whose hashes are remembered are looked at first.
    """
    cache = HashCache()
    unknown: list[Path] = []
    for path in dict.fromkeys(find_models(folders)):
        known = cache.get(path, "file") if path.is_file() else None
        if known == digest.lower():
            return path
        if known is None:
            unknown.append(path)
    for path in unknown:
        try:
            with open_checkpoint(path) as checkpoint:
                if content_hash(checkpoint) == digest.lower():
                    return path
        except FormatError:
            continue
    return None


class HashCache:
    """Hashes by path, valid while a file's size, times of change and identity stay.

    A cache that cannot be read or written costs time and nothing else.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_path()

    def get(self, path: Path, kind: str) -> str | None:
        """The hash of a file as it is now, where it is remembered."""
        with contextlib.suppress(sqlite3.Error, OSError), self._opened() as connection:
            query = "SELECT stamp, digest FROM hashes WHERE path = ? AND kind = ?"
            row = connection.execute(query, (str(path.resolve()), kind)).fetchone()
            if row is not None and row[0] == _stamp(path):
                return str(row[1])
        return None

    def put(self, path: Path, kind: str, digest: str) -> None:
        """Remember a hash."""
        with contextlib.suppress(sqlite3.Error, OSError), self._opened() as connection:
            statement = "INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?)"
            connection.execute(statement, (str(path.resolve()), kind, _stamp(path), digest))

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=5)
        try:
            with connection:
                connection.execute(_SCHEMA)
                yield connection
        finally:
            connection.close()


def _stamp(path: Path) -> str:
    found = path.stat()
    changed = 0 if os.name == "nt" else found.st_ctime_ns
    return f"{found.st_size} {found.st_mtime_ns} {changed} {found.st_ino}"
