"""Values as people type them on a command line."""

from __future__ import annotations

import pytest

import remelt as rm
from remelt.errors import RecipeError
from remelt.recipe.blocks import Search
from remelt.recipe.node import Node
from remelt.text.reader import parse_value, read_recipe
from remelt.text.writer import write_recipe


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("0.3", 0.3),
        (" 7 ", 7),
        ("-1e-3", -0.001),
        ("+.5", 0.5),
        ("true", True),
        ("False", False),
        ("none", None),
        ("fp16", "fp16"),
        ("two words", "two words"),
        ("a.safetensors", "a.safetensors"),
        ("C:\\models\\a", "C:\\models\\a"),
        ("1.2.3", "1.2.3"),
        ("", ""),
        ('"0.3"', "0.3"),
        ("'true'", "true"),
        ("[1, 2.5]", (1, 2.5)),
        ("search(0, 1)", Search(0.0, 1.0)),
        ("blocks(IN00=0.2) | 0.33", rm.blocks(IN00=0.2) | 0.33),
        ('keys({"*": 1})', rm.keys({"*": 1})),
        ("blocks", "blocks"),
    ],
)
def test_a_command_line_value_is_what_people_mean(typed: str, value: object) -> None:
    found = parse_value(typed)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("blocks(IN00=)", "value:1:13: a value is due before ')'"),
        ("blocks(IN00=0.2", "value:1:7: '(' is never closed"),
        ("[1, x]", "value:1:5: no step is named 'x'"),
        ("search(1, 0)", "low below high"),
        ('keys({"*": "a"})', "keys needs a number for '*'"),
        ("1e999", "a recipe's numbers are finite, but got inf"),
        ("[1]\n[2]", "a value is one expression"),
        ("model(mask)", 'a model stands in quotes: "mask"'),
        ('model("m") - model("n")', "value:1:1: a value is a number, a text, a list, block weights or a model"),
        ('model("m", space="x")', "a model's space is one of weight, delta, param, but got 'x'"),
    ],
)
def test_a_command_line_value_that_is_not_well_formed_is_refused(typed: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_value(typed)
    assert message in str(caught.value)


def test_a_command_line_value_may_be_a_model() -> None:
    found = parse_value(' model("mask.safetensors", space="param") ')
    assert isinstance(found, Node)
    assert found.digest() == rm.model("mask.safetensors", space="param").digest()
    assert parse_value("model (1).safetensors") == "model (1).safetensors"
    assert parse_value("models/a") == "models/a"


def test_lists_hold_block_weights() -> None:
    text = 'version 1\na = model("a")\nties_sum(a, a, k=[0.5, blocks(M00=0.2) | keys({"*x": 0.1}) | 1.0])\n'
    assert write_recipe(read_recipe(text)) == text
