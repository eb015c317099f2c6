"""LyCORIS as the oracle: what its modules do to a layer's outputs, and what it makes of a file's weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from remelt.adapters.change import Parts
from remelt.adapters.kinds import kind_of
from remelt.adapters.settings import Settings
from remelt.core.tensor_info import TensorInfo
from remelt.errors import AdapterError
from remelt.tensors import FROM_TORCH

modules = pytest.importorskip("lycoris.modules")
wrapper = pytest.importorskip("lycoris.wrapper")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

LAYERS = {
    "linear": lambda: nn.Linear(24, 16),
    "wide": lambda: nn.Linear(16, 48),
    "square": lambda: nn.Linear(16, 16),
    "conv1d": lambda: nn.Conv1d(12, 16, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(12, 16, 3, padding=1),
    "conv2d of one": lambda: nn.Conv2d(12, 16, 1),
    "conv3d": lambda: nn.Conv3d(6, 8, (1, 3, 3)),
}
INPUTS = {nn.Linear: (5,), nn.Conv1d: (5,), nn.Conv2d: (5, 6), nn.Conv3d: (3, 5, 4)}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def parts_of(tensors: Mapping[str, Tensor], **facts: Any) -> Parts:
    infos = {name: TensorInfo(FROM_TORCH[one.dtype], tuple(one.shape)) for name, one in tensors.items()}
    return Parts("mid.layer", infos, dict(tensors).__getitem__, **facts)


def change(tensors: Mapping[str, Tensor], base: Tensor, target: str = "weight", **facts: Any) -> Tensor:
    """What remelt makes of the parts of a module."""
    parts = parts_of(tensors, **facts)
    use = next(use for use in kind_of(parts.infos, parts.module) if use.target == target)
    use.kind.check(parts, tuple(base.shape))
    own = base.reshape(base.shape[0], -1)
    found = use.kind.open(parts, tuple(base.shape), base.dtype).rows(0, len(own), lambda a, b: own[a:b])
    return found.reshape(base.shape)


def near(found: Tensor, due: Tensor) -> None:
    assert due.abs().max() > 1e-3
    torch.testing.assert_close(found, due, rtol=0.0, atol=1e-5 * float(due.abs().max()))


def stored(module: nn.Module) -> dict[str, Tensor]:
    found = module.custom_state_dict() or module.state_dict()  # type: ignore[operator]
    return {name: value.detach().clone() for name, value in found.items()}


def trained(kind: str, layer: nn.Module, **options: Any) -> nn.Module:
    """A module of LyCORIS with weights as after training."""
    made: nn.Module = getattr(modules, kind)("layer", layer, **options)
    with torch.no_grad():
        for name, one in made.named_parameters():
            one.copy_(torch.rand_like(one) + 0.5 if name in ("dora_scale", "rescale") else torch.randn_like(one) * 0.3)
    return made.eval()


def output(layer: nn.Module, weight: Tensor, inputs: Tensor) -> Tensor:
    """Of a layer with that weight and no bias."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(inputs, weight)
    operation = {3: nn.functional.conv1d, 4: nn.functional.conv2d, 5: nn.functional.conv3d}[weight.dim()]
    return operation(inputs, weight, None, layer.stride, layer.padding)  # type: ignore[operator]


@torch.no_grad()
def agrees(module: nn.Module, layer: nn.Module, delta: Tensor) -> None:
    """A module's forward pass, less that of the layer it changes, is that of the change."""
    size = INPUTS[type(layer)]
    width = layer.weight.shape[1]
    inputs = torch.randn(7, width) if isinstance(layer, nn.Linear) else torch.randn(2, width, *size)
    near(output(layer, delta, inputs), module(inputs) - layer(inputs))


