"""Configurations that contradict each other, or the tensors beside them: what is merged would not be one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from remelt.api.configurations import CONFIG, parts_of, read_json
from remelt.archs.structure import infer
from remelt.check.inputs import Input
from remelt.core.tensor_info import TensorInfo
from remelt.errors import Problem

_HIDDEN, _HEADS, _KEY_HEADS, _HEAD = "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"
_VOCABULARY = "vocab_size"
_DECIDING = (
    _HEADS,
    _KEY_HEADS,
    _HEAD,
    "hidden_act",
    "hidden_activation",
    "num_experts_per_tok",
    "num_experts_per_token",
)
"""What a model computes with tensors of the same shapes: where two differ in it, so do their weights in meaning."""
_WEIGHING = ("rope_theta", "rope_parameters", "rope_scaling", "sliding_window", "rms_norm_eps", "layer_types")
"""Where models differ in these, a merge may still work."""
_PLAIN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt_oss", "mixtral")
"""Models whose projections have as many rows as their heads need, no more and no fewer."""
_REMEDY = f"one of the two is not this model's: correct {CONFIG}, or take the folder's own weights"


def contradictions(inputs: Sequence[Input]) -> Iterator[Problem]:
    """What cannot be true at once: of a model's configuration and its tensors, or of two models'."""
    told = [(given, found) for given in inputs if (found := configuration_of(given)) is not None]
    for given, config in told:
        tensors = (
            {} if given.model.layers is not None or given.model.vocabulary is not None else given.checkpoint.tensors
        )
        yield from (Problem(given.label, fact, _REMEDY, given.model.span) for fact in _of_tensors(config, tensors))
    for (first, one), (given, other) in _pairs(told):
        for name in _DECIDING:
            if name in one and name in other and _differ(one[name], other[name]):
                message = f"has {name} {other[name]} in its {CONFIG}, but {first.label} has {one[name]}"
                hint = "tensors of the same shapes mean other things in the two: they cannot be merged"
                yield Problem(given.label, message, hint, given.model.span)


def differences(inputs: Sequence[Input]) -> Iterator[str]:
    """Where configurations differ so that a merge may work, or not: the result goes by the first."""
    told = [(given, found) for given in inputs if (found := configuration_of(given)) is not None]
    for (first, one), (given, other) in _pairs(told):
        for name in _WEIGHING:
            if given.model.layers is None and name in one and name in other and _differ(one[name], other[name]):
                yield f"{given.label} has {name} {other[name]}, but {first.label} {one[name]}, which the result is told to have"


def configuration_of(given: Input) -> dict[str, Any] | None:
    """What the configuration in a model's folder says of its language model; None where there is none."""
    path = given.checkpoint.path
    if path is None or given.adapter is not None or not (path / CONFIG).is_file() or not path.is_dir():
        return None
    return next((one for one in parts_of(read_json(path / CONFIG)) if _HEADS in one and _HIDDEN in one), None)


def _pairs(
    told: Sequence[tuple[Input, dict[str, Any]]],
) -> Iterator[tuple[tuple[Input, dict[str, Any]], tuple[Input, dict[str, Any]]]]:
    """The first model of a kind with each further one: other kinds of models are told apart by their keys."""
    firsts: dict[object, tuple[Input, dict[str, Any]]] = {}
    for one in told:
        first = firsts.setdefault(one[1].get("model_type"), one)
        if first is not one:
            yield first, one


def _differ(one: Any, other: Any) -> bool:
    return one is not None and other is not None and one != other


def _of_tensors(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """What a configuration says otherwise than the tensors do; only where a key can mean one thing."""
    vocabulary, hidden = config.get(_VOCABULARY), config.get(_HIDDEN)
    embeddings = [key for key in tensors if key.endswith("embed_tokens.weight") and len(tensors[key].shape) == 2]
    if len(embeddings) == 1:
        rows, width = tensors[embeddings[0]].shape
        if type(vocabulary) is int and rows != vocabulary:
            yield f"has {_VOCABULARY} {vocabulary} in its {CONFIG}, but {embeddings[0]} has {rows} rows"
        if type(hidden) is int and width != hidden:
            yield f"has {_HIDDEN} {hidden} in its {CONFIG}, but {embeddings[0]} is {width} wide"
    stack = next(
        (stack for stack in infer(tensors).stacks if stack.endswith("model.layers") or stack == "layers"), None
    )
    if stack is None:
        return
    count, numbers = config.get("num_hidden_layers"), infer(tensors).stacks[stack]
    if type(count) is int and len(numbers) != count:
        yield f"has num_hidden_layers {count} in its {CONFIG}, but {stack} has {len(numbers)}"
    if config.get("model_type") in _PLAIN:
        yield from _of_heads(config, tensors, f"{stack}.0.self_attn")


def _of_heads(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], attention: str) -> Iterator[str]:
    heads, hidden = config.get(_HEADS), config.get(_HIDDEN)
    if type(heads) is not int or type(hidden) is not int or heads < 1:
        return
    size = config.get(_HEAD)
    size = size if type(size) is int else hidden // heads
    for key, name in (("q_proj", _HEADS), ("k_proj", _KEY_HEADS)):
        info, number = tensors.get(f"{attention}.{key}.weight"), config.get(name)
        if info is not None and len(info.shape) == 2 and type(number) is int and info.shape[0] != number * size:
            yield (
                f"has {name} {number} in its {CONFIG}, of {size} numbers each, but {attention}.{key}.weight has "
                f"{info.shape[0]} rows"
            )
