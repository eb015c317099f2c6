"""Models of different tokens merged token by token: ``align_vocabulary(recipe, base=a, order="union")``.

It is no method: nothing is computed but rows of embeddings put in another order. Before a recipe is bound, each model
below it becomes a view of itself, in which the rows that stand for tokens are those of the shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from remelt.core.nearest import nearest_hint
from remelt.errors import RecipeError
from remelt.recipe.node import Call, Model, Node, Operand, Value, Vocabulary, as_node
from remelt.recipe.walk import rewrite, topological

ALIGN = "align_vocabulary"
UNION, BASE = "union", "base"
THEIRS, MEAN, OWN_MEAN, ZERO = NEW_ROWS = ("theirs", "mean", "own_mean", "zero")
_USAGE = 'align_vocabulary(recipe, base=model("a"), order="union")'
_ORDERS = f'"{UNION}", "{BASE}" or a model'
_ARGUMENTS = ("base", "order", "new_rows", "pad_to_multiple_of")


def align_vocabulary(
    recipe: Operand,
    *,
    base: Operand | None = None,
    order: Operand = UNION,
    new_rows: str = THEIRS,
    pad_to_multiple_of: int | None = None,
) -> Call:
    """The recipe over models whose rows for tokens are in the order of one vocabulary.

    With ``order`` "base" the tokens are those of ``base``, by default of the first model that the recipe names; with
    "union" those follow that only others have; a model as ``order`` gives its own. ``new_rows`` says what a model
    has for a token that it lacks:

    - "theirs", by default: the row of the only model that has it, else that of ``base`` where it is named and has it,
      else the mean of all that have it;
    - "mean": the mean of all that have it;
    - "own_mean": the mean of the rows that the model has for its own tokens;
    - "zero": zeros.

    A token that no model has a row for gets zeros, or its own mean by that policy. The result has as many rows as its
    first model, where that are more than tokens; with ``pad_to_multiple_of``, the least multiple that holds all tokens.
    Rows that no model has are the mean of its own.

    Source: the tokenizer sources of mergekit; for "own_mean", Hewitt, "Initializing new word embeddings" (2021).

    >>> align_vocabulary(as_node("a") - as_node("b"), order="base").method
    'align_vocabulary'
    """
    told: Node = Value(order) if isinstance(order, str) and order in (UNION, BASE) else as_node(order)
    kwargs: list[tuple[str, Node]] = [] if base is None else [("base", as_node(base))]
    kwargs.append(("order", told))
    if new_rows != THEIRS:
        kwargs.append(("new_rows", Value(new_rows)))
    if pad_to_multiple_of is not None:
        kwargs.append(("pad_to_multiple_of", Value(pad_to_multiple_of)))
    return Call(ALIGN, (as_node(recipe),), tuple(kwargs))


def expand_vocabularies(recipe: Node) -> Node:
    """The recipe with every model that is aligned as a view of itself.

    Raises `RecipeError` for alignments within others, and for what is no order or no model.
    """
    return rewrite(recipe, lambda node: _aligned(node) if isinstance(node, Call) and node.method == ALIGN else node)


def _aligned(call: Call) -> Node:
    given = dict(call.kwargs)
    if len(call.args) != 1 or not set(given) <= set(_ARGUMENTS):
        message = "align_vocabulary takes a recipe, and by name a base, an order, new_rows and pad_to_multiple_of"
        raise RecipeError(message, hint=_USAGE, span=call.span)
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
    new_rows, multiple = _settings(call, given)
    shared = Vocabulary(first.name, union, None if base is None else base.name, names, new_rows, multiple)

    def mark(node: Node) -> Node:
        return replace(node, vocabulary=shared) if isinstance(node, Model) and node.space == "weight" else node

    return rewrite(recipe, mark)


def _settings(call: Call, given: Mapping[str, Node]) -> tuple[str, int | None]:
    """What new rows are, and the multiple of the rows' number."""
    told = {name: node.value if isinstance(node, Value) else node for name, node in given.items()}
    new_rows, multiple = told.get("new_rows", THEIRS), told.get("pad_to_multiple_of")
    if not isinstance(new_rows, str) or new_rows not in NEW_ROWS:
        hint = nearest_hint(new_rows, NEW_ROWS) if isinstance(new_rows, str) else None
        message = f"new_rows is one of {', '.join(NEW_ROWS)}, but got {new_rows!r}"
        raise RecipeError(message, hint=hint, span=call.span)
    if multiple is not None and (isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1):
        message = f"pad_to_multiple_of is a whole number from 1 on, but got {multiple!r}"
        raise RecipeError(message, hint="pad_to_multiple_of=64", span=call.span)
    return new_rows, multiple
