"""Pictures of recipes: each step once, in words that their readers take as they are."""

from __future__ import annotations

import sys

import pytest

import remelt as rm
from remelt.api.drawing import draw
from remelt.errors import MissingExtraError, OptionError
from remelt.recipe.node import Call, Node
from remelt.text.diagram import diagram


def recipe() -> Node:
    a, b = rm.model("a"), rm.parameter("b", space="delta")
    shared = rm.weighted_sum(a, a - rm.model('x"<`#>\\y'), alpha=rm.blocks(IN00=0.5) | 0.25)
    return rm.n_average(shared, shared, Call("of_mine", (a, b)))


def test_each_different_step_is_drawn_once() -> None:
    picture = diagram(recipe())
    assert [box.kind for box in picture.boxes].count("model") == 2
    assert len(picture.boxes) == 7
    assert max(box.layer for box in picture.boxes) == 3
    assert len(picture.arrows) == 9


def test_mermaid_gets_no_sign_that_it_would_read() -> None:
    text = draw(recipe(), "mermaid")
    assert '["x&quot;&lt;&#96;&#35;&gt;\\y"]' in text
    assert '("weighted_sum<br/>alpha = blocks(IN00=0.5) | 0.25")' in text
    assert '{{"b<br/>delta"}}' in text


def test_dot_is_quoted() -> None:
    text = draw(recipe(), "dot")
    assert 'label="x\\"<`#>\\\\y"' in text
    assert text.count("->") == 9


def test_svg_is_drawn_by_a_library() -> None:
    pytest.importorskip("matplotlib")
    text = draw(recipe(), "svg")
    assert text.count("<svg") == 1
    assert "n_average" in text or "<path" in text


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="drawing SVG needs matplotlib") as caught:
        draw(recipe(), "svg")
    assert caught.value.hint == 'pip install "remelt[draw]"; or draw to mermaid or dot'


def test_another_format_is_refused() -> None:
    with pytest.raises(OptionError, match="a picture is one of mermaid, dot, svg, but got 'png'"):
        draw(recipe(), "png")  # type: ignore[arg-type]
