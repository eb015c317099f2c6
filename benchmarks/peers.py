"""The other tools: which of them are here, and how each is called at its best."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recipes import KEPT

MERGEKIT_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "lazy": ("--lazy-unpickle",),
    "low-cpu-memory": ("--low-cpu-memory",),
    "async write": ("--async-write",),
    "lazy, async write": ("--lazy-unpickle", "--async-write"),
}
"""Each is tried once on each recipe; the quickest is measured."""

VERSION = "import importlib.metadata as m; print(m.version({!r}))"


@dataclass
class Peers:
    """The interpreters that have the other tools; None for a tool that is not to be run."""

    sd_mecha: str | None
    mergekit: str | None
    versions: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def look(self) -> None:
        """Ask the interpreters for the versions of the tools."""
        for tool, package, interpreter in (
            ("sd-mecha", "sd-mecha", self.sd_mecha),
            ("mergekit", "mergekit", self.mergekit),
        ):
            version = None if interpreter is None else version_of(package, interpreter)
            if version is None:
                self.missing[tool] = f"no {tool} here"
            else:
                self.versions[tool] = version


def version_of(package: str, interpreter: str) -> str | None:
    """The version of a package that an interpreter has."""
    try:
        asked = subprocess.run(
            [interpreter, "-c", VERSION.format(package)], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None


def mergekit_command(interpreter: str, config: Path, output: Path, setting: str, threads: int) -> list[str]:
    """The command line of mergekit. Tokenizers are left out: the models have none."""
    return [
        interpreter, "-m", "mergekit.scripts.run_yaml", str(config), str(output),
        "--no-copy-tokenizer", "--no-write-model-card", "--quiet",
        "--num-threads", str(threads), *MERGEKIT_SETTINGS[setting],
    ]  # fmt: skip


def mergekit_config(recipe: str, models: Sequence[Path]) -> str:
    """The YAML of a recipe; computed in the models' own bf16, which is the quickest."""
    if recipe == "linear":
        return "merge_method: linear\n" + _models(models, {"weight": 0.5}) + "dtype: bfloat16\n"
    if recipe == "slerp":
        head = f"merge_method: slerp\nbase_model: {models[0]}\n"
        return head + _models(models, {}) + "parameters:\n  t: 0.3\ndtype: bfloat16\n"
    assert recipe == "ties_trimmed", recipe
    *others, base = models
    head = f"merge_method: ties\nbase_model: {base}\n"
    return head + _models(others, {"weight": 1.0, "density": KEPT}) + "dtype: bfloat16\n"


def _models(models: Sequence[Path], parameters: Mapping[str, float]) -> str:
    lines = ["models:"]
    for path in models:
        lines.append(f"  - model: {path}")
        if parameters:
            lines.append("    parameters:")
            lines += [f"      {name}: {value}" for name, value in parameters.items()]
    return "\n".join(lines) + "\n"
