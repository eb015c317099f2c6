"""Models aligned in recipes: planned from headers, matched once the merge begins, refused where they do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file as torch_save
from small_models import Tensors, clip_l, groups_of, sd1, shuffled, whole, write

import remelt as rm
from remelt.alignment.files import load_permutations
from remelt.alignment.instances import INSTANCES
from remelt.alignment.permutation import permuted, random_permutation
from remelt.api import alignment
from remelt.api.alignment import CheckpointWeights, format_work, heads_of
from remelt.archs.arch import find_arch
from remelt.archs.axes.find import axis_groups
from remelt.archs.detect import Detection
from remelt.check.inputs import Input
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import CheckError, FormatError, OutputError, RecipeError
from remelt.formats.checkpoint import open_checkpoint
from remelt.formats.memory import MemoryCheckpoint
from remelt.recipe.node import model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text encoders: ``a``, ``b``, which is ``a`` shuffled, with noise, and a fine-tune of ``a``."""
    made = tmp_path_factory.mktemp("models")
    tensors = clip_l()
    write(made, "a", tensors)
    noise = clip_l(7)
    moved = whole(tensors, shuffled("clip_l", tensors, crossing=False))
    write(made, "b", {key: one + 0.3 * noise[key] for key, one in moved.items()})
    write(made, "tuned", {key: one + 0.001 * noise[key] for key, one in tensors.items()})
    return made


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def alike(found: Tensors, wanted: Tensors) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_shuffled_model_is_found_kept_and_merged_as_it_was(folder: Path) -> None:
    visits: list[object] = []
    found = rm.align_models("b", to="a", save="P.safetensors", start="identity", progress=visits.append, overwrite=True)
    assert len(visits) >= found.moved > 20
    assert found.match.after > found.match.before
    saved = load_permutations(folder / "P.safetensors")
    planted = shuffled("clip_l", clip_l(), crossing=False).inverse()
    assert saved.permutations.keys() <= planted.permutations.keys()
    for name, one in planted.permutations.items():
        assert one.inverse().after(saved.permutations[name]).is_identity, name
    assert (saved.arch, saved.before, saved.after) == ("clip_l", found.match.before, found.match.after)
    assert len(saved.reference) == len(saved.model) == 64
    assert saved.reports["text.layers.0.mlp"]["moved"] is True
    aligned = rm.merge(rm.rebasin("b", to="a", start="identity"), "aligned.safetensors", overwrite=True)
    assert alike(load_file(aligned), rm.merge(rm.permute("b", "P")))
    assert alike(rm.merge(aligned), load_file(aligned))  # by the recipe that it carries
    mixed = rm.merge(rm.weighted_sum("a", rm.rebasin("b", to="a", start="identity"), alpha=0.25))
    assert alike(mixed, rm.merge(rm.weighted_sum("a", rm.permute("b", "P"), alpha=0.25)))


def test_a_plan_tells_what_is_matched_and_matches_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "align", None)  # nobody calls it
    recipe = rm.weighted_sum("a", rm.rebasin("b", to="a"))
    planned = rm.plan(recipe, "mix.safetensors")
    (note,) = planned.notes
    assert note.startswith("b.safetensors is aligned to a.safetensors first: 24 groups, ")
    assert note.endswith("FLOP a dense sweep; 1 that tie components are left as they are")
    whole_plan = rm.plan(rm.rebasin("b", to="a", crossing=True), "mix.safetensors")
    assert "first: 25 groups" in whole_plan.notes[0]


def test_one_alignment_is_found_once_however_often_a_recipe_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(alignment, "align", lambda pair, **given: asked.append(given) or _still(pair))
    one, other = rm.rebasin("b", to="a"), rm.rebasin("b", to="a")
    made = rm.merge(rm.weighted_sum(rm.weighted_sum("a", one), rm.weighted_sum("a", other), alpha=0.5))
    assert len(asked) == 1
    assert alike(made, rm.merge(rm.weighted_sum("a", "b")))


