"""A drawing of the rows on growth: seconds and anonymous memory by bytes read, for the documentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from measure import Measured, Result
from rows import EXECUTORS

WIDTH, HEIGHT = 340, 240
LEFT, TOP, RIGHT, BOTTOM = 56, 34, 16, 44
COLOURS = {"native": "#2b6cb0", "torch": "#c05621"}
TICKS = 4
GIGA, MIB = 1e9, 2**20

Point = tuple[float, float]
Curves = dict[str, list[Point]]


def draw(grown: Sequence[Measured], size: int) -> str:
    """An SVG of two panels. ``size`` is the bytes of one model."""
    panels: list[tuple[str, Callable[[Result], float | None]]] = [
        ("seconds", lambda result: result.median("seconds")),
        ("anonymous memory, MiB", lambda result: scaled(result.most("peak"), MIB)),
    ]
    drawn = "".join(
        f'<g transform="translate({position * WIDTH},0)">{panel(title, curves(grown, size, value))}</g>'
        for position, (title, value) in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH * len(panels)} {HEIGHT}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>{drawn}</svg>\n'
    )


def curves(grown: Sequence[Measured], size: int, value: Callable[[Result], float | None]) -> Curves:
    """The points of each executor: gigabytes read, and a value."""
    found: Curves = {}
    for executor in EXECUTORS:
        points = [(row.row.ours.models * size / GIGA, value(row.ours(executor))) for row in grown]
        found[executor] = sorted((x, y) for x, y in points if y is not None)
    return {executor: points for executor, points in found.items() if points}


def panel(title: str, found: Curves) -> str:
    """One coordinate system, from zero, with a line for each executor."""
    points = [point for curve in found.values() for point in curve] or [(1.0, 1.0)]
    most = (max(x for x, _ in points), max(y for _, y in points) or 1.0)
    parts = [text(WIDTH / 2, 18, title), text(WIDTH / 2, HEIGHT - 8, "GB read")]
    for tick in range(TICKS + 1):
        x, y = place((most[0] * tick / TICKS, most[1] * tick / TICKS), most)
        parts += [
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>',
            text(LEFT - 6, y + 4, f"{most[1] * tick / TICKS:.3g}", "end"),
            text(x, HEIGHT - BOTTOM + 16, f"{most[0] * tick / TICKS:.3g}"),
        ]
    for number, (executor, curve) in enumerate(found.items()):
        colour = COLOURS[executor]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(point, most) for point in curve))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in map(pair, line.split())]
        parts.append(text(WIDTH - RIGHT - 4, HEIGHT - BOTTOM - 8 - 14 * number, executor, "end", colour))
    return "".join(parts)


def place(point: Point, most: Point) -> Point:
    """Where a point lies on the panel."""
    x, y = point[0] / most[0], point[1] / most[1]
    return LEFT + x * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM)


def pair(text: str) -> tuple[str, str]:
    """Two numbers that a comma parts."""
    first, _, second = text.partition(",")
    return first, second


def text(x: float, y: float, words: str, anchor: str = "middle", colour: str = "#333") -> str:
    """Words at a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{words}</text>'


def scaled(value: float | None, unit: float) -> float | None:
    """A value in a unit."""
    return None if value is None else value / unit
