"""One writer to one output: a lock that its owner's death releases."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path

from remelt.errors import OutputError


class OutputLock:
    """Holds an output for this process; raises `OutputError` where another one holds it.

    The system's lock on the lock file decides, so that a dead owner never stands in the way. Where a file system has
    no such locks, the owner that the file names does: if it runs no more, its lock is taken over.
    """

    def __init__(self, path: Path, output: Path) -> None:
        self.path = path
        self.output = output
        self._descriptor = self._acquire()

    def _acquire(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
        while True:
            if self.path.is_symlink():
                raise OutputError(f"cannot write {self.path}: it is a symbolic link", hint="remove it")
            try:
                descriptor = os.open(self.path, flags, 0o666)
            except OSError as error:
                raise OutputError(
                    f"cannot write {self.path}: {error.strerror}", hint="check the folder's permissions"
                ) from error
            try:
                self._hold(descriptor)
                if _same_file(descriptor, self.path):
                    os.ftruncate(descriptor, 0)
                    os.lseek(descriptor, 0, os.SEEK_SET)
                    os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # the owner before us removed the file meanwhile

    def _hold(self, descriptor: int) -> None:
        try:
            _system_lock(descriptor)
        except (BlockingIOError, PermissionError):
            raise self._refusal(_owner(descriptor)) from None
        except OSError:
            owner = _owner(descriptor)
            if owner is not None and _runs(*owner):
                raise self._refusal(owner) from None

    def _refusal(self, owner: tuple[int, str] | None) -> OutputError:
        who = "another process" if owner is None else f"process {owner[0]} on {owner[1]}"
        return OutputError(
            f"{self.output} is being written by {who}", hint="wait until it is done, or write to another output"
        )

    def release(self) -> None:
        """Give the output free."""
        if self._descriptor < 0:
            return
        if sys.platform != "win32":
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = -1
        if sys.platform == "win32":  # an open file cannot be removed there
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)


def _system_lock(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, 2**30, os.SEEK_SET)  # beyond the text, which others may read
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _owner(descriptor: int) -> tuple[int, str] | None:
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        process, host = os.read(descriptor, 512).decode().split()
        return int(process), host
    except (OSError, ValueError):
        return None


def _runs(process: int, host: str) -> bool:
    """Whether a process is alive; one on another host is taken to be."""
    if host != socket.gethostname():
        return True
    if sys.platform == "win32":  # os.kill would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return process != os.getpid()
