"""Peers as oracles: sd-mecha on Stable Diffusion's shapes, and the loaders of safetensors and transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import remelt as rm
from remelt.archs.shapes import sd1_shapes, sdxl_shapes
from remelt.core.tensor_info import TensorInfo

Tensors = dict[str, torch.Tensor]

INTENDED_DIFFERENCES = {
    "n_average": "sd-mecha keeps a running mean; remelt adds up and divides once: one unit in the last place",
    "slerp": "sd-mecha takes dots and norms in float32, remelt in float64: round-off",
}
TOLERANCE = 1e-6
"""In units of the largest element: float32 round-off of a few operations."""


def drawn(shapes: Mapping[str, TensorInfo], seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {key: 0.1 * torch.randn(info.shape, generator=generator) for key, info in shapes.items()}


def by_sd_mecha(recipe: Any) -> Tensors:
    sd_mecha = pytest.importorskip("sd_mecha")
    float32 = torch.float32
    found: Tensors = sd_mecha.merge(
        recipe, merge_device="cpu", merge_dtype=float32, output_device="cpu", output_dtype=float32, threads=1
    )
    return {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}


def recipes(method: str, a: Tensors, b: Tensors, c: Tensors) -> tuple[Any, Any]:
    """The same recipe for sd-mecha and for remelt."""
    sd_mecha = pytest.importorskip("sd_mecha")
    x, y, z = (sd_mecha.model(tensors) for tensors in (a, b, c))
    p, q, r = (rm.model(tensors) for tensors in (a, b, c))
    if method == "weighted_sum":
        return sd_mecha.weighted_sum(x, y, alpha=0.3), rm.weighted_sum(p, q, alpha=0.3)
    if method == "n_average":
        return sd_mecha.n_average(x, y, z), rm.n_average(p, q, r)
    if method == "slerp":
        return sd_mecha.slerp(x, y, alpha=0.3), rm.slerp(p, q, alpha=0.3)
    add = sd_mecha.extensions.merge_methods.resolve(
        "add_difference"
    )  # the package's own wrapper of it crashes on nodes
    return add(x, sd_mecha.subtract(y, z), alpha=0.7), rm.add_difference(p, q - r, alpha=0.7)


@pytest.mark.parametrize("method", ["weighted_sum", "n_average", "add_difference", "slerp"])
@pytest.mark.parametrize(
    ("arch", "shapes"),
    [
        pytest.param("sd1", lambda: sd1_shapes(32), id="sd1", marks=pytest.mark.slow),
        pytest.param("sdxl", lambda: sdxl_shapes(32), id="sdxl", marks=pytest.mark.slow),
    ],
)
def test_methods_agree_with_sd_mecha_on_the_shapes_of_stable_diffusion(
    method: str, arch: str, shapes: Callable[[], dict[str, TensorInfo]], tmp_path: Path
) -> None:
    a, b, c = (drawn(shapes(), seed) for seed in (1, 2, 3))
    theirs_recipe, ours_recipe = recipes(method, a, b, c)
    theirs = by_sd_mecha(theirs_recipe)
    ours = load_file(rm.merge(ours_recipe, output=tmp_path / "ours.safetensors"))
    assert rm.inspect(tmp_path / "ours.safetensors").arch == arch
    assert set(ours) == set(a)
    assert set(theirs) == set(ours)
    for key, value in theirs.items():
        assert (ours[key] - value).abs().max() <= TOLERANCE * max(1.0, float(value.abs().max())), key


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small Llama models in shards, as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=160,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("llamas")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(folder / name, max_shard_size="40KB")
    return folder


def test_a_merged_folder_of_shards_loads_in_transformers(llamas: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    assert len(list((llamas / "a").glob("*.safetensors"))) > 1
    merged = rm.merge(
        rm.slerp(llamas / "a", llamas / "b", alpha=0.4), output=tmp_path / "merged", max_shard_size="30KB"
    )
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    load = transformers.LlamaForCausalLM.from_pretrained
    a, b, mix = (load(path, dtype=torch.bfloat16).state_dict() for path in (llamas / "a", llamas / "b", merged))
    assert set(mix) == set(a)
    for key, value in mix.items():
        expected = rm.slerp.on(a[key].float(), b[key].float(), alpha=0.4).to(torch.bfloat16)
        assert torch.equal(value, expected), key
    output = load(merged, dtype=torch.bfloat16)(torch.tensor([[1, 2, 3]])).logits
    assert torch.isfinite(output).all()


def test_blocks_of_a_language_model_need_no_configuration(llamas: Path) -> None:
    weights = rm.blocks({"layers.2": 1.0}) | rm.classes({"self_attn.q_proj": 0.5}) | 0.0
    mix = rm.merge(rm.weighted_sum(llamas / "a", llamas / "b", alpha=weights))
    a, b = (rm.merge(rm.model(llamas / name)) for name in "ab")
    key = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(mix[key.format(2)], b[key.format(2)])
    assert torch.equal(mix[key.format(1)], a[key.format(1)])
    query = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(mix[query], torch.lerp(a[query].float(), b[query].float(), 0.5).to(torch.bfloat16))


def test_a_diffusers_pipeline_folder_is_one_model_of_several_components(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        unet = diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )
        pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(num_train_timesteps=10))
        pipeline.save_pretrained(tmp_path / name)
    merged = rm.merge(rm.weighted_sum(tmp_path / "a", tmp_path / "b", alpha=0.25), output=f"{tmp_path / 'merged'}/")
    loaded = diffusers.DDPMPipeline.from_pretrained(merged).unet.state_dict()
    a, b = (diffusers.DDPMPipeline.from_pretrained(tmp_path / name).unet.state_dict() for name in "ab")
    assert all(torch.equal(loaded[key], torch.lerp(a[key], b[key], 0.25)) for key in a)
    assert (merged / "model_index.json").exists()


def test_models_of_two_archs_are_refused_with_the_evidence(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    write_model(tmp_path / "one", drawn(sd1_shapes(64), 1))
    write_model(tmp_path / "xl", drawn(sdxl_shapes(64), 2))
    with pytest.raises(rm.CheckError) as caught:
        rm.merge(rm.weighted_sum(tmp_path / "one", tmp_path / "xl"))
    told = str(caught.value)
    assert "one.safetensors  is sd1: " in told
    assert "xl.safetensors  is sdxl: " in told
    assert "a recipe merges models of one arch; the inputs mix them" in told
