"""Permuted models and adapters in merges: the bytes of the definition, in any layout, and what does not fit refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import Tensors, sd1, shuffled, whole, write, write_permutations

import remelt as rm
from remelt.alignment.files import SavedPermutations, load_permutations
from remelt.alignment.permutation import random_permutation
from remelt.api.permuted_adapters import permute_adapter
from remelt.archs.axis_groups import AxisGroup, Level, Window
from remelt.errors import AdapterError, CheckError, FormatError, RecipeError

UNET = "model.diffusion_model."
LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, ``b``, and permutations of all its groups, ``P``."""
    made = tmp_path_factory.mktemp("models")
    tensors = sd1()
    write(made, "b", tensors)
    write(made, "b32", {key: tensor.float() for key, tensor in tensors.items()})
    write(made, "a", sd1(1))
    write_permutations(made, "P", shuffled("sd1", tensors))
    save_file(lora(), made / "style.safetensors", metadata={"ss_network_module": "networks.lora"})
    return made


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def lora() -> Tensors:
    """A LoRA by kohya's names: linear maps, a convolution, a text encoder, a LoHa and a full difference."""
    generator = torch.Generator().manual_seed(5)
    found: Tensors = {}

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    sizes = {
        f"{LAYER}attn1_to_q": (32, 32),
        f"{LAYER}ff_net_0_proj": (256, 32),
        "lora_te_text_model_encoder_layers_0_self_attn_v_proj": (64, 64),
    }
    for name, (outputs, inputs) in sizes.items():
        found |= {f"{name}.lora_up.weight": random(outputs, 4), f"{name}.lora_down.weight": random(4, inputs)}
        found[f"{name}.alpha"] = torch.tensor(2.0)
    conv = "lora_unet_down_blocks_0_resnets_0_conv1"
    found |= {f"{conv}.lora_up.weight": random(32, 4, 1, 1), f"{conv}.lora_down.weight": random(4, 32, 3, 3)}
    found["lora_unet_down_blocks_0_resnets_0_conv2.diff"] = random(32, 32, 3, 3)
    loha = "lora_unet_mid_block_attentions_0_proj_in"
    found |= {f"{loha}.hada_w{one}_a": random(128, 4) for one in "12"}
    return found | {f"{loha}.hada_w{one}_b": random(4, 128) for one in "12"}


def alike(found: Tensors, wanted: Tensors) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_permuted_model_has_the_bytes_of_the_definition_and_the_inverse_undoes_it(folder: Path) -> None:
    saved, tensors = load_permutations(folder / "P.safetensors"), load_file("b.safetensors")
    found = rm.merge(rm.permute("b", "P"), folder / "moved.safetensors", overwrite=True)
    moved = load_file(found)
    assert alike(moved, whole(tensors, saved))
    assert not alike(moved, tensors)
    assert alike(rm.merge(rm.permute("moved", "P", inverse=True)), tensors)
    assert alike(rm.merge(rm.permute(rm.permute("b", "P"), "P", inverse=True)), tensors)


def test_merges_of_permuted_models_are_merges_of_the_moved_files(folder: Path) -> None:
    moved = whole(load_file("b.safetensors"), load_permutations(folder / "P.safetensors"))
    recipe = rm.weighted_sum("a", rm.permute("b", "P"), alpha=0.3)
    assert alike(rm.merge(recipe), rm.merge(rm.weighted_sum("a", rm.model(moved), alpha=0.3)))
    inside = rm.permute(rm.weighted_sum(rm.model("a"), rm.model("b"), alpha=0.3), "P")
    mixed = rm.merge(rm.weighted_sum("a", "b", alpha=0.3))
    assert alike(rm.merge(inside), whole(mixed, load_permutations(folder / "P.safetensors")))


def test_memory_is_bounded_and_planned(folder: Path) -> None:
    recipe = rm.weighted_sum("a", rm.permute("b", "P"), alpha=0.3)
    planned = rm.plan(recipe, "mix.safetensors", threads=1, memory="64MiB")
    assert planned.peak_memory <= 64 * 2**20
    plain = rm.plan(rm.weighted_sum("a", "b", alpha=0.3), "mix.safetensors", threads=1, memory="64MiB")
    assert planned.bytes_read == plain.bytes_read
    tight = rm.merge(recipe, "tight.safetensors", threads=2, memory="64MiB", overwrite=True)
    assert alike(load_file(tight), rm.merge(recipe))


def test_the_result_carries_a_recipe_that_makes_it_again(folder: Path) -> None:
    made = rm.merge(rm.weighted_sum("a", rm.permute(folder / "b", folder / "P"), alpha=0.3), "mix.safetensors")
    with safe_open(made, "pt") as file:
        text = file.metadata()["remelt_recipe"]
    assert str(folder) not in text
    assert "permute(" in text
    assert alike(rm.merge(made), load_file(made))


