"""Headers that one pattern reads are read as the reader of JSON reads them, and no header passes that JSON refuses."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remelt.core.dtype import DType
from remelt.errors import FormatError
from remelt.formats import safetensors
from remelt.formats.plain_header import read_plain
from remelt.formats.safetensors import SafetensorsCheckpoint, parse_header

NAMES = st.one_of(st.sampled_from(["a", "b.weight", "", "ä", "x}y", 'q"', "back\\slash", "__metadata__"]), st.text())
METADATA = st.none() | st.dictionaries(st.sampled_from(["format", "n", 'q"', "\n", "\\u"]), st.text(), max_size=3)


def written(names: list[str], shapes: list[list[int]], metadata: dict[str, str] | None) -> tuple[str, int]:
    """A header as the safetensors library writes it, and the size of the data."""
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, shape in zip(names, shapes, strict=True):
        size = 2
        for dim in shape:
            size *= dim
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    return json.dumps(entries, ensure_ascii=False, separators=(",", ":")), offset


def outcome(text: str, size: int) -> object:
    """What comes of a header: all that it says, or the message of its error."""
    data = text.encode("utf-8", "surrogatepass")
    try:
        found = parse_header(data, 8 + len(data) + size, "x")
    except FormatError as error:
        return str(error)
    return list(found.tensors.items()), found.offsets, found.metadata


def outcome_by_json(text: str, size: int) -> object:
    with mock.patch.object(safetensors, "read_plain", return_value=None):
        return outcome(text, size)


@given(
    names=st.lists(NAMES, unique=True, min_size=1, max_size=4),
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=4, max_size=4),
    metadata=METADATA,
    padding=st.integers(0, 3),
)
def test_headers_of_the_library_say_the_same_to_both_readers(
    names: list[str], shapes: list[list[int]], metadata: dict[str, str] | None, padding: int
) -> None:
    text, size = written(names, shapes[: len(names)], metadata)
    text += " " * padding
    assert outcome(text, size) == outcome_by_json(text, size)


@given(
    edits=st.lists(
        st.tuples(st.integers(0, 200), st.integers(0, 12), st.sampled_from([*'{}[]",:\\ 0129', '"a":', "true", "\n"])),
        min_size=1,
        max_size=3,
    ),
    metadata=METADATA,
)
def test_damaged_headers_are_refused_as_by_the_reader_of_json(
    edits: list[tuple[int, int, str]], metadata: dict[str, str] | None
) -> None:
    text, size = written(["a", "b"], [[2], [1, 3]], metadata)
    for place, cut, put in edits:
        text = text[:place] + put + text[place + cut :]
    assert outcome(text, size) == outcome_by_json(text, size)


ONE = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'


@pytest.mark.parametrize(
    "text",
    [
        f"{{{ONE},}}",
        f"{{{ONE},{ONE}}}",
        f"{{{ONE}{ONE.replace('a', 'b').replace('[0,1]', '[1,2]')}}}",
        f"{{,{ONE}}}",
        f"{{{ONE}}}}}",
        f"{{{ONE}}} x",
        "{" + ONE.replace("[1]", "[01]") + "}",
        "{" + ONE.replace("[1]", "[1,]") + "}",
        "{" + ONE.replace("[1]", f"[{','.join('1' * 65)}]") + "}",
        "{" + ONE.replace("[1]", "[9223372036854775808,0]").replace("[0,1]", "[0,0]") + "}",
        "{" + ONE.replace("U8", "C64") + "}",
        "{" + ONE.replace('"a"', '"__metadata__"') + "}",
        f'{{{ONE},"__metadata__":{{"a":"b"}}}}',
        f'{{"__metadata__":{{"a":"b","a":"c"}},{ONE}}}',
        f'{{"__metadata__":{{"a":"\\ud800"}},{ONE}}}',
        f'{{"__metadata__":{{"a":1}},{ONE}}}',
        f'{{"__metadata__":{{}},{ONE}}}',
    ],
)
def test_what_only_resembles_a_plain_header_is_left_to_the_reader_of_json(text: str) -> None:
    assert read_plain(text) is None
    assert outcome(text, 1) == outcome_by_json(text, 1)


def test_files_with_the_same_tensors_share_their_descriptions_while_they_are_open(tmp_path: Path) -> None:
    for name, metadata in (("a", None), ("b", {"format": "pt"})):
        text, size = written(["w", "v"], [[2], [2]], metadata)
        data = text.encode()
        (tmp_path / name).write_bytes(len(data).to_bytes(8, "little") + data + bytes([1, 2, 3, 4, 5, 6, 7, 8])[:size])
    with SafetensorsCheckpoint(tmp_path / "a") as a, SafetensorsCheckpoint(tmp_path / "b") as b:
        assert a.tensors is b.tensors
        assert a.tensors["w"] is a.tensors["v"]
        assert a.tensors["w"].dtype is DType.F16
        assert bytes(a.read("v")) == bytes(b.read("v")) == bytes([5, 6, 7, 8])
        assert dict(b.metadata) == {"format": "pt"}
