"""Results that are quantised: which tensors are stored as small numbers and scales, under which names, and by what.

The plan is made as for any result; then each task of such a tensor is given one more call, which makes of the tensor
what is stored of it. So nothing but that call knows of quantisation: plans, journals and verification are the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from remelt.api.configurations import CONFIG, Companion, read_json, written
from remelt.archs.structure import infer
from remelt.check.inputs import Input
from remelt.check.keys import KeyReport, Task
from remelt.check.program import Apply, Constant, Instruction, Item, Load, Output, Program, Register
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import FormatError, OptionError
from remelt.formats.checkpoint import Checkpoint
from remelt.formats.quantised import DequantisedCheckpoint
from remelt.formats.quantised.schemes import Mapped, Packed, Quantised, Scaled

_BLOCK = 128
_KEPT_WHOLE = ("embed", "norm", "bias", "router", "gate.weight", "first_stage_model.", "vae.", "lm_head", "modulation")
"""Parts of names of matrices that are no linear layers, or ones that quantised files leave as they are."""
_MARKER = "scaled_fp8"


@dataclass(frozen=True)
class Encoding:
    """How one tensor is stored: by which quantiser, with which plain arguments, as which tensors."""

    kind: str
    values: Mapping[str, Any]
    parts: Mapping[str, tuple[str, TensorInfo]]
    """For each tensor that the quantiser gives, its key and what it is."""

    @property
    def form(self) -> object:
        """What it has in common with those of other tensors that are stored alike: all but the keys."""
        return self.kind, tuple(self.values.items()), tuple((part, info) for part, (_, info) in self.parts.items())


@dataclass
class Encodings:
    """The tensors of one result that are quantised, by key."""

    by_key: Mapping[str, Encoding] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    """What a language model's configuration says of it."""
    dtypes: Mapping[str, DType] = field(default_factory=dict)
    """Types of results that are not quantised, where they are not their own."""
    _programs: dict[object, Program] = field(default_factory=dict)

    def tasks(self, report: KeyReport, inputs: Mapping[int, Input]) -> KeyReport:
        """The report with one more call for each tensor that is quantised."""
        return replace(report, tasks=[self._task(task, inputs) for task in report.tasks])

    def _task(self, task: Task, inputs: Mapping[int, Input]) -> Task:
        encodings = tuple(self.by_key.get(key) for _, key, _ in task.outputs)
        if not any(encodings):
            return self._cast(task)
        identity = (id(task.program), tuple(one.form if one else None for one in encodings))
        program = self._programs.get(identity)
        if program is None:
            program = self._programs[identity] = _encoded(task.program, encodings, inputs)
        outputs: list[tuple[int, str, TensorInfo]] = []
        for (root, key, info), one in zip(task.outputs, encodings, strict=True):
            outputs += [(root, key, info)] if one is None else [(root, name, part) for name, part in one.parts.values()]
        return replace(task, program=program, outputs=tuple(outputs), copy=False)

    def _cast(self, task: Task) -> Task:
        """The task of results in other types: programs are shared by tasks of one type alone."""
        wanted = tuple(self.dtypes.get(key, info.dtype) for _, key, info in task.outputs)
        if all(dtype is info.dtype for dtype, (_, _, info) in zip(wanted, task.outputs, strict=True)):
            return task
        identity = (id(task.program), wanted)
        program = self._programs.get(identity)
        if program is None:
            cast = [replace(one, dtype=dtype) for one, dtype in zip(task.program.outputs, wanted, strict=True)]
            program = self._programs[identity] = replace(task.program, outputs=tuple(cast))
        outputs = tuple(
            (root, key, TensorInfo(dtype, info.shape))
            for dtype, (root, key, info) in zip(wanted, task.outputs, strict=True)
        )
        return replace(task, program=program, outputs=outputs)

    def companions(self, found: list[Companion]) -> list[Companion]:
        """The small files beside the result, of which the configuration tells how it is quantised."""
        if self.config is None:
            return found
        told = {"quantization_config": self.config}
        return [
            (written({**read_json(content), **told}), name) if name == CONFIG else (content, name)
            for content, name in found
        ]


