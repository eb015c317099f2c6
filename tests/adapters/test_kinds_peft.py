"""PEFT as the oracle: what merging makes of a layer's weight and bias."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from remelt.adapters.change import Parts
from remelt.adapters.kinds import kind_of
from remelt.core.tensor_info import TensorInfo
from remelt.tensors import FROM_TORCH

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(24, 16),
    "square": lambda: nn.Linear(16, 16),
    "conv1d": lambda: nn.Conv1d(12, 16, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(12, 16, 3, padding=1),
    "square conv2d": lambda: nn.Conv2d(16, 16, 3, padding=1),
    "conv2d of one": lambda: nn.Conv2d(12, 16, 1),
    "conv3d": lambda: nn.Conv3d(6, 8, (1, 3, 3)),
    "embedding": lambda: nn.Embedding(20, 16),
    "turned": lambda: pytest.importorskip("transformers.pytorch_utils").Conv1D(16, 24),
}
RENAMED = {
    r"lora_A\.weight": "lora_down.weight",
    r"lora_B\.weight": "lora_up.weight",
    r"lora_B\.bias": "lora_up.bias",
    r"lora_embedding_A": "lora_down.weight",
    r"lora_embedding_B": "lora_up.weight",
    r"lora_magnitude_vector(\.weight)?": "dora_scale",
    r"oft_(embedding_)?R\.weight": "oft_R",
}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Model(nn.Module):
    """One layer, with what PEFT asks a model for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.layer(inputs)
        return found


def merged(layer: nn.Module, config: Any) -> tuple[dict[str, Tensor], nn.Module, Any]:
    """The parts of an adapter with weights as after training, the layer that PEFT merges it into, and PEFT's layer."""
    model = peft.get_peft_model(Model(layer), config)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "base_layer" not in name:
                random = torch.rand_like(one) + 0.5 if re.search("magnitude|ia3_l|boft_s", name) else None
                one.copy_(torch.randn_like(one) * 0.2 if random is None else random)
    tensors = {}
    for key, value in peft.get_peft_model_state_dict(model).items():
        name = key.removeprefix("base_model.model.layer.")
        name = next((part for pattern, part in RENAMED.items() if re.fullmatch(pattern, name)), name)
        tensors[name] = value.detach().clone()
    adapted = model.base_model.model.layer
    return tensors, model.merge_and_unload().layer, adapted


def change(tensors: Mapping[str, Tensor], base: Tensor, target: str = "weight", **facts: Any) -> Tensor:
    """What remelt makes of the parts of a module."""
    infos = {name: TensorInfo(FROM_TORCH[one.dtype], tuple(one.shape)) for name, one in tensors.items()}
    parts = Parts("mid.layer", infos, dict(tensors).__getitem__, **facts)
    use = next(use for use in kind_of(parts.infos, parts.module) if use.target == target)
    use.kind.check(parts, tuple(base.shape))
    own = base.reshape(base.shape[0], -1)
    found = use.kind.open(parts, tuple(base.shape), base.dtype).rows(0, len(own), lambda a, b: own[a:b])
    return found.reshape(base.shape)


def agrees(layer: str, config: Any, **facts: Any) -> dict[str, Tensor]:
    """Weight and bias change as PEFT changes them."""
    before = LAYERS[layer]()
    base = {name: one.detach().clone() for name, one in before.named_parameters()}
    tensors, after, _ = merged(before, config)
    for name, one in base.items():
        due = after.get_parameter(name).detach() - one
        uses = kind_of({part: TensorInfo(FROM_TORCH[t.dtype], tuple(t.shape)) for part, t in tensors.items()}, "layer")
        if name not in [use.target for use in uses]:
            assert name == "bias" and not due.any()
            continue
        found = change(tensors, one, name, **facts)
        assert name == "bias" or due.abs().max() > 1e-3
        # the difference of rounded weights is rounded to the weights' size
        torch.testing.assert_close(
            found, due, rtol=0.0, atol=1e-5 * float(due.abs().max()) + 2e-7 * float(one.abs().max())
        )
    return tensors


def lora(**options: Any) -> Any:
    return peft.LoraConfig(target_modules=["layer"], **({"r": 4, "lora_alpha": 6} | options))


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer not in ("embedding", "turned")])
def test_lora(layer: str) -> None:
    agrees(layer, lora(), scale=1.5)


def test_lora_of_an_embedding() -> None:
    tensors = agrees("embedding", lora(), scale=1.5, options={"transposed": True})
    assert {name: tuple(one.shape) for name, one in tensors.items()} == {
        "lora_down.weight": (4, 20),
        "lora_up.weight": (16, 4),
    }


def test_lora_of_a_layer_that_keeps_inputs_by_outputs() -> None:
    agrees("turned", lora(fan_in_fan_out=True), scale=1.5, options={"fan_in_fan_out": True})


def test_convolutions_are_kept_outputs_by_inputs_whatever_the_adapter_says_of_other_layers() -> None:
    agrees("square conv2d", lora(fan_in_fan_out=True), scale=1.5, options={"fan_in_fan_out": True})
    config = peft.OFTConfig(target_modules=["layer"], oft_block_size=4, fan_in_fan_out=True)
    agrees("square conv2d", config, options={"fan_in_fan_out": True})


