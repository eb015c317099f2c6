"""What tests of the engine share: each executor in turn."""

from __future__ import annotations

import pytest

from remelt.engine import native
from remelt.engine.sweeps import Kernels


@pytest.fixture(params=["native", "torch", "untraced"])
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The native executor, that of torch, and methods called tile by tile."""
    name: str = request.param
    if name == "native" and not native.available():
        pytest.skip("the native executor is not built")
    monkeypatch.setenv("REMELT_EXECUTOR", "torch" if name == "untraced" else name)
    if name == "untraced":
        monkeypatch.setattr(Kernels, "of", lambda *_: None)
    return name
