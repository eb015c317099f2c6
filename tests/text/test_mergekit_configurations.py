"""mergekit's configurations become recipes, or errors with their place."""

from __future__ import annotations

import sys
import textwrap

import pytest

from remelt.errors import MissingExtraError, RecipeSyntaxError
from remelt.recipe.node import Node
from remelt.text.reader import parse_document, read_recipe
from remelt.text.writer import write_recipe

pytest.importorskip("yaml")


def read(text: str) -> Node:
    return read_recipe(textwrap.dedent(text), "config.yml")


def last(text: str) -> str:
    """What the recipe's text says after its models."""
    lines = write_recipe(read(text)).splitlines()
    return "\n".join(line for line in lines[1:] if " = model(" not in line)


LINEAR = """\
    models:
      - model: org/first
        parameters:
          weight: 1.0
      - model: org/second@main
        parameters:
          weight: 3
    merge_method: linear
    dtype: float16
"""


def test_linear() -> None:
    assert last(LINEAR) == 'cast(0.25 * first + 0.75 * second, dtype="float16")'
    assert 'model("org/second")' in write_recipe(read(LINEAR))


def test_parameters_are_those_of_the_model_or_else_of_all() -> None:
    text = """\
        parameters: {weight: 0.5, normalize: false}
        models:
          - {model: a}
          - {model: b, parameters: {weight: 2e-1}}
        merge_method: linear
    """
    assert last(text) == "0.5 * a + 0.2 * b"


def test_slerp_with_filters_and_gradients() -> None:
    text = """\
        slices:
          - sources:
              - model: a
                layer_range: [0, 32]
              - model: b
                layer_range: [0, 32]
        merge_method: slerp
        base_model: a
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.5, 0.3, 0.7, 1]
            - filter: mlp
              value: [1, 0.5, 0.7, 0.3, 0]
            - value: 0.5
        dtype: bfloat16
    """
    recipe = read(text)
    (stack,) = recipe.children[:1]
    (part,) = stack.children
    text_of = write_recipe(part)
    assert "slerp_plain(layers(a, 0, 32), layers(b, 0, 32)," in text_of.replace("\n    ", " ").replace("( ", "(")
    assert "depth([0.0, 0.5, 0.3, 0.7, 1.0])" in text_of
    assert text_of.count("| 0.5") == 1


def test_task_arithmetic_and_ties() -> None:
    text = """\
        models:
          - model: base
          - model: a
            parameters: {weight: 0.3}
          - model: b
            parameters: {weight: 0.6}
        merge_method: task_arithmetic
        base_model: base
        parameters: {lambda: 0.9}
    """
    assert last(text) == "step1 = 0.3 * (a - base) + 0.6 * (b - base)\nadd_difference(base, step1, alpha=0.9)"
    ties = (
        text.replace("task_arithmetic", "ties")
        .replace("weight: 0.3", "density: 0.5")
        .replace("weight: 0.6", "density: 0.5")
    )
    assert last(ties).splitlines() == [
        "step1 = ties_sum(a - base, b - base, k=0.5, vote_sgn=True)",
        "add_difference(base, step1, alpha=0.9)",
    ]


def test_ties_of_weights_and_densities_by_model() -> None:
    text = """\
        models:
          - {model: a, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
          - {model: b, parameters: {density: 0.5, weight: [{filter: mlp, value: 0.5}, {value: 0}]}}
        merge_method: ties
        base_model: base
        parameters: {normalize: false, int8_mask: true}
    """
    (ties,) = [line for line in last(text).replace("\n    ", " ").splitlines() if "ties_sum" in line]
    assert "k=[depth([1.0, 0.7, 0.1]) | 1.0, 0.5]" in ties
    assert 'weights=[1.0, keys({"*mlp*": 0.5}, optional=True) | 0.0]' in ties
    assert "vote_sgn=True, normalize=False" in ties


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("tokenizer_source: union", 'order="union")'),
        ("tokenizer_source: base\nbase_model: org/second", 'base=second, order="base")'),
        ("tokenizer: {source: org/first}", "order=first)"),
        ("tokenizer_source: {model: {path: org/second}}", "order=second)"),
    ],
)
def test_a_tokenizer_is_a_vocabulary(told: str, said: str) -> None:
    merged = last(textwrap.dedent(LINEAR).replace("dtype: float16", told))
    assert merged == f"align_vocabulary(0.25 * first + 0.75 * second, {said}"


