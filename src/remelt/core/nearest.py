"""The known names nearest to a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_BEHIND = 0.2
"""How much less a name may resemble than the best one."""


def nearest(name: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """At most ``count`` of the known names that resemble ``name``, best first; none that is far behind the best.

    >>> nearest("alhpa", ["alpha", "beta"])
    ['alpha']
    """
    by_folded: dict[str, str] = {}
    for candidate in known:
        by_folded.setdefault(candidate.casefold(), candidate)
    folded = name.casefold()
    matches = difflib.get_close_matches(folded, by_folded, n=count, cutoff=0.6)
    ratios = [difflib.SequenceMatcher(None, match, folded).ratio() for match in matches]
    return [by_folded[match] for match, ratio in zip(matches, ratios, strict=True) if ratio >= ratios[0] - _BEHIND]


def nearest_hint(name: str, known: Iterable[str]) -> str | None:
    """The sentence that offers those names, or None where nothing resembles it.

    >>> nearest_hint("alhpa", ["alpha", "beta"])
    "did you mean 'alpha'?"
    """
    found = nearest(name, known)
    if not found:
        return None
    return f"did you mean {' or '.join(repr(candidate) for candidate in found)}?"
