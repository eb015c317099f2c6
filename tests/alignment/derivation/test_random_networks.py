"""Random networks: whatever they do with their channels, permuting what is derived keeps the function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 12


class Step(nn.Module):
    """One operation on tensors of shape (batch, places, channels), of which the last two may be read."""

    def __init__(self, kind: str, widths: list[int]) -> None:
        super().__init__()
        self.kind = kind
        last, before = widths[-1], widths[-2]
        self.linear = nn.Linear(last, WIDTH) if kind in ("linear", "tied") else None
        self.norm = nn.LayerNorm(last) if kind == "layer_norm" else None
        self.scale = nn.Parameter(torch.ones(last)) if kind in ("scale", "softmax_scale") else None
        self.small = nn.Parameter(torch.ones(last // 2)) if kind in ("repeated_scale", "inner_scale") else None
        self.heads = nn.Parameter(torch.ones(2, last // 2)) if kind == "head_scale" else None
        self.table = nn.Parameter(torch.ones(3, 2, last // 2)) if kind == "table" else None
        self.numbers = nn.Parameter(torch.ones(last)) if kind == "group_norm" else None
        self.mixed = nn.Parameter(torch.ones(2, last // 2, last // 2)) if kind == "each_head" else None
        self.conv = nn.Conv1d(last, last, 1, groups=2) if kind == "grouped" else None
        self.out = {"cat": last + before, "half": last // 2, "glu": last // 2, "pad": last + 2}.get(kind, last)
        if self.linear is not None:
            self.out = WIDTH

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        batch, places, width = x.shape
        heads = x.view(batch, places, 2, width // 2)
        match self.kind:
            case "linear" | "tied":
                return self.linear(x)
            case "layer_norm":
                return self.norm(x)
            case "group_norm":
                return functional.group_norm(x.mT, _groups(width), self.numbers).mT
            case "scale":
                return x * self.scale
            case "softmax_scale":
                return x * self.scale.softmax(0)
            case "repeated_scale":
                return x * self.small.repeat(2)
            case "inner_scale":
                return x * self.small.repeat_interleave(2)
            case "head_scale":
                return (heads * self.heads).reshape(x.shape)
            case "table":
                return (heads * self.table[1] + self.table[2]).reshape(x.shape)
            case "each_head":
                return torch.einsum("bphi,hio->bpho", heads, self.mixed).reshape(x.shape)
            case "grouped":
                return self.conv(x.mT).mT
            case "add":
                return x + y if x.shape == y.shape else x.relu()
            case "cat":
                return torch.cat([x, y], -1)
            case "half":
                return x[..., : width // 2] * x[..., width // 2 :].sigmoid()
            case "glu":
                even, odd = x.view(batch, places, width // 2, 2).unbind(-1)
                return even.sigmoid() * odd
            case "swap":
                return heads.flip(2).reshape(x.shape)
            case "turn":
                return heads.mT.reshape(x.shape)
            case "attention":
                q = heads.transpose(1, 2)
                return (torch.softmax(q @ q.mT, -1) @ q).transpose(1, 2).reshape(x.shape)
            case "gram":
                return x @ (x.mT @ x).softmax(-1)
            case "pad":
                return functional.pad(x, (1, 1))
            case "roll":
                return x.roll(1, -1)
            case "sum_heads":
                return (heads + heads.mean(2, keepdim=True)).reshape(x.shape)
            case "norm_heads":
                return functional.layer_norm(heads, heads.shape[-1:]).reshape(x.shape)
            case _:
                return x.cumsum(-1)


def _groups(width: int) -> int:
    return next(groups for groups in (4, 3, 2, 1) if width % groups == 0)


KINDS = (
    "linear", "layer_norm", "group_norm", "scale", "softmax_scale", "repeated_scale", "inner_scale", "head_scale",
    "table", "each_head", "grouped", "add", "cat", "half", "glu", "swap", "turn", "attention", "gram", "pad",
    "sum_heads", "norm_heads",
)  # fmt: skip
RARE = ("roll", "cumsum")


class Network(nn.Module):
    """Steps between a linear map of the input and one to the output."""

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, WIDTH), nn.Linear(5, WIDTH)
        widths = [WIDTH, WIDTH]
        self.steps = nn.ModuleList()
        for kind in kinds:
            if widths[-1] % 4 and kind not in ("linear", "cat", "add", "scale"):
                kind = "linear"
            step = Step(kind, widths)
            self.steps.append(step)
            widths.append(step.out)
        self.last = nn.Linear(widths[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        before, now = self.first(x), self.second(x).tanh()
        for step in self.steps:
            before, now = now, step(now, before)
        return self.last(now)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.sampled_from(KINDS) | st.sampled_from(RARE), min_size=1, max_size=9))
def test_permuting_what_is_derived_keeps_the_function(trial: Callable[..., Any], kinds: list[str]) -> None:
    generator = torch.Generator().manual_seed(1)
    found = trial(Network(kinds), torch.randn(2, 3, 5, generator=generator))
    assert found.error_of(found.free, seeds=2) < 1e-10
