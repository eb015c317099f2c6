"""What computed a result: on another executor, the last bits may differ."""

from __future__ import annotations

import os

import torch

from remelt.engine import native
from remelt.errors import OptionError

CHOICE = "REMELT_EXECUTOR"
READING = "REMELT_READ"


def executor_for(device: str) -> str:
    """What runs kernels on a device: ``native`` or ``torch`` on the processor, ``device`` elsewhere.

    ``REMELT_EXECUTOR`` chooses among them. Raises `OptionError` where it asks for what is not there.
    """
    choice = os.environ.get(CHOICE, "")
    if choice not in ("", "native", "torch", "device"):
        raise OptionError(f"{CHOICE} is native, torch or device, but it is {choice!r}")
    if choice == "native" and not native.available():
        raise OptionError(f"{CHOICE} asks for the native executor, which is {native.capability()}")
    if device.partition(":")[0] != "cpu":
        return "device"
    return choice or ("native" if native.available() else "torch")


def maps_inputs(*, cached: bool) -> bool:
    """Whether inputs are looked at where they are mapped: where all files fit in memory, unless ``REMELT_READ`` says.

    Mapped pages cannot be let go while they are mapped, so files that exceed the memory are read instead. Raises
    `OptionError` where ``REMELT_READ`` is neither ``map`` nor ``read``.
    """
    choice = os.environ.get(READING, "")
    if choice not in ("", "map", "read"):
        raise OptionError(f"{READING} is map or read, but it is {choice!r}")
    return choice == "map" or (choice == "" and cached)


def describe_executor(device: str, compute: str) -> str:
    """The executor in a line: torch's version, the device, its capability, the type of arithmetic, and the extension.

    >>> describe_executor("cpu", "float32").startswith("torch ")
    True
    """
    kind = device.partition(":")[0]
    if kind == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
    elif kind == "cuda":
        capability = torch.cuda.get_device_name(device)
    else:
        capability = ""
    version = torch.__version__.partition("+")[0]
    executor = ("native", native.capability()) if executor_for(device) == "native" else ()
    return " ".join(word for word in ("torch", version, kind, capability, compute, *executor) if word)
