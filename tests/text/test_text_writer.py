"""The writer: reading back what it wrote gives the same recipe, and writing that the same text, for any graph."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import remelt as rm
from remelt.errors import RecipeError
from remelt.recipe.blocks import CLASSES, COMPONENTS, DEPTH, KEYS, PRESET, BlockWeights, Rule, Search
from remelt.recipe.node import SPACES, Call, Literal, Model, Node, Parameter, Value, digests
from remelt.recipe.walk import topological
from remelt.text.constructors import CONSTRUCTORS
from remelt.text.reader import parse_document, read_recipe
from remelt.text.writer import write_document, write_recipe

TEXTS = st.text(max_size=12) | st.sampled_from(
    [
        "",
        "\n\r\t\0\x1b\x85\u2028\ufeff",
        "\"'\\",
        "\\n",
        'r"',
        "#",
        "\ud800",
        "\U0001f600\ue000",
        "models/a b.safetensors",
    ]
)
NAMES = TEXTS.filter(lambda name: name != "" and "\0" not in name)
WORDS = st.sampled_from(
    ["a", "b", "alpha", "_", "version", "model_", "step1", "a2", "r", "rb", "match", "\u00e9t\u00e9"]
)
METHODS = WORDS | st.sampled_from(
    ["add", "subtract", "multiply", "scale", "fallback", "weighted_sum", "add_difference", "value1"]
)
INTEGERS = st.integers(-(10**64) + 1, 10**64 - 1)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
SEARCHES = st.tuples(FLOATS, FLOATS).filter(lambda pair: pair[0] < pair[1]).map(lambda pair: Search(*pair))
WEIGHTS = FLOATS | SEARCHES
NAMED = st.dictionaries(WORDS | TEXTS, WEIGHTS, min_size=1, max_size=4).map(lambda named: tuple(named.items()))
LISTED = st.lists(WEIGHTS, min_size=1, max_size=5).map(tuple)
RULES = st.one_of(
    st.builds(Rule, st.sampled_from([KEYS, "blocks", CLASSES, COMPONENTS]), NAMED),
    st.builds(Rule, st.just(DEPTH), st.just(()), LISTED, st.none() | TEXTS),
    st.builds(Rule, st.just(PRESET), st.just(()), st.lists(FLOATS, min_size=1, max_size=5).map(tuple)),
)
BLOCK_WEIGHTS = st.builds(BlockWeights, st.lists(RULES, min_size=1, max_size=4).map(tuple), st.none() | WEIGHTS)
SCALARS = st.one_of(st.none(), st.booleans(), INTEGERS, FLOATS, TEXTS, SEARCHES)
LITERALS = st.one_of(
    SCALARS,
    BLOCK_WEIGHTS,
    st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=8),
)
LEAVES = st.one_of(
    LITERALS.map(Value),
    st.builds(Model, NAMES, st.none() | TEXTS, st.sampled_from(SPACES), st.none() | TEXTS),
    st.builds(
        Parameter, st.lists(WORDS, min_size=1, max_size=3).map(".".join), st.sampled_from(SPACES), st.none() | TEXTS
    ),
)


@st.composite
def graphs(draw: st.DrawFn) -> Node:
    """A graph of any shape: each call takes any of the nodes made before it, so that steps are shared."""
    nodes = draw(st.lists(LEAVES, min_size=1, max_size=6))
    for _ in range(draw(st.integers(0, 12))):
        recent = st.integers(0, len(nodes) - 1).map(lambda back: nodes[-1 - back])
        args = draw(st.lists(recent, max_size=3))
        kwargs = draw(st.dictionaries(WORDS, recent, max_size=2))
        binary = st.sampled_from(["+", "-", "*", "|", "call", "call"])
        kind = draw(binary) if len(args) >= 2 else "call"
        a, b = (args[0], args[1]) if kind != "call" else (nodes[0], nodes[0])
        made: Node = (
            a + b
            if kind == "+"
            else a - b
            if kind == "-"
            else a * b
            if kind == "*"
            else a | b
            if kind == "|"
            else Call(draw(METHODS), tuple(args), tuple(kwargs.items()))
        )
        nodes.append(made)
    last = nodes[-1]
    return Call("f", (last,)) if isinstance(last, Value) else last


def same(a: Node, b: Node) -> bool:
    """Whether two recipes say the same, by the digests of their results."""
    first, second = topological(a), topological(b)
    return digests(first)[id(a)] == digests(second)[id(b)]


@given(graphs())
def test_any_graph_reads_back_as_it_was_and_is_written_the_same_again(graph: Node) -> None:
    text = write_recipe(graph)
    again = read_recipe(text)
    assert same(again, graph)
    assert write_recipe(again) == text
    assert write_document(parse_document(text)) == text


@given(graphs(), st.data())
def test_any_names_and_comments_of_steps_survive(graph: Node, data: st.DataObject) -> None:
    order = topological(graph)
    chosen = data.draw(st.lists(st.sampled_from(order), max_size=4))
    wanted = st.sampled_from(
        ["mixed", "step1", "value1", "model", "version", "if", "1x", "x y", "", "\u00e9t\u00e9", "a" * 60]
    )
    names = {id(node): data.draw(wanted) for node in chosen}
    comments = {
        id(node): data.draw(st.lists(st.sampled_from(["# why", "why", "", "a\nb", " \0\x1b\ud800# "]), max_size=2))
        for node in chosen
    }
    text = write_recipe(graph, names=names, comments=comments)
    document = parse_document(text)
    assert same(document.result, graph)
    assert write_document(document) == text


@given(LITERALS)
def test_any_literal_reads_back_exactly(value: Literal) -> None:
    (node,) = read_recipe(write_recipe(Call("f", (), (("x", Value(value)),)))).children
    assert isinstance(node, Value)
    assert repr(node.value) == repr(value)


def chain(length: int) -> Node:
    node: Node = Model("a")
    other = Model("b")
    for _ in range(length):
        node = Call("weighted_sum", (node, other), (("alpha", Value(0.5)),))
    return node


def diamonds(count: int) -> Node:
    node: Node = Model("a")
    for _ in range(count):
        node = Call("weighted_sum", (node, node))
    return node


@pytest.mark.slow
def test_a_hundred_thousand_chained_calls_are_written_and_read_in_linear_size() -> None:
    started = time.process_time()
    graph = chain(100_000)
    text = write_recipe(graph)
    again = read_recipe(text)
    assert same(again, graph)
    assert len(text) < 100_000 * 60
    assert abs(len(text) / len(write_recipe(chain(10_000))) - 10) < 1
    assert write_recipe(again) == text
    assert time.process_time() - started < 60


def test_a_thousand_stacked_diamonds_are_written_and_read_in_linear_size() -> None:
    graph = diamonds(1000)
    text = write_recipe(graph)
    assert text.count("\n") == 1002
    assert same(read_recipe(text), graph)
    assert write_recipe(read_recipe(text)) == text


def test_equal_steps_of_a_graph_are_written_once() -> None:
    apart = Call("f", (rm.model("a") - rm.model("b"), rm.model("a") - rm.model("b")))
    assert write_recipe(apart).count('model("a")') == 1
    assert same(read_recipe(write_recipe(apart)), apart)


def test_a_model_and_a_parameter_carry_what_is_not_their_default() -> None:
    models = [
        Model("a", sha256="12ab", space="delta", arch="sdxl"),
        Model("b"),
        Parameter("p.q", space="param", arch="flux"),
        Parameter("r"),
    ]
    assert write_recipe(Call("f", tuple(models))).splitlines() == [
        "version 1",
        'a = model("a", sha256="12ab", space="delta", arch="sdxl")',
        'b = model("b")',
        'p_q = parameter("p.q", space="param", arch="flux")',
        'r = parameter("r")',
        "f(a, b, p_q, r)",
    ]


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["x/a.safetensors", "y/a.ckpt", "a"], ["a", "y", "a_2"]),
        (["v1-5-pruned.safetensors", "v1_5_pruned"], ["v1_5_pruned", "v1_5_pruned_2"]),
        (["1.5", "model", "if", "f", "\u4f60\u597d"], ["model_1_5", "model_2", "if_2", "f_2", "model_3"]),
        (["sdxl/model.safetensors", "flux/model.safetensors.index.json", "C:\\m\\b.pt"], ["sdxl", "flux", "b"]),
        (["x" * 45], ["x" * 40]),
    ],
)
def test_models_are_named_after_their_files(names: list[str], steps: list[str]) -> None:
    lines = write_recipe(Call("f", tuple(Model(name) for name in names))).splitlines()
    assert [line.split(" = ")[0] for line in lines[1:-1]] == steps


def test_a_name_that_a_person_gave_is_kept_where_it_can_be() -> None:
    nodes = [rm.model(f"m{index}") for index in range(4)]
    given = ["\u00e9t\u00e9", "y" * 60, "not a word", "blocks"]
    names = {id(node): name for node, name in zip(nodes, given, strict=True)}
    lines = write_recipe(Call("f", tuple(nodes)), names=names).splitlines()
    assert [line.split(" = ")[0] for line in lines[1:-1]] == ["\u00e9t\u00e9", "y" * 60, "not_a_word", "blocks_2"]


def test_comments_and_names_survive_as_they_were_written() -> None:
    text = """# The mix of the year