def test_lora_stabilised_by_the_root_of_the_rank() -> None:
    agrees("linear", lora(use_rslora=True), scale=3.0)


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_lora_with_a_bias(layer: str) -> None:
    assert "lora_up.bias" in agrees(layer, lora(lora_bias=True), scale=1.5)


@pytest.mark.parametrize("layer", ["linear", "square", "conv1d", "conv2d", "conv3d"])
def test_dora(layer: str) -> None:
    agrees(layer, lora(use_dora=True), scale=1.5)


def test_dora_of_a_convolution_with_as_many_inputs_as_outputs_needs_to_be_told() -> None:
    tensors = agrees("square conv2d", lora(use_dora=True), scale=1.5, options={"magnitude_on_output": True})
    assert tensors["dora_scale"].shape == (1, 16, 1, 1)


def test_dora_of_an_embedding() -> None:
    agrees("embedding", lora(use_dora=True), scale=1.5, options={"transposed": True})


def test_dora_of_a_layer_that_keeps_inputs_by_outputs() -> None:
    agrees("turned", lora(use_dora=True, fan_in_fan_out=True), scale=1.5, options={"fan_in_fan_out": True})


@pytest.mark.parametrize("effective", [True, False])
@pytest.mark.parametrize("layer", ["linear", "conv1d", "conv2d", "conv2d of one"])
def test_loha(layer: str, effective: bool) -> None:
    config = peft.LoHaConfig(r=4, alpha=6, target_modules=["layer"], use_effective_conv2d=effective)
    agrees(layer, config, scale=1.5)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 2, "alpha": 3},
        {"r": 1, "alpha": 1.5, "decompose_both": True},
        {"r": 8, "alpha": 12},
        {"r": 2, "alpha": 3, "decompose_factor": 2},
        {"r": 2, "alpha": 3, "use_effective_conv2d": True, "decompose_factor": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("layer", ["linear", "conv2d", "conv2d of one"])
def test_lokr(layer: str, options: dict[str, Any]) -> None:
    """PEFT's scale counts where both matrices are whole, too."""
    agrees(layer, peft.LoKrConfig(target_modules=["layer"], **options), scale=1.5)


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("layer", ["linear", "square", "conv2d", "square conv2d", "conv3d"])
def test_ia3(layer: str, forward: bool) -> None:
    config = peft.IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if forward else [])
    agrees(layer, config, options={"feedforward_modules": ["layer"] if forward else []})
    if "square" not in layer:
        agrees(layer, config)


@pytest.mark.parametrize("forward", [True, False])
def test_ia3_of_a_layer_that_keeps_inputs_by_outputs(forward: bool) -> None:
    named = ["layer"] if forward else []
    config = peft.IA3Config(target_modules=["layer"], feedforward_modules=named, fan_in_fan_out=True)
    agrees("turned", config, options={"fan_in_fan_out": True})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cayley_neumann": False},
        *({"num_cayley_neumann_terms": terms} for terms in (2, 3, 4, 6, 7)),
        {"coft": True, "eps": 0.5},
        {"coft": True, "eps": 100.0},
        {"block_share": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("layer", ["linear", "conv2d", "embedding"])
def test_oft(layer: str, options: dict[str, Any]) -> None:
    config = peft.OFTConfig(target_modules=["layer"], oft_block_size=4, **options)
    agrees(layer, config, options=options | ({"transposed": True} if layer == "embedding" else {}))


@pytest.fixture
def blocks_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of PEFT's extension for CUDA, without which it has one stage only."""
    layer = pytest.importorskip("peft.tuners.boft.layer")

    class Extension:
        @staticmethod
        def forward(stages: Tensor) -> tuple[Tensor]:
            return (torch.stack([torch.block_diag(*blocks) for blocks in stages]),)

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: Extension)


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_boft_of_one_stage(layer: str) -> None:
    agrees(layer, peft.BOFTConfig(target_modules=["layer"], boft_block_size=4))


@pytest.mark.parametrize(
    ("layer", "side", "stages"),
    [("linear", 2, 2), ("linear", 2, 3), ("linear", 4, 2), ("linear", 6, 3), ("conv2d", 2, 2), ("conv2d", 18, 2)],
)
def test_boft_of_several_stages(layer: str, side: int, stages: int, blocks_without_cuda: None) -> None:
    config = peft.BOFTConfig(target_modules=["layer"], boft_block_size=side, boft_n_butterfly_factor=stages)
    assert agrees(layer, config)["boft_R"].shape[0] == stages


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_lora_in_half_precision_is_the_product_of_its_factors(stored: torch.dtype) -> None:
    before = LAYERS["linear"]()
    base = before.weight.detach().clone()
    tensors, _, _ = merged(before, lora())
    halves = {name: one.to(stored) for name, one in tensors.items()}
    due = 1.5 * halves["lora_up.weight"].double() @ halves["lora_down.weight"].double()
    found = change(halves, base, scale=1.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), due, rtol=0.0, atol=1e-6 * float(due.abs().max()))
