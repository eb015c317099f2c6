"""Rules between two layouts of keys: what they pair, how they divide and join tensors, and what they refuse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remelt.archs.key_map import KeyMap, rules_of
from remelt.archs.maps import key_map
from remelt.core.dtype import DType
from remelt.core.pieces import Converted, Piece
from remelt.core.tensor_info import TensorInfo
from remelt.errors import FormatError, OptionError


def rules(*pairs: tuple[str, str | list[str]], **ranges: range) -> KeyMap:
    return KeyMap(rules_of("map.toml", pairs, {}, ranges))


def info(*shape: int, dtype: DType = DType.F16) -> TensorInfo:
    return TensorInfo(dtype, shape)


def test_the_longest_name_counts() -> None:
    found = rules(("out.{i}.", "up.{i}."), ("out.2.conv.", "upsampler."))
    assert found.names("out.2.weight") == ("up.2.weight",)
    assert found.names("out.2.conv.weight") == ("upsampler.weight",)
    assert found.original("upsampler.bias") == "out.2.conv.bias"
    assert found.names("in.2.weight") == ()
    assert found.original("down.2.weight") is None


def test_numbers_that_are_letters_with_ranges_are_computed() -> None:
    found = rules(("blocks.{3*b+l+1}.0.", "down.{b}.resnets.{l}."), ("up.{3-b}.", "above.{b}."), b=range(4), l=range(2))
    assert found.names("blocks.5.0.weight") == ("down.1.resnets.1.weight",)
    assert found.original("down.3.resnets.0.bias") == "blocks.10.0.bias"
    assert found.names("blocks.6.0.weight") == ()
    assert found.original("above.1.x") == "up.2.x"


def test_digits_inside_words_are_no_numbers() -> None:
    found = rules(("linear_{i}.x2.", "dense.{i}."), ("conv1.", "conv_in."))
    assert found.names("conv1.weight") == ("conv_in.weight",)
    assert found.names("conv2.weight") == ()


def test_of_several_names_the_first_is_written_and_all_are_read() -> None:
    found = rules(("q.", "kernel(to_q.|query.)"))
    assert found.names("q.weight") == ("to_q.weight",)
    assert found.spellings("q.weight") == (("to_q.weight", "query.weight"),)
    assert found.original("query.weight") == found.original("to_q.weight") == "q.weight"
    assert found.usual("query.weight") == "to_q.weight"


def test_parts_are_rows() -> None:
    found = rules(("qkv.", ["to_q.", "to_k.", "to_v."]))
    made, unknown = found.to_other({"qkv.weight": info(6, 5), "qkv.bias": info(6), "other": info(1)})
    assert made["to_k.weight"] == Converted(info(2, 5), (Piece("qkv.weight", 2, 4),))
    assert made["to_v.bias"] == Converted(info(2), (Piece("qkv.bias", 4, 6),))
    assert unknown == ["other"]
    back, _ = found.to_original({key: one.info for key, one in made.items()})
    assert back["qkv.weight"] == Converted(
        info(6, 5), (Piece("to_q.weight", 0, 2), Piece("to_k.weight", 0, 2), Piece("to_v.weight", 0, 2))
    )


def test_parts_may_be_as_many_rows_as_columns() -> None:
    found = rules(("linear1.", ["c:q.", "c:k.", "c:v.", "mlp."]))
    made, _ = found.to_other({"linear1.weight": info(3 * 4 + 9, 4), "linear1.bias": info(21)})
    assert made["v.bias"].pieces == (Piece("linear1.bias", 8, 12),)
    assert made["mlp.weight"] == Converted(info(9, 4), (Piece("linear1.weight", 12, 21),))


def test_kernels_halves_and_transposed_tensors() -> None:
    found = rules(
        ("q.", "kernel(to_q.)"),
        ("ada.", "halves(norm.)"),
        ("context.", "final(context_norm.)"),
        ("p", "transposed(p.w)"),
    )
    made, _ = found.to_other(
        {"q.weight": info(4, 3, 1, 1), "q.bias": info(4), "ada.weight": info(6, 2), "p": info(2, 5)}
    )
    assert made["to_q.weight"].info.shape == (4, 3)
    assert made["to_q.bias"].info.shape == (4,)
    assert made["norm.weight"].pieces == (Piece("ada.weight", 3, 6), Piece("ada.weight", 0, 3))
    assert (made["p.w"].info.shape, made["p.w"].transposed) == ((5, 2), True)
    back, _ = found.to_original({key: one.info for key, one in made.items()})
    assert {key: one.info.shape for key, one in back.items()} == {
        "q.weight": (4, 3, 1, 1), "q.bias": (4,), "ada.weight": (6, 2), "p": (2, 5)
    }  # fmt: skip
    of_two, _ = found.to_other({"context.weight": info(8, 4), "context.bias": info(8)})
    assert [len(one.pieces) for one in of_two.values()] == [2, 2]
    of_six, _ = found.to_other({"context.weight": info(24, 4), "context.bias": info(24)})
    assert [len(one.pieces) for one in of_six.values()] == [1, 1]


@pytest.mark.parametrize(("operation", "ones"), [("kernel", (1, 1)), ("volume", (1, 1, 1))])
def test_a_kernel_has_as_many_dimensions_as_the_rule_says(operation: str, ones: tuple[int, ...]) -> None:
    found = rules(("q.", f"{operation}(to_q.)"))
    made, _ = found.to_other({"q.weight": info(4, 3, *ones), "q.bias": info(4)})
    assert [one.info.shape for one in made.values()] == [(4, 3), (4,)]
    back, _ = found.to_original({key: one.info for key, one in made.items()})
    assert [one.info.shape for one in back.values()] == [(4, 3, *ones), (4,)]
    wider, _ = found.to_other({"q.weight": info(4, 3, *(3 for _ in ones))})
    assert wider["to_q.weight"].info.shape == (4, 3, *(3 for _ in ones))


def test_a_map_may_be_read_below_a_name() -> None:
    whole, below = key_map("open_clip"), key_map("open_clip", "model.")
    assert [below.names(key) for key in ("ln_final.bias", "transformer.resblocks.3.ln_1.weight")] == [
        whole.names(f"model.{key}") for key in ("ln_final.bias", "transformer.resblocks.3.ln_1.weight")
    ]
    assert below.original("text_model.final_layer_norm.bias") == "ln_final.bias"
    assert below.names("model.ln_final.bias") == ()
    assert key_map("open_clip", "elsewhere.").rules == ()


def test_a_linear_map_that_is_one_in_both_stays_as_it_is() -> None:
    made, _ = rules(("q.", "kernel(to_q.)")).to_other({"q.weight": info(4, 3)})
    assert made["to_q.weight"].info.shape == (4, 3)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"q.weight": info(2, 3), "k.weight": info(2, 3)}, "qkv.weight consists of 3 tensors, but v.weight is missing"),
        (
            {"q.weight": info(2, 3), "k.weight": info(2, 4), "v.weight": info(2, 3)},
            r"qkv.weight cannot be put together: k.weight is F16 \[2, 4\], of another width than q.weight",
        ),
        (
            {"q.weight": info(2, 3), "k.weight": info(2, 3), "v.weight": info(2, 3, dtype=DType.F32)},
            r"cannot be put together: v.weight is F32 \[2, 3\], of another type than q.weight",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(tensors: dict[str, TensorInfo], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        rules(("qkv.", ["q.", "k.", "v."])).to_original(tensors)


@pytest.mark.parametrize(
    ("parts", "shape"), [(["q.", "k.", "v."], (7, 2)), (["c:q.", "c:k.", "c:v."], (7, 2)), (["c:q.", "v."], (3, 4))]
)
def test_rows_that_cannot_be_divided_are_refused(parts: list[str], shape: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match=rf"qkv.weight is \[{shape[0]}, {shape[1]}\], which cannot be divided"):
        rules(("qkv.", parts)).to_other({"qkv.weight": info(*shape)})


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("a.<resnet>", "b."), "'a.<resnet>' and 'b.' end in the same <name>"),
        (("a.{2x}.", "b.{2x}."), r"\{2x\} is no sum of numbers and letters"),
        (("a.", "rotated(b.)"), "rotated is none of kernel, volume, halves, final, transposed"),
    ],
)
def test_wrong_rules_are_told(pair: tuple[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=f"map.toml: .*{message}"):
        rules(pair)


def test_a_map_that_is_not_there_is_told() -> None:
    with pytest.raises(OptionError, match="there is no key map named 'unet_sd9'"):
        key_map("unet_sd9")


@given(st.lists(st.sampled_from(["blocks", "7", "0", "attn", "qkv", "weight", "x1", ""]), max_size=6).map(".".join))
def test_any_key_is_known_or_not(key: str) -> None:
    found = rules(("blocks.{i}.attn.qkv.", ["blocks.{i}.q.", "blocks.{i}.k."]), ("x1", "y"))
    names = found.names(key)
    assert bool(names) == (key == "x1" or key.startswith(("blocks.0.attn.qkv.", "blocks.7.attn.qkv.")))
    assert all(found.original(name) == key for name in names)