# by me
version 1
# the base
base = model("base")
# two fine-tunes,
# both of it
left = model("left")
right = model("right")
# what they learned
learned = left - base
# and together
base + learned + (right - base)
# the end
"""
    document = parse_document(text)
    assert write_document(document) == text
    assert document.heading == ("# The mix of the year", "# by me")
    assert document.closing == ("# and together",)
    assert document.trailing == ("# the end",)
    assert [step.comments for step in document.steps] == [
        ("# the base",),
        ("# two fine-tunes,", "# both of it"),
        (),
        ("# what they learned",),
    ]


def test_the_name_of_a_number_survives_in_operators() -> None:
    text = 'version 1\na = model("a")\nhalf = 0.5\nhalf * a + half * model("b") + g(half)\n'
    rendered = write_document(parse_document(text))
    assert rendered == text.replace("half * a", 'b = model("b")\nhalf * a').replace('* model("b")', "* b")


def test_a_comment_with_several_lines_stays_a_comment() -> None:
    node = rm.model("a")
    text = write_recipe(Call("f", (node, node)), comments={id(node): ["one\nversion 2", "# three"]})
    assert text == 'version 1\n# one version 2\n# three\na = model("a")\nf(a, a)\n'


def test_a_wide_call_is_written_an_argument_a_line() -> None:
    text = write_recipe(Call("f", tuple(Model(f"a_model_of_a_rather_long_name_{i}") for i in range(4))))
    assert text.endswith(
        "f(\n    a_model_of_a_rather_long_name_0,\n    a_model_of_a_rather_long_name_1,\n"
        "    a_model_of_a_rather_long_name_2,\n    a_model_of_a_rather_long_name_3,\n)\n"
    )


def nested(depth: int) -> tuple[Literal, ...]:
    value: tuple[Literal, ...] = ()
    for _ in range(depth - 1):
        value = (value,)
    return value


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (
            rm.model({}, name="mine") - rm.model("a"),
            "a text cannot hold tensors in memory, but the recipe uses them as",
        ),
        (Value("a"), "a text is no recipe: read back, it would be a model"),
        (Call("f", (Value(nested(10**5)),)), "lists in a recipe's text nest at most 32 deep"),
        (Call("f", (Value(10**64),)), "a whole number in a recipe's text has at most 64 digits"),
        (Call("f", (Value("x" * 65535),)), "a text in a recipe has at most 65536 characters, but one has 65535"),
        (Call("f", (Value(BlockWeights()),)), "block weights without any rule cannot be written"),
        (
            Call("f", (Value(BlockWeights((Rule(PRESET, listed=(Search(0.0, 1.0),)),))),)),
            "a preset string holds numbers, not searches",
        ),
        (Call("f", (Value(BlockWeights(rm.blocks(M00=1).rules * 65)),)), "at most 64 block weights combine"),
        (Call("f g"), "a recipe's text cannot say 'f g' as the name of a method or an argument"),
        (Call("f", (), (("in", Value(1)),)), "a recipe's text cannot say 'in' as the name of a method or an argument"),
        (Call("x" * 401), "as the name of a method or an argument"),
        (Call("blocks"), "'blocks' is a word of recipes, and no method's name in a text"),
        (Call("f", (), (("x", Value(1)), ("x", Value(2)))), "a call of 'f' has an argument twice, which no text says"),
        (Call("f", tuple(rm.model(f"m{i}") for i in range(200_000))), "a statement of a recipe's text has at most"),
        (Model("\0"), "a model's name is a path or a name in a models folder, but got"),
        (Parameter("not a word"), "a parameter's name is a word, or words joined by dots, but got 'not a word'"),
        (Call("f", (Node(),)), "Node is not a kind of node"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_no_text_says_is_refused(graph: Node, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        write_recipe(graph)
    assert message in caught.value.message


@pytest.mark.parametrize("word", sorted(CONSTRUCTORS))
def test_no_step_is_named_like_a_word_of_recipes(word: str) -> None:
    text = write_recipe(Call("f", (rm.model(word), rm.model("b"))))
    assert same(read_recipe(text), Call("f", (rm.model(word), rm.model("b"))))
