"""The known names nearest to a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """At most ``count`` of the known names that resemble ``name``, best first.

    >>> nearest("alhpa", ["alpha", "beta"])
    ['alpha']
    """
    by_folded: dict[str, str] = {}
    for candidate in known:
        by_folded.setdefault(candidate.casefold(), candidate)
    return [by_folded[match] for match in difflib.get_close_matches(name.casefold(), by_folded, n=count, cutoff=0.6)]


def nearest_hint(name: str, known: Iterable[str]) -> str | None:
    """The sentence that offers those names, or None where nothing resembles it.

    >>> nearest_hint("alhpa", ["alpha", "beta"])
    "did you mean 'alpha'?"
    """
    found = nearest(name, known)
    if not found:
        return None
    return f"did you mean {' or '.join(repr(candidate) for candidate in found)}?"
