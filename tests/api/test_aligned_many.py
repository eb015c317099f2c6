"""Several models aligned to each other: permuted copies are brought back, and merged as they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_models import Tensors, clip_l, shuffled, whole, write

import remelt as rm
from remelt.alignment.files import load_permutations
from remelt.api import rebasing_many
from remelt.cli.alignment import shown
from remelt.cli.main import run
from remelt.errors import CheckError, OptionError, OutputError

COUNT = 5
NAMES = tuple("abcde")
Remelt = Callable[..., tuple[int, str, str]]


def copies() -> list[Tensors]:
    """Five noisy copies of one text encoder."""
    tensors = clip_l()
    noisy = [clip_l(10 + place) for place in range(COUNT)]
    return [{key: one + 0.3 * noise[key] for key, one in tensors.items()} for noise in noisy]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the copies, ``a`` to ``e``, of which all but ``a`` are shuffled; ``mean`` is that of the copies."""
    made = tmp_path_factory.mktemp("models")
    models = copies()
    for place, (name, one) in enumerate(zip(NAMES, models, strict=True)):
        moved = whole(one, shuffled("clip_l", one, place, crossing=False)) if place else one
        write(made, name, moved)
    write(made, "mean", rm.merge(rm.n_average(*(rm.model(one) for one in models))))
    return made


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.fixture
def remelt(capsys: pytest.CaptureFixture[str]) -> Remelt:
    def call(*words: object) -> tuple[int, str, str]:
        code = run([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def alike(found: Tensors, wanted: Tensors) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_five_shuffled_copies_are_averaged_as_the_copies_are(remelt: Remelt, folder: Path) -> None:
    words = ("rebasin", "many", *NAMES, "--refine", "--start", "identity", "--save-permutations", "found")
    code, out, err = remelt(*words, "-o", "refined")
    assert code == 0, err
    assert "objective of all pairs: " in out
    assert "e.safetensors against a.safetensors: 24 groups" in out
    assert "24 of 24 groups moved, in " in out
    assert " passes over all models" in out
    assert out.endswith("wrote refined.safetensors\n")
    assert alike(load_file("refined.safetensors"), load_file("mean.safetensors"))
    assert {one.name for one in Path("found").iterdir()} == {
        f"{place}-{name}.safetensors" for place, name in enumerate(NAMES[1:], start=2)
    }
    with safe_open("refined.safetensors", "pt") as file:
        assert "found/5-e.safetensors" in file.metadata()["remelt_recipe"]
    assert alike(rm.merge("refined.safetensors"), load_file("mean.safetensors"))  # by the recipe that it carries
    code, out, err = remelt(*words, "-o", "again")
    assert (code, "found/2-b.safetensors exists" in err) == (3, True)


def test_permutations_in_memory_give_the_same(remelt: Remelt) -> None:
    words = ("rebasin", "many", *NAMES, "--refine", "--start", "identity", "--json")
    code, out, err = remelt(*words, "-o", "held")
    assert code == 0, err
    told = json.loads(out)
    assert told["output"] == "held.safetensors"
    assert [len(one["moved"]) for one in told["alignments"]] == [24] * (COUNT - 1)
    assert alike(load_file("held.safetensors"), load_file("mean.safetensors"))
    with safe_open("held.safetensors", "pt") as file:
        assert 'parameter("permutations' in file.metadata()["remelt_recipe"]


def test_refining_betters_unrelated_models_and_is_found_again(folder: Path) -> None:
    for seed in range(4):
        write(folder, f"free{seed}", clip_l(100 + seed))
    models = [f"free{seed}" for seed in range(4)]
    heard: list[tuple[str, str, float]] = []
    found = rm.align_many(
        models,
        save="free",
        start="identity",
        overwrite=True,
        progress=lambda model, visit: heard.append((model, visit.start, visit.agreement)),
    )
    assert found.before < found.aligned < found.after
    assert found.passes > 1
    assert {(model, start) for model, start, _ in heard} == {
        *((f"free{seed}.safetensors", "identity") for seed in range(1, 4)),
        *((f"free{seed}.safetensors", "others") for seed in range(4)),
    }
    assert found.models[0].match.visits
    visit = found.models[0].match.visits[0]
    assert shown(visit, "free1").startswith(f"free1: others, sweep 1: {visit.group.name}, objective ")
    refined = [agreement for _, start, agreement in heard if start == "others"]
    assert refined == sorted(refined)
    wanted = sum(
        float((x[key].double() * y[key].double()).sum())
        for x, y in _pairs([rm.merge(rm.model(models[0])), *(_moved(one, found) for one in range(1, 4))])
        for key in x
        if key in _permuted_keys()
    )
    assert found.after == pytest.approx(wanted, rel=1e-3)
    for one in found.models:
        assert one.path is not None
        assert load_permutations(one.path).after == pytest.approx(one.match.after)
        assert one.saved.reports
    again = rm.align_many(models, start="identity")
    for one, other in zip(again.models, found.models, strict=True):
        both = zip(one.saved.permutations.items(), other.saved.permutations.values(), strict=True)
        assert all(mine.inverse().after(theirs).is_identity for (_, mine), theirs in both)


def _moved(place: int, found: rebasing_many.AlignedMany) -> Tensors:
    return rm.merge(rm.permute(f"free{place}", found.models[place - 1].saved))


def _pairs(models: list[Tensors]) -> list[tuple[Tensors, Tensors]]:
    return [(one, other) for place, one in enumerate(models) for other in models[:place]]


def _permuted_keys() -> set[str]:
    saved = shuffled("clip_l", clip_l(), crossing=False)
    return {window.key for group in saved.groups if group.name in saved.permutations for window in group.windows}


def test_heads_are_rotated_towards_the_first(folder: Path) -> None:
    plain = rm.align_many(NAMES[:3], start="identity")
    found = rm.align_many(NAMES[:3], start="identity", rotations=True)
    for one, other in zip(plain.models, found.models, strict=True):
        assert other.match.after > one.match.after
        assert len(other.saved.rotations) == 12
        assert not one.saved.rotations


def test_models_of_other_shapes_are_refused_by_name(remelt: Remelt, folder: Path) -> None:
    tensors = load_file("b.safetensors")
    key = "text_model.encoder.layers.3.mlp.fc"
    tensors[f"{key}1.weight"], tensors[f"{key}1.bias"] = tensors[f"{key}1.weight"][:128], tensors[f"{key}1.bias"][:128]
    tensors[f"{key}2.weight"] = tensors[f"{key}2.weight"][:, :128]
    write(folder, "narrow", tensors)
    with pytest.raises(CheckError, match=rf"narrow\.safetensors  {key}1\.weight is \[128, 64\], but \[256, 64\] in a"):
        rm.align_many(["a", "b", "narrow"])
    code, _, err = remelt("rebasin", "many", "a", "b", "narrow", "--refine", "-o", "never")
    assert code != 0
    assert f"{key}1.weight is [128, 64], but [256, 64] in a.safetensors" in err
    assert not (folder / "never.safetensors").exists()


def test_what_stands_in_the_way_is_told_before_anything_is_matched(
    remelt: Remelt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebasing_many, "match_many", None)  # nobody calls it
    with pytest.raises(OptionError, match="what is refined are 3 models at least, but got 2"):
        rm.align_many(["a", "b"])
    Path("there").mkdir(exist_ok=True)
    write(Path("there"), "2-b", {"w": torch.zeros(1)})
    with pytest.raises(OutputError, match=r"2-b\.safetensors exists"):
        rm.align_many(["a", "b", "c"], save="there")
    code, _, err = remelt("rebasin", "many", "a", "b", "c", "--refine", "-o", "a.safetensors")
    assert (code, "a.safetensors exists" in err) == (3, True)


def test_two_models_are_aligned_and_nothing_is_to_be_refined(remelt: Remelt) -> None:
    code, out, err = remelt("rebasin", "many", "a", "b", "--refine", "--start", "identity", "-o", "two", "--overwrite")
    assert code == 0, err
    assert "passes" not in out
