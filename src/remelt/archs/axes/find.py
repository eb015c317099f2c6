"""The axis groups of a model of a known arch, of the shapes that its tensors have."""

from __future__ import annotations

from collections.abc import Callable

from remelt.archs.arch import all_archs
from remelt.archs.axes.beside import left_as_they_are, with_averages
from remelt.archs.axes.clip import clip_groups, open_clip_groups
from remelt.archs.axes.flux import flux_groups
from remelt.archs.axes.heads import Heads
from remelt.archs.axes.language import language_groups
from remelt.archs.axes.latent_diffusion import sd1_groups, sd2_groups, sdxl_groups, sdxl_refiner_groups
from remelt.archs.axes.mlp import mlp_groups
from remelt.archs.axes.resnet import resnet_groups
from remelt.archs.axes.sd3 import sd3_groups
from remelt.archs.axes.t5 import t5_groups
from remelt.archs.axes.vae import vae_groups
from remelt.archs.axes.vit import vit_groups
from remelt.archs.axis_groups import AxisGroup, Shapes
from remelt.errors import OptionError, RefusedError

Specification = Callable[[Shapes, Heads], tuple[AxisGroup, ...]]
"""All groups of a model with tensors of these shapes, fixed ones included; head rules replace the usual ones."""

SPECIFICATIONS: dict[str, Specification] = {
    "clip_l": clip_groups,
    "open_clip_g": open_clip_groups,
    "open_clip_h": open_clip_groups,
    "sd1": sd1_groups,
    "sd2": sd2_groups,
    "sdxl": sdxl_groups,
    "sdxl_refiner": sdxl_refiner_groups,
    "vae": vae_groups,
    "chroma": flux_groups,
    "flux": flux_groups,
    "gemma2": language_groups,
    "gemma3": language_groups,
    "glm": language_groups,
    "llama": language_groups,
    "mixtral": language_groups,
    "mlp": mlp_groups,
    "phi3": language_groups,
    "qwen2": language_groups,
    "qwen2_moe": language_groups,
    "qwen3": language_groups,
    "qwen3_moe": language_groups,
    "resnet": resnet_groups,
    "sd3": sd3_groups,
    "t5": t5_groups,
    "vit": vit_groups,
}
"""By the name of the arch."""


def axis_groups(arch: str, shapes: Shapes, heads: Heads | None = None) -> tuple[AxisGroup, ...]:
    """All axis groups of a model of a known arch in its original layout, those that stay fixed included.

    ``heads`` replaces the arch's usual head rules by part of the model. Raises `OptionError` for an arch that has no
    specification, `RefusedError` for tensors that do not fit together.
    """
    specification = SPECIFICATIONS.get(arch)
    if specification is None:
        known = ", ".join(sorted(SPECIFICATIONS))
        raise OptionError(
            f"there are no axis groups for models of arch {arch!r}",
            hint=f"there are some for {known}; those of any other module can be derived from it",
        )
    groups = specification(_Whole(shapes), heads or {})
    named = all_archs().get(arch)
    if named is not None:
        groups = with_averages(groups, shapes, named)
    beside = left_as_they_are(groups, shapes, named)
    return groups if beside is None else (*groups, beside)


class _Whole(dict[str, tuple[int, ...]]):
    """Shapes of a model of which nothing may be missing that a specification looks up."""

    def __missing__(self, key: str) -> tuple[int, ...]:
        raise RefusedError(f"the model lacks {key}", hint="align whole models, or whole parts of them")
