"""Models of different tokens merged token by token: rows, tokenizers, configurations, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import remelt as rm
from remelt.api.opening import Opened, open_models
from remelt.api.token_views import TokenAlignedCheckpoint
from remelt.check.bound import bind_recipes
from remelt.errors import CheckError, FormatError, RecipeError
from remelt.methods import METHODS
from remelt.recipe.node import Node
from remelt.recipe.signature import name_all_models
from remelt.recipe.vocabulary import expand_vocabularies

WIDTH = 3


def write(
    folder: Path,
    words: Sequence[str],
    seed: int,
    *,
    rows: int | None = None,
    added: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """A model whose embedding has a row for each word, and its tokenizer."""
    drawn = torch.Generator().manual_seed(seed)
    size = len(words) + len(added) if rows is None else rows
    tensors = {
        "model.embed_tokens.weight": torch.randn(size, WIDTH, generator=drawn),
        **{f"model.layers.{n}.mlp.up.weight": torch.randn(4, WIDTH, generator=drawn) for n in range(3)},
        **{f"model.layers.{n}.attn.q.weight": torch.randn(4, WIDTH, generator=drawn) for n in range(3)},
        "lm_head.weight": torch.randn(size, WIDTH, generator=drawn),
        "lm_head.bias": torch.randn(size, generator=drawn),
    }
    tensors = {key: value.to(dtype) for key, value in tensors.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    told = {
        "added_tokens": [{"id": len(words) + n, "content": word, "special": True} for n, word in enumerate(added)],
        "model": {"type": "WordLevel", "vocab": {word: row for row, word in enumerate(words)}, "unk_token": words[0]},
    }
    (folder / "tokenizer.json").write_text(json.dumps(told), encoding="utf-8")
    config = {"vocab_size": size, "eos_token_id": words.index("end") if "end" in words else None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tensors


def merged(folder: Path, recipe: Any, **options: Any) -> dict[str, Tensor]:
    rm.merge(recipe, folder / "out", models_dirs=[folder], max_shard_size="1GB", overwrite=True, **options)
    return load_file(folder / "out" / "model.safetensors")


def opened_views(folder: Path, recipe: Node) -> Opened:
    aligned = expand_vocabularies(name_all_models(rm.align_vocabulary(recipe), METHODS))
    return open_models(bind_recipes([aligned], METHODS, [str(folder)]), [folder])


def told(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_rows_follow_their_tokens(tmp_path: Path) -> None:
    a = write(tmp_path / "a", ["x", "y", "z", "end"], 1)
    b = write(tmp_path / "b", ["end", "z", "w", "y", "v"], 2)
    found = merged(tmp_path, rm.align_vocabulary(rm.weighted_sum("a", "b", alpha=0.25)))
    # x y z end | w v
    rows_a = {"x": 0, "y": 1, "z": 2, "end": 3}
    rows_b = {"end": 0, "z": 1, "w": 2, "y": 3, "v": 4}
    for key in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
        for row, token in enumerate(["x", "y", "z", "end", "w", "v"]):
            one = a[key][rows_a[token]] if token in rows_a else b[key][rows_b[token]]
            other = b[key][rows_b[token]] if token in rows_b else a[key][rows_a[token]]
            torch.testing.assert_close(found[key][row], torch.lerp(one, other, 0.25))
    key = "model.layers.1.mlp.up.weight"
    assert torch.equal(found[key], torch.lerp(a[key], b[key], 0.25))
    assert told(tmp_path / "out", "config.json") == {"vocab_size": 6, "eos_token_id": 3}
    tokenizer = told(tmp_path / "out", "tokenizer.json")
    assert tokenizer["added_tokens"] == []
    assert tokenizer["model"]["vocab"] == {"x": 0, "y": 1, "z": 2, "end": 3, "w": 4, "v": 5}


def test_a_tokens_row_is_the_bases_or_the_mean_of_all(tmp_path: Path) -> None:
    a = write(tmp_path / "a", ["x", "y"], 1)
    b = write(tmp_path / "b", ["x", "w"], 2)
    c = write(tmp_path / "c", ["w", "x"], 3)
    key = "lm_head.weight"
    parts = [rm.model(name) for name in "abc"]
    mixed = 0.5 * parts[0] + 0.25 * parts[1] + 0.25 * parts[2]
    found = merged(tmp_path, rm.align_vocabulary(mixed))[key]
    mean = (b[key][1] + c[key][0]) / 2
    torch.testing.assert_close(found[2], 0.5 * mean + 0.25 * b[key][1] + 0.25 * c[key][0])
    found = merged(tmp_path, rm.align_vocabulary(mixed, base="c"))[key]  # w x | y
    torch.testing.assert_close(found[0], 0.5 * c[key][0] + 0.25 * b[key][1] + 0.25 * c[key][0])
    torch.testing.assert_close(found[2], a[key][1])
    found = merged(tmp_path, rm.align_vocabulary(mixed, order=rm.model("b")))[key]
    assert found.shape == (2, WIDTH)
    torch.testing.assert_close(found[0], 0.5 * a[key][0] + 0.25 * b[key][0] + 0.25 * c[key][1])


@pytest.mark.parametrize("policy", ["theirs", "mean", "own_mean", "zero"])
def test_what_a_model_has_for_a_token_that_it_lacks(policy: str, tmp_path: Path) -> None:
    words = {"a": ["x", "y"], "b": ["x", "w"], "c": ["w", "x"]}
    heads = {name: write(tmp_path / name, words[name], seed)["lm_head.weight"] for seed, name in enumerate(words)}
    shares = {"a": 0.5, "b": 0.25, "c": 0.25}
    mixed = 0.5 * rm.model("a") + 0.25 * rm.model("b") + 0.25 * rm.model("c")
    aligned = rm.align_vocabulary(mixed, base="b", order=rm.model("a"), new_rows=policy)
    found = merged(tmp_path, aligned)["lm_head.weight"]
    assert len(found) == 2
    found = merged(tmp_path, rm.align_vocabulary(mixed, base="b", new_rows=policy))["lm_head.weight"]
    for row, token in enumerate(["x", "w", "y"]):
        having = {name: heads[name][words[name].index(token)] for name in words if token in words[name]}
        lacking = {
            "theirs": having.get("b", next(iter(having.values()))),
            "mean": torch.stack(list(having.values())).mean(0),
            "zero": torch.zeros(WIDTH),
        }
        due = torch.zeros(WIDTH)
        for name, share in shares.items():
            new = heads[name].mean(0) if policy == "own_mean" else lacking[policy]
            due += share * having.get(name, new)
        torch.testing.assert_close(found[row], due)


def test_the_mean_of_many_rows_is_of_those_that_have_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remelt.api.token_views._AT_ONCE", 8 * WIDTH * 4)
    a = write(tmp_path / "a", [f"a{number}" for number in range(9)] + ["x"], 1, rows=13)
    write(tmp_path / "b", ["x", "y"], 2)
    recipe = rm.align_vocabulary(rm.weighted_sum("a", "b", alpha=0.0), new_rows="own_mean")
    head = merged(tmp_path, recipe)["lm_head.weight"]
    torch.testing.assert_close(head[10], a["lm_head.weight"][:10].double().mean(0).float())


@pytest.mark.parametrize(("multiple", "rows"), [(None, 7), (1, 4), (4, 4), (3, 6), (64, 64)])
def test_rows_are_padded_to_a_multiple(multiple: int | None, rows: int, tmp_path: Path) -> None:
    a = write(tmp_path / "a", ["x", "y"], 1, rows=7)["lm_head.weight"]
    b = write(tmp_path / "b", ["y", "w", "v"], 2)["lm_head.weight"]
    recipe = rm.align_vocabulary(rm.weighted_sum("a", "b", alpha=0.5), pad_to_multiple_of=multiple)
    found = merged(tmp_path, recipe)["lm_head.weight"]  # x y w v
    assert found.shape == (rows, WIDTH)
    assert told(tmp_path / "out", "config.json")["vocab_size"] == rows
    torch.testing.assert_close(found[:4], torch.stack((a[0], (a[1] + b[0]) / 2, b[1], b[2])))
    torch.testing.assert_close(found[4:7], a[4:rows])
    mean = (a[:2].mean(0) + b.mean(0)) / 2
    torch.testing.assert_close(found[7:], mean.expand(max(rows - 7, 0), WIDTH))


def test_models_of_one_vocabulary_are_read_as_they_lie(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        write(tmp_path / name, ["x", "y"], seed, rows=5)
    with opened_views(tmp_path, rm.weighted_sum("a", "b")) as opened:
        assert not opened.problems
        for given in opened.inputs.values():
            assert isinstance(given.checkpoint, TokenAlignedCheckpoint)
            assert given.checkpoint.is_view("lm_head.weight")
            assert given.checkpoint.tensors["lm_head.weight"].shape == (5, WIDTH)


def test_rows_without_a_token_stay(tmp_path: Path) -> None:
    a = write(tmp_path / "a", ["x", "y"], 1, rows=5)
    b = write(tmp_path / "b", ["y", "w", "x"], 2, rows=4)
    found = merged(tmp_path, rm.align_vocabulary(rm.weighted_sum("a", "b", alpha=0.5)))["lm_head.weight"]
    assert found.shape == (5, WIDTH)
    torch.testing.assert_close(found[2], b["lm_head.weight"][1])
    torch.testing.assert_close(found[3:], a["lm_head.weight"][3:])


def test_a_token_beyond_the_rows_has_none(tmp_path: Path) -> None:
    write(tmp_path / "a", ["x", "y", "ghost"], 1, rows=2)
    b = write(tmp_path / "b", ["y", "x"], 2)
    found = merged(tmp_path, rm.align_vocabulary(rm.weighted_sum("a", "b"), order="base"))["lm_head.weight"]
    assert torch.equal(found[2], torch.zeros(WIDTH))
    assert b["lm_head.weight"].shape == (2, WIDTH)


def test_element_types_may_differ(tmp_path: Path) -> None:
    a = write(tmp_path / "a", ["x"], 1, dtype=torch.bfloat16)
    b = write(tmp_path / "b", ["y", "x"], 2)
    found = merged(tmp_path, rm.align_vocabulary(rm.weighted_sum("a", "b", alpha=0.5)))["lm_head.weight"]
    assert found.dtype is torch.bfloat16
    due = torch.stack((torch.lerp(a["lm_head.weight"][0].float(), b["lm_head.weight"][1], 0.5), b["lm_head.weight"][0]))
    torch.testing.assert_close(found, due.bfloat16(), rtol=2**-7, atol=2**-8)


def test_added_tokens_keep_their_settings_and_stale_files_go(tmp_path: Path) -> None:
    write(tmp_path / "a", ["x"], 1)
    write(tmp_path / "b", ["x"], 2, added=["<b>"])
    (tmp_path / "a" / "vocab.json").write_text("{}")
    (tmp_path / "a" / "tokenizer_config.json").write_text('{"of": "a"}')
    (tmp_path / "b" / "tokenizer_config.json").write_text('{"of": "b"}')
    merged(tmp_path, rm.align_vocabulary(rm.weighted_sum("a", "b")))
    assert told(tmp_path / "out", "tokenizer.json")["added_tokens"][0]["special"] is True
    assert told(tmp_path / "out", "tokenizer_config.json") == {"of": "a"}
    assert not (tmp_path / "out" / "vocab.json").exists()
    merged(tmp_path, rm.align_vocabulary(rm.weighted_sum("a", "b"), base="b", order="base"))
    assert told(tmp_path / "out", "tokenizer_config.json") == {"of": "b"}


def test_special_tokens_keep_their_meaning(tmp_path: Path) -> None:
    """Ids of the tokenizer's own model count; others are moved with their tokens, or go with them."""
    write(tmp_path / "a", ["x", "end", "image", "bad", "y"], 1)
    write(tmp_path / "b", ["y", "image", "stop", "x"], 2)
    config = {
        "vocab_size": 5,
        "eos_token_id": 1,
        "image_token_id": 2,
        "text_config": {"vocab_size": 5, "eos_token_id": 4, "bos_token_id": 1},
        "quantity": 1,
    }
    generation = {"eos_token_id": [0, 1], "suppress_tokens": [-1, 3, 4], "max_length": 3}
    for name, content in (("config", config), ("generation_config", generation)):
        (tmp_path / "a" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "b" / "config.json").write_text('{"vocab_size": 4, "eos_token_id": 2}', encoding="utf-8")
    recipe = rm.weighted_sum("a", "b")
    merged(tmp_path, rm.align_vocabulary(recipe, order=rm.model("b")))
    assert told(tmp_path / "out", "config.json") == {
        "vocab_size": 4,
        "eos_token_id": 2,
        "image_token_id": 1,
        "text_config": {"vocab_size": 4, "eos_token_id": 0, "bos_token_id": None},
        "quantity": 1,
    }
    found = told(tmp_path / "out", "generation_config.json")
    assert found == {"eos_token_id": [3], "suppress_tokens": [-1, 0], "max_length": 3}
    merged(tmp_path, rm.align_vocabulary(recipe))  # the rows of the first stay
    text = {"vocab_size": 6, "eos_token_id": 4, "bos_token_id": 1}
    assert told(tmp_path / "out", "config.json") == {**config, "vocab_size": 6, "text_config": text}
    assert told(tmp_path / "out", "generation_config.json") == generation


