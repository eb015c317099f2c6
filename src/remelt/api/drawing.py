"""Pictures of recipes: as Mermaid or dot text, or as SVG."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Literal

from remelt.errors import MissingExtraError, OptionError
from remelt.recipe.layers import LAYERS
from remelt.recipe.mixture import MIXTURE
from remelt.recipe.node import Call, Node
from remelt.recipe.permuting import PERMUTE
from remelt.recipe.signature import name_all_models
from remelt.recipe.vocabulary import ALIGN
from remelt.text.diagram import Diagram, diagram, dot, mermaid

_VIEWS: dict[str, Sequence[str]] = {LAYERS: ("", "start", "stop", "stack"), ALIGN: ("",), PERMUTE: ("", "permutations")}
"""The arguments by position of what is no method."""
PICTURES = ("mermaid", "dot", "svg")
_COLOURS = {"model": "#dbe9f6", "parameter": "#fdebd0", "step": "#f2f2f2", "result": "#d5efdc"}


def draw(recipe: Node, to: Literal["mermaid", "dot", "svg"] = "mermaid") -> str:
    """A picture of a recipe, as the text of a Mermaid flowchart, of a Graphviz graph, or of an SVG file.

    Raises `MissingExtraError` for SVG without the extra ``draw``, `OptionError` for another format.
    """
    if to not in PICTURES:
        raise OptionError(f"a picture is one of {', '.join(PICTURES)}, but got {to!r}")
    from remelt.methods import METHODS  # imports torch

    picture = diagram(name_all_models(recipe, METHODS), argument_names)
    if to == "svg":
        return _svg(picture)
    return mermaid(picture) if to == "mermaid" else dot(picture)


def argument_names(call: Call) -> Sequence[str]:
    """The names of a call's arguments by position, where its method is known."""
    from remelt.methods import METHODS  # imports torch

    if call.method in _VIEWS:
        return _VIEWS[call.method]
    if call.method == MIXTURE:
        return ["base", *map(str, range(len(call.args) - 1))]
    if call.method not in METHODS:
        return ()
    names: list[str] = []
    for parameter in METHODS[call.method].parameters:
        if parameter.variadic:
            return [*names, *(str(place + 1) for place in range(len(names), len(call.args)))]
        names.append(parameter.name)
    return names[: len(call.args)]


def _svg(picture: Diagram) -> str:
    try:
        import networkx
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            f"drawing SVG needs {error.name}", hint='pip install "remelt[draw]"; or draw to mermaid or dot'
        ) from error
    graph = networkx.DiGraph()
    for number, box in enumerate(picture.boxes):  # numbers have the same order in every set
        graph.add_node(number, layer=box.layer)
    laid = networkx.multipartite_layout(graph, subset_key="layer")
    places = {box.name: laid[number] for number, box in enumerate(picture.boxes)}
    columns = max((box.layer for box in picture.boxes), default=0) + 1
    tallest = max(sum(box.layer == layer for box in picture.boxes) for layer in range(columns))
    figure = Figure(figsize=(3.0 * columns, 0.9 * tallest + 0.6))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    for along, count, limit in ((0, columns, axes.set_xlim), (1, tallest, axes.set_ylim)):
        values = [float(place[along]) for place in places.values()]
        low, high = min(values), max(values)
        margin = 0.5 * (high - low) / (count - 1) if high > low else 0.5
        limit(low - margin, high + margin)
    patches = {}
    for box in picture.boxes:
        style = {"boxstyle": "round,pad=0.5", "facecolor": _COLOURS[box.kind], "edgecolor": "#777777"}
        x, y = places[box.name]
        shown = axes.text(
            x, y, "\n".join(box.lines), ha="center", va="center", fontsize=8, bbox=style, parse_math=False
        )
        patches[box.name] = shown.get_bbox_patch()
    for arrow in picture.arrows:
        start, end = places[arrow.start], places[arrow.end]
        line = {"arrowstyle": "->", "color": "#777777", "shrinkA": 2, "shrinkB": 2}
        line |= {"patchA": patches[arrow.start], "patchB": patches[arrow.end]}
        axes.annotate("", xy=end, xytext=start, arrowprops=line)
        if arrow.label:
            plain = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            middle = (start + end) / 2
            axes.annotate(
                arrow.label, xy=middle, fontsize=7, color="#555555", ha="center", bbox=plain, parse_math=False
            )
    written = io.StringIO()
    with warnings.catch_warnings(), rc_context({"svg.fonttype": "none"}):  # the viewer's fonts have what ours lack
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()
