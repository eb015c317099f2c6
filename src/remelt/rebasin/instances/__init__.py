"""Small models of known archs that run, for the numeric check of specifications and for tests: one file a family.

`instance` says what they have in common. They are made with diffusers and transformers (extra ``rebasin-check``), with
random numbers in every tensor.
"""

from __future__ import annotations

from collections.abc import Callable

from remelt.rebasin.instances.clip import clip_instance
from remelt.rebasin.instances.instance import Instance
from remelt.rebasin.instances.stable_diffusion import (
    sd1_instance,
    sd2_instance,
    sdxl_instance,
    sdxl_refiner_instance,
)

INSTANCES: dict[str, Callable[..., Instance]] = {
    "clip_l": clip_instance,
    "sd1": sd1_instance,
    "sd2": sd2_instance,
    "sdxl": sdxl_instance,
    "sdxl_refiner": sdxl_refiner_instance,
}
"""By the name of the arch: each takes a ``width`` and a ``seed``, and tells its own least width."""
