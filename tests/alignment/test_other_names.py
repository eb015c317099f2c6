"""Specifications of networks under the names that other libraries and files have for them: the function is the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from remelt.alignment.checking import check_numerically
from remelt.alignment.instances import INSTANCES
from remelt.archs.axes.find import axis_groups
from remelt.archs.axes.heads import Heads
from remelt.archs.axis_groups import faults

pytest.importorskip("transformers")

Tensors = Mapping[str, Tensor]
Renamed = tuple[dict[str, Tensor], Callable[[Tensors], dict[str, Tensor]]]
TIMM = {
    "vit.embeddings.cls_token": "cls_token", "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.patch_embeddings.projection.": "patch_embed.proj.", "vit.encoder.layer.": "blocks.",
    ".layernorm_before.": ".norm1.", ".layernorm_after.": ".norm2.", ".attention.output.dense.": ".attn.proj.",
    ".intermediate.dense.": ".mlp.fc1.", ".output.dense.": ".mlp.fc2.", "vit.layernorm.": "norm.",
    "classifier.": "head.", ".attention.attention.": ".attn.qkv.",
}  # fmt: skip
TORCHVISION = {
    "vit.embeddings.cls_token": "class_token", "vit.embeddings.position_embeddings": "encoder.pos_embedding",
    "vit.embeddings.patch_embeddings.projection.": "conv_proj.",
    "vit.encoder.layer.": "encoder.layers.encoder_layer_", ".layernorm_before.": ".ln_1.",
    ".layernorm_after.": ".ln_2.", ".attention.output.dense.": ".self_attention.out_proj.",
    ".intermediate.dense.": ".mlp.0.",
    ".output.dense.": ".mlp.3.", "vit.layernorm.": "encoder.ln.", "classifier.": "heads.head.",
    ".attention.attention.": ".self_attention.in_proj_",
}  # fmt: skip
MODULES = {
    "vit.encoder.layer.": "vit.layers.", ".attention.output.dense.": ".attention.o_proj.",
    ".intermediate.dense.": ".mlp.fc1.", ".output.dense.": ".mlp.fc2.",
    ".attention.attention.query.": ".attention.q_proj.", ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
}  # fmt: skip
PARTS = ("query", "key", "value")


def named(key: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        key = key.replace(old, new)
    return key


def of_vit(tensors: Tensors, names: Mapping[str, str]) -> Renamed:
    """The tensors of a file under other names, queries, keys and values maybe joined; and what undoes it."""
    places: dict[str, list[str]] = {}
    for key in tensors:
        other = named(key, names)
        part = next((part for part in PARTS if f"qkv.{part}." in other or f"in_proj_{part}." in other), None)
        places.setdefault(other if part is None else other.replace(f"{part}.", ""), []).append(key)
    for keys in places.values():
        keys.sort(key=lambda key: [f".{part}." in key for part in PARTS], reverse=True)
    made = {name: torch.cat([tensors[key] for key in keys]) for name, keys in places.items()}

    def back(changed: Tensors) -> dict[str, Tensor]:
        return {
            key: part
            for name, keys in places.items()
            for key, part in zip(keys, changed[name].chunk(len(keys)), strict=True)
        }

    return made, back


def of_mixtral(tensors: Tensors) -> Renamed:
    """The experts of a file stacked, as modules have them."""
    made, start = {}, ".block_sparse_moe.experts."
    layers = sorted({key.partition(start)[0] for key in tensors if start in key})
    count = len({key.split(".")[5] for key in tensors if start in key})
    for key, tensor in tensors.items():
        if start not in key:
            made[key.replace("block_sparse_moe", "mlp")] = tensor
    for layer in layers:
        w1, w2, w3 = (
            torch.stack([tensors[f"{layer}{start}{number}.{part}.weight"] for number in range(count)])
            for part in ("w1", "w2", "w3")
        )
        made |= {f"{layer}.mlp.experts.gate_up_proj": torch.cat([w1, w3], 1), f"{layer}.mlp.experts.down_proj": w2}

    def back(changed: Tensors) -> dict[str, Tensor]:
        found = {
            key.replace("mlp.gate.", "block_sparse_moe.gate."): one
            for key, one in changed.items()
            if ".experts." not in key
        }
        for layer in layers:
            both, down = (changed[f"{layer}.mlp.experts.{part}_proj"] for part in ("gate_up", "down"))
            for number in range(count):
                w1, w3 = both[number].chunk(2)
                parts = {"w1": w1, "w2": down[number], "w3": w3}
                found |= {f"{layer}{start}{number}.{part}.weight": one for part, one in parts.items()}
        return found

    return made, back


def check(arch: str, tensors: Tensors, heads: Heads, function: Callable[[Tensors], tuple[Tensor, ...]]) -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    groups = axis_groups(arch, shapes, heads)
    assert list(faults(groups, shapes)) == []
    assert {"heads", "free"} <= {group.structure for group in groups}
    report = check_numerically(groups, tensors, function, seed=3)
    assert report.passed, report.broken
    assert report.together < 1e-12


@pytest.mark.parametrize("names", [TIMM, TORCHVISION, MODULES], ids=["timm", "torchvision", "modules"])
def test_a_vision_transformer_is_the_same_under_all_its_names(names: Mapping[str, str]) -> None:
    instance = INSTANCES["vit"]()
    made, back = of_vit(instance.tensors, names)
    assert made.keys() != instance.tensors.keys()
    check("vit", made, instance.heads, lambda changed: instance.function(back(changed)))


def test_experts_that_are_stacked_are_permuted_as_those_that_are_not() -> None:
    instance = INSTANCES["mixtral"]()
    made, back = of_mixtral(instance.tensors)
    check("mixtral", made, instance.heads, lambda changed: instance.function(back(changed)))


def test_embeddings_that_are_the_head_too_are_permuted_once() -> None:
    instance = INSTANCES["llama"]()
    tied = {key: tensor for key, tensor in instance.tensors.items() if key != "lm_head.weight"}

    def function(changed: Tensors) -> tuple[Tensor, ...]:
        return instance.function({**changed, "lm_head.weight": changed["model.embed_tokens.weight"]})

    check("llama", tied, instance.heads, function)
