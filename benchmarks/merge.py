"""How long merges take, beside copying one of their files and beside other tools: the table of docs/performance.md.

python benchmarks/merge.py --folder FOLDER                        all rows but SDXL's; the files take 35 GB
python benchmarks/merge.py --rows W,slerp,memory-*                some rows
python benchmarks/merge.py --small                                seconds in all, for continuous integration
python benchmarks/merge.py --mergekit OTHER/bin/python --json raw.json --markdown
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from files import ModelFiles
from machine import bind, can_measure, describe, limits
from measure import Bench
from peers import Peers
from plot import draw
from processes import Processes
from rows import ROWS, SHOWN, Row, chosen
from table import Report


def main(arguments: Sequence[str]) -> int:
    """Measure the rows that are asked for, and print them."""
    parser = options()
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join(f"{row.name:<18} {row.title}" for row in ROWS))
        return 0
    try:
        rows = chosen(given.rows, sdxl=given.sdxl)
    except ValueError as error:
        parser.error(str(error))
    repeat = given.repeat or (1 if given.small else 5)
    peers = Peers(given.sd_mecha or (None if given.small else sys.executable), given.mergekit)
    bind(given.threads)
    with place(given.folder) as folder:
        files = ModelFiles(folder, small=given.small)
        with Processes(files, peers, threads=given.threads, limit=given.limit) as processes:
            report = run(Bench(processes, repeat=repeat, peer_repeat=given.peer_repeat or repeat, say=say), rows)
    print(report.markdown() if given.markdown else report.plain(), end="", flush=True)
    if given.plot is not None:
        grown = [found for found in report.measured if found.row.figure == SHOWN]
        given.plot.write_text(draw(grown, files.size("half")), encoding="utf-8")
    if given.json is not None:
        given.json.write_text(json.dumps(report.raw(), indent=1) + "\n", encoding="utf-8")
    return 0


def options() -> argparse.ArgumentParser:
    """The words of the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/merge.py", description="Measure merges.")
    add = parser.add_argument
    add("--rows", default="", metavar="NAMES", help="rows by name, with * and between commas; by default all")
    add("--list", action="store_true", help="the names of the rows, and no more")
    add("--sdxl", action="store_true", help="also the row of SDXL, whose files take 14 GB")
    add("--small", action="store_true", help="small files: whether all of it works, not how fast it is")
    add("--folder", type=Path, help="where the models are made, and found again; by default a temporary one")
    add("--repeat", type=int, default=0, metavar="N", help="runs of which the median counts; by default 5")
    add("--peer-repeat", type=int, default=0, metavar="N", help="the same for other tools; by default as --repeat")
    add("--threads", type=int, default=2, metavar="N", help="of each tool, on as many cores; by default 2")
    add("--limit", type=float, default=600.0, metavar="S", help="seconds after which a run is given up")
    add(
        "--sd-mecha",
        metavar="PYTHON",
        help="an interpreter that has sd-mecha; by default this one, or none for small files",
    )
    add("--mergekit", metavar="PYTHON", help="an interpreter that has mergekit")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    add("--plot", type=Path, metavar="FILE", help="draw the rows on growth, as SVG")
    add("--json", type=Path, metavar="FILE", help="keep all figures")
    return parser


@contextlib.contextmanager
def place(folder: Path | None) -> Iterator[Path]:
    """The folder of the models: a given one is made where need be, a temporary one is removed."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="remelt-benchmark-") as name:
            yield Path(name)
        return
    folder.mkdir(parents=True, exist_ok=True)
    yield folder.resolve()


def run(bench: Bench, rows: Sequence[Row]) -> Report:
    """Measure rows, and the machine."""
    processes = bench.processes
    say("looking for executors and tools")
    processes.peers.look()
    bench.look()
    for executor, why in bench.absences.items():
        say(f"  {executor}: {why}")
    small = processes.files.small
    family = rows[0].ours.family
    model = processes.files.path("sd1" if family == "llama" else family, 0)
    found = limits(model.parent, model, small=small, threads=processes.threads) if can_measure() else {}
    measured = []
    for row in rows:
        say(f"{row.name}: {row.title}")
        measured.append(bench.measure(row))
    files = processes.files
    return Report(
        measured=measured,
        machine=describe(processes.threads) | processes.peers.versions,
        limits=found,
        keys=len(files.shapes("keys")) - len(files.shapes("few")),
        judged=not small,
        repeat=bench.repeat,
    )


def say(line: str) -> None:
    """Tell what is done, beside the table."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
