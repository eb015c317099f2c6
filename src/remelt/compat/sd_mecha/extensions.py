"""``sd_mecha.extensions``: the model configs by name."""

from __future__ import annotations

from dataclasses import dataclass

from remelt.archs.arch import all_archs
from remelt.core.nearest import nearest_hint
from remelt.errors import RecipeError
from remelt.text.eras.methods import CONFIGS


@dataclass(frozen=True)
class ModelConfig:
    """A model config by its name in sd-mecha, and the arch that remelt knows it as."""

    identifier: str
    arch: str

    def components(self) -> tuple[str, ...]:
        """The names of its components."""
        return tuple(component.name for component in all_archs()[self.arch].components)


class _ModelConfigs:
    """The configs of models that keep their usual key names. Any other model is merged too, without a config."""

    def get_all(self) -> list[ModelConfig]:
        """All configs, in the order of their names."""
        return [ModelConfig(name, arch) for name, arch in sorted(CONFIGS.items())]

    def resolve(self, identifier: str) -> ModelConfig:
        """The config of a name; `RecipeError` where there is none."""
        if identifier not in CONFIGS:
            hint = nearest_hint(identifier, CONFIGS) or ", ".join(sorted(CONFIGS))
            raise RecipeError(f"no model config is named {identifier!r}", hint=hint)
        return ModelConfig(identifier, CONFIGS[identifier])


model_configs = _ModelConfigs()
