"""Components of other models, files of one component alone, inpainting models: in Python and on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import remelt as rm
from remelt.archs.arch import find_arch
from remelt.archs.dialects import Spelling, from_original
from remelt.archs.shapes import sd1_shapes
from remelt.cli.main import run
from remelt.core.tensor_info import TensorInfo
from remelt.engine.tensors import TORCH, describe_tensors, tensor_over
from remelt.errors import CheckError
from remelt.formats.memory import MemoryCheckpoint
from remelt.formats.pieced import PiecedCheckpoint

WIDE = "model.diffusion_model.input_blocks.0.0.weight"
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


def drawn(shapes: dict[str, TensorInfo], seed: int) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {key: torch.randn(info.shape, generator=source).mul(9).to(TORCH[info.dtype]) for key, info in shapes.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> Path:
    """Small models of Stable Diffusion 1 with moving averages: two, one for inpainting, and parts of a further one."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "a", drawn(sd1_shapes(20, extras=True), 0))
    write_model(folder / "b", drawn(sd1_shapes(20, extras=True), 1))
    write_model(folder / "inpainting", drawn(sd1_shapes(20, extras=True, in_channels=9), 2))
    donor = drawn(sd1_shapes(20), 3)
    write_model(folder / "donor", donor)
    bare = {key.removeprefix(VAE): value for key, value in donor.items() if key.startswith(VAE)}
    write_model(folder / "vae", {**bare, "loss.logvar": torch.zeros(1)})
    source = MemoryCheckpoint(
        describe_tensors({key: value for key, value in donor.items() if key.startswith(VAE)}, "vae")
    )
    other = from_original(find_arch("sd1"), Spelling("diffusers", "vae"), source.tensors)
    view = PiecedCheckpoint(source, other.tensors)
    write_model(
        folder / "vae-diffusers",
        {key: tensor_over(view.read(key), info.dtype).reshape(info.shape) for key, info in view.tensors.items()},
    )
    return folder


def test_a_component_is_that_of_the_donor(models: Path) -> None:
    a, donor = load_file(models / "a.safetensors"), load_file(models / "donor.safetensors")
    for file in ("donor", "vae", "vae-diffusers"):
        found = rm.merge(rm.with_component(models / "a.safetensors", models / f"{file}.safetensors", "vae"))
        assert found.keys() == a.keys()
        for key, value in found.items():
            assert torch.equal(value, donor[key] if key.startswith(VAE) else a[key]), (file, key)


def test_a_component_is_that_of_the_donor_after_a_merge(models: Path) -> None:
    merged = rm.weighted_sum(models / "a.safetensors", models / "b.safetensors", alpha=0.5)
    found = rm.merge(rm.with_component(merged, models / "vae.safetensors", "vae"))
    plain = rm.merge(merged)
    donor = load_file(models / "donor.safetensors")
    assert all(torch.equal(value, donor[key] if key.startswith(VAE) else plain[key]) for key, value in found.items())


def test_a_text_encoder_is_that_of_the_donor(models: Path) -> None:
    found = rm.merge(rm.with_component(models / "a.safetensors", models / "donor.safetensors", "text_encoder"))
    a, donor = load_file(models / "a.safetensors"), load_file(models / "donor.safetensors")
    assert all(torch.equal(found[key], donor[key] if key.startswith(TEXT) else a[key]) for key in donor)


def test_an_inpainting_model_is_made_of_a_normal_one(models: Path) -> None:
    paths = [models / f"{name}.safetensors" for name in ("a", "inpainting", "b")]
    a, special, base = map(load_file, paths)
    found = rm.merge(rm.make_inpainting(*paths), compute_dtype="float64")
    due = special[WIDE].double()
    due[:, :4] += a[WIDE].double() - base[WIDE].double()
    assert torch.equal(found[WIDE], due.to(special[WIDE].dtype))
    key = UNET + "out.2.weight"
    assert torch.equal(
        found[key], (special[key].double() + (a[key].double() - base[key].double())).to(special[key].dtype)
    )


