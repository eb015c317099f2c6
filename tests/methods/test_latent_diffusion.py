"""Methods over several keys: what a model computes stays as it is, or changes places."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import remelt as rm
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.methods import METHODS
from remelt.testing import MethodConformance

balance, exchange = METHODS["balance_attention"], METHODS["exchange_ema"]

UNET = "model.diffusion_model.middle_block.1.transformer_blocks.0"
CLIP = "conditioner.embedders.0.transformer.text_model.encoder.layers.3"
OPEN_CLIP = "conditioner.embedders.1.model.transformer.resblocks.2"
SHAPES: dict[str, tuple[int, ...]] = {
    **{
        f"{UNET}.{attention}.{name}": shape
        for attention, context in (("attn1", 192), ("attn2", 320))
        for name, shape in {
            "to_q.weight": (128, 192),
            "to_k.weight": (128, context),
            "to_v.weight": (128, context),
            "to_out.0.weight": (192, 128),
            "to_out.0.bias": (192,),
        }.items()
    },
    **{
        f"{CLIP}.self_attn.{name}_proj.{kind}": shape
        for name in ("q", "k", "v", "out")
        for kind, shape in {"weight": (128, 128), "bias": (128,)}.items()
    },
    f"{OPEN_CLIP}.attn.in_proj_weight": (384, 128),
    f"{OPEN_CLIP}.attn.in_proj_bias": (384,),
    f"{OPEN_CLIP}.attn.out_proj.weight": (128, 128),
    f"{OPEN_CLIP}.attn.out_proj.bias": (128,),
    "first_stage_model.decoder.mid.attn_1.q.weight": (128, 128, 1, 1),
    "first_stage_model.decoder.mid.attn_1.k.weight": (128, 128, 1, 1),
}
AVERAGED: dict[str, tuple[int, ...]] = {
    "model.diffusion_model.out.0.weight": (320,),
    "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
    "model.diffusion_model.time_embed.0.bias": (7,),
    "model_ema.diffusion_modelout0weight": (320,),
    "model_ema.diffusion_modelout2weight": (4, 320, 3, 3),
    "model_ema.decay": (),
    "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
}
INTENDED = {
    (
        "balance_attention",
        "strength",
    ): "sd-mecha's transform exchanges the strengths of queries and keys; remelt's root of it makes them equal",
    ("balance_attention", "vae"): "sd-mecha stops at the VAE's kernels, which remelt leaves as they are",
}
"""Where remelt is meant to differ from sd-mecha, and why; a test for each shows it."""


def drawn(
    shapes: Mapping[str, tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator, dtype=torch.float64).mul(1.0 + 3.0 * (place % 3)).to(dtype)
        for place, (key, shape) in enumerate(shapes.items())
    }


def gap(found: Tensor, due: Tensor) -> float:
    return float((found.double() - due.double()).abs().max()) if due.numel() else 0.0


def groups(method: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, ...]]:
    keys = method.declaration.keys
    assert keys is not None
    found = keys({key: TensorInfo(DType.F32, shape) for key, shape in shapes.items()})
    assert all(group.inputs == group.outputs for group in found)
    return [group.inputs for group in found]


def balanced(model: Mapping[str, Tensor], **values: int) -> dict[str, Tensor]:
    """The method on every group of keys."""
    result = dict(model)
    for keys in groups(balance, {key: tuple(tensor.shape) for key, tensor in model.items()}):
        result |= balance.on({key: model[key] for key in keys}, **values)
    return result


def projections(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By attention, the rows of queries, keys, values and outputs, with biases for another column."""
    found = {}
    for attention in ("attn1", "attn2"):
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            weight = model[f"{UNET}.{attention}.{name}.weight"]
            found[f"{attention} {name[3]}"] = weight.T if name == "to_out.0" else weight
    for name in ("q", "k", "v", "out"):
        weight, bias = (model[f"{CLIP}.self_attn.{name}_proj.{kind}"] for kind in ("weight", "bias"))
        found[f"clip {name[0]}"] = weight.T if name == "out" else torch.cat((weight, bias[:, None]), 1)
    weight, bias, out = (
        model[f"{OPEN_CLIP}.attn.{name}"] for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight")
    )
    parts = torch.cat((weight, bias[:, None]), 1).chunk(3)
    found |= {f"open {name}": part for name, part in zip("qkvo", (*parts, out.T), strict=True)}
    return {name: rows.double() for name, rows in found.items()}


