"""A coverage-guided fuzzer over one target: python tests/fuzz/run.py TARGET [libFuzzer options] [corpus folders]."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))
with atheris.instrument_imports(include=["remelt.formats", "remelt.text", "remelt.recipe"]):
    from targets import TARGETS

atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]])
atheris.Fuzz()
