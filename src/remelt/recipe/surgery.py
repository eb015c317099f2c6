"""Surgery in one line: recipes of existing methods that people ask for by name."""

from __future__ import annotations

from remelt.recipe.node import Call, Operand, Value, as_node


def with_component(model: Operand, donor: Operand, component: str) -> Call:
    """A model with one component of another: a VAE, a text encoder. The donor may hold that component alone.

    >>> with_component("deliberate_v2", "vae-ft-mse", "vae")
    <call fallback(2 arguments)>
    """
    whole, named = as_node(model), (("component", Value(component)),)
    rest = Call("omit_component", (whole,), named)
    joined = Call("fallback", (rest, Call("pick_component", (as_node(donor),), named)))
    return Call("fallback", (joined, whole))  # the model stays the first, after which the result is made


def make_inpainting(model: Operand, inpainting: Operand, base: Operand) -> Call:
    """An inpainting model of a normal one: what sets an inpainting model apart from its base is added to it.

    The result has the inpainting model's input channels.

    >>> make_inpainting("deliberate_v2", "sd-v1-5-inpainting", "v1-5-pruned")
    <call add(2 arguments)>
    """
    special = as_node(inpainting)
    difference = as_node(model) - as_node(base)
    return special + Call("match_channels", (difference, special))


def make_normal(model: Operand, inpainting: Operand, base: Operand) -> Call:
    """A normal model of an inpainting one: what sets that apart from the one it was made of, added to a base.

    The result has the base's input channels.

    >>> make_normal("my-inpainting", "sd-v1-5-inpainting", "v1-5-pruned")
    <call add(2 arguments)>
    """
    plain = as_node(base)
    difference = as_node(model) - as_node(inpainting)
    return plain + Call("match_channels", (difference, plain))
