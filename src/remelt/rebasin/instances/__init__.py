"""Small models of known archs that run, for the numeric check of specifications and for tests: one file a family.

`instance` says what they have in common. They are made with diffusers and transformers (extra ``rebasin-check``), with
random numbers in every tensor.
"""

from __future__ import annotations

from collections.abc import Callable

from remelt.rebasin.instances.instance import Instance

INSTANCES: dict[str, Callable[..., Instance]] = {}
"""By the name of the arch: each takes a ``width`` and a ``seed``, and tells its own least width."""
