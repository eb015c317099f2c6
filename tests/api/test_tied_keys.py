"""Names of one tensor: a file that holds one of them alone meets a file that holds them all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import remelt as rm
from remelt.archs.shapes import llama_shapes
from remelt.errors import CheckError

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def models(tmp_path: Path, write_model: Callable[..., Path]) -> tuple[Path, Path]:
    """A small Llama with an output head of its own, and one whose head is its embeddings."""
    drawn = torch.Generator().manual_seed(0)
    found = []
    for name, tied in (("plain", False), ("tied", True)):
        shapes = llama_shapes(2, tied=tied)
        tensors = {key: torch.randn(info.shape, generator=drawn) for key, info in shapes.items()}
        found.append(write_model(tmp_path / name, tensors))
    return found[0], found[1]


def test_a_tied_head_is_the_embeddings(models: tuple[Path, Path]) -> None:
    plain, tied = map(load_file, models)
    assert HEAD in plain
    assert HEAD not in tied
    found = rm.merge(rm.weighted_sum(*models, alpha=0.25))
    assert found.keys() == plain.keys()
    torch.testing.assert_close(found[HEAD], torch.lerp(plain[HEAD], tied[EMBEDDINGS], 0.25))
    torch.testing.assert_close(found[EMBEDDINGS], torch.lerp(plain[EMBEDDINGS], tied[EMBEDDINGS], 0.25))


def test_a_result_that_is_tied_takes_no_head(models: tuple[Path, Path]) -> None:
    plain, tied = models
    with pytest.raises(CheckError, match=r"lacks 1 key that plain\.safetensors has: lm_head\.weight"):
        rm.plan(rm.weighted_sum(tied, plain, alpha=0.25))
    assert HEAD not in rm.merge(rm.weighted_sum(tied, plain, alpha=0.25), missing="skip")
