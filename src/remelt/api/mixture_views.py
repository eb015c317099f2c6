"""What a mixture of experts takes of models: MLPs under the names of an expert's, and routers that are drawn."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from remelt.api.configurations import CONFIG
from remelt.check.inputs import Input
from remelt.core.dtype import DType
from remelt.core.random import Random
from remelt.core.tensor_info import TensorInfo
from remelt.errors import RecipeError
from remelt.formats.checkpoint import Checkpoint
from remelt.formats.renamed import RenamedCheckpoint
from remelt.recipe.mixture import BASE, DRAWN, EXPERT, MIXTURE, ROUTER, SHARED, SHARED_GATE, UNIFORM, ZERO
from remelt.recipe.node import MixturePart

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
GATE, SHARED_EXPERT_GATE = "gate", "shared_expert_gate"
FAMILIES = {
    "llama": ("mixtral", "qwen2_moe"),
    "mistral": ("mixtral", "qwen2_moe"),
    "qwen2": ("qwen2_moe",),
    "qwen3": ("qwen3_moe",),
}
"""Kinds of dense models, with the styles that have a place for all of their attention, the usual one first."""
_MLP = re.compile(r"((?:.*\.)?layers\.\d+)\.mlp\.(.+)")
_GATES = re.compile(r"((?:.*\.)?layers\.\d+)\.(?:mlp|block_sparse_moe)\.(gate|shared_expert_gate)\.weight")
_MIXED = re.compile(r"\.(?:block_sparse_moe|(?:mlp|feed_forward)\.(?:experts?|gate|router|shared_experts?))\.")
_FLOATS = (DType.F64, DType.F32, DType.F16, DType.BF16)


@dataclass(frozen=True)
class Style:
    """How a mixture names the parts of its layers."""

    name: str

    @property
    def block(self) -> str:
        """What stands in the place of a dense layer's ``mlp``."""
        return "block_sparse_moe" if self.name == "mixtral" else "mlp"

    @property
    def has_shared(self) -> bool:
        """Whether one more expert is asked for every token."""
        return self.name == "qwen2_moe"

    def expert(self, layer: str, number: int, projection: str) -> str:
        """The key of one matrix of an expert."""
        name = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[projection]
        return f"{layer}.{self.block}.experts.{number}.{name if self.name == 'mixtral' else projection}.weight"

    def shared(self, layer: str, projection: str) -> str:
        """The key of one matrix of the shared expert."""
        return f"{layer}.{self.block}.shared_expert.{projection}.weight"

    def gate(self, layer: str, name: str = GATE) -> str:
        """The key of a layer's router, or of the gate of its shared expert."""
        return f"{layer}.{self.block}.{name}.weight"


def with_parts(inputs: Mapping[int, Input], used: Sequence[int]) -> tuple[dict[int, Input], Style | None]:
    """The inputs, of which those that one result's mixture takes a part of are views; and its style.

    Raises `RecipeError` for models of which no mixture can be made.
    """
    parts = {index: part for index in used if (part := inputs[index].model.part) is not None}
    if not parts:
        return dict(inputs), None
    counts = sorted({(part.experts, part.per_token) for part in parts.values()})
    if len(counts) > 1:
        told = " and ".join(f"{experts} experts, {per_token} for a token" for experts, per_token in counts)
        raise RecipeError(f"{MIXTURE}: the mixtures of one result are of one shape, but they have {told}")
    for index, part in parts.items():
        if part.role in (BASE, EXPERT, SHARED):
            _refuse_mixtures(inputs[index])
    style = _style_of([inputs[index] for index, part in parts.items() if part.role == BASE])
    found = dict(inputs)
    for index, part in parts.items():
        if not isinstance(inputs[index].checkpoint, (PartCheckpoint, RouterCheckpoint)):
            found[index] = replace(inputs[index], checkpoint=_view(inputs[index], part, style))
    return found, style


def is_whole(given: Input) -> bool:
    """Whether an input is a model, and no difference, mask or adapter."""
    return given.model.space == "weight" and given.adapter is None


def family_of(given: Input) -> str:
    """The kind of a dense model, as its configuration says, or as its attention has norms or biases."""
    told = config_of(given)
    if "model_type" in told:
        return str(told["model_type"])
    keys = given.checkpoint.tensors
    if any(key.endswith("self_attn.q_norm.weight") for key in keys):
        return "qwen3"
    return "qwen2" if any(key.endswith("self_attn.q_proj.bias") for key in keys) else "llama"


def config_of(given: Input) -> dict[str, Any]:
    """The configuration beside a model's weights, empty where there is none."""
    path = given.checkpoint.path
    file = None if path is None else (path if path.is_dir() else path.parent) / CONFIG
    return read_config(file) if file is not None and file.is_file() else {}


def read_config(content: Path | bytes) -> dict[str, Any]:
    """A configuration; `RecipeError` for what is none."""
    data = content if isinstance(content, bytes) else content.read_bytes()
    try:
        told = json.loads(data)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise RecipeError(f"{CONFIG if isinstance(content, bytes) else content} is no JSON object")
    return told


def _refuse_mixtures(given: Input) -> None:
    """Refuse a model with experts, or with MLPs that no expert has a place for."""
    for key in given.checkpoint.tensors:
        if _MIXED.search(key):
            raise RecipeError(
                f"{given.label} is a mixture of experts already: it has {key}",
                hint="base and experts are dense models",
                span=given.model.span,
            )
        found = _MLP.fullmatch(key)
        if found and is_whole(given) and found[2] not in [f"{name}.weight" for name in PROJECTIONS]:
            raise RecipeError(
                f"{given.label} has {key}, for which the experts of a mixture have no place",
                hint=f"their MLPs consist of {', '.join(PROJECTIONS)} without biases",
                span=given.model.span,
            )


