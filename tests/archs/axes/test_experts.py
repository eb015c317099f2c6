"""The axis groups of mixtures of experts, as files have them and as modules do."""

from __future__ import annotations

import pytest

from remelt.archs.axes.find import axis_groups
from remelt.archs.axes.recognise import recognise_network
from remelt.archs.axis_groups import Shapes, faults
from remelt.archs.shapes import llama_shapes

WIDTH, HIDDEN, COUNT = 64, 24, 6


def mixture(stacked: bool, *, mixtral: bool = False, shared: bool = False) -> Shapes:
    """A decoder whose second layer is a mixture of experts, the first is plain."""
    found = {key: info.shape for key, info in llama_shapes(2, WIDTH).items() if "layers.1.mlp" not in key}
    layer = "model.layers.1.block_sparse_moe" if mixtral else "model.layers.1.mlp"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    found[f"{layer}.gate.weight"] = (COUNT, WIDTH)
    if stacked:
        found[f"{layer}.experts.gate_up_proj"] = (COUNT, 2 * HIDDEN, WIDTH)
        found[f"{layer}.experts.down_proj"] = (COUNT, WIDTH, HIDDEN)
    for number in () if stacked else range(COUNT):
        found |= {f"{layer}.experts.{number}.{name}.weight": (HIDDEN, WIDTH) for name in (gate, up)}
        found[f"{layer}.experts.{number}.{down}.weight"] = (WIDTH, HIDDEN)
    if shared:
        found |= {f"{layer}.shared_expert.{name}.weight": (40, WIDTH) for name in (gate, up)}
        found[f"{layer}.shared_expert.{down}.weight"] = (WIDTH, 40)
        found[f"{layer}.shared_expert_gate.weight"] = (1, WIDTH)
    return found


MIXTURES = {
    "mixtral": mixture(False, mixtral=True),
    "mixtral, stacked": mixture(True),
    "qwen2_moe": mixture(False, shared=True),
    "qwen2_moe, stacked": mixture(True, shared=True),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_every_axis_of_a_mixture_is_in_one_group(name: str) -> None:
    shapes, arch = MIXTURES[name], name.split(",")[0]
    groups = axis_groups(arch, shapes)
    assert list(faults(groups, shapes)) == []
    assert recognise_network(shapes) == arch
    experts = next(group for group in groups if group.structure == "experts")
    assert [(level.name, level.size, level.below) for level in experts.levels] == [
        ("expert", COUNT, ()),
        ("hidden", HIDDEN, ("expert",)),
    ]
    assert [window.levels for window in experts.windows if "gate.weight" in window.key] == [("expert",)]
    assert next(group for group in groups if group.name == "layers.0.mlp").structure == "free"


def test_norms_of_queries_make_a_mixture_one_of_qwen_3() -> None:
    norms = {f"model.layers.0.self_attn.{part}_norm.weight": (16,) for part in "qk"}
    assert recognise_network({**mixture(False), **norms}) == "qwen3_moe"


def test_a_mixture_with_another_attention_is_not_recognised() -> None:
    assert recognise_network({key: shape for key, shape in mixture(False).items() if "q_proj" not in key}) is None
