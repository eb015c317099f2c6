"""Tokenizers of united vocabularies: what they make of texts, by the library that reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import remelt as rm

tokenizers = pytest.importorskip("tokenizers")

FIRST = ["the cat sat on the mat", "a cat and a hat", "the hat is flat"] * 5
THIRD = ["ships sail over seas", "seas are salty", "sailors swim"] * 5
SECOND = ["dogs bark at night", "a dog at the park", "the night is dark and the dog sat"] * 5


def trained(kind: str, corpus: Sequence[str], size: int, special: Sequence[str] = ()) -> Any:
    """A small tokenizer of a kind, as models have them."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if kind == "BPE":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<s>"], show_progress=False)
    elif kind == "WordPiece":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.Lowercase()
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=["[UNK]"], show_progress=False)
    elif kind == "Unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
        )
    else:
        made = Tokenizer(models.WordLevel(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=["<unk>"], show_progress=False)
    made.train_from_iterator(corpus, trainer)
    made.add_special_tokens(list(special))
    return made


def write(folder: Path, tokenizer: Any, seed: int) -> torch.Tensor:
    """A model that is an embedding alone, with that tokenizer."""
    folder.mkdir()
    rows = torch.randn(tokenizer.get_vocab_size(), 4, generator=torch.Generator().manual_seed(seed))
    save_file({"model.embed_tokens.weight": rows}, folder / "model.safetensors")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(rows)}))
    return rows


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "Unigram", "WordLevel"])
def test_a_united_tokenizer_knows_all_tokens_by_their_rows(kind: str, tmp_path: Path) -> None:
    first = trained(kind, FIRST, 45, ["<only first>"])
    second = trained(kind, SECOND, 60, ["<only second>"])
    third = trained(kind, THIRD, 60, ["<only third>"])
    made_of = [
        (one.get_vocab(), write(tmp_path / name, one, seed))
        for seed, (name, one) in enumerate(zip("abc", (first, second, third), strict=True))
    ]
    rm.merge(rm.align_vocabulary(rm.n_average("a", "b", "c")), tmp_path / "out", models_dirs=[tmp_path])
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    vocabulary = made.get_vocab()
    assert first.get_vocab().items() <= vocabulary.items()
    assert vocabulary.keys() == {token for own, _ in made_of for token in own}
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    rows = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert len(rows) == len(vocabulary)
    for token, row in vocabulary.items():
        having = [values[own[token]] for own, values in made_of if token in own]
        if len(having) == 1:
            torch.testing.assert_close(rows[row], having[0])
    for text in (*FIRST[:3], *SECOND[:3], *THIRD[:3], "the cat<only second>sat<only first>"):
        found = made.encode(text)
        assert found.ids == [vocabulary[token] for token in found.tokens]
        assert ("<only second>" in found.tokens) is ("<only second>" in text)
    for text in SECOND[:3]:  # its tokens can be made, not only named
        assert set(made.encode(text).tokens) - first.get_vocab().keys(), text
    if kind != "WordLevel":
        for text in (*FIRST[:3], *SECOND[:3]):
            assert made.decode(made.encode(text).ids).strip() == text


def test_letters_of_other_tokens_are_not_cut_out_of_words(tmp_path: Path) -> None:
    """As tokens that are looked for as they stand, pieces of words would be found in every word."""
    write(tmp_path / "a", trained("WordPiece", FIRST, 60), 1)
    write(tmp_path / "b", trained("WordPiece", ["at a flat"], 60), 2)
    before = tokenizers.Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    assert "at" not in before.get_vocab()
    rm.merge(rm.align_vocabulary(rm.weighted_sum("a", "b")), tmp_path / "out", models_dirs=[tmp_path])
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert made.encode("the cat at").tokens == [*before.encode("the cat").tokens, "at"]


def test_merges_of_a_word_may_be_texts_or_pairs(tmp_path: Path) -> None:
    write(tmp_path / "a", trained("BPE", FIRST, 45), 1)
    write(tmp_path / "b", trained("BPE", SECOND, 45), 2)
    file = tmp_path / "a" / "tokenizer.json"
    told = json.loads(file.read_text())
    told["model"]["merges"] = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in told["model"]["merges"]
    ]
    file.write_text(json.dumps(told))
    rm.merge(rm.align_vocabulary(rm.weighted_sum("a", "b")), tmp_path / "out", models_dirs=[tmp_path])
    tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    merges = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["merges"]
    assert {type(merge) for merge in merges} == {str}
    assert len(merges) > len(told["model"]["merges"])


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "GPT2Tokenizer"])
def test_a_united_tokenizer_is_the_same_to_classes_that_build_their_own(kind: str, tmp_path: Path) -> None:
    """From version 5 on, transformers' classes take the tokens and merges of the file, and make the rest anew."""
    transformers = pytest.importorskip("transformers", minversion="5")
    for seed, (name, corpus) in enumerate({"a": FIRST, "b": SECOND}.items()):
        made = trained("BPE", [*corpus, "".join(map(chr, range(33, 127)))], 150)
        write(tmp_path / name, made, seed)
        told = json.loads(made.to_str())["model"]
        own = getattr(transformers, kind)(vocab=told["vocab"], merges=[tuple(merge) for merge in told["merges"]])
        own.add_tokens([f"<only {name}>"], special_tokens=True)
        own.save_pretrained(tmp_path / name)
        rows = torch.randn(len(own), 4)
        save_file({"model.embed_tokens.weight": rows}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"vocab_size": len(rows)}))
    rm.merge(rm.align_vocabulary(rm.weighted_sum("a", "b")), tmp_path / "out", models_dirs=[tmp_path])
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(found).__name__ == kind
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    text = "the dog<only b> sat at the park<only a> on a mat"
    assert found.tokenize(text) == plain.encode(text).tokens
    assert found(text).input_ids == plain.encode(text).ids
    assert {"<only a>", "<only b>"} <= set(found.tokenize(text))
    assert found.get_vocab() == plain.get_vocab()
    assert len(found) == len(load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"])
