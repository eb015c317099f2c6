"""Every method of older recipes becomes calls that today's methods take, with the defaults of its time."""

from __future__ import annotations

import inspect

import pytest

from remelt.check.bound import bind_recipes
from remelt.check.spaces import infer_masses
from remelt.errors import RecipeError, RecipeSyntaxError
from remelt.methods import METHODS
from remelt.recipe.node import Call, Model, Value
from remelt.recipe.permuting import expand_permutations
from remelt.recipe.signature import bind
from remelt.recipe.walk import topological
from remelt.text.eras.methods import HEADERLESS, MISSING, OLDEST, RETURNS, VERSION_0_1, ArgumentError, OldMethod
from remelt.text.reader import read_recipe

VALUES: dict[str, object] = {
    **dict.fromkeys(("vote_sgn", "apply_stock", "apply_median", "use_approximate_basis"), False),
    **dict.fromkeys(("rank", "maxiter", "approximate_basis_iters", "stiefel_max_iters"), 3),
    **dict.fromkeys(("della_eps", "overlap_emphasis"), 0.0),
    "component": "vae",
    "dtype": "float16",
    "seed": 7,
}
ERAS = {"version 0.1.0": VERSION_0_1, "headerless": HEADERLESS, "oldest": OLDEST}
EACH = [(era, name) for era, methods in ERAS.items() for name in methods]


def calls_of(method: OldMethod, values: dict[str, object]) -> list[Call]:
    operands = [Model(name) for name in method.operands] + [Model("z")] * method.variadic
    root = method.call(operands, {name: Value(value) for name, value in values.items()})  # type: ignore[arg-type]
    return [node for node in topological(root) if isinstance(node, Call)]


@pytest.mark.parametrize(("era", "name"), EACH)
def test_a_call_of_an_older_method_binds(era: str, name: str) -> None:
    method = ERAS[era][name]
    if method.optional:  # three models are another graph: see the golden recipes
        method = VERSION_0_1[name]
    every = {one: VALUES.get(one, 0.5) for one in method.values}
    for values in (every, {} if "distribution" not in name and "similarity_" not in name else every):
        values = {one: value for one, value in values.items() if one != "mean" or "alpha" not in values}
        if name == "cast":
            values = every
        if name in ("pick_component", "omit_component"):
            values = {"component": "vae"}
        for call in calls_of(method, values):
            if call.method == "rebasin":  # no method: the model becomes a view of itself
                assert isinstance(expand_permutations(call), Model)
                continue
            bind(METHODS[call.method], call)


@pytest.mark.parametrize("switches", [(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)])
def test_ties_of_each_kind_bind(switches: tuple[bool, bool, bool]) -> None:
    given = dict(zip(("vote_sgn", "apply_stock", "apply_median"), switches, strict=True))
    for name in ("ties_sum_extended", "ties_sum_with_dropout"):
        names = [call.method for call in calls_of(VERSION_0_1[name], given)]
        for call in calls_of(VERSION_0_1[name], given):
            bind(METHODS[call.method], call)
        kind = "ties_with_median" if switches[2] else "ties_sum" if switches[1] else "ties_with_stock"
        assert kind in names
        assert ("dare" in names) == (name == "ties_sum_with_dropout")


def test_values_that_were_switches_or_seeds_mean_the_same() -> None:
    text = 'model "a" "sd1"\nmodel "b" "sd1"\nmerge "subtract" &0 &1\n'
    kept = read_recipe(text + 'merge "ties_sum_with_dropout" &2 &2 no_rescale=1.0 seed=None')
    enlarged = read_recipe(text + 'merge "ties_sum_with_dropout" &2 &2 no_rescale=0.0 seed=-1')
    assert isinstance(kept, Call)
    assert isinstance(enlarged, Call)
    assert (kept.method, enlarged.method) == ("ties_sum", "scale")
    assert (
        read_recipe(text + 'merge "top_k_tensor_sum" &0 &1').digest()
        == read_recipe(text + 'merge "top_k_tensor_sum" &0 &1 width=0.5').digest()
    )


def test_what_older_methods_return_is_what_those_of_today_declare() -> None:
    for name, space in RETURNS.items():
        if name in METHODS and name not in ("subtract", "model_stock"):
            today = METHODS[name].returns
            assert space == today or (space == "same" and today in ("any", "same")), name
    a, b = Model("a"), Model("b")
    for method in VERSION_0_1.values():
        if method.composed is not None and method.name != "rebasin":
            difference = Call("subtract", (a, b))
            root = method.call([difference, difference][: len(method.operands) + method.variadic], {})
            assert infer_masses(bind_recipes([root], METHODS))[0][-1] == 0.0
            assert method.returns == "delta"


@pytest.mark.parametrize("name", MISSING)
def test_a_known_method_that_is_not_here_yet_is_said_to_be(name: str) -> None:
    assert name not in METHODS or name in ("randperm", "omit_non_finite")  # which do other things here
    with pytest.raises(RecipeSyntaxError, match=f"{name} of sd-mecha is not in remelt yet"):
        read_recipe(f'version 0.1.0\nmodel "a"\nmerge "{name}" &0')


def test_arguments_are_bound_by_place_and_by_name() -> None:
    weighted_sum, clamp = VERSION_0_1["weighted_sum"], VERSION_0_1["clamp"]
    assert weighted_sum.bind(["x"], [("alpha", "z"), ("b", "y")]) == (["x", "y"], {"alpha": "z"})
    assert clamp.bind(["x", "y", "z"], [("stiffness", "s")]) == (["x", "y", "z"], {"stiffness": "s"})
    assert HEADERLESS["add_difference"].bind(["x", "y", "z"], []) == (["x", "y", "z"], {})
    for positional, named, place, message in (
        (["x", "y"], [("a", "z")], 2, "'a' is given twice"),
        (["x"], [("alpha", "z")], -1, "b is missing"),
        (["x", "y"], [("alhpa", "z")], 2, "no argument 'alhpa'"),
        (["x", "y", "z", "w"], [], 3, "takes 2 models and alpha, but got more"),
    ):
        with pytest.raises(ArgumentError, match=message) as caught:
            weighted_sum.bind(positional, named)
        assert caught.value.place == place


def test_della_of_whole_tensors_is_refused() -> None:
    with pytest.raises(RecipeError, match="ranks the elements of a whole tensor"):
        VERSION_0_1["ties_sum_with_dropout"].call([Model("a")], {"della_eps": Value(0.1)})


def test_defaults_are_those_of_sd_mecha() -> None:
    sd_mecha = pytest.importorskip("sd_mecha")
    checked = 0
    for name, method in VERSION_0_1.items():
        if method.composed is not None or name.startswith("cosine_add") or not method.values:
            continue
        theirs = sd_mecha.extensions.merge_methods.resolve(name)
        if theirs.wrapped_is_class:
            continue
        given = {one.name: one.default for one in METHODS[name].parameters}
        found = inspect.signature(theirs.__wrapped__).parameters
        for value in set(method.values) - method.dropped:
            default = found[value].default
            today = given[method.renamed.get(value, value)]
            assert default in (today, inspect.Parameter.empty, None), (name, value)
            checked += 1
    assert checked > 15
