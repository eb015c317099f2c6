"""The order in which groups are visited: outward from what means the same in both models."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Sequence

from remelt.alignment.weights import Lying
from remelt.archs.axis_groups import AxisGroup, Shapes


def outward(groups: Sequence[AxisGroup], shapes: Shapes, lying: Lying) -> list[AxisGroup]:
    """The groups, each when as much as possible of what it is told by lies on axes that are fixed or visited already.

    Channels beside pixels or words come first; those inside of a block, all of whose neighbours are settled by then,
    find theirs at once.
    """
    by_name = {group.name: group for group in groups}
    place = {group.name: number for number, group in enumerate(groups)}
    total: dict[str, float] = defaultdict(float)
    known: dict[str, float] = defaultdict(float)
    beside: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for key, windows in lying.items():
        elements = float(math.prod(shapes[key]))
        names = {group.name for group, _ in windows}
        for name in names:
            total[name] += elements
            others = names - {name}
            if not others:
                known[name] += elements
            for other in others:
                beside[other].append((name, elements / len(others)))
    pending = [(-known[name] / total[name], place[name], name) for name in by_name]
    heapq.heapify(pending)
    ordered: list[AxisGroup] = []
    done: set[str] = set()
    while pending:
        _, _, name = heapq.heappop(pending)
        if name in done:
            continue
        done.add(name)
        ordered.append(by_name[name])
        for other, elements in beside[name]:
            if other not in done:
                known[other] += elements
                heapq.heappush(pending, (-known[other] / total[other], place[other], other))
    return ordered
