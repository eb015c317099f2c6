"""Merges that are killed, interrupted, out of space, broken or doubled: no file is lost, and what was done is kept."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import remelt as rm
from remelt.engine.sink import FileSink
from remelt.methods import METHODS

pytestmark = pytest.mark.skipif(os.name == "nt", reason="kills and forks as on POSIX")

PLUGIN = '''"""A method that takes its time, or breaks, as the environment says: the seam of these tests."""
from __future__ import annotations

import os
import time

from remelt.recipe.method import Same, merge_method


@merge_method(cut="element")
def slow_sum(a: Same, b: Same, *, key: str) -> Same:
    """Half of both, slowly."""
    time.sleep(float(os.environ.get("SLOW", "0")))
    if key == os.environ.get("BREAK"):
        raise ValueError("broken on purpose")
    return a + (b - a) * 0.5
'''
RECIPE = 'version 1\nslow_sum("a", "b")\n'
KEYS = 40
SLOW = 0.03
LASTS = KEYS * SLOW / 2 - 0.2
"""Seconds from the progress that is told first to shortly before the end."""
OLD = b"the old file"


class Zygote:
    """Runs merges in forked processes, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("zygote.py"), folder / "plugin.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
        )

    def start(self, output: str, *, slow: float = 0.0, recipe: str = "mix.mecha", **order: Any) -> int:
        environment = {"SLOW": str(slow), **order.pop("environment", {})}
        order = {"recipe": recipe, "output": output, "environment": environment, "options": {}, **order}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.line())

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def wait(self) -> tuple[int, str]:
        """The exit code of the merge, negative for a signal, and its error."""
        said = ""
        while not (line := self.line()).startswith("exit"):
            assert line, "the zygote died"
            said += line
        return int(line.split()[1]), said

    def run(self, output: str, **order: Any) -> tuple[int, str]:
        self.start(output, **order)
        return self.wait()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("interruptions")
    for seed, name in enumerate("ab"):
        drawn = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.weight": torch.randn(30, 30, generator=drawn).half() for i in range(KEYS)}
        write_model(folder / name, tensors)
    (folder / "plugin.py").write_text(PLUGIN)
    (folder / "mix.mecha").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def zygote(folder: Path) -> Iterator[Zygote]:
    running = Zygote(folder)
    yield running
    running.close()


@pytest.fixture(scope="module")
def undisturbed(folder: Path, zygote: Zygote) -> bytes:
    assert zygote.run("undisturbed.safetensors") == (0, "begun")
    return (folder / "undisturbed.safetensors").read_bytes()


@pytest.fixture
def output(folder: Path) -> Iterator[Path]:
    """An output where an old file is; nothing is left beside it after the test."""
    path = folder / "out.safetensors"
    path.write_bytes(OLD)
    yield path
    for left in folder.glob("out.safetensors*"):
        left.unlink()


def beside(output: Path) -> set[str]:
    return {path.name.removeprefix(output.name) for path in output.parent.glob(f"{output.name}.*")}


def kill_somewhere(zygote: Zygote, output: Path, how: int, moment: float) -> tuple[int, float]:
    """Start a slow merge and end it after a share of its time; its exit code, and how long it took to end."""
    process = zygote.start(output.name, slow=SLOW)
    assert zygote.line() == "begun"
    time.sleep(moment * LASTS)
    begun = time.monotonic()
    os.kill(process, how)
    code, _ = zygote.wait()
    return code, time.monotonic() - begun


def recorded(journal: Path) -> int:
    """Lines of a journal."""
    return len(journal.read_bytes().splitlines())


def kills(count: int) -> list[Any]:
    chosen = random.Random(0)
    return [pytest.param(chosen.random(), marks=[pytest.mark.slow] if number >= 5 else []) for number in range(count)]


@pytest.mark.parametrize("moment", kills(50))
def test_a_killed_merge_resumes_to_the_same_bytes(
    moment: float, zygote: Zygote, output: Path, undisturbed: bytes
) -> None:
    code, _ = kill_somewhere(zygote, output, signal.SIGKILL, moment)
    assert code == -signal.SIGKILL, "the merge ended before it was killed"
    assert output.read_bytes() == OLD
    assert beside(output) == {".partial", ".journal", ".lock"}
    assert recorded(output.parent / "out.safetensors.journal") > 1
    assert zygote.run(output.name)[0] == 0
    assert output.read_bytes() == undisturbed
    assert beside(output) == set()


