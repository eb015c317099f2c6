"""Files with a name before all of their keys: what trainers leave there, and parts as whole checkpoints spell them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import remelt as rm
from remelt.api.inspection import inspect
from remelt.archs.detect import detect
from remelt.archs.dialects import Spelling, starts_of
from remelt.archs.facts import layout
from remelt.archs.shapes import flux_shapes, llama_shapes, other_shapes, sd1_shapes, sd2_shapes, sd3_shapes, sdxl_shapes
from remelt.cli.main import run
from remelt.core.tensor_info import TensorInfo
from remelt.errors import FormatError

Tensors = dict[str, Tensor]
TRAINERS = ("module.", "_orig_mod.", "net.", "module._orig_mod.", "ema.")
VAE = "first_stage_model."


def drawn(shapes: Mapping[str, TensorInfo], seed: int = 0) -> Tensors:
    source = torch.Generator().manual_seed(seed)
    return {key: torch.randn(info.shape, generator=source) for key, info in shapes.items()}


def below(start: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {start + key: tensor for key, tensor in tensors.items()}


def under(tensors: Mapping[str, Tensor], start: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key.startswith(start)}


def without(tensors: Mapping[str, Tensor], start: str) -> Tensors:
    return {key.removeprefix(start): tensor for key, tensor in under(tensors, start).items()}


def equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def infos_of(tensors: Mapping[str, Tensor], shapes: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    return dict(zip(tensors, shapes.values(), strict=True))


@pytest.fixture(scope="module")
def models() -> tuple[Tensors, Tensors]:
    """Two small models of SD1."""
    return drawn(sd1_shapes(32), 1), drawn(sd1_shapes(32), 2)


@pytest.mark.parametrize("start", TRAINERS)
def test_what_trainers_leave_before_keys_changes_nothing(models: tuple[Tensors, Tensors], start: str) -> None:
    a, b = models
    alpha = rm.blocks(IN04=0.25, M00=0.7) | 0.5
    due = rm.merge(rm.weighted_sum(rm.model(a), rm.model(b), alpha=alpha))
    left = below(start, b)
    assert equal(rm.merge(rm.weighted_sum(rm.model(a), rm.model(left), alpha=alpha)), due)
    first = rm.merge(rm.weighted_sum(rm.model(below(start, a)), rm.model(b), alpha=alpha))
    assert equal(first, below(start, due))  # as the first model's keys are
    assert equal(rm.convert(left, to="original"), b)
    assert equal(rm.convert(left, to="diffusers"), rm.convert(b, to="diffusers"))
    assert equal(rm.merge(rm.weighted_sum(rm.model(left), rm.model(rm.convert(b, to="diffusers")), alpha=0.5)), left)


@pytest.mark.parametrize("start", TRAINERS)
@pytest.mark.parametrize("name", ["flux", "llama", "vae", "wan"])
def test_any_arch_is_recognised_below_a_name(name: str, start: str) -> None:
    shapes = flux_shapes(32) if name == "flux" else other_shapes(name, 32)
    plain, found = detect(shapes), detect({start + key: info for key, info in shapes.items()})
    assert found.arch is plain.arch is not None
    assert found.spelling == Spelling(alone=plain.spelling.alone, start=start)
    assert found.note is not None
    assert found.note.startswith(f"its keys begin with {start}")
    keys = [start + key for key in shapes]
    described, usual = layout(keys, found.arch, found.spelling), layout(list(shapes), plain.arch, plain.spelling)
    assert list(described.blocks) == list(usual.blocks)
    assert list(described.components) == list(usual.components)


def test_a_few_keys_may_stand_beside_those_below_a_name() -> None:
    shapes = sd1_shapes(32)
    held = {f"module.{key}": info for key, info in shapes.items()}
    step = {"step": TensorInfo(next(iter(shapes.values())).dtype, ())}
    assert detect({**held, **step}).spelling == Spelling(start="module.")
    assert detect({**held, **step, "decay": step["step"], "epoch": step["step"]}).arch is None


def test_where_keys_begin_is_told_name_by_name() -> None:
    assert list(starts_of(["a.b.c", "a.b.d.e"])) == ["a.", "a.b."]
    assert list(starts_of(["a.b", "c.d"])) == []
    assert list(starts_of(["a.b", "a.c", "d"], 1)) == ["a."]
    assert list(starts_of([])) == list(starts_of(["a"])) == []
    assert len(list(starts_of([".".join("abcdefghijklmnop")]))) == 8


def test_a_file_with_and_without_the_name_for_a_key_is_refused(models: tuple[Tensors, Tensors]) -> None:
    from remelt.archs.arch import find_arch
    from remelt.archs.dialects import to_original

    shapes = {key: next(iter(sd1_shapes(32).values())) for key in ("module.betas", "betas")}
    with pytest.raises(FormatError, match=r"module\.betas and betas are two names for one tensor"):
        to_original(find_arch("sd1"), Spelling(start="module."), shapes)


def test_tied_keys_are_one_tensor_below_a_name_too() -> None:
    shapes = llama_shapes(2, 8, heads=2, key_heads=1, vocabulary=16, intermediate=8)
    tied = llama_shapes(2, 8, heads=2, key_heads=1, vocabulary=16, intermediate=8, tied=True)
    assert len(tied) < len(shapes)
    a, b = below("module.", drawn(shapes, 1)), drawn(tied, 2)
    found = rm.merge(rm.weighted_sum(rm.model(a), rm.model(b), alpha=0.5))
    assert found.keys() == a.keys()
    head, words = "module.lm_head.weight", "model.embed_tokens.weight"
    assert torch.equal(found[head], torch.lerp(a[head], b[words], 0.5))


def test_an_adapter_changes_a_model_below_a_name(
    models: tuple[Tensors, Tensors], write_model: Callable[..., Path], tmp_path: Path
) -> None:
    a, _ = models
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    rows, columns = a[key].shape
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    lora = {f"{name}.lora_up.weight": torch.randn(rows, 2), f"{name}.lora_down.weight": torch.randn(2, columns)}
    change = rm.adapter(write_model(tmp_path / "lora", lora))
    due, found = (rm.merge(rm.model(model) + change) for model in (a, below("module.", a)))
    assert not torch.equal(due[key], a[key])
    assert equal(found, below("module.", due))


def test_inspect_and_convert_tell_and_mend_it_on_the_command_line(
    models: tuple[Tensors, Tensors],
    write_model: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_model(tmp_path / "trained", below("module.", models[0]))
    assert run(["inspect", str(path)]) == 0
    assert "note        its keys begin with module." in capsys.readouterr().out
    assert run(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["arch"] == "sd1"
    assert run(["convert", str(path), "--to", "original", "-o", str(tmp_path / "plain.safetensors"), "-q"]) == 0
    assert equal(load_file(tmp_path / "plain.safetensors"), models[0])


PARTS: list[tuple[Callable[[int], dict[str, TensorInfo]], str, str, str]] = [
    (sd1_shapes, VAE, "vae", "vae of sd1"),
    (sdxl_shapes, VAE, "vae", "vae of sdxl"),
    (sd3_shapes, VAE, "vae", "vae of sd3"),
    (flux_shapes, "vae.", "vae", "vae of flux"),
    (sd1_shapes, "cond_stage_model.", "clip_l", "txt of sd1"),
    (sd2_shapes, "cond_stage_model.", "open_clip_h", "txt of sd2"),
    (sdxl_shapes, "conditioner.embedders.0.", "clip_l", "txt of sdxl"),
    (sdxl_shapes, "conditioner.embedders.1.", "open_clip_g", "txt2 of sdxl"),
    (sd3_shapes, "text_encoders.clip_l.", "clip_l", "clip_l of sd3"),
    (sd3_shapes, "text_encoders.clip_g.", "open_clip_g", "clip_g of sd3"),
    (sd3_shapes, "text_encoders.t5xxl.", "t5", "t5xxl of sd3"),
    (flux_shapes, "text_encoders.t5xxl.", "t5", "t5xxl of flux"),
]


@pytest.mark.parametrize(("shapes", "start", "name", "holder"), PARTS)
def test_a_part_with_the_prefix_of_a_checkpoint_is_recognised(
    shapes: Callable[[int], dict[str, TensorInfo]], start: str, name: str, holder: str, tmp_path: Path,
    write_model: Callable[..., Path],
) -> None:  # fmt: skip
    held = {key: info for key, info in shapes(1).items() if key.startswith(start)}
    found = detect(held)
    assert found.arch is not None
    assert found.arch.name == name
    assert holder in found.holders
    assert found.spelling.start.startswith(start)
    narrow = under(drawn(shapes(32)), start)
    told = inspect(write_model(tmp_path / "part", narrow))
    assert told.arch == name
    assert told.note is not None
    assert f"its keys begin with {found.spelling.start}, as those of " in told.note
    assert holder in told.note


@pytest.mark.parametrize(("shapes", "start", "name", "holder"), PARTS)
def test_two_such_files_and_a_bare_one_are_merged(
    shapes: Callable[[int], dict[str, TensorInfo]], start: str, name: str, holder: str
) -> None:
    a, b = under(drawn(shapes(32), 1), start), under(drawn(shapes(32), 2), start)
    copied = "logit_scale" if name.startswith("open_clip") else "nothing"
    due = {key: a[key] if key.endswith(copied) else torch.lerp(a[key], b[key], 0.25) for key in a}
    assert equal(rm.merge(rm.weighted_sum(rm.model(a), rm.model(b), alpha=0.25)), due)
    inner = detect({key: info for key, info in shapes(32).items() if key.startswith(start)}).spelling.start
    bare = without(b, inner)
    found = rm.merge(rm.weighted_sum(rm.model(a), rm.model(bare), alpha=0.25), missing="first")
    beside = a.keys() - under(a, inner).keys()  # a logit scale, which only whole checkpoints have
    assert len(beside) <= 1
    assert equal(found, {key: a[key] if key in beside else tensor for key, tensor in due.items()})


@pytest.mark.parametrize("start", ["", VAE, "module."])
def test_a_vae_of_diffusers_meets_an_original_one_by_itself(start: str) -> None:
    a, b = drawn(other_shapes("vae", 32), 1), drawn(other_shapes("vae", 32), 2)
    there = rm.convert(b, to="diffusers")
    assert there.keys() != b.keys()
    due = below(start, {key: torch.lerp(a[key], b[key], 0.5) for key in a})
    assert equal(rm.merge(rm.weighted_sum(rm.model(below(start, a)), rm.model(there), alpha=0.5)), due)
    turned = rm.merge(rm.weighted_sum(rm.model(there), rm.model(below(start, a)), alpha=0.5))
    assert turned.keys() == there.keys()
    back = {key: torch.lerp(b[key], a[key], 0.5) for key in a}
    assert equal(rm.convert(turned, to="original"), back)
