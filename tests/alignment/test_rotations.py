"""Heads are turned to where they lie nearest: the function stays, the distance never grows, norms forbid it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remelt.alignment.matching import match
from remelt.alignment.permutation import permuted, random_permutation
from remelt.alignment.rotations import find_rotations, rotatable, rotated, rotated_tensor, turns_by_key
from remelt.alignment.weights import TensorWeights
from remelt.archs.axes.draft import Drafts
from remelt.archs.axis_groups import AxisGroup
from remelt.errors import RefusedError

Tensors = dict[str, torch.Tensor]
WIDTH, HEADS, QUERIES, SIZE = 12, 3, 2, 4


def attention(seed: int, *, fused: bool = False, dtype: torch.dtype = torch.float64) -> Tensors:
    """Grouped queries; with ``fused`` one matrix of all three, as `torch.nn.MultiheadAttention` has."""
    source = torch.Generator().manual_seed(seed)
    if fused:
        shapes = {"in_proj_weight": (3 * HEADS * SIZE, WIDTH), "in_proj_bias": (3 * HEADS * SIZE,)}
        shapes |= {"o.weight": (WIDTH, HEADS * SIZE), "o.bias": (WIDTH,)}
    else:
        rows = {"q": HEADS * QUERIES * SIZE, "k": HEADS * SIZE, "v": HEADS * SIZE}
        shapes = {f"{name}.weight": (count, WIDTH) for name, count in rows.items()}
        shapes |= {f"{name}.bias": (count,) for name, count in rows.items()}
        shapes |= {"o.weight": (WIDTH, HEADS * QUERIES * SIZE), "o.bias": (WIDTH,)}
    return {key: torch.randn(shape, generator=source, dtype=torch.float64).to(dtype) for key, shape in shapes.items()}


def groups_of(tensors: Tensors, *, norms: tuple[str, ...] = (), rotary: bool = False) -> tuple[AxisGroup, ...]:
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    drafts = Drafts(shapes | dict.fromkeys((f"{name}.weight" for name in norms), (HEADS * SIZE,)))
    fused = "in_proj_weight" in tensors
    stream = drafts.fixed("stream", WIDTH).made_by("o")
    heads = drafts.attention("heads", HEADS, SIZE, queries=1 if fused else QUERIES, rotary=rotary)
    if fused:
        stream.window("in_proj_weight", 1)
        for place, level in enumerate(("qk", "qk", "value")):
            for key in ("in_proj_weight", "in_proj_bias"):
                heads.window(key, 0, ("head", level), offset=place * HEADS * SIZE)
        heads.read_by("o", ("head", "value"))
    else:
        stream.read_by("q").read_by("k").read_by("v")
        heads.made_by("q", ("head", "query", "qk")).made_by("k", ("head", "qk"))
        heads.made_by("v", ("head", "value")).read_by("o", ("head", "query", "value"))
    for name in norms:
        heads.normalised_by(name, ("head", "qk"))
    return drafts.finished()


def answers(tensors: Tensors) -> torch.Tensor:
    given = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    if "in_proj_weight" in tensors:
        q, k, v = (given @ tensors["in_proj_weight"].T + tensors["in_proj_bias"]).chunk(3, dim=-1)
    else:
        q, k, v = (given @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"] for name in "qkv")
    queries = q.shape[-1] // k.shape[-1]
    q = q.unflatten(-1, (-1, SIZE)).transpose(1, 2)
    k, v = (one.unflatten(-1, (HEADS, SIZE)).repeat_interleave(queries, dim=2).transpose(1, 2) for one in (k, v))
    found = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return found @ tensors["o.weight"].T + tensors["o.bias"]


def orthogonal(seed: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(HEADS, SIZE, SIZE, generator=source, dtype=torch.float64))[0]


def nearness(one: Tensors, other: Tensors) -> float:
    return sum(float((one[key].double() * other[key].double()).sum()) for key in one)


@pytest.mark.parametrize("fused", [False, True])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=20)
def test_the_function_stays_and_the_models_come_nearer(fused: bool, seed: int) -> None:
    reference, model = attention(seed, fused=fused), attention(seed + 1, fused=fused)
    groups = groups_of(model)
    found = match(TensorWeights(reference), TensorWeights(model), groups)
    rotations = find_rotations(TensorWeights(reference), TensorWeights(model), groups, found.permutations)
    aligned = permuted(model, found.permutations.values())
    turned = rotated(aligned, groups, rotations)
    assert set(rotations["heads"]) == {"qk", "value"}
    assert float((answers(turned) - answers(model)).abs().max() / answers(model).abs().max()) < 1e-10
    assert nearness(reference, turned) > nearness(reference, aligned)


@pytest.mark.parametrize("fused", [False, True])
def test_planted_rotations_and_permutations_are_undone(fused: bool) -> None:
    reference = attention(1, fused=fused)
    groups = groups_of(reference)
    planted = {"heads": {"qk": orthogonal(2), "value": orthogonal(3)}}
    (moved,) = (random_permutation(group, np.random.default_rng(4)) for group in groups if not group.is_fixed)
    model = permuted(rotated(reference, groups, planted), [moved])
    permutations = {"heads": moved.inverse()}
    rotations = find_rotations(TensorWeights(reference), TensorWeights(model), groups, permutations)
    for level, matrices in planted["heads"].items():
        assert torch.allclose(rotations["heads"][level] @ matrices, torch.eye(SIZE, dtype=torch.float64), atol=1e-6)
    back = rotated(permuted(model, permutations.values()), groups, rotations)
    assert all(torch.allclose(back[key], reference[key], atol=1e-5) for key in reference)


def test_nothing_is_turned_where_nothing_is_gained() -> None:
    model = attention(1)
    assert find_rotations(TensorWeights(model), TensorWeights(model), groups_of(model), {}) == {}


def test_one_tensor_alone_is_turned_as_the_whole_model_is() -> None:
    model = attention(1, dtype=torch.float16)
    groups = groups_of(model)
    planted = {"heads": {"value": orthogonal(3)}}
    turned = rotated(model, groups, planted)
    turns = turns_by_key(groups, planted, {key: tuple(one.shape) for key, one in model.items()})
    assert set(turns) == {"v.weight", "v.bias", "o.weight"}
    for key, one in model.items():
        alone = rotated_tensor(one, turns[key]) if key in turns else one
        assert alone.dtype == torch.float16
        assert alone.equal(turned[key])
    exact = rotated({key: one.double() for key, one in model.items()}, groups, planted)
    assert all(torch.allclose(turned[key].double(), exact[key], atol=2e-2) for key in exact)


def test_rotary_embeddings_leave_only_values() -> None:
    model = attention(1)
    (heads,) = (group for group in groups_of(model, rotary=True) if not group.is_fixed)
    assert rotatable(heads, {key: tuple(one.shape) for key, one in model.items()}) == ("value",)


def test_norms_of_queries_forbid_to_rotate_them() -> None:
    model = attention(1) | {"k_norm.weight": torch.ones(HEADS * SIZE, dtype=torch.float64)}
    groups = groups_of(model, norms=("k_norm",))
    found = find_rotations(TensorWeights(attention(2) | model), TensorWeights(attention(3) | model), groups, {})
    assert "qk" not in found.get("heads", {})
    with pytest.raises(RefusedError, match="level qk of heads may only be permuted: something lies on it that is no"):
        rotated(model, groups, {"heads": {"qk": orthogonal(1)}})


def test_rotations_of_another_shape_or_model_are_refused() -> None:
    model = attention(1)
    with pytest.raises(RefusedError, match=r"level value of heads is rotated by \[3, 4, 4\], got \[2, 4, 4\]"):
        rotated(model, groups_of(model), {"heads": {"value": orthogonal(1)[:2]}})
    with pytest.raises(RefusedError, match="but it has no group tails"):
        rotated(model, groups_of(model), {"tails": {"value": orthogonal(1)}})
