"""Small models of known archs that run, for the numeric check of specifications and for tests: one file a family.

`instance` says what they have in common. They are made with diffusers and transformers (extra ``rebasin-check``), with
random numbers in every tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from remelt.alignment.instances.clip import clip_instance
from remelt.alignment.instances.diffusion_transformers import chroma_instance, flux_instance, sd3_instance
from remelt.alignment.instances.encoders import t5_instance, vit_instance
from remelt.alignment.instances.instance import Instance
from remelt.alignment.instances.language import DECODERS, decoder_instance
from remelt.alignment.instances.networks import mlp_instance, resnet_instance
from remelt.alignment.instances.stable_diffusion import (
    sd1_instance,
    sd2_instance,
    sdxl_instance,
    sdxl_refiner_instance,
    vae_instance,
)

INSTANCES: dict[str, Callable[..., Instance]] = {
    "clip_l": clip_instance,
    "sd1": sd1_instance,
    "sd2": sd2_instance,
    "sdxl": sdxl_instance,
    "sdxl_refiner": sdxl_refiner_instance,
    **{name: functools.partial(decoder_instance, name) for name in DECODERS},
    "chroma": chroma_instance,
    "flux": flux_instance,
    "mlp": mlp_instance,
    "resnet": resnet_instance,
    "resnet_bottleneck": functools.partial(resnet_instance, bottleneck=True),
    "resnext": functools.partial(resnet_instance, bottleneck=True, groups=4),
    "sd3": sd3_instance,
    "sd3.5_medium": functools.partial(sd3_instance, medium=True),
    "t5": t5_instance,
    "vae": vae_instance,
    "vit": vit_instance,
}
"""By the name of the arch, or of a variant: each takes a ``width`` and a ``seed``, and tells its own least width."""
