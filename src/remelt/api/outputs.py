"""Where a result goes: a file or a folder, its layout, and the small files that belong beside the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from remelt.api.resources import free_disk, nearest_folder
from remelt.core.tensor_info import TensorInfo
from remelt.core.units import format_bytes
from remelt.engine.commit import is_unfinished, is_unfinished_folder, reserved_bytes
from remelt.errors import BudgetError, OptionError, OutputError
from remelt.formats.checkpoint import Checkpoint
from remelt.formats.layout import OutputLayout, file_layout, folder_layout
from remelt.formats.sharded import weights_of
from remelt.planning.plan import PlannedOutput

SUFFIX = ".safetensors"
GGUF = ".gguf"
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
    ".index.json",
)
_LARGEST_COMPANION = 2**28


def output_path(output: Path, *, folder: bool) -> Path:
    """The output's path: a folder as it is; a file ends in ``.safetensors``, which a bare name is given."""
    if output.suffix == SUFFIX or (output.suffix == GGUF and not output.is_dir()):
        return output
    if output.suffix in (".ckpt", ".pt", ".pth", ".bin") and not output.is_dir():
        raise OptionError(
            f"results are written as safetensors or GGUF, but the output is {output.name}",
            hint=f"-o {output.stem}{SUFFIX}",
        )
    return output if folder else output.with_name(output.name + SUFFIX)


def refuse_output(path: Path, overwrite: bool) -> None:
    """Refuse an output that exists, unless it may be replaced, or that cannot be a file or folder there."""
    occupied = path.is_file() or (path.is_dir() and not is_unfinished_folder(path))
    if occupied and not overwrite:
        raise OutputError(f"{path} exists", hint="--overwrite replaces it, once the new one is complete")
    if path.suffix in (SUFFIX, GGUF) and path.is_dir():
        raise OutputError(f"{path} is a folder", hint="give a file's name")
    parent = nearest_folder(path.parent)
    if not parent.is_dir():
        raise OutputError(f"{parent} is not a folder, so {path} cannot be written")


def refuse_full_disk(outputs: Sequence[PlannedOutput]) -> None:
    """Refuse where the results would not fit their disks beside what is there; what is reserved already counts."""
    needed: dict[int, int] = {}
    folders: dict[int, Path] = {}
    for output in outputs:
        if output.path is None or output.layout is None:
            continue
        folder = nearest_folder(Path(output.path))
        disk = folder.stat().st_dev
        folders[disk] = folder
        needed[disk] = needed.get(disk, 0) + output.size - reserved_bytes(output.layout, Path(output.path))
    for disk, folder in folders.items():
        free = free_disk(folder)
        if free is not None and needed[disk] > free:
            raise BudgetError(
                f"the output needs {format_bytes(needed[disk])}, but the disk has {format_bytes(free)} free",
                hint="free some, or write elsewhere with -o",
            )


def lay_out(
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    path: Path,
    like: Path | None,
    shard_bytes: int | None,
    stem: str = "model",
    shard_of: Mapping[str, int] | None = None,
) -> OutputLayout:
    """The layout of a result on disk: one file, or a folder of shards named as in the folder ``like``, if it is one.

    Where no size is asked for, ``shard_of`` tells which keys stand together in a shard.
    """
    if path.suffix == SUFFIX:
        if shard_bytes is not None:
            raise OptionError("shards go to a folder, but the output is a file", hint=f"-o {path.with_suffix('')}")
        file = file_layout(tensors, metadata, path.name)
        return OutputLayout(files=(file,), indexes=(), is_folder=False)
    names = _weight_names(tensors, like, stem)
    layout = folder_layout(tensors, metadata, max_shard_size=shard_bytes, weight_names=names, shard_of=shard_of)
    if (path / "model_index.json").is_file() and not any("/" in file.name for file in layout.files):
        raise OutputError(
            f"{path} is a model of several components, as its model_index.json says, and the result is not",
            hint="write to another folder",
        )
    return layout


def _weight_names(keys: Iterable[str], like: Path | None, stem: str) -> dict[str, str]:
    """The stem of the weight files of each component folder (``""`` is the folder itself, whose is said)."""
    folders = {key.rpartition("/")[0] for key in keys}
    names = {
        folder: stem if not folder else "model" if folder.startswith("text_encoder") else "diffusion_pytorch_model"
        for folder in folders
    }
    if like is None or not like.is_dir():
        return names
    for folder in folders:
        found = weights_of(like / folder) if (like / folder).is_dir() else None
        if found is not None:
            stem = found.name.split(".")[0].split("-00")[0]
            names[folder] = "model" if stem == "pytorch_model" else stem
    return names


def shards_of(checkpoint: Checkpoint) -> dict[str, int] | None:
    """The number of the file that holds each tensor of a folder; None for what is no folder."""
    if checkpoint.path is None or not checkpoint.path.is_dir():
        return None
    return {key: checkpoint.position(key)[0] for key in checkpoint.tensors}


def companions_of(like: Path | None, output: PlannedOutput) -> Iterator[tuple[Path, str]]:
    """The small files of the folder ``like`` beside its weights (configs, tokenizers), where the output is one, too."""
    if like is None or not like.is_dir() or output.layout is None or not output.layout.is_folder:
        return
    for file in sorted(like.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(like).parts) or is_unfinished(file.name)
        if hidden or not file.is_file() or file.name.endswith(_WEIGHTS) or file.stat().st_size > _LARGEST_COMPANION:
            continue
        yield file, file.relative_to(like).as_posix()
