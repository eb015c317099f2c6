"""Everything a developer runs, with nothing but Python: the environment is made and kept by this script.

python dev.py demo                the demonstration on handwritten digits
python dev.py test [--slow] ...   the tests; further arguments go to pytest
python dev.py check               ruff, mypy and the import contracts
python dev.py benchmark ...       how long merges take; arguments go to benchmarks/merge.py
python dev.py docs [--serve]      the documentation, as a folder or as a page that follows the edits
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
OLDEST = (3, 11)
MOST_WORKERS = 4


def main(arguments: Sequence[str]) -> int:
    """Run one command; its exit code."""
    parser = argparse.ArgumentParser(prog="dev.py", description="Develop remelt.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help="merge two small networks and compare their accuracy")
    test = commands.add_parser("test", help="run the tests; further arguments go to pytest")
    test.add_argument("--slow", action="store_true", help="also the slow ones")
    commands.add_parser("check", help="ruff, mypy and the import contracts")
    commands.add_parser("benchmark", help="how long merges take; further arguments go to benchmarks/merge.py")
    docs = commands.add_parser("docs", help="build the documentation")
    docs.add_argument("--serve", action="store_true", help="show it, and follow the edits")
    given, further = parser.parse_known_args(arguments)
    if further and given.command not in ("test", "benchmark"):
        parser.error(f"{given.command} takes no {' '.join(further)}")
    if sys.version_info < OLDEST:
        sys.exit(f"remelt needs Python {'.'.join(map(str, OLDEST))} or newer, but this is {sys.version.split()[0]}")
    install("test" if given.command == "benchmark" else given.command)
    if given.command == "demo":
        return run("examples/digits/demo.py")
    if given.command == "test":
        workers = str(min(os.cpu_count() or 1, MOST_WORKERS))
        slow = ["--slow"] if given.slow else []
        return run("-m", "pytest", "-n", workers, "--dist", "worksteal", *slow, *further)
    if given.command == "benchmark":
        return run("benchmarks/merge.py", *further)
    if given.command == "docs":
        return run("-m", "mkdocs", *(["serve"] if given.serve else ["build", "--strict"]))
    return check()


def check() -> int:
    """All checks, also after one that fails, so that everything is seen at once."""
    results = [
        run("-m", "ruff", "check", "."),
        run("-m", "ruff", "format", "--check", "."),
        run("-m", "mypy"),
        run("-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"),
    ]
    return max(results)


def install(extra: str) -> None:
    """Make the environment, and install what one command needs; nothing where that is up to date."""
    if not PYTHON.exists():
        say(f"making {ENVIRONMENT.name}")
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
    stamp = ENVIRONMENT / f"remelt-{extra}.stamp"
    state = fingerprint()
    if stamp.exists() and stamp.read_text() == state:
        return
    say(f"installing remelt with what '{extra}' needs; the first time this takes some minutes")
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt")
    code = run(*pip, "-e", f".[{extra}]")
    if code != 0:
        sys.exit(f"the installation failed with code {code}; once it is mended, run this again")
    stamp.write_text(state)


def fingerprint() -> str:
    """What the installation depends on: declared packages, their constraints, sources in C, the version of Python."""
    digest = hashlib.sha256(sys.version.encode())
    native = sorted((ROOT / "src/remelt/engine/native").glob("*.[ch]"))
    for file in (ROOT / "pyproject.toml", ROOT / "constraints.txt", ROOT / "setup.py", *native):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def run(*words: str) -> int:
    """Run the environment's Python in the project's folder."""
    say(" ".join(("python", *words)))
    return subprocess.run([str(PYTHON), *words], cwd=ROOT, check=False).returncode


def say(line: str) -> None:
    """Tell what is done, before what it prints itself."""
    print(f"> {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
