"""The axis groups of chains of linear maps: what tells their order, and what is refused."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remelt.archs.axes.find import axis_groups
from remelt.archs.axes.mlp import chain_of
from remelt.archs.axes.recognise import recognise_network
from remelt.archs.axis_groups import Shapes, faults
from remelt.errors import RefusedError


def chain(names: list[str], widths: list[int]) -> dict[str, tuple[int, ...]]:
    """Linear maps of these names, from width to width."""
    found: dict[str, tuple[int, ...]] = {}
    for name, into, out in zip(names, widths, widths[1:], strict=False):
        found |= {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
    return found


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{tensor}": (width,) for tensor in ("weight", "bias")}


@given(st.lists(st.integers(2, 9), min_size=3, max_size=14), st.randoms(use_true_random=False))
def test_the_order_of_keys_makes_no_difference(widths: list[int], random: Random) -> None:
    names = [f"layers.{2 * number}" for number in range(len(widths) - 1)]
    keys = list(chain(names, widths).items())
    random.shuffle(keys)
    shapes = dict(keys)
    groups = axis_groups("mlp", shapes)
    assert list(faults(groups, shapes)) == []
    assert [(group.size, group.structure) for group in groups] == [
        (width, "free" if 0 < place < len(widths) - 1 else "fixed") for place, width in enumerate(widths)
    ]


@pytest.mark.parametrize(
    ("shapes", "order"),
    [
        (chain(["fc1", "fc2", "fc10"], [4, 8, 8, 3]), ("fc1", "fc2", "fc10")),
        (chain(["hidden.0", "hidden.1", "head"], [4, 8, 8, 3]), ("hidden.0", "hidden.1", "head")),
        (chain(["begin", "hidden.0", "end"], [4, 8, 8, 3]), ("begin", "hidden.0", "end")),
        (chain(["b", "a"], [4, 8, 3]), ("b", "a")),
    ],
)
def test_maps_follow_one_another_by_numbers_and_widths(shapes: Shapes, order: tuple[str, ...]) -> None:
    assert chain_of(shapes) == order
    assert recognise_network(shapes) == "mlp"
    assert list(faults(axis_groups("mlp", shapes), shapes)) == []


@pytest.mark.parametrize(
    ("shapes", "tied"),
    [
        (chain(["0", "3"], [4, 8, 3]) | norm("1", 8), ["0"]),  # after its map, as they are numbered
        (chain(["1", "3"], [4, 8, 3]) | norm("0", 4), ["inputs"]),
        (chain(["fc1", "fc2"], [4, 8, 3]) | norm("bn1", 8), ["fc1"]),
        (chain(["layers.0", "layers.1"], [4, 8, 3]) | norm("norms.0", 4) | norm("norms.1", 8), ["inputs", "layers.0"]),
    ],
)
def test_a_norm_is_tied_to_the_channels_that_it_is_of(shapes: Shapes, tied: list[str]) -> None:
    groups = axis_groups("mlp", shapes)
    assert list(faults(groups, shapes)) == []
    norms = {key.rpartition(".")[0] for key, shape in shapes.items() if key.endswith("weight") and len(shape) == 1}
    assert [one.name for one in groups if norms & {window.key.rpartition(".")[0] for window in one.windows}] == tied


HINT = "hint: groups of a network that is no chain can be derived from its module"


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (
            chain(["0", "2"], [4, 8, 3]) | {"2.weight": (3, 7)},
            "linear maps of a chain follow one another by their numbers and their widths, but of 2 they do not",
        ),
        (
            chain(["a", "b"], [8, 8, 8]),
            (
                "linear maps of a chain follow one another by their numbers and their widths, "
                "but of 2 there are several ways to do so"
            ),
        ),
        (
            chain(["0"], [4, 8]) | {"1.weight": (8, 8, 3, 3)},
            "a chain of linear maps has matrices, but '1.weight' is [8, 8, 3, 3]",
        ),
        (
            chain(["fc1", "fc2"], [4, 8, 3]) | norm("bn7", 8),
            "a norm in a chain has the number of a linear map, but 'bn7' has none's",
        ),
        (
            chain(["fc1", "fc2"], [8, 8, 3]) | norm("bn1", 8),
            "norms stand before the linear maps of their numbers or after them: 'bn1' and its like fit both",
        ),
        (
            chain(["fc1", "fc2"], [4, 8, 3]) | norm("bn1", 5),
            "norms stand before the linear maps of their numbers or after them: 'bn1' and its like fit neither",
        ),
    ],
)  # fmt: skip
def test_what_is_no_chain_is_refused(shapes: Shapes, said: str) -> None:
    with pytest.raises(RefusedError) as refused:
        axis_groups("mlp", shapes)
    assert str(refused.value) == f"{said}\n{HINT}"


def test_what_is_none_of_them_is_not_recognised() -> None:
    assert recognise_network({"gru.weight_ih_l0": (12, 4), "gru.bias_ih_l0": (12,)}) is None
    assert recognise_network(chain(["0"], [4, 8])) is None