def products(rows: Tensor, other: Tensor, size: int, *, within: bool) -> Tensor:
    """Of the rows of each head with themselves, or over them with the other's."""
    x, y = rows.unflatten(0, (-1, size)), other.unflatten(0, (-1, size))
    return x @ y.mT if within else x.mT @ y


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("values", "size"), [({}, 64), ({"head_size": 32}, 32), ({"heads": 8}, 16)], ids=str)
def test_attention_computes_what_it_did_with_equal_strengths(
    dtype: torch.dtype, values: dict[str, int], size: int
) -> None:
    model = drawn(SHAPES, dtype=dtype)
    result = balanced(model, **values)
    bound = 1e-9 if dtype == torch.float64 else 1e-4
    before, after = projections(model), projections(result)
    for attention in ("attn1", "attn2", "clip", "open"):
        for first, second in (("q", "k"), ("v", "o")):
            old, now = ([rows[f"{attention} {name}"] for name in (first, second)] for rows in (before, after))
            was = products(*old, size, within=False)
            assert gap(products(*now, size, within=False), was) <= bound * float(was.abs().max())
            strengths = [products(rows, rows, size, within=True) for rows in now]
            assert gap(*strengths) <= bound * float(strengths[0].abs().max())
            assert gap(old[0], now[0]) > 0.1
    for key, tensor in model.items():
        assert result[key].dtype == dtype
        if key.endswith(("out.0.bias", "out_proj.bias")) or "first_stage" in key:
            assert torch.equal(result[key], tensor)


def test_a_layer_gives_the_same_activations() -> None:
    model = drawn(SHAPES)
    hidden, context = (torch.randn(2, 9, width, dtype=torch.float64) for width in (192, 320))

    def attend(held: Mapping[str, Tensor]) -> Tensor:
        name = f"{UNET}.attn2"
        q = hidden @ held[f"{name}.to_q.weight"].T
        k, v = (context @ held[f"{name}.{part}.weight"].T for part in ("to_k", "to_v"))
        q, k, v = (part.unflatten(-1, (2, 64)).transpose(1, 2) for part in (q, k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(1e-3 * q, k, v)
        return mixed.transpose(1, 2).flatten(2) @ held[f"{name}.to_out.0.weight"].T

    assert gap(attend(balanced(model)), attend(model)) < 1e-8 * float(attend(model).abs().max())


def test_the_root_of_sd_mechas_transform_is_taken() -> None:
    """Its transform S makes of q what has the strength of k; ours, applied twice, would."""
    module = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods.balance_attention.algorithms")
    model = drawn(SHAPES)
    before, after = projections(model), projections(balanced(model))
    for attention in ("attn1", "attn2", "clip", "open"):
        for first, second in (("q", "k"), ("v", "o")):
            q, k = (before[f"{attention} {name}"].unflatten(0, (-1, 64)) for name in (first, second))
            their_q, their_k = module.balance_head_energy(q.clone(), k.clone())
            assert gap(their_q @ their_q.mT, k @ k.mT) < 1e-3 * float((k @ k.mT).max())  # exchanged
            assert gap(their_k @ their_k.mT, q @ q.mT) < 1e-3 * float((q @ q.mT).max())
            ours = after[f"{attention} {first}"].unflatten(0, (-1, 64))
            root = torch.linalg.lstsq(q.mT, ours.mT).solution.mT
            assert gap(root @ ours, their_q) < 1e-4 * float(their_q.abs().max())


def test_sd_mecha_stops_at_the_vae() -> None:
    module = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods.balance_attention.sdxl_sgm")
    stem = "first_stage_model.decoder.mid.attn_1"
    keys = tuple(f"{stem}.{name}" for name in ("k.bias", "k.weight", "proj_out.weight", "q.bias", "q.weight"))
    keys = (*keys, f"{stem}.v.bias", f"{stem}.v.weight")
    model = drawn({key: (128,) if key.endswith("bias") else (128, 128, 1, 1) for key in keys})
    with pytest.raises(RuntimeError):
        module.extract_qkvo_sdxl_sgm(model, keys)
    assert groups(balance, {key: tuple(tensor.shape) for key, tensor in model.items()}) == []


def test_which_attention_is_understood() -> None:
    assert len(groups(balance, SHAPES)) == 4 + 2 + 1
    flux = {f"blocks.0.attn.{name}.weight": (128, 128) for name in ("to_q", "to_k", "to_v", "to_out.0")}
    assert len(groups(balance, flux)) == 2
    assert groups(balance, flux | {"blocks.0.attn.norm_q.weight": (64,)}) == []
    llama = {f"model.layers.0.self_attn.{name}_proj.weight": (128, 128) for name in ("q", "k", "v", "o")}
    assert groups(balance, llama) == []  # their positions are turned into queries and keys
    grouped = {"attn1.to_q.weight": (128, 64), "attn1.to_k.weight": (64, 64)}
    assert groups(balance, grouped) == []
    assert groups(balance, {"attn1.to_q.weight": (128, 64)}) == []
    lone = {"attn1.to_q.weight": (64, 64), "attn1.to_k.weight": (64, 64), "attn1.to_q.bias": (64,)}
    assert groups(balance, lone) == []
    assert groups(balance, {}) == []


@pytest.mark.parametrize("values", [{"head_size": 60}, {"heads": 7}, {"heads": 1000}], ids=str)
def test_what_is_no_whole_heads_stays_as_it_is(values: dict[str, int]) -> None:
    model = drawn(SHAPES)
    result = balanced(model, **values)
    assert all(torch.equal(result[key], tensor) for key, tensor in model.items())


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e-310, 1e308])
def test_what_has_no_strength_stays_as_it_is(value: float) -> None:
    model = drawn(SHAPES)
    for key in (f"{UNET}.attn1.to_k.weight", f"{OPEN_CLIP}.attn.out_proj.weight"):
        model[key] = torch.full_like(model[key], value)
    result = balanced(model)
    query = f"{UNET}.attn1.to_q.weight"
    assert torch.equal(result[query], model[query])
    assert all(bool(result[key].isfinite().all()) for key in result if bool(model[key].isfinite().all()))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 100), size=st.sampled_from([1, 2, 3, 6]), scale=st.floats(1e-6, 1e6))
