"""Specifications on models of true size, as their libraries build them: shapes alone, without numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from remelt.alignment.instances.encoders import VIT_NAMES, Classifier
from remelt.alignment.instances.instance import infos_of
from remelt.alignment.instances.layouts import of_pipeline, renamed
from remelt.alignment.instances.networks import Bottleneck, ResNet
from remelt.archs.axes.find import axis_groups
from remelt.archs.axes.heads import HeadRule, Heads
from remelt.archs.axes.recognise import recognise_network
from remelt.archs.axis_groups import AxisGroup, Level, Shapes, Window, faults, keys_of
from remelt.core.tensor_info import TensorInfo

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

Infos = Mapping[str, TensorInfo]


def flux_dev() -> Infos:
    return pipeline("flux", transformer=diffusers.FluxTransformer2DModel(guidance_embeds=True))


def sd3_medium() -> Infos:
    return pipeline(
        "sd3",
        transformer=diffusers.SD3Transformer2DModel(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
        ),
    )


def sd35_medium() -> Infos:
    return pipeline(
        "sd3",
        transformer=diffusers.SD3Transformer2DModel(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
            qk_norm="rms_norm", dual_attention_layers=tuple(range(13)),
        ),
    )  # fmt: skip


def llama_3_8b() -> Infos:
    return decoder("Llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                   num_key_value_heads=8, vocab_size=128256)  # fmt: skip


def qwen3_8b() -> Infos:
    return decoder("Qwen3", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
                   num_key_value_heads=8, head_dim=128, vocab_size=151936)  # fmt: skip


def mixtral_8x7b() -> Infos:
    return decoder("Mixtral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                   num_key_value_heads=8, vocab_size=32000)  # fmt: skip


def qwen3_30b_a3b() -> Infos:
    return decoder("Qwen3Moe", hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
                   head_dim=128, num_experts=128, moe_intermediate_size=768, vocab_size=151936)  # fmt: skip


def vit_b() -> Infos:
    module = Classifier(transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000)))
    originals, _ = renamed(module, VIT_NAMES)
    return {key: made.info for key, made in originals(infos_of(module.state_dict())).items()}


def resnet_50() -> Infos:
    return infos_of(ResNet(Bottleneck, (3, 4, 6, 3), 64).state_dict())


def pipeline(arch: str, **parts: nn.Module) -> Infos:
    """What the parts of a pipeline are in the original layout."""
    module = nn.ModuleDict(parts)
    originals, _ = of_pipeline(arch, module)
    return {key: made.info for key, made in originals(infos_of(module.state_dict())).items()}


def decoder(name: str, **options: Any) -> Infos:
    config = getattr(transformers, f"{name}Config")(tie_word_embeddings=False, **options)
    return infos_of(getattr(transformers, f"{name}ForCausalLM")(config).state_dict())


HEADS = {"model": HeadRule(size=128)}
MODELS: Mapping[str, tuple[str, Callable[[], Infos], Heads, float]] = {
    "Flux-dev": ("flux", flux_dev, {}, 0.9999),
    "SD3 medium": ("sd3", sd3_medium, {}, 0.9999),
    "SD3.5 medium": ("sd3", sd35_medium, {}, 0.9999),
    "Llama-3-8B": ("llama", llama_3_8b, HEADS, 1.0),
    "Qwen3-8B": ("qwen3", qwen3_8b, {}, 0.9999),
    "Mixtral 8x7B": ("mixtral", mixtral_8x7b, HEADS, 1.0),
    "Qwen3-30B-A3B": ("qwen3_moe", qwen3_30b_a3b, {}, 0.9999),
    "ViT-B": ("vit", vit_b, {}, 0.9999),
    "ResNet-50": ("resnet", resnet_50, {}, 0.9999),
}
"""By name: the arch, what builds it, head rules, and the least share of parameters that have an axis to be permuted."""
HELD = {"Flux-dev": 0.1206, "Llama-3-8B": 0.0836, "Qwen3-8B": 0.0922, "Mixtral 8x7B": 0.0144, "Qwen3-30B-A3B": 0.0148}
"""The share of parameters that keep their order inside of a head, though heads may move."""


@pytest.mark.parametrize("name", MODELS)
def test_nearly_all_of_a_model_of_true_size_may_be_permuted(name: str) -> None:
    arch, make, heads, least = MODELS[name]
    with torch.device("meta"):
        shapes = {key: tuple(info.shape) for key, info in make().items()}
    groups = axis_groups(arch, shapes, heads)
    assert list(faults(groups, shapes)) == []
    assert covered(groups, shapes) >= least
    if arch in ("mixtral", "qwen3_moe", "resnet"):
        assert recognise_network(shapes) == arch
    assert held(groups, shapes) == pytest.approx(HELD.get(name, 0.0), abs=1e-4)


def covered(groups: tuple[AxisGroup, ...], shapes: Shapes) -> float:
    """The share of parameters in tensors of which an axis may be permuted."""
    moved = {key for group in groups if not group.is_fixed for one in group.windows for key in keys_of(group, one)}
    return sum(math.prod(shapes[key]) for key in moved) / sum(map(math.prod, shapes.values()))


def held(groups: tuple[AxisGroup, ...], shapes: Shapes) -> float:
    """The share of parameters that are rows of queries and keys which rotary embeddings keep in order inside a head."""

    def is_held(group: AxisGroup, window: Window) -> bool:
        levels: list[Level] = [group.by_name[name] for name in window.levels]
        return "qk" in window.levels and group.by_name["qk"].fixed and not all(one.fixed for one in levels)

    found = sum(
        math.prod(group.shape(window.levels)) * math.prod(shapes[window.key]) // shapes[window.key][window.axis]
        for group in groups for window in group.windows if is_held(group, window)
    )  # fmt: skip
    return found / sum(map(math.prod, shapes.values()))
