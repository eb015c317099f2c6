"""The reader: what a text means, where its parts stand, and that no text does anything but be read or refused."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

import remelt as rm
from remelt.errors import RecipeError, RecipeSyntaxError, Span
from remelt.recipe.blocks import BlockWeights, Search
from remelt.recipe.node import Call, Model, Node, Parameter, Value
from remelt.recipe.walk import topological
from remelt.text.reader import parse_document, parse_value, read_recipe
from remelt.text.source import SourceText
from remelt.text.statements import split_statements

HEAD = "version 1\n"
TOLERATED = 5.0
"""Seconds of computing that a hostile text may take, on a slow machine."""


def read(text: str) -> Node:
    return read_recipe(HEAD + text)


def call(text: str) -> Call:
    node = read(text)
    assert isinstance(node, Call)
    return node


def refused(text: str) -> RecipeSyntaxError:
    with pytest.raises(RecipeSyntaxError) as caught:
        read_recipe(text)
    return caught.value


def marked(span: Span | None) -> str:
    """What the carets stand under."""
    assert span is not None
    return span.text[span.column - 1 : span.column - 1 + span.width]


# What a text means


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ('model("a")', rm.model("a")),
        ('"a"', rm.model("a")),
        ('x = "a"\nx', rm.model("a")),
        ('x = model("a", sha256="12ab", space="delta", arch="sdxl")\nx', Model("a", "12ab", "delta", "sdxl")),
        ('parameter("a.b", space="param", arch="flux")', Parameter("a.b", "param", "flux")),
        ('"a" + "b"', rm.model("a") + rm.model("b")),
        ('"a" - "b" - "c"', rm.model("a") - rm.model("b") - rm.model("c")),
        ('"a" - ("b" - "c")', rm.model("a") - (rm.model("b") - rm.model("c"))),
        ('"a" + 2 * "b"', rm.model("a") + 2 * rm.model("b")),
        ('"a" * 2 * "b"', rm.model("a") * 2 * rm.model("b")),
        ('"a" | "b" + "c"', rm.model("a") | (rm.model("b") + rm.model("c"))),
        ('-"a"', -rm.model("a")),
        ('--"a"', Model("a")),
        ('blocks(M00=1) * "a"', rm.blocks(M00=1) * rm.model("a")),
        ('f("a")', Call("f", (Value("a"),))),
        ('f("a" + "b")', Call("f", (rm.model("a") + rm.model("b"),))),
        ("f()", Call("f")),
        ('x = model("a")\nf(x, x)', Call("f", (Model("a"), Model("a")))),
        ("a = 0.5\nf(alpha=a)\n", Call("f", (), (("alpha", Value(0.5)),))),
        ("f(alpha=search(0, 1))", Call("f", (), (("alpha", Value(Search(0.0, 1.0))),))),
        ('f("a",  # why\n  # and how\n  b=1,\n)', Call("f", (Value("a"),), (("b", Value(1)),))),
    ],
)
def test_a_text_means_the_same_as_python(text: str, same: Node) -> None:
    assert read(text).digest() == same.digest()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-1", -1),
        ("--1", 1),
        ("+1.5", 1.5),
        ("1e-3", 0.001),
        (".5", 0.5),
        ("2.", 2.0),
        ("2 * 0.25 + 1", 1.5),
        ("1 - 2 - 3", -4),
        ("1 - (2 - 3)", 2),
        ("9" * 64, int("9" * 64)),
        ("True", True),
        ("False", False),
        ("None", None),
        ('"a\\n\\"\\u00e9\\x41\\101"', 'a\n"\u00e9AA'),
        ("'a\"b'", 'a"b'),
        ('r"C:\\new"', "C:\\new"),
        ('[1, "a", [True, None], -2.5]', (1, "a", (True, None), -2.5)),
        ("[]", ()),
        ("blocks(IN00=0.2, M00=1) | 0.5", rm.blocks(IN00=0.2, M00=1.0) | 0.5),
        ('blocks({"double_blocks.3": 0.2}, M00=1)', rm.blocks({"double_blocks.3": 0.2}, M00=1.0)),
        ('blocks("0,0.5,1")', rm.blocks("0,0.5,1")),
        ("components(unet=0.2)", rm.components(unet=0.2)),
        ('classes({"attn.to_q": 0.2}, mlp=1)', rm.classes({"attn.to_q": 0.2}, mlp=1)),
        ('keys({"*.attn2.*": search(0, 1)})', rm.keys({"*.attn2.*": rm.search(0, 1)})),
        ('depth([0, 0.5, 1], stack="double_blocks")', rm.depth([0, 0.5, 1], stack="double_blocks")),
        ("depth([0, 1]) | keys({'x': 2}) | 3", rm.depth([0, 1]) | rm.keys({"x": 2}) | 3),
    ],
)
def test_a_value_is_read_exactly(text: str, value: object) -> None:
    ((name, node),) = call(f"f(x={text})").kwargs
    assert name == "x"
    assert isinstance(node, Value)
    assert repr(node.value) == repr(value)
    named = call(f"value = {text}\nf(x=value)").kwargs[0][1]
    assert isinstance(named, Value)
    assert repr(named.value) == repr(value)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_byte_order_marks_and_blank_lines_do_not_matter(end: str, mark: str) -> None:
    lines = ["", "# a comment", "version 1  # the grammar", "", 'x = model("a")', "\t", "f(x,", '  "b",', ")", "", ""]
    assert read_recipe(mark + end.join(lines)).digest() == read('f(model("a"), "b")').digest()
    assert read_recipe(mark + end.join(lines).rstrip()).digest() == read('f(model("a"), "b")').digest()


def test_a_step_used_twice_is_one_node_and_a_model_written_twice_is_two() -> None:
    assert len(topological(read('x = f("a", 1)\ng(x, x)'))) == 4
    assert len(topological(read('g(model("a"), model("a"))'))) == 3


def test_steps_that_nothing_uses_are_no_part_of_the_graph_but_known() -> None:
    document = parse_document(HEAD + 'a = model("a")\nspare = model("b")\nf(a)')
    assert [step.name for step in document.unused] == ["spare"]
    assert document.unused[0].line == 3
    assert len(topological(document.result)) == 2


# Where the parts stand


def test_every_node_knows_its_place() -> None:
    node = call('f("a", 0.5, model("b"), parameter("c"), alpha=blocks(M00=1) | 2,  beta = -3)')
    assert node.span is not None
    assert (node.span.source, node.span.line, node.span.column, node.span.width) == ("recipe", 2, 1, 1)
    assert [marked(child.span) for child in node.children] == [
        '"a"',
        "0.5",
        "model",
        "parameter",
        "blocks(M00=1) | 2",
        "-3",
    ]
    assert [(name, marked(span)) for name, span in node.spans] == [("alpha", "alpha"), ("beta", "beta")]


@pytest.mark.parametrize(
    ("text", "line", "column", "under"),
    [
        ('f("a", x)', 2, 8, "x"),
        ('f("\u00e9\u4f60\U0001f600", x)', 2, 10, "x"),
        ('f("a",\tx)', 2, 8, "x"),
        ('f("a",\n\t\tx)', 3, 3, "x"),
        ('f("a", \\\n  x)', 3, 3, "x"),
        ('f("\u00e9\u00e9",\n  "\u4f60", x)', 3, 8, "x"),
        ('\u00e9t\u00e9 = f("a")\nf(\u00e9t\u00e9, \u00e9tes)', 3, 8, "\u00e9tes"),
        ('# \u00e9\n\n\n"a" + xyz', 5, 7, "xyz"),
        (f'f("{chr(0xE9) * 5000}", x)', 2, 5007, "x"),
        (f"f({', '.join(['1'] * 3000)}, x)", 2, 9003, "x"),
    ],
)
def test_a_place_is_counted_in_characters(text: str, line: int, column: int, under: str) -> None:
    error = refused(HEAD + text)
    assert error.span is not None
    assert (error.span.line, error.span.column, marked(error.span)) == (line, column, under)
    assert f"no step is named {under!r}" in str(error)


def test_carets_stand_under_the_place_after_tabs_and_in_long_lines() -> None:
    assert refused(HEAD + 'f("a",\tx)').span.excerpt() == '    f("a",\tx)\n          \t^'  # type: ignore[union-attr]
    shown, carets = str(refused(HEAD + f"f({'1, ' * 3000}xyz)")).split("\n")[1:3]
    assert len(shown) <= 164
    assert shown[carets.index("^") : carets.index("^") + 3] == "xyz"


def test_the_source_is_named_in_messages() -> None:
    with pytest.raises(RecipeSyntaxError, match=r"^mix\.mecha:2:1: "):
        read_recipe(HEAD + "x", "mix.mecha")


# Limits, each from both sides


@pytest.mark.parametrize(
    ("within", "beyond", "message"),
    [
        ("f(" + "[" * 63 + "]" * 63 + ")", "f(" + "[" * 64 + "]" * 64 + ")", "brackets nest deeper than 64"),
        ("f(" * 64 + ")" * 64, "f(" * 65 + ")" * 65, "brackets nest deeper than 64"),
        ('"a"' + ' + "a"' * 64, '"a"' + ' + "a"' * 65, "more than 64 operators in one expression"),
        ("f(" + "-" * 64 + "1)", "f(" + "-" * 65 + "1)", "more than 64 operators in one expression"),
        ("f(" + "9" * 64 + ")", "f(" + "9" * 65 + ")", "a whole number has at most 64 digits"),
        ("f(0." + "1" * 398 + ")", "f(0." + "1" * 399 + ")", "a number has at most 400 characters"),
        ('f("' + "x" * 65534 + '")', 'f("' + "x" * 65535 + '")', "a text has at most 65536 characters"),
        (
            "f(" + "1, " * 349523 + "1)",
            "f(" + "1, " * 349524 + "1)",
            "a statement has at most 1048576 characters",
        ),
        ("f(" + "x" * 400 + "=1)", "f(" + "x" * 401 + "=1)", "a name has at most 400 characters"),
        ("f(1e308)", "f(1e309)", "this number is too large"),
        ("f(1e308 + 1)", "f(1e308 * 10)", "this number is too large"),
        (
            "f(" + "9" * 32 + " * " + "9" * 32 + ")",
            "f(" + "9" * 33 + " * " + "9" * 33 + ")",
            "this number is too large",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_a_limit_is_where_it_is_said_to_be(within: str, beyond: str, message: str) -> None:
    assert isinstance(read(within), Call)
    assert refused(HEAD + beyond).message == message


def test_a_name_that_stands_for_a_long_text_cannot_be_multiplied_without_end() -> None:
    text = f'x = "{"x" * 60000}"\n' + "".join(f"s{i} = f([{'x, ' * 100}])\n" for i in range(20)) + "s1"
    assert "with its names written out" in refused(HEAD + text).message


HOSTILE = {
    "open brackets": "(" * 10**5,
    "brackets of all kinds": "([{" * 10**5,
    "closed lists": "[" * 10**5 + "]" * 10**5,
    "calls in calls": "f(" * 10**5 + ")" * 10**5,
    "digits": "1" * 10**6,
    "digits of a fraction": "0." + "1" * 10**6,
    "a large exponent": "f(1e" + "9" * 300 + ")",
    "a large negative exponent and digits": "1e-" + "9" * 10**6,
    "attributes": "a" + ".b" * 10**5,
    "subscripts": "a" + "[0]" * 10**5,
    "sums": '"a"' + ' + "a"' * 10**5,
    "stars": "*" * 10**6,
    "powers": "2" + "**2" * 10**5,
    "signs": "-" * 10**5 + "1",
    "signs in brackets": ("-" * 60 + "(") * 60 + "1" + ")" * 60,
    "words": "not " * 10**5 + "a",
    "lambdas": "lambda: " * 10**5,
    "conditions": "a if a else " * 10**5 + "a",
    "comparisons": "a" + " < a" * 10**5,
    "a long text": 'f("' + "x" * 10**6 + '")',
    "a text of backslashes": 'f("' + "\\" * 10**5 + '")',
    "texts beside texts": '"a" ' * 10**5,
    "quotes": '"' * 99_999,
    "triple quotes": '"""' + "x" * 10**5,
    "a long name": "f(" + "x" * 10**6 + ")",
    "a long line of blanks": " " * 10**6 + "x",
    "blanks within a statement": "f(" + " " * 900_000 + "x)",
    "backslashes at line ends": "a" + "\\\n" * 10**5 + "b",
    "a bracket open over many lines": "f(" + "1,\n" * 10**6,
    "assignments in a row": "a = " * 10**5 + "1",
    "semicolons": "a;" * 10**5,
    "formatted texts": 'f"{' * 10**5,
    "wide characters": "\U0001f600" * 10**5,
    "combining characters": "a" + "\u0301" * 10**5,
    "mapping of mappings": 'blocks({"a":' * 10**5,
    "a backslash": "\\",
    "NUL": "f(\0)",
    "half of a surrogate": 'f("\ud800")',
    "an escape sequence of a terminal": 'f("\x1b[31m")',
    "a form feed": "\x0cf()",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_text_is_refused_at_once(name: str) -> None:
    text = HEAD + HOSTILE[name]
    started = time.process_time()
    error = refused(text)
    shown = str(error)
    assert time.process_time() - started < TOLERATED
    assert len(shown) < 2000
    assert not set(shown) & {"\0", "\x1b", "\x0c", "\ud800"}


