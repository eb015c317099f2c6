"""Models with permuted axes: ``permute(model, "found.safetensors")``, and ``rebasin(b, to=a)``, which finds out how.

They are no methods: nothing is computed. Before a recipe is bound, each model below them becomes a view of itself,
whose axes are in another order; for `rebasin`, that is found once the merge begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from remelt.core.nearest import nearest_hint
from remelt.errors import RecipeError, Span
from remelt.recipe.adapter import TO_LORA
from remelt.recipe.axis_orders import AlignedTo, HeldPermutations, PermutedBy
from remelt.recipe.layers import LAYERS, STACK
from remelt.recipe.mixture import MIXTURE
from remelt.recipe.node import Call, Model, Node, Operand, Parameter, Value, as_node
from remelt.recipe.vocabulary import ALIGN
from remelt.recipe.walk import rewrite, topological

PERMUTE, REBASIN = "permute", "rebasin"
IDENTITY, SIGNATURE, BOTH = STARTS = "identity", "signature", "both"
"""Where matching begins: with nothing moved, with channels alike in what no permutation changes, or the better."""
MARGINS, OTHERS = "margins", "others"
"""What is told in the place of a start: while margins are computed, and where models are refined by the others."""
_SWITCHES = ("crossing", "rotations")
_PERMUTE_USAGE = 'permute("b", "b-to-a.safetensors", inverse=False)'
_REBASIN_USAGE = 'rebasin("b", to="a")'
_OTHER_VIEWS = (LAYERS, STACK, MIXTURE, ALIGN, TO_LORA)


def permute(model: Operand, permutations: Operand | HeldPermutations, *, inverse: bool = False) -> Call:
    """A model with its axes permuted as a permutation file says: another order of its channels, the same function.

    ``model`` may be a recipe, whose models are permuted each, or an adapter, which follows its model so. With
    ``inverse``, what the file says is undone. `rebasin` finds permutations, and ``remelt rebasin`` writes such files;
    what `align_models` found may stand in the place of one.

    >>> permute("b", "b-to-a.safetensors").method
    'permute'
    """
    kwargs: tuple[tuple[str, Node], ...] = (("inverse", Value(inverse)),) if inverse else ()
    if isinstance(permutations, HeldPermutations):
        permutations = Model("permutations", tensors=permutations)  # type: ignore[arg-type]
    made = Call(PERMUTE, (as_node(model), as_node(permutations)), kwargs)
    _permutation(made)
    return made


def rebasin(model: Operand, *, to: Operand, start: str = BOTH, crossing: bool = False, rotations: bool = False) -> Call:
    """A model with its axes permuted so that it is as near to another as permutations can bring it.

    Its function stays as it is; that of a merge of both is better where they were trained apart. The permutations are
    found by matching weights, once the merge begins. ``start`` is "identity", "signature" or "both", the better of
    which is kept. With ``crossing``, what ties several components is permuted, too: then text encoders no longer
    suit adapters and embeddings that were made for them. With ``rotations``, what attention answers and compares is
    then turned within each head, where nothing sees it: that is computed in float32, and rounded once.

    Source: Ainsworth et al., "Git Re-Basin" (2209.04836).

    >>> rebasin("b", to="a").method
    'rebasin'
    """
    given: dict[str, Node] = {"to": as_node(to)}
    given |= {} if start == BOTH else {"start": Value(start)}
    given |= {"crossing": Value(crossing)} if crossing else {}
    given |= {"rotations": Value(rotations)} if rotations else {}
    made = Call(REBASIN, (as_node(model),), tuple(given.items()))
    _settings(made)
    return made


def expand_permutations(recipe: Node) -> Node:
    """The recipe with every model that is permuted as a view of itself.

    Raises `RecipeError` for what has no permutation file or no reference, and around views that change keys.
    """

    def expand(node: Node) -> Node:
        if not isinstance(node, Call) or node.method not in (PERMUTE, REBASIN):
            return node
        return _permuted(node) if node.method == PERMUTE else _aligned(node)

    return rewrite(recipe, expand)


def _permuted(call: Call) -> Node:
    use, recipe = _permutation(call), call.args[0]
    if use is None:
        raise _still_open(call.args[1])
    inside = next((one for one in topological(recipe) if isinstance(one, Call) and one.method in _OTHER_VIEWS), None)
    if inside is not None:
        raise RecipeError(
            f"permute takes models and what methods make of them, but {inside.method} gives other tensors",
            hint="permute the models inside it, or merge it first",
            span=call.span,
        )
    if isinstance(recipe, Value) or not any(isinstance(one, (Model, Parameter)) for one in topological(recipe)):
        raise RecipeError("what is permuted is a model, or a recipe", hint=_PERMUTE_USAGE, span=call.span)
    return rewrite(recipe, lambda node: _followed_by(node, use) if isinstance(node, Model) else node)


def _followed_by(model: Model, use: PermutedBy | AlignedTo) -> Model:
    return replace(model, permuted=(*(model.permuted or ()), use))


def _permutation(call: Call) -> PermutedBy | None:
    """What a call says of a permutation file, None where that is still open.

    Raises `RecipeError` where it names none, or has other arguments.
    """
    given = dict(call.kwargs)
    unknown = next((name for name in given if name != "inverse"), None)
    if unknown is not None:
        hint = nearest_hint(unknown, ("inverse",)) or _PERMUTE_USAGE
        raise RecipeError(f"permute has no argument {unknown!r}", hint=hint, span=_place(call, unknown))
    if len(call.args) != 2:
        count = len(call.args)
        raise RecipeError(
            f"permute takes a model and a permutation file, but got {count}", hint=_PERMUTE_USAGE, span=call.span
        )
    file, inverse = call.args[1], given.get("inverse", Value(False))
    if isinstance(file, Parameter):
        return None
    held = file.tensors if isinstance(file, Model) and isinstance(file.tensors, HeldPermutations) else None
    if not isinstance(file, Model) or (file.tensors is not None and held is None):
        raise RecipeError("permutations are a file", hint=_PERMUTE_USAGE, span=file.span or call.span)
    if not isinstance(inverse, Value) or not isinstance(inverse.value, bool):
        raise RecipeError("inverse is True or False", hint=_PERMUTE_USAGE, span=_place(call, "inverse"))
    return PermutedBy(file.name, file.sha256, inverse.value, held)


def _aligned(call: Call) -> Node:
    use = _settings(call)
    (model,) = call.args
    if use is None:
        raise _still_open(dict(call.kwargs)["to"])
    if isinstance(model, Parameter):
        return model  # still open: that is told once the recipe is bound
    if not _is_plain(model):
        raise RecipeError(
            "rebasin aligns a model, no recipe or adapter: what is matched is read many times",
            hint='merge the recipe first; an adapter follows its model by permute(adapter, "found.safetensors")',
            span=call.span,
        )
    assert isinstance(model, Model)
    return _followed_by(model, use)


def _is_plain(node: Node) -> bool:
    """Whether a node is a whole model as a file has it, but for the order of its axes."""
    return (
        isinstance(node, Model)
        and node.space == "weight"
        and all(one is None for one in (node.layers, node.vocabulary, node.adapter, node.part))
    )


def _settings(call: Call) -> AlignedTo | None:
    """What a call aligns to, and how; None where that is still open."""
    given = dict(call.kwargs)
    known = ("to", "start", *_SWITCHES)
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        hint = nearest_hint(unknown, known) or _REBASIN_USAGE
        raise RecipeError(f"rebasin has no argument {unknown!r}", hint=hint, span=_place(call, unknown))
    if len(call.args) != 1 or "to" not in given:
        message = "rebasin takes a model, and by name the one that it is aligned to"
        raise RecipeError(message, hint=_REBASIN_USAGE, span=call.span)
    start = _told(given, "start", BOTH)
    if start not in STARTS:
        near = nearest_hint(start, STARTS) if isinstance(start, str) else None
        message = f"matching starts from {', '.join(STARTS)}, but got {start!r}"
        raise RecipeError(message, hint=near, span=_place(call, "start"))
    switches: dict[str, bool] = {}
    for name in _SWITCHES:
        value = _told(given, name, False)
        if not isinstance(value, bool):
            raise RecipeError(f"{name} is True or False", hint=_REBASIN_USAGE, span=_place(call, name))
        switches[name] = value
    reference = given["to"]
    if isinstance(reference, Parameter):
        return None
    if isinstance(reference, Call) and reference.method in (PERMUTE, REBASIN):
        return AlignedTo(Model("reference"), str(start), **switches)  # of a call that is not expanded yet
    if not _is_plain(reference):
        raise RecipeError(
            "rebasin aligns to a model, no recipe or adapter: what is matched is read many times",
            hint="merge the recipe first, and name the result",
            span=_place(call, "to"),
        )
    assert isinstance(reference, Model)
    return AlignedTo(reference, str(start), **switches)


def _told(given: Mapping[str, Node], name: str, default: str | bool) -> object:
    """An argument's value; the node itself where it is none."""
    node = given.get(name, Value(default))
    return node.value if isinstance(node, Value) else node


def _still_open(node: Node) -> RecipeError:
    assert isinstance(node, Parameter)
    return RecipeError(
        f"parameter {node.name!r} is still open",
        hint=f"fill it: compose(recipe, {node.name}=...) or remelt compose ... -p {node.name} PATH",
        span=node.span,
    )


def _place(call: Call, name: str) -> Span | None:
    return dict(call.spans).get(name, call.span)
