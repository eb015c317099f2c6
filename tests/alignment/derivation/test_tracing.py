"""What the derivation takes for fixed, and what it says where it cannot work."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from remelt.alignment.derivation.tracing import groups_from_module
from remelt.archs.axis_groups import AxisGroup, faults
from remelt.errors import RefusedError

X = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """Something between two linear maps, of 6 to 8 channels and of as many as it gives to 3."""

    def __init__(self, middle: Callable[..., Tensor], width: int = 8, **stored: nn.Parameter | Tensor) -> None:
        super().__init__()
        self.first, self.last, self.middle = nn.Linear(6, 8), nn.Linear(width, 3), middle
        for name, tensor in stored.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor, persistent=not name.startswith("constant"))
        self.stored = tuple(stored)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x), *(getattr(self, name) for name in self.stored)))


def turned(x: Tensor) -> Tensor:
    """A rotary embedding with complex numbers."""
    angles = torch.polar(torch.ones(3, 4), torch.arange(12.0).view(3, 4))
    pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)))
    return torch.view_as_real(pairs * angles).flatten(-2)


def grouped_queries(x: Tensor) -> Tensor:
    """Attention of four heads of queries over two of keys and values."""
    q, kv = x[..., :4].unflatten(-1, (4, 1)).transpose(1, 2), x[..., 4:6].unflatten(-1, (2, 1)).transpose(1, 2)
    found = functional.scaled_dot_product_attention(q, kv, kv, enable_gqa=True)
    return torch.cat([found.transpose(1, 2).flatten(-2), x[..., 6:]], -1)


def chosen(x: Tensor, table: Tensor) -> Tensor:
    """The row of a table for the greatest channel of each place."""
    return table[x.topk(1, -1).indices.flatten()].view(*x.shape[:-1], -1)


def recurrent(x: Tensor, *gates: Tensor) -> Tensor:
    """A gated recurrent unit, which torch has as one operation."""
    return torch.ops.aten.gru.input(x, x.new_zeros(1, 2, 8), gates, True, 1, 0.0, False, False, True)[0]


def normalised(x: Tensor, groups: int) -> Tensor:
    """Channels in groups, without weights."""
    return functional.group_norm(x.mT, groups).mT


GATES = {f"gate{n}": nn.Parameter(torch.zeros(s)) for n, s in enumerate([(24, 8), (24, 8), (24,), (24,)])}
FORM = nn.Parameter(torch.zeros(8, 8, 8))
CASES: dict[str, tuple[nn.Module, list[str]]] = {
    "what runs place by place": (Between(lambda x: x.clamp(-1, 1).exp() + x.sigmoid() * 2), ["8"]),
    "an operation that no rule knows": (Between(lambda x: torch.linalg.matrix_exp(x[..., :3]) @ x), ["5"]),
    "the order of channels": (Between(lambda x: x.cumsum(-1)), []),
    "a recurrent network": (Between(recurrent, **GATES), []),
    "a constant for each channel": (Between(lambda x, turn: x * turn, constant=torch.rand(8)), []),
    "one constant for all": (Between(lambda x, turn: x * turn, constant=torch.rand(1)), ["8"]),
    "a buffer that is stored": (Between(lambda x, scale: x * scale, scale=torch.rand(8)), ["8"]),
    "a stored buffer of whole numbers": (Between(lambda x, order: x[..., order], order=torch.arange(8)), []),
    "halves that are used alike": (Between(lambda x: x[..., :4] * x[..., 4:], 4), ["4"]),
    "halves of which one is dropped": (Between(lambda x: x[..., :4], 4), ["4"]),
    "pairs that are used alike": (Between(lambda x: x[..., ::2] + x[..., 1::2], 4), ["4"]),
    "every third channel": (Between(lambda x: x[..., ::3], 3), []),
    "channels beside themselves": (Between(lambda x: torch.cat([x, x.relu()], -1), 16), ["8"]),
    "channels turned round": (Between(lambda x: x.flip(-1)), []),
    "channels sorted": (Between(lambda x: x.sort(-1).values), ["8"]),
    "the number of the greatest channel": (Between(lambda x: functional.one_hot(x.argmax(-1), 8).to(x.dtype)), ["8"]),
    "the greatest channels chosen from a table": (
        Between(chosen, 4, table=nn.Parameter(torch.zeros(8, 4))), ["4", "8"],
    ),
    "numbers of channels reckoned with": (Between(lambda x: x + x.argmax(-1, keepdim=True)), []),
    "a gram matrix": (Between(lambda x: x @ (x.mT @ x)), ["8"]),
    "rotary embeddings of complex numbers": (Between(turned), []),
    "grouped queries": (Between(grouped_queries, 6), ["2", "2(2)"]),
    "one GroupNorm": (Between(lambda x: normalised(x, 4)), ["4(2)"]),
    "groups of one channel": (Between(lambda x: normalised(x, 8)), ["8"]),
    "one group": (Between(lambda x: normalised(x, 1)), ["8"]),
    "two GroupNorms": (Between(lambda x: normalised(x, 4) + normalised(x, 2)), ["2+2+2+2"]),
    "groups that straddle": (Between(lambda x: normalised(torch.cat([x, x[..., :1]], -1), 3), 9), ["2+3+2"]),
    "rows chosen by what was found for each channel": (
        Between(lambda x, table: x + table[(x.sum(1).mean(0) > 0).long()], table=nn.Parameter(torch.rand(2))), ["8"],
    ),
    "a table gathered from": (Between(lambda x: x.gather(-1, x.argsort(-1))), ["8"]),
    "channels that attend to each other": (
        Between(lambda x: functional.scaled_dot_product_attention(x.mT, x.mT, x.mT).mT), ["8"],
    ),
    "channels that attend to those before": (
        Between(lambda x: functional.scaled_dot_product_attention(x.mT, x.mT, x.mT, is_causal=True).mT), [],
    ),
    "a bilinear form": (Between(lambda x, form: torch.einsum("bpi,bpj,ijk->bpk", x, x, form), form=FORM), ["8", "8"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_free_is_what_permuting_leaves_alone(name: str, trial: Callable[..., Any]) -> None:
    module, groups = CASES[name]
    found = trial(module, X)
    assert found.spelled == sorted(groups)
    assert found.error_of(found.free, seeds=3) < 1e-10


def test_every_element_is_in_a_window_and_unused_tensors_are_fixed() -> None:
    module = Between(lambda x, unused: x, unused=nn.Parameter(torch.rand(4, 5)))
    groups = groups_from_module(module, (X,))
    assert list(faults(groups, {key: tuple(value.shape) for key, value in module.state_dict().items()})) == []
    fixed = {(window.key, window.axis) for group in groups if group.is_fixed for window in group.windows}
    assert fixed == {("unused", 0), ("unused", 1), ("first.weight", 1), ("last.weight", 0), ("last.bias", 0)}


def test_tied_tensors_have_windows_under_all_their_names() -> None:
    module = nn.Sequential(nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 11))
    module[2].weight = module[0].weight
    (group,) = (one for one in groups_from_module(module, (torch.arange(4),)) if not one.is_fixed)
    assert [(one.key, one.axis) for one in group.windows] == [
        ("0.weight", 1), ("1.weight", 0), ("1.bias", 0), ("2.weight", 1)
    ]  # fmt: skip


def test_statistics_of_batch_norm_have_windows_and_the_module_stays_in_training() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, 2, 1)).train()
    module[1].eval()
    (group,) = (one for one in groups_from_module(module, (torch.rand(1, 3, 5, 5),)) if not one.is_fixed)
    assert {one.key for one in group.windows} >= {"1.running_mean", "1.running_var", "1.weight", "1.bias"}
    assert [part.training for part in module] == [True, False, True, True] and module.training


def test_a_flattened_image_has_runs() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(72, 2))
    (group,) = (one for one in groups_from_module(module, (torch.rand(1, 3, 5, 5),)) if not one.is_fixed)
    assert group.windows[-1].key == "2.weight" and group.windows[-1].run == 9 and group.size == 8


def test_groups_are_named_after_the_modules_that_make_their_indices() -> None:
    module = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    groups = {one.name: one for one in groups_from_module(module, (X.new_ones(1, 3, 8),)) if not one.is_fixed}
    assert list(groups) == ["self_attn", "linear1"]
    assert [level.name for level in groups["self_attn"].levels] == ["head", "qk", "value"]


def test_a_module_without_numbers_has_the_same_groups() -> None:
    module = CASES["halves that are used alike"][0]
    with torch.device("meta"):
        empty = Between(module.middle, 4)
    assert groups_from_module(empty, (X.to("meta"),)) == groups_from_module(module.float(), (X,))


class Undecided(nn.Module):
    """A path that depends on numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_cannot_be_traced_is_refused_with_what_torch_said() -> None:
    with pytest.raises(RefusedError) as caught:
        groups_from_module(Undecided(), (X,))
    first, hint = str(caught.value).splitlines()[0], str(caught.value).splitlines()[-1]
    assert first.startswith("torch.export cannot trace Undecided: ")
    assert "data-dependent" in first
    assert hint.startswith("hint: trace a part of it, or one whose path does not depend on numbers")


def test_sizes_that_depend_on_numbers_are_refused() -> None:
    module = Between(lambda x: x[x.sum((1, 2)) > 0] * 2)
    with pytest.raises(RefusedError, match=r"the size of what aten\.\S+ gives depends on numbers: \w+ is \(u0"):
        groups_from_module(module, (X,))


def test_the_number_of_permutations_is_that_of_the_whole_tree() -> None:
    (group,) = (one for one in groups_from_module(CASES["one GroupNorm"][0], (X,)) if not one.is_fixed)
    assert isinstance(group, AxisGroup)
    assert group.order() == pytest.approx(math.log(24 * 2**4))
