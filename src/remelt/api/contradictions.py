"""Configurations that contradict each other, or the tensors beside them: what is merged would not be one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from remelt.api.configurations import CONFIG, read_json
from remelt.archs.structure import infer
from remelt.check.inputs import Input
from remelt.core.tensor_info import TensorInfo
from remelt.errors import Problem
from remelt.recipe.mixture import BASE

_HIDDEN, _HEADS, _KEY_HEADS, _HEAD = "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"
_VOCABULARY, _LAYERS, _PREDICTING = "vocab_size", "num_hidden_layers", "num_nextn_predict_layers"
_LANGUAGE = ("text_config", "language_config", "llm_config")
_PROJECTED = frozenset({"word_embed_proj_dim", "embedding_size"})
"""Set where embeddings have a width of their own."""
_DECIDING = (_HEADS, _KEY_HEADS, _HEAD, "hidden_act", "hidden_activation", "num_experts_per_tok")
"""What a model computes with tensors of the same shapes: where two differ in it, so do their weights in meaning."""
_WEIGHING = ("rope_theta", "rope_parameters", "rope_scaling", "sliding_window", "rms_norm_eps", "layer_types")
"""Where models differ in these, a merge may still work."""
_PLAIN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt_oss", "mixtral")
"""Models whose projections have as many rows as their heads need, no more and no fewer."""

_Told = tuple[Input, dict[str, Any]]


def contradictions(inputs: Sequence[Input]) -> Iterator[Problem]:
    """What cannot be true at once: of a model's configuration and its tensors, or of two models'."""
    told = _told(inputs)
    for given, config in told:
        is_view = given.model.layers is not None or given.model.vocabulary is not None
        for fact in _of_tensors(config, {} if is_view else given.checkpoint.tensors):
            hint = f"one of the two is not this model's: correct its {CONFIG}, or download its weights again"
            yield Problem(given.label, fact, hint, given.model.span)
    for (first, one), (given, other) in _pairs(told):
        for name in _DECIDING:
            if _differ(one.get(name), other.get(name)):
                message = f"has {name} {other[name]} in its {CONFIG}, but {first.label} has {one[name]}"
                hint = "tensors of the same shapes mean other things in the two: they cannot be merged"
                yield Problem(given.label, message, hint, given.model.span)


def differences(inputs: Sequence[Input]) -> Iterator[str]:
    """Where configurations differ so that a merge may work, or not: the result goes by the first."""
    for (first, one), (given, other) in _pairs(_told(inputs)):
        for name in _WEIGHING:
            if given.model.layers is None and _differ(one.get(name), other.get(name)):
                yield f"{given.label} has {name} {other[name]}, but {first.label} {one[name]}, as the result will have"


def _told(inputs: Sequence[Input]) -> list[_Told]:
    """The models that have a configuration; experts of a mixture are held against it by what they give it."""
    whole = [given for given in inputs if given.model.part is None or given.model.part.role == BASE]
    return [(given, found) for given in whole if (found := _configuration_of(given)) is not None]


def _configuration_of(given: Input) -> dict[str, Any] | None:
    """What the configuration in a model's folder says of its language model; None where there is none."""
    path = given.checkpoint.path
    if path is None or given.adapter is not None or not path.is_dir() or not (path / CONFIG).is_file():
        return None
    told = read_json(path / CONFIG)
    parts = [told, *[told[name] for name in _LANGUAGE if isinstance(told.get(name), dict)]]
    return next((one for one in parts if _HEADS in one and _HIDDEN in one), None)


def _pairs(told: Sequence[_Told]) -> Iterator[tuple[_Told, _Told]]:
    """The first model of a kind with each further one: models of other kinds are told apart by their keys."""
    firsts: dict[str, _Told] = {}
    for one in told:
        first = firsts.setdefault(str(one[1].get("model_type")), one)
        if first is not one:
            yield first, one


def _differ(one: Any, other: Any) -> bool:
    return one is not None and other is not None and one != other


def _of_tensors(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """What a configuration says otherwise than the tensors do; only where a key can mean one thing."""
    embeddings = [key for key in tensors if key.endswith("embed_tokens.weight") and len(tensors[key].shape) == 2]
    if len(embeddings) == 1:
        rows, width = tensors[embeddings[0]].shape
        vocabulary, hidden = config.get(_VOCABULARY), config[_HIDDEN]
        if type(vocabulary) is int and rows != vocabulary:
            yield f"has {_VOCABULARY} {vocabulary} in its {CONFIG}, but {embeddings[0]} has {rows} rows"
        if type(hidden) is int and _PROJECTED.isdisjoint(config) and width != hidden:
            yield f"has {_HIDDEN} {hidden} in its {CONFIG}, but {embeddings[0]} is {width} wide"
    stacks = infer(tensors).stacks
    stack = next((stack for stack in stacks if stack.endswith("model.layers") or stack == "layers"), None)
    if stack is None:
        return
    count, more = config.get(_LAYERS), config.get(_PREDICTING) or 0
    if type(count) is int and not count <= len(stacks[stack]) <= count + more:
        yield f"has {_LAYERS} {count} in its {CONFIG}, but {stack} has {len(stacks[stack])}"
    if config.get("model_type") in _PLAIN:
        yield from _of_heads(config, tensors, f"{stack}.0.self_attn")


def _of_heads(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], attention: str) -> Iterator[str]:
    heads, hidden, size = config[_HEADS], config[_HIDDEN], config.get(_HEAD)
    if type(heads) is not int or type(hidden) is not int or heads < 1:
        return
    size = size if type(size) is int else hidden // heads
    for projection, name in (("q_proj", _HEADS), ("k_proj", _KEY_HEADS)):
        key, number = f"{attention}.{projection}.weight", config.get(name)
        info = tensors.get(key)
        if info is not None and len(info.shape) == 2 and type(number) is int and info.shape[0] != number * size:
            yield f"has {name} {number} in its {CONFIG}, of {size} rows each, but {key} has {info.shape[0]}"
