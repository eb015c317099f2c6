"""What U-Nets and autoencoders of latent diffusion have in common: signals of several streams, read in groups."""

from __future__ import annotations

from collections.abc import Sequence

from remelt.archs.axes.draft import Draft, Drafts
from remelt.errors import RefusedError

GROUPS = 32
"""Every GroupNorm of latent diffusion has as many groups."""

Signal = Sequence[Draft]
"""The streams that lie one after another on an axis: one, or several where they were concatenated."""


def read(signal: Signal, module: str) -> None:
    """A linear map or convolution reads all of a signal."""
    offset = 0
    for stream in signal:
        stream.read_by(module, offset=offset)
        offset += stream.size


def normalise(signal: Signal, module: str) -> None:
    """A GroupNorm reads all of a signal. `RefusedError` where its channels cannot be grouped."""
    width = signal[0].shapes[f"{module}.weight"][0]
    if width % GROUPS:
        raise RefusedError(
            f"{module} has {width} channels, which cannot be in {GROUPS} groups",
            hint="models of latent diffusion are aligned whose widths are multiples of 32",
        )
    offset = 0
    for stream in signal:
        stream.grouped_by(module, GROUPS, offset)
        offset += stream.size


def pin(drafts: Drafts, name: str, key: str, axis: int, offset: int = 0) -> None:
    """Fix an axis of a tensor from ``offset`` on: it means something outside."""
    if key in drafts.shapes and drafts.shapes[key][axis] > offset:
        drafts.fixed(name, drafts.shapes[key][axis] - offset).window(key, axis, offset=offset)


def pin_made(drafts: Drafts, name: str, module: str) -> None:
    """Fix what a linear map or convolution makes."""
    if f"{module}.weight" in drafts.shapes:
        drafts.fixed(name, drafts.shapes[f"{module}.weight"][0]).made_by(module)


def told(drafts: Drafts, name: str, width: int, streams: Sequence[tuple[Draft, int]]) -> Signal:
    """What comes from outside a network, ``width`` channels: known streams at their places, and the others, fixed.

    `RefusedError` where a stream does not fit into it.
    """
    signal: list[Draft] = []
    end = 0
    for stream, offset in sorted(streams, key=lambda one: one[1]):
        if offset < end or offset + stream.size > width:
            raise RefusedError(
                f"{name} has {width} channels, where the {stream.size} of {stream.name} do not fit in",
                hint="align the parts as files of their own",
            )
        if offset > end:
            signal.append(drafts.fixed(f"{name}.{end}", offset - end))
        signal.append(stream)
        end = offset + stream.size
    return signal if end == width else [*signal, drafts.fixed(name, width - end)]


def rows(drafts: Drafts, module: str) -> int:
    """How many channels a linear map or convolution makes; `RefusedError` where the model lacks it."""
    shape = drafts.shapes.get(f"{module}.weight")
    if shape is None:
        raise RefusedError(f"the model lacks {module}.weight", hint="align whole models, or whole parts of them")
    return shape[0]
