"""Divides expressions as a network divides a dimension: into stretches, and into factors.

What stands below a label that is sliced differs, from then on, from one stretch to another: a fused query, key and
value of shape (3, heads, size) has heads of its own in each of the three.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from remelt.alignment.derivation.labels import (
    UNIT,
    Cases,
    Dimensions,
    Expression,
    Label,
    Pick,
    Pinned,
    Product,
    Sum,
    Uniform,
    added,
    may_depend,
    mentioned,
    multiplied,
    opened,
    pin,
    scope_of,
)

Ranges = dict[Label, tuple[int, int, Expression]]
"""For each label that was sliced, where from and to, and what is left."""


def taken(dimensions: Dimensions, axis: int, start: int, stop: int) -> Dimensions:
    """The dimensions of a tensor of which a stretch of one is left."""
    ranges: Ranges = {}
    left = sliced(dimensions[axis], start, stop, ranges)
    others = [one if place == axis else specialised(one, ranges) for place, one in enumerate(dimensions)]
    others[axis] = left
    return tuple(others)


def sliced(expression: Expression, start: int, stop: int, ranges: Ranges | None = None) -> Expression:
    """A stretch of an expression; the labels that were sliced for it are noted in ``ranges``."""
    ranges = {} if ranges is None else ranges
    if start == 0 and stop == expression.size:
        return expression
    if isinstance(expression, Pinned | Uniform):
        return type(expression)(stop - start)
    if isinstance(expression, Pick):
        return Pick(stop - start, expression.of, f"{expression.source}[{start}:{stop}]")
    if isinstance(expression, Label):
        return _sliced_label(expression.root, start, stop, ranges)
    if isinstance(expression, Sum):
        return added(_sliced_parts(expression, start, stop, ranges))
    return _sliced_product(expression, start, stop, ranges)


def _sliced_parts(whole: Sum, start: int, stop: int, ranges: Ranges) -> list[Expression]:
    found, begin = [], 0
    for part in whole.parts:
        low, high = max(start - begin, 0), min(stop - begin, part.size)
        if low < high:
            found.append(sliced(part, low, high, ranges))
        begin += part.size
    return found


def _sliced_label(root: Label, start: int, stop: int, ranges: Ranges) -> Expression:
    if root.split is None or isinstance(root.split, Cases):
        divide(root, sorted({0, start, stop, root.size}))
    if not isinstance(root.split, Sum):
        assert root.split is not None
        assert not isinstance(root.split, Cases)
        return sliced(root.split, start, stop, ranges)
    parts = _sliced_parts(root.split, start, stop, ranges)
    if len(parts) == 1:
        left = parts[0]
    else:  # one label, so that what stands below it can be told apart by its parts
        left = root.stretches.setdefault((start, stop), Label(stop - start, split=Sum(tuple(parts))))
    ranges[root] = (start, stop, left)
    return left


def _sliced_product(whole: Product, start: int, stop: int, ranges: Ranges) -> Expression:
    first, inner = whole.factors[0], multiplied(whole.factors[1:])
    size = inner.size
    if start % size == 0 and stop % size == 0:
        left = sliced(first, start // size, stop // size, ranges)
        return multiplied([left, specialised(inner, ranges)])
    index = start // size
    if index == (stop - 1) // size:
        mine: Ranges = {}
        sliced(first, index, index + 1, mine)
        ranges.update(mine)
        return sliced(specialised(inner, mine), start - index * size, stop - index * size, ranges)
    low, high = -(-start // size) * size, stop // size * size
    cuts = [one for one in (start, low, high, stop) if start <= one <= stop]
    # several stretches: what stands beside them is not told apart
    return added([sliced(whole, begin, end) for begin, end in pairwise(cuts) if begin < end])


def divide(root: Label, cuts: Sequence[int]) -> None:
    """Make an undivided label a sum, with parts between all cuts, 0 and the size among them."""
    if len(cuts) < 3:
        return
    parts = []
    for start, stop in pairwise(cuts):
        part = root.child(stop - start)
        part.touched = False  # until something is computed with this part
        part.partitions = {(width, (before + start) % width) for width, before in root.partitions}
        if isinstance(root.split, Cases):
            cases = tuple(sliced(one, start, stop) for one in root.split.parts)
            part.split = Cases(root.split.over, root.split.ends, cases)
        parts.append(part)
    root.split = Sum(tuple(parts))


def specialised(expression: Expression, ranges: Ranges) -> Expression:
    """What is left of an expression where labels beside it were sliced; itself where nothing changes."""
    if not ranges or isinstance(expression, Pinned | Uniform | Pick):
        return expression
    if isinstance(expression, Sum):
        parts = [specialised(one, ranges) for one in expression.parts]
        same = all(new is old for new, old in zip(parts, expression.parts, strict=True))
        return expression if same else added(parts)
    if isinstance(expression, Product):
        factors = [specialised(one, ranges) for one in expression.factors]
        same = all(new is old for new, old in zip(factors, expression.factors, strict=True))
        return expression if same else multiplied(factors)
    return _specialised_label(expression.root, ranges)


def _specialised_label(root: Label, ranges: Ranges) -> Expression:
    if root.split is None and root.size > 1:
        over = next((one for one in sorted(ranges, key=_number) if may_depend(root, one)), None)
        if over is None:
            return root
        for part in become_family(root, over):
            part.touched = False  # as in `divide`
    if root.split is None:
        return root
    if not isinstance(root.split, Cases):
        new = specialised(root.split, ranges)
        return root if new is root.split else new
    cases, over = root.split, root.split.over.root
    if over not in ranges:
        parts = tuple(specialised(one, ranges) for one in cases.parts)
        if all(new is old for new, old in zip(parts, cases.parts, strict=True)):
            return root
        family = root.child(root.size)
        family.split = Cases(over, cases.ends, parts)
        return family
    start, stop, left = ranges[over]
    chosen = [place for place, (low, high) in enumerate(_spans(cases.ends)) if low < stop and high > start]
    parts = tuple(specialised(cases.parts[place], ranges) for place in chosen)
    if len(parts) == 1 or not isinstance(left, Label):
        return parts[0]
    family = root.child(root.size, left)
    family.split = Cases(left, tuple(min(cases.ends[place], stop) - start for place in chosen), parts)
    return family


def _number(label: Label) -> int:
    return label.number


def _spans(ends: Sequence[int]) -> list[tuple[int, int]]:
    return list(pairwise((0, *ends)))


def become_family(root: Label, over: Label) -> list[Label]:
    """Make an undivided label differ from one part to another of a sum it stands below; what it becomes in each."""
    assert isinstance(over.split, Sum)
    parts = []
    for part in over.split.parts:
        one = root.child(root.size, *([part] if isinstance(part, Label) else []))
        one.apart |= {over.root}
        one.partitions = set(root.partitions)
        parts.append(one)
    root.split = Cases(over, over.split.ends, tuple(parts))
    return parts


def factored(expression: Expression, sizes: Sequence[int]) -> Dimensions:
    """An expression as a product of factors of these sizes, outermost first."""
    wanted = [size for size in sizes if size != 1]
    found = iter(_factored(expression, wanted))
    return tuple(UNIT if size == 1 else next(found) for size in sizes)


def _factored(expression: Expression, sizes: Sequence[int]) -> list[Expression]:
    if len(sizes) <= 1:
        return [expression]
    whole = opened(expression)
    inner = math.prod(sizes[1:])
    if isinstance(whole, Sum) and all(part.size % inner == 0 for part in whole.parts):
        return _factored_sum([_factored(part, [part.size // inner, *sizes[1:]]) for part in whole.parts])
    found: list[Expression] = []
    for size in reversed(sizes[1:]):
        expression, last = peeled(expression, size)
        found.append(last)
    return [expression, *reversed(found)]


def _factored_sum(parts: list[list[Expression]]) -> list[Expression]:
    """The factors of a sum of products: one label for the first, and for each other its cases."""
    if all(part[1:] == parts[0][1:] for part in parts):
        return [added(part[0] for part in parts), *parts[0][1:]]
    outer = Sum(tuple(part[0] for part in parts))
    first = Label(outer.size, split=outer)
    found: list[Expression] = [first]
    for place in range(1, len(parts[0])):
        cases = Cases(first, outer.ends, tuple(part[place] for part in parts))
        found.append(Label(parts[0][place].size, split=cases))
    return found


def peeled(expression: Expression, size: int) -> tuple[Expression, Expression]:
    """An expression as a product of two factors, of which the inner has this size."""
    rest = expression.size // size
    if size == 1 or rest == 1:
        return (expression, UNIT) if size == 1 else (UNIT, expression)
    whole = opened(expression)
    if isinstance(whole, Uniform):
        return Uniform(rest), Uniform(size)
    if isinstance(whole, Pinned | Pick):
        return Pinned(rest), Pinned(size)
    if isinstance(whole, Label):
        return _peeled_label(whole, size)
    if isinstance(whole, Sum):
        if all(part.size % size == 0 for part in whole.parts):
            outer, inner = _factored_sum([list(peeled(part, size)) for part in whole.parts])
            return outer, inner
    else:
        last = whole.factors[-1]
        before = multiplied(whole.factors[:-1])
        if size % last.size == 0:
            outer, inner = peeled(before, size // last.size)
            return outer, multiplied([inner, last])
        if last.size % size == 0:
            outer, inner = peeled(last, size)
            return multiplied([before, outer]), inner
    pin(whole)  # blocks that lie across each other
    return Pinned(rest), Pinned(size)


def _peeled_label(root: Label, size: int) -> tuple[Expression, Expression]:
    rest = root.size // size
    outer, inner = root.child(rest), root.child(size)
    if isinstance(root.split, Cases):
        pairs = [peeled(one, size) for one in root.split.parts]
        outer.split = Cases(root.split.over, root.split.ends, tuple(one for one, _ in pairs))
        inner.split = Cases(root.split.over, root.split.ends, tuple(one for _, one in pairs))
    else:
        outer.scopes = [scope | {inner} for scope in outer.scopes]
        inner.scopes = [scope | {outer} for scope in inner.scopes]
    root.split = Product((outer, inner))
    for width, before in root.partitions:
        partition(root, width, before)
    return outer, inner


def partition(expression: Expression, width: int, before: int = 0) -> None:
    """Note that a GroupNorm's groups of ``width`` divide an expression, of which the first began ``before`` it."""
    whole = opened(expression)
    if width <= 1 or before + whole.size <= width or isinstance(whole, Pinned | Uniform | Pick):
        return
    if isinstance(whole, Label):
        if isinstance(whole.split, Cases):
            for part in whole.split.parts:
                partition(part, width, before)
        else:
            whole.partitions.add((width, before))
    elif isinstance(whole, Sum):
        for part in whole.parts:
            partition(part, width, before)
            before = (before + part.size) % width
    else:
        first, inner = whole.factors[0], multiplied(whole.factors[1:])
        if not _freed(first, inner):
            pin(whole)
        elif width % inner.size == 0 and before % inner.size == 0:
            partition(first, width // inner.size, before // inner.size)
        elif inner.size % width == 0:
            partition(inner, width, before)
        else:
            pin(whole)


def _freed(outer: Expression, inner: Expression) -> bool:
    """Let the labels of an outer factor not depend on those of an inner one; whether that can be had."""
    within = mentioned(inner)
    for label in mentioned(outer):
        if isinstance(label.split, Cases) and label.split.over.root in within:
            return False
        scope = scope_of(label)
        if scope is not None:
            label.scopes = [scope - within]
    return True
