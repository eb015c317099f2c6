"""Numbers by U-Net block in a script: weights once the arch is known, and the number for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from remelt.api.inspection import inspect
from remelt.errors import RecipeError, RemeltError
from remelt.recipe.blocks import BlockWeights
from remelt.recipe.node import Model, Node
from remelt.recipe.walk import topological
from remelt.text.eras.blocks import BLOCK_CONFIGS, BlockNumbers


@dataclass(frozen=True)
class NumbersByBlock:
    """Numbers by the block names of sd-mecha 1, completed by ``| 0.5``; ``arch`` is None until it is known."""

    numbers: Mapping[str, float]
    arch: str | None = None

    def towards(self, arch: str | None) -> NumbersByBlock:
        """The same for models of an arch, where that is known."""
        if arch is not None and arch not in BLOCK_CONFIGS:
            known = ", ".join(BLOCK_CONFIGS)
            raise RecipeError(f"sd-mecha has no blocks for {arch}: it has those of {known}")
        if arch is not None and self.arch not in (None, arch):
            raise RecipeError(f"these numbers are by the blocks of {self.arch}, but the model is {arch}")
        return self if arch is None else replace(self, arch=arch)

    def __or__(self, other: object) -> BlockWeights | NumbersByBlock:
        if isinstance(other, NumbersByBlock):
            return NumbersByBlock({**other.numbers, **self.numbers}, self.arch or other.arch)
        if isinstance(other, (int, float)) and not isinstance(other, bool):
            return self.weights(float(other))
        return NotImplemented

    def weights(self, default: float | None = None) -> BlockWeights:
        """Today's weights; `RecipeError` where the arch is not known and makes a difference."""
        arch = self.arch or self._told()
        if arch is not None:
            return BlockNumbers(BLOCK_CONFIGS[arch], self.numbers).weights(default)
        found = [BlockNumbers(config, self.numbers).weights(default) for config in BLOCK_CONFIGS.values()]
        if found[0] != found[1]:
            raise RecipeError(
                "numbers by block mean other keys in SD1 than in SDXL, and the model's arch is not known",
                hint='state it, as in model(path, config="sd1-ldm"), or convert(numbers, "sdxl-sgm")',
            )
        return found[0]

    def _told(self) -> str | None:
        """The only arch that has all of the blocks."""
        having = [arch for arch, config in BLOCK_CONFIGS.items() if set(self.numbers) <= set(config.blocks)]
        if not having:  # told with the nearest name
            BlockNumbers(BLOCK_CONFIGS["sdxl" if "VAE" in self.numbers else "sd1"], self.numbers)
        return having[0] if len(having) == 1 else None


def arch_of(targets: Iterable[object], named: Callable[[object], str | None]) -> str | None:
    """The arch of configs, or of the models in recipes: as they state it, else as their files tell."""
    models: list[Model] = []
    for target in targets:
        if isinstance(target, str) or hasattr(target, "identifier"):
            return named(target)
        if isinstance(target, Node):
            models += [one for one in topological(target) if isinstance(one, Model)]
    stated = next((one.arch for one in models if one.arch is not None), None)
    return stated or next((arch for one in models if (arch := _arch_in_file(one)) in BLOCK_CONFIGS), None)


def _arch_in_file(model: Model) -> str | None:
    for path in (Path(model.name), Path(f"{model.name}.safetensors")):
        if model.tensors is None and path.is_file():
            try:
                return inspect(path).arch
            except RemeltError:  # told when it is merged
                return None
    return None
