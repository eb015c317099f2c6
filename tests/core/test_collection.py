"""Collections of garbage are set aside, and set back."""

from __future__ import annotations

import gc
import subprocess
import sys

from remelt.core.collection import collection_paused

RARE = """
import gc
from remelt.core.collection import collection_rare
before = gc.get_threshold()
with collection_rare():
    assert gc.isenabled() and gc.get_threshold() > before
    held = [[] for _ in range(1000)]
assert gc.get_threshold() == before
print(gc.get_freeze_count())
"""


def test_a_pause_ends_as_it_began() -> None:
    assert gc.isenabled()
    with collection_paused():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_what_a_process_still_holds_is_not_gone_through_at_its_end() -> None:
    done = subprocess.run([sys.executable, "-c", RARE], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 1000
