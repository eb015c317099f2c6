"""Problems of keys in words: grouped by input, key lists folded, with the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from remelt.check.inputs import Input
from remelt.check.keys import KeyReport
from remelt.errors import Problem

_SHOWN = 6
_ROWS = re.compile(r"(?:\S*\.)?(?:embed_tokens|word_embeddings|wte|lm_head)\.weight is \[")
_OF_TOKENS = "align_vocabulary(recipe) merges models of different tokens, row by row"


def problems_of(report: KeyReport, inputs: Sequence[Input]) -> Iterator[Problem]:
    """Every problem that the keys have: missing ones first, then shapes and types."""
    for (lacking, having, settled), keys in report.lacking.items():
        if settled in ("error", "delta"):
            plural = "s" if len(keys) != 1 else ""
            take = f"--missing first takes {'them' if plural else 'it'} from {having}; "
            yield Problem(
                lacking,
                f"lacks {len(keys)} key{plural} that {having} has: {fold_keys(keys)}",
                f"{take if settled == 'error' else ''}--missing skip leaves {'them' if plural else 'it'} out",
            )
    variants = {given.label: given.note for given in inputs if given.note}
    by_input: dict[str, list[str]] = {}
    for label, message, _ in report.mismatched:
        by_input.setdefault(label, []).append(message)
    for label, messages in by_input.items():
        note = variants.get(label) or next(iter(variants.values()), None)
        for message in messages[:_SHOWN]:
            yield Problem(label, message, _OF_TOKENS if note is None and _ROWS.match(message) else note)
        if len(messages) > _SHOWN:
            yield Problem(label, f"and {len(messages) - _SHOWN} more tensors do not fit")


def fold_keys(keys: Sequence[str], shown: int = _SHOWN) -> str:
    """Keys for people: those that differ in their last part only are folded, and the tail is counted.

    >>> fold_keys(["decoder.conv_in.bias", "decoder.conv_in.weight", "logit_scale"])
    'decoder.conv_in.{bias,weight}, logit_scale'
    """
    by_parent: dict[str, list[str]] = {}
    for key in keys:
        parent, dot, leaf = key.rpartition(".")
        by_parent.setdefault(parent + dot or leaf, []).append(leaf if dot else "")
    folded = [
        parent + (leaves[0] if len(leaves) == 1 else "{" + ",".join(leaves) + "}")
        for parent, leaves in by_parent.items()
    ]
    if len(folded) <= shown:
        return ", ".join(folded)
    prefix = _shared_beginning(keys)
    whole = f" (all begin with {prefix!r})" if len(prefix) > 3 else ""
    return f"{', '.join(folded[:shown])} and {len(folded) - shown} more{whole}"


def _shared_beginning(keys: Sequence[str]) -> str:
    """What all keys begin with, up to a dot."""
    low, high = min(keys), max(keys)
    shared = next(
        (at for at, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]), min(len(low), len(high))
    )
    return low[: low.rfind(".", 0, shared) + 1]