def test_tied_models_may_have_other_tokens(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    a = write(tmp_path / "a", ["x", "y"], 1)
    tied = {key: value for key, value in write(tmp_path / "b", ["y", "z", "x"], 2).items() if "lm_head" not in key}
    write_model(tmp_path / "b" / "model", tied)
    a.pop("lm_head.bias")
    write_model(tmp_path / "a" / "model", a)
    for order in (("a", "b"), ("b", "a")):
        found = merged(tmp_path, rm.align_vocabulary(rm.weighted_sum(*order, alpha=0.5), base="a"))
        embeddings = tied["model.embed_tokens.weight"]
        torch.testing.assert_close(found["lm_head.weight"][:2], (a["lm_head.weight"] + embeddings[[2, 0]]) / 2)
        torch.testing.assert_close(found["lm_head.weight"][2], embeddings[1])
        assert told(tmp_path / "out", "config.json")["tie_word_embeddings"] is False


def test_layers_may_be_stacked_below(tmp_path: Path) -> None:
    a = write(tmp_path / "a", ["x", "y"], 1)
    b = write(tmp_path / "b", ["y", "z", "x"], 2)
    stack = rm.stack_layers(rm.layers("a", 0, 2), rm.layers("b", 1, 3))
    found = merged(tmp_path, rm.align_vocabulary(stack))
    head, embedding = found["lm_head.weight"], found["model.embed_tokens.weight"]
    assert torch.equal(head, b["lm_head.weight"][[2, 0, 1]])
    assert torch.equal(embedding, torch.cat((a["model.embed_tokens.weight"], b["model.embed_tokens.weight"][1:2])))
    assert torch.equal(found["model.layers.3.mlp.up.weight"], b["model.layers.2.mlp.up.weight"])


@settings(max_examples=40)
@given(
    words=st.lists(st.lists(st.sampled_from("abcdefghij"), unique=True, min_size=1), min_size=2, max_size=3),
    start=st.integers(0, 200),
    length=st.integers(0, 200),
    place=st.integers(0, 2),
)
def test_any_bytes_are_those_of_the_whole(
    words: list[list[str]], start: int, length: int, place: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    tensors = [write(folder / f"m{number}", one, number) for number, one in enumerate(words)]
    with opened_views(folder, rm.n_average(*(f"m{number}" for number in range(len(words))))) as opened:
        place %= len(words)
        view = opened.inputs[place].checkpoint
        tokens = list(dict.fromkeys(token for one in words for token in one))
        heads = [tensor["lm_head.weight"] for tensor in tensors]
        rows = []
        for token in tokens:
            having = {number: heads[number][one.index(token)] for number, one in enumerate(words) if token in one}
            mean = torch.stack([row.double() for row in having.values()]).mean(0).float()
            rows.append(having.get(place, mean))
        due = torch.stack(rows).numpy().tobytes()
        assert bytes(view.read("lm_head.weight")) == due
        stop = start + length
        assert bytes(view.read("lm_head.weight", min(start, len(due)), min(stop, len(due)))) == due[start:stop]


def broken(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content, encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "b has no tokenizer.json beside its weights"),
        ("tokenizer.json", "{", "tokenizer.json is no JSON"),
        ("tokenizer.json", "[]", "tokenizer.json is no JSON object"),
        ("tokenizer.json", "{}", "tokenizer.json tells no tokens"),
        ("tokenizer.json", '{"model": {"vocab": {"x": -1}}}', "gives a token a row that is no whole number"),
        (
            "tokenizer.json",
            '{"model": {"vocab": {}}, "added_tokens": ["x"]}',
            "added tokens without a content and an id",
        ),
        ("tokenizer.json", '{"model": {"vocab": {}}, "added_tokens": [{"content": ["x"], "id": 1}]}', "added tokens"),
        (
            "tokenizer.json",
            '{"model": {"vocab": [[["a"], 0.1]]}, "added_tokens": [{"content": "x", "id": "y"}]}',
            "gives a",
        ),
        ("config.json", '{"vocab_size": 77}', "b has no tensor with a row for each of its 77 tokens"),
    ],
)
def test_a_model_whose_tokens_are_not_known_is_refused(
    name: str, content: str | None, message: str, tmp_path: Path
) -> None:
    write(tmp_path / "a", ["x"], 1)
    write(tmp_path / "b", ["x"], 2)
    if content is None:
        (tmp_path / "b" / name).unlink()
    else:
        broken(tmp_path / "b", name, content)
    with pytest.raises((RecipeError, FormatError, CheckError)) as caught:
        merged(tmp_path, rm.align_vocabulary(rm.weighted_sum("a", "b")))
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def marked(mark: str) -> list[str]:
    return [f"{mark}{letter}" for letter in "abcdefgh"]


