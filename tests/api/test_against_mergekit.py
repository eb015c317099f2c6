"""Configurations of mergekit's own kinds are merged by both, on a tiny Llama in bfloat16, to the same tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import remelt as rm

yaml = pytest.importorskip("yaml")
LAYERS = 4
CONFIGURATIONS = {
    "linear": """
        models:
          - model: {a}
            parameters: {{weight: 1.0}}
          - model: {b}
            parameters: {{weight: 0.3}}
          - model: {c}
            parameters: {{weight: 0.5}}
        merge_method: linear
        dtype: bfloat16
    """,
    "slerp by filters and gradients": """
        slices:
          - sources:
              - model: {a}
                layer_range: [0, 4]
              - model: {b}
                layer_range: [0, 4]
        merge_method: slerp
        base_model: {a}
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.5, 0.3, 0.7, 1]
            - filter: mlp
              value: [1, 0.5, 0.7, 0.3, 0]
            - value: 0.5
        dtype: bfloat16
    """,
    "slerp of two slices": """
        slices:
          - sources:
              - {{model: {a}, layer_range: [0, 2]}}
              - {{model: {b}, layer_range: [1, 3]}}
            parameters: {{t: [0.1, 0.9]}}
          - sources:
              - {{model: {a}, layer_range: [1, 4]}}
              - {{model: {b}, layer_range: [1, 4]}}
            parameters: {{t: [0.2, 0.8]}}
        merge_method: slerp
        base_model: {a}
        dtype: bfloat16
    """,
    "task arithmetic": """
        models:
          - model: {a}
          - model: {b}
            parameters: {{weight: 0.3}}
          - model: {c}
            parameters: {{weight: 0.6}}
        merge_method: task_arithmetic
        base_model: {a}
        parameters: {{lambda: 0.9}}
        dtype: bfloat16
    """,
    "task arithmetic along the depth": """
        models:
          - model: {b}
            parameters:
              weight:
                - filter: mlp
                  value: [0, 0.5, 1.0]
                - value: 0.25
        merge_method: task_arithmetic
        base_model: {a}
        dtype: bfloat16
    """,
    "ties": """
        models:
          - model: {b}
            parameters: {{density: 0.5, weight: 1.0}}
          - model: {c}
            parameters: {{density: 0.5, weight: 1.0}}
        merge_method: ties
        base_model: {a}
        parameters: {{normalize: true}}
        dtype: bfloat16
    """,
    "passthrough": """
        slices:
          - sources:
              - {{model: {a}, layer_range: [0, 3]}}
          - sources:
              - {{model: {b}, layer_range: [1, 4]}}
        merge_method: passthrough
        dtype: bfloat16
    """,
}
MAY_DIFFER = {
    "ties": "of magnitudes that are equal in bfloat16 mergekit keeps some, by their order in a sort; remelt keeps all",
}
"""Where single elements differ on purpose, and why."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("llamas")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    found = {}
    base = None
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        made = transformers.LlamaForCausalLM(config)
        drawn = {key: value + 0.1 * torch.randn_like(value) for key, value in made.state_dict().items()}
        base = drawn if base is None else base
        if drawn is not base:  # fine-tunes of the first
            drawn = {key: base[key] + 0.3 * value for key, value in drawn.items()}
        made.load_state_dict(drawn)
        made.to(torch.bfloat16).save_pretrained(folder / name)
        found[name] = folder / name
    return found


def by_mergekit(text: str, out: Path) -> dict[str, Tensor]:
    pytest.importorskip("mergekit")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), options=MergeOptions(quiet=True))
    return {key: value for file in sorted(out.glob("*.safetensors")) for key, value in load_file(file).items()}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_both_merge_the_same_tensors(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    text = CONFIGURATIONS[name].format(**models)
    theirs = by_mergekit(text, tmp_path / "theirs")
    (tmp_path / "config.yml").write_text(text, encoding="utf-8")
    rm.merge(tmp_path / "config.yml", tmp_path / "ours", max_shard_size="1GB")
    ours = {key: value for file in (tmp_path / "ours").glob("*.safetensors") for key, value in load_file(file).items()}
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        assert value.dtype is theirs[key].dtype is torch.bfloat16
        close = torch.isclose(value.double(), theirs[key].double(), rtol=2**-6, atol=2**-9)
        odd = int((~close).sum())
        assert odd <= (max(8, value.numel() // 50) if name in MAY_DIFFER else 0), f"{key}: {odd} of {value.numel()}"


def test_the_configuration_of_a_stack_opens_in_transformers(models: dict[str, Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.yml").write_text(CONFIGURATIONS["passthrough"].format(**models), encoding="utf-8")
    rm.merge(tmp_path / "config.yml", tmp_path / "stack", max_shard_size="1GB")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stack")
    assert opened.config.num_hidden_layers == 6
    assert len(opened.model.layers) == 6
    with torch.no_grad():
        assert opened(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
