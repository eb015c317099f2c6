"""Groups that are derived from the graph of a model, against those that are written by hand for its arch.

Both were made apart: what one forgets or ties wrongly, the other shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import pytest

from remelt.alignment.comparison import same_groups
from remelt.alignment.derivation.tracing import groups_from_module
from remelt.alignment.instances import INSTANCES
from remelt.archs.axes.find import axis_groups
from remelt.archs.axis_groups import AxisGroup, Window
from remelt.core.pieces import Converted

LARGE = {"sd1", "sd2", "sdxl", "sdxl_refiner", "vae"}
APART = {
    "glm": "only its configuration tells how many channels its rotary embeddings leave alone",
    "mixtral": "experts that are modules of their own can change places, which no graph tells",
}
"""Where fewer or more permutations are derived, and why."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in INSTANCES if name not in APART],
)
def test_what_is_derived_is_what_is_written_by_hand(name: str) -> None:
    instance = INSTANCES[name]()
    for module in instance.module.modules():
        if name.endswith("_moe") and hasattr(module, "set_experts_implementation"):
            module.set_experts_implementation("batched_mm")  # the usual one chooses its path by the data
    written = axis_groups(instance.arch, instance.shapes, instance.heads)
    derived = groups_from_module(instance.module, instance.inputs)
    assert same_groups(in_original(derived, instance.parameters), written) == []


def in_original(groups: Iterable[AxisGroup], parameters: Mapping[str, Converted]) -> Iterator[AxisGroup]:
    """The groups of a module, with the keys and the rows that its parameters have in the original layout."""
    for group in groups:
        windows = [moved for window in group.windows for moved in _moved(group, window, parameters)]
        if windows and not group.is_fixed:
            yield replace(group, windows=tuple(dict.fromkeys(windows)))


def _moved(group: AxisGroup, window: Window, parameters: Mapping[str, Converted]) -> Iterator[Window]:
    if window.tensor not in parameters:  # a buffer that no file has
        return
    one, at = parameters[window.tensor], 0
    if window.chooses:
        assert len(one.pieces) == 1
        yield replace(window, key=window.key.replace(window.tensor, one.pieces[0].key))
        return
    if one.transposed:
        yield replace(window, key=one.pieces[0].key, axis=1 - window.axis)
        return
    last = int(group.positions(window).max()) + window.run if window.along else 0
    for piece in one.pieces:
        rows = piece.stop - piece.start
        if window.axis:
            yield replace(window, key=piece.key)
        elif at <= window.offset and last <= at + rows:
            yield replace(window, key=piece.key, offset=window.offset - at + piece.start)
        at += rows
