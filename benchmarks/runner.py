"""One job in a process of its own: it imports, marks the idle memory, runs and times one merge, and reports in JSON.

python benchmarks/runner.py '{"tool": "remelt", "recipe": "weighted_sum", "models": [...], "output": ...}'
python benchmarks/runner.py --serve     a job a line, each in a fork that has torch: quick, for small files
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pages import freshen, warm

INTERVAL = 0.005
"""Seconds between two looks at the memory."""

REPORT = "report: "


def main(argument: str) -> None:
    """Run a job, and print its report as the last line."""
    job: dict[str, Any] = json.loads(argument)
    if not job["synced"]:
        vars(os)["fsync"] = no_sync  # the peers and cp flush nothing to the device either
    tell(TOOLS[job["tool"]](job))


def serve() -> None:
    """Run the jobs on the input, each in a fork of this process."""
    assert idle_with_torch() is not None
    for line in sys.stdin:
        if (process := os.fork()) == 0:
            run_in_fork(line)
        os.waitpid(process, 0)


def run_in_fork(line: str) -> None:
    """Run a job, and leave by the back door: nothing of the parent's is to be cleared up twice."""
    try:
        os.environ.update(json.loads(line)["environment"])
        main(line)
    except BaseException as error:
        tell({"error": f"{type(error).__name__}: {error}"})
    finally:
        sys.stdout.flush()
        os._exit(0)


def tell(report: dict[str, Any]) -> None:
    """Print a report."""
    print(f"\n{REPORT}{json.dumps(report)}", flush=True)


def no_sync(descriptor: Any) -> None:
    """What stands for `os.fsync` where flushing is not measured."""


def by_remelt(job: dict[str, Any]) -> dict[str, Any]:
    """Merge by remelt, from Python."""
    idle = idle_with_torch()
    import remelt

    recipe = our_recipe(job)
    if recipe is None:
        return absent()
    import_all()
    return measured(job, idle, partial(remelt.merge, recipe, job["output"], threads=job["threads"], **job["options"]))


def by_planning(job: dict[str, Any]) -> dict[str, Any]:
    """Plan by remelt, without running."""
    idle = idle_with_torch()
    import remelt

    recipe = our_recipe(job)
    if recipe is None:
        return absent()
    import_all()
    return measured(job, idle, partial(remelt.plan, recipe, job["output"], threads=job["threads"], **job["options"]))


def by_command_line(job: dict[str, Any]) -> dict[str, Any]:
    """Run the command line in this process, as ``python -m remelt`` does; what counts is the whole process."""
    import runpy

    words = ["merge", job["text"], "-o", job["output"], "--threads", str(job["threads"]), "--quiet"]
    for name, value in job["options"].items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    sys.argv = ["remelt", *words]
    try:
        runpy.run_module("remelt", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if stop.code:
            raise
    return {}


def by_writing(job: dict[str, Any]) -> dict[str, Any]:
    """Write a recipe as text, for the command line."""
    import remelt

    recipe = our_recipe(job)
    if recipe is None:
        return absent()
    Path(job["text"]).write_text(remelt.serialize(recipe), encoding="utf-8")
    return {}


def by_sd_mecha(job: dict[str, Any]) -> dict[str, Any]:
    """Merge by sd-mecha, with the settings that were fastest in trials."""
    idle = idle_with_torch()
    import torch
    from recipes import build

    sd_mecha: Any = importlib.import_module("sd_mecha")
    models = [sd_mecha.model(Path(path)) for path in job["models"]]
    recipe = build(job["recipe"], models, job["calls"], sd_mecha.extensions.merge_methods.resolve)
    merge = partial(
        sd_mecha.merge,
        recipe,
        merge_device="cpu",
        merge_dtype=torch.float32,
        output_device="cpu",
        output_dtype=torch.float16,
        threads=job["threads"],
        output=Path(job["output"]),
    )
    return measured(job, idle, merge)


def by_hand(job: dict[str, Any]) -> dict[str, Any]:
    """Merge as the script that everybody writes: load both, loop, save."""
    idle = idle_with_torch()
    from safetensors.torch import load_file, save_file

    def merge() -> None:
        a, b = (load_file(path) for path in job["models"])
        merged = {key: ((1 - 0.3) * a[key].float() + 0.3 * b[key].float()).half() for key in a}
        save_file(merged, job["output"])

    return measured(job, idle, merge)


def our_recipe(job: dict[str, Any]) -> Any:
    """The job's recipe in remelt; None where one of its methods is not there."""
    from recipes import build

    import remelt

    try:
        return build(job["recipe"], [remelt.model(path) for path in job["models"]], job["calls"], method_of(remelt))
    except LookupError:
        return None


def import_all() -> None:
    """Import what remelt imports when it merges: its times are those of merging alone, as the others' are."""
    import remelt.engine

    for module in pkgutil.walk_packages(remelt.engine.__path__, "remelt.engine."):
        importlib.import_module(module.name)


def method_of(library: Any) -> Callable[[str], Callable[..., Any]]:
    """A library's methods by name; `LookupError` for one that is not there."""

    def find(name: str) -> Callable[..., Any]:
        try:
            found: Callable[..., Any] = getattr(library, name)
        except AttributeError:
            raise LookupError(name) from None
        return found

    return find


def absent() -> dict[str, Any]:
    """The report where a method is not in the library."""
    return {"absent": "not there yet"}


def measured(job: dict[str, Any], idle: int | None, merge: Callable[[], Any]) -> dict[str, Any]:
    """Run, and report the seconds, those of processors, and the peak of anonymous memory above the idle interpreter."""
    warm(Path(path) for path in job["models"])
    freshen(Path(job["output"]).parent, job["fresh"])
    with Watch() as watch:
        begun, worked = time.perf_counter(), time.process_time()
        merge()
        seconds, worked = time.perf_counter() - begun, time.process_time() - worked
    report: dict[str, Any] = {"seconds": seconds, "work": worked}
    if idle is not None and watch.peak is not None:
        report |= {"idle": idle, "peak": watch.peak - idle, "resident": memory("VmHWM")}
    return report


class Watch:
    """The most anonymous memory of this process, looked at by a thread and at both ends."""

    def __init__(self) -> None:
        self.peak = memory("RssAnon")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while self.peak is not None:
            self.peak = max(self.peak, memory("RssAnon") or 0)
            if self._done.wait(INTERVAL):
                break


def memory(field: str) -> int | None:
    """Bytes of a field of this process's status; None on systems without it."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next((1024 * int(line.split()[1]) for line in status if line.startswith(field)), None)
    except OSError:
        return None


def idle_with_torch() -> int | None:
    """The anonymous memory of an interpreter that has imported torch and does nothing."""
    import torch

    assert torch
    return memory("RssAnon")


TOOLS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "remelt": by_remelt,
    "plan": by_planning,
    "command": by_command_line,
    "text": by_writing,
    "sd-mecha": by_sd_mecha,
    "script": by_hand,
}

if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve()
    else:
        main(sys.argv[1])
