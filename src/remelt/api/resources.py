"""What the machine has: memory that may be used, cores, free disk."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

from remelt.errors import OptionError

_CGROUP = Path("/sys/fs/cgroup")
_UNKNOWN = 4 * 2**30


def available_memory() -> int:
    """Bytes of memory that could be taken now, cgroup limits included; 4 GiB where the system does not tell."""
    if sys.platform == "win32":
        found = _windows_memory()
    elif sys.platform == "darwin":
        found = _macos_memory()
    else:
        found = _linux_memory()
    return found or _UNKNOWN


def _linux_memory() -> int | None:
    amounts = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                amounts.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError, IndexError):
        pass
    amounts += [room for folder in _cgroups() if (room := _room(folder)) is not None]
    return max(min(amounts), 0) if amounts else None


def _cgroups() -> list[Path]:
    """The folders of this process's control group and of those above it, for memory."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    folders = [_CGROUP, _CGROUP / "memory"]
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers in ("", "memory"):
            top = _CGROUP / controllers
            folders += [top / part for part in (Path(path.lstrip("/")), *Path(path.lstrip("/")).parents)]
    return list(dict.fromkeys(folders))


def _room(folder: Path) -> int | None:
    """What a control group may still take; pages of files count as free, as they are let go when memory is short."""
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            room = int((folder / limit).read_text()) - int((folder / used).read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        return room + sum(int(counts.get(f"{kind}_file", 0)) for kind in ("inactive", "active"))
    return None


def _macos_memory() -> int | None:
    try:
        total = subprocess.run(["sysctl", "-n", "hw.memsize"], capture_output=True, text=True, timeout=5, check=True)
        return int(total.stdout) // 2
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


class _MemoryStatus(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
        (name, ctypes.c_ulonglong)
        for name in ("total", "available", "page_total", "page_available", "virtual", "virtual_available", "extended")
    ]


def _windows_memory() -> int | None:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009  (absent elsewhere, to the type checker too)
    return int(status.available) if kernel.GlobalMemoryStatusEx(ctypes.byref(status)) else None


def refuse_device(name: str) -> None:
    """Raise `OptionError` where torch cannot compute on a device here."""
    if name == "cpu":
        return
    import torch

    kind, _, index = name.partition(":")
    backend = torch.backends.mps if kind == "mps" else getattr(torch, kind)
    count = 0 if not backend.is_available() else 1 if kind == "mps" else backend.device_count()
    if int(index or 0) >= count:
        found = f"{count} such" if count else "none such"
        raise OptionError(f"device {name} is not here: this torch sees {found}", hint="remelt doctor lists the devices")


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def nearest_folder(path: Path) -> Path:
    """The path, or the nearest above it that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def free_disk(path: Path) -> int | None:
    """Free bytes where a path is or will be; None where that cannot be told."""
    try:
        return shutil.disk_usage(nearest_folder(path)).free
    except OSError:
        return None
