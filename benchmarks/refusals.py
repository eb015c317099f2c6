"""How long a malformed file takes to be refused: every case of the tests' corpus, the slowest first.

python benchmarks/refusals.py
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from remelt.errors import RemeltError
from remelt.formats.checkpoint import open_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "formats"))
import corpus
import corpus_of_archives

ROUNDS = 3
SHOWN = 12
TARGET = 0.050


def main() -> None:
    """Print the slowest refusals, the median, and how many stay under the target."""
    cases = [*corpus.safetensors_cases(), *corpus.folder_cases(), *corpus_of_archives.archive_cases()]
    taken: list[tuple[float, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(cases):
            path = Path(folder) / f"{number}.safetensors"
            built = case.build(path) or path
            taken.append((min(refuse(built) for _ in range(ROUNDS)), case.name))
    taken.sort(reverse=True)
    for seconds, name in taken[:SHOWN]:
        print(f"{1000 * seconds:8.2f} ms  {name}")
    quick = sum(seconds < TARGET for seconds, _ in taken)
    print(f"median {1000 * taken[len(taken) // 2][0]:.2f} ms; {quick} of {len(taken)} under {1000 * TARGET:.0f} ms")


def refuse(path: Path) -> float:
    """Seconds until a file is refused."""
    begun = time.perf_counter()
    try:
        open_checkpoint(path).close()
    except RemeltError:
        return time.perf_counter() - begun
    raise AssertionError(f"{path} was not refused")


if __name__ == "__main__":
    main()
