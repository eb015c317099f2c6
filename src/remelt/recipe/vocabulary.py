"""Models of different tokens merged token by token: ``align_vocabulary(recipe, base=a, order="union")``.

It is no method: nothing is computed but rows of embeddings put in another order. Before a recipe is bound, each model
below it becomes a view of itself, in which the rows that stand for tokens are those of the shared vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

from remelt.errors import RecipeError
from remelt.recipe.node import Call, Model, Node, Operand, Value, Vocabulary, as_node
from remelt.recipe.walk import rewrite, topological

ALIGN = "align_vocabulary"
UNION, BASE = "union", "base"
_USAGE = 'align_vocabulary(recipe, base=model("a"), order="union")'
_ORDERS = f'"{UNION}", "{BASE}" or a model'


def align_vocabulary(recipe: Operand, *, base: Operand | None = None, order: Operand = UNION) -> Call:
    """The recipe over models whose rows for tokens are in the order of one vocabulary.

    With ``order`` "base" the tokens are those of ``base``, by default of the first model that the recipe names; with
    "union" those follow that only others have; a model as ``order`` gives its own. A model that lacks a token gets
    the row of the only one that has it, else that of ``base`` where it is named, else the mean of all that have it;
    a token that none has gets zeros.

    Source: the tokenizer sources of mergekit.

    >>> align_vocabulary(as_node("a") - as_node("b"), order="base").method
    'align_vocabulary'
    """
    told: Node = Value(order) if isinstance(order, str) and order in (UNION, BASE) else as_node(order)
    kwargs: list[tuple[str, Node]] = [] if base is None else [("base", as_node(base))]
    return Call(ALIGN, (as_node(recipe),), (*kwargs, ("order", told)))


def expand_vocabularies(recipe: Node) -> Node:
    """The recipe with every model that is aligned as a view of itself.

    Raises `RecipeError` for alignments within others, and for what is no order or no model.
    """
    return rewrite(recipe, lambda node: _aligned(node) if isinstance(node, Call) and node.method == ALIGN else node)


def _aligned(call: Call) -> Node:
    given = dict(call.kwargs)
    if len(call.args) != 1 or not set(given) <= {"base", "order"}:
        raise RecipeError("align_vocabulary takes a recipe, a base and an order", hint=_USAGE, span=call.span)
    (recipe,) = call.args
    base, order = given.get("base"), given.get("order", Value(UNION))
    if not (base is None or isinstance(base, Model)) or isinstance(recipe, Value):
        raise RecipeError("what is aligned is a recipe, and its base a model", hint=_USAGE, span=call.span)
    if not isinstance(order, Model) and not (isinstance(order, Value) and order.value in (UNION, BASE)):
        raise RecipeError(f"the order of a vocabulary is {_ORDERS}", hint=_USAGE, span=call.span)
    models = [node for node in topological(recipe) if isinstance(node, Model) and node.space == "weight"]
    if any(node.vocabulary is not None for node in models):
        raise RecipeError("a vocabulary is aligned once, around all that is merged", span=call.span)
    if not models:
        raise RecipeError("there is no model below align_vocabulary", hint=_USAGE, span=call.span)
    names = tuple(dict.fromkeys(node.name for node in models))
    first = order if isinstance(order, Model) else models[0] if base is None else base
    union = isinstance(order, Value) and order.value == UNION
    shared = Vocabulary(first.name, union, None if base is None else base.name, names)

    def mark(node: Node) -> Node:
        return replace(node, vocabulary=shared) if isinstance(node, Model) and node.space == "weight" else node

    return rewrite(recipe, mark)