def test_a_long_first_line_is_shown_in_part() -> None:
    assert len(str(refused("version " + "1" * 10**6))) < 1000
    assert len(str(refused("x" * 10**6))) < 1000


def test_too_many_characters_are_refused() -> None:
    with pytest.raises(RecipeSyntaxError, match="at most 67108864 characters, but got 67108875"):
        read_recipe(HEAD + "\n" * 64 * 2**20 + "x")


def test_too_many_statements_are_refused() -> None:
    within, beyond = (SourceText("x=1\n" * count, "recipe") for count in (1_000_000, 1_000_001))
    assert sum(1 for _ in split_statements(within, 1)) == 1_000_000
    with pytest.raises(RecipeSyntaxError, match="1000001:1: a recipe has at most 1000000 statements"):
        sum(1 for _ in split_statements(beyond, 1))


def test_a_hundred_thousand_statements_are_read_in_seconds() -> None:
    steps = "".join(f"s{i + 1} = weighted_sum(s{i}, b, alpha=0.5)\n" for i in range(100_000))
    started = time.process_time()
    node = read(f's0 = model("a")\nb = model("b")\n{steps}s100000')
    assert time.process_time() - started < 20
    assert len(topological(node)) == 200_002


# Anything at all

WORDS = st.sampled_from(
    [
        *("version 1\n", "\n", " ", "\t", "\\\n", "#", "# c\n", ",", "=", ":", ".", ";", "(", ")", "[", "]", "{", "}"),
        *("+", "-", "*", "|", "**", "/", "==", ":=", "->", "@", "!", '"', "'", '"a"', "'b'", 'r"c"', 'f"d"', '"""'),
        *("0", "1.5", "1e9", "1e999", "0x1", "1_0", "1j", "007", "a", "b", "x", "\u00e9", "\u4f60", "\U0001f600"),
        *(
            "a = ",
            "x = ",
            "f(",
            "alpha=",
            "model(",
            "parameter(",
            "search(",
            "blocks(",
            "keys({",
            "depth([",
            "classes(",
        ),
        *("components(", "sha256=", "space=", '"delta"', "True", "None", "if", "else", "for", "in", "lambda", "await"),
        *("\\", "\\N{DASH}", "\0", "\x1b", "\ud800", "\ufeff", "\u2028", "\x85", "\xa0", "...", "*a", "**a", "print"),
    ]
)


def told(read: Callable[[str], object], text: str) -> object:
    """What the text is read as, or the words in which it is refused."""
    try:
        return read(text)
    except RecipeError as error:
        return RecipeError(str(error))


@given(st.one_of(st.text(), st.lists(WORDS, max_size=30).map("".join)), st.booleans())
def test_any_text_is_read_or_refused(text: str, headed: bool) -> None:
    found = told(read_recipe, HEAD + text if headed else text)
    assert isinstance(found, Node) or (isinstance(found, RecipeError) and str(found))


@given(st.binary())
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for text in (data.decode("latin-1"), data.decode("utf-8", "surrogateescape")):
        with pytest.raises(RecipeError):
            read_recipe(text)


@given(st.one_of(st.text(), st.lists(WORDS, max_size=12).map("".join)))
def test_any_command_line_value_is_read_or_refused(text: str) -> None:
    found = told(parse_value, text)
    assert found is None or isinstance(found, (bool, int, float, str, tuple, BlockWeights, Search, RecipeError))