def loaded(layer: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The module that LyCORIS makes of a file's weights."""
    model = nn.Module()
    model.layer = layer
    weights = {f"lycoris_layer.{name}": value for name, value in tensors.items()}
    network, _ = wrapper.create_lycoris_from_weights(1.0, "", model, weights_sd=weights)
    (found,) = network.loras
    return found.eval()


CASES: list[tuple[str, str, dict[str, Any]]] = [
    *(("LoConModule", layer, {"lora_dim": 4, "alpha": 3.0}) for layer in LAYERS),
    ("LoConModule", "linear", {"lora_dim": 4, "alpha": 2.0, "rs_lora": True}),
    ("LoConModule", "conv1d", {"lora_dim": 4, "alpha": 3.0, "use_tucker": True}),
    ("LoConModule", "conv2d", {"lora_dim": 4, "alpha": 3.0, "use_tucker": True}),
    ("LoConModule", "conv3d", {"lora_dim": 4, "alpha": 3.0, "use_tucker": True}),
    *(("LohaModule", layer, {"lora_dim": 4, "alpha": 3.0}) for layer in LAYERS),
    ("LohaModule", "linear", {"lora_dim": 4, "alpha": 2.0, "rs_lora": True}),
    ("LohaModule", "conv2d", {"lora_dim": 4, "alpha": 3.0, "use_tucker": True}),
    ("LohaModule", "conv3d", {"lora_dim": 4, "alpha": 3.0, "use_tucker": True}),
    *(("LokrModule", layer, {"lora_dim": 1, "alpha": 3.0, "factor": 4}) for layer in LAYERS),
    ("LokrModule", "wide", {"lora_dim": 1, "alpha": 3.0, "factor": 4, "decompose_both": True}),
    ("LokrModule", "wide", {"lora_dim": 1, "alpha": 3.0, "factor": 4, "unbalanced_factorization": True}),
    ("LokrModule", "wide", {"lora_dim": 2, "alpha": 3.0, "factor": 2, "rs_lora": True}),
    ("LokrModule", "linear", {"full_matrix": True, "lora_dim": 4, "alpha": 3.0, "factor": 4}),
    ("LokrModule", "conv2d", {"full_matrix": True, "lora_dim": 4, "alpha": 3.0, "factor": 4}),
    ("LokrModule", "conv2d", {"lora_dim": 2, "alpha": 3.0, "factor": 2, "use_tucker": True}),
    ("LokrModule", "conv3d", {"lora_dim": 1, "alpha": 3.0, "factor": 2, "use_tucker": True}),
    *(("DiagOFTModule", layer, {"lora_dim": 4}) for layer in LAYERS),
    ("DiagOFTModule", "linear", {"lora_dim": 4, "constraint": 0.01}),
    ("DiagOFTModule", "linear", {"lora_dim": 4, "constraint": 10.0}),
    ("DiagOFTModule", "linear", {"lora_dim": 4, "rescaled": True}),
    ("DiagOFTModule", "conv2d", {"lora_dim": 8, "rescaled": True, "constraint": 0.02}),
    *(("ButterflyOFTModule", layer, {"lora_dim": 4}) for layer in LAYERS if layer != "wide"),
    ("ButterflyOFTModule", "wide", {"lora_dim": 6, "constraint": 0.01}),
    ("ButterflyOFTModule", "linear", {"lora_dim": 4, "rescaled": True}),
    ("ButterflyOFTModule", "conv2d", {"lora_dim": 8, "rescaled": True, "constraint": 0.02}),
    *(("GLoRAModule", layer, {"lora_dim": 4, "alpha": 3.0}) for layer in LAYERS),
]
CASES += [
    (kind, layer, {**options, "alpha": 3.0, "weight_decompose": True, "wd_on_out": outer})
    for kind, options in (
        ("LoConModule", {"lora_dim": 4}),
        ("LohaModule", {"lora_dim": 4}),
        ("LokrModule", {"lora_dim": 1, "factor": 4}),
    )
    for layer in ("linear", "square", "conv1d", "conv2d")
    for outer in (True, False)
]


def named(case: tuple[str, str, dict[str, Any]]) -> str:
    return f"{case[0]}-{case[1]}-" + "-".join(f"{name}={value}" for name, value in case[2].items())


@pytest.mark.parametrize("case", CASES, ids=named)
def test_what_was_trained_is_what_is_merged(case: tuple[str, str, dict[str, Any]]) -> None:
    kind, name, options = case
    layer = LAYERS[name]()
    module = trained(kind, layer, **options)
    agrees(module, layer, change(stored(module), layer.weight.detach()))


@pytest.mark.parametrize("on_input", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_ia3_multiplies_inputs_or_outputs(name: str, on_input: bool) -> None:
    layer = LAYERS[name]()
    module = trained("IA3Module", layer, train_on_input=on_input)
    tensors = stored(module)
    assert set(tensors) == {"weight", "on_input"}
    near(change(tensors, layer.weight.detach()), module.get_diff_weight()[0].detach())
    agrees(module, layer, change(tensors, layer.weight.detach()))


@pytest.mark.parametrize("name", LAYERS)
def test_full_differences(name: str) -> None:
    layer = LAYERS[name]()
    module = trained("FullModule", layer)
    tensors = {"diff": module.weight.detach(), "diff_b": module.bias.detach()}
    near(change(tensors, layer.weight.detach()), module.get_diff_weight()[0].detach())
    near(change(tensors, layer.bias.detach(), "bias"), module.get_diff_weight()[1].detach())


@pytest.mark.parametrize("layer", [nn.LayerNorm(12), nn.GroupNorm(3, 12)])
def test_norms(layer: nn.Module) -> None:
    module = trained("NormModule", layer)
    tensors = stored(module)
    weight, bias = module.get_merged_weight()
    near(change(tensors, layer.weight.detach()), (weight - layer.weight).detach())
    near(change(tensors, layer.bias.detach(), "bias"), (bias - layer.bias).detach())


FILES: list[tuple[str, dict[str, tuple[int, ...]]]] = [
    ("linear", {"lora_up.weight": (16, 4), "lora_down.weight": (4, 24)}),
    ("conv2d", {"lora_up.weight": (16, 4, 1, 1), "lora_down.weight": (4, 12, 3, 3)}),
    (
        "conv2d",
        {"lora_up.weight": (16, 4, 1, 1), "lora_mid.weight": (4, 4, 3, 3), "lora_down.weight": (4, 12, 1, 1)},
    ),
    ("linear", {"hada_w1_a": (16, 4), "hada_w1_b": (4, 24), "hada_w2_a": (16, 4), "hada_w2_b": (4, 24)}),
    (
        "conv2d",
        {
            "hada_w1_a": (4, 16),
            "hada_w1_b": (4, 12),
            "hada_w2_a": (4, 16),
            "hada_w2_b": (4, 12),
            "hada_t1": (4, 4, 3, 3),
            "hada_t2": (4, 4, 3, 3),
        },
    ),
    ("wide", {"lokr_w1": (4, 4), "lokr_w2_a": (12, 1), "lokr_w2_b": (1, 4)}),
    ("wide", {"lokr_w1_a": (4, 1), "lokr_w1_b": (1, 4), "lokr_w2_a": (12, 1), "lokr_w2_b": (1, 4)}),
    ("linear", {"lokr_w1": (4, 4), "lokr_w2": (4, 6)}),
    ("conv2d", {"lokr_w1": (4, 3), "lokr_w2": (4, 4, 3, 3)}),
    ("linear", {"oft_blocks": (4, 4, 4)}),
    ("conv2d", {"oft_blocks": (4, 4, 4), "rescale": (16, 1, 1, 1)}),
    ("linear", {"oft_blocks": (3, 4, 4, 4)}),
    ("conv2d", {"oft_blocks": (3, 4, 4, 4), "rescale": (16, 1, 1, 1)}),
    ("linear", {"a1.weight": (24, 4), "a2.weight": (4, 24), "b1.weight": (16, 4), "b2.weight": (4, 24)}),
    (
        "conv2d",
        {
            "a1.weight": (12, 4, 1, 1),
            "a2.weight": (4, 12, 1, 1),
            "b1.weight": (16, 4, 1, 1),
            "b2.weight": (4, 12, 3, 3),
        },
    ),
]


@pytest.mark.parametrize(("name", "shapes"), FILES, ids=[f"{name}-{'-'.join(shapes)}" for name, shapes in FILES])
@pytest.mark.parametrize("alpha", [0.02, 3.0])
def test_a_file_is_read_as_lycoris_reads_it(name: str, shapes: dict[str, tuple[int, ...]], alpha: float) -> None:
    layer = LAYERS[name]()
    tensors = {part: torch.randn(shape) for part, shape in shapes.items()} | {"alpha": torch.tensor(alpha)}
    agrees(loaded(layer, tensors), layer, change(tensors, layer.weight.detach()))


@pytest.mark.parametrize("kind", ["LoConModule", "LohaModule", "LokrModule", "GLoRAModule"])
def test_stabilised_ranks_count_once_whatever_the_header_says(kind: str) -> None:
    """LyCORIS 4 stores an alpha with the root in it, but for GLoRA the one that was set: headers tell the same."""
    layer = LAYERS["wide"]()
    module = trained(kind, layer, lora_dim=2, alpha=3.0, rs_lora=True, **{"factor": 2} if "Lokr" in kind else {})
    tensors = stored(module)
    header = {"ss_network_args": '{"rs_lora": "True"}', "ss_network_alpha": "3.0"}
    scale = Settings.of(None, header).scale("mid.layer", parts_of(tensors).infos, float(tensors["alpha"]))
    agrees(module, layer, change(tensors, layer.weight.detach(), scale=scale))


@pytest.mark.parametrize("part", ["lora", "hada", "lokr"])
def test_magnitudes_of_a_file_are_read_as_lycoris_reads_them(part: str) -> None:
    layer = LAYERS["linear"]()
    made = {
        "lora": {"lora_up.weight": (16, 4), "lora_down.weight": (4, 24)},
        "hada": {"hada_w1_a": (16, 4), "hada_w1_b": (4, 24), "hada_w2_a": (16, 4), "hada_w2_b": (4, 24)},
        "lokr": {"lokr_w1": (4, 4), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 6)},
    }[part]
    tensors = {name: torch.randn(shape) * 0.3 for name, shape in made.items()} | {"alpha": torch.tensor(2.0)}
    tensors["dora_scale"] = torch.rand(16, 1) + 0.5
    agrees(loaded(layer, tensors), layer, change(tensors, layer.weight.detach()))


def test_the_scale_counts_once_although_get_diff_weight_of_lycoris_takes_it_twice() -> None:
    """LyCORIS 4.1.3 multiplies LoHa and LoKr by the scale twice where it merges, but once where it trains and runs."""
    layer = LAYERS["linear"]()
    for kind, options in (("LohaModule", {"lora_dim": 4}), ("LokrModule", {"lora_dim": 1, "factor": 4})):
        module = trained(kind, layer, alpha=0.5, **options)
        delta = change(stored(module), layer.weight.detach())
        agrees(module, layer, delta)
        near(module.get_diff_weight()[0].detach(), delta * module.scale)


def test_what_lycoris_adds_to_a_norm_counts_where_it_is_small() -> None:
    """It is the eps of float32: a row of zeros stays zero, and a very short one is not made as long as another."""
    layer = LAYERS["linear"]()
    with torch.no_grad():
        layer.weight[3] = 0.0
        layer.weight[4] *= 1e-7
    module = trained("LoConModule", layer, lora_dim=4, alpha=1.0, weight_decompose=True)
    with torch.no_grad():
        module.lora_up.weight[3:5] = 0.0
    delta = change(stored(module), layer.weight.detach())
    assert torch.equal(delta[3], torch.zeros(24))
    near(delta[4], (module.get_merged_weight()[0] - layer.weight)[4].detach())
    agrees(module, layer, delta)


def test_t_lora_is_refused_since_its_file_lacks_what_it_started_from() -> None:
    module = trained("TLoraModule", LAYERS["linear"](), lora_dim=4)
    parts = parts_of(stored(module))
    told = "mid.layer: no kind of adapter that is known has the parts alpha, lambda_layer, p_layer.weight and q_layer"
    with pytest.raises(AdapterError, match=re.escape(told)):
        kind_of(parts.infos, parts.module)
