"""`remelt rebasin` and `remelt permute`, used as a person would, with the mistakes that a person makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import clip_l, shuffled, whole, write

from remelt.alignment.files import save_permutations
from remelt.cli.main import run

Remelt = Callable[..., tuple[int, str]]
STILL = ("--start", "identity")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text encoder, ``a``, and the same shuffled, ``b``."""
    made = tmp_path_factory.mktemp("models")
    tensors = clip_l()
    write(made, "a", tensors)
    write(made, "b", whole(tensors, shuffled("clip_l", tensors, crossing=False)))
    return made


@pytest.fixture
def remelt(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Remelt:
    monkeypatch.chdir(folder)

    def call(*words: object) -> tuple[int, str]:
        code = run([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


def same(one: str, other: str) -> bool:
    ours, theirs = load_file(f"{one}.safetensors"), load_file(f"{other}.safetensors")
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_two_models_are_aligned_merged_and_the_permutations_used_again(remelt: Remelt) -> None:
    code, said = remelt("rebasin", "--model_a", "a", "--model-b", "b", *STILL, "--save-permutations", "P.safetensors")
    assert code == 0, said
    assert "b.safetensors against a.safetensors: 24 groups" in said
    assert "24 of 24 groups moved, in" in said
    assert "objective " in said
    assert "wrote P.safetensors" in said
    assert remelt("rebasin", "--model-a", "a", "--model_b", "b", *STILL, "--workers", 2, "-o", "mix")[0] == 0
    assert same("mix", "a")  # they are the same model
    again = ("--permutations", "P.safetensors", "--alpha", 1, "-o", "again", "--json")
    code, said = remelt("rebasin", "--model-a", "a", "--model-b", "b", *again)
    assert (code, json.loads(said)) == (0, {"output": "again.safetensors", "alignments": []})
    assert same("again", "a")
    assert remelt("permute", "b", "P", "-o", "moved") == (0, "wrote moved.safetensors\n")
    assert same("moved", "a")
    assert remelt("permute", "a", "P", "--inverse", "-o", "back", "-q") == (0, "")
    assert same("back", "b")
    assert remelt("merge", "mix.safetensors", "-o", "third", "-q") == (0, "")
    assert same("third", "a")


def test_many_models_are_aligned_to_the_first_and_averaged(remelt: Remelt) -> None:
    words = ("rebasin", "many", "a", "b", "b", *STILL, "--save-permutations", "found", "-o", "mean", "--json")
    code, said = remelt(*words)
    assert code == 0, said
    told = json.loads(said)
    assert told["output"] == "mean.safetensors"
    assert [len(one["moved"]) for one in told["alignments"]] == [24]
    torch.testing.assert_close(load_file("mean.safetensors"), load_file("a.safetensors"), rtol=0, atol=1e-3)


def test_an_adapter_follows_and_stays_an_adapter(remelt: Remelt, folder: Path) -> None:
    tensors = load_file("a.safetensors")
    save_permutations(shuffled("clip_l", tensors), folder / "Q.safetensors", overwrite=True)
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    parts = {f"{name}.lora_up.weight": torch.randn(256, 4), f"{name}.lora_down.weight": torch.randn(4, 64)}
    save_file(parts, "style.safetensors")
    assert remelt("permute", "style", "Q", "-o", "followed")[0] == 0
    found = load_file("followed.safetensors")
    assert {key: one.shape for key, one in found.items()} == {key: one.shape for key, one in parts.items()}
    assert sorted(found[f"{name}.lora_up.weight"][:, 0].tolist()) == sorted(
        parts[f"{name}.lora_up.weight"][:, 0].tolist()
    )
    assert not torch.equal(found[f"{name}.lora_up.weight"], parts[f"{name}.lora_up.weight"])


def test_a_plan_tells_that_models_are_aligned_first(remelt: Remelt, folder: Path) -> None:
    (folder / "mix.mecha").write_text('version 1\nweighted_sum("a", rebasin("b", to="a"), alpha=0.3)\n')
    code, said = remelt("plan", "mix.mecha", "-o", "never.safetensors")
    assert code == 0, said
    assert "note: b.safetensors is aligned to a.safetensors first: 24 groups" in said


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("rebasin",), 2, "two models are aligned\nhint: remelt rebasin --model-a A --model-b B -o OUT"),
        (("rebasin", "--model-a", "a", "--model-b", "b", "--permutations", "P"), 2, "there is nothing to do"),
        (
            ("rebasin", "--model-a", "a", "--model-b", "b", "--permutations", "P", "--margins", "M", "-o", "x"),
            2,
            "with --permutations nothing is matched",
        ),
        (
            ("rebasin", "--model-a", "a", "--model-b", "b", "--permutations", "P", "--rotations", "-o", "x"),
            2,
            "with --permutations nothing is matched, that could be kept, proven or rotated",
        ),
        (
            ("rebasin", "--model-a", "a", "--model-b", "b", "--alpha", "0.3"),
            2,
            "without an output nothing is merged, and --alpha has no effect\nhint: -o OUT",
        ),
        (
            ("rebasin", "--start", "signature", "many", "a", "b"),
            2,
            "options of many stand behind it, but --start before\nhint: remelt rebasin many ... --start",
        ),
        (("rebasin", "many", "a"), 2, "at least two models are averaged"),
        (("rebasin", "--model-a", "a", "--model-b", "b", "--save-permutations", "a.safetensors"), 3, "exists"),
        (("rebasin", "--model-a", "a", "--model-b", "b", "-o", "a.safetensors"), 3, "a.safetensors exists"),
        (("rebasin", "check", "sdx"), 2, "there is no small model of arch 'sdx'\nhint: did you mean 'sdxl'"),
        (("permute", "a", "b", "-o", "x"), 3, "b.safetensors is no permutation file"),
        (("permute", "a", "-o", "x"), 2, "Missing argument 'PERMUTATIONS'"),
    ],
)
def test_mistakes_are_told(remelt: Remelt, words: tuple[str, ...], code: int, message: str) -> None:
    found, said = remelt(*words)
    assert found == code
    assert message in said


def test_the_numeric_check_of_an_arch_and_of_a_file(remelt: Remelt) -> None:
    pytest.importorskip("transformers")
    code, said = remelt("rebasin", "check", "clip_l")
    assert code == 0, said
    assert said.startswith("clip_l holds: ")
    code, said = remelt("rebasin", "check", "a.safetensors", "--json")
    assert (code, [one["passed"] for one in json.loads(said)]) == (0, [True])
