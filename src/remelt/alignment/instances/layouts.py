"""Which rows of a file's tensors a module's are, where a pipeline's folders are joined to one file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from remelt.alignment.instances.instance import same
from remelt.archs.arch import find_arch
from remelt.archs.dialects import Spelling, from_original, to_original, usual_key
from remelt.core.pieces import Converted
from remelt.core.tensor_info import TensorInfo

Conversion = Callable[[Mapping[str, TensorInfo]], Mapping[str, Converted]]
_DIFFUSERS = Spelling("diffusers")


def of_pipeline(name: str, module: nn.Module) -> tuple[Conversion, Conversion]:
    """To the original layout of an arch and back, for a module whose parts have the names of a pipeline's folders."""
    arch = find_arch(name)
    own = _own(module)
    names = {usual_key(arch, _DIFFUSERS, _in_folder(one)): one for one in own}

    def originals(infos: Mapping[str, TensorInfo]) -> dict[str, Converted]:
        found = to_original(arch, _DIFFUSERS, {_in_folder(one): info for one, info in infos.items() if one in own})
        back = {_in_folder(one): one for one in own}
        return {
            key: replace(made, pieces=tuple(replace(piece, key=back[piece.key]) for piece in made.pieces))
            for key, made in found.tensors.items()
        }

    def parameters(infos: Mapping[str, TensorInfo]) -> dict[str, Converted]:
        return {names[key]: made for key, made in from_original(arch, _DIFFUSERS, infos).tensors.items()}

    return originals, parameters


def renamed(module: nn.Module, names: Mapping[str, str]) -> tuple[Conversion, Conversion]:
    """To the names of a file and back, for a module whose names differ in parts; of each the first is replaced."""
    outside = {}
    for name in _own(module):
        key = name
        for old, new in names.items():
            key = key.replace(old, new, 1)
        outside[name] = key
    inside = {key: name for name, key in outside.items()}

    def originals(infos: Mapping[str, TensorInfo]) -> dict[str, Converted]:
        return {outside[name]: made for name, made in same(infos).items() if name in outside}

    def parameters(infos: Mapping[str, TensorInfo]) -> dict[str, Converted]:
        return {inside[key]: made for key, made in same(infos).items()}

    return originals, parameters


def _own(module: nn.Module) -> list[str]:
    """The names of a module's tensors; of a tied one, which it has under several, the first."""
    parameters = [name for name, _ in module.named_parameters()]
    found = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return parameters + [name for name in module.state_dict() if name not in found]


def _in_folder(name: str) -> str:
    return name.replace(".", "/", 1)
