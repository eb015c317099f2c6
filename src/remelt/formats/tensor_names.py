"""Names of tensors: what a name may be, and how one stands in a message, as files may call their tensors anything."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath

LONGEST_NAME = 4096
"""Characters of a tensor's name at most where a name is put together from nested ones."""
_SHOWN = 120


def shown(name: object) -> str:
    """A name or value from a file, quoted for a message: escapes for what is not printable, and never a long text.

    >>> shown("a" * 1000)[-40:]
    "aaaaaaaaaaaaaaa'... (of 1000 characters)"
    """
    text = name if isinstance(name, str) else _described(name)
    cut = text[:_SHOWN]
    quoted = repr(cut) if isinstance(name, str) else cut
    return quoted if len(text) <= _SHOWN else f"{quoted}... (of {len(text)} characters)"


def is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8: halves of surrogate pairs cannot.

    >>> is_text("gewicht.ä"), is_text("\\ud800")
    (True, False)
    """
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def stays_inside(name: str) -> bool:
    """Whether a relative path from a file stays in the folder it is taken from, on any system.

    >>> stays_inside("unet/model.safetensors"), stays_inside("../model.safetensors"), stays_inside("c:model")
    (True, False, False)
    """
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    plain = not windows.drive and not windows.root and not posix.is_absolute()
    return bool(name) and plain and ".." not in windows.parts and ".." not in posix.parts and "\0" not in name


def _described(value: object) -> str:
    """A JSON value; containers by their size only, as they may nest deeply or be long."""
    if isinstance(value, (list, tuple, dict)):
        return repr(value) if len(value) <= 8 and not any(_is_long(item) for item in value) else f"{len(value)} values"
    try:
        return repr(value)
    except ValueError:
        return "a number of thousands of digits"


def _is_long(value: object) -> bool:
    return isinstance(value, (list, tuple, dict)) or len(_described(value)) > _SHOWN
