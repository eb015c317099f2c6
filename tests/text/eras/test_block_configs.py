"""Weights by U-Net block of version 0.1.0 mean the same keys as in sd-mecha, both ways."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

import pytest

import remelt as rm
from remelt.archs.arch import find_arch
from remelt.archs.facts import layout
from remelt.errors import RecipeError
from remelt.recipe.blocks import BlockWeights
from remelt.recipe.node import Call, Node, Value
from remelt.text.eras.blocks import BLOCK_CONFIGS, BlockNumbers
from remelt.text.eras.writer import write_version_0_1
from remelt.text.reader import read_recipe


def resolved(weights: BlockWeights | float, arch: str) -> dict[str, float]:
    """The number of every key of an arch that is merged."""
    if not isinstance(weights, BlockWeights):
        return dict.fromkeys(keys_of(arch), weights)
    found = layout(keys_of(arch), find_arch(arch))
    return {key: float(weights.resolve(found.facts(key), found)) for key in keys_of(arch)}  # type: ignore[arg-type]


def keys_of(arch: str) -> tuple[str, ...]:
    model = [
        f"model.diffusion_model.{rest}" for rest in ("time_embed.0.weight", "out.2.bias", "middle_block.1.norm.weight")
    ]
    depth = BLOCK_CONFIGS[arch].depth
    model += [f"model.diffusion_model.{side}_blocks.{i}.0.weight" for side in ("input", "output") for i in range(depth)]
    text = (
        "cond_stage_model.transformer.text_model" if arch == "sd1" else "conditioner.embedders.0.transformer.text_model"
    )
    averages = ["model_ema." + key.removeprefix("model.").replace(".", "") for key in model]
    label = ["model.diffusion_model.label_emb.0.0.weight"] * (arch == "sdxl")
    return (
        *model,
        *label,
        *averages,
        f"{text}.encoder.layers.3.mlp.fc1.weight",
        "first_stage_model.decoder.conv_in.weight",
    )


def theirs(arch: str, numbers: Mapping[str, float], default: float) -> dict[str, float]:
    """The number of every key by the conversion of sd-mecha 1.1.8."""
    pytest.importorskip("sd_mecha")
    from sd_mecha.extensions.builtin.model_configs import convert_sd1_blocks, convert_sdxl_blocks

    class Blocks(dict[str, str]):
        keys: Mapping[str, str] = type("Same", (dict,), {"__missing__": lambda self, key: key})()

    class Config:
        def keys(self) -> tuple[str, ...]:
            return keys_of(arch)

    module, name, conversion = {
        "sd1": (convert_sd1_blocks, "sd1_ldm_config", "convert_sd1_blocks_to_ldm"),
        "sdxl": (convert_sdxl_blocks, "sdxl_sgm_config", "convert_sdxl_blocks_to_sgm"),
    }[arch]
    blocks = Blocks()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, Config())
        getattr(module, conversion).__wrapped__.map_keys(blocks)
    return {key: numbers.get(block, default) for key, block in blocks.items()}


def drawn(arch: str, seed: int) -> tuple[dict[str, float], float]:
    source = random.Random(seed)
    blocks = BLOCK_CONFIGS[arch].blocks
    chosen = source.sample(blocks, source.randrange(1, len(blocks)))
    return {name: source.choice((0.0, 0.125, 0.25, 0.5, 1.0)) for name in chosen}, source.choice((0.25, 0.5))


@pytest.mark.parametrize("arch", BLOCK_CONFIGS)
def test_numbers_by_block_mean_the_keys_of_sd_mecha(arch: str) -> None:
    for seed in range(40):
        numbers, default = drawn(arch, seed)
        found = BlockNumbers(BLOCK_CONFIGS[arch], numbers).weights(default)
        assert resolved(found, arch) == theirs(arch, numbers, default), numbers


def recipe(arch: str, weights: BlockWeights) -> Node:
    return rm.weighted_sum(rm.model("a", arch=arch), rm.model("b", arch=arch), alpha=weights)


def weights_of(node: Node) -> BlockWeights | float:
    assert isinstance(node, Call)
    value = dict(node.kwargs)["alpha"]
    assert isinstance(value, Value)
    return value.value  # type: ignore[return-value]


@pytest.mark.parametrize("arch", BLOCK_CONFIGS)
def test_block_weights_are_written_and_read_back_or_refused(arch: str) -> None:
    written = 0
    for seed in range(60):
        numbers, default = drawn(arch, seed)
        if seed % 2:
            weights = BlockNumbers(BLOCK_CONFIGS[arch], numbers).weights(default)
        else:
            weights = (
                rm.blocks({name: weight for name, weight in numbers.items() if name != "VAE"} or {"M00": 1}) | default
            )
        try:
            text = write_version_0_1(recipe(arch, weights))
        except RecipeError as error:
            assert not seed % 2
            assert "belong to BASE" in error.message
            assert str(error.hint).startswith("if that is meant, say so first: keys(")
            continue
        again = read_recipe(text)
        assert resolved(weights_of(again), arch) == resolved(weights, arch)
        assert write_version_0_1(again) == text
        written += 1
    assert written >= 30


def test_what_is_refused_can_be_written_once_it_is_said() -> None:
    weights = rm.blocks(BASE=0.125, IN00=0.25) | 0.5
    with pytest.raises(RecipeError) as caught:
        write_version_0_1(recipe("sdxl", weights))
    said = re.findall(r'"(\S+)": ([\d.]+)', str(caught.value.hint))
    assert len(said) == 3
    exceptions = rm.keys({name: float(number) for name, number in said}, optional=True)
    text = write_version_0_1(recipe("sdxl", exceptions | weights))
    assert resolved(weights_of(read_recipe(text)), "sdxl") == resolved(exceptions | weights, "sdxl")


def test_plain_numbers_stand_for_weights_that_are_all_the_same() -> None:
    assert write_version_0_1(recipe("sd1", rm.blocks(IN03=0.5) | 0.5)).splitlines()[-2:] == [
        'merge "fallback" &4 0.5',
        'merge "weighted_sum" &0 &1 alpha=&5',
    ]
