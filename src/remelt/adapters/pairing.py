"""Which tensor of a model each module of an adapter changes, whatever layout of the model it was named by."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from remelt.adapters.names import AdapterModule, modules_of
from remelt.archs.arch import Arch
from remelt.archs.dialects import (
    ORIGINAL,
    Conversion,
    Spelling,
    dialects_of,
    from_original,
    is_of_folders,
    to_original,
)
from remelt.archs.maps import key_map
from remelt.core.dtype import DType
from remelt.core.pieces import Converted, Piece
from remelt.core.tensor_info import TensorInfo
from remelt.errors import AdapterError, FormatError

_WEIGHT, _BIAS = ".weight", ".bias"
_DENOISERS = frozenset(("unet", "transformer"))
_COMFY = (
    *((re.compile(r"(mod|modulation)_lin$"), r"\1_linear"), (re.compile(r"_mlp_0$"), "_mlp_fc1")),
    *((re.compile(r"_mlp_2$"), "_mlp_fc2"), (re.compile(r"_in_layer$"), "_mlp_0")),
    (re.compile(r"_out_layer$"), "_mlp_2"),
)
"""Ends of paths in HunyuanVideo as ComfyUI has them, and as its authors have them."""


@dataclass(frozen=True)
class Named:
    """A tensor of a model by its key in one dialect; ``folder`` is where diffusers has it, if that is known."""

    dialect: str
    key: str
    folder: str


@dataclass
class Layouts:
    """A model's tensors in the dialects that adapters are named by, and how those of the original one are made of each.

    They are the original one, and those of folders.
    """

    tensors: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    """By dialect and key."""
    originals: dict[str, dict[str, Converted]] = field(default_factory=dict)
    """By dialect, the tensors of the original one."""
    names: dict[str, list[Named]] = field(default_factory=dict)
    """By a module's path with underscores for dots, what it may mean: keys without what says weight or bias."""
    is_own: bool = False
    """Whether they are told by adapters alone."""

    @staticmethod
    def of(arch: Arch | None, tensors: Mapping[str, TensorInfo]) -> Layouts:
        """The layouts of a model whose tensors are spelled as in the original dialect, or of no known arch."""
        found = Layouts()
        found.tensors[ORIGINAL] = dict(tensors)
        found.originals[ORIGINAL] = {key: _itself(key, info) for key, info in tensors.items()}
        for path, named in _names_of_originals(arch, tensors):
            found.names.setdefault(path, []).append(named)
        if arch is not None:
            for dialect in dialects_of(arch):
                if is_of_folders(arch, dialect):
                    found._add(arch, dialect, tensors)
        return found

    @staticmethod
    def of_adapters() -> Layouts:
        """What is to be told by adapters alone: nothing yet."""
        return Layouts({ORIGINAL: {}}, {ORIGINAL: {}}, is_own=True)

    def learn(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Take from a LoRA what it tells of the model that it changes: its modules by their own names, and shapes.

        Raises `AdapterError` where it is of another kind: then only the model tells.
        """
        for module in modules_of(tensors).values():
            if self.find(module) is not None:
                continue
            up, down = (module.parts.get(part) for part in ("lora_up.weight", "lora_down.weight"))
            strange = set(module.options) - {"transposed"}
            if up is None or down is None or len(tensors[up].shape) < 2 or strange:
                raise AdapterError(
                    f"{module.name} does not tell the shape of the model's tensor", hint="name the model: base="
                )
            key = f"{module.name}{_WEIGHT}"
            shape = (tensors[up].shape[0], *tensors[down].shape[1:])
            info = TensorInfo(DType.F32, shape[::-1] if module.options else shape)
            self.tensors[ORIGINAL][key] = info
            self.originals[ORIGINAL][key] = _itself(key, info)
            for path, places in module.paths:
                named = Named(ORIGINAL, module.name, places[0] if places else "")
                self.names.setdefault(path, []).append(named)

    def _add(self, arch: Arch, dialect: str, tensors: Mapping[str, TensorInfo]) -> None:
        spelling = Spelling(dialect)
        try:
            there = {key: one.info for key, one in from_original(arch, spelling, tensors).tensors.items()}
            back: Conversion = to_original(arch, spelling, there)
        except FormatError:  # a part of a model, or one that is no model of its arch: its own names are left
            return
        self.tensors[dialect] = there
        self.originals[dialect] = {key: one for key, one in back.tensors.items() if key in tensors}
        for key in there:
            folder, _, rest = key.rpartition("/")
            self.names.setdefault(_path(rest), []).append(Named(dialect, _module(key), folder))
        for other, key in _other_names(arch, dialect, tensors):
            if key in there:
                folder = key.rpartition("/")[0]
                self.names.setdefault(_path(other), []).append(Named(dialect, _module(key), folder))

    def find(self, module: AdapterModule) -> Named | None:
        """What a module's name means: in the component that it names, else in any that has it.

        Raises `AdapterError` where it says of no component, and several have it.
        """
        for paths in (module.paths, [(_of_authors(path), places) for path, places in module.paths]):
            for path, places in paths:
                found = self.names.get(path, [])
                for place in places:
                    there = [one for one in found if one.folder == place]
                    if there:
                        return there[0]
                anywhere = [one for one in found if not places or not one.folder]
                folders = list(dict.fromkeys(one.folder for one in anywhere if one.folder))
                if len(folders) > 1 and not _DENOISERS.intersection(folders):
                    raise AdapterError(
                        f"{module.name} may be of {' or '.join(folders)}", hint=f"put {folders[0]}. before its names"
                    )
                anywhere.sort(key=lambda one: one.folder not in _DENOISERS)
                if anywhere:
                    return anywhere[0]
        return None

    def key_of(self, named: Named, target: str) -> str | None:
        """The key of a module's weight or bias, if it has one; of a parameter that is no module, its own."""
        key = named.key + (_BIAS if target == "bias" else _WEIGHT)
        if key in self.tensors[named.dialect]:
            return key
        return named.key if target == "weight" and named.key in self.tensors[named.dialect] else None

    def nearest(self, module: AdapterModule) -> str | None:
        """A module of the model whose name is like that of one that it lacks."""
        path = module.paths[-1][0]
        found = difflib.get_close_matches(path, self.names, 1, 0.6)
        return self.names[found[0]][0].key if found else None


def _names_of_originals(arch: Arch | None, tensors: Iterable[str]) -> Iterator[tuple[str, Named]]:
    """Every path by which a key may be meant: all of it, and what follows the prefix of its component."""
    components = [] if arch is None else arch.components
    for key in tensors:
        spelled = [key] if arch is None else list(dict.fromkeys((key, arch.usual(key), *arch.others(key))))
        found = [
            (component, prefix)
            for component in components
            if (prefix := next((one for one in component.prefixes if key.startswith(one)), None)) is not None
        ]
        folders = [one.folder for one in found[0][0].dialects] if found else []
        named = Named(ORIGINAL, _module(key), folders[0] if folders else "")
        for name in spelled:
            if found and name.startswith(found[0][1]):
                yield _path(name[len(found[0][1]) :]), named
            yield _path(name), named


def _other_names(arch: Arch, dialect: str, tensors: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names that are read for tensors of a dialect beside those that are written, and the latter's keys."""
    for component in arch.components:
        for part in component.dialects:
            if part.dialect != dialect:
                continue
            known, start = key_map(part.key_map, part.below), part.prefix or f"{part.folder}/"
            for key in tensors:
                rest = arch.usual(key)
                prefix = next((one for one in component.prefixes if rest.startswith(one)), None)
                for written, *others in known.spellings(rest[len(prefix) :]) if prefix is not None else ():
                    for other in others:
                        yield other, start + written


def _of_authors(path: str) -> str:
    for pattern, name in _COMFY:
        found, count = pattern.subn(name, path)
        if count:
            return found
    return path


def _module(key: str) -> str:
    return key.removesuffix(_WEIGHT).removesuffix(_BIAS)


def _path(key: str) -> str:
    return _module(key).replace(".", "_")


def _itself(key: str, info: TensorInfo) -> Converted:
    return Converted(info, (Piece(key, 0, info.shape[0] if info.shape else 1),))
