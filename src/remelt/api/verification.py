"""Whether a file is what it should be: its header, its checksum, its numbers, and what its recipe makes again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from remelt.api.group import CHECKSUM_KEY, EXECUTOR_KEY, PreparedGroup
from remelt.api.inspection import find_nonfinite
from remelt.api.merging import settled
from remelt.api.options import MergeOptions, PathLike
from remelt.api.prepare import prepare
from remelt.api.recipes import JOINED_KEY, Source, embedded
from remelt.core.checksum import checksum, combined
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import OptionError, RunError
from remelt.formats.checkpoint import Checkpoint, open_checkpoint
from remelt.formats.locate import locate_model, models_folders
from remelt.methods import METHODS
from remelt.planning.plan import Plan
from remelt.text.reader import read_recipe

SAMPLE = 16
_STEP = 2**22
TOLERANCE = 4
"""Units in the last place of the stored type, or of float32 where that is coarser, by which another executor may
differ."""


@dataclass
class Verification:
    """What was verified of a file, and every fault that was found.

    ``checksum`` is None where the file carries none. ``recomputed`` counts the tensors that its recipe made again;
    ``executor`` tells by what the file was made where that is another executor than this one, whose last bits may
    differ.
    """

    path: str
    tensors: int
    checksum: bool | None = None
    nonfinite: tuple[str, ...] = ()
    recomputed: int = 0
    executor: str | None = None
    faults: list[str] = field(default_factory=list)


def verify(
    path: PathLike, *, recipe: bool = False, sample: int | None = SAMPLE, models_dirs: Sequence[PathLike] = ()
) -> Verification:
    """Verify a file: its header, its checksum, and that its numbers are finite.

    With ``recipe``, tensors are computed again from the recipe inside, and compared bit for bit: ``sample`` of them,
    spread over the file, or all where it is None. Raises `FormatError` for a malformed file and `RecipeError` where
    there is no recipe; faults of the content are in the result.
    """
    if sample is not None and sample < 1:
        raise OptionError(f"a sample is of at least one tensor, but got {sample}")
    folders = models_folders([Path(folder) for folder in models_dirs])
    found = locate_model(str(path), [Path.cwd(), *folders]).resolve()
    with open_checkpoint(found) as checkpoint:
        result = Verification(str(found), len(checkpoint.tensors))
        result.checksum = _verify_checksums(checkpoint, result.faults)
        result.nonfinite = find_nonfinite(checkpoint)
        result.faults += [f"{key}: NaN or infinity" for key in result.nonfinite]
        if recipe:
            _recompute(found, checkpoint, sample, models_dirs, result)
    return result


def _verify_checksums(checkpoint: Checkpoint, faults: list[str]) -> bool | None:
    """Whether every file's checksum fits its tensors; None where none of them carries one."""
    seen: list[bool] = []
    for path in checkpoint.files():
        with open_checkpoint(path) as file:
            stated = file.metadata.get(CHECKSUM_KEY)
            if stated is None:
                continue
            sums = {key: _checksum(file, key, info) for key, info in file.tensors.items()}
        seen.append(combined(sums) == stated)
        if not seen[-1]:
            faults.append(f"{path.name}: the tensors are not those that were written: the checksum differs")
    return all(seen) if seen else None


def _checksum(file: Checkpoint, key: str, info: TensorInfo) -> int:
    steps = range(0, info.nbytes, _STEP)
    return sum(checksum(file.read(key, begin, min(begin + _STEP, info.nbytes)), begin) for begin in steps) % 2**64


def _recompute(
    path: Path, checkpoint: Checkpoint, sample: int | None, models_dirs: Sequence[PathLike], result: Verification
) -> None:
    from remelt.engine.executor import describe_executor

    if JOINED_KEY in checkpoint.metadata:
        raise OptionError(
            f"{path.name} was joined of adapters' factors, and its recipe makes the same difference of others",
            hint="without --recipe, header, checksum and numbers are verified",
        )
    if checkpoint.format == "gguf":
        raise OptionError(
            f"{path.name} is a GGUF file: what its recipe makes is not compared with quantised tensors",
            hint="merge the recipe inside to a safetensors file, and verify that",
        )
    text, given = embedded(path)
    options = MergeOptions(models_dirs=tuple(models_dirs), **given)
    source = Source(read_recipe(text, path.name), path.parent, path.stem)
    here = describe_executor(options.device, options.compute_dtype)
    stated = checkpoint.metadata.get(EXECUTOR_KEY)
    exact = stated in (None, here)
    result.executor = None if exact else stated
    with prepare([source], [None], options, METHODS) as prepared:
        (group,) = prepared.groups
        group = settled(group, options)
        made = group.plan.outputs[0].tensors
        _compare_headers(made, checkpoint.tensors, result.faults)
        chosen = set(_chosen(sorted(set(made) & set(checkpoint.tensors)), sample))
        sink = _Comparison(checkpoint, exact=exact)
        _run(_only(group.plan, chosen), group, sink, options)
    result.recomputed = len(chosen)
    unlike = "is not what the recipe makes" if exact else f"differs by more than {TOLERANCE} units in the last place"
    result.faults += [f"{key}: {unlike}" for key in sorted(sink.differing & chosen)]