def _still(pair: alignment.Pair) -> object:
    from remelt.alignment.matching import Match

    return Match({}, 0.0, 0.0, (0.0, 0.0), "identity", 1)


def test_an_aligned_reference_is_aligned_first(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    monkeypatch.setattr(alignment, "align", lambda pair, **_: order.append(pair.labels) or _still(pair))
    rm.merge(rm.rebasin("tuned", to=rm.rebasin("b", to="a")))
    assert order == [
        ("a.safetensors", "b.safetensors"),
        ("b.safetensors, aligned to a.safetensors", "tuned.safetensors"),
    ]


def test_margins_are_made_once_and_prove_that_a_fine_tune_stays(folder: Path) -> None:
    first = rm.align_models("tuned", to="a", margins="margins.safetensors")
    assert (folder / "margins.safetensors").is_file()
    again = rm.align_models("tuned", to="a", margins="margins.safetensors", save="still.safetensors", overwrite=True)
    assert len(first.match.certified) == len(again.match.certified) == 24
    assert load_permutations(folder / "still.safetensors").certified == 1.0
    assert again.moved == 0
    with pytest.raises(FormatError, match="holds the margins of another reference"):
        rm.align_models("a", to="b", margins="margins.safetensors")


def test_models_that_do_not_fit_are_refused_by_name_before_matching(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alignment, "align", None)
    tensors = load_file("b.safetensors")
    key = "text_model.encoder.layers.3.mlp.fc1"
    changed = {name: one for name, one in tensors.items() if name != f"{key}.bias"}
    changed[f"{key}.weight"] = tensors[f"{key}.weight"][:128]
    changed["text_model.encoder.layers.4.mlp.fc1.weight"] = tensors["text_model.encoder.layers.4.mlp.fc1.weight"].int()
    changed["text_model.encoder.layers.3.mlp.fc2.weight"] = tensors["text_model.encoder.layers.3.mlp.fc2.weight"][
        :, :128
    ]
    write(folder, "changed", changed)
    with pytest.raises(CheckError) as refused:
        rm.plan(rm.weighted_sum("b", rm.rebasin("b", to="changed")))
    told = str(refused.value)
    assert (
        f"changed.safetensors  lacks 1 tensor that b.safetensors has, of groups that it has otherwise: {key}.bias"
        in told
    )
    assert f"b.safetensors  {key}.weight is [256, 64], but [128, 64] in changed.safetensors" in told
    assert "changed.safetensors  1 tensor is on permuted axes, but of I32: " in told
    write(folder, "other", sd1())
    with pytest.raises(CheckError, match=r"b\.safetensors  is clip_l, but other\.safetensors, .*, is sd1"):
        rm.plan(rm.rebasin("b", to="other"))
    with pytest.raises(CheckError, match="memory  is of no known arch, so that nobody can tell its axis groups"):
        rm.plan(rm.rebasin("b", to=rm.model({"w": torch.zeros(2)})))


def test_a_specification_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arch: str, shapes: object, heads: object = None) -> object:
        first, *others = groups_of("clip_l", clip_l())
        return (replace(first, windows=first.windows[1:]), *others)

    monkeypatch.setattr(alignment, "axis_groups", broken)
    with pytest.raises(CheckError, match=r"the axis groups of clip_l do not fit it: .*that no group has"):
        rm.plan(rm.rebasin("b", to="a"))


def test_an_adapter_is_no_model_to_be_aligned(folder: Path) -> None:
    write(folder, "style", {"x.lora_up.weight": torch.zeros(4, 2), "x.lora_down.weight": torch.zeros(2, 4)})
    with pytest.raises(RecipeError, match=r"style\.safetensors is an adapter, and rebasin aligns models"):
        rm.plan(rm.weighted_sum("a", rm.rebasin("style", to="a")))
    with pytest.raises(RecipeError, match=r"style\.safetensors is an adapter, and rebasin aligns models"):
        rm.plan(rm.rebasin("a", to="style"))


