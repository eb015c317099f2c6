"""What a step is at a key: computed, absent, or zero."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from remelt.check.bound import Step
from remelt.core.dtype import DType

OWN = -1
"""In the place of an input whose element type is taken: none has a say, it is computed."""


class State(NamedTuple):
    """A step at a key: its register (None: absent), whose element type it has, and why it is absent."""

    register: int | None
    dtype: DType | int = 0
    source_key: str | None = None
    lacking: tuple[str, ...] = ()
    shapes: tuple[str, str] | None = None
    integral: bool = False
    zero: bool = False
    """Whether it is absent because it is zero there: an adapter changes some keys only."""


def joined(operands: Sequence[State]) -> tuple[str, ...]:
    """Whose fault it is that some operands are absent."""
    return tuple(dict.fromkeys(label for state in operands for label in state.lacking))


def sole_operand(step: Step, operands: Sequence[State], masks: Collection[int]) -> State | None:
    """What a call is without computing it, where some operands are zero: zero, or the only other; else None."""
    assert step.method is not None
    pairs = zip(step.operands, operands, strict=True)
    others = [(name, state) for (name, operand), state in pairs if not state.zero and operand not in masks]
    if not others:
        return State(None, zero=True)
    (name, state), *more = others
    return state if not more and name in step.method.declaration.identities else None
