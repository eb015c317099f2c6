"""Looking at files, archs, methods and the machine: what `inspect`, `info` and `doctor` tell."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remelt.adapters.names import is_adapter
from remelt.api.options import PathLike
from remelt.api.recipes import RECIPE_KEY
from remelt.api.resources import available_memory, usable_cores
from remelt.archs.detect import detect
from remelt.archs.facts import layout
from remelt.core.tensor_info import total_bytes
from remelt.formats.checkpoint import Checkpoint, open_checkpoint
from remelt.formats.locate import config_path, locate_model, models_folders
from remelt.formats.quantised import dequantised
from remelt.recipe.method import Method
from remelt.version import __version__

EXTRAS = {
    "demo": "sklearn",
    "draw": "networkx",
    "gguf": "gguf",
    "mergekit": "yaml",
    "router": "transformers",
    "test": "pytest",
    "check": "ruff",
    "docs": "mkdocs",
}


@dataclass(frozen=True)
class Inspection:
    """What a file's header tells, and, after a deep look, which tensors hold NaN or infinities."""

    path: str
    format: str
    arch: str | None
    evidence: str
    note: str | None
    tensors: int
    size: int
    dtypes: Mapping[str, int]
    components: Mapping[str, int]
    blocks: int
    metadata: Mapping[str, str]
    recipe: str | None
    nonfinite: tuple[str, ...] | None
    adapter: Mapping[str, int] | None = None
    """For an adapter, how many modules there are of each kind and rank; components and blocks are a model's."""
    quantised: Mapping[str, int] = field(default_factory=dict)
    """How many tensors are quantised, by how; components and blocks are those of what they stand for."""


def inspect(path: PathLike, *, deep: bool = False, models_dirs: tuple[PathLike, ...] = ()) -> Inspection:
    """What a checkpoint is, from its header alone; ``deep`` reads it all and lists tensors with NaN or infinities.

    Raises `FormatError` where the file is malformed, `ModelNameError` where there is none.
    """
    folders = models_folders([Path(folder) for folder in models_dirs])
    with open_checkpoint(locate_model(str(path), [Path.cwd(), *folders])) as checkpoint:
        model = checkpoint if is_adapter(checkpoint.tensors) else dequantised(checkpoint)
        found = detect(model.tensors)
        described = layout(tuple(model.tensors), found.arch, found.spelling)
        quantised: dict[str, int] = {}
        for one in model.quantised.values():
            quantised[one.described] = quantised.get(one.described, 0) + 1
        dtypes: dict[str, int] = {}
        for info in checkpoint.tensors.values():
            dtypes[info.dtype.name] = dtypes.get(info.dtype.name, 0) + 1
        return Inspection(
            path=str(checkpoint.path),
            format=checkpoint.format,
            arch=None if found.arch is None else found.arch.name,
            evidence=found.evidence,
            note=found.problem or found.note,
            tensors=len(checkpoint.tensors),
            size=total_bytes(checkpoint.tensors.values()),
            dtypes=dtypes,
            components={name: len(keys) for name, keys in described.components.items()},
            blocks=len(described.blocks),
            metadata={key: value for key, value in checkpoint.metadata.items() if key != RECIPE_KEY},
            recipe=checkpoint.metadata.get(RECIPE_KEY),
            nonfinite=find_nonfinite(checkpoint) if deep else None,
            adapter=_kinds(checkpoint) if is_adapter(checkpoint.tensors) else None,
            quantised=quantised,
        )


def _kinds(checkpoint: Checkpoint) -> dict[str, int]:
    """The modules of an adapter, counted by what they are."""
    from remelt.adapters.kinds import kind_of
    from remelt.adapters.names import modules_of

    found: dict[str, int] = {}
    for module in modules_of(checkpoint.tensors).values():
        infos = {part: checkpoint.tensors[key] for part, key in module.parts.items()}
        kinds = " and ".join(use.kind.name for use in kind_of(infos, module.name))
        down = infos.get("lora_down.weight")
        rank = f" of rank {down.shape[0]}" if down is not None and down.shape else ""
        what = f"{kinds}{rank}{', with magnitudes (DoRA)' if 'dora_scale' in infos else ''}"
        found[what] = found.get(what, 0) + 1
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def find_nonfinite(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The tensors with NaN or infinities, in order; all of them are read."""
    from remelt.engine.finite import is_finite
    from remelt.tensors import tensor_over

    step = 2**22
    spoiled = []
    for key, info in checkpoint.tensors.items():
        size = info.nbytes if info.dtype.is_float else 0
        for begin in range(0, size, step):
            if not is_finite(tensor_over(checkpoint.read(key, begin, min(begin + step, size)), info.dtype)):
                spoiled.append(key)
                break
    return tuple(spoiled)


def describe_methods() -> list[dict[str, str]]:
    """The merge methods, each with its signature and first line."""
    from remelt.methods import METHODS

    return [
        {"name": name, "signature": method.signature, "summary": method.documentation.partition("\n")[0]}
        for name, method in METHODS.items()
    ]


def describe_method(method: Method[..., Any]) -> dict[str, Any]:
    """A method in full: signature, spaces of arguments and result, cut, documentation."""
    return {
        "name": method.name,
        "signature": method.signature,
        "arguments": {parameter.name: parameter.kind for parameter in method.parameters},
        "returns": method.returns,
        "cut": method.declaration.cut,
        "reductions": method.declaration.passes,
        "documentation": method.documentation,
    }


def examine_machine(models_dirs: tuple[PathLike, ...] = ()) -> dict[str, Any]:
    """What a person who asks for help should tell: versions, devices, memory, models folders, extras."""
    import torch

    from remelt.engine import native

    devices = ["cpu"]
    devices += [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    folders = models_folders([Path(folder) for folder in models_dirs])
    return {
        "remelt": __version__,
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native": native.capability(),
        "devices": devices,
        "cores": usable_cores(),
        "memory_available": available_memory(),
        "libraries": {name: importlib.metadata.version(name) for name in ("numpy", "safetensors", "click", "rich")},
        "extras": {name: importlib.util.find_spec(module) is not None for name, module in EXTRAS.items()},
        "config": str(config_path()),
        "models_dirs": [{"path": str(folder), "exists": folder.is_dir()} for folder in folders],
    }