def test_a_merge_killed_again_and_again_ends_in_the_same_bytes(
    zygote: Zygote, output: Path, undisturbed: bytes
) -> None:
    journal = output.parent / "out.safetensors.journal"
    kept = 1
    for _ in range(3):
        process = zygote.start(output.name, slow=SLOW)
        assert zygote.line() == "begun"
        deadline = time.monotonic() + 30
        while recorded(journal) <= kept:
            assert time.monotonic() < deadline, "nothing more was finished"
            time.sleep(0.005)
        os.kill(process, signal.SIGKILL)
        assert zygote.wait()[0] == -signal.SIGKILL
        assert recorded(journal) > kept
        kept = recorded(journal)
    assert zygote.run(output.name)[0] == 0
    assert output.read_bytes() == undisturbed


def test_an_interrupt_stops_within_a_second_and_is_continued(zygote: Zygote, output: Path, undisturbed: bytes) -> None:
    code, took = kill_somewhere(zygote, output, signal.SIGINT, 0.3)
    assert code == 130
    assert took < 1
    assert output.read_bytes() == OLD
    assert beside(output) == {".partial", ".journal"}
    assert zygote.run(output.name)[0] == 0
    assert output.read_bytes() == undisturbed


def test_what_is_kept_is_not_computed_again(zygote: Zygote, output: Path, undisturbed: bytes) -> None:
    kill_somewhere(zygote, output, signal.SIGKILL, 0.5)
    journal = (output.parent / "out.safetensors.journal").read_bytes().splitlines()
    done = json.loads(journal[1].partition(b" ")[2])["key"]
    assert zygote.run(output.name, environment={"BREAK": done})[0] == 0
    assert output.read_bytes() == undisturbed


def test_restart_begins_anew(zygote: Zygote, output: Path) -> None:
    kill_somewhere(zygote, output, signal.SIGKILL, 0.5)
    journal = (output.parent / "out.safetensors.journal").read_bytes().splitlines()
    done = json.loads(journal[1].partition(b" ")[2])["key"]
    code, said = zygote.run(output.name, environment={"BREAK": done}, options={"restart": True})
    assert code == 4
    assert f"slow_sum failed on {done}: ValueError: broken on purpose" in said


@pytest.mark.parametrize("damage", ["data", "journal", "torn", "size", "other", "nothing"])
def test_what_an_interrupted_merge_left_is_verified_before_it_is_believed(
    damage: str, zygote: Zygote, output: Path, undisturbed: bytes
) -> None:
    kill_somewhere(zygote, output, signal.SIGKILL, 0.8)
    partial, journal = (output.parent / f"out.safetensors.{name}" for name in ("partial", "journal"))
    if damage == "data":
        content = bytearray(partial.read_bytes())
        for place in range(len(content) - 64, 8000, -997):
            content[place] ^= 1
        partial.write_bytes(content)
    elif damage == "journal":
        journal.write_bytes(journal.read_bytes().replace(b'"checksum":"', b'"checksum":"f'))
    elif damage == "torn":
        journal.write_bytes(journal.read_bytes()[:-7])
    elif damage == "size":
        os.truncate(partial, 100)
    elif damage == "other":
        journal.write_bytes(os.urandom(5000))
    else:
        partial.unlink()
    assert zygote.run(output.name)[0] == 0
    assert output.read_bytes() == undisturbed


def test_a_changed_input_or_recipe_never_mixes_with_old_work(zygote: Zygote, folder: Path, output: Path) -> None:
    kill_somewhere(zygote, output, signal.SIGKILL, 0.8)
    (folder / "other.mecha").write_text('version 1\nslow_sum("b", "a")\n')
    assert zygote.run(output.name, recipe="other.mecha")[0] == 0
    other = output.read_bytes()
    assert zygote.run("fresh.safetensors", recipe="other.mecha")[0] == 0
    assert other == (folder / "fresh.safetensors").read_bytes()

    kill_somewhere(zygote, output, signal.SIGKILL, 0.8)
    a = folder / "a.safetensors"
    before = a.read_bytes()
    changed = bytearray(before)
    changed[-2:] = b"\x00\x00"
    times = a.stat()
    a.write_bytes(changed)
    os.utime(a, ns=(times.st_atime_ns, times.st_mtime_ns))
    try:
        assert zygote.run(output.name)[0] == 0
        assert zygote.run("fresh.safetensors")[0] == 0
        assert output.read_bytes() == (folder / "fresh.safetensors").read_bytes()
    finally:
        a.write_bytes(before)


