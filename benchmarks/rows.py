"""The rows of the table: what is run, what it is held against, and the figure to reach, by executor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

EXECUTORS = ("native", "torch")

OVER = "over"
"""Ours over another's time: at most the target."""
GAIN = "gain"
"""Another's time over ours: at least the target."""
MEMORY = "memory"
"""Peak anonymous memory above the idle interpreter, MiB: at most the target."""
SECONDS = "seconds"
"""Our time: at most the target."""
PER_KEY = "per key"
"""What one key more costs, in microseconds: at most the target."""
SHOWN = "shown"
"""No target: seconds and memory are shown."""

RATIOS = (OVER, GAIN)


@dataclass(frozen=True)
class Job:
    """What is run: a tool on a recipe over the first models of a family."""

    tool: str
    recipe: str
    family: str
    models: int
    calls: int = 0
    synced: bool = False
    """Whether the output is flushed to the device within the time."""
    options: tuple[tuple[str, Any], ...] = ()
    executor: str = ""
    """Of remelt; empty for the others' tools, and where it is yet to be filled in."""

    @property
    def is_ours(self) -> bool:
        """Whether remelt runs it, by either executor."""
        return self.tool in ("remelt", "plan", "command")

    @property
    def is_slow(self) -> bool:
        """Whether one run takes up to minutes: another's tool."""
        return self.tool in ("sd-mecha", "mergekit", "script")

    def by(self, executor: str) -> Job:
        """The same, by an executor of ours."""
        return replace(self, executor=executor) if self.is_ours else self


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    title: str
    figure: str
    ours: Job
    targets: tuple[float, float] | None
    against: Job | None = None
    whole: bool = False
    """Whether the time of the whole process counts, imports included."""

    @property
    def jobs(self) -> list[Job]:
        """All runs of the row, each once."""
        found = [self.ours.by(executor) for executor in EXECUTORS]
        if self.against is not None:
            found += [self.against.by(executor) for executor in EXECUTORS]
        return list(dict.fromkeys(found))


def job(recipe: str, models: int, *, tool: str = "remelt", family: str = "sd1", **given: Any) -> Job:
    """A job; by default a merge of ours at full width."""
    return Job(tool, recipe, family, models, **given)


W = job("weighted_sum", 2)
HALF_W = job("weighted_sum", 2, family="half")
COPY = job("copy", 1, tool="copy")
SHARDS = (("max_shard_size", "4GB"),)
BUDGET = (("memory", "256MiB"),)


def peer(name: str, title: str, ours: Job, tool: str, targets: tuple[float, float], *, whole: bool = False) -> Row:
    """A row that holds another tool's time against ours."""
    theirs = replace(ours, tool=tool, options=())
    if whole:
        ours = replace(ours, tool="command")
    return Row(name, title, GAIN, ours, targets, theirs, whole)


def over_w(name: str, title: str, ours: Job, targets: tuple[float, float]) -> Row:
    """A row that holds a recipe's time against a weighted sum of files of the same size."""
    return Row(name, title, OVER, ours, targets, HALF_W if ours.family == "half" else W)


def by_mergekit(name: str, title: str, recipe: str, models: int) -> Row:
    """A row on language models, against mergekit."""
    ours = job(recipe, models, family="llama", options=SHARDS)
    return peer(name, f"Llama, {title}, whole process: mergekit over ours", ours, "mergekit", (4, 3), whole=True)


