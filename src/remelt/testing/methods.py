"""The conformance suite of merge methods: every claim that a method declares, checked by itself and in the engine."""

from __future__ import annotations

import doctest
import pickle
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from remelt.methods import METHODS
from remelt.recipe.blocks import MAKERS, blocks
from remelt.recipe.method import Method
from remelt.recipe.node import Call, model
from remelt.recipe.signature import bind
from remelt.testing.cases import SHAPES, Case, Shapes, same_bits
from remelt.testing.laws import (
    one_result,
    raising_nothing,
    require,
    require_form,
    require_same,
    require_sums,
    require_unchanged,
)
from remelt.testing.merging import RUNS, expected_of, group_result, merge_in_engine, models_of
from remelt.testing.trials import (
    CUTS,
    DTYPES,
    LENGTH,
    elsewhere,
    every_group,
    groups_of,
    one_thread,
    slices,
    structured,
    temporary_bytes,
    trials,
    trials_of_groups,
    wild,
    with_masks,
)

RESERVED = frozenset({"version", "model", "parameter", "search", *MAKERS})
"""Words of a recipe's text that mean something else than a method."""
ROUND_OFF = {torch.float32: 1e-5, torch.float64: 1e-12}
_SMALL = 2048
"""Bytes of single numbers that do not count as temporary memory."""


