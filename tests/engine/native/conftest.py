"""What the native executor's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from assembly import CAPABILITIES

from remelt.engine import native


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each capability that this machine has."""
    before = native.capability()
    native.use(request.param)
    yield request.param
    native.use(before)