def test_balance_is_kept_once_it_is_found(seed: int, size: int, scale: float) -> None:
    model = drawn({"attn.to_q.weight": (6, 11), "attn.to_k.weight": (6, 9)}, seed=seed)
    model["attn.to_k.weight"] *= scale
    once = balance.on(model, head_size=size)
    twice = balance.on(once, head_size=size)
    for key, tensor in once.items():
        assert gap(twice[key], tensor) < 1e-6 * float(tensor.abs().max())
    q, k = once.values()
    assert gap(q.T @ k, model["attn.to_q.weight"].T @ model["attn.to_k.weight"]) < 1e-7 * scale


def by_sd_mecha(model: dict[str, Tensor], key: str) -> Tensor:
    """Its method for Stable Diffusion 1 at one key."""
    sd_mecha = pytest.importorskip("sd_mecha")
    method = sd_mecha.extensions.merge_methods.resolve("exchange_ema_'sd1-ldm'")

    class StateDict(dict[str, Tensor]):
        model_config = SimpleNamespace(keys=lambda: model)

    result: Tensor = method.__wrapped__(StateDict(model), key=key)
    return result


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_averages_change_places_as_in_sd_mecha(monkeypatch: pytest.MonkeyPatch, executor: str) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    model = drawn(AVERAGED, dtype=torch.float32)
    found = rm.merge(exchange(rm.model(model)), threads=2)
    assert set(found) == set(model)
    for key in model:
        assert torch.equal(found[key], by_sd_mecha(model, key))
    weight, average = "model.diffusion_model.out.0.weight", "model_ema.diffusion_modelout0weight"
    assert torch.equal(found[weight], model[average])
    again = rm.merge(exchange(rm.model(found)))
    assert all(torch.equal(again[key], tensor) for key, tensor in model.items())


def test_an_average_of_another_shape_stays_where_it_is() -> None:
    assert len(groups(exchange, AVERAGED)) == 2
    odd = AVERAGED | {"model_ema.diffusion_modelout0weight": (321,)}
    assert len(groups(exchange, odd)) == 1
    assert groups(exchange, {}) == []
    twins = {"model.a.b": (2,), "model.ab": (2,), "model_ema.ab": (2,)}  # one average, two that it may be of
    assert len(groups(exchange, twins)) == 1
    assert groups(exchange, twins) == groups(exchange, dict(reversed(twins.items())))


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_a_merge_balances_every_attention(monkeypatch: pytest.MonkeyPatch, executor: str) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    model = drawn(SHAPES)
    found = rm.merge(balance(rm.model(model)), threads=2, compute_dtype="float64")
    due = balanced(model)
    assert set(found) == set(due)
    for key, tensor in due.items():
        assert gap(found[key], tensor) < 1e-9 * float(tensor.abs().max())
    mixed = rm.merge(rm.weighted_sum(balance(rm.model(model)), rm.model(model), alpha=0.5), compute_dtype="float64")
    assert all(gap(mixed[key], (due[key] + model[key]) / 2.0) < 1e-6 for key in due)


class TestBalanceAttention(MethodConformance):
    @pytest.fixture
    def method(self) -> Any:
        return balance

    @pytest.fixture
    def shapes(self) -> Any:
        return SHAPES


class TestExchangeEma(MethodConformance):
    @pytest.fixture
    def method(self) -> Any:
        return exchange

    @pytest.fixture
    def shapes(self) -> Any:
        return AVERAGED
