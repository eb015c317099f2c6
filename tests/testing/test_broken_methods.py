"""A museum of merge methods that break their word, each with the check that tells."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from remelt.core.random import Random
from remelt.core.tensor_info import TensorInfo
from remelt.recipe.method import (
    AnySpace,
    Bindings,
    Group,
    Integer,
    Mask,
    Mass,
    Method,
    Number,
    Same,
    Shortcut,
    Sums,
    Tensors,
    merge_method,
)
from remelt.testing import Case, MethodConformance

AnyMethod = Method[..., Any]
CAUGHT: list[tuple[AnyMethod, str, str]] = []
"""Each broken method, the check that must tell, and what it must say."""


def caught_by(check: str, message: str) -> Callable[[AnyMethod], AnyMethod]:
    """Put a method into the museum."""

    def keep(method: AnyMethod) -> AnyMethod:
        CAUGHT.append((method, check, message))
        return method

    return keep


@caught_by("test_its_name_can_be_written_in_a_recipe", "is a word that recipes do not use: 'blocks'")
@merge_method(cut="element", name="blocks")
def named_like_a_word_of_recipes(a: Same) -> Same:
    return a


@caught_by("test_its_name_can_be_written_in_a_recipe", "'slerp' is also a method of remelt.methods.spherical")
@merge_method(cut="element", name="slerp")
def named_like_another(a: Same) -> Same:
    return a


@caught_by("test_it_is_documented", "undocumented has no docstring")
@merge_method(cut="element")
def undocumented(a: Same) -> Same:
    return a


@caught_by("test_it_is_documented", "which does not end in a full stop")
@merge_method(cut="element")
def begins_with_no_sentence(a: Same) -> Same:
    """Some of this

    and some of that.
    """
    return a


@caught_by("test_it_is_documented", "a line `Formula: ...`: without_formula has none")
@merge_method(cut="element")
def without_formula(a: Same) -> Same:
    """The same again."""
    return a


@caught_by("test_its_examples_run", "has an example: without_example has no line with >>>")
@merge_method(cut="element")
def without_example(a: Same) -> Same:
    """The same again.

    Formula: a
    """
    return a


@caught_by(
    "test_its_examples_run", r"give what they show: those of shows_what_is_not do not\n(.*\n)+.*tensor\(\[2\.\]\)"
)
@merge_method(cut="element")
def shows_what_is_not(a: Same) -> Same:
    """Twice the same.

    >>> from torch import tensor
    >>> shows_what_is_not.on(tensor([1.0]))
    tensor([2.])
    """
    return a


@caught_by("test_it_changes_no_input", r"changes no input: mutates wrote into operand 0 of shape \[\]")
@merge_method(cut="element")
def mutates(a: Same, b: Same) -> Same:
    return a.add_(b)


@caught_by("test_it_changes_no_input", "mutates_the_mask wrote into operand 1")
@merge_method(cut="element")
def mutates_the_mask(a: Same, *, alpha: Mask = 0.5) -> Same:
    if isinstance(alpha, Tensor):
        alpha.clamp_(0.25, 0.75)
    return a * alpha


def _totals_in_place(a: Tensor) -> Mapping[str, Tensor]:
    return {"total": a.mul_(2).double().sum()}


@caught_by("test_it_changes_no_input", "reduces_in_place wrote into operand 0")
@merge_method(cut="element", reductions=(_totals_in_place,))
def reduces_in_place(a: Same, *, sums: Sums) -> Same:
    return a + float(sums["total"])


DUE = "test_results_have_the_declared_shape_and_the_type_of_the_operands"


@caught_by(DUE, r"has the element type of the operands: widens made torch.float64 of torch.float32")
@merge_method(cut="element")
def widens(a: Same) -> Same:
    return a.double()


@caught_by(DUE, r"narrows made torch.float32 of torch.float64")
@merge_method(cut="tensor")
def narrows(a: Same) -> Same:
    return a.float()


@caught_by(DUE, r"flattens made \[1\] where \[\] is due")
@merge_method(cut="tensor")
def flattens(a: Same) -> Same:
    return a.reshape(-1)


@caught_by(DUE, r"falsely_shaped made \[0\] where \[1, 0\] is due")
@merge_method(cut="tensor", shape=lambda shapes, values: (1, *shapes[0]) if len(shapes[0]) == 1 else shapes[0])
def falsely_shaped(a: Same) -> Same:
    return a


@caught_by(DUE, "a method gives a tensor: gives_a_number gave float")
@merge_method(cut="tensor")
def gives_a_number(a: Same) -> Same:
    return float(a.sum())  # type: ignore[return-value]


@caught_by(DUE, r"of any shape, in float32 and float64: given \[\[0\]\] of torch.float32, needs_elements raised")
@merge_method(cut="tensor")
def needs_elements(a: Same) -> Same:
    return a / a.abs().max()


@caught_by(DUE, r"given \[\[\]\] of torch.float32, needs_rows raised IndexError")
@merge_method(cut="tensor")
def needs_rows(a: Same) -> Same:
    return a / a.shape[0]


@caught_by(DUE, r"needs_float32 raised RuntimeError")
@merge_method(cut="tensor")
def needs_float32(a: Same) -> Same:
    return a - torch.dot(a.reshape(-1), torch.ones(a.numel()))


@caught_by(DUE, r"needs_a_number raised \w+Error")
@merge_method(cut="element")
def needs_a_number(a: Same, *, alpha: Mask = 0.5) -> Same:
    return a * float(alpha)


@caught_by(
    "test_nan_and_infinities_do_no_harm", "without raising: given them, needs_finite raised ValueError: not finite"
)
@merge_method(cut="element")
def needs_finite(a: Same) -> Same:
    if not a.isfinite().all():
        raise ValueError("not finite")
    return a


@caught_by("test_nan_and_infinities_do_no_harm", r"drops_nan made \[0\] where \[\] is due")
@merge_method(cut="tensor")
def drops_nan(a: Same) -> Same:
    return a[~a.isnan()] if bool(a.isnan().any()) else a


@caught_by("test_nan_and_infinities_spread_where_that_is_declared", "hides nan in operand 1")
@merge_method(cut="element", spreads=True)
def says_that_it_spreads(a: Same, b: Same) -> Same:
    return a.nan_to_num() + b


CUT = "test_any_cut_of_the_tensors_gives_the_same_bits"


@caught_by(CUT, r"a slice of the operands gives that slice of the result: centres differs \(cut into slices of \(64,\)")
@merge_method(cut="element")
def centres(a: Same) -> Same:
    return a - a.sum() / max(a.numel(), 1)


@caught_by(
    "test_any_rows_of_the_tensors_give_the_same_rows",
    r"some rows of the operands give those rows of the result: sums_columns differs \(cut into \(1,\) rows",
)
@merge_method(cut="row")
def sums_columns(a: Same) -> Same:
    return a - a.sum(0, keepdim=True)


@caught_by(CUT, "running differs")
@merge_method(cut="element")
def running(a: Same) -> Same:
    return a.reshape(-1).cumsum(0).reshape(a.shape)


@caught_by(CUT, r"scales_rows differs \(tensors of another shape")
@merge_method(cut="element")
def scales_rows(a: Same) -> Same:
    return a * 2 if a.dim() == 2 else a


@caught_by(CUT, "draws_by_slice differs")
@merge_method(cut="element")
def draws_by_slice(a: Same, *, seed: Integer = 0, random: Random) -> Same:
    drawn = np.random.default_rng(random.seed).random(a.numel())
    return a * torch.from_numpy(drawn).to(a.dtype).reshape(a.shape)


@caught_by(CUT, r"made \[32\] where \[64\] is due")
@merge_method(cut="element")
def halves(a: Same) -> Same:
    return a.reshape(-1)[: a.numel() // 2] if a.numel() == 64 else a


SUMS = "test_reductions_add_up"


def _largest(a: Tensor) -> Mapping[str, Tensor]:
    return {"largest": a.double().abs().max() if a.numel() else torch.zeros((), dtype=torch.float64)}


@caught_by(SUMS, "partial sums add up to the whole's: 'largest' of by_largest is")
@merge_method(cut="element", reductions=(_largest,))
def by_largest(a: Same, *, sums: Sums) -> Same:
    return a / float(sums["largest"])


def _in_float32(a: Tensor) -> Mapping[str, Tensor]:
    return {"total": a.float().sum()}


@caught_by(SUMS, "or counts in int64, by the same names for any slice: by_float32 gave torch.float32 'total'")
@merge_method(cut="element", reductions=(_in_float32,))
def by_float32(a: Same, *, sums: Sums) -> Same:
    return a + float(sums["total"])


def _one_each(a: Tensor) -> Mapping[str, Tensor]:
    return {"slices": a.double().sum() * 0 + 1}


@caught_by(SUMS, "'slices' of by_slices is 1.0 whole, but 12.0 added up")
@merge_method(cut="element", reductions=(_one_each,))
def by_slices(a: Same, *, sums: Sums) -> Same:
    return a / float(sums["slices"])


def _named_by_length(a: Tensor) -> Mapping[str, Tensor]:
    return {f"total{a.numel()}": a.double().sum()}


@caught_by(SUMS, "by the same names for any slice: by_length gave")
@merge_method(cut="element", reductions=(_named_by_length,))
def by_length(a: Same, *, sums: Sums) -> Same:
    return a


def _total(a: Tensor) -> Mapping[str, Tensor]:
    return {"total": a.double().sum()}


@caught_by(SUMS, r"each sum has a name of its own: by_two_rounds gives \['total'\] twice")
@merge_method(cut="element", reductions=(_total, _total))
def by_two_rounds(a: Same, *, sums: Sums) -> Same:
    return a


def _mean(a: Tensor) -> Mapping[str, Tensor]:
    return {"mean": a.double().mean()}


@caught_by(SUMS, "'mean' of by_mean is")
@merge_method(cut="element", reductions=(_mean,))
def by_mean(a: Same, *, sums: Sums) -> Same:
    return a - float(sums["mean"])


PURE = "test_the_same_inputs_give_the_same_result"


@caught_by(PURE, "a method is a pure function: .* shakes differs")
@merge_method(cut="tensor")
def shakes(a: Same) -> Same:
    return a + torch.randn(a.shape)


@caught_by("test_it_leaves_the_shared_generators_alone", "shakes_quietly changed the state of torch's generator")
@merge_method(cut="tensor")
def shakes_quietly(a: Same) -> Same:
    torch.manual_seed(0)
    return a + torch.randn(a.shape)


@caught_by(PURE, "reads_the_clock differs")
@merge_method(cut="element")
def reads_the_clock(a: Same) -> Same:
    return a + time.time()


_CALLS = itertools.count()


@caught_by(PURE, "counts_its_calls differs")
@merge_method(cut="element")
def counts_its_calls(a: Same) -> Same:
    return a + next(_CALLS)


_SEEN: dict[torch.Size, Tensor] = {}


@caught_by(PURE, "remembers differs")
@merge_method(cut="element")
def remembers(a: Same) -> Same:
    before = _SEEN.get(a.shape, a)
    _SEEN[a.shape] = a
    return before


RANDOM = "test_random_numbers_depend_on_key_and_seed"


@caught_by(RANDOM, r"a random method takes `seed: Integer`: unseeded\(a\) has none")
@merge_method(cut="element")
def unseeded(a: Same, *, random: Random) -> Same:
    return a * torch.from_numpy(random.uniform()).to(a.dtype).reshape(a.shape)


@caught_by(RANDOM, "random numbers differ by key and by seed: draws_nothing gives the same for another key")
@merge_method(cut="element")
def draws_nothing(a: Same, *, seed: Integer = 0, random: Random) -> Same:
    return a


@caught_by(RANDOM, "forgets_the_seed gives the same for another seed")
@merge_method(cut="element")
def forgets_the_seed(a: Same, *, seed: Integer = 0, random: Random) -> Same:
    drawn = Random(0, random.method, random.key, random.offset, random.size).uniform()
    return a * torch.from_numpy(drawn).to(a.dtype).reshape(a.shape)


SHORT = "test_shortcuts_are_true"


@caught_by(SHORT, r"a shortcut names the operand that is the result: crossed at alpha=0.0 is [\d.]+ from 'b'")
@merge_method(cut="element", shortcuts=(Shortcut("alpha", 0.0, "b"),))
def crossed(a: Same, b: Same, *, alpha: Number = 0.5) -> Same:
    return torch.lerp(a, b, alpha)


@caught_by(SHORT, "offset at alpha=1.0")
@merge_method(cut="element", shortcuts=(Shortcut("alpha", 1.0, "a"),))
def offset(a: Same, alpha: Number = 0.5) -> Same:
    return a * alpha + 1e-3


@caught_by(SHORT, "ill_at_zero at alpha=0.0 is nan")
@merge_method(cut="element", shortcuts=(Shortcut("alpha", 0.0, "a"),))
def ill_at_zero(a: Same, *, alpha: Number = 0.5) -> Same:
    return a * a / a * (1.0 - alpha)


@caught_by(SHORT, "no_such_operand has no operand 'alpha'")
@merge_method(cut="element", shortcuts=(Shortcut("alpha", 0.0, "alpha"),))
def no_such_operand(a: Same, *, alpha: Number = 0.5) -> Same:
    return a * alpha


MASS = "test_its_mass_rule_is_true"


def _first(masses: Sequence[Mass], values: Bindings) -> Mass:
    return masses[0]


@caught_by(MASS, r"said to have mass 1, but is [\d.]+ off")
@merge_method(cut="element", mass=_first)
def sums_of_false_mass(a: AnySpace, b: AnySpace) -> AnySpace:
    return a + b


@caught_by(MASS, "doubles where the models and differences double: adds_one of operands of masses")
@merge_method(cut="element", mass=lambda masses, values: 0.0)
def adds_one(a: AnySpace, b: AnySpace) -> AnySpace:
    return (a - a) * b + 1.0


@caught_by(
    "test_its_mass_rule_answers_for_any_masses", "or raises RecipeError: given some masses, adds_none raised TypeError"
)
@merge_method(cut="element", mass=lambda masses, values: masses[0] + masses[1])
def adds_none(a: AnySpace, b: AnySpace) -> AnySpace:
    return a + b


@caught_by("test_its_mass_rule_answers_for_any_masses", "has 'weight'")
@merge_method(cut="element", mass=lambda masses, values: "weight")
def names_a_space(a: AnySpace) -> AnySpace:
    return a


@caught_by("test_its_temporary_memory_is_as_declared", "declares 0.5 operands, but held 4.00 beside")
@merge_method(cut="tensor", workspace=0.5)
def hoards(a: Same) -> Same:
    copies = [a + number for number in range(3)]
    return copies[0] + copies[1] + copies[2]


GROUPS = "test_groups_are_disjoint_and_of_known_keys"
OUTPUTS = "test_groups_give_exactly_the_declared_outputs"


def _norms(layout: Mapping[str, TensorInfo]) -> list[str]:
    return [key for key in layout if "norm" in key]


def _layers(layout: Mapping[str, TensorInfo]) -> list[Group]:
    return [Group((key,), (key,)) for key in _norms(layout)]


@caught_by(GROUPS, r"no key is computed by two groups: overlaps computes \['layers.0.norm.weight', 'layers.1.norm")
@merge_method(cut="model", keys=lambda layout: [Group((key,), (key,)) for key in _norms(layout) * 2])
def overlaps(a: Tensors) -> Tensors:
    return a


@caught_by(GROUPS, r"names only keys of the model: invents also names \['norm.of.all'\]")
@merge_method(cut="model", keys=lambda layout: [Group((key,), ("norm.of.all",)) for key in _norms(layout)])
def invents(a: Tensors) -> Tensors:
    return a


@caught_by(GROUPS, "finds none in .*: override the fixture `shapes`")
@merge_method(cut="model", keys=lambda layout: [Group((key,), (key,)) for key in layout if "expert" in key])
def finds_nothing(a: Tensors) -> Tensors:
    return a


@caught_by(GROUPS, "do not depend on the order of the keys")
@merge_method(cut="model", keys=lambda layout: [Group((key,), (key,)) for key in _norms(layout)[:1]])
def takes_the_first(a: Tensors) -> Tensors:
    return a


@caught_by(GROUPS, r"has no groups: given such a model, looks_up raised KeyError")
@merge_method(cut="model", keys=lambda layout: layout["layers.0.norm.weight"] and _layers(layout))
def looks_up(a: Tensors) -> Tensors:
    return a


@caught_by(OUTPUTS, r"exactly the outputs that it declares: forgets declares \['layers.0.norm.weight'\], but gave \[\]")
@merge_method(cut="model", keys=_layers)
def forgets(a: Tensors) -> Tensors:
    return {}


@caught_by(OUTPUTS, "but gave .*extra")
@merge_method(cut="model", keys=_layers)
def gives_more(a: Tensors) -> Tensors:
    return {**a, "extra": torch.zeros(1)}


@caught_by(OUTPUTS, "a group reads its inputs alone: given the group of layers.0.norm.weight .* raised KeyError")
@merge_method(cut="model", keys=_layers)
def reads_more(a: Tensors) -> Tensors:
    return {key: value + a["embed.weight"].sum() for key, value in a.items()}


@caught_by(OUTPUTS, r"joins made \[14\] where \[7\] is due")
@merge_method(cut="model", keys=_layers)
def joins(a: Tensors) -> Tensors:
    return {key: torch.cat([value, value]) for key, value in a.items()}


@caught_by("test_it_changes_no_input", "empties changed a mapping|empties wrote into")
@merge_method(cut="model", keys=_layers)
def empties(a: Tensors) -> Tensors:
    return {key: value.zero_() for key, value in a.items()}


ENGINE = "test_the_engine_gives_the_same_bits"


@caught_by(ENGINE, "the engine gives the method's own bits: knows_its_thread differs")
@merge_method(cut="element")
def knows_its_thread(a: Same) -> Same:
    return a if threading.current_thread() is threading.main_thread() else a * 2


@caught_by(ENGINE, "the engine can run the method: .* fails_elsewhere raised MethodError: fails_elsewhere failed on")
@merge_method(cut="element")
def fails_elsewhere(a: Same) -> Same:
    assert threading.current_thread() is threading.main_thread()
    return a


@caught_by(ENGINE, "can be merged with: some operands give a weight, a delta or a mask: is_never_whole gives none")
@merge_method(cut="element", mass=lambda masses, values: 0.5)
def is_never_whole(a: AnySpace) -> AnySpace:
    return a * 0.5


@caught_by(ENGINE, "the method is tried on some keys: selects_nothing selects none of the model's")
@merge_method(cut="element", selects=lambda facts, values: False)
def selects_nothing(a: Same) -> Same:
    return a


@pytest.mark.parametrize(("method", "check", "message"), CAUGHT, ids=[method.name for method, _, _ in CAUGHT])
def test_a_broken_method_is_caught(method: AnyMethod, check: str, message: str) -> None:
    given = (Case.of(method), torch.float32) if check == ENGINE else (Case.of(method),)
    with pytest.raises(AssertionError, match=message):
        getattr(MethodConformance(), check)(*given)


def test_every_check_is_known_to_catch_something() -> None:
    checks = {name for name in vars(MethodConformance) if name.startswith("test_")}
    assert checks - {check for _, check, _ in CAUGHT} == {"test_its_calls_can_be_pickled"}


def test_values_that_no_argument_takes_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"`values` names arguments of the method, but got \['alhpa'\]"):
        MethodConformance().test_it_changes_no_input(Case.of("slerp", {"alhpa": 0.5}))
