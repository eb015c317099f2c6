"""Routers made of prompts: what the base makes of texts that each expert is meant for, as the rows of its gates."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remelt.api.mixture_views import GATE, SHARED_EXPERT_GATE, Style
from remelt.api.options import PathLike
from remelt.api.resources import refuse_device
from remelt.core.dtype import DType
from remelt.core.nearest import nearest_hint
from remelt.errors import FormatError, MissingExtraError, OptionError, OutputError, RecipeError
from remelt.formats.checkpoint import Checkpoint, open_checkpoint
from remelt.formats.locate import locate_model, models_folders
from remelt.text.configuration import Configuration
from remelt.text.mergekit import is_named_as_yaml
from remelt.text.source import SourceText

if TYPE_CHECKING:
    from torch import Tensor

MODES = ("hidden", "hidden_last", "hidden_avg", "cheap_embed")
ROUTER_KEY = "remelt_router"
"""In the file's metadata: the prompts that it was made of, and how."""
_EMBEDDING = re.compile(r"(?:.*\.)?embed_tokens\.weight")
_LAYER = re.compile(r"((?:.*\.)?layers\.\d+)\.input_layernorm\.weight")
_SIDES = ("positive_prompts", "negative_prompts")
_OF_EXPERTS = (*_SIDES, "source_model", "noise_scale", "residual_scale")
_FILE = '{"experts": [{"positive_prompts": ["..."]}, ...]}'
_ALIKE = 5.0
_LARGEST = 2**26
_FLOATS = (DType.F32, DType.F16, DType.BF16)


@dataclass(frozen=True)
class Prompts:
    """Texts that are meant for an expert, and texts that are not."""

    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()


@dataclass
class RouterReport:
    """What was written: where, for how many experts, and the layers whose rows are hardly different."""

    path: Path
    experts: int
    layers: int
    width: int
    alike: list[str] = field(default_factory=list)


def make_router(
    base: PathLike,
    prompts: PathLike | Mapping[str, Any],
    output: PathLike,
    *,
    mode: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    models_dirs: Sequence[PathLike] = (),
) -> RouterReport:
    """Write the router that prompts make for a mixture of experts around a base, as a model for `mixture_of_experts`.

    ``base`` is a folder of transformers, with its tokenizer. ``prompts`` is a JSON file, a configuration of
    mergekit-moe, or a mapping like them: a list ``experts``, each with ``positive_prompts`` and, if any,
    ``negative_prompts``; ``shared_experts`` may have one more. A row of a layer's gate is what the prompts are on
    average before that layer, less what the negative ones are, at length 1: the hidden state of the last token
    (``mode`` "hidden"), the mean of all tokens ("hidden_avg"), or the mean of their embeddings, the same for each
    layer, for which nothing is run ("cheap_embed"). Gates have the element type of the base's embeddings.

    Raises `RecipeError` for prompts that make no router, `MissingExtraError` without the extra ``router``,
    `OutputError` for a file that exists.

    Source: mergekit-moe; each prompt runs by itself, so that none is padded.
    """
    told = prompts if isinstance(prompts, Mapping) else _read(Path(prompts))
    name = "the prompts" if isinstance(prompts, Mapping) else Path(prompts).name
    experts, shared = read_prompts(told, name)
    mode = mode if mode is not None else _mode_of(told, name)
    if mode not in MODES:
        raise OptionError(f"the mode of a router is one of {', '.join(MODES)}, but got {mode!r}", hint=_near(mode))
    refuse_device(device)
    out = Path(output)
    out = out if out.suffix == ".safetensors" else out.with_name(f"{out.name}.safetensors")
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists", hint="--overwrite replaces it")
    folder = locate_model(os.fspath(base), models_folders([Path(one) for one in models_dirs]))
    if not folder.is_dir():
        raise RecipeError(f"{folder.name} is a file, but its tokenizer is asked for", hint="give the model's folder")
    with open_checkpoint(folder) as checkpoint:
        state = _embedded(checkpoint, folder) if mode == "cheap_embed" else _run(folder, mode, device)
        unit = mode == "cheap_embed"
        rows = [_row(state, one, unit=unit) for one in experts]
        own = None if shared is None else _row(state, shared, unit=unit)
        report, gates = _gates(checkpoint, rows, own, out)
    metadata = {"format": "pt", ROUTER_KEY: _told(folder, mode, experts, shared)}
    _write(gates, metadata, out)
    return report


