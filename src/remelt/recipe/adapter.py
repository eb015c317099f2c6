"""Adapters in recipes: ``base + 0.8 * adapter("style")``, the difference that a small file makes of a model.

It is no method: before a recipe is bound, it becomes the file as a model in delta space. A model that turns out to be
an adapter when it is opened is one without these words.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from remelt.core.nearest import nearest_hint
from remelt.errors import RecipeError
from remelt.recipe.node import AdapterUse, Call, Model, Node, Operand, Value, as_node, model
from remelt.recipe.walk import rewrite

ADAPTER, TO_LORA = "adapter", "to_lora"
KINDS, NAMES = ("lora", "lokr"), ("kohya", "diffusers", "peft")
_USAGE = 'adapter("style"), adapter("style", base=model("sdxl"))'


def adapter(source: Operand, *, base: Operand | None = None) -> Call:
    """The difference that an adapter makes of a model: LoRA, LoCon, DoRA, LoHa, LoKr, IA3, OFT, BOFT, GLoRA and others.

    It is a delta, at full strength: multiply it, by block if you like. ``base`` is the model that it is a difference
    of; by default the one that it is added to. That decides by which keys it goes, and for DoRA, IA3, OFT, BOFT and
    GLoRA also what is added.

    >>> (as_node("sdxl") + 0.8 * adapter("style")).method
    'add'
    """
    kwargs: tuple[tuple[str, Node], ...] = () if base is None else (("base", as_node(base)),)
    return Call(ADAPTER, (as_node(source),), kwargs)


def expand_adapters(recipe: Node) -> Node:
    """The recipe with every adapter as a model in delta space; `RecipeError` for what is no file or no base."""
    return rewrite(recipe, lambda node: _file(node) if isinstance(node, Call) and node.method == ADAPTER else node)


def _file(call: Call) -> Model:
    given = dict(call.kwargs)
    if len(call.args) != 1 or not set(given) <= {"base"}:
        raise RecipeError("adapter takes a file, and a base by name", hint=_USAGE, span=call.span)
    (source,), base = call.args, given.get("base")
    file, held = _named(source), None if base is None else _named(base)
    if file is None or (base is not None and held is None):
        raise RecipeError("an adapter is a file, and its base a model, no recipe", hint=_USAGE, span=call.span)
    return replace(file, space="delta", adapter=AdapterUse(held), span=file.span or call.span)


def _named(node: Node) -> Model | None:
    if isinstance(node, Value) and isinstance(node.value, str):
        return model(node.value)
    return node if isinstance(node, Model) else None


@dataclass(frozen=True)
class AdapterForm:
    """What a difference is written as: the kind of adapter, its rank or the share of energy that it keeps, its names.

    ``factor`` is how LoKr divides a matrix' sides, as LyCORIS has it: a number, or -1 for their roots.
    """

    rank: int | None = None
    energy: float | None = None
    kind: str = "lora"
    names: str | None = None
    factor: int = -1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RecipeError(f"an adapter is written as {' or '.join(KINDS)}, but got {self.kind!r}")
        if self.names is not None and self.names not in NAMES:
            hint = nearest_hint(self.names, NAMES)
            raise RecipeError(f"names of modules are those of {', '.join(NAMES)}, but got {self.names!r}", hint=hint)
        if self.kind == "lora" and self.rank is None and self.energy is None:
            raise RecipeError("a LoRA has a rank, or keeps a share of the energy", hint="rank=32, or energy=0.95")
        if self.kind == "lokr" and (self.rank is not None or self.energy is not None):
            raise RecipeError(
                "a LoKr has no rank: it is the nearest product of two matrices, whose sizes a factor tells",
                hint="factor=8",
            )
        if self.kind == "lora" and self.factor != -1:
            raise RecipeError("a LoRA has no factor, but a rank", hint="rank=32, or kind='lokr'")
        if self.factor < 1 and self.factor != -1:
            raise RecipeError(f"a factor is 1 or more, or -1 for the roots of the sides, but got {self.factor}")
        if self.rank is not None and self.rank < 1:
            raise RecipeError(f"a rank is 1 or more, but got {self.rank}")
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise RecipeError(f"a share of the energy is above 0, and 1 at most, but got {self.energy:g}")


def to_lora(
    delta: Operand,
    *,
    rank: int | None = None,
    energy: float | None = None,
    kind: str = "lora",
    names: str | None = None,
    factor: int = -1,
) -> Call:
    """A difference written as an adapter: the outermost step of a recipe.

    ``rank`` is that of every matrix, at most; ``energy`` the share of each one's squares that is kept, by as low a rank
    as does. ``kind`` is ``lora`` (with convolutions: LoCon) or ``lokr``, ``names`` those of ``kohya``, ``diffusers`` or
    ``peft``: by default kohya's for image models, PEFT's for others.

    Raises `RecipeError` for numbers that no adapter has.

    >>> to_lora(as_node("tuned") - as_node("base"), rank=32).method
    'to_lora'
    """
    form = AdapterForm(rank, energy, kind, names, factor)
    given = {"rank": rank, "energy": energy, "kind": None if kind == "lora" else kind, "names": form.names}
    given["factor"] = None if factor == -1 else factor
    kwargs = tuple((name, Value(value)) for name, value in given.items() if value is not None)
    return Call(TO_LORA, (as_node(delta),), kwargs)


def is_adapter(recipe: Node) -> bool:
    """Whether a recipe's outermost step is `to_lora`."""
    return isinstance(recipe, Call) and recipe.method == TO_LORA


def peel(recipe: Node) -> tuple[Node, AdapterForm | None]:
    """A recipe without an outermost `to_lora`, and what that asks for; `RecipeError` for what it cannot mean."""
    if not isinstance(recipe, Call) or not is_adapter(recipe):
        return recipe, None
    given = {name: node.value for name, node in recipe.kwargs if isinstance(node, Value)}
    known = AdapterForm.__dataclass_fields__
    if len(recipe.args) != 1 or len(given) < len(recipe.kwargs) or not set(given) <= set(known):
        hint = "to_lora(tuned - base, rank=32)"
        raise RecipeError(f"to_lora takes a difference, and by name {', '.join(known)}", hint=hint, span=recipe.span)
    wanted: dict[str, tuple[type, ...]] = {"rank": (int,), "factor": (int,), "energy": (int, float)}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, wanted.get(name, (str,))):
            raise RecipeError(f"to_lora: {name} cannot be {value!r}", hint="rank=32, energy=0.95", span=recipe.span)
    try:
        return recipe.args[0], AdapterForm(**given)  # type: ignore[arg-type]
    except RecipeError as error:
        raise RecipeError(error.message, hint=error.hint, span=recipe.span) from None
