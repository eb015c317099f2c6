"""Components of other models, files of one component alone, inpainting models: in Python and on the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import remelt as rm
from remelt.archs.arch import find_arch
from remelt.archs.dialects import Spelling, from_original
from remelt.archs.shapes import flux_shapes, sd1_shapes, sd2_shapes, sd3_shapes, sdxl_shapes
from remelt.cli.main import run
from remelt.core.tensor_info import TensorInfo
from remelt.errors import CheckError, RecipeError
from remelt.formats.memory import MemoryCheckpoint
from remelt.formats.pieced import PiecedCheckpoint
from remelt.tensors import TORCH, describe_tensors, tensor_over

WIDE = "model.diffusion_model.input_blocks.0.0.weight"
Shapes = Callable[[int], dict[str, TensorInfo]]
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


SDXL_G, SDXL_L = "conditioner.embedders.1.", "conditioner.embedders.0."


def bare(tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}


def of_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A bare text encoder of OpenCLIP in transformers' names."""
    return dict(rm.convert(tensors, to="diffusers"))


DONORS: dict[str, tuple[Shapes, str, str, Callable[[dict[str, Tensor]], dict[str, Tensor]], Sequence[str]]] = {
    "the second text encoder as the checkpoint has it": (sdxl_shapes, "txt2", SDXL_G, lambda held: held, ()),
    "OpenCLIP-G in its own names": (sdxl_shapes, "txt2", SDXL_G, lambda held: bare(held, f"{SDXL_G}model."), ()),
    "OpenCLIP-G in transformers' names": (
        sdxl_shapes, "clip_g", SDXL_G,
        lambda held: of_transformers(bare(held, f"{SDXL_G}model.")), ["model.logit_scale"],
    ),
    "OpenCLIP-G without text_model.": (
        sdxl_shapes, "txt2", SDXL_G,
        lambda held: {
            key.removeprefix("text_model."): one for key, one in of_transformers(bare(held, f"{SDXL_G}model.")).items()
        },
        ["model.logit_scale"],
    ),
    "OpenCLIP-G in its own names, for SD3": (
        sd3_shapes, "clip_g", "text_encoders.clip_g.",
        lambda held: dict(rm.convert(bare(held, "text_encoders.clip_g.transformer."), to="original")), ["logit_scale"],
    ),
    "OpenCLIP-H in its own names": (sd2_shapes, "txt", TEXT, lambda held: bare(held, f"{TEXT}model."), ()),
    "CLIP-L bare": (sdxl_shapes, "txt", SDXL_L, lambda held: bare(held, f"{SDXL_L}transformer."), ()),
    "CLIP-L of another arch": (
        sdxl_shapes, "txt", SDXL_L,
        lambda held: {f"{TEXT}{key}": value for key, value in bare(held, SDXL_L).items()}, (),
    ),
    "both text encoders in one file": (
        sdxl_shapes, "txt", SDXL_L,
        lambda held: held | {f"{SDXL_G}model.ln_final.{key}": torch.ones(2) for key in ("bias", "weight")}, (),
    ),
    "a VAE of a trainer": (
        sd1_shapes, "vae", VAE, lambda held: {f"module.{key}": value for key, value in bare(held, VAE).items()}, ()
    ),
    "a VAE of Flux under the older name": (
        flux_shapes, "vae", "vae.", lambda held: {VAE + key: value for key, value in bare(held, "vae.").items()}, ()
    ),
    "a U-Net with the checkpoint's prefix": (sd1_shapes, "unet", UNET, lambda held: held, ()),
}  # fmt: skip


