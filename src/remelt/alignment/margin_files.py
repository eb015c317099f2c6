"""Margins in files: what is computed once for a reference, and proves that nothing is to be gained for a fine-tune."""

from __future__ import annotations

import json
import os
from pathlib import Path

import safetensors.torch
import torch

from remelt.alignment.margins import Margins, Rows
from remelt.core.dtype import DType
from remelt.errors import FormatError, OutputError
from remelt.formats.checkpoint import open_checkpoint
from remelt.tensors import tensor_over

FORMAT_KEY, REFERENCE_KEY, GROUPS_KEY = "remelt_margins", "remelt_reference", "remelt_groups"
FORMAT = "1"
_PARTS = ("margins", "norms")
_AGAIN = "name another file with --margins, and they are computed"


def save_margins(margins: Margins, path: Path, reference: str) -> Path:
    """Write the margins of a reference, whose content has that SHA-256; `OutputError` where that cannot be."""
    tensors = {
        f"{group}/{levels}/{part}": getattr(rows, part).contiguous()
        for (group, levels), rows in margins.rows.items()
        for part in _PARTS
    }
    told = {FORMAT_KEY: FORMAT, REFERENCE_KEY: reference, GROUPS_KEY: json.dumps(dict(margins.digests))}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(safetensors.torch.save(tensors, told))
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    return path


def load_margins(path: Path, reference: str) -> Margins:
    """The margins of a reference whose content has that SHA-256.

    Raises `FormatError` for a file of anything else, and for the margins of another reference.
    """
    found: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    with open_checkpoint(path) as checkpoint:
        told, name = checkpoint.metadata, path.name
        if told.get(FORMAT_KEY) != FORMAT:
            raise FormatError(f"{name} holds no margins of format {FORMAT}", hint=_AGAIN)
        if told.get(REFERENCE_KEY) != reference:
            raise FormatError(f"{name} holds the margins of another reference, by its content", hint=_AGAIN)
        for key, info in checkpoint.tensors.items():
            rest, _, part = key.rpartition("/")
            group, _, levels = rest.rpartition("/")
            if part not in _PARTS or info.dtype is not DType.F64 or len(info.shape) != 1:
                raise FormatError(f"{name} is damaged: {key!r} is {info}, and no part of margins", hint=_AGAIN)
            found.setdefault((group, levels), {})[part] = tensor_over(checkpoint.read(key), info.dtype).clone()
    for (group, _), parts in found.items():
        if set(parts) != set(_PARTS) or len({len(one) for one in parts.values()}) > 1:
            raise FormatError(f"{name} is damaged: the margins of {group} are not whole", hint=_AGAIN)
    try:
        digests = {str(group): str(digest) for group, digest in json.loads(told.get(GROUPS_KEY, "{}")).items()}
    except (ValueError, AttributeError, RecursionError):
        raise FormatError(f"{name} is damaged: it does not tell its groups", hint=_AGAIN) from None
    return Margins({place: Rows(parts["margins"], parts["norms"]) for place, parts in found.items()}, digests)