def test_a_method_that_breaks_leaves_the_old_file_and_what_was_done(
    zygote: Zygote, output: Path, undisturbed: bytes
) -> None:
    code, said = zygote.run(output.name, environment={"BREAK": f"layers.{KEYS // 2}.weight"})
    assert code == 4
    assert "slow_sum failed on layers.20.weight: ValueError: broken on purpose" in said
    assert output.read_bytes() == OLD
    assert zygote.run(output.name)[0] == 0
    assert output.read_bytes() == undisturbed


def test_a_file_larger_than_the_system_allows_is_refused_and_nothing_is_left(zygote: Zygote, output: Path) -> None:
    code, said = zygote.run(output.name, file_size=20_000)
    assert code == 3
    assert "cannot reserve" in said
    assert "File too large" in said
    assert "free disk space or raise the quota" in said
    assert output.read_bytes() == OLD
    assert beside(output) == set()


def test_a_disk_that_fills_up_meanwhile_leaves_the_old_file_and_what_was_done(
    folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: bytes
) -> None:
    METHODS.add_file(folder / "plugin.py")
    monkeypatch.chdir(folder)
    real, left = os.pwrite, [25]

    def full(descriptor: int, data: Any, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        patched.setattr(FileSink, "place", lambda *_: None)  # every write is asked of Python
        with pytest.raises(rm.RunError, match=r"cannot write layers\.\d+\.weight to .*: No space left on device"):
            rm.merge("mix.mecha", output=output, overwrite=True)
    assert output.read_bytes() == OLD
    rm.merge("mix.mecha", output=output, overwrite=True)
    assert output.read_bytes() == undisturbed


def test_a_second_writer_is_refused_and_a_dead_owners_lock_is_taken_over(
    zygote: Zygote, folder: Path, output: Path, undisturbed: bytes
) -> None:
    second = Zygote(folder)
    try:
        assert second.run("warm.safetensors")[0] == 0
        process = zygote.start(output.name, slow=10 * SLOW)
        assert zygote.line() == "begun"
        code, said = second.run(output.name)
        assert code == 3
        assert f"out.safetensors is being written by process {process} on " in said
        assert "wait until it is done, or write to another output" in said
        os.kill(process, signal.SIGKILL)
        assert zygote.wait()[0] == -signal.SIGKILL
        assert ".lock" in beside(output)
        assert second.run(output.name)[0] == 0
        assert output.read_bytes() == undisturbed
        assert beside(output) == set()
    finally:
        second.close()


def test_an_output_that_is_an_input_is_replaced_once_it_is_complete(zygote: Zygote, folder: Path) -> None:
    (folder / "c.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    (folder / "self.mecha").write_text('version 1\nslow_sum("c", "b")\n')
    kill_somewhere_else = zygote.start("c.safetensors", slow=SLOW, recipe="self.mecha")
    assert zygote.line() == "begun"
    os.kill(kill_somewhere_else, signal.SIGKILL)
    zygote.wait()
    assert (folder / "c.safetensors").read_bytes() == (folder / "a.safetensors").read_bytes()
    assert zygote.run("c.safetensors", recipe="self.mecha")[0] == 0
    merged, expected = load_file(folder / "c.safetensors"), load_file(folder / "undisturbed.safetensors")
    assert all(merged[key].equal(expected[key]) for key in expected)


def test_a_new_file_has_the_permissions_of_new_files(zygote: Zygote, folder: Path, output: Path) -> None:
    output.unlink()
    assert zygote.run(output.name)[0] == 0
    (folder / "plain").touch()
    assert output.stat().st_mode == (folder / "plain").stat().st_mode


def test_a_killed_merge_to_a_folder_of_shards_resumes_to_the_same_bytes(zygote: Zygote, folder: Path) -> None:
    def content(name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((folder / name).iterdir())}

    options = {"max_shard_size": "20KB"}
    assert zygote.run("shards", options=options)[0] == 0
    process = zygote.start("killed", slow=SLOW, options=options)
    assert zygote.line() == "begun"
    time.sleep(LASTS / 2)
    os.kill(process, signal.SIGKILL)
    assert zygote.wait()[0] == -signal.SIGKILL
    left = content("killed")
    assert all(name.endswith(".partial") or name in ("remelt.journal", "remelt.lock") for name in left)
    assert zygote.run("killed", options=options)[0] == 0
    assert content("killed") == content("shards")
    assert "model.safetensors.index.json" in content("killed")
