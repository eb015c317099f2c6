"""``sd_mecha.extensions``: the model configs by name."""

from __future__ import annotations

from dataclasses import dataclass

from remelt.archs.arch import all_archs
from remelt.compat.sd_mecha.recipes import UNREAD
from remelt.core.nearest import nearest_hint
from remelt.errors import RecipeError
from remelt.text.eras.methods import CONFIGS


@dataclass(frozen=True)
class ModelConfig:
    """A model config by its name in sd-mecha, and the arch that remelt knows it as, if any."""

    identifier: str
    arch: str | None

    def components(self) -> tuple[str, ...]:
        """The names of its components; `RecipeError` where remelt does not read such models."""
        if self.arch is None:
            raise RecipeError(f"the model config {self.identifier!r} is not read", hint=UNREAD[self.identifier])
        return tuple(component.name for component in all_archs()[self.arch].components)


class _ModelConfigs:
    """The configs that sd-mecha 1.1.8 has. Any other model is merged too, without a config."""

    def get_all(self) -> list[ModelConfig]:
        """All configs, in the order of their names; those that remelt does not read have no arch."""
        return [ModelConfig(name, CONFIGS.get(name)) for name in sorted((*CONFIGS, *UNREAD))]

    def resolve(self, identifier: str) -> ModelConfig:
        """The config of a name; `RecipeError` where there is none."""
        if identifier not in CONFIGS and identifier not in UNREAD:
            hint = nearest_hint(identifier, (*CONFIGS, *UNREAD)) or ", ".join(sorted((*CONFIGS, *UNREAD)))
            raise RecipeError(f"no model config is named {identifier!r}", hint=hint)
        return ModelConfig(identifier, CONFIGS.get(identifier))


model_configs = _ModelConfigs()
