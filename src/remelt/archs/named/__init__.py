"""The archs that people know by name, one TOML file each."""

from __future__ import annotations

from pathlib import Path

ARCH_FILES = sorted(Path(__file__).parent.glob("*.toml"))
