"""Speed and memory of merge methods: thresholds against sorting, truncated ranks against a full SVD, large tensors.

    python benchmarks/methods.py --markdown
    python benchmarks/methods.py --rows memory --folder FOLDER

Every ratio is of one run. ``memory`` merges tensors of 1 GiB with a budget of 256 MiB, by each method that streams, in
a process of its own, and tells the most anonymous memory beside an idle interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import remelt as rm
from remelt.methods import METHODS
from remelt.recipe.method import Method
from remelt.recipe.node import Call, Model, Value
from remelt.testing import Case

BUDGET = 256 * 2**20
GIB = 2**30
_BY_HAND: dict[str, dict[str, Any]] = {"cast": {"dtype": "fp16"}}


def timed(function: Callable[[], Any], repeat: int) -> float:
    """The median of some runs, after one that does not count."""
    function()
    found = []
    for _ in range(repeat):
        begun = perf_counter()
        function()
        found.append(perf_counter() - begun)
    return statistics.median(found)


def thresholds(repeat: int) -> Iterator[dict[str, Any]]:
    """Trimming a difference, whole merges of it, against sorting its magnitudes once."""
    size = 4 * 10**7
    values = torch.randn(size, generator=torch.Generator().manual_seed(0))
    sorting = timed(lambda: torch.sort(values.abs()), repeat)
    recipe = METHODS["trim"](rm.model({"w": values}, space="delta"), k=0.2)
    for executor in ("native", "torch"):
        os.environ["REMELT_EXECUTOR"] = executor
        ours = timed(lambda: rm.merge(recipe, threads=2), repeat)
        yield {"case": f"trim of 4e7 elements ({executor})", "ours": ours, "against": f"torch.sort: {sorting:.2f} s",
               "ratio": sorting / ours, "target": "at least 20"}  # fmt: skip
    os.environ.pop("REMELT_EXECUTOR")


def ranks(repeat: int) -> Iterator[dict[str, Any]]:
    """Rank 64 of a 1280 x 5120 matrix with a spectrum like that of a fine-tune's difference."""
    drawn = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(1280, 1280, generator=drawn))
    right, _ = torch.linalg.qr(torch.randn(5120, 1280, generator=drawn))
    delta = (left * torch.arange(1, 1281).float().pow(-0.7)) @ right.T
    svd = timed(lambda: torch.linalg.svd(delta, full_matrices=False), repeat)
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    best = (u[:, :64] * s[:64]) @ v[:64]
    least = float((delta.double() - best).norm())
    for name, values, target in (
        ("truncate_rank_randomised", {"rank": 64}, "at least 12, excess error below 1 %"),
        ("truncate_rank", {"rank": 64}, "at least 3, exact to 1e-6"),
    ):
        method = METHODS[name]
        case = Case.of(method, values)
        ours = timed(lambda case=case: case.apply([delta]), repeat)  # type: ignore[misc]
        found = case.apply([delta.double()])
        error = float((delta.double() - found).norm()) / least - 1.0
        away = float((found - best).norm() / best.norm())
        yield {
            "case": f"{name}, rank 64 of 1280 x 5120",
            "ours": ours,
            "against": f"linalg.svd: {svd:.2f} s",
            "ratio": svd / ours,
            "target": target,
            "note": f"excess error {error:.2e}, from the best {away:.1e}",
        }


_TALL = ("rotate", "truncate_rank", "truncate_rank_randomised")
"""Methods that stream matrices which are far higher than wide."""


def streaming_methods() -> list[Method[..., Any]]:
    """Every method whose tensors need not be whole."""
    cuts = {name: METHODS[name].declaration.cut for name in METHODS}
    return [METHODS[name] for name in sorted(METHODS) if cuts[name] in ("element", "row") or name in _TALL]


def files_of(method: Method[..., Any], folder: Path) -> list[Path]:
    """The models that a method is run on."""
    shape = "tall" if method.name in _TALL else "large"
    return [folder / f"{shape}-{number}.safetensors" for number in range(3)]


