"""How long alignment takes: sweeps over SDXL beside their multiplications alone, margins, and the usual procedure.

    python benchmarks/rebasin.py --rows block --markdown
    python benchmarks/rebasin.py --rows sweep,unrelated,margins --folder FOLDER     two files of SDXL, 14 GB

Every ratio is of one run. A sweep and the bare products of the same matrices take turns, group by group, so that what
disturbs the machine disturbs both. Memory is the most anonymous memory beside what there was before.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from usual_matching import match_as_usual

from remelt.alignment.margins import find_margins
from remelt.alignment.matching import match, visits
from remelt.alignment.products import free_levels, width_of_row
from remelt.alignment.weights import Weights
from remelt.api.alignment import CheckpointWeights
from remelt.archs.axes.find import axis_groups
from remelt.archs.axis_groups import AxisGroup
from remelt.archs.shapes import sdxl_shapes
from remelt.formats.checkpoint import open_checkpoint

MIB = 2**20
NOISE = 0.05
"""What a fine-tune-like model differs by, as a share of the deviation of each tensor."""
COLUMNS = 2**23
PARTS = ("model.diffusion_model.", "conditioner.")
BLOCK = "model.diffusion_model.middle_block."


class Memory:
    """The most anonymous memory of this process while it is watched, above what there was."""

    def __enter__(self) -> Memory:
        gc.collect()
        self.start = self.most = anonymous()
        self.watched = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.watched.is_set():
            self.most = max(self.most, anonymous())
            sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self.watched.set()
        self.thread.join()

    @property
    def mib(self) -> float:
        """In MiB."""
        return (self.most - self.start) / MIB


def anonymous() -> int:
    """Bytes of memory of this process that no file stands behind."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def product_sizes(groups: Sequence[AxisGroup], weights: Weights) -> dict[str, list[tuple[int, int, int]]]:
    """For each group what a sweep multiplies: how many matrices, their rows, and their columns."""
    found: dict[str, list[tuple[int, int, int]]] = {}
    for group in groups:
        sizes = []
        for window in group.windows:
            levels = free_levels(group, window)
            if levels:
                cells = group.by_name[levels[0]].cells if len(levels) == 1 else ()
                rows, columns = math.prod(group.shape(levels)), width_of_row(group, window, weights)
                sizes.append((max(len(cells), 1), rows // max(len(cells), 1), columns))
        found[group.name] = sizes
    return found


def operations(sizes: Sequence[tuple[int, int, int]]) -> float:
    """Floating-point operations of the products."""
    return sum(2.0 * count * rows * rows * columns for count, rows, columns in sizes)


def bare(sizes: Sequence[tuple[int, int, int]]) -> float:
    """Seconds of the products alone, of matrices of float32 in memory."""
    took = 0.0
    for count, rows, columns in sizes:
        step = min(max(COLUMNS // (count * rows), 1), columns)
        left, right = (torch.ones(rows, step) for _ in range(2))
        whole = torch.zeros(rows, rows)
        begun = perf_counter()
        for _ in range(count):
            for start in range(0, columns, step):
                length = min(step, columns - start)
                whole.addmm_(left[:, :length], right[:, :length].T)
        took += perf_counter() - begun
    return took


def sweep(reference: Weights, model: Weights, groups: Sequence[AxisGroup], name: str, target: float) -> dict[str, Any]:
    """One dense sweep beside its products; the first of a descent from the identity."""
    sizes, ours, alone, asked, most = product_sizes(groups, model), 0.0, 0.0, 0, 0.0
    found = visits(reference, model, groups, start="identity")
    while True:
        with Memory() as memory:
            visit = next(found, None)
        if visit is None or visit.sweep > 0:
            break
        most = max(most, memory.mib)
        ours, asked = ours + visit.seconds, asked + visit.asked
        alone += bare(sizes[visit.group.name])
        if sys.stderr.isatty() or visit.pending % 50 == 0:
            print(f"{name}: {visit.pending} groups left, {ours:.0f} s, products {alone:.0f} s", file=sys.stderr)
    total = sum(operations(one) for one in sizes.values())
    return {
        "case": f"{name}, {total / 1e12:.1f} TFLOP", "seconds": ours, "against": alone, "what": "products alone",
        "ratio": ours / alone, "target": f"at most {target}", "memory": most, "asked": asked,
    }  # fmt: skip


def margins_row(reference: Weights, model: Weights, groups: Sequence[AxisGroup], dense: float) -> dict[str, Any]:
    """A fine-tune with margins that are at hand, against the dense sweep of this run, in seconds."""
    begun = perf_counter()
    margins = find_margins(reference, groups)
    once = perf_counter() - begun
    begun = perf_counter()
    with Memory() as memory:
        found = match(reference, model, groups, margins=margins)
    took = perf_counter() - begun
    return {
        "case": f"with margins (found once in {once:.0f} s), {len(found.certified)} of {len(groups)} groups certified",
        "seconds": took, "against": dense, "what": "dense sweep", "ratio": dense / took, "target": "at least 5",
        "memory": memory.mib,
    }  # fmt: skip


def block(folder: Path, repeat: int) -> Iterator[dict[str, Any]]:
    """SDXL's middle block against the usual procedure, each in a process of its own."""
    shapes = {key: info.shape for key, info in sdxl_shapes().items() if key.startswith(BLOCK)}
    files = [folder / f"block-{number}.safetensors" for number in range(2)]
    generator = torch.Generator().manual_seed(0)
    ours = {key: torch.randn(shape, generator=generator).mul_(0.02).half() for key, shape in shapes.items()}
    save_file(ours, files[0])
    save_file(tuned(ours, generator), files[1])
    runs: dict[str, list[tuple[float, float]]] = {}
    for _ in range(repeat):
        for name in ("usual", "dense", "margins"):
            runs.setdefault(name, []).append(apart(_align_block, name, files))
    times = {name: sorted(one[0] for one in some)[len(some) // 2] for name, some in runs.items()}
    memory = {name: max(one[1] for one in some) for name, some in runs.items()}
    for name, target in (("dense", "at least 1.5"), ("margins", "at least 5")):
        yield {
            "case": f"middle block, {name}", "seconds": times[name], "against": times["usual"], "what": "as usual",
            "ratio": times["usual"] / times[name], "target": target, "memory": memory[name],
            "memory_of_usual": memory["usual"], "memory_ratio": memory["usual"] / max(memory[name], 1e-9),
        }  # fmt: skip


def block_groups() -> tuple[AxisGroup, ...]:
    """The groups whose tensors all lie in the middle block."""
    shapes = {key: info.shape for key, info in sdxl_shapes().items()}
    return tuple(
        group
        for group in axis_groups("sdxl", shapes)
        if not group.is_fixed and all(window.key.startswith(BLOCK) for window in group.windows)
    )


def _align_block(name: str, files: Sequence[Path]) -> tuple[float, float]:
    groups = block_groups()
    torch.ones(512, 512) @ torch.ones(512, 512)
    if name == "usual":
        models = [load_file(file) for file in files]
        with Memory() as memory:
            begun = perf_counter()
            match_as_usual(*models, groups)
            return perf_counter() - begun, memory.mib
    with open_checkpoint(files[0]) as first, open_checkpoint(files[1]) as second:
        weights = CheckpointWeights(first), CheckpointWeights(second)
        margins = find_margins(weights[0], groups) if name == "margins" else None
        with Memory() as memory:
            begun = perf_counter()
            match(*weights, groups, margins=margins)
            return perf_counter() - begun, memory.mib


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def tuned(tensors: Mapping[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A model as if it were trained further: with noise."""
    found = {}
    for key, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        found[key] = (tensor.float() + NOISE * 0.02 * noise).to(tensor.dtype)
    return found


def sdxl_files(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """A reference, one that was tuned from it, and one that has nothing in common with it; made where they lack."""
    shapes = {key: info.shape for key, info in sdxl_shapes().items() if key.startswith(PARTS)}
    found = {name: folder / f"rebasin-{name}.safetensors" for name in names}
    for place, (name, path) in enumerate(found.items()):
        if path.exists():
            continue
        generator = torch.Generator().manual_seed(0 if name == "tuned" else place)
        model = {key: torch.randn(shape, generator=generator).mul_(0.02).half() for key, shape in shapes.items()}
        if name == "tuned":
            for tensor in model.values():
                tensor.add_(torch.randn(tensor.shape, generator=generator).half(), alpha=0.02 * NOISE)
        save_file(model, path.with_suffix(".making"))
        os.replace(path.with_suffix(".making"), path)
        del model
    return found


def whole(rows: Sequence[str], folder: Path, share: str) -> Iterator[dict[str, Any]]:
    """The rows of SDXL."""
    names = [
        "reference",
        *(["tuned"] if {"sweep", "margins"} & set(rows) else []),
        *(["unrelated"] if "unrelated" in rows else []),
    ]
    files = sdxl_files(folder, names)
    opened = {name: open_checkpoint(path) for name, path in files.items()}
    weights = {name: CheckpointWeights(one) for name, one in opened.items()}
    groups = [
        group
        for group in axis_groups("sdxl", weights["reference"].shapes)
        if not group.is_fixed and not group.crosses and share in group.name
    ]
    if {"sweep", "margins"} & set(rows):
        found = sweep(weights["reference"], weights["tuned"], groups, "SDXL, tuned", 1.15)
        yield found
        if "margins" in rows:
            yield margins_row(weights["reference"], weights["tuned"], groups, found["seconds"])
    if "unrelated" in rows:
        yield sweep(weights["reference"], weights["unrelated"], groups, "SDXL, unrelated", 3)
    for one in opened.values():
        one.close()


def main() -> None:
    """Run the rows that are asked for, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="block", help="block, sweep, margins (after a sweep), unrelated")
    parser.add_argument("--folder", type=Path, help="where the files of SDXL are kept")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--share", default="", help="only groups with this in their names")
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args()
    rows = given.rows.split(",")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        if "block" in rows:
            found += block(Path(scratch), given.repeat)
        if {"sweep", "unrelated", "margins"} & set(rows):
            found += whole(rows, given.folder or Path(scratch), given.share)
    if not given.markdown:
        print(json.dumps(found, indent=2))
        return
    print("| case | time | against | ratio | asked for | memory, MiB |\n|---|---|---|---|---|---|")
    for row in found:
        against = f"{row['against']:.2f} s ({row['what']})"
        memory = f"{row['memory']:.0f}" + (f" of {row['memory_of_usual']:.0f}" if "memory_of_usual" in row else "")
        cells = (row["case"], f"{row['seconds']:.2f} s", against, f"{row['ratio']:.2f}", row["target"], memory)
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
