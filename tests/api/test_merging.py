"""Merging from disk to disk: what is computed, what is copied, what is refused, and that nothing is lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import remelt as rm
from remelt.api.hashing import hash_model

Shapes = dict[str, tuple[int, ...]]
SHAPES: Shapes = {
    **{f"layers.{i}.attn.{n}.weight": (8, 8) for i in range(4) for n in ("to_q", "to_k")},
    **{f"layers.{i}.norm.weight": (8,) for i in range(4)},
    "embed.weight": (37, 5),
    "gain": (),
    "nothing": (0, 3),
}


@pytest.fixture
def folder(
    tmp_path: Path,
    write_model: Callable[..., Path],
    random_tensors: Callable[..., dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder with models a, b and c, of half precision, with an integer tensor each; it is the current one."""
    for seed, name in enumerate("abc", start=1):
        tensors = random_tensors(SHAPES, seed=seed, dtype=torch.float16)
        tensors["ids"] = torch.arange(5) + seed
        write_model(tmp_path / f"{name}.safetensors", tensors)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def half(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.float16)


def test_a_merge_writes_what_the_formula_says(folder: Path) -> None:
    written = rm.merge(rm.weighted_sum("a", "b", alpha=0.3), output=folder / "mix.safetensors")
    a, b, mix = load_file("a.safetensors"), load_file("b.safetensors"), load_file(written)
    assert set(mix) == set(a)
    for key in SHAPES:
        assert torch.equal(mix[key], half(torch.lerp(a[key].float(), b[key].float(), 0.3))), key
    assert torch.equal(mix["ids"], a["ids"])
    assert mix["ids"].dtype == torch.int64


def test_operators_are_affine_arithmetic(folder: Path) -> None:
    a, b, c = (load_file(f"{name}.safetensors")["embed.weight"].float() for name in "abc")
    x, y, z = map(rm.model, "abc")
    assert torch.equal(rm.merge(x + 0.5 * (y - z))["embed.weight"], half(a + 0.5 * (b - c)))
    assert torch.equal(rm.merge(0.5 * x + 0.5 * y)["embed.weight"], half(0.5 * a + 0.5 * b))
    assert torch.equal(rm.merge(x - y)["embed.weight"], half(a - b))
    assert torch.equal(rm.merge(x + -(y - z))["embed.weight"], half(a + -1.0 * (b - c)))


def test_without_an_output_the_result_is_a_dictionary_that_can_be_merged_again(folder: Path) -> None:
    once = rm.merge(rm.weighted_sum("a", "b"))
    twice = rm.merge(rm.weighted_sum(rm.model(once), "c", alpha=0.0))
    assert all(torch.equal(once[key], twice[key]) for key in once)


def test_a_model_alone_is_copied_bit_by_bit(folder: Path) -> None:
    rm.merge(rm.model("a"), output="copy.safetensors")
    a, copy = load_file("a.safetensors"), load_file("copy.safetensors")
    assert all(torch.equal(a[key], copy[key]) for key in a)


def test_the_output_keeps_each_tensors_type_unless_another_is_asked_for(
    folder: Path, write_model: Callable[..., Path]
) -> None:
    write_model(
        folder / "wide.safetensors",
        {
            key: value.float() if value.is_floating_point() else value
            for key, value in load_file("a.safetensors").items()
        },
    )
    assert rm.merge(rm.weighted_sum("a", "wide"))["gain"].dtype == torch.float16
    assert rm.merge(rm.weighted_sum("wide", "a"))["gain"].dtype == torch.float32
    cast = rm.merge(rm.weighted_sum("wide", "a"), dtype="bf16")
    assert cast["gain"].dtype == torch.bfloat16
    assert cast["ids"].dtype == torch.int64
    assert rm.merge(rm.cast("wide", "fp16"))["gain"].dtype == torch.float16


def test_block_weights_speak_for_the_keys_that_they_name(folder: Path) -> None:
    weights = rm.blocks({"layers.2": 1.0}) | rm.classes(norm=1.0) | rm.keys({"*.3.attn.to_q.*": 1.0}) | 0.0
    mix = rm.merge(rm.weighted_sum("a", "b", alpha=weights))
    a, b = load_file("a.safetensors"), load_file("b.safetensors")
    from_b = {key for key in SHAPES if ".2." in key or "norm" in key or key == "layers.3.attn.to_q.weight"}
    for key in SHAPES:
        assert torch.equal(mix[key], (b if key in from_b else a)[key]), key


