"""Adapters merged into one: exactly, or as near as a rank allows, and never by adding factor to factor."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import remelt as rm
from remelt.adapters.checkpoint import ChangesCheckpoint, changes_of
from remelt.adapters.joining import JoinedAdapter, Term
from remelt.adapters.pairing import Layouts
from remelt.adapters.written import Written
from remelt.api.adapters import merge_adapters, resize_lora
from remelt.api.verification import verify
from remelt.archs.arch import find_arch
from remelt.archs.shapes import flux_shapes
from remelt.core.dtype import DType
from remelt.errors import AdapterError, OptionError, RecipeError
from remelt.formats.memory import MemoryCheckpoint
from remelt.recipe.adapter import adapter
from remelt.recipe.node import Node
from remelt.tensors import describe_tensors

SHAPES: dict[str, tuple[int, ...]] = {
    "mid.linear.weight": (40, 24),
    "mid.wide.weight": (12, 70),
    "mid.one.weight": (32, 16, 1, 1),
    "mid.kernel.weight": (16, 32, 3, 3),
}
KOHYA = ("lora_unet_{}.lora_up.weight", "lora_unet_{}.lora_down.weight")
DIFFUSERS = ("unet.{}.lora_B.weight", "unet.{}.lora_A.weight")
KOHYAS = Written("kohya", None, own=True)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    source = torch.Generator().manual_seed(9)
    save_file({key: torch.randn(shape, generator=source) for key, shape in SHAPES.items()}, "base.safetensors")
    return tmp_path


def lora(name: str, rank: int, seed: int, *, alpha: float | None = 3.0, only: str = "", kohya: bool = True) -> str:
    """A LoRA of the modules whose names have some letters, in a file."""
    source = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for key, shape in SHAPES.items():
        module = key.removesuffix(".weight")
        if only not in module:
            continue
        ones = [1] * len(shape[2:])
        up, down = (
            one.format(module.replace(".", "_") if kohya else module) for one in (KOHYA if kohya else DIFFUSERS)
        )
        tensors[up] = 0.3 * torch.randn(shape[0], rank, *ones, generator=source)
        tensors[down] = 0.3 * torch.randn(rank, *shape[1:], generator=source)
        if alpha is not None:
            tensors[up.replace("lora_up.weight", "alpha")] = torch.tensor(alpha)
    save_file(tensors, f"{name}.safetensors")
    return f"{name}.safetensors"


def applied(recipe: Node) -> dict[str, Tensor]:
    found: dict[str, Tensor] = rm.merge(rm.model("base.safetensors") + recipe, compute_dtype="float64", dtype="fp64")
    return found


def away(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[key] - other[key]).abs().max()) for key in SHAPES)


RECIPES: dict[str, Any] = {
    "a sum": lambda a, b: a + b,
    "strengths": lambda a, b: 0.7 * a + 0.4 * b,
    "a difference": lambda a, b: 0.7 * a - 1.3 * b,
    "none of one": lambda a, b: 0.0 * a + 0.5 * b,
    "nested": lambda a, b: 2.0 * (0.5 * (a + 0.25 * b) - b),
    "weighted_sum": lambda a, b: rm.weighted_sum(a, b, alpha=0.3),
    "weighted_sum in halves": lambda a, b: rm.weighted_sum(a, b),
    "n_average": lambda a, b: rm.n_average(a, b, a),
    "one of them twice": lambda a, b: a + 0.5 * b + 0.25 * a,
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_exact_sum_applied_is_both_applied(name: str) -> None:
    a, b = adapter(lora("a", 4, 1)), adapter(lora("b", 3, 2))
    recipe = RECIPES[name](a, b)
    report = merge_adapters(recipe, "joined.safetensors")
    assert report.share == 1.0
    assert set(report.ranks.values()) == {3 if name == "none of one" else 7}
    joined = applied(adapter("joined.safetensors"))
    assert away(joined, applied(recipe)) <= 1e-6
    assert away(joined, load_file("base.safetensors")) > 0.1


@pytest.mark.parametrize("rank", [1, 3, 5, 7, 60])
def test_a_bounded_sum_is_the_nearest_of_its_rank(rank: int) -> None:
    recipe = 0.7 * adapter(lora("a", 4, 1)) - 0.4 * adapter(lora("b", 3, 2))
    report = merge_adapters(recipe, "joined.safetensors", rank=rank)
    base = load_file("base.safetensors")
    both, joined = applied(recipe), applied(adapter("joined.safetensors"))
    for key, one in base.items():
        name = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
        delta = both[key] - one
        squares = torch.linalg.svdvals(delta.flatten(1)).square()
        lost = float((both[key] - joined[key]).square().sum() / squares.sum())
        best = float(squares[rank:].sum() / squares.sum())
        assert lost == pytest.approx(best, abs=1e-6)
        assert 1.0 - report.shares[name] == pytest.approx(best, abs=1e-6)
        assert report.ranks[name] == min(rank, 7)


@pytest.mark.parametrize("energy", [0.5, 0.95])
def test_energy_picks_the_least_rank(energy: float) -> None:
    lora("a", 12, 1)
    base = load_file("base.safetensors")
    whole = applied(adapter("a.safetensors"))
    report = resize_lora("a.safetensors", "small.safetensors", energy=energy)
    for key, one in base.items():
        squares = torch.linalg.svdvals((whole[key] - one).flatten(1)).square()
        rank = report.ranks[f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"]
        assert (
            float(squares[: rank - 1].sum()) < energy * float(squares.sum()) <= float(squares[:rank].sum()) * (1 + 1e-6)
        )


@pytest.mark.parametrize("rank", [5, 9])
def test_a_lora_resized_to_its_rank_or_more_is_the_same(rank: int) -> None:
    lora("a", 5, 1, alpha=2.0)
    report = resize_lora("a.safetensors", "again.safetensors", rank=rank)
    assert set(report.ranks.values()) == {5}
    assert away(applied(adapter("again.safetensors")), applied(adapter("a.safetensors"))) <= 1e-6


def test_a_resize_is_to_something() -> None:
    with pytest.raises(RecipeError, match="a LoRA is resized to a rank, or to a share of the energy"):
        resize_lora(lora("a", 5, 1), "again.safetensors")


def test_there_are_no_cross_terms() -> None:
    """What adding the factors one by one makes is far away: (A + C)(B + D) has AD and CB as well."""
    recipe = adapter(lora("a", 4, 1, alpha=None)) + adapter(lora("b", 4, 2, alpha=None))
    merge_adapters(recipe, "joined.safetensors")
    one, other = load_file("a.safetensors"), load_file("b.safetensors")
    save_file({key: one[key] + other[key] for key in one}, "wrong.safetensors")
    right = applied(recipe)
    assert away(applied(adapter("joined.safetensors")), right) <= 1e-6
    assert away(applied(adapter("wrong.safetensors")), right) > 0.3


def test_modules_that_only_one_has_are_kept() -> None:
    recipe = adapter(lora("a", 4, 1, only="linear")) + adapter(lora("b", 3, 2))
    report = merge_adapters(recipe, "joined.safetensors")
    assert report.ranks.pop("lora_unet_mid_linear") == 7
    assert set(report.ranks.values()) == {3}
    assert away(applied(adapter("joined.safetensors")), applied(recipe)) <= 1e-6


def test_names_are_those_of_the_first_with_a_base() -> None:
    kohya, other = lora("a", 4, 1), lora("b", 3, 2, alpha=None, kohya=False)
    for first, second, ending in ((kohya, other, "lora_up.weight"), (other, kohya, "lora_B.weight")):
        recipe = 0.5 * adapter(first) + adapter(second)
        merge_adapters(recipe, "joined.safetensors", base="base.safetensors", overwrite=True)
        made, like = load_file("joined.safetensors"), load_file(first)
        assert sorted(made) == sorted(like)
        assert sum(key.endswith(ending) for key in made) == len(SHAPES)
        assert away(applied(adapter("joined.safetensors")), applied(recipe)) <= 1e-6


def of_peft(kind: str, config: Any, name: str, seed: int) -> dict[str, Tensor]:
    """A folder of PEFT's with random numbers, of a small language model that is beside it; the factors' products."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    small = {"n_embd": 32, "n_layer": 1, "n_head": 4} if kind == "GPT2" else {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    options = {**small, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2}
    causal = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    getattr(transformers, f"{kind}{causal}")(getattr(transformers, f"{kind}Config")(**options)).save_pretrained("base")
    model = transformers.AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    torch.manual_seed(seed)
    with torch.no_grad():
        for one in wrapped.parameters():
            if one.requires_grad:
                one.copy_(torch.randn_like(one) * 0.2)
    wrapped.save_pretrained(name)
    return loaded_by_peft(kind, name)


