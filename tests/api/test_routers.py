"""Routers made of prompts: the rows that mergekit-moe makes, a file that a recipe reads, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import remelt as rm
from remelt.api.routers import ROUTER_KEY, make_router
from remelt.cli.main import run
from remelt.errors import FormatError, MissingExtraError, OptionError, OutputError, RecipeError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

LAYERS, WIDTH = 3, 32
WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
PROMPTS: dict[str, Any] = {
    "experts": [
        {"positive_prompts": ["a b c d", "b d e"], "negative_prompts": ["z y"]},
        {"positive_prompts": ["k l m n o p", "p o"]},
        {"positive_prompts": ["q r s"], "negative_prompts": ["a b c", "d"]},
    ],
    "shared_experts": [{"positive_prompts": ["t u v w"]}],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama that knows the letters."""
    folder = tmp_path_factory.mktemp("speaking") / "base"
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)
    made = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    made.save_pretrained(folder)
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: row for row, word in enumerate(WORDS)}, "<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special).save_pretrained(folder)
    return folder


def of_layers(file: Path, name: str = "gate") -> Tensor:
    found = load_file(file)
    return torch.stack([found[f"model.layers.{layer}.mlp.{name}.weight"] for layer in range(LAYERS)])


def by_mergekit(base: Path, mode: str, *, in_full: bool = False) -> Tensor:
    """mergekit's rows: in bfloat16, or in float32 by its function for one set of prompts."""
    pytest.importorskip("mergekit")
    from mergekit.common import ModelReference
    from mergekit.moe.config import Expert
    from mergekit.moe.router import get_gate_params, get_hidden_states, tokenize_prompts

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.padding_side, tokenizer.pad_token_id = "left", tokenizer.bos_token_id
    listed = [*PROMPTS["experts"], *PROMPTS["shared_experts"]]
    if not in_full:
        experts = [Expert(source_model=str(base), **one) for one in listed]
        found: Tensor = get_gate_params(ModelReference.parse(str(base)), tokenizer, experts, mode, device="cpu")
        return found
    model = transformers.AutoModelForCausalLM.from_pretrained(base).float()
    rows = []
    for one in listed:
        row = get_hidden_states(model, tokenize_prompts(one["positive_prompts"], tokenizer), average=False)
        if one.get("negative_prompts"):
            row = row - get_hidden_states(model, tokenize_prompts(one["negative_prompts"], tokenizer), average=False)
        rows.append(row / row.norm(dim=-1, keepdim=True))
    return torch.stack(rows, 1)


@pytest.mark.parametrize(
    ("mode", "in_full", "close"), [("cheap_embed", False, 1e-6), ("hidden", True, 1e-5), ("hidden", False, 0.02)]
)
def test_rows_are_those_of_mergekit(mode: str, in_full: bool, close: float, base: Path, tmp_path: Path) -> None:
    report = make_router(base, PROMPTS, tmp_path / "router", mode=mode)
    assert (report.path, report.experts, report.layers, report.width) == (
        tmp_path / "router.safetensors",
        *(3, LAYERS, WIDTH),
    )
    theirs = by_mergekit(base, mode, in_full=in_full).float()
    torch.testing.assert_close(of_layers(report.path), theirs[:, :3], rtol=0.0, atol=close)
    torch.testing.assert_close(of_layers(report.path, "shared_expert_gate"), theirs[:, 3:], rtol=0.0, atol=close)


