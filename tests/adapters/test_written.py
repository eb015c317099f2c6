"""Adapters that remelt writes are loaded by the tools that they are for, and do there what they do here."""

from __future__ import annotations

import json
import math
import re
import runpy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import remelt as rm
from remelt.adapters.written import Written
from remelt.api.adapters import AdapterReport, extract_lora, merge_adapters
from remelt.archs.arch import find_arch
from remelt.archs.dialects import Spelling, from_original
from remelt.archs.shapes import flux_shapes, sd1_shapes, sdxl_shapes
from remelt.core.tensor_info import TensorInfo
from remelt.formats.memory import MemoryCheckpoint
from remelt.recipe.adapter import adapter
from remelt.tensors import describe_tensors

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

KINDS: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[1] / "api" / "test_dialects.py"))["KINDS"]

pytestmark = pytest.mark.filterwarnings("ignore")

NOT_LOADED = {
    ("sdxl", "kohya"): "unet/add_embedding",  # it takes the number after a dot for part of a list
    ("flux", "kohya"): "transformer/(time_text_embed|context_embedder|x_embedder|norm_out|proj_out)",  # lost on its way
}
"""Modules that diffusers does not find by kohya's names, though the names are those that trainers give them."""

UNTRAINED = re.compile(
    r"embeddings?\.weight|relative_attention_bias|pos_embed|^vae|^first_stage|single_blocks.*linear1|t5xxl|text_projection"
)
"""Weights that stay: no adapter has tables, and diffusers knows but one width of Flux' ``linear1``, no LoRA of T5, and
of ``text_projection`` only one with the rank of most others."""


class Tuned:
    """A tiny pipeline and what it was tuned to: the one as a folder and in memory, both as single files."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.base().save_pretrained(folder / "base")
        self.file = rm.convert(folder / "base", folder / "base.safetensors", to="original")
        source = torch.Generator().manual_seed(1)
        tensors = load_file(self.file)
        for key, one in tensors.items():
            if one.dim() > 1 and not UNTRAINED.search(key):
                rank = 1 + len(key) % 3
                down = torch.randn(rank, math.prod(one.shape[1:]), generator=source)
                delta = 0.05 * torch.randn(one.shape[0], rank, generator=source) @ down
                tensors[key] = one + delta.reshape(one.shape)
        self.tuned = folder / "tuned.safetensors"
        save_file(tensors, self.tuned)

    def base(self) -> Any:
        torch.manual_seed(0)
        return KINDS[self.name].make()

    def extract(self, names: str) -> AdapterReport:
        return extract_lora(self.tuned, self.file, self.folder / f"lora-{names}", rank=4, names=names, overwrite=True)

    def applied(self, path: Path) -> dict[str, Tensor]:
        """The pipeline's tensors with an adapter, by remelt."""
        found: dict[str, Tensor] = rm.merge(rm.model(self.folder / "base") + adapter(str(path)))
        return {unwrapped(key): one for key, one in found.items()}

    def loaded(self, path: Path) -> dict[str, Tensor]:
        """The same, by diffusers."""
        pipe = self.base()
        pipe.load_lora_weights(str(path))
        with_lora = [name for name, part in parts_of(pipe).items() if getattr(part, "peft_config", None)]
        pipe.fuse_lora(components=with_lora)
        pipe.unload_lora_weights()
        return states(pipe)