def test_a_normal_model_is_made_of_an_inpainting_one(models: Path) -> None:
    paths = [models / f"{name}.safetensors" for name in ("inpainting", "inpainting", "b")]
    found, base = rm.merge(rm.make_normal(*paths)), load_file(models / "b.safetensors")
    assert found[WIDE].shape[1] == 4
    assert torch.equal(found[WIDE], base[WIDE])


def test_models_of_other_inputs_are_still_refused(models: Path) -> None:
    with pytest.raises(CheckError, match="weighted_sum needs tensors of one shape"):
        rm.plan(rm.weighted_sum(models / "a.safetensors", models / "inpainting.safetensors"))


def called(*words: str | Path) -> int:
    return run([str(word) for word in words])


def test_one_line_bakes_a_vae_and_drops_the_averages(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    words = (
        *("merge", models / "a.safetensors", models / "b.safetensors", "-m", "weighted_sum", "-p", "alpha", "0.5"),
        *("--vae", models / "vae.safetensors", "--drop", "ema", "--dtype", "fp16", "-o", out),
    )
    assert called(*words) == 0
    found, donor = load_file(out), load_file(models / "donor.safetensors")
    assert not any(key.startswith("model_ema.") for key in found)
    assert all(torch.equal(value, donor[key].half()) for key, value in found.items() if key.startswith(VAE))
    assert {value.dtype for key, value in found.items() if key.startswith((UNET, VAE, TEXT)) and value.dim() > 2} == {
        torch.float16
    }
    again = rm.merge(out, models_dirs=[models])  # the recipe inside tells all of it
    assert all(torch.equal(again[key], value) for key, value in found.items())


def test_one_line_takes_a_text_encoder(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    words = ("-m", "passthrough", "--component", "txt", models / "donor.safetensors", "-o", out)
    assert called("merge", models / "a.safetensors", *words) == 0
    found, donor = load_file(out), load_file(models / "donor.safetensors")
    assert all(torch.equal(found[key], donor[key]) for key in donor if key.startswith(TEXT))


def test_an_unknown_component_is_told(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("-m", "passthrough", "--drop", "emma", "-o", tmp_path / "x.safetensors")
    assert called("merge", models / "a.safetensors", *words) == 3
    told = capsys.readouterr().err
    assert "'emma'" in told
    assert "ema" in told.replace("emma", "")


def test_surgery_needs_one_model_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.chdir(tmp_path)
    model = {key: torch.randn(info.shape) for key, info in sd1_shapes(32).items()}
    vae = {
        key.removeprefix("first_stage_model."): tensor + 1.0 for key, tensor in model.items() if "first_stage" in key
    }
    save_file(model, "model.safetensors")
    save_file(vae, "vae.safetensors")
    save_file({key: tensor for key, tensor in model.items() if "first_stage" not in key}, "without.safetensors")
    assert run(["merge", "model", "--vae", "vae", "-o", "baked.safetensors", "-q"]) == 0
    baked = load_file("baked.safetensors")
    assert all(torch.equal(baked[f"first_stage_model.{key}"], tensor) for key, tensor in vae.items())
    assert run(["merge", "baked", "--drop", "vae", "-o", "less.safetensors", "-q"]) == 0  # the file, not its recipe
    assert not any("first_stage" in key for key in load_file("less.safetensors"))
    assert run(["merge", "model", "--vae", "without", "-o", "never.safetensors", "-q"]) == 3


def test_a_donor_without_the_component_is_refused_by_name(tmp_path: Path) -> None:
    model = {key: torch.randn(info.shape) for key, info in sd1_shapes(32).items()}
    donor = {key: tensor for key, tensor in model.items() if key.startswith("model.diffusion_model.")}
    for name, tensors in (("model", model), ("donor", donor)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckError, match=r"donor\.safetensors  has no vae to give\n\s+it has unet"):
        rm.merge(rm.with_component(tmp_path / "model.safetensors", tmp_path / "donor.safetensors", "vae"))
