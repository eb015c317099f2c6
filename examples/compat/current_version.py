"""A script for sd-mecha 1 with only its import changed: a method of one's own, weights by block, a component picked."""

from torch import Tensor

import remelt.compat.sd_mecha as sd_mecha
from remelt.compat.sd_mecha import Parameter, Return, StateDict, merge_method


@merge_method
def softened(
    a: Parameter(Tensor, "weight"),  # type: ignore[valid-type]
    b: Parameter(Tensor, "weight"),  # type: ignore[valid-type]
    alpha: Parameter(Tensor) = 0.5,  # type: ignore[valid-type]
    **kwargs: object,
) -> Return(Tensor, "weight"):  # type: ignore[valid-type]
    """Less of ``b`` where it differs more."""
    difference = b - a
    return a + alpha * difference / (1 + difference.abs())


@merge_method
def with_biases_of(
    a: Parameter(StateDict[Tensor], "weight"),  # type: ignore[valid-type]
    b: Parameter(StateDict[Tensor], "weight"),  # type: ignore[valid-type]
    **kwargs: str,
) -> Return(Tensor, "weight"):  # type: ignore[valid-type]
    """The biases of one model, the rest of another."""
    key = kwargs["key"]
    return b[key] if key.endswith(".bias") else a[key]


a = sd_mecha.model("models/ghostmix_v20Bakedvae.safetensors", config="sd1-ldm")
b = sd_mecha.model("models/dreamshaper_332BakedVaeClipFix.safetensors", config="sd1-ldm")
alpha = sd_mecha.convert({"BASE": 0.3, "IN00": 0.5, "OUT11": 0.1}, a) | 1.0

merged = sd_mecha.weighted_sum(a, with_biases_of(softened(a, b, alpha=0.2), b), alpha=alpha)
recipe = sd_mecha.pick_component(a, "vae") | merged
print(sorted(config.identifier for config in sd_mecha.extensions.model_configs.get_all()))
print(sd_mecha.extensions.model_configs.resolve("sd1-ldm").components())
print(sd_mecha.serialize(recipe))
sd_mecha.merge(recipe, output="models/current_version.safetensors")
