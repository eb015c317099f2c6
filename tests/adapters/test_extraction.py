"""Adapters extracted from models: applied again they give the models, as near as their rank or energy says."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import remelt as rm
from remelt.api.adapters import extract_lora, save_adapter
from remelt.api.verification import verify
from remelt.errors import OptionError, OutputError, RecipeError
from remelt.recipe.adapter import adapter, to_lora

SHAPES: dict[str, tuple[int, ...]] = {
    "mid.square.weight": (24, 24),
    "mid.tall.weight": (90, 8),
    "mid.wide.weight": (12, 70),
    "mid.one.weight": (32, 16, 1, 1),
    "mid.kernel.weight": (16, 32, 3, 3),
    "mid.norm.weight": (32,),
    "mid.same.weight": (20, 20),
}
CHANGED = [key for key, shape in SHAPES.items() if len(shape) > 1 and key != "mid.same.weight"]


def drawn(shape: tuple[int, ...], rank: int | None, source: torch.Generator) -> Tensor:
    """Random numbers, of a rank as a matrix."""
    if rank is None:
        return torch.randn(shape, generator=source)
    up, down = (torch.randn(side, generator=source) for side in ((shape[0], rank), (rank, math.prod(shape[1:]))))
    return (up @ down).reshape(shape)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def models(rank: int | None, scale: float = 0.05, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A base and what it was tuned to, in files and as tensors."""
    source = torch.Generator().manual_seed(seed)
    base = {key: torch.randn(shape, generator=source) for key, shape in SHAPES.items()}
    tuned = {key: one + scale * drawn(one.shape, rank, source) if key in CHANGED else one for key, one in base.items()}
    save_file(base, "base.safetensors")
    save_file(tuned, "tuned.safetensors")
    return base, tuned


def applied(path: Path, strength: float = 1.0) -> dict[str, Tensor]:
    found: dict[str, Tensor] = rm.merge(rm.model("base.safetensors") + strength * adapter(str(path)))
    return found


def extracted(**options: Any) -> Any:
    return extract_lora("tuned.safetensors", "base.safetensors", "made.safetensors", overwrite=True, **options)


@pytest.mark.parametrize("names", ["kohya", "diffusers", "peft"])
def test_a_difference_of_a_rank_is_exact_at_that_rank(folder: Path, names: str) -> None:
    base, tuned = models(4)
    report = extract_lora("tuned.safetensors", "base.safetensors", "made", rank=4, names=names)
    assert set(report.ranks.values()) == {4}
    assert report.share == pytest.approx(1.0, abs=1e-9)
    found = applied(report.path)
    for key, one in tuned.items():
        assert (found[key] - one).abs().max() <= 1e-5 * max(float((one - base[key]).abs().max()), 1e-30), key
    assert torch.equal(found["mid.same.weight"], base["mid.same.weight"])


def test_a_module_that_did_not_change_is_not_in_the_adapter(folder: Path) -> None:
    models(4)
    report = extracted(rank=2, names="kohya")
    names = {f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}" for key in CHANGED}
    assert set(report.ranks) == names == {key.partition(".")[0] for key in load_file("made.safetensors")}


@pytest.mark.parametrize("energy", [0.5, 0.95, 0.999])
def test_the_energy_that_was_asked_for_is_kept(folder: Path, energy: float) -> None:
    base, tuned = models(None)
    report = extracted(energy=energy, names="kohya")
    found = applied(report.path)
    for key in CHANGED:
        name = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
        delta = (tuned[key] - base[key]).double()
        squares = torch.linalg.svdvals(delta.flatten(1)).square()
        lost = float((tuned[key] - found[key]).double().square().sum() / delta.square().sum())
        assert 1.0 - lost >= energy - 0.01, key
        assert 1.0 - lost == pytest.approx(report.shares[name], abs=1e-3), key
        assert report.energies[name] == pytest.approx(float(squares.sum()), rel=1e-4)
        assert float(squares[: report.ranks[name] - 1].sum()) < energy * float(squares.sum())


