"""Malformed and hostile archives: zip files put together byte by byte, around pickles written opcode by opcode.

Pickles that would run something make a file ``ran`` beside the archive, were they trusted.
"""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

Builder = Callable[[Path], None]


class Case(NamedTuple):
    """A file that must be refused: ``build`` writes it, and the refusal's message has ``law``."""

    name: str
    build: Builder
    law: str


class Member(NamedTuple):
    """A member of an archive; ``local`` and ``central`` override fields of its two headers."""

    name: bytes
    content: bytes
    local: dict[str, Any] = {}  # noqa: RUF012
    central: dict[str, Any] = {}  # noqa: RUF012


def archive(members: list[Member], tail: dict[str, int] | None = None) -> bytes:
    """A zip archive, however wrong its headers are made to be."""
    body, directory = bytearray(), bytearray()
    for name, content, local, central in members:
        size = len(content)
        own = {"magic": b"PK\3\4", "flags": 0, "method": 0, "packed": size, "size": size, "name": name, "extra": b""}
        at = {**own, "magic": b"PK\1\2", "offset": len(body)} | central
        own |= local
        lengths = [len(own["name"]), len(own["extra"])]
        fixed = [20, own["flags"], own["method"], 0, 33, zlib.crc32(content), own["packed"], own["size"], *lengths]
        body += struct.pack("<4s5H3I2H", own["magic"], *fixed) + own["name"] + own["extra"] + content
        lengths = [len(at["name"]), len(at["extra"])]
        fixed = [20, at["flags"], at["method"], 0, 33, zlib.crc32(content), at["packed"], at["size"], *lengths]
        directory += struct.pack("<4s6H3I5H2I", at["magic"], 20, *fixed, 0, 0, 0, 0, at["offset"])
        directory += at["name"] + at["extra"]
    end = {"count": len(members), "size": len(directory), "offset": len(body)} | (tail or {})
    last = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, end["count"], end["count"], end["size"], end["offset"], 0)
    return bytes(body + directory + last)


GOOD_PICKLE = (
    b"\x80\x02}q\x00X\x01\x00\x00\x00wq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((X\x07\x00\x00\x00storageq\x03"
)
GOOD_PICKLE += b"ctorch\nByteStorage\nq\x04X\x01\x00\x00\x000q\x05X\x03\x00\x00\x00cpuq\x06K\x04tq\x07QK\x00K\x04\x85"
GOOD_PICKLE += b"K\x01\x85\x89ccollections\nOrderedDict\n)RtRs."


def members_of(pickled: bytes = GOOD_PICKLE, storage: bytes = b"abcd") -> list[Member]:
    """What torch.save writes: the pickle, the order of bytes, and one storage of four bytes."""
    return [
        Member(b"m/data.pkl", pickled),
        Member(b"m/byteorder", b"little"),
        Member(b"m/data/0", storage),
        Member(b"m/version", b"3\n"),
    ]


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def tensor(
    *,
    kind: bytes = b"torch\nByteStorage",
    numel: bytes = b"K\x04",
    offset: bytes = b"K\x00",
    key: str = "0",
    shape: bytes = b"K\x04\x85",
    strides: bytes = b"K\x01\x85",
    rest: bytes = b"\x89}",
    maker: bytes = b"_rebuild_tensor_v2",
) -> bytes:
    """The opcodes of a tensor, each part of which may be wrong."""
    storage = b"(" + text("storage") + b"c" + kind + b"\n" + text(key) + text("cpu") + numel + b"tQ"
    return b"ctorch._utils\n" + maker + b"\n(" + storage + offset + shape + strides + rest + b"tR"


def _zip(name: str, members: list[Member], law: str, tail: dict[str, int] | None = None) -> Case:
    return _raw(name, archive(members, tail), law)


def _raw(name: str, content: bytes, law: str) -> Case:
    return Case(name, lambda path: path.write_bytes(content) and None, law)