def test_layers_are_stacked() -> None:
    text = """\
        slices:
          - sources:
              - {model: a, layer_range: [0, 16]}
          - sources:
              - {model: b, layer_range: [8, 24]}
        merge_method: passthrough
        dtype: bfloat16
    """
    assert last(text) == 'step1 = stack_layers(layers(a, 0, 16), layers(b, 8, 24))\ncast(step1, dtype="bfloat16")'


def test_a_gradient_of_one_slice_keeps_its_layers() -> None:
    text = """\
        slices:
          - sources:
              - {model: a, layer_range: [0, 2]}
          - sources:
              - {model: a, layer_range: [0, 3]}
              - {model: b, layer_range: [4, 7]}
            parameters: {t: [0, 1]}
        merge_method: slerp
        base_model: a
    """
    with pytest.raises(RecipeSyntaxError, match="slerp takes the base and one more model, but got 0 more"):
        read(text)
    found = write_recipe(
        read(
            text.replace(
                "[0, 2]}", "[0, 2]}\n              - {model: b, layer_range: [0, 2]}\n            parameters: {t: 0.25}"
            )
        )
    )
    assert "depth([0.0, 0.0, 0.0, 0.5, 1.0])" in found


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("merge_method: linear", "merge_method: linnear", "config.yml:8:15: the method 'linnear' is not read"),
        ("merge_method: linear", "merge_method: dare_ties", "the method 'dare_ties' is not read"),
        ("merge_method: linear", "merge_metod: linear", "config.yml:8:1: 'merge_metod' is not known here"),
        ("          weight: 3", "          weigth: 3", "config.yml:7:7: 'weigth' is not known here"),
        ("          weight: 3", "          density: 3", "the model 'org/second' needs the parameter 'weight'"),
        ("          weight: 3", "          weight: three", "config.yml:7:15: a number is due here, but got 'three'"),
        ("          weight: 3", "          weight: .nan", "a number is due here, but got nan"),
        ("          weight: 3", "          weight: -1", "the weights add up to 0"),
        ("          weight: 3", "          weight: [1, 2]", "that are normalised add up to 1 everywhere"),
        (
            "          weight: 3",
            "          weight: [{filter: x, values: 1}]",
            "config.yml:7:28: 'values' is not known",
        ),
        ("org/second@main", "org/second+lora", "config.yml:5:12: adapters are not merged yet"),
        ("org/second@main", "[]", "a model is a path or a name"),
        ("dtype: float16", "dtype: 16", "an element type is a text"),
        ("dtype: float16", "tokenizer_source: [a]", "config.yml:9:19: a model is a path or a name"),
        ("dtype: float16", "tokenizer: {source: union, tokens: {}}", "config.yml:9:28: 'tokens' is not known here"),
        ("dtype: float16", "tokenizer: {source: a}\ntokenizer_source: a", "config.yml:10:1: a tokenizer is told once"),
        ("dtype: float16", "slices: []", "a configuration names either models or slices"),
        ("dtype: float16", "dtype: [", "config.yml:10:1: this is no YAML"),
        ("dtype: float16", "dtype: !!python/object/apply:os.system [ls]", "this is no YAML"),
        ("dtype: float16", "parameters: {<<: {a: 1}}", "mappings are not put into others here"),
    ],
)
def test_what_cannot_be_said_has_its_place(old: str, new: str, message: str) -> None:
    text = textwrap.dedent(LINEAR)
    assert old.strip() in text
    wrong = text.replace(old.strip(), new.strip())
    with pytest.raises(RecipeSyntaxError) as caught:
        read(wrong)
    assert message in str(caught.value)


def test_its_grammar_is_told() -> None:
    assert parse_document(textwrap.dedent(LINEAR)).grammar == "mergekit's YAML"


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingExtraError, match="reading mergekit's YAML needs PyYAML") as caught:
        read(LINEAR)
    assert caught.value.hint == 'pip install "remelt[mergekit]"'