def _encoded(program: Program, encodings: tuple[Encoding | None, ...], inputs: Mapping[int, Input]) -> Program:
    from remelt.methods.quantising import quantiser

    instructions: list[Instruction] = list(program.instructions)
    shapes = list(program.shapes)
    outputs: list[Output] = []
    for output, one in zip(program.outputs, encodings, strict=True):
        if one is None:
            outputs.append(output)
            continue
        operands = [output.register, *_base(program, output, inputs)]
        plain = tuple((name, Constant(value)) for name, value in one.values.items())
        args = tuple(Register(register) for register in operands)
        instructions.append(Apply(quantiser(one.kind), args, plain, tuple(operands), output.key))
        shapes.append(program.shapes[output.register])
        call = len(instructions) - 1
        for part, (name, info) in one.parts.items():
            instructions.append(Item(call, part))
            shapes.append(info.shape)
            outputs.append(Output(output.root, name, len(instructions) - 1, info.dtype, None))
    return Program(tuple(instructions), tuple(outputs), tuple(shapes))


def _base(program: Program, output: Output, inputs: Mapping[int, Input]) -> Iterator[int]:
    """The register of the first model's own tensor, if the result is made of it and is another one."""
    for register, found in enumerate(program.instructions):
        if isinstance(found, Load) and found.key == output.key and inputs[found.input].model.space == "weight":
            if register != output.register and program.shapes[register] == program.shapes[output.register]:
                yield register
            return


def scaled_encodings(tensors: Mapping[str, TensorInfo], dtype: DType, folder: Path | None) -> Encodings:
    """Linear layers within blocks in an eight-bit type, each with a scale, as the tools that read the result know it.

    A language model's folder gets scales for blocks of 128 by 128, as transformers reads them; anything else one scale
    a tensor, as ComfyUI does. Of a checkpoint only the diffusion model is scaled: of that alone the marker speaks, and
    text encoders beside it would be read without their scales.
    """
    refuse_folders(tensors, "scales of fp8")
    prefix = _prefix(tensors)
    linear = {key: info for key, info in tensors.items() if key.startswith(prefix) and _is_linear(key, info)}
    stacks = infer(tensors).places
    linear = {key: info for key, info in linear.items() if stacks[key].stack is not None}
    if not linear:
        raise OptionError("nothing of the result can be scaled: it has no linear layers in blocks", hint="--dtype bf16")
    if is_transformers(folder):
        return _in_blocks(tensors, linear, dtype)
    found = {}
    for number, (key, info) in enumerate(linear.items()):
        stem = key.removesuffix("weight")
        scale = (f"{stem}scale_weight", TensorInfo(DType.F32, (1,)))
        parts = {"weight": (key, TensorInfo(dtype, info.shape)), "scale": scale}
        values: dict[str, Any] = {"dtype": dtype.name, "scales": "[1]"}
        if number == 0:
            parts["marker"] = (f"{prefix}{_MARKER}", TensorInfo(dtype, (2,)))
            values["constants"] = json.dumps({"marker": [0.0, 0.0]})
        found[key] = Encoding("scaled", values, parts)
    return Encodings(found)


def refuse_folders(tensors: Mapping[str, TensorInfo], what: str) -> None:
    """Refuse results in folders of components: diffusers reads nothing quantised there."""
    if any("/" in key for key in tensors):
        raise OptionError(f"{what} are no part of diffusers' folders of components", hint="--dialect original")


def _prefix(tensors: Mapping[str, TensorInfo]) -> str:
    """What stands before the keys of the diffusion model, where ComfyUI looks for its marker."""
    return next((one for one in ("model.diffusion_model.",) if any(key.startswith(one) for key in tensors)), "")


def _in_blocks(tensors: Mapping[str, TensorInfo], linear: Mapping[str, TensorInfo], dtype: DType) -> Encodings:
    fitting = {key: info for key, info in linear.items() if not any(side % _BLOCK for side in info.shape[-2:])}
    if not fitting:
        raise OptionError(
            f"nothing of the result can be scaled in blocks of {_BLOCK}: no linear layer's sides are multiples of it",
            hint="--dtype bf16",
        )
    found = {}
    for key, info in fitting.items():
        down, across = (side // _BLOCK for side in info.shape[-2:])
        grid = TensorInfo(DType.F32, (*info.shape[:-2], down, across))
        parts = {"weight": (key, TensorInfo(dtype, info.shape)), "scale": (f"{key}_scale_inv", grid)}
        values = {"dtype": dtype.name, "down": down, "across": across, "scales": json.dumps(grid.shape)}
        found[key] = Encoding("scaled", values, parts)
    others = (key for key, info in tensors.items() if len(info.shape) == 2 and key not in found)
    config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3" if dtype is DType.F8_E4M3 else "e5m2",
        "weight_block_size": [_BLOCK, _BLOCK],
        "modules_to_not_convert": sorted(key.removesuffix(".weight") for key in others if key.endswith(".weight")),
    }
    return Encodings(found, config)