def test_a_folder_of_diffusers_is_permuted_by_the_original_windows(folder: Path) -> None:
    tensors = sd1(dtype=torch.float32)
    rm.convert("b32", "pipeline", to="diffusers", overwrite=True)
    found = rm.merge(rm.permute("pipeline", "P"), "turned", overwrite=True)
    assert (found / "unet").is_dir()
    back = rm.merge(rm.model("turned"), dialect="original")
    wanted = whole({k: v.half().float() for k, v in tensors.items()}, load_permutations(folder / "P.safetensors"))
    assert all(torch.equal(back[key], wanted[key]) for key in back)
    assert {key for key in wanted if key not in back} == set()
    both = rm.merge(rm.weighted_sum("a", rm.permute("pipeline", "P"), alpha=1.0), dtype="fp16")
    assert alike(both, {key: tensor.half() for key, tensor in wanted.items()})


def test_permuting_commutes_with_applying_an_adapter(folder: Path) -> None:
    saved = load_permutations(folder / "P.safetensors")
    wanted = whole(rm.merge(rm.model("b32") + 0.7 * rm.adapter("style")), saved)
    moved = permute_adapter("style", "P", "followed.safetensors", overwrite=True)
    file, made = load_file("style.safetensors"), load_file(moved)
    assert made.keys() == file.keys()
    assert {key: one.shape for key, one in made.items()} == {key: one.shape for key, one in file.items()}
    assert not alike(made, file)
    with safe_open(moved, "pt") as written:
        assert written.metadata()["ss_network_module"] == "networks.lora"
    for adapter in (rm.adapter("followed"), rm.permute(rm.adapter("style"), "P")):
        assert alike(rm.merge(rm.permute("b32", "P") + 0.7 * adapter), wanted)
    assert alike(rm.merge(rm.permute(rm.model("b32") + 0.7 * rm.adapter("style"), "P")), wanted)
    back = permute_adapter("followed", "P", "back.safetensors", inverse=True, overwrite=True)
    assert alike(load_file(back), file)


def test_an_adapter_that_multiplies_weights_follows_the_model_of_before(folder: Path) -> None:
    style = {key: one for key, one in lora().items() if "to_q" in key}
    style[f"{LAYER}attn1_to_q.dora_scale"] = torch.rand(32, 1) + 0.5
    save_file(style, "dora.safetensors")
    wanted = whole(rm.merge(rm.model("b32") + rm.adapter("dora")), load_permutations(folder / "P.safetensors"))
    permute_adapter("dora", "P", "dora-moved.safetensors", overwrite=True)
    both = rm.permute("b32", "P")
    adapters = (rm.permute(rm.adapter("dora"), "P"), rm.permute(rm.adapter("dora", base=rm.model("b32")), "P"))
    for adapter in (*adapters, rm.adapter("dora-moved")):
        found = rm.merge(both + adapter)
        for key, tensor in wanted.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=2e-6, msg=key)
    with pytest.raises(CheckError, match="multiplies a model's own weights, and that model is not permuted as it is"):
        rm.merge(rm.model("a") + rm.permute(rm.adapter("dora"), "P"))


def test_a_lokr_is_permuted_as_a_difference_but_not_by_its_parts(folder: Path) -> None:
    drawn = torch.Generator().manual_seed(0)
    name = f"{LAYER}attn1_to_q"
    parts = {
        f"{name}.lokr_w1": torch.randn(4, 4, generator=drawn),
        f"{name}.lokr_w2": torch.randn(8, 8, generator=drawn),
    }
    save_file(parts, "lokr.safetensors")
    wanted = whole(rm.merge(rm.model("b32") + rm.adapter("lokr")), load_permutations(folder / "P.safetensors"))
    assert alike(rm.merge(rm.permute("b32", "P") + rm.permute(rm.adapter("lokr"), "P")), wanted)
    with pytest.raises(AdapterError) as refused:
        permute_adapter("lokr", "P", "never.safetensors")
    assert refused.value.message == (
        "lokr.safetensors: 1 of its modules cannot be permuted by their parts:\n"
        f"  {name}: a LoKr has no part for each output and each input"
    )
    assert not (folder / "never.safetensors").exists()


def _changed(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, key: change(tensors[key])}


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (
            _changed(f"{UNET}time_embed.0.weight", lambda one: one[:64]),
            [f"{UNET}time_embed.0.weight is [64, 32], but P.safetensors permutes [128, 32]"],
        ),
        (
            _changed(f"{UNET}time_embed.0.weight", torch.Tensor.int),
            [f"1 tensor is on permuted axes, but of I32: {UNET}time_embed.0.weight"],
        ),
        (
            lambda tensors: {key: one for key, one in tensors.items() if key != f"{UNET}time_embed.0.bias"},
            ["lacks 1 of 3 tensors that P.safetensors permutes as the group unet.time_embed"],
        ),
        (
            lambda tensors: {
                **{key: one for key, one in tensors.items() if key != f"{UNET}time_embed.0.bias"},
                f"{UNET}time_embed.2.weight": tensors[f"{UNET}time_embed.2.weight"][:, :4],
            },
            ["lacks 1 of 3 tensors", "time_embed.2.weight is [128, 4], but P.safetensors permutes [128, 128]"],
        ),
    ],
)
def test_models_that_do_not_fit_are_refused_with_all_that_is_wrong(
    folder: Path, change: Callable[[Tensors], Tensors], messages: list[str]
) -> None:
    write(folder, "changed", change(load_file("b.safetensors")))
    with pytest.raises(CheckError) as refused:
        rm.plan(rm.permute("changed", "P"))
    for message in messages:
        assert message in str(refused.value)
    assert {problem.subject for problem in refused.value.problems} == {"changed.safetensors"}