def loaded_by_peft(kind: str, name: str) -> dict[str, Tensor]:
    """What PEFT makes of the model with the adapter of a folder."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of keys that it does not find
        for of_others in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=of_others)
        wrapped = peft.PeftModel.from_pretrained(model, name)
    found: dict[str, Tensor] = wrapped.merge_and_unload().state_dict()
    return found


PEFTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("Llama", {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "stabilised, with patterns": (
        "Llama",
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj"], "use_rslora": True}
        | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 9}},
    ),
    "embeddings": ("Llama", {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"]}),
    "inputs by outputs": ("GPT2", {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", [None, "base"])
@pytest.mark.parametrize("name", PEFTS)
def test_folders_of_peft_are_joined_and_resized_to_what_peft_loads(name: str, base: str | None) -> None:
    kind, config = PEFTS[name]
    one = of_peft(kind, {**config, "task_type": "CAUSAL_LM"}, "one", 1)
    other = of_peft(kind, config, "other", 2)
    plain = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained("base").state_dict()
    report = merge_adapters(0.5 * adapter("one") + adapter("other"), "both", base=base)
    assert report.path == Path("both")
    told = json.loads((report.path / "adapter_config.json").read_text())
    assert (told["task_type"], told["base_model_name_or_path"]) == ("CAUSAL_LM", "base")
    assert (told["r"], told["lora_alpha"], told["use_rslora"]) == (8, 8, False)
    found = loaded_by_peft(kind, "both")
    far = {key: float((found[key] - (0.5 * one[key] + other[key] - 0.5 * plain[key])).abs().max()) for key in plain}
    assert {key: away for key, away in far.items() if away > 2e-6} == {}
    assert max(float((found[key] - plain[key]).abs().max()) for key in plain) > 0.1
    resize_lora("one", "same", rank=99)
    same = loaded_by_peft(kind, "same")
    assert {key for key in plain if not torch.allclose(same[key], one[key], rtol=0.0, atol=2e-6)} == set()
    assert resize_lora("one", "file.safetensors", rank=2).path == Path("file.safetensors")


def test_the_recipe_of_what_was_joined_makes_the_same_difference_but_not_the_same_factors() -> None:
    recipe = 0.7 * adapter(lora("a", 4, 1)) - 0.4 * adapter(lora("b", 3, 2))
    merge_adapters(recipe, "joined.safetensors", rank=3)
    with pytest.raises(OptionError, match=r"joined\.safetensors was joined of adapters' factors"):
        verify("joined.safetensors", recipe=True)
    assert verify("joined.safetensors").faults == []
    again = rm.merge(Path("joined.safetensors"), "again.safetensors")
    assert away(applied(adapter(str(again))), applied(adapter("joined.safetensors"))) <= 1e-5


def test_a_file_of_peft_without_a_configuration_stays_a_file() -> None:
    factors = {"lora_A.weight": torch.randn(3, 24), "lora_B.weight": torch.randn(40, 3)}
    save_file({f"base_model.model.mid.linear.{part}": one for part, one in factors.items()}, "alone.safetensors")
    assert resize_lora("alone.safetensors", "small", rank=2).path == Path("small.safetensors")


def test_the_header_tells_the_new_ranks() -> None:
    merge_adapters(adapter(lora("a", 4, 1)) + adapter(lora("b", 3, 2)), "joined.safetensors", dtype="bf16")
    made = load_file("joined.safetensors")
    assert {float(one) for key, one in made.items() if key.endswith("alpha")} == {1.0}
    assert {one.dtype for one in made.values()} == {torch.bfloat16}
    with safe_open("joined.safetensors", "pt") as file:
        told = file.metadata()
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("7", "1.0")


def test_factors_keep_their_type_whatever_that_of_alpha() -> None:
    lora("a", 4, 1)
    tensors = load_file("a.safetensors")
    save_file({key: one if key.endswith("alpha") else one.half() for key, one in tensors.items()}, "a.safetensors")
    resize_lora("a.safetensors", "small.safetensors", rank=2)
    made = load_file("small.safetensors")
    assert {one.dtype for key, one in made.items() if not key.endswith("alpha")} == {torch.float16}


def test_what_comes_to_nothing_is_left_out() -> None:
    a, b = adapter(lora("a", 4, 1)), adapter(lora("b", 3, 2, only="linear"))
    report = merge_adapters(a - a + b, "joined.safetensors")
    assert list(report.ranks) == ["lora_unet_mid_linear"]
    for recipe in (0.0 * a, a - a):
        with pytest.raises(AdapterError, match="the sum of the adapters changes nothing"):
            merge_adapters(recipe, "nothing.safetensors")


def test_no_matrix_of_the_full_size_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (700, 900)
    for name in "ab":
        save_file(
            {"lora_unet_x.lora_up.weight": torch.randn(700, 4), "lora_unet_x.lora_down.weight": torch.randn(4, 900)},
            f"{name}.safetensors",
        )
    sizes: list[int] = []
    plain = Tensor.__matmul__

    def watched(one: Tensor, other: Tensor) -> Tensor:
        found = plain(one, other)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(Tensor, "__matmul__", watched)
    for rank in (None, 5):
        merge_adapters(adapter("a.safetensors") + adapter("b.safetensors"), f"{rank}.safetensors", rank=rank)
    assert 0 < max(sizes) <= 8 * max(shape)


def named(tensors: dict[str, Tensor]) -> Any:
    return MemoryCheckpoint(describe_tensors(tensors, "memory"))


@pytest.mark.parametrize("first", ["original", "diffusers"])
def test_layouts_that_split_a_weight_otherwise_are_brought_together(first: str) -> None:
    """Flux's queries, keys and values are one weight in a single file, and three in diffusers' folders."""
    infos = flux_shapes(16, dtype=DType.F32)
    layouts = Layouts.of(find_arch("flux"), infos)
    source = torch.Generator().manual_seed(0)
    wide = layouts.tensors["original"]["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"].shape
    joint = {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.randn(wide[0], 3, generator=source),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.randn(3, wide[1], generator=source),
    }
    split: dict[str, Tensor] = {}
    for name in ("to_q", "to_k", "to_v"):
        module = f"transformer.transformer_blocks.0.attn.{name}"
        split[f"{module}.lora_B.weight"] = torch.randn(wide[0] // 3, 2, generator=source)
        split[f"{module}.lora_A.weight"] = torch.randn(2, wide[1], generator=source)
    terms = []
    views = []
    for strength, tensors in ((0.5, joint), (2.0, split)):
        view = changes_of(named(tensors), layouts, lambda dialect: pytest.fail("no base is read"))
        assert isinstance(view.checkpoint, ChangesCheckpoint)
        views.append((strength, view))
        terms.append(Term(view.checkpoint, strength, view.made))
    if first == "diffusers":
        terms.reverse()
    joined = JoinedAdapter(terms, None, None, KOHYAS, DType.F64)
    assert list(joined.ranks.values()) == ([9] if first == "original" else [5, 5, 5])
    tensors = {
        key: torch.frombuffer(bytearray(joined.read(key)), dtype=torch.float64).reshape(info.shape)
        for key, info in joined.tensors.items()
    }
    again = changes_of(named(tensors), layouts, lambda dialect: pytest.fail("no base is read"), dtype=torch.float64)
    key = "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"
    made = torch.frombuffer(bytearray(again.read(key)), dtype=torch.float64)
    wanted = sum(
        strength * torch.frombuffer(bytearray(view.read(key)), dtype=torch.float32).double() for strength, view in views
    )
    torch.testing.assert_close(made, wanted, rtol=0.0, atol=1e-4)
    assert list(again.tensors) == [key]


def test_parts_of_a_weight_that_nobody_names_whole_are_refused() -> None:
    layouts = Layouts.of(find_arch("flux"), flux_shapes(16, dtype=DType.F32))
    terms = []
    for module in ("lora_unet_double_blocks_0_img_attn_qkv", "transformer.transformer_blocks.0.attn.to_q"):
        height = 576 if "qkv" in module else 192
        tensors = {f"{module}.lora_up.weight": torch.ones(height, 1), f"{module}.lora_down.weight": torch.ones(1, 192)}
        view = changes_of(named(tensors), layouts, lambda dialect: pytest.fail("no base is read"))
        assert isinstance(view.checkpoint, ChangesCheckpoint)
        terms.append(Term(view.checkpoint, 1.0, view.made))
    assert list(JoinedAdapter(terms[::-1], None, None, KOHYAS, DType.F32).ranks.values()) == [2]
    with pytest.raises(AdapterError, match="name it in several layouts, and none names all of it"):
        narrow = ChangesCheckpoint(
            terms[0].changes.adapter, {}, {}, lambda dialect: pytest.fail("no base is read"), torch.float32
        )
        JoinedAdapter([Term(narrow, 1.0, terms[0].made), terms[1]], None, None, KOHYAS, DType.F32)


def test_what_is_no_product_is_refused() -> None:
    save_file(
        {f"lora_unet_mid_linear.hada_{part}": torch.ones(40, 2) if part[-1] == "a" else torch.ones(2, 24)
         for part in ("w1_a", "w1_b", "w2_a", "w2_b")},
        "loha.safetensors",
    )  # fmt: skip
    a = adapter(lora("a", 4, 1))
    law = r"^loha\.safetensors: lora_unet_mid_linear does not tell the shape of the model's tensor"
    with pytest.raises(AdapterError, match=law):
        merge_adapters(adapter("loha.safetensors") + a, "joined.safetensors")
    law = r"^loha\.safetensors: lora_unet_mid_linear: a LoHa of hada_w1_a, .+, hada_w2_b is no product of two"
    with pytest.raises(AdapterError, match=law) as caught:
        merge_adapters(a + adapter("loha.safetensors"), "joined.safetensors", rank=4, base="base.safetensors")
    assert caught.value.hint == "to_lora(..., rank=32) of it is computed from the difference as a whole"
    assert not Path("joined.safetensors").exists()


def test_numbers_that_nothing_has_are_refused() -> None:
    a = adapter(lora("a", 4, 1))
    for size, law in (({"rank": 0}, "a rank is 1 or more"), ({"energy": 1.5}, "a share of the energy is above 0")):
        with pytest.raises(RecipeError, match=law):
            merge_adapters(a, "joined.safetensors", **size)


def test_a_dora_is_no_product() -> None:
    tensors = load_file(lora("dora", 4, 1, only="linear"))
    save_file({**tensors, "lora_unet_mid_linear.dora_scale": torch.ones(40, 1)}, "dora.safetensors")
    with pytest.raises(AdapterError, match=r"of alpha, dora_scale, lora_down\.weight, lora_up\.weight is no product"):
        merge_adapters("dora.safetensors", "joined.safetensors", base="base.safetensors")
    with pytest.raises(AdapterError, match=r"^dora\.safetensors: this kind of adapter multiplies a model's own"):
        merge_adapters("dora.safetensors", "joined.safetensors")


@pytest.mark.parametrize(
    ("recipe", "law"),
    [
        (lambda a: a * rm.blocks({"mid": 0.5}), "of adapters is no weighted sum with plain numbers"),
        (lambda a: rm.slerp(a, a, alpha=0.5), "slerp of adapters is no weighted sum with plain numbers"),
        (lambda a: rm.model("base.safetensors") + a, "is a model, but adapters alone are joined"),
    ],
)
def test_what_is_no_weighted_sum_of_adapters_is_refused(recipe: Any, law: str) -> None:
    with pytest.raises(RecipeError, match=law):
        merge_adapters(recipe(adapter(lora("a", 4, 1))), "joined.safetensors")


def test_types_that_hold_no_factors_are_refused() -> None:
    with pytest.raises(AdapterError, match="factors are written as F32, F16, BF16, F64, but got F8_E4M3") as caught:
        JoinedAdapter([], None, None, KOHYAS, DType.F8_E4M3)
    assert caught.value.hint == "dtype='fp16'"