def _style_of(bases: Sequence[Input]) -> Style:
    """The style that is stated or that the base's kind has; `RecipeError` where they do not suit each other."""
    whole = next((given for given in bases if is_whole(given)), bases[0])
    assert whole.model.part is not None
    stated, family = whole.model.part.style, family_of(whole)
    if family not in FAMILIES:
        raise RecipeError(
            f"{whole.label} is a {family}, of which no mixture of experts is known",
            hint=f"those of {', '.join(FAMILIES)} are",
            span=whole.model.span,
        )
    styles = FAMILIES[family]
    if stated is not None and stated not in styles:
        raise RecipeError(
            f"{whole.label} is a {family}, whose attention a {stated} has not",
            hint=f"style={styles[0]!r}".replace("'", '"'),
            span=whole.model.span,
        )
    return Style(styles[0] if stated is None else stated)


def _view(given: Input, part: MixturePart, style: Style) -> Checkpoint:
    """What a mixture takes of a model, by the names that it has there."""
    checkpoint = given.checkpoint
    if part.role in (*DRAWN, SHARED_GATE):
        return RouterCheckpoint(checkpoint, part, style)
    names: dict[str, str] = {}
    for key in checkpoint.tensors:
        if part.role == ROUTER:
            gate = _GATES.fullmatch(key)
            if gate and (gate[2] == GATE or style.has_shared):
                names[style.gate(gate[1], gate[2])] = key
            continue
        found = _MLP.fullmatch(key)
        if found is None:
            names |= {key: key} if part.role == BASE else {}
        elif part.role == EXPERT:
            names[style.expert(found[1], part.number, found[2].partition(".")[0])] = key
        elif part.role == SHARED and style.has_shared:
            names[style.shared(found[1], found[2].partition(".")[0])] = key
    if part.role == ROUTER and not names:
        raise RecipeError(
            f"{given.label} has no router: no gate of a layer",
            hint=f"its keys are such as {style.gate('model.layers.0')}; remelt router makes it of prompts",
            span=given.model.span,
        )
    if part.role == SHARED and part.stated and not style.has_shared:
        raise RecipeError(f"a {style.name} has no shared expert", hint='style="qwen2_moe"', span=given.model.span)
    return PartCheckpoint(checkpoint, names)


class PartCheckpoint(RenamedCheckpoint):
    """What a mixture takes of an opened checkpoint."""

    def view_of(self) -> str:
        """The names, as a digest."""
        told = json.dumps(list(self.names.items())) + self.checkpoint.view_of()
        return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()


class RouterCheckpoint(Checkpoint):
    """A router for the layers of an opened model, drawn where it is read; whoever opened that closes it.

    It has one row for each expert, as wide as the model's hidden states and in its element type.
    """

    def __init__(self, checkpoint: Checkpoint, part: MixturePart, style: Style) -> None:
        self.checkpoint, self.part_of, self.style = checkpoint, part, style
        self.path, self.format, self.metadata = checkpoint.path, checkpoint.format, checkpoint.metadata
        self.tensors: dict[str, TensorInfo] = {}
        for key, info in checkpoint.tensors.items():
            found = _MLP.fullmatch(key)
            if found is None or found[2] != f"{PROJECTIONS[0]}.weight" or len(info.shape) != 2:
                continue
            width, dtype = info.shape[1], info.dtype if info.dtype in _FLOATS else DType.F32
            if part.role != SHARED_GATE:
                self.tensors[style.gate(found[1])] = TensorInfo(dtype, (part.experts, width))
            if style.has_shared:
                self.tensors[style.gate(found[1], SHARED_EXPERT_GATE)] = TensorInfo(dtype, (1, width))

    def read(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        """The bytes of a layer's gates."""
        import torch

        from remelt.tensors import TORCH, bytes_of

        info = self.tensors[key]
        stop = info.nbytes if stop is None else min(stop, info.nbytes)
        if start >= stop:
            return memoryview(b"")
        first, last = start // info.dtype.itemsize, -(-stop // info.dtype.itemsize)
        drawn = torch.from_numpy(self._drawn(key, first, last - first)).to(TORCH[info.dtype])
        before = first * info.dtype.itemsize
        return bytes_of(drawn)[start - before : stop - before]

    def _drawn(self, key: str, first: int, size: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        part = self.part_of
        if part.role in (ZERO, SHARED_GATE):
            return np.zeros(size)
        random = Random(part.seed, MIXTURE, key, first, size)
        if part.role == UNIFORM:
            return (2.0 * random.uniform() - 1.0) / math.sqrt(self.tensors[key].shape[1])
        return random.normal()

    def position(self, key: str) -> tuple[int, int]:
        """Nothing is read faster in any order."""
        return 0, 0

    def files(self) -> tuple[Path, ...]:
        """Those of the model that it is drawn for."""
        return self.checkpoint.files()

    def view_of(self) -> str:
        """What is drawn, as a digest."""
        told = repr((self.part_of, self.style, self.checkpoint.view_of()))
        return hashlib.sha256(told.encode()).hexdigest()

    def close(self) -> None:
        """Nothing: the checkpoint is not this view's."""
