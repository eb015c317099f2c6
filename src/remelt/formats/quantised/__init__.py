"""Quantised tensors: several stored ones that together stand for one, as numbers that can be merged.

`codes` are the numbers that bits stand for; `schemes` the ways to store a tensor in few bits; `recognition` finds
which tensors of a file belong together; `checkpoint` is the view of a file in which they are one. All of it is numpy:
files are opened and read without torch.
"""

from __future__ import annotations

from remelt.formats.quantised.checkpoint import DequantisedCheckpoint as DequantisedCheckpoint
from remelt.formats.quantised.checkpoint import dequantised as dequantised
