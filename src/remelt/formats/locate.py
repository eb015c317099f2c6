"""From a model's name to its file: an explicit path, then the recipe's folder, then the models folders."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath

from remelt.core.nearest import nearest
from remelt.errors import ModelNameError, OptionError

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_MOST_ENTRIES = 200_000
_COMFYUI = ("checkpoints", "diffusion_models", "unet", "vae", "clip", "text_encoders", "loras")
_A1111 = ("Stable-diffusion", "VAE", "Lora")


def locate_model(name: str, folders: Sequence[Path], *, suffixes: Sequence[str] = SUFFIXES) -> Path:
    """The one file or model folder that a name means; the suffix may be missing.

    An explicit path that exists wins; then ``folders``, in order: beside the recipe by relative path, in models folders
    at any depth. Raises `ModelNameError` for a name that fits two, listing them, and for one that fits none, with the
    nearest names found.
    """
    if not name or "\0" in name:
        raise ModelNameError(f"{name!r} is no name of a model")
    direct = Path(name).expanduser()
    for candidate in (direct, *(folder / direct for folder in folders[:1])):
        found = _exact(candidate, suffixes)
        if found:
            return _only(name, found)
    seen: list[Path] = []
    for folder in folders:
        entries = list(_entries(folder, suffixes))
        for fits in (_fits, _fits_folded):
            found = [entry for entry in entries if fits(name, entry.relative_to(folder), suffixes)]
            if found:
                return _only(name, found)
        seen += entries
    raise ModelNameError(f"no model is named {name!r}", hint=_hint(name, seen, folders))


def _exact(path: Path, suffixes: Sequence[str]) -> list[Path]:
    if path.is_file() or _is_model_folder(path):
        return [path]
    return (
        [found for suffix in suffixes if (found := path.with_name(path.name + suffix)).is_file()] if path.name else []
    )


def _is_model_folder(path: Path) -> bool:
    if not path.is_dir():
        return False
    return (
        any(path.glob("*.safetensors"))
        or any(path.glob("*.index.json"))
        or (path / "model_index.json").is_file()
        or (path / "pytorch_model.bin").is_file()
    )


def _only(name: str, found: list[Path]) -> Path:
    distinct = list(dict.fromkeys(path.resolve() for path in found))
    if len(distinct) > 1:
        listed = "\n".join(f"  {path}" for path in found)
        raise ModelNameError(
            f"{name!r} may be any of {len(found)} models:\n{listed}", hint="write more of the path, or the suffix"
        )
    return found[0]


def _fits(name: str, relative: PurePath, suffixes: Sequence[str]) -> bool:
    asked = PurePath(name).parts
    own = relative.parts
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
            if child.is_dir():
                if _is_model_folder(child) and (
                    (child / "config.json").exists() or (child / "model_index.json").exists()
                ):
                    yield child
                else:
                    pending.append(child)
            elif child.suffix in suffixes:
                yield child


def _hint(name: str, seen: Sequence[Path], folders: Sequence[Path]) -> str:
    stems = {path.stem: path for path in seen} | {path.name: path for path in seen}
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
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
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
    yield from (Path(folder).expanduser() for folder in listed)
    for name, parts in (("comfyui", _COMFYUI), ("a1111", _A1111)):
        if name in settings:
            root = Path(settings[name]).expanduser() / "models"
            yield from (root / part for part in parts if (root / part).is_dir())
