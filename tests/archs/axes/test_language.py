"""The axis groups of language models: on the shapes of real ones, and where shapes do not tell all."""

from __future__ import annotations

import pytest

from remelt.archs.axes.find import axis_groups
from remelt.archs.axes.heads import HeadRule
from remelt.archs.axes.language import heads_of_configuration
from remelt.archs.axis_groups import AxisGroup, faults, keys_of
from remelt.archs.shapes import llama_shapes, other_shapes
from remelt.errors import RefusedError

HEADS = {"model": HeadRule(size=16)}
LLAMA = {key: info.shape for key, info in llama_shapes(2, 64, heads=8, key_heads=2).items()}
LLAMA_HEADS = {"model": HeadRule(size=8)}


def shapes_of(arch: str) -> dict[str, tuple[int, ...]]:
    return {key: info.shape for key, info in other_shapes(arch).items()}


def structures(groups: tuple[AxisGroup, ...]) -> dict[str, str]:
    return {group.name: group.structure for group in groups}


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("arch", ["gemma2", "gemma3", "glm", "llama", "phi3", "qwen2", "qwen3"])
def test_every_axis_of_a_real_model_is_in_one_group(arch: str, told: bool) -> None:
    shapes = shapes_of(arch)
    groups = axis_groups(arch, shapes, HEADS if told else {})
    assert list(faults(groups, shapes)) == []
    assert any(group.structure == "heads" for group in groups) is (told or arch in ("gemma3", "qwen3"))


def test_heads_of_keys_take_their_queries_along_and_nothing_moves_within() -> None:
    attention = next(one for one in axis_groups("llama", LLAMA, LLAMA_HEADS) if one.name == "layers.0.self_attn")
    assert [(level.name, level.size, level.below, level.fixed) for level in attention.levels] == [
        ("head", 2, (), False),
        ("query", 4, ("head",), False),
        ("qk", 8, (), True),
        ("value", 8, ("head",), False),
    ]
    assert [(window.key.split(".")[-2], window.levels) for window in attention.windows] == [
        ("q_proj", ("head", "query", "qk")),
        ("k_proj", ("head", "qk")),
        ("v_proj", ("head", "value")),
        ("o_proj", ("head", "query", "value")),
    ]


def test_heads_of_which_nothing_tells_stay_as_they_are() -> None:
    found = structures(axis_groups("llama", LLAMA))
    attention = {f"layers.{layer}.self_attn.{part}" for layer in (0, 1) for part in ("queries", "keys", "values")}
    assert {name for name, structure in found.items() if structure == "fixed"} == attention | {"words_in", "words_out"}
    assert found["stream"] == found["layers.1.mlp"] == "free"


def test_a_norm_as_wide_as_all_queries_does_not_tell_how_wide_a_head_is() -> None:
    norms = {f"model.layers.{layer}.self_attn.{part}_norm.weight": (64 if part == "q" else 16,)
             for layer in (0, 1) for part in "qk"}  # fmt: skip
    shapes = {**LLAMA, **norms}
    unknown, known = axis_groups("llama", shapes), axis_groups("llama", shapes, LLAMA_HEADS)
    assert list(faults(unknown, shapes)) == list(faults(known, shapes)) == []
    assert structures(unknown)["layers.0.self_attn.queries"] == "fixed"
    moved = {window.key: window.levels for group in known if group.structure == "heads" for window in group.windows}
    assert moved["model.layers.0.self_attn.q_norm.weight"] == ("head", "query", "qk")


def test_a_model_without_a_head_of_its_own_has_its_embeddings_for_it() -> None:
    shapes = {key: info.shape for key, info in llama_shapes(tied=True).items()}
    groups = axis_groups("llama", shapes)
    assert structures(groups)["stream"] == "free" and "words_out" not in structures(groups)


def test_what_sees_images_is_left_as_it_is_with_the_stream_that_it_writes_to() -> None:
    shapes = shapes_of("gemma3")
    moved = {
        key for group in axis_groups("gemma3", shapes) if not group.is_fixed
        for window in group.windows for key in keys_of(group, window)
    }  # fmt: skip
    assert not any("vision" in key or "projector" in key or "embed_tokens" in key for key in moved)
    assert any("mlp.gate_proj" in key for key in moved)


def test_unknown_tensors_are_reported() -> None:
    shapes = {**LLAMA, "model.layers.0.mlp.router.weight": (4, 64)}
    assert list(faults(axis_groups("llama", shapes), shapes)) == [
        "'model.layers.0.mlp.router.weight' has 4 elements of axis 0 that no group has",
        "'model.layers.0.mlp.router.weight' has 64 elements of axis 1 that no group has",
    ]


def test_a_model_without_words_is_refused() -> None:
    with pytest.raises(RefusedError) as refused:
        axis_groups("llama", {"layers.0.mlp.down_proj.weight": (4, 4)})
    assert str(refused.value) == (
        "a language model has a table of words, but there is no 'model.embed_tokens.weight'\n"
        "hint: give a whole model, with the keys that transformers writes"
    )


@pytest.mark.parametrize(
    ("configuration", "heads"),
    [
        ({"head_dim": 128, "hidden_size": 2560, "num_attention_heads": 32}, {"model": HeadRule(size=128)}),
        ({"head_dim": None, "hidden_size": 4096, "num_attention_heads": 32}, {"model": HeadRule(size=128)}),
        ({"text_config": {"head_dim": 256}, "hidden_size": 8}, {"model": HeadRule(size=256)}),
        ({"hidden_size": 4096}, {}),
    ],
)
def test_a_configuration_tells_how_wide_a_head_is(configuration: dict[str, object], heads: dict[str, HeadRule]) -> None:
    assert heads_of_configuration(configuration) == heads