class MethodConformance:
    """What every merge method must keep to. Inherit it, and supply the method:

        class TestMine(MethodConformance):
            @pytest.fixture
            def method(self):
                return mine

    ``method`` may also return the name of a registered method. Two more fixtures may be overridden, where the defaults
    will not do: ``values``, by name, for arguments that can be neither left out nor guessed; ``shapes``, the keys and
    shapes of a small model, for a method of cut ``model`` that looks for certain keys.
    """

    @pytest.fixture
    def method(self) -> Method[..., Any] | str:
        """The method to be checked, or its name."""
        raise AssertionError("a conformance class supplies a fixture `method`: a merge method, or a registered name")

    @pytest.fixture
    def values(self) -> Mapping[str, Any]:
        """Values of arguments that are no tensors, by name; by default the method's own, else a guess."""
        return {}

    @pytest.fixture
    def shapes(self) -> Shapes:
        """The keys and shapes of the model that the method is tried on."""
        return SHAPES

    @pytest.fixture
    def case(self, method: Method[..., Any] | str, values: Mapping[str, Any], shapes: Shapes) -> Case:
        """The method with its arguments."""
        return Case.of(method, values, shapes=shapes)

    def test_its_name_can_be_written_in_a_recipe(self, case: Case) -> None:
        name = case.method.name
        require(
            name.isidentifier() and name not in RESERVED,
            "a method's name is a word that recipes do not use",
            repr(name),
        )
        known = METHODS.get(name, case.method)
        here, there = (one.function.__code__ for one in (case.method, known))
        require(
            known is case.method or (here.co_filename, here.co_name) == (there.co_filename, there.co_name),
            "a method's name is its own",
            f"{name!r} is also a method of {known.function.__module__}",
        )

    def test_it_is_documented(self, case: Case) -> None:
        text, name = case.method.documentation, case.method.name
        first = text.partition("\n")[0]
        law = "a method's documentation begins with a sentence that says what it gives"
        require(bool(first), law, f"{name} has no docstring")
        require(first.endswith("."), law, f"{name} begins with {first!r}, which does not end in a full stop")
        formula = any(line.startswith("Formula: ") for line in text.splitlines())
        require(formula, "a method's documentation has a line `Formula: ...`", f"{name} has none")

    def test_its_examples_run(self, case: Case) -> None:
        name, function = case.method.name, case.method.function
        scope = {**function.__globals__, name: case.method, function.__name__: case.method}
        found = doctest.DocTestParser().get_doctest(case.method.documentation, scope, name, None, 0)
        require(bool(found.examples), "a method's documentation has an example", f"{name} has no line with >>>")
        told: list[str] = []
        doctest.DocTestRunner(verbose=False).run(found, out=told.append)
        require(not told, "a method's examples give what they show", f"those of {name} do not\n{''.join(told)}")

    def test_it_changes_no_input(self, case: Case) -> None:
        for one, dtype, shape in trials(case):
            tensors = one.operands(shape, dtype)
            before = [tensor.clone() for tensor in tensors]
            one_result(one, tensors)
            require_unchanged(one, tensors, before)
        for one, _, models in trials_of_groups(case):
            before_all = [{key: tensor.clone() for key, tensor in held.items()} for held in models]
            every_group(one, models)
            for held, kept in zip(models, before_all, strict=True):
                require(list(held) == list(kept), "a method changes no input", f"{one.method.name} changed a mapping")
                require_unchanged(one, list(held.values()), list(kept.values()))

    def test_results_have_the_declared_shape_and_the_type_of_the_operands(self, case: Case) -> None:
        for one, dtype, shape in trials(case):
            tensors = one.operands(shape, dtype)
            declared = one.shape_of([tuple(tensor.shape) for tensor in tensors])
            require_form(one, one_result(one, tensors), declared, dtype)

    def test_nan_and_infinities_do_no_harm(self, case: Case) -> None:
        for one, dtype, shape in trials(case):
            declared = one.shape_of([shape for _ in one.slots])
            for tensors in wild(one, shape, dtype):
                with raising_nothing(one, "a method takes NaN, infinities and extremes without raising", "them"):
                    result = one.apply(tensors)
                require_form(one, result, declared, dtype)

    def test_nan_and_infinities_spread_where_that_is_declared(self, case: Case) -> None:
        if not case.method.declaration.spreads:
            return
        law = "a method that spreads NaN and infinities shows each of them in that element of its result"
        require(case.method.declaration.cut == "element", law, f"{case.method.name} is not of cut 'element'")
        for one, dtype, shape in trials(case):
            for slot in range(len(one.slots)):
                for value in (float("nan"), float("inf"), -float("inf")):
                    tensors = one.operands(shape, dtype)
                    if tensors[slot].numel() == 0:
                        continue
                    tensors[slot].view(-1)[-1] = value
                    shown = one_result(one, tensors).reshape(-1)[-1]
                    require(not bool(shown.isfinite()), law, f"{one.method.name} hides {value} in operand {slot + 1}")

    def test_any_cut_of_the_tensors_gives_the_same_bits(self, case: Case) -> None:
        if case.method.declaration.cut != "element":
            return
        law = "by element, a slice of the operands gives that slice of the result"
        for one in with_masks(case):
            for dtype in DTYPES:
                tensors = one.operands((LENGTH,), dtype)
                sums = one.sums(tensors, chunk=2**16)
                whole = one_result(one, tensors, sums=sums)
                for lengths in CUTS:
                    pieces = []
                    for begin, end in slices(LENGTH, lengths):
                        cut = [tensor[begin:end] for tensor in tensors]
                        pieces.append(one_result(one, cut, offset=begin, sums=sums, shape=(LENGTH,)))
                        require_form(one, pieces[-1], (end - begin,), dtype)
                    require_same(one, torch.cat(pieces), whole, law, f"cut into slices of {lengths}, {dtype}")
                folded = [tensor.reshape(1, LENGTH) for tensor in tensors]
                require_same(
                    one, one_result(one, folded, sums=sums).reshape(-1), whole, law, "tensors of another shape"
                )

    def test_any_rows_of_the_tensors_give_the_same_rows(self, case: Case) -> None:
        if case.method.declaration.cut != "row":
            return
        law = "by row, some rows of the operands give those rows of the result"
        for one in with_masks(case):
            for dtype in DTYPES:
                tensors = one.operands((23, 37), dtype)
                sums = one.sums(tensors, chunk=2**16)
                whole = one_result(one, tensors, sums=sums)
                for lengths in ((1,), (8,), (3, 11), (22, 1)):
                    pieces = []
                    for begin, end in slices(23, lengths):
                        rows = [tensor[begin:end] for tensor in tensors]
                        pieces.append(one_result(one, rows, offset=begin * 37, sums=sums, shape=(23, 37)))
                        require_form(one, pieces[-1], (end - begin, 37), dtype)
                    require_same(one, torch.cat(pieces), whole, law, f"cut into {lengths} rows, {dtype}")

    def test_reductions_add_up(self, case: Case) -> None:
        method = case.method
        known: set[str] = set()
        shape = (LENGTH // 16, 16) if method.declaration.cut == "row" else (LENGTH,)
        for one in with_masks(case):
            for dtype in DTYPES:
                tensors, earlier = one.operands(shape, dtype), dict[str, Tensor]()
                known.clear()
                for number in range(len(method.declaration.reductions)):
                    with raising_nothing(one, "a reduction takes any slice, an empty one too", "a slice"):
                        whole = one.round(number, tensors, None, earlier, LENGTH)
                        parts = one.round(number, tensors, None, earlier, 64)
                        empty = one.round(number, [tensor[:0] for tensor in tensors], None, earlier, 64)
                    require_sums(method.name, whole, parts, empty)
                    twice = known & set(whole)
                    require(not twice, "each sum has a name of its own", f"{method.name} gives {sorted(twice)} twice")
                    known |= set(whole)
                    earlier |= whole

    def test_the_same_inputs_give_the_same_result(self, case: Case) -> None:
        law = "a method is a pure function: the same inputs give the same bits, whatever was done before"
        for one, dtype, shape in trials(case, shapes=((131,), (3, 5))):
            tensors = one.operands(shape, dtype)
            first = one_result(one, tensors)
            one_result(one, one.operands(shape, dtype, seed=7))
            with elsewhere():
                again = one_result(one, tensors)
            require_same(one, again, first, law, f"called again on {list(shape)}")

    def test_it_leaves_the_shared_generators_alone(self, case: Case) -> None:
        for one, dtype, shape in trials(case, shapes=((131,), (3, 5))):
            before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()  # noqa: NPY002
            one_result(one, one.operands(shape, dtype))
            after = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()  # noqa: NPY002
            for name, was, now in zip(("torch", "numpy", "random"), before, after, strict=True):
                same = bool(torch.equal(was, now)) if isinstance(was, Tensor) else was == now  # type: ignore[arg-type]
                require(
                    same,
                    "a method draws only from the `random: Random` that it is given",
                    f"{one.method.name} changed the state of {name}'s generator",
                )

    def test_random_numbers_depend_on_key_and_seed(self, case: Case) -> None:
        method = case.method
        if "random" not in method.given:
            return
        seeded = any(parameter.name == "seed" for parameter in method.parameters)
        require(seeded, "a random method takes `seed: Integer`", f"{method.signature} has none")
        if method.declaration.cut == "model":
            return
        tensors = case.operands((LENGTH,))
        first = one_result(case, tensors)
        reseeded = Case(method, {**case.settings, "seed": case.settings["seed"] + 1}, case.shapes)
        for what, other in (
            ("another key", one_result(case, tensors, key="layers.1.weight")),
            ("another seed", one_result(reseeded, tensors)),
        ):
            require(
                not same_bits(other, first),
                "random numbers differ by key and by seed",
                f"{method.name} gives the same for {what}",
            )

    def test_shortcuts_are_true(self, case: Case) -> None:
        method = case.method
        for shortcut in method.declaration.shortcuts:
            names = [parameter.name for parameter in case.slots]
            law = "a shortcut names the operand that is the result"
            require(shortcut.result in names, law, f"{method.name} has no operand {shortcut.result!r}")
            settings = {**case.settings, shortcut.parameter: shortcut.value}
            for dtype in DTYPES:
                for tensors in structured(case, dtype):
                    due = tensors[names.index(shortcut.result)]
                    found = one_result(case, tensors, settings)
                    size = max((float(tensor.abs().max()) for tensor in tensors), default=0.0)
                    gap = float((found - due).abs().max())
                    require(
                        gap <= ROUND_OFF[dtype] * size,
                        law,
                        f"{method.name} at {shortcut.parameter}={shortcut.value} is {gap:.3g} from "
                        f"{shortcut.result!r} ({dtype}, largest element {size:.3g})",
                    )

    def test_its_mass_rule_answers_for_any_masses(self, case: Case) -> None:
        if case.method.declaration.mass is None:
            return
        numbers = {parameter.name for parameter in case.method.parameters if parameter.is_numeric}
        by_block = {name: blocks(IN00=0.5) if name in numbers else value for name, value in case.settings.items()}
        for settings in (case.settings, by_block):
            one = Case(case.method, settings, case.shapes)
            with raising_nothing(one, "a mass rule gives a mass, or raises RecipeError", "some masses"):
                chosen = list(one.mass_choices())
            for masses, mass in chosen:
                law = "a mass is a number, or None for a param"
                require(mass is None or isinstance(mass, float), law, f"{one.method.name} of {masses} has {mass!r}")
        if "any" in {case.method.returns, *(parameter.kind for parameter in case.method.parameters)}:
            law = "a mass rule allows some operands"
            require(bool(list(case.mass_choices())), law, f"{case.method.name} refuses every choice of masses")

    def test_its_mass_rule_is_true(self, case: Case) -> None:
        if case.method.declaration.mass is None or case.method.declaration.cut == "model":
            return
        name = case.method.name
        for masses, mass in case.mass_choices():
            if mass is None:
                continue
            tensors = case.operands((131,), torch.float64)
            shift = torch.linspace(-2.0, 3.0, 131, dtype=torch.float64)
            plain = one_result(case, tensors)
            moved = one_result(case, [t if m is None else t + m * shift for t, m in zip(tensors, masses, strict=True)])
            gap = float((moved - plain - mass * shift).abs().max())
            require(
                gap < 1e-9,
                "a result of mass m moves by m t where every operand of mass k moves by k t",
                f"{name} of operands of masses {masses} is said to have mass {mass:g}, but is {gap:.3g} off",
            )
            doubled = one_result(case, [t if m is None else 2 * t for t, m in zip(tensors, masses, strict=True)])
            gap = float((doubled - 2 * plain).abs().max())
            require(
                gap < 1e-9,
                "a result with a mass doubles where the models and differences double",
                f"{name} of operands of masses {masses} is {gap:.3g} off",
            )

    def test_groups_are_disjoint_and_of_known_keys(self, case: Case) -> None:
        keys, name = case.method.declaration.keys, case.method.name
        if keys is None:
            return
        layout = case.layout()
        groups = groups_of(case, layout)
        outputs = [key for group in groups for key in group.outputs]
        doubled = {key for key in outputs if outputs.count(key) > 1}
        require(not doubled, "no key is computed by two groups", f"{name} computes {sorted(doubled)} more than once")
        unknown = {key for group in groups for key in (*group.outputs, *group.inputs)} - set(layout)
        require(not unknown, "a group names only keys of the model", f"{name} also names {sorted(unknown)}")
        turned = groups_of(case, dict(reversed(layout.items())))
        require(
            {frozenset(group.outputs) for group in turned} == {frozenset(group.outputs) for group in groups},
            "groups do not depend on the order of the keys",
            f"{name} gives other groups for the same keys in reverse",
        )
        with raising_nothing(case, "a model without the keys that are looked for has no groups", "such a model"):
            nothing = list(keys({}))
        require(not nothing, "a model without the keys that are looked for has no groups", f"{name} gave {nothing}")

    def test_groups_give_exactly_the_declared_outputs(self, case: Case) -> None:
        for one, dtype, models in trials_of_groups(case):
            for group in groups_of(one, one.layout()):
                law = "a group reads its inputs alone"
                with raising_nothing(one, law, f"the group of {group.outputs[0]} with inputs {list(group.inputs)}"):
                    result = group_result(one, models, group.inputs, group.outputs[0])
                    again = group_result(one, models, group.inputs, group.outputs[0])
                law = "a group gives exactly the outputs that it declares"
                require(isinstance(result, Mapping), law, f"{one.method.name} gave {type(result).__name__}")
                gave = f"{one.method.name} declares {sorted(group.outputs)}, but gave {sorted(result)}"
                require(set(result) == set(group.outputs), law, gave)
                for key, tensor in result.items():
                    require_form(one, tensor, tuple(one.shapes[key]), dtype)
                    require_same(one, again[key], tensor, "the same inputs give the same bits", f"called again: {key}")

    def test_its_temporary_memory_is_as_declared(self, case: Case) -> None:
        name, declared = case.method.name, case.method.declaration.workspace
        law = "temporary memory stays within the declared `workspace`"
        for used, operand, shapes in temporary_bytes(case):
            if callable(declared):
                allowed = declared(shapes, dict(case.settings))
                held = f"{name} declares {allowed:g} bytes for {shapes}, but held {used} beside operands and result"
                require(used <= allowed + _SMALL, law, held)
                continue
            held = f"{name} declares {declared:g} operands, but held {used / operand:.2f} beside operands and result"
            require(used <= declared * operand + _SMALL, law, held)

    def test_its_calls_can_be_pickled(self, case: Case) -> None:
        args, kwargs = case.arguments([model(f"model{number}.safetensors") for number in range(len(case.slots))])
        call = case.method(*args, **{name: value for name, value in kwargs.items() if value is not None})
        copy = pickle.loads(pickle.dumps(call))
        require(isinstance(copy, Call) and copy.digest() == call.digest(), "a call survives pickling", repr(call))
        require(
            bind(case.method, copy).values == bind(case.method, call).values, "a call survives pickling", repr(call)
        )

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_the_engine_gives_the_same_bits(self, case: Case, dtype: torch.dtype) -> None:
        for one in with_masks(case):
            spaces = one.spaces()
            law = "a method can be merged with: some operands give a weight, a delta or a mask"
            require(spaces is not None, law, f"{one.method.name} gives none")
            assert spaces is not None
            models = models_of(one, dtype)
            with one_thread():
                expected = expected_of(one, models)
            law = "the method is tried on some keys"
            require(
                bool(expected), law, f"{one.method.name} selects none of the model's: override `values` or `shapes`"
            )
            first: dict[str, Tensor] = {}
            for tile, slice_size, threads in RUNS:
                how = f"{threads} threads, tiles of {tile} elements, {dtype}"
                with raising_nothing(one, "the engine can run the method", how):
                    found = merge_in_engine(
                        one, models, spaces, dtype=dtype, tile=tile, slice_size=slice_size, threads=threads
                    )
                law = "the engine gives the keys that the method has"
                require(set(found) == set(expected), law, f"{sorted(set(found) ^ set(expected))} differ, {how}")
                for key, due in expected.items():
                    if one.method.declaration.reductions:  # the engine may add in another order
                        law = "the engine gives the method's own result, but for the order of adding"
                        bound = 64 * torch.finfo(due.dtype).eps * due.abs().max().clamp(min=1.0) if due.numel() else 0.0
                        require(
                            bool(((found[key] - due).abs() <= bound).all()), law, f"{one.method.name}: {key}, {how}"
                        )
                        due = first.setdefault(key, found[key])
                    require_same(one, found[key], due, "the engine gives the method's own bits", f"{key}, {how}")