def test_files_that_are_there_are_not_replaced_unasked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "align", None)
    with pytest.raises(OutputError, match=r"a\.safetensors exists"):
        rm.align_models("b", to="a", save="a.safetensors")


def test_weights_are_views_of_the_file(folder: Path) -> None:
    with open_checkpoint(folder / "a.safetensors") as checkpoint:
        weights = CheckpointWeights(checkpoint)
        key = "text_model.encoder.layers.0.mlp.fc1.weight"
        assert weights.tensor(key).data_ptr() == weights.tensor(key).data_ptr()
        assert weights.tensor(key).dtype is torch.float16
        assert weights.shapes[key] == (256, 64)
        assert weights.is_float(key)
        assert torch.equal(weights.tensor(key), load_file(folder / "a.safetensors")[key])


def test_heads_are_those_of_the_configuration(tmp_path: Path) -> None:
    checkpoint = MemoryCheckpoint({"w": (TensorInfo(DType.F32, (1,)), bytes(4))})
    given = Input("model", model("model"), checkpoint, Detection(find_arch("llama"), "none"))
    assert heads_of(given) == {}
    checkpoint.path = tmp_path
    assert heads_of(given) == {}
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64, "num_attention_heads": 4}))
    assert heads_of(given)["model"].heads(64) == 4
    seeing = replace(given, detection=Detection(find_arch("vit"), "none"))
    assert heads_of(seeing)["vision"].heads(64) == 4
    assert heads_of(replace(given, detection=Detection(find_arch("sd3"), "none"))) == {}


def test_work_is_told_in_powers_of_a_thousand() -> None:
    assert [format_work(one) for one in (0, 999, 1e6, 29.24e12)] == ["0 FLOP", "999 FLOP", "1 MFLOP", "29.2 TFLOP"]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "resnet", "mlp", "llama"])
def test_networks_are_aligned_as_files_with_an_arch_or_without(name: str, tmp_path: Path) -> None:
    instance = INSTANCES[name]()
    tensors = {key: one.float().contiguous() for key, one in instance.tensors.items() if one.is_floating_point()}
    shapes = {key: tuple(one.shape) for key, one in tensors.items()}
    groups = [group for group in axis_groups(name, shapes) if not group.is_fixed]
    generator = np.random.default_rng(1)
    hidden = {group.name: random_permutation(group, generator) for group in groups}
    torch_save(tensors, tmp_path / "a.safetensors")
    torch_save(permuted(tensors, hidden.values()), tmp_path / "b.safetensors")
    found = rm.align_models(tmp_path / "b.safetensors", to=tmp_path / "a.safetensors").match
    assert {one for one, got in found.permutations.items() if got.after(hidden[one]).is_identity} == set(hidden)
    torch_save({**tensors, "model.layers.0.layer_scale.weight": torch.ones(3)}, tmp_path / "c.safetensors")
    if name not in ("resnet", "mlp"):
        with pytest.raises(CheckError) as refused:
            rm.align_models(tmp_path / "c.safetensors", to=tmp_path / "a.safetensors")
        assert "'model.layers.0.layer_scale.weight' has 3 elements of axis 0 that no group has" in str(refused.value)


def test_running_averages_that_the_reference_lacks_follow(tmp_path: Path) -> None:
    tensors = sd1()
    averages = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): one.clone()
        for key, one in tensors.items()
        if key.startswith("model.diffusion_model.")
    }
    hidden = shuffled("sd1", {**tensors, **averages}, crossing=False)
    torch_save(tensors, tmp_path / "a.safetensors")
    torch_save(whole({**tensors, **averages}, hidden), tmp_path / "b.safetensors")
    found = rm.align_models(tmp_path / "b.safetensors", to=tmp_path / "a.safetensors", start="identity")
    aligned = whole(load_file(tmp_path / "b.safetensors"), found.saved)
    for key in averages:
        assert torch.equal(aligned[key], averages[key]), key
