"""Mixtures of experts put together from dense models: ``mixture_of_experts(base, a, b, experts_per_token=2)``.

It is no method: nothing is computed but a router, where one is drawn. Before a recipe is bound, each model below it
becomes a view of itself, in which its MLPs bear the names of one expert's; a mixture is the first part that has a key.
"""

from __future__ import annotations

from dataclasses import replace

from remelt.core.nearest import nearest_hint
from remelt.errors import RecipeError
from remelt.recipe.node import Call, Literal, MixturePart, Model, Node, Operand, Value, as_node
from remelt.recipe.walk import rewrite, topological

MIXTURE = "mixture_of_experts"
STYLES = ("mixtral", "qwen2_moe", "qwen3_moe")
DRAWN = RANDOM, UNIFORM, ZERO = "random", "uniform_random", "zero"
"""Routers that no file holds."""
BASE, EXPERT, SHARED, ROUTER, SHARED_GATE = "base", "expert", "shared expert", "router", "shared expert's gate"
"""What is taken of a model, beside a router that is drawn by its shape."""
_USAGE = "mixture_of_experts(base, a, b, experts_per_token=2)"
_OPTIONS = ("experts_per_token", "router", "seed", "style", "shared")


def mixture_of_experts(
    base: Operand,
    *experts: Operand,
    experts_per_token: int = 2,
    router: Operand = RANDOM,
    seed: int = 0,
    style: str | None = None,
    shared: Operand | None = None,
) -> Call:
    """A mixture of the MLPs of several dense models, around what else ``base`` has: embeddings, attention, norms.

    Base and experts are models or recipes. ``router`` is a model with a ``gate`` for each layer, as `remelt router`
    makes it of prompts, or "random" (normal numbers of deviation 1), "uniform_random" (as a new linear layer has
    them) or "zero"; ``seed`` is that of what is drawn. ``style`` is "mixtral", "qwen2_moe" or "qwen3_moe", by default
    as the base's kind has it. ``shared`` is the expert that qwen2_moe asks for every token, by default the base.

    Raises `RecipeError` for fewer than two experts, and for options that no mixture has.

    Source: mergekit-moe.

    >>> mixture_of_experts("base", "a", "b", router="zero").method
    'mixture_of_experts'
    """
    given: dict[str, Literal] = {"experts_per_token": experts_per_token}
    if not isinstance(router, Node) and router in DRAWN:
        given["router"] = router
    given |= {name: value for name, value in (("seed", seed or None), ("style", style)) if value is not None}
    kwargs: list[tuple[str, Node]] = [(name, Value(value)) for name, value in given.items()]
    if "router" not in given:
        kwargs.append(("router", as_node(router)))
    if shared is not None:
        kwargs.append(("shared", as_node(shared)))
    made = Call(MIXTURE, (as_node(base), *map(as_node, experts)), tuple(kwargs))
    _refuse_strange(made)
    return made


def expand_mixtures(recipe: Node) -> Node:
    """The recipe with every mixture as models of which a part is read, under the names that it has there.

    Raises `RecipeError` for what is no mixture, and for mixtures of mixtures.
    """
    return rewrite(recipe, lambda node: _assembled(node) if isinstance(node, Call) and node.method == MIXTURE else node)


def _assembled(call: Call) -> Node:
    _refuse_strange(call)
    given = dict(call.kwargs)
    values = {name: node.value for name, node in given.items() if isinstance(node, Value)}
    base, *experts = call.args
    of_all = MixturePart(
        BASE,
        experts=len(experts),
        per_token=values.get("experts_per_token", 2),  # type: ignore[arg-type]
        style=values.get("style"),  # type: ignore[arg-type]
        seed=values.get("seed", 0),  # type: ignore[arg-type]
    )
    parts = [_viewed(base, of_all, call)]
    parts += [_viewed(one, replace(of_all, role=EXPERT, number=place), call) for place, one in enumerate(experts)]
    if of_all.style in (None, "qwen2_moe") or "shared" in given:
        parts.append(_viewed(given.get("shared", base), replace(of_all, role=SHARED, stated="shared" in given), call))
    router = given.get("router", Value(RANDOM))
    if not isinstance(router, Value):
        parts.append(_viewed(router, replace(of_all, role=ROUTER), call))
    first = next((one for one in topological(base) if isinstance(one, Model) and one.space == "weight"), None)
    if first is not None and first.adapter is None:  # whose layers and width decide a router's shape
        role = SHARED_GATE if not isinstance(router, Value) else str(router.value)
        parts.append(_viewed(first, replace(of_all, role=role), call))
    result = parts[0]
    for part in parts[1:]:
        result = Call("fallback", (result, part), span=call.span)
    return result


def _viewed(recipe: Node, part: MixturePart, call: Call) -> Node:
    """A recipe with every model as a view of its part; only the base has tokens."""

    def view(node: Node) -> Node:
        if not isinstance(node, Model):
            return node
        if node.part is not None:
            raise RecipeError("a mixture of mixtures is not made: its parts are dense models", span=call.span)
        return replace(node, part=part, vocabulary=node.vocabulary if part.role == BASE else None)

    return rewrite(recipe, view)


def _refuse_strange(call: Call) -> None:
    """Refuse arguments that no mixture has."""
    given, spans = dict(call.kwargs), dict(call.spans)

    def refusal(message: str, name: str = "", hint: str | None = _USAGE) -> RecipeError:
        return RecipeError(f"{MIXTURE} {message}", hint=hint, span=spans.get(name, call.span))

    unknown = next((name for name in given if name not in _OPTIONS), None)
    if unknown is not None:
        raise refusal(f"has no argument {unknown!r}", unknown, nearest_hint(unknown, _OPTIONS) or _USAGE)
    if any(isinstance(node, Value) for node in call.args):
        raise refusal("takes models, and its numbers by name")
    count = len(call.args) - 1
    if count < 2:
        raise refusal(f"needs a base and at least two experts, but got {max(count, 0)} beside the base")
    values = {name: node.value if isinstance(node, Value) else node for name, node in given.items()}
    for name, otherwise in (("experts_per_token", 2), ("seed", 0)):
        number = values.get(name, otherwise)
        if isinstance(number, bool) or not isinstance(number, int):
            raise refusal(f"needs a whole number for {name!r}, but got {number!r}", name)
    per_token = values.get("experts_per_token", 2)
    if not 1 <= per_token <= count:  # type: ignore[operator]
        raise refusal(
            f"asks 1 to {count} experts for a token, as many as it has, but got {per_token}", "experts_per_token"
        )
    style = values.get("style")
    if style is not None and style not in STYLES:
        hint = nearest_hint(str(style), STYLES)
        raise refusal(f"has a style of {', '.join(STYLES)}, but got {style!r}", "style", hint)
    if isinstance(given.get("shared"), Value):
        raise refusal("has a model as its shared expert", "shared")
    router = given.get("router")
    if isinstance(router, Value) and router.value not in DRAWN:
        message = f"has a router that is {', '.join(DRAWN)} or a model, but got {router.value!r}"
        raise refusal(message, "router", nearest_hint(str(router.value), DRAWN))


def label_of_part(label: str, part: MixturePart) -> str:
    """What messages call a part of a mixture that is made of the model of that label.

    >>> label_of_part("a", MixturePart(EXPERT, 3)), label_of_part("a", MixturePart(ZERO))
    ('a, expert 3', 'zero router for a')
    """
    if part.role in DRAWN:
        return f"{part.role} router for {label}"
    return f"{label}, {part.role}" + (f" {part.number}" if part.role == EXPERT else "")
