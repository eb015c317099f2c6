"""How recipes of 100,000 calls, and of 1,000 stacked diamonds, fare from their text to a file, on tiny tensors.

python benchmarks/scale.py
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import remelt as rm

CALLS = 100_000
DIAMONDS = 1_000


def main() -> None:
    """Print the seconds of each stage."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, model in enumerate("ab"):
            drawn = torch.Generator().manual_seed(seed)
            save_file({"w": torch.randn(8, generator=drawn)}, folder / f"{model}.safetensors")
        chain = ["version 1", 'a = model("a")', 'b = model("b")', "x0 = weighted_sum(a, b, alpha=0.5)"]
        chain += [f"x{i + 1} = weighted_sum(x{i}, b, alpha=0.0001)" for i in range(CALLS - 1)]
        diamonds = ["version 1", 'x0 = model("a")']
        diamonds += [f"x{i + 1} = weighted_sum(x{i}, x{i})" for i in range(DIAMONDS)]
        for title, lines in (("100,000 chained calls", chain), ("1,000 diamonds", diamonds)):
            last = lines[-1].partition(" ")[0]
            path = folder / "recipe.mecha"
            path.write_text("\n".join([*lines, last]) + "\n")
            print(title)
            recipe = timed("  read the text", lambda path=path: rm.deserialize(path.read_text()))  # type: ignore[misc]
            timed("  plan and run the graph, to memory", lambda recipe=recipe: run(recipe, folder))  # type: ignore[misc]
            timed("  text to file, all of it", lambda path=path: rm.merge(path, output=folder / "o", overwrite=True))  # type: ignore[misc]
            timed("  write the text", lambda recipe=recipe: rm.serialize(recipe))  # type: ignore[misc]


def run(recipe: Any, folder: Path) -> Any:
    """Merge to memory, with models found in a folder."""
    return rm.merge(recipe, models_dirs=[folder])


def timed(title: str, do: Callable[[], Any]) -> Any:
    """Print the seconds that something takes; what it gives."""
    begun = time.perf_counter()
    result = do()
    print(f"{title:<40} {time.perf_counter() - begun:6.2f} s")
    return result


if __name__ == "__main__":
    main()