def test_depth_interpolates_over_a_stack(folder: Path) -> None:
    mix = rm.merge(rm.weighted_sum("a", "b", alpha=rm.depth([0.0, 1.0]) | 0.0))
    a, b = load_file("a.safetensors"), load_file("b.safetensors")
    for index in range(4):
        key = f"layers.{index}.norm.weight"
        assert torch.allclose(mix[key].float(), torch.lerp(a[key].float(), b[key].float(), index / 3), atol=1e-3)


def test_the_result_carries_its_recipe_and_runs_again_to_the_same_bytes(folder: Path) -> None:
    recipe = rm.weighted_sum(folder / "a.safetensors", "b", alpha=rm.blocks({"layers.2": 0.25}) | 0.5)
    rm.merge(recipe, output="first.safetensors")
    with safe_open("first.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert str(folder) not in metadata["remelt_recipe"]
    rm.merge("first.safetensors", output="second.safetensors")
    assert (folder / "first.safetensors").read_bytes() == (folder / "second.safetensors").read_bytes()


def test_tensors_in_memory_are_embedded_as_parameters(folder: Path) -> None:
    held = load_file("b.safetensors")
    rm.merge(rm.weighted_sum("a", rm.model(held, name="mine")), output="mix.safetensors")
    with safe_open("mix.safetensors", framework="pt") as file:
        assert 'mine = parameter("mine")' in file.metadata()["remelt_recipe"]


def test_a_lock_is_verified(folder: Path) -> None:
    import hashlib

    digest = hashlib.sha256((folder / "a.safetensors").read_bytes()).hexdigest()
    rm.merge(rm.model("a", sha256=digest), output="locked.safetensors")
    with safe_open("locked.safetensors", framework="pt") as file:
        assert digest in file.metadata()["remelt_recipe"]
    with pytest.raises(rm.RecipeError, match=r"b is locked to content 0{16}\.\.\., but .*b.safetensors has") as caught:
        rm.merge(rm.model("b", sha256="0" * 64))
    assert "use the file that the recipe was made with" in str(caught.value)


def test_a_locked_model_is_found_by_its_content_whatever_its_name(folder: Path, tmp_path: Path) -> None:
    digest = hash_model("a").sha256
    wanted = load_file("a.safetensors")
    models = tmp_path / "models"
    models.mkdir()
    (folder / "a.safetensors").rename(models / "renamed.safetensors")
    for name in ("a", "b"):  # a name that is gone, and one that another file has by now
        merged = rm.merge(rm.model(name, sha256=digest), models_dirs=[models])
        assert all(merged[key].equal(wanted[key]) for key in wanted)


def test_all_problems_are_told_at_once_before_anything_is_written(
    folder: Path, write_model: Callable[..., Path]
) -> None:
    broken = load_file("b.safetensors")
    del broken["layers.0.norm.weight"], broken["layers.1.norm.weight"]
    broken["embed.weight"] = torch.zeros(37, 6)
    write_model(folder / "broken.safetensors", broken)
    with pytest.raises(rm.CheckError) as caught:
        rm.merge(rm.weighted_sum("a", "broken"), output="mix.safetensors")
    assert str(caught.value) == (
        "refused: 2 problems in 2 inputs\n"
        "  broken.safetensors  lacks 2 keys that a.safetensors has: layers.0.norm.weight, layers.1.norm.weight\n"
        "      --missing first takes them from a.safetensors; --missing skip leaves them out\n"
        "  broken.safetensors  embed.weight is [37, 6], but [37, 5] in a.safetensors: "
        "weighted_sum needs tensors of one shape"
    )
    assert not (folder / "mix.safetensors").exists()
    assert not list(folder.glob("*.partial"))


def test_a_shape_is_never_broadcast(folder: Path, write_model: Callable[..., Path]) -> None:
    narrow = load_file("b.safetensors")
    narrow["layers.0.norm.weight"] = torch.zeros(1, dtype=torch.float16)
    write_model(folder / "narrow.safetensors", narrow)
    with pytest.raises(rm.CheckError, match=r"layers.0.norm.weight is \[1\], but \[8\] in a.safetensors"):
        rm.merge(rm.weighted_sum("a", "narrow"))


def test_missing_keys_are_taken_from_the_first_model_or_left_out_where_asked(
    folder: Path, write_model: Callable[..., Path]
) -> None:
    short = load_file("b.safetensors")
    del short["embed.weight"]
    write_model(folder / "short.safetensors", short)
    a = load_file("a.safetensors")
    taken = rm.merge(rm.weighted_sum("a", "short"), missing="first")
    assert torch.equal(taken["embed.weight"], a["embed.weight"])
    assert "embed.weight" not in rm.merge(rm.weighted_sum("a", "short"), missing="skip")
    assert torch.equal(
        rm.merge(rm.weighted_sum("a", "short"), fallback="c")["embed.weight"],
        load_file("c.safetensors")["embed.weight"],
    )
    assert torch.equal((rm.merge(rm.weighted_sum("short", "b") | rm.model("a")))["embed.weight"], a["embed.weight"])


def test_a_difference_takes_no_missing_key_from_a_model(folder: Path, write_model: Callable[..., Path]) -> None:
    short = load_file("b.safetensors")
    del short["embed.weight"]
    write_model(folder / "short.safetensors", short)
    with pytest.raises(rm.CheckError, match="lacks 1 key"):
        rm.merge(rm.model("a") - rm.model("short"), missing="first")


def test_keys_behind_an_idle_weight_are_not_missed(folder: Path, write_model: Callable[..., Path]) -> None:
    short = load_file("b.safetensors")
    del short["embed.weight"]
    write_model(folder / "short.safetensors", short)
    mix = rm.merge(rm.weighted_sum("a", "short", alpha=rm.keys({"embed.*": 0.0}) | 0.5))
    assert torch.equal(mix["embed.weight"], load_file("a.safetensors")["embed.weight"])


@pytest.fixture
def spoiled(folder: Path, write_model: Callable[..., Path]) -> Path:
    tensors = load_file("b.safetensors")
    tensors["embed.weight"][3, 2] = float("nan")
    tensors["gain"] = torch.tensor(float("inf"), dtype=torch.float16)
    return write_model(folder / "spoiled.safetensors", tensors)


def test_nan_and_infinity_are_refused_by_key_and_nothing_is_published(folder: Path, spoiled: Path) -> None:
    (folder / "mix.safetensors").write_bytes(b"old")
    with pytest.raises(rm.NonFiniteError) as caught:
        rm.merge(rm.weighted_sum("a", "spoiled"), output="mix.safetensors", overwrite=True)
    assert "spoiled.safetensors: NaN or infinity in 2 tensors: embed.weight, gain" in str(caught.value)
    assert (folder / "mix.safetensors").read_bytes() == b"old"
    rm.merge(rm.weighted_sum("a", "spoiled"), output="mix.safetensors", overwrite=True, nonfinite="keep")
    rm.merge(rm.weighted_sum("a", "spoiled"), output="undisturbed.safetensors", nonfinite="keep")
    assert load_file("mix.safetensors").keys() == load_file("undisturbed.safetensors").keys()
    assert (folder / "mix.safetensors").read_bytes() == (folder / "undisturbed.safetensors").read_bytes()
    assert not list(folder.glob("mix.safetensors.*"))


def test_nan_is_kept_where_asked(folder: Path, spoiled: Path) -> None:
    mix = rm.merge(rm.weighted_sum("a", "spoiled"), nonfinite="keep")
    assert torch.isnan(mix["embed.weight"]).sum() == 1


def test_a_tensor_missing_only_for_nan_never_changes_the_set_of_keys(folder: Path, spoiled: Path) -> None:
    mix = rm.merge(rm.weighted_sum("a", "spoiled"), nonfinite="missing", missing="skip")
    a = load_file("a.safetensors")
    assert set(mix) == set(a)
    assert torch.equal(mix["embed.weight"], a["embed.weight"])
    assert torch.equal(mix["gain"], a["gain"])


def test_an_overflow_of_the_results_type_is_told_by_key(folder: Path) -> None:
    big = {"w": torch.full((4,), 60000.0)}
    with pytest.raises(rm.NonFiniteError, match="w overflows F16"):
        rm.merge(rm.model(big) + 1.0 * (rm.model(big) - rm.model({"w": torch.zeros(4)})), dtype="fp16")


def test_an_existing_output_is_kept_unless_it_may_be_replaced(folder: Path) -> None:
    with pytest.raises(rm.OutputError, match="--overwrite replaces it"):
        rm.merge(rm.model("a"), output="b.safetensors")
    rm.merge(rm.weighted_sum("a", "b", alpha=0.5), output="b.safetensors", overwrite=True)
    assert not torch.equal(load_file("b.safetensors")["gain"], load_file("a.safetensors")["gain"])


def test_an_output_may_be_one_of_its_inputs(folder: Path) -> None:
    expected = rm.merge(rm.weighted_sum("a", "b", alpha=0.3))
    rm.merge(rm.weighted_sum("a", "b", alpha=0.3), output="a.safetensors", overwrite=True)
    found = load_file("a.safetensors")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_method_that_fails_leaves_the_old_output(folder: Path) -> None:
    from remelt.methods import METHODS

    plugin = folder / "fails.py"
    plugin.write_text(
        "from __future__ import annotations\n"
        "from remelt.recipe.method import Same, merge_method\n\n\n"
        "@merge_method(cut='element')\n"
        "def fails_at_merge(a: Same) -> Same:\n"
        "    raise ValueError('no')\n"
    )
    METHODS.add_file(plugin)
    (folder / "mix.safetensors").write_bytes(b"old")
    with pytest.raises(rm.MethodError, match=r"fails_at_merge failed on .*: ValueError: no"):
        rm.merge(METHODS["fails_at_merge"]("a"), output="mix.safetensors", overwrite=True)
    assert (folder / "mix.safetensors").read_bytes() == b"old"


def test_threads_change_no_byte(folder: Path) -> None:
    recipe = rm.slerp(rm.weighted_sum("a", "b", alpha=0.3), "c", alpha=0.6)
    contents = set()
    for threads in (1, 2, 5):
        rm.merge(recipe, output=f"{threads}.safetensors", threads=threads)
        contents.add((folder / f"{threads}.safetensors").read_bytes())
    assert len(contents) == 1


def test_components_are_picked_and_omitted(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    for seed, name in enumerate("ab", start=1):
        generator = torch.Generator().manual_seed(seed)
        keys = [f"{part}.layers.{i}.x.weight" for part in ("vae", "unet") for i in range(3)]
        write_model(tmp_path / name, {key: torch.randn(4, generator=generator) for key in keys})
    a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    x, y = rm.model(tmp_path / "a"), rm.model(tmp_path / "b")
    names = set(rm.inspect(tmp_path / "a").components)
    assert names == {"vae", "unet"}
    baked = rm.merge(rm.pick_component(x, "vae") | y)
    assert all(torch.equal(baked[key], (a if key.startswith("vae") else b)[key]) for key in a)
    assert set(rm.merge(rm.omit_component(x, "vae"))) == {key for key in a if key.startswith("unet")}
    with pytest.raises(rm.RecipeError, match="the model has no component 'va'") as caught:
        rm.merge(rm.pick_component(x, "va"))
    assert "did you mean 'vae'?" in str(caught.value)


def test_two_models_of_one_file_are_read_once(folder: Path) -> None:
    plan = rm.plan(rm.n_average("a", "a.safetensors", folder / "a.safetensors"))
    assert [given.label for given in plan.inputs] == ["a.safetensors"]
    assert plan.bytes_read == plan.inputs[0].size


def test_a_plan_costs_only_headers(folder: Path) -> None:
    opened = rm.plan(rm.weighted_sum("a", "b", alpha=0.5), output="mix.safetensors")
    assert opened.bytes_read == 2 * sum(v.nbytes for k, v in load_file("a.safetensors").items() if k != "ids") + 40
    assert opened.outputs[0].size == opened.bytes_written
    assert not (folder / "mix.safetensors").exists()
    rm.merge(rm.weighted_sum("a", "b", alpha=0.5), output="mix.safetensors")
    assert os.path.getsize("mix.safetensors") == opened.bytes_written


def test_idle_reads_are_skipped_and_told(folder: Path) -> None:
    plan = rm.plan(rm.weighted_sum("a", "b", alpha=0.0))
    assert plan.bytes_read == plan.inputs[0].size
    assert "b.safetensors: 15 tensors are not read, and not checked for NaN, as a weight makes them idle" in plan.notes


def test_keys_that_no_weight_speaks_for_are_told(folder: Path) -> None:
    plan = rm.plan(rm.weighted_sum("a", "b", alpha=rm.classes(attn=0.2, norm=0.1)))
    assert plan.notes == (
        "weighted_sum: alpha = 0.5 by default for 3 keys that no weight speaks for: embed.weight, gain, nothing",
    )


def test_too_small_a_budget_is_refused_with_what_is_needed(folder: Path) -> None:
    with pytest.raises(rm.BudgetError, match=r"the step with the highest peak needs .* but --memory allows 1.00 KiB"):
        rm.merge(rm.weighted_sum("a", "b"), output="mix.safetensors", memory="1KiB")
    assert not (folder / "mix.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"missing": "firts"}, "missing is one of error, first, skip, but got 'firts'"),
        ({"nonfinite": "drop"}, "nonfinite is one of error, keep, missing"),
        ({"compute_dtype": "fp16"}, "arithmetic is done in float32 or float64"),
        ({"dtype": "int8"}, "a result's weights are floating-point numbers"),
        ({"dtype": "flot16"}, "'flot16' is not an element type"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"memory": "much"}, "'much' is not an amount of bytes"),
        ({"memory": 0}, "memory must be more than nothing"),
        ({"output": "x.ckpt"}, "results are written as safetensors"),
        ({"output": "x.safetensors", "max_shard_size": 100}, "shards go to a folder"),
    ],
)
def test_an_impossible_option_is_refused(folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(rm.OptionError, match=message.replace(".", r"\.")):
        rm.merge(rm.model("a"), **options)


def test_float64_keeps_its_precision_where_asked_and_is_warned_of_otherwise(
    folder: Path, write_model: Callable[..., Path]
) -> None:
    value = torch.tensor([1.0 + 2.0**-40], dtype=torch.float64)
    for name in ("x", "y"):
        write_model(folder / name, {"w": value})
    recipe = rm.weighted_sum("x", "y", alpha=0.5)
    assert torch.equal(rm.merge(recipe, compute_dtype="float64")["w"], value)
    assert any("F64 tensors in x.safetensors, y.safetensors" in warning for warning in rm.plan(recipe).warnings)


def test_every_element_type_travels(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    floats = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    others = [
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.bool,
    ]
    tensors = {f"t{n}": torch.tensor([0, 1, 1, 0, 1]).to(dtype) for n, dtype in enumerate(floats + others)}
    write_model(tmp_path / "a", tensors)
    merged = rm.merge(rm.weighted_sum(tmp_path / "a", rm.model(tensors), alpha=0.5), output=tmp_path / "o.safetensors")
    found = load_file(merged)
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(
            found[key].double() if tensor.dtype.is_floating_point else found[key].to(torch.int64),
            tensor.double() if tensor.dtype.is_floating_point else tensor.to(torch.int64),
        )


def test_a_recipe_of_unknown_names_tells_the_nearest(folder: Path) -> None:
    with pytest.raises(rm.RecipeError, match=r"the model has no block 'layer.2'") as caught:
        rm.merge(rm.weighted_sum("a", "b", alpha=rm.blocks({"layer.2": 0.5})))
    assert "did you mean 'layers.2'" in str(caught.value)
    with pytest.raises(rm.RecipeError, match="no model is named 'aa'"):
        rm.merge(rm.weighted_sum("aa", "b"))


def test_an_open_parameter_is_refused(folder: Path) -> None:
    with pytest.raises(rm.RecipeError, match="parameter 'x' is still open"):
        rm.merge(rm.weighted_sum("a", rm.parameter("x")))
    with pytest.raises(rm.RecipeError, match="alpha is still open"):
        rm.merge(rm.weighted_sum("a", "b", alpha=rm.search(0, 1)))


def test_companion_files_of_a_model_folder_come_along(folder: Path) -> None:
    import shutil

    for name in "ab":
        (folder / f"{name}_model").mkdir()
        shutil.copy(folder / f"{name}.safetensors", folder / f"{name}_model" / "model.safetensors")
        (folder / f"{name}_model" / "config.json").write_text(json.dumps({"name": name}))
    rm.merge(rm.weighted_sum("a_model", "b_model"), output="merged", max_shard_size=300)
    assert json.loads((folder / "merged" / "config.json").read_text()) == {"name": "a"}
    index = json.loads((folder / "merged" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(load_file("a.safetensors"))
    again = rm.merge(rm.model("merged"))
    expected = rm.merge(rm.weighted_sum("a", "b"))
    assert all(torch.equal(again[key], expected[key]) for key in expected)
    rm.merge(rm.weighted_sum("a_model", "b_model"), output="merged", max_shard_size="1GB", overwrite=True)
    assert sorted(path.name for path in (folder / "merged").iterdir()) == ["config.json", "model.safetensors"]