@pytest.mark.parametrize("case", DONORS)
def test_a_donor_is_a_part_in_any_layout(case: str) -> None:
    shapes, component, start, spelled, kept = DONORS[case]
    model, other = drawn(shapes(64), 1), drawn(shapes(64), 2)
    donor = spelled({key: value for key, value in other.items() if key.startswith(start)})
    found = rm.merge(rm.with_component(rm.model(model), rm.model(donor, name="donor"), component))
    assert found.keys() == model.keys()
    taken = {key for key in model if key.startswith(start)} - {start + key for key in kept}
    assert [
        key for key, value in found.items() if not torch.equal(value, (other if key in taken else model)[key])
    ] == []


@pytest.mark.parametrize("half", ["bare", "whole", "diffusers"])
def test_a_donor_with_half_of_a_component_is_refused_by_the_keys(half: str, tmp_path: Path) -> None:
    model = drawn(sd1_shapes(32), 0)
    vae = bare(model, VAE)
    held = {
        "bare": {key: value for key, value in vae.items() if not key.startswith("decoder.mid.")},
        "whole": {key: value for key, value in model.items() if not key.startswith(f"{VAE}decoder.mid.")},
        "diffusers": {
            key: one for key, one in of_transformers(vae).items() if not key.startswith("decoder.mid_block.")
        },
    }[half]
    save_file(held, tmp_path / "half.safetensors")
    save_file(model, tmp_path / "model.safetensors")
    for recipe in (
        rm.with_component(tmp_path / "model.safetensors", tmp_path / "half.safetensors", "first_stage_model"),
        rm.with_component(rm.weighted_sum(tmp_path / "model.safetensors", rm.model(model)),
                          tmp_path / "half.safetensors", "first_stage_model"),
    ):  # fmt: skip
        with pytest.raises(CheckError) as caught:
            rm.merge(recipe, missing="skip")
        told = str(caught.value)
        assert "half.safetensors  has no whole first_stage_model to give: it lacks 26 of the 248 keys that the " in told
        assert f"of model.safetensors has: {VAE}decoder.mid.attn_1.k.{{bias,weight}}, " in told
        assert 'fallback(pick_component("half.safetensors", "first_stage_model"), ...) in a recipe keeps' in told
    kept = rm.merge(rm.fallback(rm.pick_component(rm.model(held), component="vae"), rm.model(model)))
    assert kept.keys() == model.keys()


def test_a_donor_may_be_a_merge_and_may_lack_what_no_model_learns(models: Path) -> None:
    a = load_file(models / "a.safetensors")  # with position ids, which the donor has not
    assert any(key.endswith("position_ids") for key in a)
    found = rm.merge(rm.with_component(models / "a.safetensors", models / "donor.safetensors", "txt"))
    assert found.keys() == a.keys()
    both = rm.weighted_sum(models / "vae.safetensors", models / "vae-diffusers.safetensors", alpha=0.5)
    baked = rm.merge(rm.with_component(models / "a.safetensors", both, "vae"))
    donor = load_file(models / "donor.safetensors")
    assert all(torch.equal(value, donor[key]) for key, value in baked.items() if key.startswith(VAE))


def test_moving_averages_that_are_not_there_are_refused(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = (
        "exchange_ema would change nothing: the model has no moving averages: keys that begin with model_ema., as full "
        "checkpoints in the original layout have them"
    )
    for recipe in (
        rm.exchange_ema(models / "donor.safetensors"),
        rm.exchange_ema(rm.weighted_sum(models / "donor.safetensors", models / "donor.safetensors")),
        rm.exchange_ema(rm.omit_component(models / "a.safetensors", component="ema")),
    ):
        with pytest.raises(RecipeError) as caught:
            rm.merge(recipe)
        assert caught.value.message == message
        assert caught.value.hint == "leave it out"
    a = load_file(models / "a.safetensors")
    found = rm.merge(rm.exchange_ema(models / "a.safetensors"))
    assert torch.equal(found[UNET + "out.2.bias"], a["model_ema.diffusion_modelout2bias"])
    assert called("plan", models / "donor.safetensors", "-m", "exchange_ema") == 3
    assert "exchange_ema would change nothing" in capsys.readouterr().err