def read_prompts(told: Mapping[str, Any], name: str) -> tuple[list[Prompts], Prompts | None]:
    """The prompts of each expert, and those of the shared one; `RecipeError` for what makes no router."""
    listed, shared = told.get("experts"), told.get("shared_experts") or []
    if not isinstance(listed, list) or len(listed) < 2:
        raise RecipeError(f"{name} has no prompts for at least two experts", hint=f"it begins as {_FILE}")
    if not isinstance(shared, list) or len(shared) > 1:
        raise RecipeError(f"{name} has prompts for several shared experts, but a mixture has one")
    experts = [_prompts(one, f"expert {place} of {name}") for place, one in enumerate(listed)]
    if all(one == experts[0] for one in experts):
        raise RecipeError(
            f"{name} has the same prompts for all experts, which no router tells apart",
            hint="positive_prompts are texts of the kind that is meant for this expert",
        )
    of_shared = [_prompts(one, f"the shared expert of {name}") for one in shared if any(map(one.get, _SIDES))]
    return experts, next(iter(of_shared), None)


def _prompts(told: Any, label: str) -> Prompts:
    if not isinstance(told, dict):
        raise RecipeError(f"{label} is no mapping", hint=f"the file begins as {_FILE}")
    unknown = next((str(name) for name in told if name not in _OF_EXPERTS), None)
    if unknown is not None:
        raise RecipeError(f"{label} has {unknown!r}, which is not known", hint=nearest_hint(unknown, _OF_EXPERTS))
    sides = []
    for side in _SIDES:
        texts = told.get(side) or []
        if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
            raise RecipeError(f"{label}: {side} are a list of texts, but got {texts!r}")
        sides.append(tuple(texts))
    if not sides[0]:
        raise RecipeError(f"{label} has no positive_prompts", hint="give it a text or more that are meant for it")
    return Prompts(*sides)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > _LARGEST:
            raise RecipeError(f"{path.name} is larger than 64 MiB, which no prompts are")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path.name} cannot be read: {error}") from None
    if is_named_as_yaml(path.name):
        return dict(Configuration(SourceText(text, path.name)).told or {})
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path.name} is no JSON: {error}", hint="a name ending in .yml is read as YAML") from None
    if not isinstance(told, dict):
        raise RecipeError(f"{path.name} is no JSON object", hint=f"it begins as {_FILE}")
    return told


def _mode_of(told: Mapping[str, Any], name: str) -> str:
    """The mode that a configuration of mergekit-moe says."""
    mode = told.get("gate_mode", MODES[0])
    if mode in ("random", "uniform_random"):
        raise RecipeError(
            f"{name} asks for a router of random numbers, which needs no prompts",
            hint=f'mixture_of_experts(..., router="{mode}"), or a mode',
        )
    return str(mode)


def _near(mode: str) -> str | None:
    return nearest_hint(mode, MODES)


State = Callable[[str], "Tensor"]


def _row(state: State, prompts: Prompts, *, unit: bool) -> Tensor:
    """A row for each layer, of length 1; where it is a sum of embeddings, both sides are of that length before."""
    import torch

    sides = []
    for texts in filter(None, (prompts.positive, prompts.negative)):
        side = torch.stack([state(text) for text in texts]).mean(0)
        sides.append(_of_length_1(side) if unit else side)
    return _of_length_1(sides[0] if len(sides) == 1 else sides[0] - sides[1])


def _of_length_1(rows: Tensor) -> Tensor:
    scaled: Tensor = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    return scaled


