"""What computed a result: on another executor, the last bits may differ."""

from __future__ import annotations

import torch


def describe_executor(device: str, compute: str) -> str:
    """The executor in a line: torch's version, the device with its capability, the type of arithmetic.

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
    return " ".join(word for word in ("torch", version, kind, capability, compute) if word)
