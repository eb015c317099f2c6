"""`remelt merge --profile`: where the time went, for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from remelt.api import profiling
from remelt.api.profiling import Profile
from remelt.cli.main import run
from remelt.engine.tally import Tally


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(profiling, "_SIZE", 2**20)
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        save_file({"w": torch.randn(300, 300), "v": torch.randn(5)}, tmp_path / f"{name}.safetensors")
    return tmp_path


WORDS = ["merge", "a.safetensors", "b.safetensors", "-m", "weighted_sum", "--threads", "2", "-o", "mix.safetensors"]


def test_people_see_phases_what_threads_did_and_the_machine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*WORDS, "--profile"]) == 0
    told = capsys.readouterr().out
    for wanted in ("planning ", "merging ", "on 2 threads", "publishing ", "  reading ", "  computing ", "  writing "):
        assert wanted in told
    assert "703 KiB read, 352 KiB written, in 2 calls" in told
    assert "at which a file is copied here" in told
    assert "of memory" in told


def test_programs_get_the_same_as_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*WORDS, "--profile", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["profile"]
    assert found["tally"]["read"] == 2 * found["tally"]["written"] == 8 * 90_005
    assert found["threads"] == 2
    assert found["memory"] > 0
    assert found["copy"] > 0
    assert 0 < found["merging"] <= found["planning"] + found["merging"] + found["publishing"]


def test_without_it_nothing_is_measured(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "memory_bandwidth", lambda _: 1 / 0)
    assert run(WORDS) == 0
    assert "computing" not in capsys.readouterr().out


def test_shares_are_those_of_all_threads() -> None:
    tally = Tally(read=4000, written=2000, tiles=3, computing=1.0, writing=0.5, waiting=0.25)
    lines = Profile(0.1, 1.0, 0.2, 2, tally, memory=12_000.0, copy=4000.0).lines()
    assert [line.split()[-2] for line in lines[1:6]] == ["0", "50", "25", "12", "12"]
    assert "50 % of the" in lines[-2]
    assert "50 % of the" in lines[-1]
