"""mergekit's configurations become recipes, or errors with their place.

After a rendering or a message was changed on purpose, ``REMELT_GOLDEN=write`` writes it anew: read the difference.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import remelt as rm
from remelt.api.recipes import load_recipe
from remelt.errors import MissingExtraError, RecipeSyntaxError, RemeltError
from remelt.recipe.node import Call, Model, Node
from remelt.recipe.walk import topological
from remelt.text.reader import parse_document, read_recipe
from remelt.text.writer import write_recipe

pytest.importorskip("yaml")
CONFIGURATIONS = sorted((Path(__file__).parent / "mergekit").glob("*.y*ml"))


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=[path.stem for path in CONFIGURATIONS])
def test_a_configuration_is_read_or_refused(path: Path, read_as_told: Callable[[Path], str]) -> None:
    found = read_as_told(path)
    if not path.stem.startswith("bad_"):
        assert write_recipe(read_recipe(found)) == found


def test_every_expectation_belongs_to_a_configuration() -> None:
    assert {path.stem for path in CONFIGURATIONS[0].parent.glob("*.out")} == {path.stem for path in CONFIGURATIONS}
    assert sum(path.stem.startswith("bad_") for path in CONFIGURATIONS) >= 20


WORDS = st.sampled_from(
    [
        *("merge_method: linear", "models:", "- model: a", "parameters:", "weight: 1", "&a", "*a", "[", "]", "{", "}"),
        *(", ", "\n", "\n  ", "\n    ", "!!int", "!!set", "!!binary", "? ", ": ", "0x", "1:59", ".inf", "|", "<<"),
        *('"\\U0010', '"', "'"),
    ]
)


@given(st.lists(WORDS, max_size=30).map(" ".join), st.booleans())
def test_no_text_does_more_than_be_read_or_refused(text: str, begun: bool) -> None:
    try:
        assert isinstance(read_recipe(("merge_method: linear\nmodels: " if begun else "---\n") + text, "x.yml"), Node)
    except RecipeSyntaxError as error:
        assert error.span is not None


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
          - {model: b, parameters: {weight: 5e-1}}
        merge_method: linear
    """
    assert last(text) == "0.5 * a + 0.5 * b"


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
        .replace("weight: 0.3", "weight: 1, density: 0.5")
        .replace("weight: 0.6", "weight: 1, density: 0.5")
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
        ("tokenizer: {source: base, pad_to_multiple_of: 64}", 'order="base", pad_to_multiple_of=64)'),
        ("tokenizer: {pad_to_multiple_of: 8}", 'order="union", pad_to_multiple_of=8)'),
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
        ("merge_method: linear", "merge_method: evolve_ties", "the method 'evolve_ties' is not read"),
        ("merge_method: linear", "merge_metod: linear", "config.yml:8:1: 'merge_metod' is not known here"),
        ("          weight: 3", "          weigth: 3", "config.yml:7:7: 'weigth' is not known here"),
        ("          weight: 3", "          density: 3", "the model 'org/second' needs the parameter 'weight'"),
        ("          weight: 3", "          weight: three", "config.yml:7:15: a number is due here, but got 'three'"),
        ("          weight: 3", "          weight: .nan", "a number is due here, but got nan"),
        ("          weight: 3", "          weight: -1", "the weights add up to 0"),
        ("          weight: 3", "          weight: -1.0e+0", "config.yml:7:15: the weights add up to 0"),
        (
            "          weight: 3",
            "          weight: [{filter: x, value: 1}]",
            "config.yml:7:7: 'weight' is needed for every",
        ),
        (
            "          weight: 3",
            "          normalize: false",
            "config.yml:7:7: linear has one 'normalize' for all models",
        ),
        (
            "          weight: 3",
            "          weight: [{filter: x, values: 1}]",
            "config.yml:7:28: 'values' is not known",
        ),
        ("org/second@main", "org/second+", "config.yml:5:12: a model with an adapter is written model+adapter"),
        ("org/second@main", "[]", "a model is a path or a name"),
        ("dtype: float16", "dtype: 16", "config.yml:9:8: an element type is a text"),
        ("dtype: float16", "out_dtype: 16", "config.yml:9:12: an element type is a text"),
        ("dtype: float16", "dtype: float17", "config.yml:9:8: 'float17' is not an element type"),
        ("dtype: float16", "dtype: float16\ndtype: float16", "config.yml:10:1: 'dtype' is told twice: first in line 9"),
        ("dtype: float16", "chat_template: chatml", "config.yml:9:1: chat templates are not put into the result"),
        ("dtype: float16", "on: x", "config.yml:9:1: 'on' is not known here"),
        ("dtype: float16", "1: x", "config.yml:9:1: '1' is not known here"),
        ("dtype: float16", "parameters: {1: 2}", "config.yml:9:14: '1' is not known here"),
        ("dtype: float16", "? [a]\n: b", "config.yml:9:3: a name is a text"),
        ("dtype: float16", "dtype: &a [*a]", "config.yml:9:8: a value cannot stand within itself"),
        ("dtype: float16", "dtype: 2024-01-01", "this is no YAML of texts and numbers, but timestamp"),
        ("dtype: float16", "dtype: !!int ''", "config.yml:9:8: this is no YAML: '' is no int"),
        ("dtype: float16", 'dtype: "\\UFFFFFFFF"', "this is no YAML: OverflowError"),
        ("dtype: float16", "x\u2028y: 1", "config.yml:9:3: this is no YAML: could not find"),
        (
            "          weight: 3",
            f"          weight: {'9' * 400}",
            "config.yml:7:15: a number is due here, but got 9999",
        ),
        (
            "          weight: 3",
            f"          weight: {'9' * 401}",
            "config.yml:7:15: a value has at most 400 characters",
        ),
        ("          weight: 3", f"          weight: 1{':1' * 190}.5", "config.yml:7:15: this is no YAML: '1:1:"),
        ("          weight: 3", f"          weight: {'x' * 90}", f"but got '{'x' * 36}..."),
        ("dtype: float16", "tokenizer_source: [a]", "config.yml:9:19: a model is a path or a name"),
        ("dtype: float16", "tokenizer: {source: union, tokens: {}}", "config.yml:9:28: 'tokens' is not known here"),
        ("dtype: float16", "tokenizer: {pad_to_multiple_of: 0}", "config.yml:9:33: rows are padded to a multiple of a"),
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


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("models: [{model: a}, {model: c}]", "config.yml:2:30: no model is named 'c'"),
        (
            "slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [1, 3]}]}]",
            "config.yml:2:62: b.safetensors has 2 layers in layers, but layers 1 to 3 are asked for",
        ),
        ("models: [{model: a}, {model: b}]\ntokenizer_source: base", "config.yml:2:18: a.safetensors has no tokenizer"),
    ],
)
def test_what_is_found_later_has_its_place(
    told: str, message: str, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    for name in "ab":
        keys = [f"layers.{number}.{part}.weight" for number in range(2) for part in ("attn", "mlp")]
        write_model(tmp_path / name, {key: torch.zeros(2) for key in keys})
    path = tmp_path / "config.yml"
    path.write_text(f"merge_method: linear\n{told}\nparameters: {{weight: 1}}\n", encoding="utf-8")
    with pytest.raises(RemeltError) as caught:
        rm.merge(path, tmp_path / "out.safetensors")
    assert message in str(caught.value)


def test_calls_have_the_place_of_what_asks_for_them() -> None:
    path = Path(__file__).parent / "mergekit" / "filters_of_slices.yml"
    spans = {
        (node.method if isinstance(node, Call) else node.name, str(node.span))
        for node in topological(load_recipe(path).recipe)
        if isinstance(node, (Call, Model))
    }
    assert {
        ("stack_layers", f"{path.name}:1:1"),
        ("layers", f"{path.name}:3:33"),
        ("ties_sum", f"{path.name}:10:15"),
        ("add_difference", f"{path.name}:5:65"),
        ("add_difference", f"{path.name}:11:35"),
    } <= spans
    assert all(span.startswith(path.name) for _, span in spans)


@pytest.mark.parametrize("first", ["---", "%YAML 1.1\n---", "--- # of mergekit", "# a comment\n\n---"])
def test_a_text_may_begin_as_yaml_does(first: str) -> None:
    assert parse_document(f"{first}\n{textwrap.dedent(LINEAR)}").grammar == "mergekit's YAML"


def test_a_file_of_yaml_may_hold_another_grammar() -> None:
    assert parse_document('version 1\nmodel("a")', "recipe.yml").grammar == "version 1"
    with pytest.raises(RecipeSyntaxError, match="a recipe's first line states its version"):
        parse_document("merge_methd: linear", "recipe.txt")
    with pytest.raises(RecipeSyntaxError, match=r"CONFIG.YML:1:1: 'merge_methd' is not known here"):
        parse_document("merge_methd: linear", "CONFIG.YML")


def test_a_suffix_may_be_in_capitals(tmp_path: Path) -> None:
    path = tmp_path / "NM.YML"
    path.write_text(textwrap.dedent(LINEAR), encoding="utf-8")
    assert load_recipe(path).recipe.digest() == read(LINEAR).digest()


def test_its_grammar_is_told() -> None:
    assert parse_document(textwrap.dedent(LINEAR)).grammar == "mergekit's YAML"


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingExtraError, match="reading mergekit's YAML needs PyYAML") as caught:
        read(LINEAR)
    assert caught.value.hint == 'pip install "remelt[mergekit]"'
