"""Average sub-volumes: what picks have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from czii25d.geometry import Shape3D


def sum_boxes(
    planes: Callable[[int, int], NDArray[np.float32]],
    shape: Shape3D,
    centers_zyx_voxel: Sequence[NDArray[np.float64]],
    half_zyx: Sequence[Shape3D],
    slab_depth: int = 16,
) -> list[tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """Return for each set of centres the sum of the boxes around them, and how many voxels went into each sum.

    A box is centred on the voxel nearest to its centre. What lies outside the volume is left out, hence the counts.
    The volume's mean is taken off and the sums are in its standard deviations, so that those of several volumes can
    be added. The volume is read once, from top to bottom, a slab at a time.

    Parameters
    ----------
    planes
        ``(start, stop) -> (stop - start, H, W)``.
    shape
        ``(D, H, W)`` of the volume.
    centers_zyx_voxel
        For each set ``(N, 3)``, inside the volume.
    half_zyx
        For each set: a box has ``2 * half + 1`` voxels along z, y, x.
    slab_depth
        Planes that are in memory at once.
    """
    sides = [tuple(2 * half + 1 for half in halves) for halves in half_zyx]
    sums = [np.zeros(side, np.float64) for side in sides]
    counts = [np.zeros(side, np.int64) for side in sides]
    corners = [
        np.rint(centers).astype(int).reshape(-1, 3) - halves
        for centers, halves in zip(centers_zyx_voxel, half_zyx, strict=True)
    ]
    moments = np.zeros(2)
    for top in range(0, shape[0], slab_depth):
        slab = planes(top, min(top + slab_depth, shape[0]))
        moments += slab.sum(dtype=np.float64), np.square(slab).sum(dtype=np.float64)
        for total, count, starts in zip(sums, counts, corners, strict=True):
            for start in starts - (top, 0, 0):
                low = np.maximum(start, 0)
                high = np.minimum(start + total.shape, slab.shape)
                if (low < high).all():
                    inside = tuple(slice(*ends) for ends in zip(low - start, high - start, strict=True))
                    total[inside] += slab[tuple(slice(*ends) for ends in zip(low, high, strict=True))]
                    count[inside] += 1
    mean, square = moments / np.prod(shape)
    std = max(float(np.sqrt(max(square - mean**2, 0.0))), np.finfo(np.float32).tiny)
    return [((total - count * mean) / std, count) for total, count in zip(sums, counts, strict=True)]
