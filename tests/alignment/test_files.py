"""Permutation files: what is saved is loaded, and files of anything else are refused for what they are."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from remelt.alignment.files import SavedPermutations, load_permutations, save_permutations
from remelt.alignment.margin_files import load_margins, save_margins
from remelt.alignment.margins import Margins, Rows
from remelt.alignment.permutation import Permutation, permuted, random_permutation
from remelt.alignment.rotations import rotated
from remelt.archs.axis_groups import AxisGroup, Level, Window
from remelt.errors import FormatError, OutputError

SHAPES = {"up": (6, 4), "down": (4, 6), "gate": (2, 4), "e.0": (3, 4), "e.1": (3, 4), "other": (5,)}
GROUPS = (
    AxisGroup("stream", (Level("channel", 4, cells=(1, 3)),),
        (Window("down", 0, ("channel",)), *(Window(key, 1, ("channel",)) for key in ("up", "gate", "e.0", "e.1")))),
    AxisGroup("attn/v", (Level("head", 2), Level("value", 3, ("head",))),
        (Window("up", 0, ("head", "value")), Window("down", 1, ("head", "value")))),
    AxisGroup("mlp", (Level("expert", 2), Level("hidden", 3, ("expert",))),
        (Window("gate", 0, ("expert",)), Window("e.{}", 0, ("expert", "hidden")))),
)  # fmt: skip


EYE = torch.eye(3).expand(2, 3, 3).clone()


def some(seed: int = 0) -> SavedPermutations:
    generator = np.random.default_rng(seed)
    found = {group.name: random_permutation(group, generator) for group in GROUPS}
    return SavedPermutations(
        found, GROUPS, SHAPES, "sd1", "original", "a" * 64, "b" * 64, -1.5, 20.25, 0.75, {"mlp": {"gain": 2.0}}
    )


@given(st.integers(0, 2**32))
def test_what_is_saved_is_loaded(seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        saved = some(seed)
        found = load_permutations(save_permutations(saved, Path(folder) / "P.safetensors"))
    assert found.groups == saved.groups
    assert (found.arch, found.dialect, found.reference, found.model) == ("sd1", "original", "a" * 64, "b" * 64)
    assert (found.before, found.after, found.certified, found.reports) == (-1.5, 20.25, 0.75, {"mlp": {"gain": 2.0}})
    assert found.shapes == SHAPES
    for name, one in saved.moving.items():
        for level, part in one.parts.items():
            again = found.permutations[name].parts.get(level)
            assert np.array_equal(np.arange(part.shape[-1]) + np.zeros_like(part) if again is None else again, part)


def test_the_inverse_undoes_it_and_turns_the_models_round() -> None:
    saved = some()
    undone = saved.inverse()
    assert (undone.reference, undone.model) == (saved.model, saved.reference)
    assert all(one.after(undone.permutations[name]).is_identity for name, one in saved.permutations.items())
    assert not undone.inverse().permutations["attn/v"].is_identity


def test_levels_are_tensors_of_int32(tmp_path: Path) -> None:
    parts = {"head": np.array([1, 0]), "value": np.tile(np.arange(3), (2, 1))}
    saved = SavedPermutations({"attn/v": Permutation(GROUPS[1], parts)}, GROUPS, SHAPES)  # type: ignore[arg-type]
    found = load_file(save_permutations(saved, tmp_path / "P.safetensors"))
    assert {key: (str(one.dtype), one.tolist()) for key, one in found.items()} == {"attn/v/head": ("int32", [1, 0])}


@given(st.integers(0, 2**32))
def test_rotations_are_kept_and_their_inverse_undoes_them(seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    matrices = torch.linalg.qr(torch.randn(2, 3, 3, generator=drawn, dtype=torch.float64))[0].float()
    saved = replace(some(seed), rotations={"attn/v": {"value": matrices}})
    with tempfile.TemporaryDirectory() as folder:
        found = load_permutations(save_permutations(saved, Path(folder) / "P.safetensors"))
    assert torch.equal(found.rotations["attn/v"]["value"], matrices)
    assert "attn/v" in {group.name for group in replace(found, permutations={}).changing}
    tensors = {key: torch.randn(shape, generator=drawn) for key, shape in SHAPES.items()}
    moved, back = found, found.inverse()
    for one in (moved, back):
        tensors = rotated(permuted(tensors, one.permutations.values()), one.groups, one.rotations)
    drawn.manual_seed(seed)
    torch.randn(2, 3, 3, generator=drawn, dtype=torch.float64)
    for key, shape in SHAPES.items():
        assert torch.allclose(tensors[key], torch.randn(shape, generator=drawn), atol=1e-5), key


def test_a_file_that_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    path = save_permutations(some(), tmp_path / "P.safetensors")
    with pytest.raises(OutputError, match=r"P\.safetensors exists"):
        save_permutations(some(1), path)
    save_permutations(some(1), path, overwrite=True)
    assert list(tmp_path.iterdir()) == [path]


Change = Callable[[dict[str, Any], dict[str, str]], None]


def _groups(change: Callable[[Any], None]) -> Change:
    def apply(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
        told = json.loads(metadata["remelt_groups"])
        change(told)
        metadata["remelt_groups"] = json.dumps(told)

    return apply


def _tensor(key: str, value: Any) -> Change:
    return lambda tensors, _: tensors.__setitem__(key, value)


def _told(key: str, value: str) -> Change:
    return lambda _, metadata: metadata.__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _, metadata: metadata.clear(), r"P\.safetensors is no permutation file: its metadata has no remelt"),
        (_told("remelt_permutations", "3"), "is a permutation file of format '3', but this remelt reads form"),
        (_told("remelt_groups", "{"), "is damaged: what its metadata tells is no groups"),
        (_told("remelt_groups", "[1]"), "is damaged: what its metadata tells is no groups"),
        (_told("remelt_shapes", "[]"), "is damaged: what its metadata tells is no groups"),
        (_told("remelt_shapes", '{"up":[6,4]}'), "is damaged: .*'down' is not there"),
        (_groups(lambda told: told[0]["windows"].pop()), "'e.1' has 4 elements of axis 1 that no group has"),
        (_groups(lambda told: told.append(told[0])), "two groups are named stream"),
        (_groups(lambda told: told[0]["windows"][0].update(offset=3)), "but the window ends at 7"),
        (_groups(lambda told: told[0]["windows"][0].update(offset=-1)), "stream has numbers that no group has"),
        (_groups(lambda told: told[0]["levels"][0].update(size=2**40)), "stream has numbers that no group has"),
        (_groups(lambda told: told[1]["windows"][0].update(levels=["heads"])), "a level heads that the group has not"),
        (_groups(lambda told: told[2]["windows"][1].update(levels=["experts"])), "no level is named 'experts'"),
        (_tensor("stream/channel", np.zeros(4, np.int32)), "'stream/channel' is no permutation of its level"),
        (_tensor("stream/channel", np.array([3, 1, 2, 0], np.int32)), "is no permutation of its level"),
        (_tensor("attn/v/value", np.arange(6, dtype=np.int32)), r"/value' is I32 \[6\], but it must be I32 \[2, 3\]"),
        (_tensor("stream/channel", np.arange(4)), r"is I64 \[4\], but it must be I32 \[4\]"),
        (_tensor("attn/v/value.rotation", EYE.numpy().copy() * 2), "'attn/v/value.rotation' is no rotation of each"),
        (_tensor("attn/v/value.rotation", EYE.numpy() * np.float32("nan")), "value.rotation' is no rotation of each"),
        (_tensor("attn/v/value.rotation", EYE[:1].numpy()), r"is F32 \[1, 3, 3\], but it must be F32 \[2, 3, 3\]"),
        (_tensor("attn/v/head.rotation", EYE.numpy()), "'attn/v/head.rotation' rotates what may only be permuted"),
        (_tensor("stream/chanel", np.arange(4, dtype=np.int32)), "'stream/chanel' is no level of a group"),
    ],
)  # fmt: skip
def test_damaged_and_foreign_files_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    path = save_permutations(some(), tmp_path / "P.safetensors")
    tensors = dict(load_file(path))
    with safe_open(path, "np") as file:
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(FormatError, match=message):
        load_permutations(path)


def test_a_file_of_no_permutations_is_one(tmp_path: Path) -> None:
    nothing = SavedPermutations({}, GROUPS, SHAPES)
    found = load_permutations(save_permutations(nothing, tmp_path / "P.safetensors"))
    assert found.moving == {}
    assert (found.arch, found.before, found.certified) == (None, None, None)


def test_margins_are_kept_for_one_reference(tmp_path: Path) -> None:
    rows = Rows(torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64))
    margins = Margins({("a/b", "head.value"): rows}, {"a/b": "0f"})
    path = save_margins(margins, tmp_path / "M.safetensors", "f" * 64)
    assert load_margins(path, "f" * 64).digests == {"a/b": "0f"}
    ((name, found),) = load_margins(path, "f" * 64).rows.items()
    assert name == ("a/b", "head.value")
    assert torch.equal(found.margins, rows.margins)
    assert torch.equal(found.norms, rows.norms)
    with pytest.raises(FormatError, match="holds the margins of another reference"):
        load_margins(path, "0" * 64)
    with pytest.raises(FormatError, match="holds no margins of format 1"):
        load_margins(save_permutations(some(), tmp_path / "P.safetensors"), "f" * 64)
    save_file({"a/b/c/norms": np.zeros(3)}, path, {"remelt_margins": "1", "remelt_reference": "f"})
    with pytest.raises(FormatError, match="the margins of a/b are not whole"):
        load_margins(path, "f")
    save_file({"a": np.zeros(3)}, path, {"remelt_margins": "1", "remelt_reference": "f"})
    save_file({}, path, {"remelt_margins": "1", "remelt_reference": "f", "remelt_groups": "[1]"})
    with pytest.raises(FormatError, match="it does not tell its groups"):
        load_margins(path, "f")
    save_file({"a": np.zeros(3)}, path, {"remelt_margins": "1", "remelt_reference": "f"})
    with pytest.raises(FormatError, match="'a' is F64 \\[3\\], and no part of margins"):
        load_margins(path, "f")
