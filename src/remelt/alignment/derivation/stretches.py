"""Where labels lie on an axis: its expression multiplied out, into stretches of undivided labels with strides.

What differs from one part of a sum to another must have that sum on the same axis. Where it has not, no window could
say so: all cases are tied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from remelt.alignment.derivation.labels import Cases, Dimensions, Expression, Label, Product, Sum, may_depend, opened
from remelt.alignment.derivation.splitting import become_family
from remelt.alignment.derivation.tying import collapsed

Key: TypeAlias = tuple[str, int]
"""A tensor and an axis of it."""


@dataclass(frozen=True)
class Factor:
    """One index set of a stretch: its size and step, and its label unless it has none."""

    size: int
    stride: int
    label: Label | None


@dataclass(frozen=True)
class Stretch:
    """A place on an axis where the indices of some labels lie, one within another."""

    offset: int
    factors: tuple[Factor, ...]

    @property
    def labels(self) -> list[Label]:
        """Those of its factors."""
        return [factor.label for factor in self.factors if factor.label is not None]


Places: TypeAlias = dict[Key, list[Stretch]]


def places_of(axes: Mapping[str, Dimensions]) -> Places:
    """The stretches of every axis."""
    while True:
        changed = False
        found: Places = {}
        for key, row in axes.items():
            for axis, expression in enumerate(row):
                terms = _resolved(_terms(expression))
                changed |= any(_amended(term) for term in terms)
                found[key, axis] = [_stretch(term) for term in terms]
        if not changed:
            return found


@dataclass(frozen=True)
class _Term:
    """A stretch in the making: its factors with their strides, and the part of each sum that it is in."""

    offset: int = 0
    factors: tuple[tuple[Expression, int], ...] = ()
    chosen: Mapping[Label, int] = field(default_factory=dict)

    def within(self, inner: _Term, stride: int) -> _Term:
        """Another's factors within its own."""
        factors = tuple((one, step * stride) for one, step in inner.factors)
        offset = self.offset + inner.offset * stride
        return _Term(offset, self.factors + factors, {**self.chosen, **inner.chosen})


def _terms(expression: Expression) -> list[_Term]:
    if isinstance(expression, Label):
        root = expression.root
        if root.split is None or isinstance(root.split, Cases):
            return [_Term(factors=((root, 1),))]
        if not isinstance(root.split, Sum):
            return _terms(root.split)
        return _terms_of_sum(root.split, root)
    if isinstance(expression, Sum):
        return _terms_of_sum(expression, None)
    if isinstance(expression, Product):
        found, stride = [_Term()], expression.size
        for factor in expression.factors:
            stride //= factor.size
            found = [one.within(inner, stride) for one in found for inner in _terms(factor)]
        return found
    return [_Term(factors=((expression, 1),))]


def _terms_of_sum(whole: Sum, label: Label | None) -> list[_Term]:
    found, offset = [], 0
    for place, part in enumerate(whole.parts):
        chosen = {} if label is None else {label: place}
        found += [_Term(offset, chosen=chosen).within(term, 1) for term in _terms(part)]
        offset += part.size
    return found


def _resolved(terms: list[_Term]) -> list[_Term]:
    """Terms with what differs from part to part replaced, where they tell the part."""
    found, rest = [], list(reversed(terms))
    while rest:
        term = rest.pop()
        for place, (one, stride) in enumerate(term.factors):
            if isinstance(one, Label) and isinstance(one.split, Cases) and one.split.over.root in term.chosen:
                case = one.split.parts[term.chosen[one.split.over.root]]
                before = _Term(term.offset, term.factors[:place], term.chosen)
                after = term.factors[place + 1 :]
                for inner in reversed(_terms(case)):
                    whole = before.within(inner, stride)
                    rest.append(_Term(whole.offset, whole.factors + after, whole.chosen))
                break
        else:
            found.append(term)
    return found


def _amended(term: _Term) -> bool:
    """Tie or tell apart the cases of labels in a term, as far as windows can say them; whether anything changed."""
    for one, _ in term.factors:
        if not isinstance(one, Label) or one.parent is not None:
            continue
        if isinstance(one.split, Cases):
            collapsed(one)
            return True
        if one.split is None and not one.fixed and one.size > 1:
            over = next((label for label in term.chosen if may_depend(one, label)), None)
            if over is not None and over is not one:
                become_family(one, over)
                return True
    return False


def _stretch(term: _Term) -> Stretch:
    factors = []
    for one, stride in term.factors:
        label = opened(one)
        factors.append(Factor(one.size, stride, label if isinstance(label, Label) else None))
    return Stretch(term.offset, tuple(factors))
