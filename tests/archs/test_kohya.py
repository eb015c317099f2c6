"""The layout `kohya` of SD1 and SDXL, held against sd-mecha's lists and its conversions of names."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from drawn_models import drawn, infos, name_of, unlike
from torch import Tensor

import remelt as rm
from remelt.archs.arch import find_arch, read_arch
from remelt.archs.detect import detect
from remelt.archs.dialects import IN_FULL, Spelling, from_original, is_of_folders, to_original
from remelt.archs.facts import layout
from remelt.archs.shapes import sd1_shapes, sdxl_shapes
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import CheckError, OptionError

Shapes = Callable[..., dict[str, TensorInfo]]
MODELS: list[tuple[str, Shapes]] = [("sd1", sd1_shapes), ("sdxl", sdxl_shapes)]
KOHYA = Spelling("kohya")
LOGIT_SCALE = "conditioner.embedders.1.model.logit_scale"


@pytest.mark.parametrize(("name", "shapes"), MODELS)
def test_names_and_shapes_are_those_of_another_tool(name: str, shapes: Shapes) -> None:
    configs = pytest.importorskip("sd_mecha.extensions.model_configs")
    known = {key: tuple(entry.shape) for key, entry in configs.resolve(f"{name}-kohya").keys().items()}
    made = from_original(find_arch(name), KOHYA, shapes())
    assert made.unknown == []
    assert made.left_out == ([LOGIT_SCALE] if name == "sdxl" else [])
    extras = {key: shape for key, shape in known.items() if key.endswith("position_ids")}  # files may lack them
    assert {key: one.info.shape for key, one in made.tensors.items()} | extras == known


def names_of_another_tool(arch: str, key: str) -> tuple[str, ...]:
    """The names that sd-mecha converts an original key to."""
    there = "sd_mecha.extensions.builtin.model_configs."
    pytest.importorskip("sd_mecha")
    sd1 = import_module(f"{there}convert_sd1_kohya_to_original")
    if arch == "sd1":
        if key.startswith("first_stage_model."):
            return (sd1.convert_vae_key(key)[0],)
        convert = sd1.convert_unet_key if key.startswith("model.") else sd1.convert_clip_l_key
        return (convert(key),)
    if key.startswith("conditioner.embedders.1."):
        return tuple(import_module(f"{there}convert_sdxl_diffusers_clip_g_to_original").convert_clip_g_key(key)[0])
    for start, other in (("model.diffusion_model.", "unet."), ("conditioner.embedders.0.transformer.", "te1.")):
        key = key.replace(start, other)
    return (key,)


@pytest.mark.parametrize(("name", "shapes"), MODELS)
def test_every_key_becomes_what_another_tool_makes_of_it(name: str, shapes: Shapes) -> None:
    made = from_original(find_arch(name), KOHYA, shapes(64))
    ours: dict[str, list[tuple[int, str]]] = {}
    for key, one in made.tensors.items():
        ours.setdefault(one.pieces[0].key, []).append((one.pieces[0].start, key))
    # Their conversion names the norm of SD1's attention otherwise than their own list, which ours is held against.
    odd = [key for key in shapes(64) if key == LOGIT_SCALE or (name == "sd1" and ".mid.attn_1.norm." in key)]
    theirs = {key: names_of_another_tool(name, key) for key in shapes(64) if key not in odd}
    found = {key: tuple(there for _, there in sorted(parts)) for key, parts in ours.items() if key not in odd}
    assert found == theirs
    assert len(odd) == (4 if name == "sd1" else 1)


@pytest.mark.parametrize(("name", "shapes"), MODELS)
def test_there_and_back_the_tensors_are_the_same_bits(name: str, shapes: Shapes) -> None:
    tensors = drawn(shapes(64))
    there = rm.convert(tensors, to="kohya")
    back = rm.convert(there, to="original")
    assert unlike(back, {key: tensor for key, tensor in tensors.items() if key != LOGIT_SCALE}) == []
    assert unlike(rm.convert(there, to="diffusers"), rm.convert(tensors, to="diffusers")) == []
    assert unlike(rm.convert(rm.convert(tensors, to="diffusers"), to="kohya"), there) == []


@pytest.mark.parametrize(("name", "shapes"), MODELS)
@pytest.mark.parametrize("divisor", [1, 64])
def test_it_is_recognised_and_has_the_usual_blocks(name: str, shapes: Shapes, divisor: int) -> None:
    spelled = {key: one.info for key, one in from_original(find_arch(name), KOHYA, shapes(divisor)).tensors.items()}
    found = detect(spelled)
    assert (name_of(found), found.problem, found.spelling) == (name, None, KOHYA)
    described, usual = layout(list(spelled), found.arch, KOHYA), layout(list(shapes(divisor)), found.arch)
    assert usual.blocks.keys() - described.blocks.keys() == ({"txt2.logit_scale"} if name == "sdxl" else set())
    assert described.blocks.keys() <= usual.blocks.keys()
    assert described.components.keys() == usual.components.keys()
    denoiser = {key: info for key, info in spelled.items() if key.startswith("unet.")}
    alone = detect(denoiser)
    assert (name_of(alone), alone.spelling) == (name, KOHYA)
    assert len(to_original(find_arch(name), KOHYA, denoiser).tensors) == len(
        [key for key in shapes(divisor) if key.startswith("model.diffusion_model.")]
    )


@pytest.mark.parametrize(("name", "shapes"), MODELS)
def test_other_spellings_are_what_they_were(name: str, shapes: Shapes) -> None:
    arch, whole = find_arch(name), shapes(64)
    denoiser = {key: info for key, info in whole.items() if key.startswith("model.diffusion_model.")}
    for spelling in (IN_FULL, Spelling("original", "unet"), Spelling("diffusers"), Spelling("diffusers", "unet")):
        held = denoiser if spelling.alone else whole
        made = {key: one.info for key, one in from_original(arch, spelling, held).tensors.items()}
        assert detect(made).spelling == spelling


def test_a_merge_of_all_three_layouts_is_that_of_one(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    models = [drawn(sd1_shapes(64), seed=seed) for seed in range(3)]
    expected = rm.merge(rm.n_average(*[rm.model(tensors) for tensors in models]))
    spelled: list[dict[str, Tensor]] = [models[0], rm.convert(models[1], to="kohya")]
    spelled.append(rm.convert(models[2], to="diffusers"))
    made = rm.merge(rm.n_average(*[rm.model(tensors) for tensors in spelled]))
    assert unlike(made, expected) == []
    turned = rm.merge(rm.n_average(*[rm.model(tensors) for tensors in (spelled[1], models[0], spelled[2])]))
    assert turned.keys() == spelled[1].keys()


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_markers_and_schedules_are_kept_under_their_names_and_known_again(name: str, tmp_path: Path) -> None:
    tensors = drawn(dict(MODELS)[name](64))
    markers = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0), "alphas_cumprod": torch.ones(4)}
    average = {"model_ema.decay": torch.ones(())}
    there = rm.convert(tensors | markers | average, to="kohya")
    assert {key for key in there if not key.startswith(("unet.", "te", "vae.", "first_stage"))} == markers.keys()
    found = detect({key: TensorInfo(DType.BF16, tuple(tensor.shape)) for key, tensor in there.items()})
    assert (name_of(found), found.problem, found.spelling) == (name, None, KOHYA)
    back = rm.convert(there, to="original")
    assert unlike({key: back[key] for key in markers}, markers) == []
    mixed = rm.merge(rm.weighted_sum(rm.model(there), rm.model(tensors | markers)))
    assert mixed.keys() == there.keys()
    folder = rm.convert(there, tmp_path / "folder", to="diffusers")
    assert rm.inspect(folder).metadata["modelspec.prediction_type"] == "v"


def test_it_is_a_layout_of_single_files() -> None:
    assert not is_of_folders(find_arch("sd1"), "kohya")
    assert is_of_folders(find_arch("sd1"), "diffusers")
    assert not is_of_folders(find_arch("sd1"), "original")


def test_a_key_that_it_has_no_place_for_is_refused() -> None:
    tensors = drawn(sd1_shapes(64) | infos({"model.diffusion_model.strange.weight": (2,)}))
    with pytest.raises(CheckError, match="1 of its keys are of no part that is known of the original layout of sd1"):
        rm.convert(tensors, to="kohya")


@pytest.mark.parametrize("entries", ["", 'folder = "unet"\nprefix = "unet."'])
def test_a_layout_is_of_folders_or_of_prefixes(tmp_path: Path, entries: str) -> None:
    path = tmp_path / "toy.toml"
    path.write_text(
        'name = "toy"\ntitle = "A toy"\n[[recognise]]\nkeys = {"x.weight" = [1]}\n'
        f'[[component]]\nname = "x"\nprefixes = ["x."]\n[[component.dialect]]\nname = "y"\nmap = "t5"\n{entries}',
        encoding="utf-8",
    )
    with pytest.raises(OptionError, match="a dialect needs a folder, or a prefix of keys in single files"):
        read_arch(path)
