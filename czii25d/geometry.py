"""Voxels and angstroms: the only place where one becomes the other.

Convention (pinned by ``tests/test_geometry.py``)
-------------------------------------------------
- Arrays are indexed ``(z, y, x)``; their shape letters are ``D, H, W``.
- Points are physical ``(x, y, z)`` in angstrom, as in copick and in the CZII competition's files.
- ``voxel index = angstrom / voxel spacing``: the *centre* of the first voxel is at 0 angstrom. (The OME-NGFF
  specification 0.4 says the same of its ``scale`` transformation.)
- A voxel spacing is a ``(z, y, x)`` triple in angstrom per voxel.

The published 4th-place networks learned targets drawn at ``floor(angstrom / spacing) + 1`` and therefore peak,
on average, half a voxel above this convention. Such a checkpoint carries ``PUBLISHED_OFFSET_VOXEL``, which is
added to its peaks before they become angstroms.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Shape3D = tuple[int, int, int]
Spacing3D = tuple[float, float, float]

PUBLISHED_OFFSET_VOXEL = -0.5

SPACING_TOLERANCE = 0.05  # of voxels that a network takes for those it was trained on


def spacing_text(voxel_spacing: Spacing3D) -> str:
    """Write a voxel spacing for people."""
    return f"{' x '.join(f'{side:.4g}' for side in voxel_spacing)} angstrom (z, y, x)"


def xyz_angstrom_to_zyx_voxel(locations_xyz_angstrom: ArrayLike, voxel_spacing: Spacing3D) -> NDArray[np.float64]:
    """Turn ``(N, 3)`` points, x y z in angstrom, into ``(N, 3)`` fractional indices, z y x.

    Parameters
    ----------
    locations_xyz_angstrom
        ``(N, 3)``; an empty list is ``(0, 3)``.
    voxel_spacing
        Angstrom per voxel along z, y, x.
    """
    locations = np.asarray(locations_xyz_angstrom, np.float64).reshape(-1, 3)
    return locations[:, ::-1] / np.asarray(voxel_spacing, np.float64)


def zyx_voxel_to_xyz_angstrom(
    centers_zyx_voxel: ArrayLike, voxel_spacing: Spacing3D, offset_voxel: float = 0.0
) -> NDArray[np.float64]:
    """Turn ``(N, 3)`` fractional indices, z y x, into ``(N, 3)`` points, x y z in angstrom.

    Parameters
    ----------
    centers_zyx_voxel
        ``(N, 3)``; an empty list is ``(0, 3)``.
    voxel_spacing
        Angstrom per voxel along z, y, x.
    offset_voxel
        Added to every index first: 0 in this project's convention, ``PUBLISHED_OFFSET_VOXEL`` for the published
        checkpoints.
    """
    centers = np.asarray(centers_zyx_voxel, np.float64).reshape(-1, 3)
    return ((centers + offset_voxel) * np.asarray(voxel_spacing, np.float64))[:, ::-1]


def spacings_agree(one: Spacing3D, other: Spacing3D) -> bool:
    """Tell whether two voxel spacings differ by no more than ``SPACING_TOLERANCE`` along any axis."""
    return all(max(a / b, b / a) <= 1 + SPACING_TOLERANCE for a, b in zip(one, other, strict=True))
