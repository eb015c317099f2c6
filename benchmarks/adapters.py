"""Applying adapters: a LoRA added to Stable Diffusion XL, held against a weighted sum of two models of that size.

    python benchmarks/adapters.py --folder FOLDER --markdown
    python benchmarks/adapters.py --small

The LoRA has all linear layers of the U-Net's transformers and of both text encoders. Merges run in turns, each in a
process of its own onto a fresh file; figures are medians. The files take 14 GB, and as much again while it runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from files import ModelFiles, make
from runner import REPORT, idle_with_torch, import_all, measured, no_sync

from remelt.adapters.extraction import lora_shapes
from remelt.adapters.written import Written
from remelt.archs.arch import find_arch
from remelt.archs.dialects import Spelling, from_original
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.formats.layout import file_layout

RANK, SMALL_RANK = 64, 4
RATIO, MORE_MEMORY = 1.5, 64 * 2**20
"""The targets: how many times as long as a weighted sum, and bytes above its peak."""

AGAINST = "weighted_sum"


def lora_infos(shapes: Mapping[str, TensorInfo], rank: int) -> dict[str, TensorInfo]:
    """The parts of a LoRA of that rank for a model, by kohya's names."""
    arch = find_arch("sdxl")
    assert arch is not None
    written = Written("kohya", arch)
    found: dict[str, TensorInfo] = {}
    for key, one in from_original(arch, Spelling("diffusers"), shapes).tensors.items():
        inside = ".transformer_blocks." in key if key.startswith("unet/") else ".encoder.layers." in key
        name = written.module(key)
        if name is None or not inside or len(one.info.shape) != 2:
            continue
        for part, shape in lora_shapes(one.info.shape, rank).items():
            if part != "alpha":  # without one, the product is taken as it is
                found[f"{name}.{written.parts()[part]}"] = TensorInfo(DType.F16, shape)
    return found


def lora_file(files: ModelFiles) -> Path:
    """The LoRA; it is made where it is not there."""
    rank = SMALL_RANK if files.small else RANK
    infos = lora_infos(files.shapes("sdxl"), rank)
    layout = file_layout(infos, {"format": "pt"}, f"{'small-' if files.small else ''}sdxl-lora-{rank}.safetensors")
    make(files.folder, layout, infos, seed=100)
    return files.folder / layout.name


def applied(models: Sequence[str], loras: Sequence[str], strengths: Sequence[float]) -> Any:
    """A recipe: the first model, and what adapters make of it."""
    import remelt
    from remelt.recipe.adapter import adapter

    found: Any = remelt.model(models[0])
    for lora, strength in zip(loras, strengths, strict=True):
        found = found + strength * adapter(lora)
    return found


def summed(models: Sequence[str]) -> Any:
    """A recipe: two models in equal parts."""
    import remelt

    return remelt.weighted_sum(remelt.model(models[0]), remelt.model(models[1]), alpha=0.5)


CASES: dict[str, Callable[[Sequence[str], str], Any]] = {
    AGAINST: lambda models, lora: summed(models),
    "one LoRA": lambda models, lora: applied(models, [lora], [0.8]),
}


def one(job: Mapping[str, Any]) -> dict[str, Any]:
    """Run one merge, and tell the time and the memory above an idle interpreter."""
    import os

    vars(os)["fsync"] = no_sync  # as the other benchmarks: nothing waits for the device
    idle = idle_with_torch()
    import remelt

    recipe = CASES[job["case"]](job["models"], job["lora"])
    import_all()
    merge = partial(remelt.merge, recipe, job["output"], threads=job["threads"])
    read = [*(job["models"] if job["case"] == AGAINST else job["models"][:1]), job["lora"]]
    return measured({**job, "models": read}, idle, merge)


def run(case: str, files: ModelFiles, lora: Path, threads: int) -> dict[str, Any]:
    """Run one merge in a process of its own."""
    output = files.folder / "output-adapters"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    job = {
        "case": case,
        "models": [str(path) for path in files.paths("sdxl", 2)],
        "lora": str(lora),
        "output": str(output / "merged.safetensors"),
        "fresh": files.size("sdxl"),
        "threads": threads,
    }
    try:
        found = subprocess.run(
            [sys.executable, __file__, "--one", json.dumps(job)], capture_output=True, text=True, check=False
        )
    finally:
        shutil.rmtree(output, ignore_errors=True)
    if found.returncode:
        raise SystemExit(f"{case} failed: {found.stderr.strip().splitlines()[-1]}")
    told: dict[str, Any] = json.loads(found.stdout.rpartition(REPORT)[2])
    return told


def figures(files: ModelFiles, repeat: int, threads: int) -> Iterator[dict[str, Any]]:
    """Each case against the weighted sum, of runs in turns."""
    lora = lora_file(files)
    runs: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    for _ in range(repeat):
        for case, found in runs.items():
            found.append(run(case, files, lora, threads))
            print(json.dumps({"case": case, **found[-1]}), file=sys.stderr)
    base = statistics.median(one["seconds"] for one in runs[AGAINST])
    held = max(one.get("peak", 0) for one in runs[AGAINST])
    for case, found in runs.items():
        seconds = statistics.median(one["seconds"] for one in found)
        peak = max(one.get("peak", 0) for one in found)
        row = {"case": case, "seconds": seconds, "ratio": seconds / base, "peak": peak, "more": peak - held}
        yield row | {"met": row["ratio"] <= RATIO and row["more"] <= MORE_MEMORY}


def markdown(rows: Sequence[Mapping[str, Any]], rank: int) -> Iterator[str]:
    """The rows as a table."""
    yield f"| SDXL, fp16, rank {rank} | time | over {AGAINST} | memory, MiB | above {AGAINST}'s | met |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        cells = (
            row["case"],
            f"{row['seconds']:.2f} s",
            f"{row['ratio']:.2f}",
            f"{row['peak'] / 2**20:.0f}",
            f"{row['more'] / 2**20:.0f}",
            "" if row["case"] == AGAINST else "yes" if row["met"] else "no",
        )
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield f"Targets: at most {RATIO:g} times as long, and {MORE_MEMORY // 2**20} MiB more."


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how long adapters take to be applied.")
    parser.add_argument("--folder", type=Path, help="where the models are made, and found again")
    parser.add_argument("--small", action="store_true", help="narrow models: a trial of the benchmark itself")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(f"\n{REPORT}{json.dumps(one(json.loads(given.one)))}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for row in figures(ModelFiles(folder, small=given.small), given.repeat, given.threads):
            rows.append(row)
            if not given.markdown:
                print(json.dumps(row))
        if given.markdown:
            print("\n".join(markdown(rows, SMALL_RANK if given.small else RANK)))


if __name__ == "__main__":
    main()