def parts_of(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def states(pipe: Any) -> dict[str, Tensor]:
    parts = parts_of(pipe).items()
    return {unwrapped(f"{name}/{key}"): one for name, part in parts for key, one in part.state_dict().items()}


def unwrapped(key: str) -> str:
    return key.replace("/text_model.", "/")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] if name in ("sdxl", "sd3") else []) for name in KINDS],
)
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuned]:
    with torch.random.fork_rng():
        yield Tuned(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("names", ["kohya", "diffusers"])
def test_diffusers_loads_what_was_extracted(tuned: Tuned, names: str) -> None:
    if (tuned.name, names) == ("sd3", "kohya"):
        pytest.skip("diffusers reads no names of kohya's for SD3")
    report = tuned.extract(names)
    assert report.share == pytest.approx(1.0, abs=1e-6)
    ours, theirs, before = tuned.applied(report.path), tuned.loaded(report.path), states(tuned.base())
    far = {key for key, one in theirs.items() if key in ours and (one - ours[key]).abs().max() > 2e-6}
    lost = NOT_LOADED.get((tuned.name, names))
    assert [key for key in far if lost is None or not re.match(lost, key)] == []
    assert bool(far) == (lost is not None)
    changed = [key for key, one in before.items() if key in ours and not torch.equal(ours[key], one)]
    assert len(changed) == len(report.ranks) or (tuned.name, names) in (("sd3", "kohya"), ("flux", "kohya"))
    assert len(changed) > 50


def test_adapters_of_different_ranks_joined_load_there_too(tuned: Tuned) -> None:
    report = tuned.extract("diffusers")
    tensors = load_file(report.path)
    some = {key: one * 0.5 for key, one in tensors.items() if ".0." in key}
    save_file(some, tuned.folder / "some.safetensors")
    recipe = adapter(str(report.path)) - 2.0 * adapter(str(tuned.folder / "some.safetensors"))
    joined = merge_adapters(recipe, tuned.folder / "joined.safetensors", overwrite=True)
    assert len(set(joined.ranks.values())) > 1
    ours, theirs = tuned.applied(joined.path), tuned.loaded(joined.path)
    assert [key for key, one in ours.items() if key in theirs and (one - theirs[key]).abs().max() > 2e-6] == []
    assert len(ours.keys() & theirs.keys()) > 100


def test_peft_loads_what_was_extracted_of_a_denoiser(tuned: Tuned) -> None:
    report = tuned.extract("peft")
    pipe, ours = tuned.base(), tuned.applied(report.path)
    (folder,) = {"unet", "transformer"} & set(parts_of(pipe))
    before = {key: one.clone() for key, one in parts_of(pipe)[folder].state_dict().items()}
    loaded = peft.PeftModel.from_pretrained(parts_of(pipe)[folder], report.path)
    theirs = loaded.merge_and_unload().state_dict()
    assert theirs.keys() == before.keys()
    assert {key for key, one in theirs.items() if (one - ours[f"{folder}/{key}"]).abs().max() > 2e-6} == set()
    changed = [key for key, one in before.items() if not torch.equal(theirs[key], one)]
    assert len(changed) == sum(not name.startswith("base_model.model.text_encoder") for name in report.ranks)
    assert len(changed) > 20


@pytest.mark.parametrize("options", [{"rank": 4}, {"energy": 0.9}])
def test_peft_loads_what_was_extracted(
    options: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        model.save_pretrained("base")
        with torch.no_grad():
            for name, one in model.named_parameters():
                if one.dim() > 1 and name not in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"):
                    one += (
                        0.05
                        * torch.randn(one.shape[0], 2 + ("mlp" in name))
                        @ torch.randn(2 + ("mlp" in name), one.shape[1])
                    )
        model.save_pretrained("tuned")
    report = extract_lora("tuned", "base", "made", **options)
    assert sorted(path.name for path in report.path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert len(report.ranks) == 2 * 7 - 1 + 1
    assert "base_model.model.model.layers.0.mlp.up_proj" in report.ranks
    loaded = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained("base"), "made")
    theirs = loaded.merge_and_unload().state_dict()
    ours = rm.merge(rm.model("base") + adapter("made"))
    assert theirs.keys() == ours.keys()
    assert {key for key, one in theirs.items() if (one - ours[key]).abs().max() > 1e-6} == set()
    if "rank" in options:
        full = load_file("tuned/model.safetensors")
        assert {key for key, one in full.items() if (one - ours[key]).abs().max() > 1e-5} == set()
    else:
        assert len(set(report.ranks.values())) > 1


def names_of(arch: str, shapes: Mapping[str, TensorInfo], names: str) -> dict[str, str | None]:
    found = find_arch(arch)
    assert found is not None
    written = Written(names, found)
    keys = list(shapes)
    if written.dialect == "diffusers":
        keys = list(from_original(found, Spelling("diffusers"), shapes).tensors)
    return {key: written.module(key) for key in keys}


@pytest.mark.parametrize("names", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize(("arch", "shapes"), [("sd1", sd1_shapes), ("sdxl", sdxl_shapes), ("flux", flux_shapes)])
def test_every_module_has_a_name_of_its_own_but_those_of_the_vae(arch: str, shapes: Any, names: str) -> None:
    found = names_of(arch, shapes(16), names)
    weights = {key for key in found if key.endswith(".weight")}
    unnamed = {key for key in weights if found[key] is None}
    assert unnamed == {key for key in weights if re.match(r"vae[./]|first_stage_model\.", key)}
    named = [name for name in found.values() if name is not None]
    assert len(named) == len(set(named)) == len(weights) - len(unnamed)


def test_names_are_those_that_trainers_give() -> None:
    """As kohya's trainers name modules: of Flux by its authors' layout, of text encoders by transformers'."""
    flux = names_of("flux", flux_shapes(16), "kohya")
    assert flux["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"] == "lora_unet_double_blocks_0_img_attn_qkv"
    text = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    assert flux[text] == "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    t5 = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"
    assert flux[t5] == "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    sdxl = names_of("sdxl", sdxl_shapes(16), "kohya")
    text = "text_encoder_2/text_model.encoder.layers.0.self_attn.q_proj.weight"
    assert sdxl[text] == "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"
    sd1 = names_of("sd1", sd1_shapes(16), "kohya")
    assert sd1["text_encoder/text_model.encoder.layers.0.mlp.fc1.weight"] == (
        "lora_te_text_model_encoder_layers_0_mlp_fc1"
    )
    assert Written("peft", find_arch("llama")).module("model.layers.0.mlp.up_proj.weight") == (
        "base_model.model.model.layers.0.mlp.up_proj"
    )
    assert Written("kohya", None).module("mid.block.bias") is None


def test_the_header_tells_the_arch_and_the_ranks(tmp_path: Path) -> None:
    written = Written("kohya", find_arch("sdxl"))
    assert written.metadata({"lora_unet_a": 8, "lora_unet_b": 4, "lora_unet_c": 8}) == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "8",
        "ss_network_alpha": "1.0",
        "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.sai_model_spec": "1.0.1",
    }
    assert written.metadata({"lora_unet_a": 0}) == {}
    assert Written("peft", None).metadata({"base_model.model.a": 4}) == {}


def test_diffusers_is_told_the_ranks_of_each_folder() -> None:
    ranks = {"unet.mid.to_q": 4, "unet.mid.to_k": 2, "text_encoder.text_model.encoder.fc1": 3}
    like = MemoryCheckpoint(describe_tensors({"unet.mid.to_q.lora_A.weight": torch.zeros(2, 3)}, "style"))
    for written in (Written("diffusers", find_arch("sdxl")), Written.like(like)):
        told = json.loads(written.metadata(ranks)["lora_adapter_metadata"])
        assert (told["unet.r"], told["unet.lora_alpha"], told["unet.rank_pattern"]) == (4, 4, {"mid.to_k": 2})
        assert told["unet.alpha_pattern"] == {"mid.to_k": 2}
        assert told["unet.target_modules"] == ["mid.to_k", "mid.to_q"]
        assert told["text_encoder.target_modules"] == ["encoder.fc1"]  # with text_model. before it, or without
        assert written.metadata({**ranks, "mid.to_v": 1}) == {}


def test_the_header_of_a_file_says_where_it_may_be_used(tuned: Tuned) -> None:
    with safe_open(tuned.extract("kohya").path, "pt") as file:
        told = file.metadata()
    assert (
        told["ss_base_model_version"]
        == {"sd1": "sd_v1", "sdxl": "sdxl_base_v1-0", "sd3": "sd3", "flux": "flux1"}[tuned.name]
    )
