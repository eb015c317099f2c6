"""The blocks of any architecture, found in the key names alone: no table, no configuration."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

STACK_NAMES = frozenset({"blocks", "block", "layers", "layer", "h", "resblocks"})
"""Names by which the field calls a stack: children of such a container need not resemble each other."""

MAIN = "main"
"""The component of keys that belong to no part in particular."""

_MOST_NUMBERS = 16
"""Numeric segments of one key that are looked at: real models nest four deep."""

_MOST_PARTS = 64
"""More inferred components than this are no parts of a model but a flat list of tensors."""

_COMPARED = 32
"""Children of different make that are compared with each other, so that the search stays linear."""


def split_key(key: str) -> list[str]:
    """The segments of a key: split at dots, a leading ``folder/`` being one more segment in front.

    >>> split_key("unet/down_blocks.0.conv.weight")
    ['unet', 'down_blocks', '0', 'conv', 'weight']
    """
    folder, rest = split_folder(key)
    return rest.split(".") if folder is None else [folder, *rest.split(".")]


def split_folder(key: str) -> tuple[str | None, str]:
    """The leading ``folder/`` of a key without its slash, or None, and the rest of the key.

    >>> split_folder("vae/encoder.conv_in.bias"), split_folder("a.b/c")
    (('vae', 'encoder.conv_in.bias'), (None, 'a.b/c'))
    """
    folder, slash, rest = key.partition("/")
    return (folder, rest) if slash and folder and "." not in folder else (None, key)


def is_number(segment: str) -> bool:
    """Whether a segment counts children: ``0`` and ``17`` do, ``007``, ``1e5`` and absurdly long ones do not."""
    return segment.isdecimal() and segment.isascii() and len(segment) <= 6 and (segment[0] != "0" or segment == "0")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a key stands: its outermost stack (None outside any), the number written there, and its position in it.

    ``number`` is what the key says, ``index`` the position among the ``count`` numbers that are there. ``component`` is
    the inferred part of the model. ``inner`` is the rest of the key inside the block, or inside the component.
    ``module`` is, outside any stack, the path of the outermost module that holds no stack, or of the tensor itself.
    """

    stack: str | None
    number: int
    index: int
    count: int
    component: str
    inner: tuple[str, ...]
    module: str = ""

    @property
    def block(self) -> str | None:
        """The block's full name, such as ``model.layers.3``."""
        return None if self.stack is None else f"{self.stack}.{self.number}"


@dataclass(frozen=True)
class Structure:
    """The stacks of a set of keys, and each key's place.

    ``stacks`` maps the path of a stack to the numbers of its children, in order.
    """

    stacks: Mapping[str, tuple[int, ...]]
    places: Mapping[str, Place] = field(repr=False)

    @property
    def blocks(self) -> Iterator[str]:
        """Every block's full name, stack by stack in the order of the keys."""
        return (f"{stack}.{number}" for stack, numbers in self.stacks.items() for number in numbers)


@dataclass(slots=True)
class _Path:
    """A key on its way: the positions of its numeric segments, and the one under consideration."""

    key: str
    segments: list[str]
    numbers: list[int]
    folder: bool
    at: int = 0
    stack: str | None = None

    def join(self, end: int) -> str:
        """The first ``end`` segments as they are written."""
        if self.folder:
            return f"{self.segments[0]}/{'.'.join(self.segments[1:end])}" if end > 1 else self.segments[0]
        return ".".join(self.segments[:end])


def infer(keys: Iterable[str]) -> Structure:
    """The structure of a set of keys: which numbered containers are stacks, and each key's place.

    Every numeric segment makes the path before it a container and itself a child. A container is a stack if it has at
    least two children, at least half of them nested deeper than one level, and at least two of them share half of their
    suffixes (numbers masked) with a sibling; the last is not asked of containers that bear one of the field's names for
    a stack (`STACK_NAMES`). A key's block is its outermost stack and the number there. Time is linear in the length of
    the keys.

    >>> found = infer(["emb.weight", "layers.0.mlp.weight", "layers.1.mlp.weight"])
    >>> found.places["layers.1.mlp.weight"].block, found.places["emb.weight"].block
    ('layers.1', None)
    """
    paths = [_path(key) for key in dict.fromkeys(keys)]
    stacks: dict[str, tuple[int, ...]] = {}
    waiting = [path for path in paths if path.numbers]
    while waiting:
        containers: dict[str, list[_Path]] = {}
        for path in waiting:
            containers.setdefault(path.join(path.numbers[path.at]), []).append(path)
        waiting = []
        for container, members in containers.items():
            numbers = _stack_numbers(container, members)
            if numbers is not None:
                stacks[container] = numbers
                for path in members:
                    path.stack = container
                continue
            for path in members:
                path.at += 1
                if path.at < len(path.numbers):
                    waiting.append(path)
    ordered = {path.stack: stacks[path.stack] for path in paths if path.stack is not None}
    return Structure(MappingProxyType(ordered), MappingProxyType(_places(paths, ordered)))


