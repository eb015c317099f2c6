"""Models that cannot be matched: refused by name, all problems at once, before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from remelt.alignment.weights import Weights, free_windows
from remelt.archs.axis_groups import AxisGroup
from remelt.errors import CheckError, Problem, shortened


def refuse_unfit(reference: Weights, model: Weights, groups: Sequence[AxisGroup], name: str = "model") -> None:
    """Refuse models that lack tensors of the groups, differ in shapes there, or do not hold floating-point numbers.

    ``name`` is what the model is called among several.
    """
    problems = list(_problems(reference, model, groups, name))
    if problems:
        raise CheckError(shortened(problems), inputs=2)


def _problems(reference: Weights, model: Weights, groups: Sequence[AxisGroup], called: str) -> Iterator[Problem]:
    for key, windows in free_windows(groups).items():
        name = windows[0][0].name
        lacking = [label for label, one in (("reference", reference), (called, model)) if key not in one.shapes]
        if lacking:
            yield Problem(f"the {' and the '.join(lacking)}", f"lacks {key}, which is permuted with the group {name}")
            continue
        ours, theirs = tuple(reference.shapes[key]), tuple(model.shapes[key])
        if ours != theirs:
            message = f"is {list(ours)} in the reference and {list(theirs)} in the {called}"
            yield Problem(key, f"{message}: only models of one shape are aligned")
            continue
        for label, one in (("reference", reference), (called, model)):
            if not one.is_float(key):
                yield Problem(
                    key,
                    f"of the {label} holds no floating-point numbers, but lies on a permuted axis (group {name})",
                    "dequantise the model first: remelt merge MODEL --dtype fp16 -o OUT",
                )


def refuse_non_finite(reference: Weights, model: Weights, keys: Sequence[str]) -> None:
    """Refuse models with NaN or infinity on permuted axes, by the names of the tensors."""
    problems = [
        Problem(key, f"of the {label} holds NaN or infinity: nothing can be compared with it")
        for key in keys
        for label, one in (("reference", reference), ("model", model))
        if not bool(torch.isfinite(one.tensor(key)).all())
    ]
    if problems:
        raise CheckError(shortened(problems), inputs=2)
