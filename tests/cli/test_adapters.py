"""The commands for adapters, used as a person would, with the mistakes that a person makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from remelt.archs.shapes import sd1_shapes
from remelt.cli.main import run

Remelt = Callable[..., tuple[int, str]]


@pytest.fixture
def remelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Remelt:
    """Run a command line in a folder with a model of SD1, ``base``, and one that was ``tuned`` of it by rank 3."""
    drawn = torch.Generator().manual_seed(0)
    base = {key: torch.randn(info.shape, generator=drawn) for key, info in sd1_shapes(32).items()}
    tuned = dict(base)
    for key, tensor in base.items():
        if key.endswith("attn1.to_q.weight"):
            up, down = torch.randn(len(tensor), 3, generator=drawn), torch.randn(3, tensor.shape[1], generator=drawn)
            tuned[key] = tensor + 0.1 * up @ down
    key = "model.diffusion_model.out.0.bias"
    tuned[key] = tuned[key] + 0.01
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str]:
        code = run([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


def test_a_lora_is_extracted_applied_verified_merged_and_resized(remelt: Remelt) -> None:
    code, said = remelt("extract-lora", "tuned", "base", "-o", "style", "--rank", 3)
    assert code == 0
    assert "wrote style.safetensors" in said
    assert "16 modules: 16 of rank 3" in said
    assert "100.00% of the difference's energy is kept" in said
    assert "1 tensor differs, but is no linear map or convolution, and is left out" in said
    assert "model.diffusion_model.out.0.bias" in said or "conv_norm_out.bias" in said

    assert remelt("merge", "base", "--adapter", "style", 1, "-o", "again.safetensors")[0] == 0
    again, tuned = load_file("again.safetensors"), load_file("tuned.safetensors")
    for key in tuned:
        if key.endswith("attn1.to_q.weight"):
            torch.testing.assert_close(again[key], tuned[key], rtol=0, atol=1e-5)
    assert remelt("verify", "again", "--adapter", "style", "--base", "base", "--strength", 1)[0] == 0
    code, said = remelt("verify", "again", "--adapter", "style", "--base", "base", "--strength", 0.5)
    assert code == 4
    assert "style is there by 1, stated 0.5" in said

    code, said = remelt("merge-lora", "style", "style", "-s", 0.75, "-s", 0.25, "-o", "both", "--json")
    assert code == 0
    assert {one["rank"] for one in json.loads(said)["modules"].values()} == {3}  # one adapter, named twice
    code, said = remelt("resize-lora", "both", "-o", "small", "--rank", 1)
    assert code == 0
    assert "16 modules: 16 of rank 1" in said
    code, said = remelt("inspect", "small")
    assert "adapter     16 modules: 16 LoRA of rank 1" in said


def test_an_adapter_is_planned_before_it_is_merged(remelt: Remelt) -> None:
    assert remelt("extract-lora", "tuned", "base", "-o", "style", "--energy", 0.9, "-q")[0] == 0
    code, said = remelt("plan", "base", "--adapter", "style", 0.5, "-o", "out.safetensors")
    assert code == 0
    assert "style" in said
    assert not Path("out.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("extract-lora tuned base -o x", 2, "a LoRA has a rank, or keeps a share of the energy"),
        ("extract-lora tuned base -o x --rank 0", 2, "0 is not in the range x>=1"),
        ("extract-lora tuned base -o x --energy 1.5", 2, "1.5 is not in the range 0.0<x<=1.0"),
        ("extract-lora tuned base -o x --rank 4 --names kohia", 3, "did you mean 'kohya'"),
        ("extract-lora base base -o x --rank 4", 3, "both models have the same weights"),
        ("extract-lora tuned bas -o x --rank 4", 3, "did you mean 'base"),
        ("extract-lora tuned base -o x --kind lokr --names peft", 2, "peft has no names for a LoKr"),
        ("merge base --adapter tuned 0.5 -o x", 3, "tuned.safetensors is no adapter"),
        ("merge base --adapter style much -o x", 2, "the strength of an adapter is a number, but got 'much'"),
        ("merge base --adapter style nan -o x", 2, "the strength of an adapter is a number, but got 'nan'"),
        ("merge-lora style style -s 1 -s inf -o x", 2, "a strength is a finite number, but got inf"),
        ("verify tuned --adapter style --base base --strength nan", 2, "a strength is a finite number, but got nan"),
        ("extract-lora tuned base -o x --kind lokr --rank 4", 3, "a LoKr has no rank"),
        ("extract-lora tuned base -o x --rank 4 --factor 8", 3, "a LoRA has no factor, but a rank"),
        ("extract-lora tuned base -o x.ckpt --rank 4 --names peft", 2, "results are written as safetensors"),
        ("merge-lora style base -o x", 3, "base.safetensors is a model, but adapters alone are joined"),
        ("merge-lora style style -s 1 -o x", 2, "there are 2 LoRAs, but 1 strengths"),
        ("resize-lora style -o x", 2, "a LoRA is resized to a rank, or to a share of its energy"),
        ("resize-lora base -o x --rank 2", 3, "base.safetensors is a model"),
        ("verify tuned --adapter style", 2, "an adapter is looked for in what was added to a model"),
    ],
)
def test_mistakes_are_told(remelt: Remelt, words: str, code: int, message: str) -> None:
    assert remelt("extract-lora", "tuned", "base", "-o", "style", "--rank", 2, "-q")[0] == 0
    found, said = remelt(*words.split())
    assert message in said, said
    assert found == code
    assert not Path("x.safetensors").exists()
    assert not Path("x").exists()
