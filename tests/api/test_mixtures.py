"""Mixtures of experts: what is taken from where, that transformers runs them, and what cannot be one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import remelt as rm
from remelt.api.mixture_views import FAMILIES, RouterCheckpoint, Style, with_parts
from remelt.api.opening import open_models
from remelt.check.bound import bind_recipes
from remelt.cli.main import run
from remelt.errors import CheckError, RecipeError
from remelt.methods import METHODS
from remelt.recipe.mixture import expand_mixtures

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

LAYERS, HIDDEN, INNER = 3, 32, 48
SIZES = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXTRA: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4},
    "qwen3": {"head_dim": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
}
STYLED = [(family, style) for family, styles in FAMILIES.items() for style in styles]
CLASSES = {"mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
PROMPT = torch.tensor([[1, 5, 9, 33, 2, 7, 60, 11, 12, 13]])
ONE_SHAPE = "the experts of a mixture are of one shape"
NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def write_dense(folder: Path, family: str, seed: int, dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    """A small model as transformers saves it."""
    word = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    config = getattr(transformers, f"{word}Config")(**{**SIZES, **EXTRA.get(family, {}), **sizes})
    torch.manual_seed(seed)
    made = getattr(transformers, f"{word}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    made.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """``dense(family)`` gives a base and four models of its shape."""
    folder = tmp_path_factory.mktemp("dense")
    made: dict[str, list[Path]] = {}

    def write(family: str) -> list[Path]:
        if family not in made:
            made[family] = [write_dense(folder / f"{family}{seed}", family, seed) for seed in range(5)]
        return made[family]

    return write


def merged(recipe: Any, out: Path, **options: Any) -> Path:
    return Path(rm.merge(recipe, out, max_shard_size="1GB", **options))


def tensors(folder: Path) -> dict[str, Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def told(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def logits(folder: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        found: Tensor = model(PROMPT).logits
    return found


def key_of(style: str, layer: int, number: int, projection: str) -> str:
    if style == "mixtral":
        return f"model.layers.{layer}.block_sparse_moe.experts.{number}.{NAMES[projection]}.weight"
    return f"model.layers.{layer}.mlp.experts.{number}.{projection}.weight"


@pytest.mark.parametrize(("family", "style"), STYLED)
def test_a_mixture_of_four_models_loads_and_generates(
    family: str, style: str, dense: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    base, *experts = dense(family)
    out = merged(rm.mixture_of_experts(base, *experts, router="uniform_random", style=style), tmp_path / "out")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(model).__name__ == CLASSES[style]
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert model.config.num_experts_per_tok == 2
    assert model.config.num_experts == 4
    written = model.generate(PROMPT, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert written.shape == (1, PROMPT.shape[1] + 4)
    assert not torch.equal(logits(out), logits(base))
    found, own = tensors(out), [tensors(one) for one in (base, *experts)]
    for key in own[0]:
        if ".mlp." not in key:
            assert torch.equal(found[key], own[0][key]), key
    for layer in range(LAYERS):
        for projection in NAMES:
            dense_key = f"model.layers.{layer}.mlp.{projection}.weight"
            for number in range(4):
                assert torch.equal(found[key_of(style, layer, number, projection)], own[number + 1][dense_key])
            if style == "qwen2_moe":
                shared = f"model.layers.{layer}.mlp.shared_expert.{projection}.weight"
                assert torch.equal(found[shared], own[0][dense_key])
            assert dense_key not in found
    assert run(["verify", str(out)]) == 0


@pytest.mark.parametrize(("family", "style"), [pair for pair in STYLED if pair[1] != "qwen2_moe"])
@pytest.mark.parametrize("per_token", [1, 3])
def test_experts_that_are_all_the_base_are_the_base(
    family: str, style: str, per_token: int, dense: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    """Whatever the router says: its shares of one and the same MLP add up to 1."""
    base = dense(family)[0]
    recipe = rm.mixture_of_experts(base, base, base, base, experts_per_token=per_token, seed=5, style=style)
    torch.testing.assert_close(logits(merged(recipe, tmp_path / "out")), logits(base), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [family for family, style in STYLED if style == "qwen2_moe"])
def test_a_shared_expert_adds_to_the_others(family: str, dense: Callable[[str], list[Path]], tmp_path: Path) -> None:
    """With a gate of zeros it has half a share: halved experts and it make up the base."""
    base = dense(family)[0]
    routers = {f"model.layers.{layer}.mlp.gate.weight": torch.randn(3, HIDDEN) for layer in range(LAYERS)}
    save_file(routers, tmp_path / "router.safetensors")
    half = rm.passthrough(rm.model(base), rm.keys({"*.down_proj.weight": 0.5}) | 1.0)
    router = rm.model(tmp_path / "router.safetensors")
    recipe = rm.mixture_of_experts(base, half, half, half, router=router, style="qwen2_moe")
    out = merged(recipe, tmp_path / "out")
    torch.testing.assert_close(logits(out), logits(base), rtol=1e-4, atol=1e-5)
    found = tensors(out)
    for key, value in routers.items():
        assert torch.equal(found[key], value)
        assert not found[key.replace(".gate.", ".shared_expert_gate.")].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_means_what_the_bases_meant(
    family: str, dense: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    """What it leaves out has the default of the base's kind, which a mixture's kind has otherwise."""
    base = tmp_path / "base"
    shutil.copytree(dense(family)[0], base)
    asked = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    left = {name: value for name, value in told(base).items() if name in (*asked, "num_attention_heads")}
    if family == "llama":  # whose heads are all their own without a number
        sizes = {**SIZES, "num_key_value_heads": 4}
        shutil.rmtree(base)
        write_dense(base, family, 3, **sizes)
    else:
        left["num_key_value_heads"] = 2
    (base / "config.json").write_text(json.dumps(left), encoding="utf-8")
    wanted = logits(base)
    half = rm.passthrough(rm.model(base), rm.keys({"*.down_proj.weight": 0.5}) | 1.0)
    parts = [half, half] if family == "qwen2" else [rm.model(base)] * 2
    save_file(
        {f"model.layers.{layer}.mlp.gate.weight": torch.zeros(2, HIDDEN) for layer in range(LAYERS)},
        tmp_path / "router.safetensors",
    )
    recipe = rm.mixture_of_experts(base, *parts, router=rm.model(tmp_path / "router.safetensors"))
    torch.testing.assert_close(logits(merged(recipe, tmp_path / "out")), wanted, rtol=1e-4, atol=1e-5)


def test_a_window_in_some_layers_is_refused_where_the_mixture_has_none(tmp_path: Path) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    base = write_dense(tmp_path / "base", "qwen3", 0, **windows)
    with pytest.raises(RecipeError, match="attends in a window of 4 tokens in 2 of 3 layers, which a qwen3_moe cannot"):
        merged(rm.mixture_of_experts(base, base, base), tmp_path / "out")
    everywhere = write_dense(tmp_path / "everywhere", "qwen3", 0, **{**windows, "max_window_layers": 0})
    out = merged(rm.mixture_of_experts(everywhere, everywhere, everywhere), tmp_path / "out")
    torch.testing.assert_close(logits(out), logits(everywhere), rtol=1e-4, atol=1e-5)


def test_base_and_experts_may_be_recipes(dense: Callable[[str], list[Path]], tmp_path: Path) -> None:
    base, a, b, c, d = dense("llama")
    first = rm.weighted_sum(rm.model(a), rm.model(b), alpha=rm.keys({"*experts.0.w2*": 0.75}) | 0.25)
    second = rm.model(c) + 0.5 * (rm.model(d) - rm.model(base))
    whole = rm.weighted_sum(rm.model(base), rm.model(a), alpha=0.5)
    found = tensors(merged(rm.cast(rm.mixture_of_experts(whole, first, second), "fp16"), tmp_path / "out"))
    own = {name: tensors(path) for name, path in zip("nabcd", (base, a, b, c, d), strict=True)}
    key = "model.layers.1.mlp.down_proj.weight"
    wanted = {
        "model.layers.1.block_sparse_moe.experts.0.w2.weight": torch.lerp(own["a"][key], own["b"][key], 0.75),
        "model.layers.1.block_sparse_moe.experts.1.w2.weight": own["c"][key] + 0.5 * (own["d"][key] - own["n"][key]),
    }
    key = "model.layers.1.self_attn.q_proj.weight"
    wanted[key] = torch.lerp(own["n"][key], own["a"][key], 0.5)
    key = "model.layers.2.mlp.gate_proj.weight"
    wanted["model.layers.2.block_sparse_moe.experts.0.w1.weight"] = torch.lerp(own["a"][key], own["b"][key], 0.25)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value.half(), msg=key)
    assert {value.dtype for value in found.values()} == {torch.float16}


def test_an_expert_may_be_a_model_with_an_adapter(dense: Callable[[str], list[Path]], tmp_path: Path) -> None:
    base, a, *_ = dense("llama")
    drawn = {}
    for projection, (rows, columns) in {"up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}.items():
        module = f"base_model.model.model.layers.1.mlp.{projection}"
        drawn[f"{module}.lora_A.weight"] = torch.randn(2, columns)
        drawn[f"{module}.lora_B.weight"] = torch.randn(rows, 2)
    (tmp_path / "style").mkdir()
    save_file(drawn, tmp_path / "style" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj", "down_proj"]}
    (tmp_path / "style" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    tuned = rm.model(a) + 0.5 * rm.adapter(rm.model(tmp_path / "style"))
    found = tensors(merged(rm.mixture_of_experts(base, rm.model(a), tuned), tmp_path / "out"))
    factors = [drawn[f"base_model.model.model.layers.1.mlp.down_proj.lora_{side}.weight"] for side in "BA"]
    key = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    torch.testing.assert_close(found[key.format(1)], found[key.format(0)] + 0.5 * factors[0] @ factors[1])
    untouched = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
    assert torch.equal(found[untouched.format(1)], found[untouched.format(0)])


def test_stacked_layers_are_experts_and_mixtures_are_stacked(
    dense: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    base, a, b, *_ = dense("llama")
    deep = write_dense(tmp_path / "deep", "llama", 9, num_hidden_layers=5)
    recipe = rm.mixture_of_experts(base, rm.model(a), rm.layers(rm.model(deep), 2, 5))
    found = tensors(merged(recipe, tmp_path / "out"))
    wanted = tensors(deep)["model.layers.3.mlp.up_proj.weight"]
    assert torch.equal(found["model.layers.1.block_sparse_moe.experts.1.w3.weight"], wanted)
    assert told(tmp_path / "out")["num_hidden_layers"] == LAYERS
    mixture = rm.mixture_of_experts(base, rm.model(a), rm.model(b), router="zero")
    tall = merged(rm.stack_layers(rm.layers(mixture, 0, 2), rm.layers(mixture, 1, 3)), tmp_path / "tall")
    assert told(tall)["num_hidden_layers"] == 4
    found = tensors(tall)
    wanted = tensors(b)["model.layers.2.mlp.gate_proj.weight"]
    assert torch.equal(found["model.layers.3.block_sparse_moe.experts.1.w1.weight"], wanted)
    assert transformers.AutoModelForCausalLM.from_pretrained(tall).generate(PROMPT, max_new_tokens=2) is not None


def test_routers_are_drawn_by_seed_and_place(dense: Callable[[str], list[Path]], tmp_path: Path) -> None:
    base, a, b, *_ = dense("llama")
    key = "model.layers.{}.block_sparse_moe.gate.weight"

    def gates(**options: Any) -> list[Tensor]:
        found = rm.merge(rm.mixture_of_experts(base, a, b, **options))
        return [found[key.format(layer)] for layer in range(LAYERS)]

    first, again, other = gates(seed=1), gates(seed=1), gates(seed=2)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert not torch.equal(first[0], first[1])
    assert all(gate.shape == (2, HIDDEN) for gate in first)
    normal = torch.cat(first)
    assert abs(normal.mean()) < 0.25 and 0.8 < normal.std() < 1.2
    uniform = torch.cat(gates(router="uniform_random")) * HIDDEN**0.5
    assert -1.0 <= uniform.min() < -0.9 and 0.9 < uniform.max() < 1.0
    assert not torch.cat(gates(router="zero")).any()


@pytest.mark.parametrize("router", ["random", "uniform_random", "zero"])
def test_a_drawn_router_is_the_same_in_parts(router: str, dense: Callable[[str], list[Path]]) -> None:
    base, a, b, *_ = dense("qwen2")
    expanded = expand_mixtures(rm.mixture_of_experts(base, a, b, router=router, seed=3))
    with open_models(bind_recipes([expanded], METHODS, ["."]), []) as opened:
        inputs, style = with_parts(opened.inputs, list(opened.inputs))
        assert style == Style("qwen2_moe")
        (drawn,) = [one.checkpoint for one in inputs.values() if isinstance(one.checkpoint, RouterCheckpoint)]
        assert len(drawn.tensors) == 2 * LAYERS
        for key, info in drawn.tensors.items():
            whole = bytes(drawn.read(key))
            assert len(whole) == info.nbytes
            for start, stop in ((0, 4), (4, 60), (6, 27), (info.nbytes - 3, None), (8, 8)):
                assert bytes(drawn.read(key, start, stop)) == whole[start:stop]


def test_a_router_is_of_the_bases_type_and_may_be_that_of_another_mixture(tmp_path: Path) -> None:
    base = write_dense(tmp_path / "base", "llama", 0, torch.bfloat16)
    first = merged(rm.mixture_of_experts(base, base, base, seed=4), tmp_path / "first")
    again = merged(rm.mixture_of_experts(base, base, base, router=rm.model(first)), tmp_path / "again")
    gates = [{key: value for key, value in tensors(one).items() if ".gate." in key} for one in (first, again)]
    assert len(gates[0]) == LAYERS
    for key, value in gates[0].items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(gates[1][key], value)


def test_tensors_in_memory_and_files_alone_are_mixed(dense: Callable[[str], list[Path]], tmp_path: Path) -> None:
    base, a, b, *_ = (tensors(path) for path in dense("qwen3"))
    recipe = rm.mixture_of_experts(rm.model(base), rm.model(a), rm.model(b))
    found = rm.merge(recipe)
    assert torch.equal(found["model.layers.0.mlp.experts.1.up_proj.weight"], b["model.layers.0.mlp.up_proj.weight"])
    out = rm.merge(recipe, tmp_path / "out.safetensors")
    assert load_file(out).keys() == found.keys()


def test_experts_are_streamed_and_the_plan_tells_them(tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2}
    paths = [write_dense(tmp_path / str(seed), "llama", seed, **wide) for seed in range(5)]
    mixed = [rm.weighted_sum(rm.model(one), rm.model(paths[0]), alpha=0.5) for one in paths[1:]]
    recipe = rm.mixture_of_experts(paths[0], *mixed)
    plan = rm.plan(recipe, tmp_path / "out", memory="4MiB", max_shard_size="8MB", threads=1)
    assert plan.peak_memory <= 4 * 2**20 < plan.bytes_written // 6
    labels = {given.label: given for given in plan.inputs}
    assert {"0", "0, expert 0", "4, expert 3", "random router for 0"} <= labels.keys()
    assert "0, shared expert" not in labels
    assert labels["4, expert 3"].size == 2 * 3 * 256 * 1024 * 4
    assert labels["random router for 0"].size == 2 * 4 * 256 * 4
    out = rm.merge(recipe, tmp_path / "out", memory="4MiB", max_shard_size="8MB", threads=1)
    assert len(list(out.glob("*.safetensors"))) > 2
    assert transformers.AutoModelForCausalLM.from_pretrained(out).generate(PROMPT, max_new_tokens=2) is not None


def test_tokens_are_the_bases_whatever_the_experts_have(dense: Callable[[str], list[Path]], tmp_path: Path) -> None:
    base, *_ = dense("llama")
    expert = write_dense(tmp_path / "expert", "llama", 7, vocab_size=80)
    found = tensors(merged(rm.mixture_of_experts(base, expert, expert), tmp_path / "out"))
    assert torch.equal(found["lm_head.weight"], tensors(base)["lm_head.weight"])
    assert told(tmp_path / "out")["vocab_size"] == 64


EXPERTS = """
base_model: {0}
gate_mode: random
dtype: float32
experts_per_token: 3
experts:
  - {{source_model: {1}, residual_scale: 0.5}}
  - {{source_model: {2}, positive_prompts: [unused]}}
  - {{source_model: {3}}}
  - {{source_model: {4}}}
