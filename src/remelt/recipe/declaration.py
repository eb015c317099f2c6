"""What a method declares of itself: how it may be cut, what it sums up first, what it skips, what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from remelt.archs.facts import KeyFacts
    from remelt.recipe.method import Method

    AnyTensor = Tensor
else:
    AnyTensor = Any

Cut = Literal["element", "row", "tensor", "model"]

Vectors = Literal["row", "column", "line", "kernel"]
"""What a method of cut ``row`` works on: the first dimension's rows, columns across them, lines of the last one, or
the kernels of a convolution, which of a tensor that has none are its rows."""


Mass = float | None
"""How much weight a tensor carries: 1 for a weight, 0 for a delta, None for a param."""
Bindings = Mapping[str, Any]
"""Plain values by parameter name: a number, a text, a flag; a list where the parameter is variadic."""


@dataclass(frozen=True)
class Shortcut:
    """Where ``parameter`` equals ``value``, the result is operand ``result`` and no other operand is read."""

    parameter: str
    value: float
    result: str


@dataclass(frozen=True)
class Group:
    """For methods of cut ``model``: tensors that are computed together, and the keys that they need."""

    outputs: tuple[str, ...]
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Reduction:
    """A round of reductions: ``function`` gives small tensors of a tile by name, that are added up over the tensor.

    - ``sampled``: some elements that are spread over the tensor are enough.
    - ``across``: the sums are of all tensors of the result together, and are known before any of it is computed;
      they are whole numbers, as counts are.
    - ``unless``: whether the round can be left out, from the sums before it, or from what they come to.
    - ``due``: when a plan counts on it: ``always``; where a sample was taken (``sample``), or where it was of all
      elements of a small tensor (``whole``); or ``never``.
    """

    function: Callable[..., Mapping[str, AnyTensor]]
    sampled: bool = False
    across: bool = False
    unless: Callable[[Mapping[str, Any]], bool] | None = None
    due: Literal["always", "sample", "whole", "never"] = "always"


Preparation = Callable[..., Mapping[str, AnyTensor]]


@dataclass(frozen=True)
class Declaration:
    """What the planner must know of a method.

    - ``cut``: ``element`` (any slice of the flattened tensors gives the same slice of the result), ``row`` (functions
      get matrices, of the first dimension against all others, and any rows of them give the same rows of the result; a
      tensor of one dimension is one row, or with ``vectors`` "column" one column; with "line" rows are of the last
      dimension alone, with "kernel" of a convolution's kernel), ``tensor`` (needs whole tensors), ``model`` (needs
      several keys).
    - ``batched``: for cut ``row``, that rows are multiplied by matrices: functions get batches of them that do not
      depend on the tiles, as the bits of such products depend on how many rows there are.
    - ``finer``: for cut ``tensor``, from the operands' shapes and the plain arguments, a method of the same arguments
      and of cut ``row`` that makes the call there; None where none does.
    - ``reductions``: rounds of functions that give partial sums of a tile, added up over the whole tensor; each
      returns small tensors by name, and may ask for ``sums`` of the rounds before, or what a conclusion makes of them.
      A `Reduction` says more of a round. How many elements the tensor has is among the sums, as ``elements``.
    - ``reduces``: whether reductions are needed at all, or which, from the plain arguments; those that differ from key
      to key are left out, or None within a list.
    - ``conclusion``: what the sums come to: a function of them, and of the plain arguments that it names, that gives
      numbers by name, once a tensor; the method is then given those as its ``sums``.
    - ``prepares``: for cut ``tensor``, what of a call depends on the operands, and on those plain arguments alone that
      it names: tensors by name, which are kept for further merges where there is a cache. A function, or several, each
      of which may ask for what those before it ``prepared``, and is called when something of it is first looked for.
      For cut ``row`` these get no operands, but may ask for ``sums``, and are called once a tensor.
    - ``shortcuts``: numbers at which an operand is the result.
    - ``identities``: operands that are the result where all others are zero.
    - ``limits``: what plain arguments may be, by name: the texts among which to choose, or the least and the greatest
      number.
    - ``mass``: for affine arithmetic, the mass of the result from those of the operands and the plain numbers.
    - ``keys``: for cut ``model``, the groups of keys of a layout; keys in no group pass from the first operand.
    - ``needs``: for cut ``model``, what a model has where it has any groups, in words: one without is refused.
    - ``stores``: for cut ``model``, the element type of what is computed, where it is not the first operand's.
    - ``selects``: which keys the result has; the others are absent from it.
    - ``first_present``: the result is the first operand that has the key.
    - ``casts``: the parameter that names the result's element type.
    - ``shape``: the result's shape, where not the first operand's.
    - ``unchanged``: of the operands' shapes, whether the first is the result, and no other is read.
    - ``mends``: NaN and infinities of the first operand are the method's to deal with: they are not refused as read.
    - ``spreads``: whether NaN or infinity in any operand's element always makes that of the result NaN or infinite, as
      sums and products do: then looking at the result is enough.
    - ``held``: bytes that the sums of one operand take where they are more than numbers, or a function of its shape.
    - ``work``: floating-point operations that one call takes where they are many (a decomposition, products of
      matrices), from the operands' shapes and the plain arguments: time is told from it.
    - ``faster``: what to do instead where that takes long.
    - ``workspace``: peak of temporary memory beside operands and result, in multiples of one operand; for cut
      ``tensor`` also a function of the operands' shapes and the plain arguments that gives bytes. For cut ``row`` such
      a function gives the bytes of what is concluded and prepared, and of making that.
    """

    cut: Cut
    vectors: Vectors = "row"
    batched: bool = False
    finer: Callable[[Sequence[tuple[int, ...]], Bindings], Method[..., Any] | None] | None = None
    reductions: Sequence[Reduction] = ()
    reduces: Callable[[Bindings], bool | Sequence[Reduction]] | None = None
    conclusion: Callable[..., Mapping[str, float]] | None = None
    prepares: Sequence[Preparation] = ()
    shortcuts: tuple[Shortcut, ...] = ()
    identities: tuple[str, ...] = ()
    limits: Mapping[str, tuple[str, ...] | tuple[float, float]] = field(default_factory=dict)
    mass: Callable[[Sequence[Mass], Bindings], Mass] | None = None
    keys: Callable[[Mapping[str, TensorInfo]], Sequence[Group]] | None = None
    needs: str = ""
    stores: DType | None = None
    selects: Callable[[KeyFacts, Bindings], bool] | None = None
    first_present: bool = False
    casts: str | None = None
    held: int | Callable[[tuple[int, ...]], int] = 0
    shape: Callable[[Sequence[tuple[int, ...]], Bindings], tuple[int, ...]] | None = None
    unchanged: Callable[[Sequence[tuple[int, ...]]], bool] | None = None
    mends: bool = False
    spreads: bool = False
    work: Callable[[Sequence[tuple[int, ...]], Bindings], float] | None = None
    faster: str = ""
    workspace: float | Callable[[Sequence[tuple[int, ...]], Bindings], float] = 2.0

    def __post_init__(self) -> None:
        rounds = [one if isinstance(one, Reduction) else Reduction(one) for one in self.reductions]
        object.__setattr__(self, "reductions", tuple(rounds))
        stages = (self.prepares,) if callable(self.prepares) else tuple(self.prepares)
        object.__setattr__(self, "prepares", stages)

    def rounds(self, values: Bindings) -> Sequence[Reduction]:
        """The rounds of reductions that a call needs, whose plain arguments are known as far as they go."""
        if self.reduces is None:
            return self.reductions
        needed = self.reduces(values)
        if isinstance(needed, bool):
            return self.reductions if needed else ()
        return needed

    @property
    def passes(self) -> int:
        """How many passes over a large tensor its reductions take, as a rule."""
        return sum(not one.sampled and one.due in ("always", "sample") for one in self.reductions)


ELEMENTS = "elements"
"""The name of the number of elements among the sums."""
LOST = "lost"
"""What a method that gives several tensors calls the share of elements of which its result takes no notice."""