def test_rank_and_energy_together_keep_the_lower_rank(folder: Path) -> None:
    models(None)
    assert max(extracted(rank=3, energy=0.999).ranks.values()) == 3
    alone = extracted(energy=0.5).ranks
    assert extracted(rank=500, energy=0.5).ranks == alone


def test_factors_are_of_the_type_of_the_models(folder: Path) -> None:
    for name, tensors in zip(("base", "tuned"), models(4), strict=True):
        save_file({key: one.half() for key, one in tensors.items()}, f"{name}.safetensors")
    extracted(rank=4, names="kohya")
    made = load_file("made.safetensors")
    assert {one.dtype for key, one in made.items() if not key.endswith(".alpha")} == {torch.float16}


def test_alpha_is_that_of_all_modules_and_exact_in_every_type(folder: Path) -> None:
    source = torch.Generator().manual_seed(0)
    base = {"mid.up.weight": torch.zeros(310, 310), "mid.small.weight": torch.zeros(20, 20)}
    save_file({key: one.bfloat16() for key, one in base.items()}, "base.safetensors")
    tuned = {key: torch.randn(one.shape, generator=source).bfloat16() for key, one in base.items()}
    save_file(tuned, "tuned.safetensors")
    report = extracted(rank=301, names="kohya")  # bfloat16 has 300 and 302
    made = load_file("made.safetensors")
    assert {float(one) for key, one in made.items() if key.endswith("alpha")} == {1.0}
    found = applied(report.path)
    assert (
        float((found["mid.small.weight"] - tuned["mid.small.weight"]).norm() / tuned["mid.small.weight"].norm()) < 0.02
    )


def test_to_lora_in_a_recipe_gives_the_same_file(folder: Path) -> None:
    models(None)
    report = extracted(rank=4, names="kohya")
    recipe = to_lora(rm.model("tuned.safetensors") - rm.model("base.safetensors"), rank=4, names="kohya")
    path = rm.merge(recipe, "merged.safetensors")
    assert Path(path).read_bytes() == report.path.read_bytes()
    held = rm.merge(recipe)
    made = load_file(path)
    assert held.keys() == made.keys()
    assert {key for key, one in made.items() if not torch.equal(one, held[key])} == set()


def test_to_lora_leaves_out_what_does_not_change(folder: Path) -> None:
    models(4)
    delta = rm.model("tuned.safetensors") - rm.model("base.safetensors")
    recipe = to_lora(delta * (rm.keys({"mid.square.weight": 0.5}) | 0.0), rank=4, names="kohya")
    assert len(rm.plan(recipe, "made.safetensors").outputs[0].tensors) == 3 * (len(CHANGED) + 1)  # at most
    made = load_file(rm.merge(recipe, "made.safetensors"))
    assert {key.partition(".")[0] for key in made} == {"lora_unet_mid_square"}
    with pytest.raises(RecipeError, match="there is nothing to make an adapter of"):
        rm.merge(to_lora(delta * 0.0, rank=4, names="kohya"), "none.safetensors")
    assert not Path("none.safetensors").exists()


def test_to_lora_goes_where_extraction_goes(folder: Path) -> None:
    """PEFT's adapters are folders with a configuration, whoever writes them."""
    models(4)
    delta = rm.model("tuned.safetensors") - rm.model("base.safetensors")
    report = extract_lora("tuned.safetensors", "base.safetensors", "one", rank=4, names="peft")
    path = rm.merge(to_lora(delta, rank=4, names="peft"), "other")
    assert [report.path, path] == [Path("one"), Path("other")]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (path / name).read_bytes() == (report.path / name).read_bytes()
    with pytest.raises(OutputError, match="other exists"):
        rm.merge(to_lora(delta, rank=4, names="peft"), "other")
    assert rm.merge(to_lora(delta, rank=4, names="kohya"), "other") == Path("other.safetensors")
    for suffix, law in (("ckpt", "results are"), ("pt", "results are"), ("gguf", "an adapter is")):
        with pytest.raises(OptionError, match=f"{law} written as safetensors.*, but the output is it.{suffix}"):
            extract_lora("tuned.safetensors", "base.safetensors", f"it.{suffix}", rank=4, names="peft")


