"""Files that name some keys otherwise than most of their arch meet the usual ones in one recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from drawn_models import drawn, infos, name_of, unlike, variants_of
from torch import Tensor

import remelt as rm
from remelt.archs.arch import find_arch
from remelt.archs.detect import detect
from remelt.archs.dialects import IN_FULL, Spelling, from_original
from remelt.archs.facts import layout
from remelt.archs.shapes import flux_shapes, image_shapes, sd1_shapes, sdxl_shapes, without_prefix
from remelt.core.tensor_info import TensorInfo
from remelt.errors import CheckError, FormatError

Tensors = dict[str, Tensor]
ROOT = "model.diffusion_model."
CLIP = {
    "sd1": (sd1_shapes, "cond_stage_model.transformer."),
    "sdxl": (sdxl_shapes, "conditioner.embedders.0.transformer."),
    "flux": (flux_shapes, "text_encoders.clip_l.transformer."),
}


def shortened(tensors: Mapping[str, Tensor], start: str) -> Tensors:
    """As transformers 5 writes the text encoder."""
    found = {key.replace(f"{start}text_model.", start): tensor for key, tensor in tensors.items()}
    assert found.keys() != tensors.keys()
    return found


@pytest.mark.parametrize("name", CLIP)
def test_a_text_encoder_without_a_word_meets_one_with_it(name: str) -> None:
    shapes, start = CLIP[name]
    a, b = drawn(shapes(64), seed=1), drawn(shapes(64), seed=2)
    short = shortened(b, start)
    expected = rm.merge(rm.weighted_sum(rm.model(a), rm.model(b), alpha=0.25))
    assert unlike(rm.merge(rm.weighted_sum(rm.model(a), rm.model(short), alpha=0.25)), expected) == []
    turned = rm.merge(rm.weighted_sum(rm.model(short), rm.model(a), alpha=0.75))
    assert turned.keys() == short.keys()
    assert unlike({key: turned[key] for key in turned}, shortened(expected, start)) == []


@pytest.mark.parametrize("name", CLIP)
def test_such_a_text_encoder_has_the_usual_blocks_and_is_converted(name: str) -> None:
    shapes, start = CLIP[name]
    tensors = drawn(shapes(64))
    short = shortened(tensors, start)
    there, usual = (rm.convert(held, to="diffusers") for held in (short, tensors))
    assert unlike(there, usual) == []
    told = dict(zip(short, shapes(64).values(), strict=True))
    found = detect(told)
    described = layout(list(short), found.arch, found.spelling)
    stack = "clip_l" if name == "flux" else "txt"
    assert described.blocks[f"{stack}.3"] == tuple(
        key for key in described.keys if key.startswith(f"{start}encoder.layers.3.")
    )
    back = rm.convert(there, to="original")
    assert back.keys() <= tensors.keys()


def test_a_file_with_both_names_of_a_tensor_is_refused() -> None:
    key = "cond_stage_model.transformer.{}final_layer_norm.weight"
    held = infos({key.format(word): (4,) for word in ("", "text_model.")})
    with pytest.raises(FormatError, match=f"{key.format('')} and {key.format('text_model.')} are two names for one"):
        from_original(find_arch("sd1"), Spelling("diffusers"), held)


def prefixed(shapes: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """As AuraFlow's authors publish it."""
    return {f"model.{key}": info for key, info in without_prefix(dict(shapes), ROOT).items()}


@pytest.mark.parametrize("divisor", [1, 64])
def test_auraflow_is_recognised_below_model(divisor: int) -> None:
    shapes = prefixed(image_shapes("auraflow", divisor))
    found = detect(shapes)
    assert (name_of(found), found.problem, found.spelling) == ("auraflow", None, IN_FULL)
    assert variants_of(found) == variants_of(detect(image_shapes("auraflow", divisor)))
    described = layout(list(shapes), found.arch, found.spelling)
    assert list(described.components) == ["transformer"]
    assert all(key.startswith("model.double_layers.1.") for key in described.blocks["double_layers.1"])


SPELLED: dict[str, Callable[[Tensors], Tensors]] = {
    "usual": lambda tensors: tensors,
    "below model": lambda tensors: {key.replace(ROOT, "model."): tensor for key, tensor in tensors.items()},
    "bare": lambda tensors: {key.removeprefix(ROOT): tensor for key, tensor in tensors.items()},
    "diffusers": lambda tensors: dict(rm.convert(tensors, to="diffusers")),
}


@pytest.mark.parametrize("second", SPELLED)
@pytest.mark.parametrize("first", SPELLED)
def test_auraflow_meets_itself_in_every_spelling(first: str, second: str) -> None:
    shapes = image_shapes("auraflow", 64)
    a, b = drawn(shapes, seed=1), drawn(shapes, seed=2)
    expected = SPELLED[first](dict(rm.merge(rm.weighted_sum(rm.model(a), rm.model(b), alpha=0.25))))
    made = rm.merge(rm.weighted_sum(rm.model(SPELLED[first](a)), rm.model(SPELLED[second](b)), alpha=0.25))
    assert unlike(made, expected) == []


def test_a_whole_auraflow_below_model_keeps_its_other_parts(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    denoiser = drawn(prefixed(image_shapes("auraflow", 64)))
    held = denoiser | drawn({key: info for key, info in sd1_shapes(32).items() if key.startswith("first_stage_model.")})
    path = write_model(tmp_path / "aura", held)
    there = rm.convert(path, tmp_path / "there", to="diffusers")
    assert sorted(folder.name for folder in there.iterdir() if folder.is_dir()) == ["transformer", "vae"]
    with pytest.raises(CheckError, match="1 of its keys are of no part that is known of the original layout of aura"):
        rm.convert(held | {"model.strange.weight": torch.ones(2)}, to="diffusers")
