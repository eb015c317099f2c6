"""What sites and interfaces read of a single file: metadata of the ModelSpec standard, carried over or written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath

from remelt.check.inputs import Input
from remelt.core.checksum import HASH_PLACEHOLDER

PREFIX = "modelspec."
VERSION = "1.0.1"
_CARRIED = ("architecture", "implementation", "resolution", "prediction_type", "timestep_range", "encoder_layer")
"""What is true of a merge as of its first model."""
_VELOCITY = "v_pred"
"""The tensor that marks a model of v-prediction."""
_SHOWN = 3


def model_spec(
    inputs: Sequence[Input], keys: Iterable[str], title: str | None = None, *, hashed: bool = False
) -> dict[str, str]:
    """The metadata of a result of these models, which has those keys; the first model's arch and use are the result's.

    Where it is to be ``hashed``, it has a place for the SHA-256 of what follows the header, as the standard asks.

    Empty where neither the arch file nor the first model's metadata tells an architecture.
    """
    if not inputs:
        return {}
    arch, told = inputs[0].detection.arch, _told(inputs[0].checkpoint.metadata)
    found = {} if arch is None else dict(arch.modelspec)
    found |= {name: told[name] for name in _CARRIED if name in told}
    if "architecture" not in found:
        return {}
    if "prediction_type" not in found and _VELOCITY in keys:
        found["prediction_type"] = "v"
    titles = list(dict.fromkeys(map(_title, inputs)))
    more = f" and {len(titles) - _SHOWN} more" if len(titles) > _SHOWN else ""
    found["title"] = title or " + ".join(titles[:_SHOWN]) + more
    licenses = dict.fromkeys(text for one in inputs if (text := _told(one.checkpoint.metadata).get("license")))
    if licenses:
        found["license"] = ", ".join(licenses)
    if len(titles) > 1:
        found["merged_from"] = ", ".join(titles)
    if hashed:
        found["hash_sha256"] = f"0x{HASH_PLACEHOLDER}"
    return {PREFIX + name: text for name, text in {"sai_model_spec": VERSION, **found}.items()}


def _told(metadata: Mapping[str, str]) -> dict[str, str]:
    return {name.removeprefix(PREFIX): text for name, text in metadata.items() if name.startswith(PREFIX)}


def _title(given: Input) -> str:
    """What a model is called: by its metadata, or by its file."""
    return _told(given.checkpoint.metadata).get("title") or PurePath(given.label).stem
