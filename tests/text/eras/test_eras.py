"""Recipes of older grammars: a folder of them, valid and invalid, each with the graph or the message beside it.

After a rendering or a message was changed on purpose, ``REMELT_GOLDEN=write`` writes it anew: read the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import remelt as rm
from remelt.errors import RecipeError
from remelt.recipe.node import Call, Model, Node, Value
from remelt.text.eras.weights import ARCHS, block_names, block_weights
from remelt.text.eras.writer import write_version_0_1
from remelt.text.reader import parse_document, read_recipe
from remelt.text.writer import write_document, write_recipe

RECIPES = sorted((Path(__file__).parent / "recipes").glob("*.mecha"))


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_recipe_of_an_older_grammar_is_read_or_refused(path: Path, read_as_told: Callable[[Path], str]) -> None:
    read_as_told(path)


def test_every_expectation_belongs_to_a_recipe() -> None:
    assert {path.stem for path in RECIPES[0].parent.glob("*.out")} == {path.stem for path in RECIPES}
    assert sum(path.stem.startswith("bad_") for path in RECIPES) >= 25


def test_comments_stay_with_their_steps() -> None:
    document = parse_document(
        'version 0.1.0\nmodel "a"\n# the second\nmodel "b"\n# both\nmerge "subtract" &0 &1', "old.mecha"
    )
    assert write_document(document).splitlines() == [
        "version 1",
        "# the second",
        'step_1 = model("b")',
        'a = model("a")',
        "# both",
        "step_2 = a - step_1",
        "step_2",
    ]


def test_comments_before_values_and_after_the_last_line_are_kept() -> None:
    path = RECIPES[0].parent / "version_0_1_named.mecha"
    assert [
        line for line in write_document(parse_document(path.read_text(), path.name)).splitlines() if "#" in line
    ] == [
        "# the models",
        "# how much of b",
        "# the end",
    ]


@given(st.text(alphabet=st.sampled_from('model merge dict literal&0123456789="\\ \t\n#.-eversion'), max_size=200))
def test_no_text_does_more_than_be_read_or_refused(text: str) -> None:
    for first in ("version 0.1.0\n", 'model "a"\n', 'call "subtract" &0 &0\n'):
        try:
            assert isinstance(read_recipe(first + text), Node)
        except RecipeError as error:
            assert error.message


NAMES = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=12)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**9), 10**9)


@st.composite
def graphs(draw: st.DrawFn) -> Node:
    """Recipes that version 0.1.0 can say: models, their differences, and what is made of both."""
    weights: list[Node] = [
        rm.model(name, arch=arch)
        for name, arch in draw(st.lists(st.tuples(NAMES, st.sampled_from([None, "sd1"])), min_size=1, max_size=3))
    ]
    deltas: list[Node] = [rm.model("difference", space="delta")]
    for _ in range(draw(st.integers(0, 8))):
        a, b = draw(st.sampled_from(weights)), draw(st.sampled_from(weights))
        d, e = draw(st.sampled_from(deltas)), draw(st.sampled_from(deltas))
        alpha = (("alpha", Value(draw(NUMBERS))),)
        made = draw(st.integers(0, 9))
        if made < 3:
            deltas.append((a - b, Call("scale", (d,), alpha), Call("ties_sum", (d, e), (("k", Value(0.5)),)))[made])
        else:
            weights.append(
                (
                    Call("weighted_sum", (a, b), alpha),
                    Call("add_difference", (a, d), alpha),
                    Call("n_average", (a, b, a)),
                    Call("clamp", (a, b, a)),
                    Call("pick_component", (a,), (("component", Value("vae")),)),
                    a | b,
                    Call("cast", (a,), (("dtype", Value("float16")),)),
                )[made - 3]
            )
    return weights[-1]


@given(graphs())
def test_version_0_1_reads_back_as_it_was_written(graph: Node) -> None:
    text = write_version_0_1(graph)
    again = read_recipe(text)
    assert again.digest() == graph.digest()
    assert write_version_0_1(again) == text
    assert read_recipe(write_recipe(again)).digest() == graph.digest()


def test_sums_and_differences_are_written_as_the_methods_that_it_has() -> None:
    a, b, c = map(rm.model, "abc")
    assert write_version_0_1(a - 0.5 * (b - c) + (a - b)).splitlines()[4:] == [
        'merge "subtract" &1 &2',
        'merge "scale" &3 alpha=0.5',
        'merge "add_difference" &0 &4 alpha=-1.0',
        'merge "subtract" &0 &1',
        'merge "add_difference" &5 &6 alpha=1.0',
    ]


def test_operands_by_name_are_written_in_the_order_of_the_signature() -> None:
    a, b = rm.model("a"), rm.model("b")
    for recipe, line in (
        (rm.subtract(b=b, a=a), 'merge "subtract" &0 &1'),
        (rm.subtract(b="b", a="a"), 'merge "subtract" &0 &1'),
        (rm.weighted_sum(b=b, alpha=0.5, a=a), 'merge "weighted_sum" &0 &1 alpha=0.5'),
        (rm.add(b=rm.subtract("a", "b"), a="a"), 'merge "add_difference" &0 &2 alpha=1.0'),
        (rm.fallback(b=b, a=a), 'merge "fallback" &0 &1'),
    ):
        assert write_version_0_1(recipe).splitlines()[1][:9] == 'model "a"'
        assert write_version_0_1(recipe).splitlines()[-1] == line


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (rm.parameter("x") - "a", "cannot say a parameter .parameter.'x'..: it has no holes for models"),
        (rm.model("a") + "b", "cannot say a sum of models .<call add.2 arguments.>.: it adds differences"),
        (0.5 * rm.model("a"), "cannot say a scaled model"),
        (rm.model("a") * rm.model("b"), "cannot say the method 'multiply'"),
        (rm.weighted_sum("a", "b", alpha=rm.search(0, 1)), "cannot say search"),
        (rm.weighted_sum("a", "b", alpha=rm.blocks(IN00=1)), "cannot say block weights .*: it knows the blocks of one"),
        (rm.weighted_sum(rm.model("a", arch="sd1"), "b", alpha=rm.blocks(IN00=1)), "nothing stands for the other"),
        (
            rm.weighted_sum(rm.model("a", arch="sd1"), "b", alpha=rm.depth([0, 1]) | 0.5),
            r"cannot say these block weights .*not depth\(",
        ),
        (rm.weighted_sum(rm.model("a", arch="sd1"), "b", alpha=rm.blocks(IN44=1) | 0.5), "it has no block 'IN44'"),
        (rm.model("a", arch="sd2") - "b", "cannot say the arch 'sd2'"),
        (Model("a", sha256="12") - Model("b"), "cannot say a lock"),
        (rm.model({"w": 1}) - rm.model("b"), "cannot say tensors in memory"),
        (rm.cast("a", "fp8_e4m3"), "cannot say the element type"),
        (rm.model("a\nb") - "b", "cannot say this text"),
        (Value(1.0), "the result is 1.0"),
        (
            Call("weighted_sum", (Model("a"), Model("b")), (("alpha", Value("m")),)),
            "a text as 'alpha'.*a mask is a model",
        ),
        (Call("weighted_sum", (Model("a"), Model("b")), (("a", Model("c")),)), "'a' is given twice"),
        (rm.n_average("a", "b", weights=0.5), "n_average has no argument 'weights'"),
        (Call("model_stock", (rm.model("a", space="delta"),)), "the method 'model_stock'"),
    ],
)
def test_what_version_0_1_cannot_say_is_named_with_the_reason(recipe: Node, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        write_version_0_1(recipe)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_key_has_the_mean_of_the_blocks_that_it_belonged_to(arch: str) -> None:
    component = next(iter(ARCHS[arch]))
    names = block_names(arch, component)
    weights = {f"{arch}_{component}_block_{name}": float(place) for place, name in enumerate(names)}
    found = block_weights(weights)
    assert isinstance(found, rm.recipe.blocks.BlockWeights)
    for path, blocks in ARCHS[arch][component].members.items():
        mean = sum(names.index(block) for block in blocks) / len(blocks)
        key = f"{ARCHS[arch][component].prefix}.{path}.x"
        assert next(weight for glob, weight in found.rules[0].named if glob.rstrip("*") == key[:-1]) == mean