def test_a_mean_over_tokens_is_one_of_each_prompts_own(base: Path, tmp_path: Path) -> None:
    """mergekit's also counts the tokens with which it pads a prompt to the length of the longest."""
    experts = [{"positive_prompts": ["a b c", "d"]}, {"positive_prompts": ["e"]}]
    found = of_layers(make_router(base, {"experts": experts}, tmp_path / "x", mode="hidden_avg").path)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    states = []
    for tokens in ([1, 3, 4, 5], [1, 6]):
        hidden = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[:-1]
        states.append(torch.stack([one[0].mean(0) for one in hidden]))
    wanted = (states[0] + states[1]).detach()
    torch.testing.assert_close(found[:, 0], wanted / wanted.norm(dim=-1, keepdim=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", ["mixtral", "qwen2_moe"])
def test_a_router_of_prompts_is_a_model_of_a_recipe(
    style: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(base.parent)
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS), encoding="utf-8")
    words = ["router", "base", str(tmp_path / "prompts.json"), "-o", str(tmp_path / "router.safetensors")]
    assert run(words) == 0
    assert f"{LAYERS} layers, 3 experts, {WIDTH} numbers for each" in capsys.readouterr().out
    assert run(words) == 3
    assert "router.safetensors exists" in capsys.readouterr().err
    assert run([*words, "--overwrite", "--mode", "cheap_embed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["experts"] == 3
    router = tmp_path / "router.safetensors"
    with safe_open(router, "pt") as opened:
        made_of = json.loads(opened.metadata()[ROUTER_KEY])
    assert (made_of["base"], made_of["mode"]) == ("base", "cheap_embed")
    assert made_of["experts"][0]["negative_prompts"] == ["z y"]
    recipe = tmp_path / "mix.mecha"
    recipe.write_text(
        f'version 1\nb = model("base")\nmixture_of_experts(b, b, b, b, router="{router}", style="{style}")'
    )
    out = rm.merge(recipe, tmp_path / "out", max_shard_size="1GB", models_dirs=[base.parent])
    found, block = load_file(out / "model.safetensors"), "block_sparse_moe" if style == "mixtral" else "mlp"
    for layer in range(LAYERS):
        assert torch.equal(found[f"model.layers.{layer}.{block}.gate.weight"], of_layers(router)[layer])
        shared = found.get(f"model.layers.{layer}.mlp.shared_expert_gate.weight")
        assert (shared is None) == (style == "mixtral")
        assert shared is None or torch.equal(shared, of_layers(router, "shared_expert_gate")[layer])
    assert (
        transformers.AutoModelForCausalLM.from_pretrained(out).generate(torch.tensor([[1, 3]]), max_new_tokens=2)
        is not None
    )


def test_prompts_that_are_alike_are_told(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.json"
    experts = [{"positive_prompts": ["a b c d e f g h"]}, {"positive_prompts": ["a b c d e f h g"]}]
    file.write_text(json.dumps({"experts": experts, "gate_mode": "cheap_embed"}), encoding="utf-8")
    assert run(["router", str(base), str(file), "-o", str(tmp_path / "r.safetensors")]) == 0
    assert "warning: in 3 of 3 layers the experts' rows are nearly dependent" in capsys.readouterr().err


def prompts_of(*texts: Any) -> dict[str, Any]:
    return {"experts": [{"positive_prompts": text} for text in texts]}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({}, "has no prompts for at least two experts"),
        (prompts_of(["a"]), "has no prompts for at least two experts"),
        (prompts_of(["a"], []), "expert 1 of the prompts has no positive_prompts"),
        (prompts_of(["a"], "b"), "positive_prompts are a list of texts, but got 'b'"),
        (prompts_of(["a"], [3]), r"positive_prompts are a list of texts, but got \[3\]"),
        (prompts_of(["a"], ["a"]), "has the same prompts for all experts"),
        ({"experts": [{"positive": ["a"]}, {}]}, "expert 0 of the prompts has 'positive', which is not known"),
        ({"experts": ["a", "b"]}, "expert 0 of the prompts is no mapping"),
        ({**prompts_of(["a"], ["b"]), "shared_experts": [{}, {}]}, "has prompts for several shared experts"),
        ({**prompts_of(["a"], ["b"]), "gate_mode": "random"}, "asks for a router of random numbers"),
    ],
)
def test_prompts_that_make_no_router_are_refused(told: Any, message: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        make_router(base, told, tmp_path / "router")
    assert list(tmp_path.iterdir()) == []


def test_files_and_options_that_make_no_router_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, told = tmp_path / "router.safetensors", prompts_of(["a"], ["b"])
    with pytest.raises(OptionError, match="is one of hidden, hidden_last, hidden_avg, cheap_embed, but got 'hiden'"):
        make_router(base, told, out, mode="hiden")
    with pytest.raises(RecipeError, match="is a file, but its tokenizer is asked for"):
        make_router(base / "model.safetensors", told, out)
    with pytest.raises(OptionError, match="device cuda:77 is not here"):
        make_router(base, told, out, device="cuda:77")
    silent = tmp_path / "silent"
    shutil.copytree(base, silent, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    with pytest.raises(FormatError, match="transformers reads no tokenizer in "):
        make_router(silent, told, out)
    strange = tmp_path / "strange"
    shutil.copytree(base, strange)
    (strange / "config.json").write_text(json.dumps({"model_type": "vit"}), encoding="utf-8")
    with pytest.raises(FormatError, match="transformers runs no model of ") as refused:
        make_router(strange, told, out)
    assert refused.value.hint == "--mode cheap_embed runs none"
    bad = tmp_path / "bad.json"
    bad.write_text("{", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"bad\.json is no JSON: "):
        make_router(base, bad, out)
    bad.write_text("[]", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"bad\.json is no JSON object"):
        make_router(base, bad, out)
    with pytest.raises(RecipeError, match=r"none\.json cannot be read"):
        make_router(base, tmp_path / "none.json", out)
    out.write_bytes(b"")
    with pytest.raises(OutputError, match=r"router\.safetensors exists"):
        make_router(base, told, out)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError) as caught:
        make_router(base, told, out, overwrite=True)
    assert caught.value.hint == 'pip install "remelt[router]"'
