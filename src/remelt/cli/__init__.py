"""The command line: one file a command, each loaded when it is called, so that help never waits for torch.

Read `main` (commands, errors, exit codes), `options` (what several commands share), `output` (text, tables, JSON).
"""

from __future__ import annotations

from remelt.cli.main import main

__all__ = ["main"]