def _tokenizer(folder: Path) -> Callable[[str], list[int]]:
    """A prompt's tokens, the first of which begins a text, where the tokenizer has such a token."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtraError(
            f"making a router of prompts needs {error.name}", hint='pip install "remelt[router]"'
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"transformers reads no tokenizer in {folder}: {error}") from error
    begin = tokenizer.bos_token or ""

    def tokens(text: str) -> list[int]:
        found = tokenizer(begin + text, add_special_tokens=False)["input_ids"]
        if not found:
            raise RecipeError(f"the prompt {text!r} has no tokens")
        return [int(token) for token in found]

    return tokens


def _run(folder: Path, mode: str, device: str) -> State:
    """What a model makes of a prompt: for each layer, the hidden state before it of the last token, or of all."""
    tokens = _tokenizer(folder)
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).to(device).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise FormatError(
            f"transformers runs no model of {folder}: {error}", hint="--mode cheap_embed runs none"
        ) from error

    def state(text: str) -> Tensor:
        with torch.inference_mode():
            given = torch.tensor([tokens(text)], device=device)
            run = model(input_ids=given, output_hidden_states=True, use_cache=False)
            layers = torch.stack([one[0].float() for one in run.hidden_states[:-1]])
            return (layers.mean(1) if mode == "hidden_avg" else layers[:, -1]).cpu()

    return state


def _embedded(checkpoint: Checkpoint, folder: Path) -> State:
    """The sum of a prompt's embeddings, of which only the rows that are needed are read; the same for each layer."""
    tokens = _tokenizer(folder)
    import torch

    from remelt.tensors import tensor_over

    key = _embedding_of(checkpoint)
    info = checkpoint.tensors[key]
    width = info.nbytes // info.shape[0]

    def state(text: str) -> Tensor:
        found = []
        for token in tokens(text):
            if token >= info.shape[0]:
                raise RecipeError(f"{folder.name} has {info.shape[0]} rows in {key}, but a token {token}")
            row = checkpoint.read(key, token * width, (token + 1) * width)
            found.append(tensor_over(row, info.dtype).float())
        return torch.stack(found).sum(0)[None]

    return state


def _embedding_of(checkpoint: Checkpoint) -> str:
    key = next(filter(_EMBEDDING.fullmatch, checkpoint.tensors), None)
    if key is None or len(checkpoint.tensors[key].shape) != 2 or not checkpoint.tensors[key].dtype.is_float:
        raise RecipeError("the base has no embed_tokens.weight with a row for each token")
    return key


def _gates(
    checkpoint: Checkpoint, rows: Sequence[Tensor], shared: Tensor | None, out: Path
) -> tuple[RouterReport, dict[str, Tensor]]:
    """The tensors of a router, and what is told of it."""
    import torch

    from remelt.tensors import TORCH

    names = [found[1] for key in checkpoint.tensors if (found := _LAYER.fullmatch(key)) is not None]
    names.sort(key=lambda name: int(name.rpartition(".")[2]))
    states = len(rows[0])
    if not names or states not in (1, len(names)):
        raise RecipeError(f"the base has {len(names)} layers that are named as Llama's, but {states} hidden states")
    stored = checkpoint.tensors[_embedding_of(checkpoint)].dtype
    dtype = TORCH[stored if stored in _FLOATS else DType.F32]
    style = Style("qwen2_moe")  # whose names those of other styles are made of where a mixture reads them
    report = RouterReport(out, len(rows), len(names), rows[0].shape[-1])
    gates: dict[str, Tensor] = {}
    for place, layer in enumerate(names):
        at = min(place, states - 1)
        gate = torch.stack([row[at] for row in rows])
        if float(torch.linalg.cond(gate)) > _ALIKE:
            report.alike.append(layer)
        gates[style.gate(layer, GATE)] = gate.to(dtype).contiguous()
        if shared is not None:
            gates[style.gate(layer, SHARED_EXPERT_GATE)] = (
                shared[at][None].to(dtype).clone()
            )  # the layers may share one
    return report, gates


def _told(folder: Path, mode: str, experts: Sequence[Prompts], shared: Prompts | None) -> str:
    listed = [{side: getattr(one, side.partition("_")[0]) for side in _SIDES} for one in experts]
    told: dict[str, Any] = {"base": folder.name, "mode": mode, "experts": listed}
    if shared is not None:
        told["shared_experts"] = [{side: getattr(shared, side.partition("_")[0]) for side in _SIDES}]
    return json.dumps(told, ensure_ascii=False)


def _write(gates: Mapping[str, Tensor], metadata: dict[str, str], out: Path) -> None:
    """Write a small file, which takes its name once it is complete."""
    from safetensors.torch import save

    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(save(dict(gates), metadata))
        os.replace(partial, out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write {out}: {error.strerror}") from error
