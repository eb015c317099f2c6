"""`adapter` and `to_lora` in recipes: what they become, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from remelt.errors import RecipeError
from remelt.recipe.adapter import AdapterForm, adapter, expand_adapters, peel, to_lora
from remelt.recipe.node import AdapterUse, Call, Model, Value, as_node


def test_an_adapter_becomes_its_file_in_delta_space() -> None:
    found = expand_adapters(as_node("sdxl") + 0.8 * adapter("style"))
    assert isinstance(found, Call)
    scaled = found.args[1]
    assert isinstance(scaled, Call)
    (file,) = [one for one in scaled.args if isinstance(one, Model)]
    assert (file.name, file.space, file.adapter) == ("style", "delta", AdapterUse(None))


def test_its_base_is_told_by_name() -> None:
    for base in ("sdxl", as_node("sdxl")):
        file = expand_adapters(adapter("style", base=base))
        assert isinstance(file, Model)
        assert file.adapter is not None
        assert file.adapter.base is not None
        assert file.adapter.base.name == "sdxl"


@pytest.mark.parametrize(
    ("call", "law"),
    [
        (Call("adapter", ()), "adapter takes a file, and a base by name"),
        (Call("adapter", (as_node("a"), as_node("b"))), "adapter takes a file, and a base by name"),
        (Call("adapter", (as_node("a"),), (("of", as_node("b")),)), "adapter takes a file, and a base by name"),
        (adapter(as_node("a") - as_node("b")), "an adapter is a file, and its base a model, no recipe"),
        (adapter("a", base=0.5 * as_node("b")), "an adapter is a file, and its base a model, no recipe"),
    ],
)
def test_what_is_no_file_is_refused(call: Call, law: str) -> None:
    with pytest.raises(RecipeError, match=law) as caught:
        expand_adapters(call)
    assert caught.value.hint == 'adapter("style"), adapter("style", base=model("sdxl"))'


def test_to_lora_is_taken_off_the_outside() -> None:
    delta = as_node("tuned") - as_node("base")
    assert peel(delta) == (delta, None)
    inside, form = peel(to_lora(delta, rank=8, energy=0.9, names="peft"))
    assert inside is delta
    assert form == AdapterForm(8, 0.9, "lora", "peft")
    _, form = peel(to_lora(delta, kind="lokr", factor=4))
    assert form == AdapterForm(None, None, "lokr", None, 4)


def test_only_what_is_not_by_default_is_written() -> None:
    assert [name for name, _ in to_lora("delta", rank=8).kwargs] == ["rank"]
    assert [name for name, _ in to_lora("delta", kind="lokr", factor=4).kwargs] == ["kind", "factor"]


@pytest.mark.parametrize(
    ("options", "law"),
    [
        ({}, "a LoRA has a rank, or keeps a share of the energy"),
        ({"rank": 0}, "a rank is 1 or more, but got 0"),
        ({"energy": 0.0}, "a share of the energy is above 0, and 1 at most, but got 0"),
        ({"energy": 1.5}, "a share of the energy is above 0, and 1 at most, but got 1.5"),
        ({"rank": 4, "kind": "loha"}, "an adapter is written as lora or lokr, but got 'loha'"),
        ({"rank": 4, "kind": "lokr"}, "a LoKr has no rank: it is the nearest product of two matrices"),
        ({"energy": 0.5, "kind": "lokr"}, "a LoKr has no rank"),
        ({"rank": 4, "factor": 8}, "a LoRA has no factor, but a rank"),
        ({"kind": "lokr", "factor": 0}, "a factor is 1 or more, or -1 for the roots of the sides, but got 0"),
        ({"rank": 4, "names": "koyha"}, "names of modules are those of kohya, diffusers, peft, but got 'koyha'"),
    ],
)
def test_numbers_that_no_adapter_has_are_refused(options: dict[str, Any], law: str) -> None:
    with pytest.raises(RecipeError, match=law):
        to_lora("delta", **options)
    call = Call("to_lora", (as_node("delta"),), tuple((name, Value(value)) for name, value in options.items()))
    with pytest.raises(RecipeError, match=law):
        peel(call)


@pytest.mark.parametrize(
    ("name", "value", "law"),
    [
        ("rank", 4.5, "to_lora: rank cannot be 4.5"),
        ("rank", True, "to_lora: rank cannot be True"),
        ("energy", "most", "to_lora: energy cannot be 'most'"),
        ("names", 1, "to_lora: names cannot be 1"),
        ("depth", 4, "to_lora takes a difference, and by name rank, energy, kind, names, factor"),
    ],
)
def test_a_recipe_file_gets_a_message_for_what_cannot_be(name: str, value: Any, law: str) -> None:
    with pytest.raises(RecipeError, match=law):
        peel(Call("to_lora", (as_node("delta"),), ((name, Value(value)),)))
    with pytest.raises(RecipeError, match="to_lora takes a difference"):
        peel(Call("to_lora", (), (("rank", Value(4)),)))