"""


@pytest.mark.parametrize(("family", "style"), STYLED)
def test_the_same_as_mergekits_but_for_the_random_router(
    family: str, style: str, dense: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    yaml = pytest.importorskip("yaml")
    pytest.importorskip("mergekit")
    from mergekit.merge import MergeOptions
    from mergekit.moe import ALL_OUTPUT_ARCHITECTURES
    from mergekit.moe.config import MoEMergeConfig

    paths = dense(family)
    text = EXPERTS.format(*paths)
    if style == "qwen2_moe":
        text += f"shared_experts: [{{source_model: {paths[1]}, residual_scale: 0.25}}]\narchitecture: Qwen MoE\n"
    (tmp_path / "config.yml").write_text(text, encoding="utf-8")
    ours = merged(tmp_path / "config.yml", tmp_path / "ours")
    config = MoEMergeConfig.model_validate(yaml.safe_load(text))
    kinds = {"mixtral": "Mixtral", "qwen2_moe": "Qwen MoE", "qwen3_moe": "Qwen3 MoE"}
    (writer,) = [kind for kind in ALL_OUTPUT_ARCHITECTURES if kind.name() == kinds[style]]
    gates = [torch.randn(4, HIDDEN) for _ in range(LAYERS)]
    options = MergeOptions(copy_tokenizer=False, quiet=True)
    writer.write_model(str(tmp_path / "theirs"), config, options, gates, [gate[:1] for gate in gates])
    load = transformers.AutoModelForCausalLM.from_pretrained
    found, due = (load(tmp_path / name) for name in ("ours", "theirs"))
    assert found.config.num_experts_per_tok == due.config.num_experts_per_tok == 3
    states = found.state_dict(), due.state_dict()
    biases = {key for key in states[1] if key.endswith("_proj.bias")} if family in ("llama", "mistral") else set()
    assert states[0].keys() == states[1].keys() - biases  # zeros there, which this configuration does without
    for key, value in states[0].items():
        if "gate.weight" not in key:
            torch.testing.assert_close(value, states[1][key], rtol=0.0, atol=0.0, msg=key)
    assert ours.is_dir()


def problem_of(recipe: Any) -> str:
    with pytest.raises((RecipeError, CheckError)) as caught:
        rm.plan(recipe)
    return str(caught.value)


def test_experts_of_other_shapes_are_refused(dense: Callable[[str], list[Path]], tmp_path: Path) -> None:
    base, a, *_ = dense("llama")
    wider = write_dense(tmp_path / "wider", "llama", 1, intermediate_size=64)
    broader = write_dense(tmp_path / "broader", "llama", 1, hidden_size=64)
    deeper = write_dense(tmp_path / "deeper", "llama", 1, num_hidden_layers=5)
    shallower = write_dense(tmp_path / "shallower", "llama", 1, num_hidden_layers=2)
    found = problem_of(rm.mixture_of_experts(base, a, wider, broader, deeper, shallower))
    assert "refused: 4 problems" in found
    gate, missing = "model.layers.0.mlp.gate_proj.weight", "model.layers.2.block_sparse_moe.experts.4.w1.weight"
    for line in (
        f"wider, expert 1  has a {gate} of [64, 32], but that of llama1, expert 0 is [48, 32]\n      {ONE_SHAPE}",
        f"broader, expert 2  has a {gate} of [48, 64], but llama0 has hidden states of 32 numbers",
        "deeper, expert 3  has 5 layers, but llama0 has 3\n      layers(model, 0, 3) reads as many",
        f"shallower, expert 4  has no model.layers.2.mlp.gate_proj.weight, which is to be {missing}",
    ):
        assert line in found


def test_an_own_width_of_the_experts_is_told(dense: Callable[[str], list[Path]], tmp_path: Path) -> None:
    """What is taken of the base, and of the experts, need not have one width inside."""
    base = write_dense(tmp_path / "base", "llama", 1, intermediate_size=64)
    _, a, b, *_ = dense("llama")
    out = merged(rm.mixture_of_experts(base, a, b, style="qwen2_moe"), tmp_path / "out")
    assert told(out)["moe_intermediate_size"] == INNER
    assert told(out)["shared_expert_intermediate_size"] == 64
    assert logits(out).isfinite().all()
    assert told(merged(rm.mixture_of_experts(base, a, b), tmp_path / "other"))["intermediate_size"] == INNER


def test_what_is_no_dense_model_of_a_known_kind_is_refused(dense: Callable[[str], list[Path]], tmp_path: Path) -> None:
    base, a, b, *_ = dense("llama")
    mixture = merged(rm.mixture_of_experts(base, a, b), tmp_path / "mixture")
    already = "is a mixture of experts already: it has model.layers.0.block_sparse_moe."
    assert f"mixture {already}" in problem_of(rm.mixture_of_experts(mixture, a, b))
    assert f"mixture, expert 1 {already}" in problem_of(rm.mixture_of_experts(base, a, mixture))
    assert "a mixture of mixtures is not made" in problem_of(
        rm.mixture_of_experts(base, a, rm.mixture_of_experts(base, a, b))
    )
    gemma = tmp_path / "gemma"
    shutil.copytree(base, gemma)
    (gemma / "config.json").write_text(json.dumps(told(base) | {"model_type": "gemma2"}), encoding="utf-8")
    found = problem_of(rm.mixture_of_experts(gemma, a, b))
    assert "gemma is a gemma2, of which no mixture of experts is known\nhint: those of llama, mistral, qwen2" in found
    found = problem_of(rm.mixture_of_experts(base, a, b, style="qwen3_moe"))
    assert 'llama0 is a llama, whose attention a qwen3_moe has not\nhint: style="mixtral"' in found
    assert "a mixtral has no shared expert" in problem_of(rm.mixture_of_experts(base, a, b, shared=a))
    biased = write_dense(tmp_path / "biased", "llama", 1, mlp_bias=True)
    found = problem_of(rm.mixture_of_experts(base, a, biased))
    assert "biased, expert 1 has model.layers.0.mlp.down_proj.bias, for which the experts of a mixture have no" in found
    attending = write_dense(tmp_path / "attending", "llama", 1, attention_bias=True)
    (attending / "config.json").write_text(json.dumps(told(base)), encoding="utf-8")
    found = problem_of(rm.mixture_of_experts(attending, attending, attending))
    assert "self_attn.k_proj.bias, for which a mixtral has no place" in found


def test_a_router_of_another_shape_is_refused(dense: Callable[[str], list[Path]], tmp_path: Path) -> None:
    base, a, b, *_ = dense("llama")
    gate = "model.layers.{}.mlp.gate.weight"
    three = {gate.format(layer): torch.zeros(3, HIDDEN) for layer in range(LAYERS)}
    found = problem_of(rm.mixture_of_experts(base, a, b, router=rm.model(three, name="three")))
    assert "three, router  has a gate of [3, 32] for model.layers.0, but 2 experts of 32 numbers need [2, 32]" in found
    short = {gate.format(layer): torch.zeros(2, HIDDEN) for layer in range(2)}
    found = problem_of(rm.mixture_of_experts(base, a, b, router=rm.model(short, name="short")))
    assert "short, router  has no gate for model.layers.2" in found
    found = problem_of(rm.mixture_of_experts(base, a, b, router=rm.model(a)))
    assert "llama1, router has no router: no gate of a layer" in found


def test_mixtures_of_different_numbers_are_not_merged(dense: Callable[[str], list[Path]]) -> None:
    base, a, b, *_ = dense("llama")
    two, three = rm.mixture_of_experts(base, a, b), rm.mixture_of_experts(base, a, b, a)
    found = problem_of(rm.weighted_sum(two, three))
    assert "but they have 2 experts, 2 for a token and 3 experts, 2 for a token" in found
    found = rm.merge(rm.weighted_sum(two, rm.mixture_of_experts(base, b, a), alpha=0.5))
    own = [tensors(path)["model.layers.0.mlp.up_proj.weight"] for path in (a, b)]
    torch.testing.assert_close(found["model.layers.0.block_sparse_moe.experts.0.w3.weight"], (own[0] + own[1]) / 2)


def test_a_configuration_of_mergekit_with_prompts_has_a_hole_for_its_router(
    dense: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    pytest.importorskip("yaml")
    base, a, b, *_ = dense("llama")
    text = f"base_model: {base}\nexperts:\n  - {{source_model: {a}}}\n  - {{source_model: {b}}}\n"
    (tmp_path / "config.yml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match="parameter 'router' is still open"):
        rm.plan(tmp_path / "config.yml")
    gates = {f"model.layers.{layer}.mlp.gate.weight": torch.randn(2, HIDDEN) for layer in range(LAYERS)}
    recipe = rm.compose(tmp_path / "config.yml", router=rm.model(gates, name="gates"))
    found = rm.merge(recipe)
    for layer in range(LAYERS):
        gate = gates[f"model.layers.{layer}.mlp.gate.weight"]
        assert torch.equal(found[f"model.layers.{layer}.block_sparse_moe.gate.weight"], gate)


def test_models_without_their_head_are_experts_too(dense: Callable[[str], list[Path]], tmp_path: Path) -> None:
    """As transformers writes the model alone: its keys begin with ``layers``."""
    base, a, b, *_ = dense("llama")
    alone = {key.removeprefix("model."): value for key, value in tensors(b).items() if key.startswith("model.")}
    save_file(alone, tmp_path / "alone.safetensors")
    found = rm.merge(rm.mixture_of_experts(base, a, rm.model(tmp_path / "alone.safetensors")))
    wanted = tensors(b)["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(found["model.layers.1.block_sparse_moe.experts.1.w3.weight"], wanted)
