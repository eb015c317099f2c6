"""The real job on real data: two networks that each know half of the digits become one that knows them all.

A network is trained lightly on all ten digits, one copy is fine-tuned on 0 to 4 and another on 5 to 9. Each forgets the
digits that it no longer sees. Merging them with remelt takes no further training.
"""

from __future__ import annotations

import copy
import sys
import time
from itertools import product
from pathlib import Path

import torch
from network import DEPTH, Network, Split, accuracy, load_splits, train
from safetensors.torch import load_file, save_file

import remelt as rm
from remelt.recipe.node import Node

HERE = Path(__file__).resolve().parent
AMOUNTS = [0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0]


def main(folder: Path) -> None:
    """Train, save, merge, and print how each network does on digits that nobody has seen."""
    begun = time.monotonic()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # sums in one order, so that every run prints the same
    training, choosing, testing = load_splits()
    make_models(folder, training)

    half = rm.merge(HERE / "half.mecha", output=folder / "half.safetensors", models_dirs=[folder], overwrite=True)
    recipe = choose(folder, choosing)
    (folder / "better.mecha").write_text(rm.serialize(recipe), encoding="utf-8")
    better = rm.merge(folder / "better.mecha", output=folder / "better.safetensors", overwrite=True)

    print("accuracy on the test split, all ten digits")
    for title, path in (
        ("trained lightly on all digits (base)", folder / "base.safetensors"),
        ("fine-tuned on 0 to 4 (low)", folder / "low.safetensors"),
        ("fine-tuned on 5 to 9 (high)", folder / "high.safetensors"),
        ("merged, 50/50 (half.mecha)", half),
        ("merged, task vectors by block (better.mecha)", better),
    ):
        print(f"  {title:<46} {accuracy(load_file(path), testing):.3f}")
    print(f"\n{folder / 'better.mecha'}, its numbers chosen on the validation split:")
    print((folder / "better.mecha").read_text(encoding="utf-8"))
    print(f"{time.monotonic() - begun:.1f} s; the files are in {folder}")


def make_models(folder: Path, training: Split) -> None:
    """Write the base and its two fine-tuned copies."""
    folder.mkdir(parents=True, exist_ok=True)
    base = train(Network(), training.first(200), epochs=8, rate=1e-3, seed=0)
    save_file(base.state_dict(), folder / "base.safetensors")
    for seed, (name, chosen) in enumerate((("low", training.digits < 5), ("high", training.digits >= 5)), start=1):
        tuned = train(copy.deepcopy(base), training.only(chosen), epochs=30, rate=2e-3, seed=seed)
        save_file(tuned.state_dict(), folder / f"{name}.safetensors")


def choose(folder: Path, choosing: Split) -> Node:
    """The recipe that does best on the validation split: how much of each task vector, and of each in every block."""

    def score(low: list[float], high: list[float]) -> float:
        return accuracy(rm.merge(task_vectors(low, high), models_dirs=[folder]), choosing)

    _, low, high = max((score([a] * (DEPTH + 1), [b] * (DEPTH + 1)), a, b) for a, b in product(AMOUNTS, AMOUNTS))
    lows, highs = [low] * (DEPTH + 1), [high] * (DEPTH + 1)
    best = score(lows, highs)
    for amounts in (lows, highs):
        for place in range(DEPTH + 1):
            for amount in AMOUNTS:
                kept, amounts[place] = amounts[place], amount
                found = score(lows, highs)
                if found > best:
                    best = found
                else:
                    amounts[place] = kept
    return task_vectors(lows, highs)


def task_vectors(low: list[float], high: list[float]) -> Node:
    """What each copy learned, added back to the base: an amount for every block, the last one for all the rest."""

    def by_block(amounts: list[float]) -> object:
        weights = {f"blocks.{index}": amount for index, amount in enumerate(amounts[:-1]) if amount != amounts[-1]}
        return rm.blocks(weights) | amounts[-1] if weights else amounts[-1]

    base = rm.model("base")
    learned = rm.add_difference(base, rm.model("low") - base, alpha=by_block(low))
    return rm.add_difference(learned, rm.model("high") - base, alpha=by_block(high))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parents[1] / "demo")
