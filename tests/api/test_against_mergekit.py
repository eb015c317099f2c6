"""Configurations of mergekit's own kinds are merged by both, on a tiny Llama in bfloat16, to the same tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from string import Template

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import remelt as rm
from remelt.text.mergekit_methods import METHODS

yaml = pytest.importorskip("yaml")
LAYERS = 4
FOLDER = Path(__file__).parent / "mergekit"
CONFIGURATIONS = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.yml"))}
"""With ``$a``, ``$b`` and ``$c`` for models of four layers."""
EXAMPLES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("examples/*.yml"))}
"""mergekit's example configurations of methods that remelt has, for models of 40 layers as they are."""
MAY_DIFFER = ("ties", "ties_without_mean", "ties_of_slices_with_settings_of_their_own", "bio-merge", "arcee_fusion")
"""Where single elements differ on purpose.

Of magnitudes that are equal in a type of 16 bits mergekit keeps some, by their order in a sort; remelt keeps all. It
keeps so many elements as the share says, rounded down; remelt, as the paper's authors do, those not less than the one
of that rank, which is one or two more of each model. Where deltas cancel out, as they do in a type of 16 bits, it takes
the positive ones; remelt takes none. Arcee fusion finds importance in the type that
is told, where it is mostly round-off, and what it gives stays float32.
"""

IN_FULL = {
    "breadcrumbs": 2,
    "breadcrumbs_with_ties": 2,
    "dare_of_all_elements_with_ties": 1,
    "della_of_all_elements": 1,
    "sce": 2,
}
"""Held in float32, with how many elements of a tensor may differ.

In types of 16 bits many deltas are equal, or cancel out, which both tools settle in ways of their own.
"""


def write_llamas(
    folder: Path, names: Iterable[str], layers: int, dtype: torch.dtype = torch.bfloat16, **sizes: int
) -> dict[str, Path]:
    """Tiny Llamas: the first one, and fine-tunes of it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, **sizes
    )
    found = {}
    base = None
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        made = transformers.LlamaForCausalLM(config)
        drawn = {key: value + 0.1 * torch.randn_like(value) for key, value in made.state_dict().items()}
        base = drawn if base is None else base
        if drawn is not base:
            drawn = {key: base[key] + 0.3 * value for key, value in drawn.items()}
        made.load_state_dict(drawn)
        made.to(dtype).save_pretrained(folder / name)
        found[name] = folder / name
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    return write_llamas(tmp_path_factory.mktemp("llamas"), "abc", LAYERS, **sizes)


@pytest.fixture(scope="module")
def deep_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As many layers as the examples' models have."""
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 20}
    return write_llamas(tmp_path_factory.mktemp("deep"), ("base", "a", "b", "c"), 40, **sizes)


@pytest.fixture(scope="module")
def precise_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same in float32, where hardly two magnitudes are equal."""
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 20}
    return write_llamas(tmp_path_factory.mktemp("precise"), ("base", "a", "b", "c"), 40, torch.float32, **sizes)


WORDS = {
    "a": [*"abcdefgh", "shared", "of a", "a and b"],
    "b": [*"hgfedcba", "a and b", "shared", "of b", "b and c"],
    "c": ["b and c", *"cdefgh", "shared", "of c"],
}


@pytest.fixture(scope="module")
def speaking_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of different tokens, in different orders, as many of them as there are rows."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("speaking")
    found = {}
    for name, words in WORDS.items():
        sizes = {"vocab_size": len(words) + 2, "hidden_size": 16, "intermediate_size": 20}
        found |= write_llamas(folder, [name], 2, **sizes)
        model = tokenizers.models.WordLevel({"<unk>": 0, **{word: row + 1 for row, word in enumerate(words)}}, "<unk>")
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), unk_token="<unk>")
        made.add_tokens([f"<added by {name}>"], special_tokens=True)
        made.save_pretrained(folder / name)
    return found


@pytest.mark.parametrize(
    ("source", "based"), [("union", True), ("base", True), ("model", True), ("model", False)], ids=str
)
def test_tokens_are_aligned(source: str, based: bool, speaking_models: dict[str, Path], tmp_path: Path) -> None:
    """Without a base, mergekit's order is that of a set, which is another one in every process."""
    text = """
        models:
          - {{model: {a}, parameters: {{weight: 0.5}}}}
          - {{model: {b}, parameters: {{weight: 0.3}}}}
          - {{model: {c}, parameters: {{weight: 0.2}}}}
        merge_method: linear
        dtype: bfloat16
    """.format(**speaking_models)
    text += f"\n        tokenizer_source: {speaking_models['c'] if source == 'model' else source}"
    text += f"\n        base_model: {speaking_models['b']}" if based else ""
    theirs, ours = merged_by_both(text, tmp_path)
    transformers = pytest.importorskip("transformers")
    tokens = {
        name: transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
        for name, folder in {"ours": tmp_path / "ours", "theirs": tmp_path / "theirs", **speaking_models}.items()
    }
    if source == "union":
        assert tokens["ours"].keys() == tokens["theirs"].keys() == {*tokens["a"], *tokens["b"], *tokens["c"]}
        assert tokens["b"].items() <= tokens["ours"].items()
    else:
        assert tokens["ours"] == tokens["theirs"] == tokens["c" if source == "model" else "b"]
    for key, value in ours.items():
        due = theirs[key]
        if key in ("lm_head.weight", "model.embed_tokens.weight"):  # the order of what is added is a set's, too
            order = sorted(tokens["ours"])
            value = value[[tokens["ours"][token] for token in order]]
            due = due[[tokens["theirs"][token] for token in order]]
        torch.testing.assert_close(value.double(), due.double(), rtol=2**-6, atol=2**-9)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert opened.config.vocab_size == len(tokens["ours"]) == len(opened.lm_head.weight)