def test_quantised_tensors_are_refused_by_name(folder: Path) -> None:
    tensors = load_file("b.safetensors")
    key = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    tensors[key.removesuffix("weight") + "scale_weight"] = torch.tensor(2.0)
    write(folder, "scaled", {**tensors, "scaled_fp8": torch.empty(0).to(torch.float8_e4m3fn)})
    with pytest.raises(CheckError, match=r"1 tensor is on permuted axes, but quantised: .*to_q\.weight") as refused:
        rm.plan(rm.permute("scaled", "P"))
    assert "dequantise it first: remelt merge scaled.safetensors --dtype bf16 -o OUT" in str(refused.value)


def test_a_part_of_a_model_is_permuted_by_the_groups_that_it_has(folder: Path) -> None:
    tensors, saved = load_file("b.safetensors"), load_permutations(folder / "P.safetensors")
    apart = {name: one for name, one in saved.permutations.items() if not one.group.crosses}
    write_permutations(folder, "apart", replace(saved, permutations=apart))
    write(folder, "part", {key: one for key, one in tensors.items() if not key.startswith("cond_stage_model.")})
    wanted = whole(tensors, replace(saved, permutations=apart))
    found = rm.merge(rm.permute("part", "apart"))
    assert all(torch.equal(found[key], wanted[key]) for key in found)


def test_other_files_and_models_are_refused(folder: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"a\.safetensors is no permutation file: its metadata has no remelt_permutations"
    ):
        rm.plan(rm.permute("b", "a"))
    with pytest.raises(RecipeError, match="nowhere"):
        rm.plan(rm.permute("b", "nowhere"))
    with pytest.raises(CheckError, match=r"memory  has none of the .* tensors that P\.safetensors permutes"):
        rm.plan(rm.permute(rm.model({"w": torch.zeros(3)}), "P"))
    other = replace(load_permutations(folder / "P.safetensors"), arch="sdxl")
    write_permutations(folder, "other", other)
    with pytest.raises(CheckError, match=r"b\.safetensors  is sd1, but other\.safetensors permutes models of sdxl"):
        rm.plan(rm.permute("b", "other"))
    with pytest.raises(AdapterError, match=r"b\.safetensors is no adapter"):
        permute_adapter("b", "P", "never.safetensors")
    with pytest.raises(FormatError, match="is no permutation file"):
        permute_adapter("style", "a", "never.safetensors")
    save_file({"x.lora_up.weight": torch.zeros(4, 2), "x.lora_down.weight": torch.zeros(2, 4)}, "x.safetensors")
    with pytest.raises(CheckError, match=r"name its model: adapter\(\"...\", base=\"...\"\)"):
        rm.merge(rm.permute(rm.adapter("x"), "P"))


def test_experts_change_places_and_stacked_ones_too(folder: Path) -> None:
    drawn = torch.Generator().manual_seed(0)
    shapes = {"gate": (3, 4), "stacked": (3, 4, 6), **{f"e.{item}.up": (6, 4) for item in range(3)}}
    tensors = {key: torch.randn(shape, generator=drawn) for key, shape in shapes.items()}
    levels = (Level("expert", 3), Level("hidden", 6, ("expert",)))
    windows = (
        Window("gate", 0, ("expert",)),
        Window("e.{}.up", 0, ("expert", "hidden")),
        Window("stacked[{}]", 1, ("expert", "hidden")),
    )
    width = tuple(Window(key, 1, ("channel",)) for key in shapes)
    groups = (AxisGroup("experts", levels, windows), AxisGroup("stream", (Level("channel", 4),), width))
    saved = shuffled_groups(groups, shapes)
    write_permutations(folder, "experts", saved)
    write(folder, "moe", tensors)
    assert alike(rm.merge(rm.permute("moe", "experts")), whole(tensors, saved))
    mixed = {**tensors, "e.1.up": tensors["e.1.up"].half()}
    with pytest.raises(
        CheckError, match=r"e\.\{\}\.up are of F16, F32, but experts\.safetensors puts one in the place"
    ):
        rm.merge(rm.permute(rm.model(mixed), "experts"))


def shuffled_groups(groups: tuple[AxisGroup, ...], shapes: dict[str, tuple[int, ...]]) -> SavedPermutations:
    generator = np.random.default_rng(3)
    return SavedPermutations({one.name: random_permutation(one, generator) for one in groups}, groups, shapes)
