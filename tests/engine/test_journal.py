"""The journal alone: what it holds on disk at every moment a process may end."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from remelt.engine.journal import Journal, Names, Part, left_names

PARTS = [Part(f"layers.{number}.weight", 0, 64, number * 2**40) for number in range(10)]


def test_what_is_kept_is_on_disk_when_it_has_begun(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    names = Names(frozenset({"a.safetensors"}), frozenset({"b.safetensors"}))
    Journal(path, "print").begin(PARTS, names)
    assert list(Journal(path, "print").parts()) == PARTS
    assert left_names(path) == names
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("broken", ["write", "replace"])
def test_an_earlier_journal_stays_until_the_next_is_whole(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    Journal(path, "print").begin(PARTS, Names())

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, broken, full)
        with pytest.raises(OSError, match="No space left on device"):
            Journal(path, "print").begin(PARTS[:4], Names())
    assert list(Journal(path, "print").parts()) == PARTS
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_in_its_place_is_left_alone(tmp_path: Path) -> None:
    somebody = tmp_path / "somebody.txt"
    somebody.write_text("theirs")
    path = tmp_path / "journal"
    path.symlink_to(somebody)
    path.with_name("journal.partial").symlink_to(somebody)
    journal = Journal(path, "print")
    journal.begin(PARTS[:1], Names())
    journal.add(PARTS[1])
    journal.close()
    assert somebody.read_text() == "theirs"
    assert list(Journal(path, "print").parts()) == PARTS[:2]
    assert not path.is_symlink()
