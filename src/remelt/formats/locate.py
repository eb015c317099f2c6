"""From a model's name to its file: an explicit path, then the recipe's folder, then the models folders."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath

from remelt.core.nearest import nearest
from remelt.errors import ModelNameError, OptionError
from remelt.formats.tensor_names import is_text, shown

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
_MOST_ENTRIES = 200_000
_MOST_COMPARED = 20_000
_MOST_LISTED = 20
_PIPELINE = "model_index.json"
_WEIGHTS = re.compile(
    r".*\.safetensors|.*\.index(?:\.\w+)?\.json"
    r"|(?:model|pytorch_model|diffusion_pytorch_model|consolidated)(?:[.-][\w.-]+)?\.(?:bin|pt|pth|ckpt)"
)
"""Files that make a folder a model: of the names that pickles have there, since a folder may hold pickles of others."""
_DENOISERS = ("unet", "transformer")
"""Folders of diffusers' components, one of which each model has, also where nothing beside weights is there."""
_COMFYUI = ("checkpoints", "diffusion_models", "unet", "vae", "clip", "text_encoders", "loras")
_A1111 = ("Stable-diffusion", "VAE", "Lora")


def locate_model(name: str, folders: Sequence[Path], *, suffixes: Sequence[str] = SUFFIXES) -> Path:
    """The one file or model folder that a name means; the suffix may be missing.

    An explicit path that exists wins; then the first of ``folders``, the recipe's own, by relative path; then the other
    folders, the models folders, together and at any depth. Where no spelling fits, the case of letters is ignored.
    Raises `ModelNameError` for a name that fits two, listing them, and for one that fits none, with the nearest names.
    """
    if not name or "\0" in name or not is_text(name):
        raise ModelNameError(f"{name!r} is no name of a model")
    direct = Path(os.path.expanduser(name))
    beside = folders[:1]
    for candidate in (direct, *(folder / direct for folder in beside)):
        found = _exact(candidate, suffixes)
        if found:
            return _only(name, found)
    here = [(folder, entry) for folder in beside for entry in _children(folder, direct, suffixes)]
    deep = [(folder, entry) for folder in folders[1:] for entry in _entries(folder, suffixes)]
    for seen, fits in ((here, _fits_folded), (deep, _fits), (deep, _fits_folded)):
        found = [entry for folder, entry in seen if fits(name, entry.relative_to(folder), suffixes)]
        if found:
            return _only(name, found)
    raise ModelNameError(
        f"no model is named {shown(name)}", hint=_hint(name, [entry for _, entry in (*here, *deep)], folders)
    )


def find_models(folders: Sequence[Path]) -> Iterator[Path]:
    """Every model that a name could mean: beside the recipe, in the first folder; at any depth in the others."""
    for folder in folders[:1]:
        yield from _children(folder, Path(), SUFFIXES)
    for folder in folders[1:]:
        yield from _entries(folder, SUFFIXES)


def _children(folder: Path, direct: Path, suffixes: Sequence[str]) -> list[Path]:
    """Models in the one folder beside the recipe in which a relative path looks."""
    parent = folder / direct.parent
    if direct.is_absolute() or ".." in direct.parts:
        return []
    try:
        return [child for child in sorted(parent.iterdir()) if _is_model(child, suffixes)]
    except OSError:
        return []


def _is_model(path: Path, suffixes: Sequence[str]) -> bool:
    if path.name.startswith("."):
        return False
    return os.path.isfile(path) if path.suffix.lower() in suffixes else _is_model_folder(path)


def _exact(path: Path, suffixes: Sequence[str]) -> list[Path]:
    if os.path.isfile(path) or _is_model_folder(path):
        return [path]
    if not path.name:
        return []
    return [found for suffix in suffixes if os.path.isfile(found := path.with_name(path.name + suffix))]


def _is_model_folder(path: Path) -> bool:
    names = _listed(path)
    if _PIPELINE in names or any(map(_WEIGHTS.fullmatch, names)):
        return True
    return any(_WEIGHTS.fullmatch(name) for part in _DENOISERS if part in names for name in _listed(path / part))


def _listed(path: Path) -> list[str]:
    try:
        return os.listdir(path) if os.path.isdir(path) else []
    except OSError:
        return []


