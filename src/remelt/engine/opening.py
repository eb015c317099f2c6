"""Opening a file of ours under its name, and never, through a link that lies there, a file of somebody else's."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def open_own(path: Path, flags: int) -> int:
    """A descriptor of the file, made where there is none; a symbolic or hard link that lies there is removed first."""
    try:
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink > 1):
            os.unlink(path)
    except FileNotFoundError:
        pass
    flags |= os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    return os.open(path, flags, 0o666)
