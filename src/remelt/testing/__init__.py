"""Conformance suites that ship with remelt: an extension inherits one, supplies one fixture, and is checked.

`methods` checks merge methods: everything that a method declares, by itself and in the real engine. `cases` makes the
arguments, `trials` what they are tried on, `laws` tells what is broken, `live` counts memory, `merging` runs the
engine. Only here is pytest imported.
"""

from __future__ import annotations

from remelt.testing.cases import Case
from remelt.testing.methods import MethodConformance

__all__ = ["Case", "MethodConformance"]
