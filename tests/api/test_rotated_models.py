"""Rotated heads in merges and files: the function stays, bytes depend on the models alone, what cannot is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import Tensors, clip_l, groups_of, shuffled, whole, write, write_permutations

import remelt as rm
from remelt.alignment.files import SavedPermutations, load_permutations
from remelt.alignment.instances import INSTANCES
from remelt.alignment.permutation import random_permutation
from remelt.alignment.rotated_checkpoint import RotatedCheckpoint
from remelt.alignment.rotations import rotatable, rotated
from remelt.api import alignment
from remelt.api.permuted_adapters import permute_adapter
from remelt.api.rotated_views import SavedTurns
from remelt.archs.axes.find import axis_groups
from remelt.cli.main import run
from remelt.errors import AdapterError, CheckError, RecipeError
from remelt.formats.checkpoint import open_checkpoint

LAYER = "lora_te_text_model_encoder_layers_0_"


def orthogonal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    found: torch.Tensor = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))[0].float()
    return found


def turned(tensors: Tensors, seed: int = 0) -> SavedPermutations:
    """Random permutations of all groups, and random rotations after them."""
    saved = shuffled("clip_l", tensors, seed)
    found = {
        group.name: {
            name: orthogonal(*group.extent(group.by_name[name]), group.by_name[name].size, seed=seed + 1 + place)
            for place, name in enumerate(rotatable(group, saved.shapes))
        }
        for group in saved.groups
        if rotatable(group, saved.shapes)
    }
    return replace(saved, rotations=found)


def by_definition(tensors: Tensors, saved: SavedPermutations) -> Tensors:
    return rotated(whole(tensors, saved), saved.groups, saved.rotations)


def nearness(one: Tensors, other: Tensors) -> float:
    return sum(float((one[key].double() * other[key].double()).sum()) for key in one)


def alike(found: Tensors, wanted: Tensors) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def close(found: Tensors, wanted: Tensors, tolerance: float) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.allclose(found[key], wanted[key], rtol=tolerance, atol=tolerance) for key in wanted
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text encoders ``a``, ``b`` and ``b32``, and permutations with rotations, ``R``."""
    made = tmp_path_factory.mktemp("models")
    tensors = clip_l()
    write(made, "a", clip_l(1))
    write(made, "b", tensors)
    write(made, "b32", {key: one.float() for key, one in tensors.items()})
    write_permutations(made, "R", turned(tensors))
    return made


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.mark.parametrize("name", ["vit", "clip_l"])
def test_an_aligned_model_with_rotations_computes_the_same_and_lies_nearer(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    one, other = INSTANCES[name](seed=1), INSTANCES[name](seed=2)
    monkeypatch.setattr(alignment, "heads_of", lambda given: one.heads)
    write(tmp_path, "a", dict(one.tensors))
    write(tmp_path, "b", dict(other.tensors))
    write(tmp_path, "b32", {key: tensor.float() for key, tensor in other.tensors.items()})
    a, b, b32 = (tmp_path / f"{stem}.safetensors" for stem in ("a", "b", "b32"))
    plain = rm.merge(rm.rebasin(b, to=a, start="identity"))
    found = rm.merge(rm.rebasin(b, to=a, start="identity", rotations=True))
    assert nearness(one.tensors, found) > nearness(one.tensors, plain)
    single = rm.merge(rm.rebasin(b32, to=a, start="identity", rotations=True))
    for made, tolerance in ((found, 1e-6), (single, 1e-4)):  # matrices are kept in float32
        wanted = other.function(other.tensors)
        got = other.function({key: tensor.double() for key, tensor in made.items()})
        for x, y in zip(got, wanted, strict=True):
            assert float((x - y).abs().max() / y.abs().max()) < tolerance


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux", "llama", "t5"])
def test_random_permutations_and_rotations_of_everything_keep_the_function(name: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    one = INSTANCES[name]()
    groups, drawn = axis_groups(one.arch, one.shapes, one.heads), np.random.default_rng(0)
    free = [group for group in groups if not group.is_fixed]
    rotations = {
        group.name: {
            level: orthogonal(*group.extent(group.by_name[level]), group.by_name[level].size)
            for level in rotatable(group, one.shapes)
        }
        for group in free
    }
    assert any(rotations.values())
    saved = SavedPermutations(
        {group.name: random_permutation(group, drawn) for group in free},
        groups,
        one.shapes,
        one.arch,
        rotations={group: levels for group, levels in rotations.items() if levels},
    )
    made = rm.merge(rm.permute(write(tmp_path, "model", dict(one.tensors)), saved))
    for x, y in zip(one.function(made), one.function(one.tensors), strict=True):
        assert float((x - y).abs().max() / y.abs().max()) < 1e-6  # matrices are of float32


def test_found_rotations_are_kept_and_applied_to_the_same_bytes(folder: Path) -> None:
    plain = rm.align_models("b", to="a", start="identity")
    found = rm.align_models("b", to="a", start="identity", rotations=True, save="P.safetensors", overwrite=True)
    assert len(found.match.rotations) == 24 - 12  # one group of each layer is no attention
    assert found.match.after > plain.match.after > plain.match.before
    recipe = rm.weighted_sum("a", rm.rebasin("b", to="a", start="identity", rotations=True), alpha=0.25)
    made = rm.merge(recipe, "mixed.safetensors", overwrite=True, threads=2)
    kept = rm.weighted_sum("a", rm.permute("b", "P"), alpha=0.25)
    assert alike(rm.merge(kept), load_file(made))
    assert alike(rm.merge(rm.weighted_sum("a", rm.permute("b", found.saved), alpha=0.25)), load_file(made))
    assert alike(rm.merge(made), load_file(made))  # by the recipe that it carries
    again = rm.merge(recipe, "again.safetensors", overwrite=True, threads=1, memory="64MiB")
    assert alike(load_file(again), load_file(made))
    with safe_open(made, "pt") as file:
        assert "rotations=True" in file.metadata()["remelt_recipe"]
    with safe_open("P.safetensors", "pt") as file:
        assert file.metadata()["remelt_permutations"] == "2"
        assert file.get_tensor("text.layers.0.attention/qk.rotation").dtype == torch.float32


@pytest.mark.parametrize(("name", "tolerance"), [("b", 2e-3), ("b32", 1e-6)])
def test_a_rotated_model_is_that_of_the_definition_and_the_inverse_undoes_it(name: str, tolerance: float) -> None:
    saved, tensors = load_permutations(Path("R.safetensors")), load_file(f"{name}.safetensors")
    assert len(saved.rotations) == 12
    found = rm.merge(rm.permute(name, "R"), "moved.safetensors", overwrite=True)
    moved = load_file(found)
    assert close(moved, by_definition(tensors, saved), tolerance)
    assert not close(moved, whole(tensors, saved), tolerance)
    assert close(rm.merge(rm.permute("moved", "R", inverse=True)), tensors, 2 * tolerance)
    assert alike(rm.merge(found), moved)


def test_what_is_read_does_not_depend_on_how_it_is_cut(folder: Path) -> None:
    saved = load_permutations(Path("R.safetensors"))
    with open_checkpoint(folder / "b.safetensors") as checkpoint:
        view = RotatedCheckpoint(checkpoint, SavedTurns(saved))
        drawn = np.random.default_rng(0)
        changed = set(view.turning.keys)
        assert {key for key in view.tensors if not view.is_view(key)} == changed
        for key in sorted(changed)[:8]:
            whole_tensor, size = bytes(view.read(key)), view.tensors[key].nbytes
            assert whole_tensor != bytes(checkpoint.read(key))
            for _ in range(20):
                start, stop = sorted(int(one) for one in drawn.integers(0, size + 1, 2))
                assert bytes(view.read(key, start, stop)) == whole_tensor[start:stop]


def test_memory_is_bounded_and_planned() -> None:
    recipe = rm.weighted_sum("a", rm.permute("b", "R"), alpha=0.3)
    planned = rm.plan(recipe, "planned.safetensors", threads=1, memory="96MiB")
    plain = rm.plan(rm.weighted_sum("a", "b", alpha=0.3), "planned.safetensors", threads=1, memory="96MiB")
    assert plain.peak_memory < planned.peak_memory <= 96 * 2**20
    assert planned.bytes_read == plain.bytes_read


def lora(*, of: str = "self_attn_q_proj") -> Tensors:
    generator = torch.Generator().manual_seed(5)
    found: Tensors = {}
    for name, (outputs, inputs) in {of: (64, 64), "self_attn_out_proj": (64, 64), "mlp_fc1": (256, 64)}.items():
        found[f"{LAYER}{name}.lora_up.weight"] = torch.randn(outputs, 4, generator=generator)
        found[f"{LAYER}{name}.lora_down.weight"] = torch.randn(4, inputs, generator=generator)
    return found | {f"{LAYER}{of}.alpha": torch.tensor(2.0)}


def test_a_lora_follows_its_rotated_model_by_its_factors_and_in_recipes(folder: Path) -> None:
    save_file(lora(), "style.safetensors")
    saved = load_permutations(Path("R.safetensors"))
    wanted = by_definition(rm.merge(rm.model("b32") + 0.7 * rm.adapter("style")), saved)
    followed = load_file(permute_adapter("style", "R", "followed.safetensors", overwrite=True))
    assert {key: one.shape for key, one in followed.items()} == {key: one.shape for key, one in lora().items()}
    for adapter in (rm.adapter("followed"), rm.permute(rm.adapter("style"), "R")):
        assert close(rm.merge(rm.permute("b32", "R") + 0.7 * adapter), wanted, 1e-5)
    back = load_file(permute_adapter("followed", "R", "back.safetensors", inverse=True, overwrite=True))
    assert close(back, lora(), 1e-5)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"dora_scale": (64, 1)}, "its heads are rotated, but it has parts of rotated rows, or magnitudes of rows"),
        (
            {"hada_w1_a": (64, 4), "hada_w1_b": (4, 64), "hada_w2_a": (64, 4), "hada_w2_b": (4, 64)},
            "its heads are rotated, which a LoHa cannot follow by its parts",
        ),
    ],
)
def test_what_is_no_sum_of_rows_is_refused_by_name(parts: dict[str, tuple[int, ...]], message: str) -> None:
    tensors = {f"{LAYER}self_attn_v_proj.{part}": torch.rand(shape) + 0.5 for part, shape in parts.items()}
    if "dora_scale" in parts:
        tensors |= {key: one for key, one in lora(of="self_attn_v_proj").items() if "v_proj" in key}
    save_file(tensors, "other.safetensors")
    with pytest.raises(AdapterError) as refused:
        permute_adapter("other", "R", "never.safetensors")
    assert f"  {LAYER}self_attn_v_proj: {message}" in refused.value.message
    wanted = by_definition(rm.merge(rm.model("b32") + rm.adapter("other")), load_permutations(Path("R.safetensors")))
    found = rm.merge(rm.permute("b32", "R") + rm.permute(rm.adapter("other"), "R"))
    assert close(found, wanted, 1e-4)  # in a recipe it is the difference that follows


