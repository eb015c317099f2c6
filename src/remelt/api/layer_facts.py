"""What a configuration tells of each layer: as a list, as the numbers of some layers, or by a rule of its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from remelt.errors import RecipeError

_TYPES, _DENSE, _DENSE_FIRST, _STEP = "layer_types", "mlp_only_layers", "first_k_dense_replace", "decoder_sparse_step"
_NO_LISTS = ("architectures", "_token_id", "_token_ids")
_SLIDING, _FULL, _LINEAR = "sliding_attention", "full_attention", "linear_attention"
_PATTERNS = ("sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval")
_USUAL = {
    **dict.fromkeys(("gemma2", "gpt_oss"), (_SLIDING, 2)),
    **dict.fromkeys(("gemma3", "gemma3_text"), (_SLIDING, 6)),
    **dict.fromkeys(("cohere2", "olmo3", "exaone4"), (_SLIDING, 4)),
    "qwen3_next": (_LINEAR, 4),
}
"""Models of which each layer of that number has full attention and others not, where no list says so."""
_WINDOWED = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")
"""Models whose layers have a window from ``max_window_layers`` on, where they use one."""


def layer_facts(told: Mapping[str, Any], count: int) -> dict[str, list[Any]]:
    """What a configuration says of each of so many layers, by name.

    >>> layer_facts({"model_type": "gpt_oss", "num_hidden_layers": 3}, 3)
    {'layer_types': ['sliding_attention', 'full_attention', 'sliding_attention']}
    """
    found = {
        name: list(value)
        for name, value in told.items()
        if isinstance(value, list) and len(value) == count and not name.endswith(_NO_LISTS) and name != _DENSE
    }
    types = None if _TYPES in found else _types_by_rule(told, count)
    if types is not None:
        found[_TYPES] = types
    first, step = told.get(_DENSE_FIRST), told.get(_STEP)
    if type(first) is int:
        found[_DENSE_FIRST] = [number < first for number in range(count)]
    if isinstance(told.get(_DENSE), list) or (type(step) is int and step > 1):
        dense, every = told.get(_DENSE) or [], step if type(step) is int else 1
        found[_DENSE] = [number in dense or (number + 1) % every != 0 for number in range(count)]
    return found


def tell_layers(told: dict[str, Any], facts: Mapping[str, Sequence[Any]]) -> None:
    """Have a configuration say that of its layers.

    Raises `RecipeError` where it can only say that the first layers are dense, and others are.
    """
    for name, values in facts.items():
        if name == _DENSE:
            _tell_dense(told, values)
        elif name == _DENSE_FIRST:
            _tell_dense_first(told, values)
        else:
            told[name] = list(values)


def _tell_dense(told: dict[str, Any], dense: Sequence[bool]) -> None:
    told[_DENSE] = [number for number, one in enumerate(dense) if one]
    if _STEP in told:
        told[_STEP] = 1


def _tell_dense_first(told: dict[str, Any], dense: Sequence[bool]) -> None:
    first = dense.index(False) if False in dense else len(dense)
    if any(dense[first:]):
        numbers = ", ".join(str(number) for number, one in enumerate(dense) if one)
        raise RecipeError(
            f"layers {numbers} of the stack have no experts, but a configuration with {_DENSE_FIRST} can say that only "
            "of the first ones",
            hint="take the layers without experts at the beginning alone",
        )
    told[_DENSE_FIRST] = first


def _types_by_rule(told: Mapping[str, Any], count: int) -> list[str] | None:
    """The kind of attention of each layer, where a model's rule says it and no list does."""
    kind = told.get("model_type")
    if told.get(_TYPES) is not None or not isinstance(kind, str):
        return None
    if kind in _WINDOWED:
        begins = told.get("max_window_layers")
        if not told.get("use_sliding_window") or told.get("sliding_window") is None or type(begins) is not int:
            return None
        return [_SLIDING if number >= begins else _FULL for number in range(count)]
    if kind not in _USUAL:
        return None
    other, usual = _USUAL[kind]
    every = next((told[name] for name in _PATTERNS if type(told.get(name)) is int and told[name] > 0), usual)
    return [other if (number + 1) % every else _FULL for number in range(count)]
