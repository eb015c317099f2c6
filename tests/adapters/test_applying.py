"""Adapters in files and folders of PEFT and LyCORIS, added to whole models: what their own programs make of them."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import remelt as rm
from remelt.errors import CheckError
from remelt.recipe.adapter import adapter

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{name}Warning") for name in ("User", "Future", "Deprecation", "Runtime")
]

LAYERS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def language_model(kind: str) -> Any:
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=60, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def saved(kind: str, config: Any, at: Path) -> dict[str, Tensor]:
    """What PEFT merges; the model and the adapter are in ``base`` and ``style``."""
    model = language_model(kind)
    model.save_pretrained(at / "base")
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, one in wrapped.named_parameters():
            if one.requires_grad:
                around = re.search("magnitude|ia3_l|boft_s", name)
                one.copy_(torch.rand_like(one) + 0.5 if around else torch.randn_like(one) * 0.1)
    wrapped.save_pretrained(at / "style")
    assert sorted(path.name for path in (at / "style").iterdir())[:2] == ["README.md", "adapter_config.json"]
    merged: dict[str, Tensor] = wrapped.merge_and_unload().state_dict()
    return merged


def near(found: dict[str, Tensor], due: dict[str, Tensor]) -> None:
    assert found.keys() == due.keys()
    far = {key: float((found[key] - due[key]).abs().max()) for key in due}
    assert {key: one for key, one in far.items() if one > 5e-7} == {}


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": LAYERS} | options))


CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "rslora": lambda: lora(use_rslora=True),
    "patterns": lambda: lora(
        rank_pattern={"q_proj": 2, "^model.layers.1.mlp.down_proj": 3, r"layers\.0\.self_attn\.v_proj": 5},
        alpha_pattern={"q_proj": 7, "^model.layers.1.mlp.down_proj": 1, "proj": 100},
    ),
    "dora": lambda: lora(use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=LAYERS, alpha_pattern={"q_proj": 3}),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=6, target_modules=LAYERS),
    "lokr of whole matrices": lambda: peft.LoKrConfig(
        r=32, alpha=6, target_modules=LAYERS, rank_pattern={"q_proj": 64}
    ),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", *LAYERS], feedforward_modules=["down_proj"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=LAYERS),
    "oft within bounds": lambda: peft.OFTConfig(oft_block_size=8, coft=True, eps=0.1, target_modules=LAYERS),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=LAYERS),
    "embeddings": lambda: lora(target_modules=["embed_tokens", "q_proj", "lm_head"]),
    "embeddings, dora": lambda: lora(target_modules=["embed_tokens", "q_proj", "lm_head"], use_dora=True),
    "a head": lambda: lora(target_modules=["q_proj", "lm_head"]),
    "a head trained whole": lambda: lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "a norm trained whole": lambda: lora(modules_to_save=["norm"]),
    "norms alone": lambda: peft.LNTuningConfig(),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_a_folder_of_peft_is_merged_as_peft_merges_it(kind: str, name: str, tmp_path: Path) -> None:
    due = saved(kind, CONFIGS[name](), tmp_path)
    found = rm.merge(rm.model(tmp_path / "base") + adapter(str(tmp_path / "style")))
    near(found, due)
    base = load_file(tmp_path / "base" / "model.safetensors")
    changed = [key for key, one in base.items() if not torch.equal(found[key], one)]
    assert changed == [key for key, one in base.items() if not torch.equal(due[key], one)]
    assert 2 <= len(changed) <= 11


BIASES: dict[str, tuple[Callable[[], Any], int]] = {
    "of lora": (lambda: lora(target_modules=["q_proj"], lora_bias=True), 2),
    "all": (lambda: lora(bias="all"), 6),
    "lora_only": (lambda: lora(bias="lora_only"), 4),
    "all beside oft": (lambda: peft.OFTConfig(oft_block_size=4, target_modules=LAYERS, bias="all"), 6),
    "boft_only": (lambda: peft.BOFTConfig(boft_block_size=4, target_modules=LAYERS, bias="boft_only"), 4),
    "of a head trained whole": (lambda: lora(modules_to_save=["k_proj"]), 2),
}


@pytest.mark.parametrize("name", BIASES)
def test_biases_are_what_peft_trained(name: str, tmp_path: Path) -> None:
    config, count = BIASES[name]
    due = saved("Qwen2", config(), tmp_path)
    found = rm.merge(rm.model(tmp_path / "base") + adapter(str(tmp_path / "style")))
    near(found, due)
    base = load_file(tmp_path / "base" / "model.safetensors")
    changed = [key for key in base if key.endswith(".bias") and not torch.equal(found[key], base[key])]
    assert len(changed) == count
    half = rm.merge(rm.model(tmp_path / "base") + 0.5 * adapter(str(tmp_path / "style")))
    for key in changed:
        torch.testing.assert_close(half[key], (base[key] + due[key]) / 2, rtol=0.0, atol=1e-6)


def test_the_file_in_a_folder_of_peft_is_read_with_its_configuration(tmp_path: Path) -> None:
    due = saved("Llama", CONFIGS["patterns"](), tmp_path)
    file = tmp_path / "style" / "adapter_model.safetensors"
    near(rm.merge(rm.model(tmp_path / "base") + rm.model(file)), due)
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(file.read_bytes())
    base = load_file(tmp_path / "base" / "model.safetensors")
    found = rm.merge(rm.model(tmp_path / "base") + adapter(str(alone)))
    key = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close((found[key] - base[key]) * (7 / 2), due[key] - base[key], rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("begun", ["pissa", "olora"])
def test_what_peft_adds_to_less_than_the_model_is_refused(begun: str, tmp_path: Path) -> None:
    saved("Llama", lora(init_lora_weights=begun), tmp_path)
    told = f"its configuration says init_lora_weights '{begun}': PEFT adds it to a model of which it took a part away"
    with pytest.raises(CheckError, match=told) as caught:
        rm.plan(rm.model(tmp_path / "base") + adapter(str(tmp_path / "style")))
    assert "path_initial_model_for_weight_conversion" in str(caught.value)


def test_what_began_so_and_was_made_plain_is_merged(tmp_path: Path) -> None:
    base = language_model("Llama")
    base.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(base, lora(init_lora_weights="pissa"))
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "begun")
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for one in (one for one in wrapped.parameters() if one.requires_grad):
            one.add_(torch.randn_like(one) * 0.1)
    at = {"path_initial_model_for_weight_conversion": str(tmp_path / "begun")}
    wrapped.save_pretrained(tmp_path / "style", **at)
    found = rm.merge(rm.model(tmp_path / "base") + adapter(str(tmp_path / "style")))
    due = wrapped.merge_and_unload().state_dict()
    assert {key for key in due if not torch.allclose(found[key], due[key], rtol=0.0, atol=2e-6)} == set()


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
        lambda: peft.AdaLoraConfig(init_r=4, target_r=4, total_step=10, target_modules=["q_proj"]),
        lambda: lora(trainable_token_indices=[1, 2]),
    ],
)
def test_what_peft_has_beside_is_refused_and_nothing_of_it_lost(config: Callable[[], Any], tmp_path: Path) -> None:
    saved("Llama", config(), tmp_path)
    told = r"style +\d+ of its tensors are no part of any kind of adapter that is known: base_model\.model\.model\."
    with pytest.raises(CheckError, match=told):
        rm.plan(rm.model(tmp_path / "base") + adapter(str(tmp_path / "style")))


# Networks of LyCORIS, on a whole U-Net: what it computes with them beside it, and with them merged.

there = runpy.run_path(str(Path(__file__).parents[1] / "api" / "test_dialects.py"))

NETWORKS: dict[str, dict[str, Any]] = {
    "lora": {"algo": "lora", "conv_dim": 2, "conv_alpha": 1.0},
    "locon with cores": {"algo": "locon", "use_tucker": True},
    "dora": {"algo": "locon", "dora_wd": True},
    "loha": {"algo": "loha"},
    "lokr": {"algo": "lokr", "factor": 4, "linear_dim": 1},
    "lokr, whole": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "ia3": {"algo": "ia3"},
    "oft": {"algo": "diag-oft"},
    "oft, rescaled": {"algo": "diag-oft", "rescaled": True, "constraint": 0.01},
    "boft": {"algo": "boft"},
    "glora": {"algo": "glora"},
    "full": {"algo": "full"},
    "norms": {"algo": "lora", "train_norm": True},
}


@pytest.mark.parametrize("prefix", ["lycoris_", pytest.param("lora_unet_", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_lycoris_is_merged_as_it_computes(name: str, prefix: str, tmp_path: Path) -> None:
    lycoris = pytest.importorskip("lycoris")
    unet = there["SD1"]().make().unet.eval()
    unet.save_pretrained(tmp_path / "unet")
    options = {"linear_dim": 4, "linear_alpha": 2.0, "preset": "full"} | NETWORKS[name]
    network = lycoris.create_lycoris(unet, 1.0, **options)
    network.apply_to()
    with torch.no_grad():
        for key, one in network.named_parameters():
            if "dora_scale" in key or "rescale" in key:
                one.mul_(1 + torch.rand_like(one))
            elif name != "full":
                one.copy_(torch.randn_like(one) * (0.05 if "norm" in key else 0.1))
            else:
                one.add_(torch.randn_like(one) * 0.05)
    state = {key.replace("lycoris_", prefix, 1): one.contiguous() for key, one in network.state_dict().items()}
    save_file(state, tmp_path / "style.safetensors")
    given = torch.randn(1, 4, 8, 8), torch.tensor(5), torch.randn(1, 3, 32)
    with torch.no_grad():
        due = unet(*given).sample
        network.restore()
        before = unet(*given).sample
        unet.load_state_dict(rm.merge(rm.model(tmp_path / "unet") + adapter(str(tmp_path / "style.safetensors"))))
        found = unet(*given).sample
    assert torch.isfinite(due).all() and (due - before).abs().max() > 1e-2
    torch.testing.assert_close(found, due, rtol=0.0, atol=2e-5 * float(due.abs().max()))