def test_a_model_that_does_not_fit_is_refused(folder: Path) -> None:
    changed = load_file("b.safetensors")
    key = "text_model.encoder.layers.3.self_attn.q_proj.bias"
    changed[key] = changed[key].int()
    write(folder, "changed", changed)
    only = replace(load_permutations(Path("R.safetensors")), permutations={})
    with pytest.raises(CheckError, match=f"1 tensor is on permuted axes, but of I32: {key}"):
        rm.plan(rm.permute("changed", only))


def test_the_command_rotates_and_tells_so(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("rebasin", "--model-a", "a", "--model-b", "b", "--start", "identity", "--overwrite")
    more = ("--rotations", "--save-permutations", "Q.safetensors", "-o", "mix")
    assert run([*words, *more]) == 0
    assert "heads of 12 groups were rotated\n" in capsys.readouterr().out
    words = words[:5] + words[7:]
    assert run([*words, "--permutations", "Q", "-o", "again"]) == 0
    assert alike(load_file("again.safetensors"), load_file("mix.safetensors"))


@pytest.mark.parametrize("name", ["crossing", "rotations"])
def test_switches_are_true_or_false(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name} is True or False"):
        rm.rebasin("b", to="a", **{name: 1})  # type: ignore[arg-type]


def test_text_has_rotations_and_reads_them_again() -> None:
    recipe = rm.rebasin("b", to="a", rotations=True)
    text = rm.serialize(recipe)
    assert "rebasin(b, to=a, rotations=True)" in text
    assert rm.deserialize(text).digest() == recipe.digest()


def test_a_plan_tells_that_heads_are_rotated() -> None:
    (note,) = rm.plan(rm.rebasin("b", to="a", rotations=True), "planned.safetensors").notes
    assert "FLOP a dense sweep, and the heads' rotations" in note


def test_groups_of_attention_alone_are_rotated() -> None:
    tensors = clip_l()
    shapes = {key: tuple(one.shape) for key, one in tensors.items()}
    assert sum(bool(rotatable(group, shapes)) for group in groups_of("clip_l", tensors)) == 12