_MASKED = ("multiply", 1)
"""The operand that is a mask, where any space is allowed."""


def recipe_of(method: Method[..., Any], files: Sequence[Path]) -> Call:
    """A call of a method on as many models as it takes, in the spaces that it takes."""
    case = Case.of(method, _BY_HAND.get(method.name, {}))
    spaces = {"delta": "delta", "weight": "weight", "mask": "param", "any": "delta", "same": "weight"}
    args, kwargs = case.arguments(
        [
            Model(
                str(files[place % len(files)]),
                space="param" if (method.name, place) == _MASKED else spaces[parameter.kind],
            )
            for place, parameter in enumerate(case.slots)
        ]
    )
    given = [arg if isinstance(arg, Model) else Value(arg) for arg in args]
    plain = ((name, one if isinstance(one, Model) else Value(one)) for name, one in kwargs.items())
    call = Call(method.name, tuple(given), tuple(plain))
    return call if method.returns != "mask" else Call("multiply", (Model(str(files[0]), space="delta"), call))


def memory(folder: Path, only: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The most anonymous memory of merging tensors of 1 GiB with a budget of 256 MiB."""
    chosen = [one for one in streaming_methods() if not only or one.name in only]
    wanted = [(one.name in _TALL, file) for one in chosen for file in files_of(one, folder)]
    for number, (tall, file) in enumerate(wanted):
        if not file.exists():
            drawn = np.random.default_rng(number)
            rows = [torch.from_numpy(drawn.standard_normal(2**22, dtype=np.float32)).half() for _ in range(128)]
            save_file({"w": torch.cat(rows).reshape((2**19, 2**10) if tall else (2**14, 2**15))}, file)
    for method in chosen:
        found = subprocess.run(
            [sys.executable, __file__, "--one", method.name, "--folder", str(folder)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if found.returncode:
            yield {"case": method.name, "note": found.stderr.strip().splitlines()[-1]}
            continue
        told = json.loads(found.stdout)
        yield {"case": method.name, "ours": told["seconds"], "memory": told["peak"], "met": told["peak"] <= BUDGET}


def one(name: str, folder: Path) -> dict[str, Any]:
    """Merge by one method, and tell the time and the memory."""
    import threading

    def anonymous() -> int:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))

    recipe = recipe_of(METHODS[name], files_of(METHODS[name], folder))
    idle, most, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], anonymous())

    threading.Thread(target=watch, daemon=True).start()
    begun = perf_counter()
    rm.merge(recipe, folder / "out.safetensors", threads=2, memory=BUDGET, overwrite=True, nonfinite="keep")
    seconds = perf_counter() - begun
    done.set()
    return {"seconds": seconds, "peak": max(most[0], anonymous()) - idle}


def markdown(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The rows as a table."""
    yield "| case | time | against | ratio | target | memory, MiB | |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        time = f"{row['ours']:.3f} s" if "ours" in row else ""
        ratio = f"{row['ratio']:.1f}" if "ratio" in row else ""
        held = f"{row['memory'] / 2**20:.0f}" if "memory" in row else ""
        cells = (row["case"], time, row.get("against", ""), ratio, row.get("target", ""), held, row.get("note", ""))
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure merge methods.")
    parser.add_argument("--rows", default="thresholds,ranks,memory", help="of thresholds, ranks, memory")
    parser.add_argument("--methods", default="", help="for memory: these alone, between commas")
    parser.add_argument("--folder", type=Path, help="where tensors of 1 GiB are made, and found again")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(2)
    if given.one:
        print(json.dumps(one(given.one, given.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = []
        for name in given.rows.split(","):
            made = {
                "thresholds": lambda: thresholds(given.repeat),
                "ranks": lambda: ranks(given.repeat),
                "memory": lambda: memory(folder, [one for one in given.methods.split(",") if one]),
            }[name]()
            for row in made:
                rows.append(row)
                print(json.dumps(row), file=sys.stderr)
        if given.markdown:
            print("\n".join(markdown(rows)))


if __name__ == "__main__":
    main()