ROWS = (
    Row("W", "weighted_sum of 2 (W) over cp", OVER, W, (1.35, 1.6), COPY),
    Row(
        "W-synced", "W over cp, both flushed to the device", OVER,
        replace(W, synced=True), (1.2, 1.3), replace(COPY, synced=True),
    ),
    Row(
        "sdxl", "W of SDXL, 6.94 GB a file, over cp", OVER,
        replace(W, family="sdxl"), (1.2, 1.4), replace(COPY, family="sdxl"),
    ),
    peer("sd-mecha-W", "W: sd-mecha over ours", W, "sd-mecha", (22, 14)),
    peer("sd-mecha-mean", "n_average of 5: sd-mecha over ours", job("n_average", 5), "sd-mecha", (22, 14)),
    peer(
        "sd-mecha-chain", "10 chained, 4 files: sd-mecha over ours", job("chain", 4, calls=10), "sd-mecha", (22, 14)
    ),
    peer("sd-mecha-ties", "TIES of 3: sd-mecha over ours", job("ties", 4), "sd-mecha", (22, 14)),
    peer("process-sd-mecha", "W, whole process: sd-mecha over ours", W, "sd-mecha", (8, 6), whole=True),
    peer("process-script", "W, whole process: naive script over ours", W, "script", (3, 2.5), whole=True),
    over_w("add_difference", "add_difference(A, B - C) over W", job("add_difference", 3), (2, 3)),
    over_w("mean-10", "n_average of 10 over W, half width", job("n_average", 10, family="half"), (3.2, 4.5)),
    over_w("chain-20", "20 chained over 4 files, over W", job("chain", 4, calls=20), (3, 4.5)),
    over_w("slerp", "slerp over W", job("slerp", 2), (2, 2.5)),
    over_w("ties", "TIES of 3, untrimmed, over W", job("ties", 4), (2.5, 5)),
    over_w("ties-trimmed", "TIES of 3, trimmed, over W", job("ties_trimmed", 4), (5, 10)),
    by_mergekit("llama-linear", "linear", "linear", 2),
    by_mergekit("llama-slerp", "slerp", "slerp", 2),
    by_mergekit("llama-ties", "TIES", "ties_trimmed", 3),
    Row("memory-W", "W: peak memory", MEMORY, W, (32, 64)),
    Row("memory-mean-10", "n_average of 10: peak memory", MEMORY, job("n_average", 10, family="half"), (32, 64)),
    Row("memory-chain-20", "20 chained: peak memory", MEMORY, job("chain", 4, calls=20), (32, 64)),
    Row(
        "memory-slerp", "slerp, one 2 GiB tensor, budget 256 MiB: peak memory", MEMORY,
        job("slerp", 2, family="huge", options=BUDGET), (256, 256),
    ),
    Row(
        "memory-ties", "TIES trimmed, one 2 GiB tensor, budget 256 MiB: peak memory", MEMORY,
        job("ties_trimmed", 3, family="huge", options=BUDGET), (256, 256),
    ),
    Row(
        "plan-calls", "5,000 calls over 4 files: planning", SECONDS,
        job("chain", 4, tool="plan", family="half", calls=5000), (2, 2),
    ),
    Row(
        "plan-models", "100 models of 1 MB: planning", SECONDS,
        job("n_average", 100, tool="plan", family="mini"), (2, 2),
    ),
    Row(
        "keys", "overhead per key, 2,500 keys", PER_KEY,
        job("weighted_sum", 2, family="keys"), (50, 100), job("weighted_sum", 2, family="few"),
    ),
    *(
        Row(f"growth-{count}", f"n_average of {count}, half width", SHOWN, job("n_average", count, family="half"), None)
        for count in (2, 5, 10, 20)
    ),
)  # fmt: skip

ONLY_ASKED = ("sdxl",)
"""Rows that are run only when they are asked for by an option: their files take 14 GB."""


def chosen(patterns: str, *, sdxl: bool) -> list[Row]:
    """The rows whose names fit one of the patterns between commas; all for an empty text.

    Raises `ValueError` for a pattern that fits none.
    """
    wanted = [pattern for pattern in patterns.split(",") if pattern]
    for pattern in wanted:
        if not any(fnmatchcase(row.name, pattern) for row in ROWS):
            raise ValueError(f"no row is named {pattern!r}; there are {', '.join(row.name for row in ROWS)}")
    found = [row for row in ROWS if not wanted or any(fnmatchcase(row.name, pattern) for pattern in wanted)]
    return [row for row in found if sdxl or row.name not in ONLY_ASKED]