def _only(name: str, found: list[Path]) -> Path:
    distinct = {path.resolve(): path for path in reversed(found)}
    if len(distinct) > 1:
        listed = [str(path) for path in reversed(distinct.values())]
        more = [f"... and {len(listed) - _MOST_LISTED} more"] if len(listed) > _MOST_LISTED else []
        lines = "\n".join(f"  {line}" for line in listed[:_MOST_LISTED] + more)
        raise ModelNameError(
            f"{shown(name)} may be any of {len(distinct)} models:\n{lines}",
            hint="write more of the path, or the suffix",
        )
    return found[0]


def _fits(name: str, relative: PurePath, suffixes: Sequence[str]) -> bool:
    asked = PurePath(name).parts
    own = relative.parts
    if not asked:
        return False
    if own[-len(asked) :] == asked:
        return True
    return any(own[-1] == asked[-1] + suffix for suffix in suffixes) and own[-len(asked) : -1] == asked[:-1]


def _fits_folded(name: str, relative: PurePath, suffixes: Sequence[str]) -> bool:
    return _fits(name.casefold(), PurePath(str(relative).casefold()), suffixes)


def _entries(folder: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    """Models below a folder; hidden folders and loops of links are left out, and the search is bounded."""
    visited: set[tuple[int, int]] = set()
    pending = [folder]
    budget = _MOST_ENTRIES
    while pending and budget > 0:
        current = pending.pop()
        try:
            status = current.stat()
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            children = sorted(current.iterdir())
        except OSError:
            continue
        budget -= len(children)
        for child in children:
            if child.name.startswith("."):
                continue
            if os.path.isdir(child):
                if _is_model_folder(child) and any((child / mark).exists() for mark in ("config.json", _PIPELINE)):
                    yield child
                else:
                    pending.append(child)
            elif child.suffix.lower() in suffixes and os.path.isfile(child):
                yield child


def _hint(name: str, seen: Sequence[Path], folders: Sequence[Path]) -> str:
    stems = [path.stem for path in seen[:_MOST_COMPARED]] + [path.name for path in seen[:_MOST_COMPARED]]
    close = nearest(PurePath(name).name, stems)
    searched = ", ".join(str(folder) for folder in folders)
    if close:
        return f"did you mean {' or '.join(repr(candidate) for candidate in close)}? Searched {searched}"
    return f"searched {searched}; --models-dir adds a folder"


def config_path(environment: Mapping[str, str] = os.environ) -> Path:
    """The configuration file: ``REMELT_CONFIG``, or ``remelt/config.toml`` in the user's configuration folder."""
    if "REMELT_CONFIG" in environment:
        return Path(environment["REMELT_CONFIG"])
    if sys.platform == "win32":
        base = Path(environment.get("APPDATA", Path.home() / "AppData" / "Roaming"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(environment.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return base / "remelt" / "config.toml"


def models_folders(
    explicit: Sequence[Path], environment: Mapping[str, str] = os.environ, config_file: Path | None = None
) -> list[Path]:
    """Where models are looked up by name: folders given, then ``REMELT_MODELS_DIR``, then the configuration file.

    The configuration may have ``models_dirs``, a list, and ``comfyui`` and ``a1111``, the folders of those programs.
    Raises `OptionError` for a folder given that is none, and for a configuration file that cannot be read.
    """
    for folder in explicit:
        if not folder.is_dir():
            raise OptionError(f"models folder {folder} is not a folder")
    folders = list(explicit)
    folders += [Path(part) for part in environment.get("REMELT_MODELS_DIR", "").split(os.pathsep) if part]
    config = config_path(environment) if config_file is None else config_file
    if config.is_file():
        folders += _configured(config)
    return list(dict.fromkeys(folders))


def _configured(config: Path) -> Iterator[Path]:
    try:
        settings = tomllib.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"the configuration file {config} cannot be read: {error}") from error
    unknown = set(settings) - {"models_dirs", "comfyui", "a1111"}
    listed = settings.get("models_dirs", [])
    texts = (
        [*listed, *(settings[name] for name in ("comfyui", "a1111") if name in settings)]
        if isinstance(listed, list)
        else [0]
    )
    if unknown or not all(isinstance(text, str) for text in texts):
        wrong = f"it has {', '.join(sorted(unknown))}" if unknown else "its values are paths as text"
        raise OptionError(
            f"the configuration file {config} may have models_dirs (a list), comfyui and a1111 (folders): {wrong}"
        )
    yield from (Path(os.path.expanduser(folder)) for folder in listed)
    for name, parts in (("comfyui", _COMFYUI), ("a1111", _A1111)):
        if name in settings:
            root = Path(os.path.expanduser(settings[name])) / "models"
            yield from (root / part for part in parts if (root / part).is_dir())