@pytest.mark.parametrize(
    ("words", "kinds", "order", "message"),
    [
        (
            (marked("\u0120"), marked("\u2581")),
            ("BPE", "BPE"),
            "union",
            "8 of 9 tokens of a begin with '\u0120', but 8 of 9 tokens of b begin with '\u2581'",
        ),
        ((["x"], ["y"]), ("BPE", "BPE"), "base", "a and b share no token"),
        (
            (["x"], ["y"]),
            ("BPE", "WordPiece"),
            "union",
            "a tokenizer of kind BPE, as a has, cannot make tokens such as 'y' of b, which is of kind WordPiece",
        ),
    ],
    ids=["marks", "nothing in common", "kinds"],
)
def test_vocabularies_that_cannot_be_aligned_are_refused(
    words: tuple[list[str], list[str]], kinds: tuple[str, str], order: str, message: str, tmp_path: Path
) -> None:
    common = [] if order == "base" else ["common"]
    for name, own, kind in zip("ab", words, kinds, strict=True):
        write(tmp_path / name, [*common, *own], 1)
        tokenizer = told(tmp_path / name, "tokenizer.json")
        tokenizer["model"]["type"] = kind
        broken(tmp_path / name, "tokenizer.json", json.dumps(tokenizer))
    with pytest.raises(RecipeError) as caught:
        merged(tmp_path, rm.align_vocabulary(rm.weighted_sum("a", "b"), order=order))
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_rows_of_another_width_are_refused(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    write(tmp_path / "a", ["x", "y"], 1)
    tensors = write(tmp_path / "b", ["y", "x"], 2)
    tensors["lm_head.weight"] = torch.zeros(2, 7)
    write_model(tmp_path / "b" / "model", tensors)
    with pytest.raises(RecipeError, match=r"lm_head.weight has rows of \[7\] in b, but of \[3\] in a"):
        merged(tmp_path, rm.align_vocabulary(rm.weighted_sum("a", "b")))


def test_other_numbers_of_tokens_are_told_with_the_remedy(tmp_path: Path) -> None:
    write(tmp_path / "a", ["x", "y"], 1)
    write(tmp_path / "b", ["y", "x", "z"], 2)
    with pytest.raises(CheckError) as caught:
        merged(tmp_path, rm.weighted_sum("a", "b"))
    told = str(caught.value)
    assert "model.embed_tokens.weight is [3, 3], but [2, 3] in a" in told
    assert "align_vocabulary(recipe) merges models of different tokens, row by row" in told