def test_what_is_for_models_is_refused(folder: Path) -> None:
    models(4)
    recipe = to_lora(rm.model("tuned.safetensors") - rm.model("base.safetensors"), rank=4)
    for option in ({"dialect": "diffusers"}, {"max_shard_size": "1GiB"}):
        with pytest.raises(OptionError, match=f"{next(iter(option))} is for models, but the result is an adapter"):
            rm.merge(recipe, "made.safetensors", **option)


@pytest.mark.parametrize(("stored", "due"), [("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "float32")])
def test_an_adapter_of_adapters_alone_is_of_the_type_of_the_first(folder: Path, stored: str, due: str) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        source = torch.Generator().manual_seed(seed)
        factors = {"lora_up.weight": torch.randn(24, 3, generator=source)}
        factors |= {"lora_down.weight": torch.randn(3, 40, generator=source)}
        made = {f"lora_unet_mid.{part}": one.to(getattr(torch, stored)) for part, one in factors.items()}
        save_file(made | {"lora_unet_mid.alpha": torch.tensor(3.0)}, f"{name}.safetensors")
    recipe = to_lora(0.5 * adapter("a") + adapter("b"), rank=6)
    written = load_file(rm.merge(recipe, "made.safetensors"))
    assert {one.dtype for one in written.values()} == {getattr(torch, due)}
    wider = load_file(rm.merge(recipe, "wider.safetensors", dtype="fp32"))
    assert {one.dtype for one in wider.values()} == {torch.float32}
    with pytest.raises(OptionError, match="without a model nobody can tell how diffusers names the mod"):
        rm.merge(to_lora(adapter("a"), rank=2, names="diffusers"), "named.safetensors")


@pytest.mark.parametrize("size", [{"rank": 4}, {"energy": 0.5}, {"kind": "lokr"}])
def test_what_was_extracted_is_verified_by_its_recipe(folder: Path, size: dict[str, Any]) -> None:
    models(None)
    report = extracted(names="kohya", **size)
    found = verify(report.path, recipe=True, sample=None)
    assert found.faults == []
    assert found.recomputed == found.tensors == len(load_file(report.path))
    tensors = load_file(report.path)
    with safe_open(report.path, "pt") as file:
        told = file.metadata()
    key = next(key for key in tensors if "alpha" not in key)
    save_file(tensors | {key: tensors[key] + 1}, report.path, metadata=told)
    assert f"{key}: is not what the recipe makes" in verify(report.path, recipe=True, sample=None).faults


def test_an_adapter_as_it_is_may_be_written_again(folder: Path) -> None:
    models(4)
    path = extracted(rank=4, names="kohya").path
    again = rm.merge(to_lora(adapter("made.safetensors"), rank=4), "again.safetensors")
    one, other = applied(path), applied(again)
    assert {key for key in one if not torch.allclose(one[key], other[key], rtol=0.0, atol=1e-6)} == set()
    assert len(load_file(again)) == len(load_file(path))


@pytest.mark.parametrize("size", [{"energy": 0.5}, {"rank": 3, "energy": 0.999}, {"rank": 500, "energy": 0.5}])
def test_ranks_by_energy_are_found_first(folder: Path, size: dict[str, Any]) -> None:
    models(None)
    report = extracted(names="kohya", **size)
    recipe = to_lora(rm.model("tuned.safetensors") - rm.model("base.safetensors"), names="kohya", **size)
    path = rm.merge(recipe, "merged.safetensors")
    assert {key: one.shape for key, one in load_file(path).items()} == {
        key: one.shape for key, one in load_file(report.path).items()
    }
    told = "ranks by energy are found first: what is written is planned once they are known"
    assert (told in rm.plan(recipe, "other.safetensors").warnings) == ("rank" not in size)
    with pytest.raises(OutputError, match=r"merged\.safetensors exists"):
        rm.plan(recipe, "merged.safetensors")


def test_models_that_are_equal_have_no_adapter(folder: Path) -> None:
    models(4)
    law = "there is nothing to make an adapter of: both models have the same weights"
    for kind in ("lora", "lokr"):
        with pytest.raises(RecipeError, match=law):
            size = {"rank": 4} if kind == "lora" else {}
            extract_lora("base.safetensors", "base.safetensors", "made.safetensors", kind=kind, names="kohya", **size)


def test_a_model_is_no_difference(folder: Path) -> None:
    models(4)
    with pytest.raises(RecipeError, match="an adapter is made of a difference, but this is a model"):
        save_adapter(to_lora(rm.model("tuned.safetensors"), rank=4), "made.safetensors")
    with pytest.raises(RecipeError, match="an adapter is made of a difference") as caught:
        save_adapter(rm.model("tuned.safetensors"), "made.safetensors")
    assert caught.value.hint == "to_lora(tuned - base, rank=32)"


class Model(nn.Module):
    """The modules of `SHAPES`, as LyCORIS looks for them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.mid = nn.Module()
        for key, one in tensors.items():
            name = key.split(".")[1]
            if one.dim() == 1:
                layer: nn.Module = nn.LayerNorm(len(one), bias=False)
            elif one.dim() == 2:
                layer = nn.Linear(one.shape[1], one.shape[0], bias=False)
            else:
                layer = nn.Conv2d(one.shape[1], one.shape[0], one.shape[2], bias=False)
            self.mid.add_module(name, layer)
        self.load_state_dict(dict(tensors))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("factor", [-1, 4, 7])
def test_a_lokr_is_what_lycoris_loads(folder: Path, factor: int) -> None:
    lycoris = pytest.importorskip("lycoris")
    base, tuned = models(None)
    report = extracted(kind="lokr", factor=factor, names="kohya")
    made = load_file(report.path)
    assert len(report.shares) == len(CHANGED)
    found = applied(report.path)
    model = Model(base)
    renamed = {key.replace("lora_unet_", "lycoris_"): one for key, one in made.items()}
    network, _ = lycoris.create_lycoris_from_weights(1.0, None, model, weights_sd=renamed)
    network.merge_to(1.0)
    theirs = model.state_dict()
    for key in CHANGED:
        delta = tuned[key] - base[key]
        torch.testing.assert_close(found[key], theirs[key], rtol=0.0, atol=1e-6)
        name = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
        kept = 1.0 - float((tuned[key] - found[key]).square().sum() / delta.square().sum())
        assert kept == pytest.approx(report.shares[name], abs=1e-4)
        assert not torch.equal(theirs[key], base[key])


def test_a_lokr_of_a_kronecker_product_is_exact(folder: Path) -> None:
    source = torch.Generator().manual_seed(0)
    delta = torch.kron(torch.randn(3, 4, generator=source), torch.randn(4, 5, generator=source))
    save_file({"mid.up.weight": torch.zeros(12, 20)}, "base.safetensors")
    save_file({"mid.up.weight": delta}, "tuned.safetensors")
    report = extracted(kind="lokr", names="kohya")
    assert report.share == pytest.approx(1.0, abs=1e-9)
    torch.testing.assert_close(applied(report.path)["mid.up.weight"], delta, rtol=0.0, atol=1e-5)


def test_only_kohya_has_names_for_a_lokr(folder: Path) -> None:
    models(4)
    with pytest.raises(OptionError, match="peft has no names for a LoKr"):
        extracted(kind="lokr", names="peft")


def test_the_header_says_what_made_the_file(folder: Path) -> None:
    models(4)
    extracted(rank=4, names="kohya")
    with safe_open("made.safetensors", "pt") as file:
        told = file.metadata()
    assert told["ss_network_module"] == "networks.lora"
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("4", "1.0")
    assert "ss_base_model_version" not in told
    assert re.search(r'to_lora\(tuned - base, rank=4, names="kohya"\)', told["remelt_recipe"])