def _pickle(name: str, opcodes: bytes, law: str) -> Case:
    return _raw(name, archive(members_of(opcodes)), law)


def _leaf(name: str, opcodes: bytes, law: str) -> Case:
    return _pickle(name, b"\x80\x02}" + text("w") + opcodes + b"s.", law)


def zip_cases() -> list[Case]:
    """Archives that are damaged, or say two things at once."""
    good = archive(members_of())
    first, *others = members_of()
    packed = zlib.compress(first.content, wbits=-15)
    method = {"method": 8, "packed": len(packed), "size": len(first.content)}
    inner = archive([Member(b"m/data/0", b"abcd")])
    outer = [
        first,
        Member(b"m/x", inner),
        Member(b"m/data/0", b"abcd", central={"offset": 30 + 10 + len(GOOD_PICKLE) + 33}),
    ]
    extra = {"extra": b"\1\0\4\0\0\0\0\0", "size": 2**32 - 1, "packed": 2**32 - 1}
    wide = {"extra": struct.pack("<2H2Q", 1, 16, 2**62, 2**62), "size": 2**32 - 1, "packed": 2**32 - 1}
    return [
        _zip("an archive without members", [], "it has 0 pickles, and one is due"),
        _zip("an archive without a pickle", others, "it has 0 pickles, and one is due"),
        _zip("an archive of two pickles", [first, Member(b"n/data.pkl", b"N.")], "it has 2 pickles, and one is due"),
        _zip("a pickle outside a folder", [Member(b"data.pkl", GOOD_PICKLE)], "it has 0 pickles"),
        _zip(
            "a program of TorchScript", [*members_of(), Member(b"m/constants.pkl", b").")], "is a TorchScript program"
        ),
        _zip(
            "a compressed member",
            [Member(b"m/data.pkl", packed, method, method), *others],
            "'m/data.pkl' is compressed",
        ),
        _zip("a member of two sizes", [first._replace(central={"packed": 3}), *others], "'m/data.pkl' is compressed"),
        _zip("an encrypted member", [first._replace(central={"flags": 1}), *others], "'m/data.pkl' is encrypted"),
        _zip("a strongly encrypted member", [first._replace(central={"flags": 65}), *others], "is encrypted"),
        _zip("a masked directory", [first._replace(central={"flags": 0x2000}), *others], "is encrypted"),
        _zip("a member twice", [*members_of(), first], "'m/data.pkl' is there twice"),
        _zip(
            "a member twice by a zero byte", [*members_of(), Member(b"m/data/0\0x", b"")], "'m/data/0' is there twice"
        ),
        _zip("a member inside another", outer, "'m/data/0' overlaps the one before it"),
        _zip(
            "two members of the same bytes", [first, Member(b"m/data.pkl2", b"", central={"offset": 0})], "another name"
        ),
        _zip(
            "a member beyond the file", [first._replace(central={"offset": 10**6}), *others], "begins outside the file"
        ),
        _zip(
            "a member in the directory", [first._replace(central={"offset": len(good) - 60}), *others], "begins outside"
        ),
        _zip("a member without a header", [first, others[0]._replace(local={"magic": b"XX\3\4"})], "no local header"),
        _zip(
            "a member of two names",
            [first._replace(local={"name": b"m/data.pkx"}), *others],
            "another name in its local",
        ),
        _zip(
            "a member too long",
            [*others, first._replace(central={"size": 9999, "packed": 9999})],
            "goes beyond the end",
        ),
        _zip("a member of 2**62 bytes", [*others, first._replace(central=wide)], "goes beyond the end"),
        _zip(
            "a long local name", [*others, first._replace(local={"name": b"m" * 60_000})], "another name in its local"
        ),
        _zip("a broken extra field", [first._replace(central=extra), *others], "is not a whole zip archive"),
        _zip("a name that is not UTF-8", [Member(b"\xff", b"", {}, {"flags": 0x800})], "is not a whole zip archive"),
        _zip("a directory of another length", members_of(), "is not a whole zip archive", {"size": 10**6}),
        _zip("a directory cut short", members_of(), "is not a whole zip archive", {"size": 50}),
        _zip("a directory of 4 GiB", members_of(), "is not a whole zip archive", {"size": 2**32 - 2}),
        _raw("an archive cut off", good[:200], "is not a whole zip archive"),
        _raw("an archive without its last byte", good[:-1], "is not a whole zip archive"),
        _raw("only the start of an archive", b"PK\3\4", "is not a whole zip archive"),
        _raw("only the end of an archive", b"PK\5\6" + b"\xff" * 18, "is not a whole zip archive"),
        _zip("a big-endian archive", [first, Member(b"m/byteorder", b"big"), others[1]], "on a big-endian machine"),
        _zip("an archive without its storage", members_of()[:2], "the storage '0' of 'w' is missing"),
        _zip(
            "a storage that is too short", members_of(storage=b"abc"), "'w' needs 4 bytes of its storage, which has 3"
        ),
        Case("a pickle of 300 MiB", _large_pickle, "its pickle has 314572800 bytes, and at most 268435456 are allowed"),
        Case("torch's format before zip", _legacy, "is a bare pickle, as torch.save wrote before version 1.6"),
        Case("torch's format before that", _tar, "it is a tar archive"),
        _raw("a bare pickle", b"\x80\x04N.", "is a bare pickle"),
    ]


