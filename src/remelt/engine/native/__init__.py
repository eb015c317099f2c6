"""The native executor: runs programs of elementwise primitives at the speed of memory, where it could be built.

Read ``language.h`` first: operations, instructions, calls. ``program.c`` checks programs, ``interpreter.c`` runs them
block by block, ``stages.c`` moves bytes between files and blocks; ``operations.h`` holds the operations, written once
over the vectors of ``lanes_plain.h``, ``lanes_avx2.h`` and ``lanes_avx512.h``. ``_native.pyi`` says what Python sees:
``module.c``, with ``memory.c`` for what callers bring, ``objects.c`` for programs and reports, ``calls.c`` for calls.
Where `available` says no, its names are absent.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from remelt.core.checksum import PLACES

NUMBER_A, NUMBER_B, NUMBER_C = 1, 2, 4
"""Flags of an instruction: that operand is an index into the numbers, not a register."""
WITH_CHECKSUM = 8
"""Flag of a store: the report holds what its bytes add to their tensor's checksum."""

_absence: str | None = None
if TYPE_CHECKING or os.environ.get("REMELT_NATIVE") != "0":
    try:
        from remelt.engine.native._native import (
            BLOCK as BLOCK,
        )
        from remelt.engine.native._native import (
            CHUNK as CHUNK,
        )
        from remelt.engine.native._native import (
            FILES as FILES,
        )
        from remelt.engine.native._native import (
            OPERATIONS as OPERATIONS,
        )
        from remelt.engine.native._native import (
            ROW as ROW,
        )
        from remelt.engine.native._native import (
            TYPES as TYPES,
        )
        from remelt.engine.native._native import (
            Program as Program,
        )
        from remelt.engine.native._native import (
            Report as Report,
        )
        from remelt.engine.native._native import (
            capabilities as capabilities,
        )
        from remelt.engine.native._native import capability as _capability
        from remelt.engine.native._native import (
            inspect as inspect,
        )
        from remelt.engine.native._native import (
            run as run,
        )
        from remelt.engine.native._native import (
            set_places,
        )
        from remelt.engine.native._native import (
            use as use,
        )

        set_places(PLACES.astype("<u8"))
    except ImportError as problem:
        missing = problem.name == f"{__name__}._native" and problem.path is None
        _absence = "built without a C compiler" if missing else f"cannot be loaded: {problem}"
else:
    _absence = "switched off by REMELT_NATIVE=0"


def available() -> bool:
    """Whether the extension was built, can be loaded, and is not switched off by ``REMELT_NATIVE=0``."""
    return _absence is None


def capability() -> str:
    """The instruction set that runs: ``avx512``, ``avx2`` or ``plain``; ``absent: REASON`` where nothing does."""
    return _capability() if _absence is None else f"absent: {_absence}"
