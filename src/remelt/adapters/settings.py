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
WEIGHTS = "adapter_model"
"""The stem of the file that PEFT's configuration beside it speaks of."""
_DIFFUSERS = "lora_adapter_metadata"
_KOHYA, _KOHYA_ALPHA = "ss_network_args", "ss_network_alpha"
_RANKS = ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
"""Parts whose first dimension is the rank."""
_SQUARE = "a1.weight"
"""The part of a GLoRA that is rank by inputs, or the other way round."""
_WHOLE = "lokr_w"
"""Parts that PEFT scales by its rank even where they are matrices, and none of factors."""
_OF_PEFT = "base_model.model."
_ROUNDING = 2.0**-8
"""By how much an alpha may differ from what was set, as it is stored in the type of the factors."""
_OPTIONS = (
    *("fan_in_fan_out", "feedforward_modules", "block_share", "coft", "eps"),
    *("use_cayley_neumann", "num_cayley_neumann_terms"),
)
_RESIDUAL = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Ways to begin training in which PEFT takes a part of the model's weights away, to which the adapter is added then."""
_NO_DIFFERENCE = (
    *("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
    "layer_replication",
)


@dataclass(frozen=True)
class Settings:
    """Configurations by the component that they are of; the empty name is of all."""

    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    stabilised: tuple[float | None, float | None] | None = None
    """Alphas of linear layers and of convolutions that LyCORIS divided by the root of the rank, where it says so."""

    @staticmethod
    def of(path: Path | None, metadata: Mapping[str, str]) -> Settings:
        """What is known of an adapter file or folder; `AdapterError` for a configuration that cannot be read."""
        configs: dict[str, dict[str, Any]] = {}
        beside = None if path is None else path / CONFIG if path.is_dir() else path.with_name(CONFIG)
        spoken_of = path is not None and (path.is_dir() or path.name.startswith(WEIGHTS))
        if beside is not None and spoken_of and beside.is_file():
            configs[""] = _parsed(beside.read_text(encoding="utf-8", errors="replace"), CONFIG)
        for name, value in _parsed(metadata.get(_DIFFUSERS, "{}"), _DIFFUSERS).items():
            component, _, setting = name.rpartition(".") if "." in name else ("", "", name)
            configs.setdefault(component, {})[setting] = value
        for config in configs.values():
            _refuse_what_is_no_difference(config)
        return Settings(configs, _stabilised(metadata))

    def scale(self, module: str, infos: Mapping[str, TensorInfo], alpha: float | None) -> float | None:
        """What the product of a module's factors is multiplied by; None where its parts alone say it.

        ``alpha`` is that of the file, which counts before a configuration's.
        """
        rank: object = _rank(infos)
        if alpha is not None:
            return alpha / math.sqrt(rank) if isinstance(rank, int) and rank and self._is_as_set(alpha, infos) else None
        config, path = self._config(module)
        told = _by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", config.get("alpha")))
        if rank is None and any(part.startswith(_WHOLE) for part in infos):
            rank = _by_pattern(config.get("rank_pattern"), path, config.get("r"))
        if not _is_number(told) or not _is_number(rank) or rank <= 0:
            return None
        return told / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def _is_as_set(self, alpha: float, infos: Mapping[str, TensorInfo]) -> bool:
        """Whether an alpha was divided by the root of its rank: newer LyCORIS stores one that is to be by the rank."""
        if self.stabilised is None:
            return False
        linear, convolved = self.stabilised
        told = convolved if any(math.prod(info.shape[2:]) > 1 for info in infos.values()) else linear
        return told is not None and math.isclose(alpha, told, rel_tol=_ROUNDING)

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


def _rank(infos: Mapping[str, TensorInfo]) -> int | None:
    """The rank of a module's factors, where they have one."""
    if _SQUARE in infos and len(infos[_SQUARE].shape) > 1:
        return min(infos[_SQUARE].shape[:2])
    return next((infos[part].shape[0] for part in _RANKS if part in infos and infos[part].shape), None)


def _refuse_what_is_no_difference(config: Mapping[str, Any]) -> None:
    """Raise `AdapterError` for what PEFT adds to other weights than the model's own, or in other ways."""
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_RESIDUAL):
        raise AdapterError(
            f"its configuration says init_lora_weights {begun!r}: PEFT adds it to a model of which it took a part away",
            hint="save it from PEFT with path_initial_model_for_weight_conversion, which makes it a plain LoRA",
        )
    strange = [name for name in _NO_DIFFERENCE if config.get(name)]
    if strange:
        raise AdapterError(
            f"its configuration has {strange[0]}, with which it is no plain difference of the model's weights",
            hint="run it with PEFT",
        )


def _stabilised(metadata: Mapping[str, str]) -> tuple[float | None, float | None] | None:
    """The alphas that a trainer set, of linear layers and convolutions, where it divided them by roots of ranks.

    What is no object is no argument: trainers write ``None`` where there are none.
    """
    try:
        arguments = json.loads(metadata.get(_KOHYA) or "{}")
    except (ValueError, RecursionError):
        return None
    if not isinstance(arguments, dict) or str(arguments.get("rs_lora", False)).lower() not in ("true", "1"):
        return None
    linear = _number(metadata.get(_KOHYA_ALPHA))
    convolved = _number(arguments.get("conv_alpha"))
    return linear, linear if convolved is None else convolved


def _number(text: object) -> float | None:
    try:
        return float(str(text))
    except ValueError:
        return None


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
