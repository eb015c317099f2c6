"""Results that are mixtures of experts: whether all their parts are there and fit, and their configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from remelt.api.mixture_views import (
    GATE,
    SHARED_EXPERT_GATE,
    Style,
    family_of,
    is_whole,
    read_config,
)
from remelt.check.inputs import Input
from remelt.core.tensor_info import TensorInfo
from remelt.errors import Problem, RecipeError
from remelt.recipe.mixture import BASE, DRAWN, EXPERT, ROUTER, SHARED
from remelt.recipe.node import MixturePart

_LAYER = re.compile(r"((?:.*\.)?layers\.\d+)\.(.+)")
_WITHOUT_A_PLACE = {
    "mixtral": re.compile(r".*self_attn\.(?:[qkvo]_proj\.bias|[qk]_norm\.weight)"),
    "qwen2_moe": re.compile(r".*self_attn\.(?:o_proj\.bias|[qk]_norm\.weight)"),
}
_ROPE = ("rope_theta", "rope_parameters")
_USUAL = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"vocab_size": 151936, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"vocab_size": 151936, "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}
"""What a configuration means that leaves these out: a mixture's kind has other defaults."""
_DENSE_ONLY = ("mlp_bias", "pretraining_tp", "auto_map")
_ARCHITECTURES = {
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


class Assembled:
    """A mixture of experts, held against what its parts have to be."""

    def __init__(self, style: Style, inputs: Sequence[Input], tensors: Mapping[str, TensorInfo]) -> None:
        self.style, self.tensors = style, tensors
        self.inputs = [given for given in inputs if given.model.part is not None]
        self.base = self.of(BASE)
        self.layers: dict[str, None] = {}
        for key in tensors:
            found = _LAYER.fullmatch(key)
            if found is not None and not found[2].startswith(f"{style.block}."):
                self.layers.setdefault(found[1])
        self.whole: MixturePart = self.base.model.part  # type: ignore[assignment]

    def of(self, *roles: str, number: int = 0) -> Input:
        """The first model that a part is made of; the base where there is none."""
        alike = [given for given in self.inputs if given.model.part.role in roles]  # type: ignore[union-attr]
        found = [given for given in alike if given.model.part.number == number and is_whole(given)]  # type: ignore[union-attr]
        return next(iter(found or alike or self.inputs))

    def problems(self) -> Iterator[Problem]:
        """What is missing, too much, or of another shape: one problem for each part."""
        strange = _WITHOUT_A_PLACE.get(self.style.name)
        odd = next((key for key in self.tensors if strange is not None and strange.fullmatch(key)), None)
        if odd is not None:
            yield self._problem(self.base, f"has {odd}, for which a {self.style.name} has no place")
        if not self.layers:
            yield self._problem(self.base, "has no layers that are named as Llama's: model.layers.0 and so on")
            return
        first = self.of(EXPERT)
        width, inner = self.hidden(), self.inner()
        for number in range(self.whole.experts):
            given = self.of(EXPERT, number=number)
            yield from self._of_mlps(given, first, number, width, inner)
        if self.style.has_shared:
            yield from self._of_mlps(self.of(SHARED, BASE), first, None, width, self.inner(shared=True))
        yield from self._of_router(width)

    def _of_mlps(
        self, given: Input, first: Input, number: int | None, width: int, inner: int | None
    ) -> Iterator[Problem]:
        """The first thing that is wrong with the matrices of one expert."""
        wanted = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
        for layer in self.layers:
            for name, shape in wanted.items():
                key = self.key(layer, number, name)
                info = self.tensors.get(key)
                if info is None:
                    yield self._problem(given, f"has no {layer}.mlp.{name}.weight, which is to be {key}")
                    return
                if info.shape == shape:
                    continue
                has = f"has a {layer}.mlp.{name}.weight of {list(info.shape)}"
                if width not in info.shape:
                    yield self._problem(given, f"{has}, but {self.base.label} has hidden states of {width} numbers")
                else:
                    yield self._problem(given, f"{has}, but that of {first.label} is {list(shape)}", _ONE_SHAPE)
                return
        block = re.escape(self.key("", number, "gate_proj").removesuffix("gate_proj.weight").removesuffix("w1.weight"))
        pattern = re.compile(rf"(.*layers\.\d+){block}.+")
        more = {found[1] for key in self.tensors if (found := pattern.fullmatch(key))} - set(self.layers)
        if more:
            counts = f"{len(self.layers) + len(more)} layers, but {self.base.label} has {len(self.layers)}"
            yield self._problem(given, f"has {counts}", f"layers(model, 0, {len(self.layers)}) reads as many")

    def _of_router(self, width: int) -> Iterator[Problem]:
        given = self.of(ROUTER, *DRAWN)
        gates = [(GATE, self.whole.experts)] + ([(SHARED_EXPERT_GATE, 1)] if self.style.has_shared else [])
        for name, rows in gates:
            for layer in self.layers:
                info = self.tensors.get(self.style.gate(layer, name))
                if info is None:
                    yield self._problem(given, f"has no {name} for {layer}", "a router has one for each layer")
                    return
                if info.shape != (rows, width):
                    have = f"has a {name} of {list(info.shape)} for {layer}"
                    yield self._problem(given, f"{have}, but {rows} experts of {width} numbers need {[rows, width]}")
                    return

    def key(self, layer: str, number: int | None, projection: str) -> str:
        """The key of one matrix of an expert, or of the shared one."""
        return self.style.shared(layer, projection) if number is None else self.style.expert(layer, number, projection)

    def hidden(self) -> int:
        """The width of hidden states: that of the base's norms."""
        for layer in self.layers:
            info = self.tensors.get(f"{layer}.input_layernorm.weight")
            if info is not None and info.shape:
                return info.shape[0]
        gates = [self.tensors.get(self.style.gate(layer)) for layer in self.layers]
        return next((info.shape[-1] for info in gates if info is not None and info.shape), 0)

    def inner(self, *, shared: bool = False) -> int | None:
        """The width inside the experts, as the first one has it."""
        info = self.tensors.get(self.key(next(iter(self.layers)), None if shared else 0, "gate_proj"))
        return None if info is None or not info.shape else info.shape[0]

    def _problem(self, given: Input, message: str, hint: str | None = None) -> Problem:
        return Problem(given.label, message, hint, given.model.span)

    def configured(self, companions: Sequence[tuple[Path | bytes, str]], name: str) -> list[tuple[Path | bytes, str]]:
        """The small files beside the result, with a configuration that tells of the experts."""
        return [(self._config(content) if one == name else content, one) for content, one in companions]

    def _config(self, content: Path | bytes) -> bytes:
        told = read_config(content)
        family = str(told.get("model_type", family_of(self.base)))
        left = {name: value for name, value in told.items() if name not in _DENSE_ONLY}
        made = {**_USUAL, **_DEFAULTS.get(family, {}), **left}
        made.setdefault("num_key_value_heads", made["num_attention_heads"])
        if not any(made.get(name) is not None for name in _ROPE):
            made["rope_theta"] = 10000.0
        made |= {"architectures": [_ARCHITECTURES[self.style.name]], "model_type": self.style.name}
        made |= {"num_experts_per_tok": self.whole.per_token, "output_router_logits": False}
        inner = self.inner()
        if self.style.name == "mixtral":
            made |= {"num_local_experts": self.whole.experts, "intermediate_size": inner}
            made.pop("attention_bias", None)
        else:
            made |= {"num_experts": self.whole.experts, "moe_intermediate_size": inner, "norm_topk_prob": True}
            made |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
            made |= _windows(made, family, self.style, self.base.label)
        if self.style.has_shared:
            made["shared_expert_intermediate_size"] = self.inner(shared=True)
            made["qkv_bias"] = any(key.endswith("self_attn.q_proj.bias") for key in self.tensors)
            made.pop("attention_bias", None)
        return (json.dumps(made, indent=2) + "\n").encode()


_ONE_SHAPE = "the experts of a mixture are of one shape"


def _windows(told: Mapping[str, Any], family: str, style: Style, label: str) -> dict[str, Any]:
    """Which layers attend in a window, as Qwen's configurations say it."""
    window, count = told.get("sliding_window"), told["num_hidden_layers"]
    sliding = family == "mistral" if family not in ("qwen2", "qwen3") else bool(told.get("use_sliding_window", False))
    if window is None or not sliding:
        return {"use_sliding_window": False}
    first = 0 if family == "mistral" else told.get("max_window_layers", 28)
    usual = ["sliding_attention" if layer >= first else "full_attention" for layer in range(count)]
    types = told.get("layer_types") or usual
    if style.name == "qwen2_moe":
        return {"use_sliding_window": True, "layer_types": types}
    if len(set(types)) > 1:
        raise RecipeError(
            f"{label} attends in a window of {window} tokens in {types.count('sliding_attention')} of {count} layers, "
            f"which a {style.name} cannot: it does so in all or in none",
            hint='"use_sliding_window": false in its configuration, for texts that are no longer',
        )
    return {"use_sliding_window": types[0] == "sliding_attention"}