def _path(key: str) -> _Path:
    segments = split_key(key)
    folder = split_folder(key)[0] is not None
    # A number in front (of the folder, if any) has no container to be a child of.
    numbers = [at for at, segment in enumerate(segments) if at > folder and is_number(segment)]
    return _Path(key, segments, numbers[:_MOST_NUMBERS], folder)


def _stack_numbers(container: str, members: list[_Path]) -> tuple[int, ...] | None:
    """The numbers of a container's children if it is a stack, else None."""
    children: dict[str, set[tuple[str, ...]]] = {}
    for path in members:
        at = path.numbers[path.at]
        suffix = tuple("#" if is_number(segment) else segment for segment in path.segments[at + 1 :])
        children.setdefault(path.segments[at], set()).add(suffix)
    if len(children) < 2:
        return None
    nested = sum(any(len(suffix) > 1 for suffix in suffixes) for suffixes in children.values())
    if 2 * nested < len(children):
        return None
    name = container.rpartition(".")[2].rpartition("/")[2]
    if name not in STACK_NAMES and not _resemble(children.values()):
        return None
    return tuple(sorted(int(number) for number in children))


def _resemble(children: Iterable[set[tuple[str, ...]]]) -> bool:
    """Whether at least two of the children share half of their suffixes with a sibling."""
    seen: set[frozenset[tuple[str, ...]]] = set()
    for child in children:
        frozen = frozenset(child)
        if frozen in seen:
            return True
        seen.add(frozen)
    different = sorted(seen, key=len)[-_COMPARED:]
    alike: set[int] = set()
    for first, a in enumerate(different):
        for second in range(first):
            b = different[second]
            common = 2 * len(a & b)
            if common >= len(a):
                alike.add(first)
            if common >= len(b):
                alike.add(second)
            if len(alike) >= 2:
                return True
    return False


def _places(paths: list[_Path], stacks: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    positions = {stack: {number: index for index, number in enumerate(numbers)} for stack, numbers in stacks.items()}
    parts = _parts(paths)
    around = _around(paths)
    places = {}
    for path, (component, depth) in zip(paths, parts, strict=True):
        component = component or MAIN
        if path.stack is None:
            inner = tuple(path.segments[depth:])
            places[path.key] = Place(None, 0, 0, 0, component, inner, path.join(_module_end(path, around)))
            continue
        at = path.numbers[path.at]
        number = int(path.segments[at])
        position = positions[path.stack]
        inner = tuple(path.segments[at + 1 :])
        places[path.key] = Place(path.stack, number, position[number], len(position), component, inner)
    return places


def _around(paths: Iterable[_Path]) -> set[tuple[str, ...]]:
    """The beginnings of keys that lead to a stack, that of the stack itself included."""
    ends = {tuple(path.segments[: path.numbers[path.at]]) for path in paths if path.stack is not None}
    return {stack[:end] for stack in ends for end in range(1, len(stack) + 1)}


def _module_end(path: _Path, around: Container[tuple[str, ...]]) -> int:
    """How many segments of a key outside any stack name the outermost module that holds no stack."""
    ends = range(1 + path.folder, len(path.segments))
    return next((end for end in ends if tuple(path.segments[:end]) not in around), len(path.segments))


def _parts(paths: list[_Path]) -> list[tuple[str, int]]:
    """Each key's inferred component, and how many of its segments are no part of the layer's name.

    A folder is a component. Otherwise the stacks say where a model falls into parts: at the first segment by which the
    paths to its stacks differ. A key on no such path belongs to the part around it, or is a part by its first segment.
    """
    owners = list(
        dict.fromkeys(
            tuple(path.segments[: path.numbers[path.at] - 1])
            for path in paths
            if path.stack is not None and not path.folder
        )
    )
    shared = _common_start(owners)
    depth = len(shared)
    branches = {owner[depth] for owner in owners if len(owner) > depth}
    rooted = any(not owner for owner in owners)
    firsts = {path.segments[0] for path in paths if not path.folder and len(path.segments) > 1}
    flat = rooted or len(firsts) > _MOST_PARTS
    parts = []
    for path in paths:
        segments = path.segments
        if path.folder:
            parts.append((segments[0], 1))
        elif len(segments) > depth + 1 and tuple(segments[:depth]) == shared and segments[depth] in branches:
            parts.append((".".join(segments[: depth + 1]), depth + 1))
        elif depth and len(segments) > depth and tuple(segments[:depth]) == shared:
            parts.append((".".join(shared), depth))
        elif flat or len(segments) < 2:
            parts.append((MAIN, 0))
        else:
            parts.append((segments[0], 0))
    return parts


def _common_start(paths: list[tuple[str, ...]]) -> tuple[str, ...]:
    if not paths:
        return ()
    low, high = min(paths), max(paths)
    length = next((at for at, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[:length]
