"""What configurations say of an adapter's scale, and those that cannot be read."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from remelt.adapters.settings import Settings
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import AdapterError

LORA = {"lora_down.weight": TensorInfo(DType.F16, (4, 8)), "lora_up.weight": TensorInfo(DType.F16, (8, 4))}
LOKR = {"lokr_w1": TensorInfo(DType.F16, (2, 2)), "lokr_w2": TensorInfo(DType.F16, (4, 4))}
OFT = {"oft_R": TensorInfo(DType.F16, (2, 6))}
MODULE = "base_model.model.model.layers.1.mlp.down_proj"


def peft(at: Path, **config: Any) -> Settings:
    (at / "adapter_config.json").write_text(json.dumps(config))
    return Settings.of(at / "adapter_model.safetensors", {})


def test_the_alpha_of_a_configuration_is_divided_by_the_rank(tmp_path: Path) -> None:
    assert peft(tmp_path, r=32, lora_alpha=6).scale(MODULE, LORA, None) == 6 / 4
    assert peft(tmp_path, r=32, lora_alpha=6, use_rslora=True).scale(MODULE, LORA, None) == 6 / math.sqrt(4)
    assert peft(tmp_path, r=32, alpha=6).scale(MODULE, LORA, None) == 6 / 4
    assert Settings.of(tmp_path, {}).scale(MODULE, LORA, None) == 6 / 4


@pytest.mark.parametrize(
    ("pattern", "alpha"),
    [
        ("down_proj", 1),
        ("mlp.down_proj", 1),
        (r"layers\.\d+\.mlp\.down_proj", 1),
        ("^model.layers.1.mlp.down_proj", 1),
        ("model.layers.1.mlp.down_proj", 1),
        ("^layers.1.mlp.down_proj", 6),
        ("proj", 6),
        ("down", 6),
        ("up_proj|down_proj", 1),
        ("(", 6),
    ],
)
def test_patterns_end_the_name_of_a_module(pattern: str, alpha: int, tmp_path: Path) -> None:
    settings = peft(tmp_path, r=32, lora_alpha=6, alpha_pattern={"other": 9, pattern: 1})
    assert settings.scale(MODULE, LORA, None) == alpha / 4


def test_an_alpha_in_the_file_counts_before_a_configuration(tmp_path: Path) -> None:
    assert peft(tmp_path, r=4, lora_alpha=6).scale(MODULE, LORA, 2.0) is None


def test_without_a_configuration_the_parts_tell(tmp_path: Path) -> None:
    assert Settings.of(tmp_path / "style.safetensors", {}).scale(MODULE, LORA, None) is None
    assert Settings.of(None, {}).scale(MODULE, LORA, 3.0) is None


@pytest.mark.parametrize("config", [{"r": 4}, {"lora_alpha": "6"}, {"lora_alpha": True}, {"lora_alpha": None}])
def test_what_is_no_number_says_nothing(config: dict[str, Any], tmp_path: Path) -> None:
    assert peft(tmp_path, **config).scale(MODULE, LORA, None) is None


def test_a_lokr_of_whole_matrices_is_scaled_by_the_rank_of_its_configuration(tmp_path: Path) -> None:
    settings = peft(tmp_path, r=16, alpha=8, rank_pattern={"up_proj": 32})
    assert settings.scale(MODULE, LOKR, None) == 8 / 16
    assert settings.scale(MODULE.replace("down", "up"), LOKR, None) == 8 / 32
    assert peft(tmp_path, r=0, alpha=8).scale(MODULE, LOKR, None) is None
    assert settings.scale(MODULE, OFT, None) is None


def test_diffusers_writes_a_configuration_for_each_component() -> None:
    told = {
        "unet.lora_alpha": 6,
        "unet.alpha_pattern": {"^mid.to_q": 2},
        "text_encoder.lora_alpha": 12,
        "text_encoder.use_rslora": True,
    }
    settings = Settings.of(None, {"lora_adapter_metadata": json.dumps(told)})
    assert settings.scale("unet.mid.to_q", LORA, None) == 2 / 4
    assert settings.scale("unet.end.mid.to_q", LORA, None) == 6 / 4
    assert settings.scale("text_encoder.mid.to_q", LORA, None) == 12 / math.sqrt(4)
    assert settings.scale("text_encoder_2.mid.to_q", LORA, None) is None


@pytest.mark.parametrize(("told", "root"), [("True", True), ("true", True), (True, True), ("1", True), ("no", False)])
def test_an_alpha_of_lycoris_as_it_was_set_is_divided_by_the_root_of_the_rank(told: object, root: bool) -> None:
    """LyCORIS before version 3 stores the alpha that was set; later ones what is to be divided by the rank itself."""
    metadata = {"ss_network_args": json.dumps({"rs_lora": told, "conv_alpha": "5"}), "ss_network_alpha": "3.0"}
    settings = Settings.of(None, metadata)
    assert settings.scale("lora_unet_mid", LORA, 3.0) == (3 / math.sqrt(4) if root else None)
    assert settings.scale("lora_unet_mid", LORA, 6.0) is None
    kernel = LORA | {"lora_down.weight": TensorInfo(DType.F16, (4, 8, 3, 3))}
    assert settings.scale("lora_unet_mid", kernel, 5.0) == (5 / math.sqrt(4) if root else None)
    assert settings.scale("lora_unet_mid", kernel, 3.0) is None


@pytest.mark.parametrize("text", ["", "null", "None", '["a=1"]', '{"rs_lora": "True"}', "{"])
def test_arguments_that_say_nothing_of_alpha_are_no_hindrance(text: str) -> None:
    assert Settings.of(None, {"ss_network_args": text}).scale("lora_unet_mid", LORA, 3.0) is None


def test_a_configuration_speaks_of_the_file_that_peft_names_alone(tmp_path: Path) -> None:
    peft(tmp_path, r=4, lora_alpha=8)
    for name, scale in (("adapter_model.safetensors", 2), ("adapter_model.bin", 2), ("style.safetensors", None)):
        assert Settings.of(tmp_path / name, {}).scale(MODULE, LORA, None) == scale


@pytest.mark.parametrize("begun", ["pissa", "pissa_niter_16", "PiSSA", "olora", "corda", "loftq", "lora_ga"])
def test_a_difference_to_less_than_the_model_is_refused(begun: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"says init_lora_weights '{begun}': PEFT adds it to a model of which"):
        peft(tmp_path, r=4, lora_alpha=8, init_lora_weights=begun)
    with pytest.raises(AdapterError, match=f"says init_lora_weights '{begun}'"):
        Settings.of(None, {"lora_adapter_metadata": json.dumps({"unet.init_lora_weights": begun})})


@pytest.mark.parametrize("begun", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_other_ways_to_begin_make_no_difference(begun: object, tmp_path: Path) -> None:
    settings = peft(tmp_path, r=4, lora_alpha=8, init_lora_weights=begun, layer_replication=None, use_qalora=False)
    assert settings.scale(MODULE, LORA, None) == 2


def test_what_is_no_plain_difference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="its configuration has layer_replication, with which it is no plain"):
        peft(tmp_path, r=4, layer_replication=[[0, 2], [1, 3]])
    with pytest.raises(AdapterError, match="its configuration has use_qalora"):
        peft(tmp_path, r=4, use_qalora=True)


def test_facts_for_kinds_are_handed_on(tmp_path: Path) -> None:
    settings = peft(tmp_path, fan_in_fan_out=True, eps=0.1, coft=None, target_modules=["x"])
    assert settings.options(MODULE) == {"fan_in_fan_out": True, "eps": 0.1}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "its adapter_config.json is no JSON: Expecting property name"),
        ("[" * 100_000, "its adapter_config.json is no JSON: "),
        ("[1]", "its adapter_config.json is no JSON object, but a list"),
        ("\ufeff{}", "its adapter_config.json is no JSON: "),
    ],
    ids=["cut", "deep", "list", "mark"],
)
def test_a_configuration_that_cannot_be_read_is_refused(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(AdapterError, match=re.escape(told)):
        Settings.of(tmp_path / "adapter_model.safetensors", {})


def test_a_header_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(AdapterError, match="its lora_adapter_metadata is no JSON: ") as caught:
        Settings.of(None, {"lora_adapter_metadata": "{'r': 4}"})
    assert caught.value.hint == "take it from where the adapter came from, or remove it"


@pytest.mark.parametrize("pattern", ["(a+)+", "(a*)*b", "(?:x{1,9}){1,9}", "a" * 501])
def test_patterns_that_could_take_for_ever_are_refused(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="repeats what repeats, or is long"):
        peft(tmp_path, r=2, lora_alpha=2, alpha_pattern={pattern: 4}).scale(MODULE, LORA, None)
