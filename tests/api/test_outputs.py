"""Outputs beside what belongs to others: nothing but our own is written, removed or followed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import remelt as rm
from remelt.api import outputs
from remelt.api.merging import Merged, prepare_merges, run_prepared
from remelt.api.recipes import load_recipe
from remelt.recipe.node import Node


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate("ab"):
        drawn = torch.Generator().manual_seed(seed)
        tensors = {f"{part}/layers.{i}.weight": torch.randn(9, 9, generator=drawn) for part in "uv" for i in range(4)}
        write_model(tmp_path / name, {key.replace("/", "."): value for key, value in tensors.items()})
        for part in "uv":
            own = {key.partition("/")[2]: value for key, value in tensors.items() if key.startswith(part)}
            write_model(tmp_path / f"pipe_{name}" / part / "diffusion_pytorch_model", own)
        (tmp_path / f"pipe_{name}" / "model_index.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_only_files_of_our_own_stem_make_way(folder: Path) -> None:
    box = folder / "box"
    box.mkdir()
    foreign = ["other-00001-of-00001.safetensors", "other.safetensors.index.json", "notes.index.json", "keep.txt"]
    ours = ["model-00007-of-00009.safetensors", "model.safetensors.index.json"]
    for name in [*foreign, *ours]:
        (box / name).write_bytes(b"{}")
    rm.merge(rm.weighted_sum("a", "b"), output=box, max_shard_size="1KB", overwrite=True)
    names = {path.name for path in box.iterdir()}
    assert names.issuperset(foreign)
    assert "model-00007-of-00009.safetensors" not in names
    assert (box / "model.safetensors.index.json").read_bytes() != b"{}"


def test_partial_files_of_another_layout_go_with_the_next_result(folder: Path) -> None:
    box = folder / "box"
    box.mkdir()
    (box / "model-00002-of-00002.safetensors.partial").write_bytes(b"left")
    rm.merge(rm.weighted_sum("a", "b"), output="box/", max_shard_size="1GB")
    assert [path.name for path in box.iterdir()] == ["model.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="links as on POSIX")
def test_a_link_where_the_partial_file_is_due_is_not_written_through(folder: Path) -> None:
    precious = folder / "precious"
    precious.write_bytes(b"precious")
    (folder / "mix.safetensors.partial").symlink_to(precious)
    rm.merge(rm.weighted_sum("a", "b"), output="mix.safetensors")
    assert precious.read_bytes() == b"precious"
    assert not (folder / "mix.safetensors").is_symlink()
    assert len(load_file("mix.safetensors")) == 8


def test_a_folder_where_the_journal_is_due_leaves_no_lock_behind(folder: Path) -> None:
    (folder / "mix.safetensors.journal").mkdir()
    with pytest.raises(rm.OutputError, match="cannot write to"):
        rm.merge(rm.weighted_sum("a", "b"), output="mix.safetensors")
    assert not list(folder.glob("mix.safetensors*.*lock"))
    assert not (folder / "mix.safetensors.partial").exists()


@pytest.mark.parametrize("moment", ["before", "within"])
def test_a_folder_of_components_is_continued_by_the_same_command(
    moment: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = rm.weighted_sum("pipe_a", "pipe_b", alpha=0.3)
    rm.merge(recipe, output="whole/")
    real, renamed = os.replace, []

    def stopped(old: object, new: object) -> None:
        if moment == "before" or renamed:
            raise KeyboardInterrupt
        renamed.append(new)
        real(old, new)  # type: ignore[call-overload]

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            rm.merge(recipe, output="stopped/")
    assert not list((folder / "stopped").glob("model_index.json"))
    rm.merge(recipe, output="stopped/")
    files = {path.relative_to("stopped"): path.read_bytes() for path in Path("stopped").rglob("*") if path.is_file()}
    assert files == {
        path.relative_to("whole"): path.read_bytes() for path in Path("whole").rglob("*") if path.is_file()
    }
    with pytest.raises(rm.OutputError, match="stopped exists"):
        rm.merge(recipe, output="stopped/")


def interrupted_at(name: str, monkeypatch: pytest.MonkeyPatch, merge: Callable[[], object]) -> None:
    """Run a merge up to the moment when it would rename to a name."""
    real = os.replace

    def stopped(old: object, new: object) -> None:
        if str(new).endswith(name):
            raise KeyboardInterrupt
        real(old, new)  # type: ignore[call-overload]

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            merge()


def names_in(folder: str) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def test_what_a_stopped_publication_left_goes_with_a_result_of_another_layout(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pipes() -> object:
        return rm.merge(rm.weighted_sum("pipe_a", "pipe_b"), output="box", max_shard_size="800")

    interrupted_at("v/diffusion_pytorch_model-00002-of-00002.safetensors", monkeypatch, pipes)
    assert "u/diffusion_pytorch_model-00001-of-00002.safetensors" in names_in("box")
    rm.merge(rm.weighted_sum("a", "b"), output="box", max_shard_size="1GB")
    assert names_in("box") == ["model.safetensors"]


def test_files_of_somebody_else_in_an_unfinished_folder_are_an_obstacle(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def merge() -> object:
        return rm.merge(rm.weighted_sum("a", "b"), output="box", max_shard_size="800")

    interrupted_at("-00002-of-00004.safetensors", monkeypatch, merge)
    (folder / "box" / "other.safetensors").write_bytes(b"other")
    with pytest.raises(rm.OutputError, match="box exists\nhint: --overwrite replaces it"):
        merge()
    (folder / "box" / "other.safetensors").unlink()
    merge()
    assert names_in("box") == [
        *(f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)),
        "model.safetensors.index.json",
    ]


def test_an_old_model_is_an_obstacle_though_its_replacement_was_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = rm.weighted_sum("a", "b")
    rm.merge(rm.model("a"), output="box", max_shard_size="800")

    def replace() -> object:
        return rm.merge(recipe, output="box", max_shard_size="800", overwrite=True)

    interrupted_at("-00002-of-00004.safetensors", monkeypatch, replace)
    with pytest.raises(rm.OutputError, match="box exists"):
        rm.merge(recipe, output="box", max_shard_size="800")
    replace()
    rm.merge(recipe, output="fresh", max_shard_size="800")
    assert [(folder / "box" / name).read_bytes() for name in names_in("box")] == [
        (folder / "fresh" / name).read_bytes() for name in names_in("fresh")
    ]


def test_a_journal_that_names_files_elsewhere_is_not_believed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from remelt.engine.journal import Journal, Names

    (folder / "box").mkdir()
    names = frozenset({"../a.safetensors", str(folder / "b.safetensors")})
    journal = Journal(folder / "box" / "remelt.journal", "of another")
    journal.begin([], Names(names, names))
    journal.close()
    rm.merge(rm.weighted_sum("a", "b"), output="box", max_shard_size="1GB")
    assert names_in("box") == ["model.safetensors"]
    assert (folder / "a.safetensors").exists()
    assert (folder / "b.safetensors").exists()


def test_a_result_of_one_part_does_not_hide_behind_a_model_of_components(folder: Path) -> None:
    rm.merge(rm.weighted_sum("pipe_a", "pipe_b"), output="box/")
    with pytest.raises(rm.OutputError, match=r"box is a model of several components, as its model_index\.json says"):
        rm.merge(rm.weighted_sum("a", "b"), output="box", max_shard_size="1GB", overwrite=True)


@pytest.mark.skipif(os.name == "nt", reason="links as on POSIX")
@pytest.mark.parametrize("kind", ["symlink", "hardlink"])
@pytest.mark.parametrize("what", ["partial", "journal"])
def test_no_link_is_written_through(what: str, kind: str, folder: Path) -> None:
    precious = folder / "precious"
    precious.write_bytes(b"precious")
    link = folder / f"mix.safetensors.{what}"
    link.symlink_to(precious) if kind == "symlink" else link.hardlink_to(precious)
    rm.merge(rm.weighted_sum("a", "b"), output="mix.safetensors")
    assert precious.read_bytes() == b"precious"
    assert len(load_file("mix.safetensors")) == 8


@pytest.mark.skipif(os.name == "nt", reason="links as on POSIX")
def test_a_link_where_the_lock_is_due_is_refused(folder: Path) -> None:
    precious = folder / "precious"
    precious.write_bytes(b"precious")
    (folder / "mix.safetensors.lock").symlink_to(precious)
    with pytest.raises(rm.OutputError, match=r"mix.safetensors.lock: it is a symbolic link\nhint: remove it"):
        rm.merge(rm.weighted_sum("a", "b"), output="mix.safetensors")
    assert precious.read_bytes() == b"precious"


def merge_all(*recipes: tuple[Node, str], **options: object) -> object:
    """Several recipes to files, as the command line does."""
    chosen = rm.MergeOptions(**options)  # type: ignore[arg-type]
    sources = [load_recipe(recipe) for recipe, _ in recipes]
    with prepare_merges(sources, [output for _, output in recipes], chosen) as prepared:
        *_, merged = run_prepared(prepared, chosen)
    return merged


def test_of_several_merges_none_is_published_where_one_fails(folder: Path, write_model: Callable[..., Path]) -> None:
    write_model(folder / "spoiled", {"w": torch.tensor([float("nan")])})
    sound = rm.weighted_sum("a", "b")
    with pytest.raises(rm.NonFiniteError):
        merge_all((sound, "bat/sound.safetensors"), (rm.n_average("spoiled"), "bat/spoiled.safetensors"))
    assert not (folder / "bat" / "sound.safetensors").exists()
    merged = merge_all((sound, "bat/sound.safetensors"))
    assert isinstance(merged, Merged)
    assert merged.kept > 0


def test_a_publication_that_fails_after_another_says_what_was_published(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def broken(old: object, new: object) -> None:
        if str(new).endswith("two.safetensors"):
            raise OSError(5, "Input/output error", str(new))
        real(old, new)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "replace", broken)
    said = r"cannot publish two.safetensors: Input/output error.*; published before that: one.safetensors"
    with pytest.raises(rm.RunError, match=said):
        merge_all((rm.n_average("a"), "one.safetensors"), (rm.n_average("b"), "two.safetensors"))


def test_the_disk_must_hold_all_results_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = (rm.n_average("a"), "one.safetensors"), (rm.n_average("b"), "two.safetensors")
    monkeypatch.setattr(outputs, "free_disk", lambda path: 5000)
    rm.plan(*recipes[0])
    with pytest.raises(rm.BudgetError, match=r"the output needs \d.* KiB, but the disk has 4.88 KiB free"):
        merge_all(*recipes)
    assert not list(folder.glob("*.partial"))


def test_what_an_interrupted_merge_reserved_is_not_asked_for_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = rm.weighted_sum("a", "b")
    interrupted_at("mix.safetensors", monkeypatch, lambda: rm.merge(recipe, output="mix.safetensors"))
    monkeypatch.setattr(outputs, "free_disk", lambda path: 10)
    with pytest.raises(rm.BudgetError):
        rm.merge(recipe, output="elsewhere.safetensors")
    rm.merge(recipe, output="mix.safetensors")


def test_arguments_that_are_no_recipe_and_no_path_are_told_so() -> None:
    with pytest.raises(rm.OptionError, match=r"got dict\nhint: remelt\.model\(tensors\) makes a recipe of tensors"):
        rm.merge({"w": torch.zeros(2)})  # type: ignore[arg-type]
    with pytest.raises(rm.OptionError, match="the output is a path, or None for memory, but got int"):
        rm.merge(rm.model("a"), 3)  # type: ignore[arg-type]
    with pytest.raises(rm.OptionError, match=r"a merge has no option 'overwite'\nhint: did you mean 'overwrite'\?"):
        rm.merge(rm.model("a"), overwite=True)


def test_tensors_without_values_are_refused() -> None:
    with pytest.raises(rm.RecipeError, match="w is on the device meta, where tensors have no values"):
        rm.merge(rm.model({"w": torch.zeros(2, device="meta")}))