def _compare_headers(made: Mapping[str, TensorInfo], there: Mapping[str, TensorInfo], faults: list[str]) -> None:
    for key in sorted(set(made) - set(there)):
        faults.append(f"{key}: the recipe makes it, but the file lacks it")
    for key in sorted(set(there) - set(made)):
        faults.append(f"{key}: the file has it, but the recipe does not make it")
    for key in sorted(set(there) & set(made)):
        if (there[key].dtype, there[key].shape) != (made[key].dtype, made[key].shape):
            faults.append(f"{key}: the file has {there[key]}, but the recipe makes {made[key]}")


def _chosen(keys: Sequence[str], sample: int | None) -> Sequence[str]:
    """Keys spread evenly; all without a sample."""
    if sample is None or sample >= len(keys):
        return keys
    return [keys[index * len(keys) // sample] for index in range(sample)]


def _only(plan: Plan, chosen: set[str]) -> Plan:
    tasks = tuple(planned for planned in plan.tasks if any(key in chosen for _, key, _ in planned.task.outputs))
    return replace(plan, tasks=tasks)


def _run(plan: Plan, group: PreparedGroup, sink: _Comparison, options: MergeOptions) -> None:
    from remelt.engine.executor import executor_for
    from remelt.engine.finite import FiniteReport
    from remelt.engine.run import Execution, run

    execution = Execution(
        checkpoints={index: given.checkpoint for index, given in group.inputs.items()},
        labels={index: given.label for index, given in group.inputs.items()},
        sinks=[sink],
        nonfinite=options.nonfinite,  # type: ignore[arg-type]
        device=options.device,
        executor=executor_for(options.device),
        sources=group.sources,
    )
    for _ in run(plan, execution, FiniteReport()):
        pass


class _Comparison:
    """Takes a merge's results as a file would, and compares them with what is in one."""

    checked = False

    def __init__(self, checkpoint: Checkpoint, *, exact: bool) -> None:
        self.checkpoint, self.exact = checkpoint, exact
        self.differing: set[str] = set()

    def done(self, key: str, start: int, stop: int) -> bool:
        """Never: all is compared."""
        return False

    def write(self, key: str, start: int, data: memoryview) -> None:
        """Compare bytes of a tensor with those in the file."""
        info = self.checkpoint.tensors.get(key)
        if info is None or start + len(data) > info.nbytes:
            self.differing.add(key)
            return
        there = self.checkpoint.read(key, start, start + len(data))
        if there != data and (self.exact or not _near(there, data, info.dtype)):
            self.differing.add(key)

    def place(self, key: str, start: int, stop: int) -> None:
        """Nowhere: what is made is compared, and kept by nobody."""

    def refused(self, key: str, error: OSError) -> RunError:
        """What is put nowhere fails nowhere, but by the fault of the machine."""
        return RunError(f"{key} cannot be compared: {error.strerror}")

    def finished(self, key: str, start: int, stop: int, checksum: int, *, keep: bool) -> None:
        """Nothing to note."""


def _near(there: memoryview, data: memoryview, dtype: DType) -> bool:
    import torch

    from remelt.tensors import tensor_over

    if not dtype.is_float:
        return False
    a, b = tensor_over(there, dtype), tensor_over(data, dtype)
    step = max(torch.finfo(a.dtype).eps, torch.finfo(torch.float32).eps)
    wide = a.double()
    return bool(torch.allclose(wide, b.double(), rtol=TOLERANCE * step, atol=TOLERANCE * step * _largest(wide)))


def _largest(values: Any) -> float:
    return float(values.abs().max()) * 2**-10 if values.numel() else 0.0
