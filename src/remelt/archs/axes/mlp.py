"""The axis groups of chains of linear maps with pointwise functions and norms between: told by shapes that chain."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

from remelt.archs.axes.draft import Draft, Drafts
from remelt.archs.axes.heads import Heads
from remelt.archs.axis_groups import AxisGroup, Shapes
from remelt.errors import RefusedError

_NUMBER = re.compile(r"\d+")
_HINT = "groups of a network that is no chain can be derived from its module"


def mlp_groups(shapes: Shapes, heads: Heads) -> tuple[AxisGroup, ...]:
    """All groups of a chain: what is between two maps is free, what goes in and comes out is fixed.

    Norms are those of each channel, or over all channels. `RefusedError` where the maps do not chain, or where names
    and shapes leave open what is where.

    >>> shapes = {"0.weight": (8, 4), "0.bias": (8,), "2.weight": (3, 8), "2.bias": (3,)}
    >>> [(group.name, group.size, group.structure) for group in mlp_groups(shapes, {})]
    [('inputs', 4, 'fixed'), ('0', 8, 'free'), ('outputs', 3, 'fixed')]
    """
    chain, drafts = chain_of(shapes), Drafts(shapes)
    between = [drafts.fixed("inputs", shapes[f"{chain[0]}.weight"][1])]
    for place, module in enumerate(chain):
        begin, name = (drafts.free, module) if place < len(chain) - 1 else (drafts.fixed, "outputs")
        between[-1].read_by(module)
        between.append(begin(name, shapes[f"{module}.weight"][0]).made_by(module))
    _norms(shapes, chain, between)
    return drafts.finished()


def chain_of(shapes: Shapes) -> Sequence[str]:
    """The linear maps in the order in which they are applied: by their numbers, those without one first or last."""
    large = next((key for key, shape in shapes.items() if len(shape) > 2), None)
    if large is not None:
        raise RefusedError(f"a chain of linear maps has matrices, but {large!r} is {list(shapes[large])}", hint=_HINT)
    maps = [key.removesuffix(".weight") for key, shape in shapes.items() if len(shape) == 2 and key.endswith(".weight")]
    orders = [order for order in _orders(maps) if _chains(order, shapes)]
    if len(orders) != 1:
        said = "there are several ways to do so" if orders else "they do not"
        raise RefusedError(
            f"linear maps of a chain follow one another by their numbers and their widths, but of {len(maps)} {said}",
            hint=_HINT,
        )
    return orders[0]


def _orders(maps: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Orders that numbers allow."""
    numbered = {module: tuple(map(int, _NUMBER.findall(module))) for module in maps}
    inside = sorted((module for module in maps if numbered[module]), key=lambda module: numbered[module])
    ends = [module for module in maps if not numbered[module]]
    if not maps or len(ends) > 2 or len(set(map(numbered.__getitem__, inside))) < len(inside):
        return
    for order in itertools.permutations(ends):
        for before in range(len(ends) + 1):
            if inside or before == len(ends):  # without numbers it makes no difference
                yield (*order[:before], *inside, *order[before:])


def _chains(order: Sequence[str], shapes: Shapes) -> bool:
    widths = [shapes[f"{module}.weight"] for module in order]
    return all(out == into for (out, _), (_, into) in itertools.pairwise(widths))


def _norms(shapes: Shapes, chain: Sequence[str], between: Sequence[Draft]) -> None:
    """Tie the vectors of norms to the channels that they are of."""
    stems = dict.fromkeys(key.rpartition(".")[0] for key, shape in shapes.items() if shape not in ((), (1,)))
    places = {module: place for place, module in enumerate(chain)}
    apart: dict[str, int] = {}
    for stem in stems:
        if stem in places:
            continue
        number = [int(one) for one in _NUMBER.findall(stem)]
        kin = {tuple(map(int, _NUMBER.findall(module))): module for module in chain if _plain(module) == _plain(stem)}
        if kin and number:
            before = [place for one, module in kin.items() if list(one) < number for place in (places[module],)]
            between[max(before) + 1 if before else 0].normalised_by(stem)
        else:
            apart[stem] = _place_of(stem, number, places)
    _tie_apart(apart, shapes, chain, between)


def _plain(module: str) -> str:
    return _NUMBER.sub("#", module)


def _place_of(stem: str, number: list[int], places: Mapping[str, int]) -> int:
    """The map that has the same number as a norm."""
    found = [place for module, place in places.items() if [int(one) for one in _NUMBER.findall(module)] == number]
    if not number or len(found) != 1:
        raise RefusedError(f"a norm in a chain has the number of a linear map, but {stem!r} has none's", hint=_HINT)
    return found[0]


def _tie_apart(apart: Mapping[str, int], shapes: Shapes, chain: Sequence[str], between: Sequence[Draft]) -> None:
    """Norms that are numbered like the maps stand all before them, or all after: widths tell."""
    if not apart:
        return
    sizes = {stem: next(shapes[key][0] for key in shapes if key.rpartition(".")[0] == stem) for stem in apart}
    fits = [
        shift for shift in (0, 1) if all(sizes[stem] == between[place + shift].size for stem, place in apart.items())
    ]
    if len(fits) != 1:
        first = next(iter(apart))
        said = "both" if fits else "neither"
        raise RefusedError(
            f"norms stand before the linear maps of their numbers or after them: {first!r} and its like fit {said}",
            hint=_HINT,
        )
    for stem, place in apart.items():
        between[place + fits[0]].normalised_by(stem)
