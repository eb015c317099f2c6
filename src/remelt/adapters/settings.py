"""What an adapter's configuration says of its scale: PEFT's file beside it, or what trainers write into the header."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from remelt.core.tensor_info import TensorInfo
from remelt.errors import AdapterError

CONFIG = "adapter_config.json"
_DIFFUSERS = "lora_adapter_metadata"
_KOHYA = "ss_network_args"
_RANKS = ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
"""Parts whose first dimension is the rank."""
_WHOLE = "lokr_w"
"""Parts that PEFT scales by its rank even where they are matrices, and none of factors."""
_OF_PEFT = "base_model.model."
_OPTIONS = (
    *("fan_in_fan_out", "feedforward_modules", "block_share", "coft", "eps"),
    *("use_cayley_neumann", "num_cayley_neumann_terms"),
)


@dataclass(frozen=True)
class Settings:
    """Configurations by the component that they are of; the empty name is of all."""

    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rank_stabilised: bool = False
    """Whether a trainer says that alpha is to be divided by the root of the rank."""

    @staticmethod
    def of(path: Path | None, metadata: Mapping[str, str]) -> Settings:
        """What is known of an adapter file or folder; `AdapterError` for a configuration that cannot be read."""
        configs: dict[str, dict[str, Any]] = {}
        beside = None if path is None else (path if path.is_dir() else path.parent) / CONFIG
        if beside is not None and beside.is_file():
            configs[""] = _parsed(beside.read_text(encoding="utf-8", errors="replace"), CONFIG)
        for name, value in _parsed(metadata.get(_DIFFUSERS, "{}"), _DIFFUSERS).items():
            component, _, setting = name.rpartition(".") if "." in name else ("", "", name)
            configs.setdefault(component, {})[setting] = value
        arguments = _parsed(metadata.get(_KOHYA) or "{}", _KOHYA)
        return Settings(configs, str(arguments.get("rs_lora", False)).lower() in ("true", "1"))

    def scale(self, module: str, infos: Mapping[str, TensorInfo], alpha: float | None) -> float | None:
        """What the product of a module's factors is multiplied by; None where its parts alone say it.

        ``alpha`` is that of the file, which counts before a configuration's.
        """
        rank: object = next((infos[part].shape[0] for part in _RANKS if part in infos and infos[part].shape), None)
        if alpha is not None:
            return alpha / math.sqrt(rank) if self.rank_stabilised and isinstance(rank, int) and rank else None
        config, path = self._config(module)
        told = _by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", config.get("alpha")))
        if rank is None and any(part.startswith(_WHOLE) for part in infos):
            rank = _by_pattern(config.get("rank_pattern"), path, config.get("r"))
        if not _is_number(told) or not _is_number(rank) or rank <= 0:
            return None
        return told / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def options(self, module: str) -> dict[str, object]:
        """Other facts of a configuration that a kind of adapter may ask for."""
        config, _ = self._config(module)
        return {name: config[name] for name in _OPTIONS if config.get(name) is not None}

    def _config(self, module: str) -> tuple[Mapping[str, Any], str]:
        """The configuration that a module is under, and its path as that has it."""
        for component, config in self.configs.items():
            if component and module.startswith(f"{component}."):
                return config, module.removeprefix(f"{component}.")
        return self.configs.get("", {}), module.removeprefix(_OF_PEFT)


_LONGEST = 500
_ENDLESS = re.compile(r"[*+}]\??\)*[*+{]|\)[*+{]")
"""Repetitions within repetitions, by which a pattern of a file from anywhere could keep a program busy for ever."""


def _by_pattern(patterns: object, module: str, default: object) -> object:
    """The value of the first pattern that ends a module's name; `AdapterError` for one that could take for ever."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if len(pattern) > _LONGEST or _ENDLESS.search(pattern):
            raise AdapterError(
                f"a pattern of its configuration repeats what repeats, or is long: {pattern[:80]!r}",
                hint="write it out by the names of the modules",
            )
        try:
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
                return value
        except re.error:
            continue
    return default


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _parsed(text: str, name: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            f"its {name} is no JSON: {error}", hint="take it from where the adapter came from, or remove it"
        ) from error
    if not isinstance(found, dict):
        raise AdapterError(f"its {name} is no JSON object, but a {type(found).__name__}")
    return found