def _large_pickle(path: Path) -> None:
    size = 300 * 2**20
    begin = 30 + len(b"m/data.pkl")
    whole = archive([Member(b"m/data.pkl", b"", *[{"size": size, "packed": size}] * 2)])
    with open(path, "wb") as file:
        file.write(whole[:begin])
        file.seek(begin + size)
        file.write(whole[begin:-6] + struct.pack("<IH", begin + size, 0))


def _legacy(path: Path) -> None:
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)


def _tar(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as file:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            info = tarfile.TarInfo(name)
            info.size = 4
            file.addfile(info, io.BytesIO(b"\x80\x02N."))


def hostile_cases() -> list[Case]:
    """Pickles that run something where they are trusted: here the names of what they would run is all there is.

    ``CODE`` stands for Python's text on the stack, ``SHELL`` for the shell's, quoted.
    """

    def running(name: str, opcodes: bytes, origin: str, law: str = "holds a whole {} object, not a state dict") -> Case:
        def build(path: Path) -> None:
            ran = path.parent / "ran"
            code, shell = text(f"import os; os.mkdir({str(ran)!r})"), f"'mkdir {ran}'".encode()
            path.write_bytes(archive(members_of(opcodes.replace(b"CODE", code).replace(b"SHELL", shell))))

        return Case(f"hostile: {name}", build, law.format(origin))

    item, run, key = b"cbuiltins\nexec\n", "builtins.exec", text("__setstate__")
    wrapped = b"ctorch._tensor\n_rebuild_from_type_v2\n(" + item + b"N"
    fetched = b"cbuiltins\ngetattr\ncbuiltins\n__import__\n" + text("os") + b"\x85R" + text("mkdir") + b"\x86R"
    thread = b"cthreading\nThread\n)\x81}" + text("_target") + item + b"s" + text("_args") + b"CODE\x85sb."
    typed = b"(" + text("storage") + item + text("0") + b"CODEK\x04tQ."
    number = "copyreg.extension 240"
    return [
        running("REDUCE", b"\x80\x02" + item + b"CODE\x85R.", run),
        running("REDUCE of eval", b"\x80\x02cbuiltins\neval\nCODE\x85R.", "builtins.eval"),
        running("REDUCE in Python 2's names", b"\x80\x02c__builtin__\nexec\nCODE\x85R.", "__builtin__.exec"),
        running("os.system", b"cos\nsystem\n(SSHELL\ntR.", "os.system"),
        running("getattr of an import", b"\x80\x02" + fetched + b"CODE\x85R.", "builtins.getattr"),
        running("STACK_GLOBAL", b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93CODE\x85R.", run),
        running("STACK_GLOBAL by attribute", b"\x80\x04\x8c\x02os\x8c\x09path.exec\x93CODE\x85R.", "os.path.exec"),
        running("INST", b"(SSHELL\nios\nsystem\n.", "os.system"),
        running("OBJ", b"\x80\x02(" + item + b"CODEo.", run),
        running("NEWOBJ", b"\x80\x02" + item + b"CODE\x85\x81.", run),
        running("NEWOBJ_EX", b"\x80\x04" + item + b"CODE\x85}\x92.", run),
        running("BUILD", b"\x80\x02" + thread, "threading.Thread"),
        running("BUILD on a mapping", b"\x80\x02}}" + key + item + b"sbCODEb.", "", "holds no tensors"),
        running("BUILD in two parts", b"\x80\x02}CODE}" + key + item + b"s\x86b.", "", "holds no tensors"),
        running("EXT1", b"\x80\x02\x82\xf0CODE\x85R.", number),
        running("EXT2", b"\x80\x02\x83\xf0\0CODE\x85R.", number),
        running("EXT4", b"\x80\x02\x84\xf0\0\0\0CODE\x85R.", number),
        running("APPEND to an object", b"\x80\x02" + item + b"CODE\x85RNa.", run),
        running("a persistent id", b"\x80\x02" + item + b"CODE\x85RQ.", "", "something that is no storage"),
        running("a textual persistent id", b"Pstorage\n.", "", "uses PERSID, which no checkpoint needs"),
        running("a storage's type", b"\x80\x02" + typed, run, "tensors of type {}"),
        running("a tensor's type", b"\x80\x02" + wrapped + b"CODE\x85NtR.", run),
        running("a leaf of a list", b"\x80\x02]" + item + b"CODE\x85Ra.", "", "holds list, not a state dict"),
        running("a key of a mapping", b"\x80\x02}" + item + b"CODE\x85RNs.", "", "holds no tensors"),
        running("an argument", b"\x80\x02cbuiltins\nmap\n" + item + b"CODE\x85\x86R.", "builtins.map"),
        running("an out-of-band buffer", b"\x80\x05\x97.", "", "uses NEXT_BUFFER, which no checkpoint needs"),
    ]


def pickle_cases() -> list[Case]:
    """Pickles that are malformed, or made to exhaust whoever reads them."""
    impossible = "a tensor of impossible shape or strides"
    malformed, short, absent = "pickle is malformed", "an operation finds too little", "what it never stored"
    nested = b")" + b"\x85" * 100_000
    typed = b"ctorch._tensor\n_rebuild_from_type_v2\n"
    deep_types = b"\x80\x02" + typed + b"q\0" + b"(h\0N" * 50_000 + b")" + b"Nt" * 50_000 + b"R."
    collisions = (
        b"\x80\x02}("
        + b"".join(b"\x8a\x0c" + (n * (2**61 - 1)).to_bytes(12, "little") + b"N" for n in range(1, 60_000))
        + b"u."
    )
    shared = b"\x80\x02}q\0" + b"".join(b"}(K\x01h%cK\x02h%cuq%c" % (n, n, n + 1) for n in range(60)) + b"."
    table = b"}(" + b"".join(b"M" + n.to_bytes(2, "little") + b"N" for n in range(10_000)) + b"uq\0"
    copies = b"\x80\x02" + table + b"cbuiltins\ndict\nq\1" + b"h\1h\0\x85R" * 20_000 + b"."
    listed = b"\x80\x02]q\0(" + b"N" * 10_000 + b"ecbuiltins\nlist\nq\1" + b"h\1h\0\x85R" * 20_000 + b"."
    return [
        _pickle("an empty pickle", b"", malformed),
        _pickle("a pickle without an end", b"\x80\x02}", malformed),
        _pickle("a pickle of nothing", b".", short),
        _pickle("a pickle cut off in a text", b"\x80\x02X\xff\0\0\0abc", malformed),
        _pickle("an unknown opcode", b"\x80\x02\xff.", malformed),
        _pickle("a REDUCE of nothing", b"\x80\x02R.", short),
        _pickle("a mark that is not there", b"\x80\x02t.", short),
        _pickle("a memo that is not there", b"\x80\x02h\x05.", absent),
        _pickle("a memo of an impossible number", b"Np99999999999999999999\n.", "under an impossible number"),
        _pickle("a memo of a negative number", b"Np-1\n.", "under an impossible number"),
        _pickle("a key without a value", b"\x80\x02}(K\x01u.", "a mapping with a key and no value"),
        _pickle("a key that is a list", b"\x80\x02}]Ns.", "holds no tensors"),
        _pickle("a LONG of 2 GiB", b"\x80\x02\x8b\xff\xff\xff\x7f\x01.", malformed),
        _pickle("a LONG of a negative length", b"\x80\x02\x8b\xff\xff\xff\xff\x01.", malformed),
        _pickle("a LONG of a million digits", b"L" + b"9" * 1_000_000 + b"L\n.", malformed),
        _pickle("an INT of a million digits", b"I" + b"9" * 1_000_000 + b"\n.", malformed),
        _pickle("a text of 2**62 bytes", b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"a.", malformed),
        _pickle("bytes of 2**62 bytes", b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"a.", malformed),
        _pickle("a bytearray of 2**63 bytes", b"\x80\x05\x96" + (2**63).to_bytes(8, "little") + b"a.", malformed),
        _pickle("a frame of 2**64 bytes", b"\x80\x04\x95" + b"\xff" * 8 + b"N.", "holds NoneType"),
        _pickle("a text that is not ASCII", b"S'\xff'\n.", malformed),
        _pickle("a float that is none", b"Fabc\n.", malformed),
        _pickle("lists in lists, 100000 deep", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "holds list"),
        _pickle("tuples in tuples, 100000 deep", b"\x80\x02" + nested + b".", "holds tuple"),
        _pickle(
            "mappings 20000 deep",
            b"\x80\x02" + b"}K\1" * 20_000 + b"N" + b"s" * 20_000 + b".",
            "nest more than 64 deep",
        ),
        _pickle("a mapping in itself", b"\x80\x02}q\0K\1h\0s.", "nest more than 64 deep"),
        _pickle("a nest in itself", b"\x80\x02}q\0" + text("model") + b"h\0s.", "nest more than 64 deep"),
        _pickle("2**60 mappings by sharing", shared, "hold more than 1000000 values"),
        _pickle("a mapping copied over and over", copies, "copies its containers over and over"),
        _pickle("a list copied over and over", listed, "copies its containers over and over"),
        _pickle("numbers of the same hash", collisions, "holds no tensors"),
        _pickle("types within types", deep_types, short),
        _pickle("a global of a long name", b"\x80\x02c" + b"a" * 100_000 + b"\nb\n)R.", "a name of 100000 characters"),
        _pickle(
            "a global named by a tuple", b"\x80\x04" + nested + b"\x8c\x01a\x93.", "a global whose name is no text"
        ),
        _pickle("a million objects", b"\x80\x02" + b"N" * 1_000_000, malformed),
        _pickle("a bare tensor", b"\x80\x02" + tensor() + b".", "holds PickledTensor"),
        _leaf("a storage of another name", tensor(key="1"), "the storage '1' of 'w' is missing"),
        _leaf(
            "a storage outside its folder", tensor(key="../byteorder"), "the storage '../byteorder' of 'w' is missing"
        ),
        _leaf("a storage that says too much", tensor(numel=b"K\x05"), "needs 5 bytes of its storage, which has 4"),
        _leaf("a storage of wider elements", tensor(kind=b"torch\nDoubleStorage"), "needs 32 bytes of its storage"),
        _leaf("a storage of -1 elements", tensor(numel=b"J\xff\xff\xff\xff"), "a storage that cannot be"),
        _leaf("a storage of True elements", tensor(numel=b"\x88"), "a storage that cannot be"),
        _leaf("a storage of complex numbers", tensor(kind=b"torch\nComplexFloatStorage"), "torch.ComplexFloatStorage"),
        _leaf(
            "a storage of quantised numbers", tensor(kind=b"torch\nQInt8Storage"), "tensors of type torch.QInt8Storage"
        ),
        _leaf("a storage without a type", tensor(kind=b"torch.storage\nUntypedStorage"), "without a typed storage"),
        _leaf("a tensor beyond its storage", tensor(shape=b"K\x05\x85"), "needs 5 bytes of its storage"),
        _leaf("an offset beyond the storage", tensor(offset=b"K\x01"), "needs 5 bytes of its storage"),
        _leaf("a tensor of a negative offset", tensor(offset=b"J\xff\xff\xff\xff"), impossible),
        _leaf("a tensor of a negative length", tensor(shape=b"J\xff\xff\xff\xff\x85"), impossible),
        _leaf("a negative stride", tensor(strides=b"J\xff\xff\xff\xff\x85"), impossible),
        _leaf("a tensor of a fractional length", tensor(shape=b"G\x40\x10\0\0\0\0\0\0\x85"), impossible),
        _leaf("a tensor of a length that is true", tensor(shape=b"\x88\x85"), impossible),
        _leaf("a length of 2**63", tensor(shape=b"\x8a\x09\0\0\0\0\0\0\0\x80\0\x85"), impossible),
        _leaf("a tensor of a shape that is a number", tensor(shape=b"K\x04"), impossible),
        _leaf("more strides than axes", tensor(strides=b"K\x01K\x01\x86"), impossible),
        _leaf("forty axes", tensor(shape=b"(" + b"K\1" * 40 + b"t", strides=b"(" + b"K\1" * 40 + b"t"), "of 40 axes"),
        _leaf(
            "a stride past the file", tensor(strides=b"\x8a\x08" + b"\xff" * 7 + b"\x7f\x85"), "bytes of its storage"
        ),
        _leaf(
            "one byte repeated 2**60 times",
            tensor(shape=b"\x8a\x08\0\0\0\0\0\0\0\x10\x85", strides=b"K\0\x85"),
            "repeats the 4 bytes of its storage into 1152921504606846976",
        ),
        _leaf(
            "a shape of 2**124", tensor(shape=b"\x8a\x08\0\0\0\0\0\0\0\x40q\1h\1\x86", strides=b"K\0K\0\x86"), "repeats"
        ),
        _leaf("a tensor of too few arguments", b"ctorch._utils\n_rebuild_tensor_v2\n)R", short),
        _leaf(
            "a tensor of a lazy view", tensor(rest=b"\x89}}" + text("neg") + b"\x88s"), "a lazily computed view ('neg')"
        ),
        _leaf(
            "a tensor of complex type",
            tensor(maker=b"_rebuild_tensor_v3", rest=b"\x89}ctorch\ncomplex64\n"),
            "a tensor of type torch.complex64",
        ),
        _leaf("a tensor of a nested type", tensor(maker=b"_rebuild_tensor_v3", rest=b"\x89}" + nested), malformed),
        _leaf(
            "a tensor on another device", b"ctorch._utils\n_rebuild_xla_tensor\n)R", "_rebuild_xla_tensor, which is not"
        ),
        _pickle(
            "a name that is half a character", b"\x80\x02}" + text("\ud800") + tensor() + b"s.", "is not Unicode text"
        ),
        _pickle(
            "a name of 5000 letters", b"\x80\x02}" + text("n" * 5000) + tensor() + b"s.", "name has 5000 characters"
        ),
        _pickle(
            "two tensors of one name", b"\x80\x02}(K\x01" + tensor() + text("1") + tensor() + b"u.", "are named '1'"
        ),
    ]


def archive_cases() -> list[Case]:
    """All of them."""
    return [*zip_cases(), *hostile_cases(), *pickle_cases()]
