"""Writes the fuzzer's first corpus: small good inputs of every kind, from which it goes on."""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent
HEADERS = {
    "empty": {},
    "one": {"w": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}},
    "two": {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F16", "shape": [16], "data_offsets": [0, 32]},
        "b": {"dtype": "I64", "shape": [2, 2], "data_offsets": [32, 64]},
    },
    "odd": {
        "x/y": {"dtype": "BOOL", "shape": [], "data_offsets": [0, 1]},
        "é": {"dtype": "F8_E4M3", "shape": [0, 3], "data_offsets": [1, 1]},
        "z": {"dtype": "U8", "shape": [63], "data_offsets": [1, 64]},
    },
}
VALUES = ["0.3", "true", "fp16", "blocks(IN00=0.2) | 0.33", "[1, 2]", "'text'", "search(0, 1)", "-1e-3"]
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x10t"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"QK\0K\x04K\x04\x86K\x04K\x01\x86\x89}tR"
PICKLES = {
    "tensor": b"\x80\x02}X\x01\0\0\0w" + TENSOR + b"s.",
    "ordered": b"\x80\x02ccollections\nOrderedDict\n)RX\x01\0\0\0w" + TENSOR + b"s.",
    "nested": b"\x80\x02}X\x0a\0\0\0state_dict}X\x01\0\0\0w" + TENSOR + b"ss.",
    "global": b"\x80\x02}X\x01\0\0\0xcos\nsystem\nX\x02\0\0\0ls\x85Rs.",
}


def main() -> None:
    recipes = sorted((HERE.parent / "text" / "good").glob("*.mecha"))
    mistakes = sorted((HERE.parent / "mistakes").glob("*.mecha"))
    seeds = {
        "header": {name: json.dumps(entry).encode() for name, entry in HEADERS.items()},
        "archive": PICKLES,
        "recipe": {path.stem: path.read_bytes() for path in [*recipes, *mistakes]},
        "value": {str(number): text.encode() for number, text in enumerate(VALUES)},
    }
    for target, found in seeds.items():
        folder = HERE / "corpus" / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in found.items():
            (folder / name).write_bytes(data)


if __name__ == "__main__":
    main()
