"""Ties expressions that a network reads together, and cuts dependences that a tensor does not keep.

`joined` makes two expressions of one dimension alike. `settle` looks at the dimensions of a tensor: a label may depend
only on labels of which the tensor, at each of its places, has an index.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

from remelt.alignment.derivation.labels import (
    Cases,
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
    present,
    scope_of,
)
from remelt.alignment.derivation.splitting import become_family, divide, partition, peeled, sliced


def joined(one: Expression, other: Expression) -> Expression:
    """Two expressions of the same places, tied; what holds for both."""
    assert one.size == other.size, (one, other)
    if one.size == 1:
        return other if isinstance(one, Uniform) else one
    if isinstance(one, Uniform):
        return other
    if isinstance(other, Uniform):
        return one
    if isinstance(one, Pinned | Pick) or isinstance(other, Pinned | Pick):
        return _joined_pinned(one, other)
    if isinstance(one, Label) and isinstance(other, Label) and one.root is other.root:
        return one.root
    first, second = opened(one), opened(other)
    if isinstance(first, Uniform | Pinned | Pick) or isinstance(second, Uniform | Pinned | Pick):
        return joined(first, second)
    if isinstance(first, Label) and isinstance(second, Label):
        return _united(first, second)
    if isinstance(first, Label) or isinstance(second, Label):
        leaf, whole = (first, other) if isinstance(first, Label) else (second, one)
        assert isinstance(leaf, Label)
        _divide_like(leaf, opened(whole))
        return joined(leaf, whole)
    found = _joined_divided(first, second)
    if isinstance(one, Label) and isinstance(other, Label):
        return _one_of(one.root, other.root)
    if isinstance(one, Label) and _is_solid(one):
        return one.root
    if isinstance(other, Label) and _is_solid(other):
        return other.root
    return found


def _joined_pinned(one: Expression, other: Expression) -> Expression:
    picks = [expression for expression in (one, other) if isinstance(expression, Pick)]
    for expression in (one, other):
        if not isinstance(expression, Pinned | Pick):
            pin(expression)
    if not picks or any(pick.source != picks[0].source for pick in picks):
        return Pinned(one.size)
    return Pick(one.size, joined(picks[0].of, picks[-1].of), picks[0].source)


def _one_of(one: Label, other: Label) -> Label:
    """The label for two whose parts were tied; one from now on where they are divided at the same places."""
    first, second = one.split, other.split
    if isinstance(first, Sum) and isinstance(second, Sum) and first.ends != second.ends:
        return one if _is_solid(one) else other
    if _is_solid(one) and _is_solid(other) and type(first) is type(second):
        if isinstance(first, Sum | Product):
            other.parent = one
            one.scopes = [*one.scopes, *other.scopes]
        return one
    return one if _is_solid(one) else other


def _is_solid(expression: Expression) -> bool:
    """Whether it has no part that is uniform."""
    if isinstance(expression, Label):
        split = expression.root.split
        return split is None or isinstance(split, Cases) or _is_solid(split)
    if isinstance(expression, Sum):
        return all(_is_solid(part) for part in expression.parts)
    if isinstance(expression, Product):
        return all(_is_solid(factor) for factor in expression.factors)
    return not isinstance(expression, Uniform) or expression.size == 1


def _divide_like(leaf: Label, whole: Expression) -> None:
    """Divide a label, or all cases of it, as another is."""
    if isinstance(whole, Sum):
        divide(leaf, (0, *whole.ends))
    else:
        assert isinstance(whole, Product)
        peeled(leaf, multiplied(whole.factors[1:]).size)


def _united(first: Label, second: Label) -> Expression:
    """Two labels that are not divided, or differ from case to case, as one."""
    if first is second:
        return first
    one, other = sorted((first, second), key=lambda label: label.number)
    for family, plain in ((one, other), (other, one)):
        if isinstance(family.split, Cases) and plain in mentioned(family):
            return joined(collapsed(family), plain)
        if isinstance(family.split, Cases) and plain.split is None:
            if not may_depend(plain, family.split.over.root):
                return joined(collapsed(family), plain)
            become_family(plain, family.split.over.root)
    if isinstance(one.split, Cases) and isinstance(other.split, Cases):
        mine, theirs = one.split, other.split
        if mine.over.root is not theirs.over.root or mine.ends != theirs.ends:
            return joined(collapsed(one), collapsed(other))
        for part, counterpart in zip(mine.parts, theirs.parts, strict=True):
            joined(part, counterpart)
        if one.root is not one or other.root is not other or other in mentioned(one) or one in mentioned(other):
            return joined(one, other) if not isinstance(one.split, Cases) else joined(collapsed(one), other)
    other.parent = one
    one.scopes = [*one.scopes, *other.scopes]
    one.apart |= other.apart
    one.fixed |= other.fixed
    one.touched |= other.touched
    one.role = one.role or other.role
    for width, before in other.partitions:
        partition(one, width, before)
    return one


def collapsed(family: Label) -> Expression:
    """A label that differed from case to case, with all cases tied."""
    assert isinstance(family.split, Cases)
    found, *others = family.split.parts
    family.split = found
    for part in others:
        family.split = found = joined(found, part)
    return family


def _joined_divided(first: Expression, second: Expression) -> Expression:
    if isinstance(first, Product) and isinstance(second, Product):
        return _joined_products(first, second)
    ends: set[int] = set()
    for whole in (first, second):
        if isinstance(whole, Sum):
            ends.update(whole.ends)
    pairs = pairwise([0, *sorted(ends)])
    return added([joined(sliced(first, begin, end), sliced(second, begin, end)) for begin, end in pairs])


def _joined_products(first: Product, second: Product) -> Expression:
    """Two products, from the last factor on, refined where one's is a part of the other's."""
    one, other = first.factors[-1], second.factors[-1]
    size = min(one.size, other.size)
    if max(one.size, other.size) % size:
        pin(first)  # blocks that lie across each other
        pin(second)
        return Pinned(first.size)
    rest, inner = peeled(first, size)
    other_rest, other_inner = peeled(second, size)
    if any(_differs(expression) for expression in (rest, other_rest)):  # what it differs over comes first
        tied = joined(inner, other_inner)
        return multiplied([joined(rest, other_rest), tied])
    outer = joined(rest, other_rest)
    return multiplied([outer, joined(inner, other_inner)])


def _differs(expression: Expression) -> bool:
    whole = opened(expression)
    return isinstance(whole, Label) and isinstance(whole.split, Cases)


def settle(dimensions: Sequence[Expression]) -> None:
    """Cut each label from those of which a tensor with these dimensions has no index, or several."""
    counts = Counter(label for dimension in dimensions for label in mentioned(dimension))
    held = [{label for label in present(dimension) if counts[label] == 1} for dimension in dimensions]
    for place, dimension in enumerate(dimensions):
        if isinstance(dimension, Label | Sum | Product):
            others = set[Label]().union(*(one for here, one in enumerate(held) if here != place))
            _walk(dimension, others)


def _walk(expression: Expression, allowed: set[Label]) -> None:
    if isinstance(expression, Sum):
        for part in expression.parts:
            _walk(part, allowed)
    elif isinstance(expression, Product):
        counts = Counter(label for factor in expression.factors for label in mentioned(factor))
        held = [{label for label in present(one) if counts[label] == 1} for one in expression.factors]
        for place, factor in enumerate(expression.factors):
            _walk(factor, allowed.union(*(one for here, one in enumerate(held) if here != place)))
    elif isinstance(expression, Label):
        _walk_label(expression.root, allowed)


def _walk_label(root: Label, allowed: set[Label]) -> None:
    split = root.split
    if isinstance(split, Cases):
        over = split.over.root
        if over not in allowed or not may_depend(root, over):
            _walk(collapsed(root), allowed)
            return
        assert isinstance(over.split, Sum)
        for number, (place, part) in enumerate(zip(over.split.parts, split.parts, strict=True)):
            _walk(part, allowed | present(place) | _in_case(allowed, over, number))
    elif split is not None:
        _walk(split, allowed)
    cut(root, allowed)


def _in_case(labels: Iterable[Label], over: Label, number: int) -> set[Label]:
    """What labels that differ over a sum are in one part of it."""
    found = set[Label]()
    for label in labels:
        split = label.root.split
        if isinstance(split, Cases) and split.over.root is over:
            found |= present(split.parts[number])
    return found


def cut(label: Label, allowed: Iterable[Label]) -> None:
    """Let a label depend on nothing but some."""
    root = label.root
    scope = scope_of(root)
    if scope is not None:
        root.scopes = [scope.intersection(allowed)]
