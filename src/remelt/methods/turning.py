"""Orthogonal matrices and parts of them: what rotations of whole and of streamed matrices compute with."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

_HALF_TURN = 1e-6
"""Sine of an angle near a half turn below which round-off alone would tell which way to turn."""


def within_basis(here: Tensor, there: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both frames, within a basis of what they span where that is less than all: what is beside it stays as it is."""
    if 2 * here.shape[1] >= len(here):
        return here, there, None
    basis = torch.linalg.qr(torch.cat((here, there), 1)).Q
    return basis.T @ here, basis.T @ there, basis


def move(rows: Tensor, matrix: Tensor, basis: Tensor | None) -> Tensor:
    """Rows times an orthogonal matrix, or one of a basis beside which nothing moves."""
    if basis is None:
        return rows @ matrix
    within = rows @ basis
    return rows + (within @ matrix - within) @ basis.T


def rotation_between(here: Tensor, there: Tensor, *, proper: bool) -> Tensor:
    """The orthogonal matrix that turns one frame to another, and what is beside them as little as can be.

    If it is to be ``proper``, and is a reflection, the direction of least weight is turned back.
    """
    rotation = here @ there.T
    rank = here.shape[1]
    if rank < len(here):
        here, there = (torch.linalg.qr(frame, mode="complete").Q[:, rank:].clone() for frame in (here, there))
        u, _, vh = torch.linalg.svd(here.T @ there)
        here, there = here @ u, there @ vh.T
        rotation += here @ there.T
    if proper and float(torch.linalg.slogdet(rotation).sign) < 0.0:
        rotation -= 2.0 * torch.outer(here[:, -1], there[:, -1])
    return rotation


def whole_power(rotation: Tensor, exponent: float) -> Tensor:
    """An orthogonal matrix to a whole power."""
    if exponent == 0.0:
        return torch.eye(len(rotation), dtype=rotation.dtype, device=rotation.device)
    if abs(exponent) == 1.0:
        return rotation if exponent > 0.0 else rotation.T
    power: Tensor = torch.linalg.matrix_power(rotation if exponent > 0.0 else rotation.T, int(abs(exponent)))
    return power


def planes(rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Directions, those that they are turned towards, and by which angles.

    The symmetric and the skew part of a rotation commute. So an eigenvector x of the one is turned by an angle within
    the plane of x and y, where the skew part times x is the sine of that angle times y: nothing complex is needed.
    """
    cosines, vectors = torch.linalg.eigh((rotation + rotation.T) / 2.0)
    across = (rotation - rotation.T) @ vectors / 2.0
    sines = across.norm(dim=0)
    half = (cosines < 0.0) & (sines < _HALF_TURN)
    across /= sines.clamp(min=torch.finfo(sines.dtype).tiny)
    across[:, half] = 0.0
    pairs = vectors[:, half]  # half turns go in any plane: their directions are paired as they come
    paired = torch.stack((pairs[:, 1::2], -pairs[:, : pairs.shape[1] // 2 * 2 : 2]), 2).flatten(1)
    across[:, half.nonzero()[: paired.shape[1], 0]] = paired
    return vectors, across, torch.where(half, math.pi, torch.atan2(sines, cosines))


def rotation_by(vectors: Tensor, across: Tensor, angles: Tensor) -> Tensor:
    """The rotation that turns each direction by an angle of its own."""
    rotation: Tensor = (vectors * angles.cos() + across * angles.sin()) @ vectors.T
    return rotation


def turns(
    here: Tensor, there: Tensor, found: Mapping[str, Tensor], alignment: float, alpha: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """How rows of ``a`` move, and those of ``b`` where ``alpha`` asks for them, within a basis if there is one.

    ``found`` holds the planes of the rotation between the two frames, which a fractional ``alignment`` needs.
    """
    if alignment == round(alignment):
        here, there, basis = within_basis(here, there)
        rotation = rotation_between(here, there, proper=False)
        onwards = whole_power(rotation, alignment)
        return onwards, onwards @ rotation.T if alpha else None, basis
    vectors, across, angles = (found[name] for name in ("vectors", "across", "angles"))
    onwards = rotation_by(vectors, across, angles * alignment)
    back = rotation_by(vectors, across, angles * (alignment - 1.0)) if alpha else None
    return onwards, back, found.get("basis")


def planes_between(here: Tensor, there: Tensor) -> Mapping[str, Tensor]:
    """The planes in which the nearest proper rotation turns, and by which angles, within ``basis`` if there is one."""
    here, there, basis = within_basis(here, there)
    vectors, across, angles = planes(rotation_between(here, there, proper=True))
    found = {"vectors": vectors, "across": across, "angles": angles}
    return found if basis is None else {**found, "basis": basis}


def frames_of(products: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal directions, as columns, of which each of the first is to be turned to that of the second.

    They are those in which products of rows with rows, finite ones, are greatest.
    """
    u, values, vh = torch.linalg.svd(products)
    rank = int((values > values[:1] * len(values) * torch.finfo(values.dtype).eps).sum())
    return u[:, :rank], vh[:rank].T