CORPORA = {
    "a": ["the cat sat on the mat", "a cat and a hat", "the hat is flat"],
    "b": ["dogs bark at night", "a dog at the park", "the night is dark and the dog sat"],
}


@pytest.fixture(scope="module")
def models_of_pieces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose tokens are pieces of words, learnt of other texts, one with rows that no token has."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("pieces")
    found = {}
    for name, corpus in CORPORA.items():
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        special = ["<s>", f"<only {name}>"]
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=48, special_tokens=special, show_progress=False)
        made.train_from_iterator(corpus * 5, trainer)
        rows = made.get_vocab_size() + (5 if name == "a" else 0)
        found |= write_llamas(folder, [name], 2, vocab_size=rows, hidden_size=16, intermediate_size=20)
        transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>").save_pretrained(folder / name)
    return found


@pytest.mark.parametrize("multiple", [None, 16])
@pytest.mark.parametrize("source", ["union", "base"])
def test_tokens_that_are_pieces_of_words_are_aligned(
    source: str, multiple: int | None, models_of_pieces: dict[str, Path], tmp_path: Path
) -> None:
    """mergekit has no rows without a token but those that it pads with, and pads with the mean of what is aligned."""
    text = """
        models:
          - {{model: {a}, parameters: {{weight: 0.6}}}}
          - {{model: {b}, parameters: {{weight: 0.4}}}}
        merge_method: linear
        base_model: {a}
        dtype: bfloat16
    """.format(**models_of_pieces)
    text += f"\n        tokenizer: {{source: {source}"
    text += "}" if multiple is None else f", pad_to_multiple_of: {multiple}}}"
    theirs, ours = merged_by_both(text, tmp_path)
    transformers = pytest.importorskip("transformers")
    tokenizer, other = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("ours", "theirs"))
    tokens, due = tokenizer.get_vocab(), other.get_vocab()
    assert tokens.keys() == due.keys()
    for key, value in ours.items():
        if key in ("lm_head.weight", "model.embed_tokens.weight"):
            assert multiple is None or len(value) == len(theirs[key]) == -(-len(tokens) // multiple) * multiple
            rows = list(map(tokens.__getitem__, sorted(tokens))), list(map(due.__getitem__, sorted(due)))
            torch.testing.assert_close(value[rows[0]], theirs[key][rows[1]], rtol=2**-6, atol=2**-9)
        else:
            torch.testing.assert_close(value, theirs[key], rtol=2**-6, atol=2**-9)
    if source == "base":  # what the union makes of a text is another thing: there pieces are cut out of words
        assert [tokenizer(line).input_ids for line in CORPORA["b"]] == [other(line).input_ids for line in CORPORA["b"]]


def by_mergekit(text: str, out: Path) -> dict[str, Tensor]:
    pytest.importorskip("mergekit")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), options=MergeOptions(quiet=True))
    return merged(out)


def merged(folder: Path) -> dict[str, Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def merged_by_both(text: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    theirs = by_mergekit(text, folder / "theirs")
    (folder / "config.yml").write_text(text, encoding="utf-8")
    rm.merge(folder / "config.yml", folder / "ours", max_shard_size="1GB")
    ours = merged(folder / "ours")
    assert set(ours) == set(theirs)
    return theirs, ours


def check_both(text: str, folder: Path, allowed: float = 0.0, *, in_each: int = 0, as_told: bool = False) -> None:
    """Both merge the configuration to the same tensors, up to rounding.

    A share of all elements may differ, or some of each tensor; with ``as_told`` also the type, which is ours as told.
    """
    theirs, ours = merged_by_both(text, folder)
    odd = {}
    for key, value in ours.items():
        assert value.dtype is theirs[key].dtype or as_told
        rounding = {"rtol": 1e-5, "atol": 1e-6} if value.dtype is torch.float32 else {"rtol": 2**-6, "atol": 2**-9}
        odd[key] = int((~torch.isclose(value.double(), theirs[key].double(), **rounding)).sum())
    if in_each:
        assert max(odd.values()) <= in_each, odd
    else:
        assert sum(odd.values()) <= allowed * sum(value.numel() for value in ours.values()), odd


def test_all_its_methods_are_read() -> None:
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    assert sorted(METHODS) == sorted(method.spec.name for method in registry.registered_methods())


@pytest.mark.parametrize("name", sorted({*CONFIGURATIONS} - {*IN_FULL}))
def test_both_merge_the_same_tensors(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    check_both(Template(CONFIGURATIONS[name]).substitute(models), tmp_path, 0.02 if name in MAY_DIFFER else 0.0)


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_own_examples(name: str, deep_models: dict[str, Path], tmp_path: Path) -> None:
    text = Template(EXAMPLES[name]).substitute(deep_models)
    allowed = 0.1 if name == "arcee_fusion" else 0.02 if name in MAY_DIFFER else 0.0
    check_both(text, tmp_path, allowed, as_told=name == "arcee_fusion")


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_own_examples_in_full_precision(name: str, precise_models: dict[str, Path], tmp_path: Path) -> None:
    text = re.sub("b?float16", "float32", Template(EXAMPLES[name]).substitute(precise_models))
    check_both(text, tmp_path, in_each=6 if name in MAY_DIFFER else 0)


@pytest.mark.parametrize("name", IN_FULL)
def test_what_selects_in_full_precision(name: str, precise_models: dict[str, Path], tmp_path: Path) -> None:
    check_both(Template(CONFIGURATIONS[name]).substitute(precise_models), tmp_path, in_each=IN_FULL[name])