def _is_linear(key: str, info: TensorInfo) -> bool:
    return (
        info.dtype.is_float
        and len(info.shape) == 2
        and key.endswith(".weight")
        and min(info.shape) > 1
        and not any(part in key for part in _KEPT_WHOLE)
    )


def is_transformers(folder: Path | None) -> bool:
    """Whether a folder is a model of transformers."""
    file = None if folder is None else folder / CONFIG
    if file is None or not file.is_file():
        return False
    try:
        return "model_type" in read_json(file)
    except (OSError, FormatError):
        return False


def kept_encodings(tensors: Mapping[str, TensorInfo], checkpoint: Checkpoint, label: str) -> Encodings:
    """The quantisation of a model, for the tensors of a result that have its shapes.

    Raises `OptionError` where the model is not quantised, or in a way that is read and not written.
    """
    if checkpoint.format == "gguf":
        raise OptionError(f"{label} is a GGUF file, whose types only such a file keeps", hint="-o NAME.gguf")
    if not isinstance(checkpoint, DequantisedCheckpoint) or not checkpoint.quantised:
        raise OptionError(
            f"{label} is not quantised in this layout, so that there is nothing to keep",
            hint="--dtype fp8_e4m3fn --scaled quantises a result",
        )
    found: dict[str, Encoding] = {}
    pending = dict(checkpoint.small_parts())
    for key, one in checkpoint.quantised.items():
        if key not in tensors or tensors[key].shape != one.shape:
            continue
        made = _kept(one)
        if made is None:
            raise OptionError(
                f"{key} of {label} is {one.described}, which is read and not written", hint="--dtype bf16"
            )
        found[key] = made if found or not pending else _with_constants(made, pending)
    return Encodings(found)


def _kept(one: Quantised) -> Encoding | None:
    parts = {part: (name, one.infos[part]) for part, name in one.parts.items()}
    if isinstance(one, Scaled):
        (down, across), (tall, wide) = one.grid, one.block
        values = {"down": down, "across": across, "tall": tall, "wide": wide, "divisor": int(one.divisor)}
        told = {"dtype": one.infos["weight"].dtype.name, "scales": json.dumps(one.infos["scale"].shape)}
        return Encoding("scaled", {**told, **values}, parts)
    if isinstance(one, Packed) and one.group == 32 and one.infos["scale"].dtype is DType.U8:
        return Encoding("mxfp4", {"turned": int(one.turned)}, parts)
    if isinstance(one, Mapped) and one.kind == "nf4":
        return _kept_nf4(one)
    return None


def _kept_nf4(one: Mapped) -> Encoding:
    """NF4 with scales in full precision: those of a model that quantises them, too, are not quantised again."""
    weight = one.parts["weight"]
    blocks = -(-math.prod(one.shape) // one.block)
    told = {"quant_type": "nf4", "blocksize": one.block, "dtype": "bfloat16", "shape": list(one.shape)}
    state = list(json.dumps(told).encode())
    parts = {
        "weight": (weight, one.infos["weight"]),
        "absmax": (f"{weight}.absmax", TensorInfo(DType.F32, (blocks,))),
        "quant_map": (f"{weight}.quant_map", TensorInfo(DType.F32, (16,))),
        "state": (f"{weight}.quant_state.bitsandbytes__nf4", TensorInfo(DType.U8, (len(state),))),
    }
    return Encoding("nf4", {"block": one.block, "constants": json.dumps({"state": state})}, parts)


def _with_constants(one: Encoding, small: Mapping[str, tuple[TensorInfo, list[float]]]) -> Encoding:
    """An encoding that also gives small tensors as they are."""
    told = json.loads(one.values.get("constants", "{}"))
    parts = dict(one.parts)
    for number, (name, (info, numbers)) in enumerate(small.items()):
        told[f"small{number}"] = numbers
        parts[f"small{number}"] = (name, info)
    return replace(one, values={**one.values, "constants": json.dumps(told)}, parts=parts)
