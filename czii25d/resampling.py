"""Resampling of tomograms to another voxel spacing, plane by plane.

The first voxel's centre stays at 0, so a place keeps its angstroms. Each axis is filtered by a windowed sinc of three
lobes (Lanczos's; Duchon 1979, doi:10.1175/1520-0450(1979)018<1016:LFIOAT>2.0.CO;2), mirrored at the faces. Towards
coarser voxels it is as much wider as these are: what they cannot hold is filtered out, not folded back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from czii25d.geometry import Shape3D, Spacing3D
from czii25d.tiling import reflect_indices

LOBES = 3
SAME = 1e-3  # spacings that differ by less are one: over 1000 voxels that is a voxel
READ_AT_ONCE = 8  # planes


def is_same_spacing(one: Spacing3D, other: Spacing3D) -> bool:
    """Return whether there is nothing to resample."""
    return all(abs(a / b - 1) < SAME for a, b in zip(one, other, strict=True))


def resampled_shape(shape: Shape3D, old: Spacing3D, new: Spacing3D) -> Shape3D:
    """Return the ``(D, H, W)`` of voxels of the ``new`` spacing whose centres lie within those of the old ones."""
    d, h, w = (math.floor((size - 1) * a / b + 1e-6) + 1 for size, a, b in zip(shape, old, new, strict=True))
    return d, h, w


def resample_planes(
    planes: Callable[[int, int], NDArray[np.float32]], shape: Shape3D, old: Spacing3D, new: Spacing3D
) -> Iterator[NDArray[np.float32]]:
    """Yield the planes of a resampled volume, from the first to the last.

    Parameters
    ----------
    planes
        ``(start, stop)`` to the planes ``(stop - start, H, W)``; each is asked for once, in order.
    shape
        ``(D, H, W)``.
    old, new
        Angstrom per voxel along z, y, x.

    Yields
    ------
    plane
        ``(H, W)`` of `resampled_shape`, float32.
    """
    depth, _, _ = shape
    new_shape = resampled_shape(shape, old, new)
    along_z, along_y, along_x = (_filter(*axis) for axis in zip(shape, new_shape, old, new, strict=True))
    rows = [slice(*ends) for ends in itertools.pairwise(along_z.indptr)]
    # Mirrored rows reach back, so what is still needed is not simply what lies ahead.
    needed_from = np.minimum.accumulate([along_z.indices[row].min() for row in rows][::-1])[::-1]
    kept: dict[int, NDArray[np.float32]] = {}
    read = 0
    for row, first in zip(rows, needed_from, strict=True):
        while read <= along_z.indices[row].max():
            block = planes(read, min(read + READ_AT_ONCE, depth))
            for plane in block:
                kept[read] = (along_x @ (along_y @ plane).T).T
                read += 1
        for z in [z for z in kept if z < first]:
            del kept[z]
        total = np.zeros(new_shape[1:], np.float32)
        for z, weight in zip(along_z.indices[row], along_z.data[row], strict=True):
            total += weight * kept[z]
        yield total


def _filter(size: int, new_size: int, old: float, new: float) -> sparse.csr_array:
    """Return the ``(new_size, size)`` weights along one axis; each row sums to 1."""
    if size == new_size and abs(old / new - 1) < SAME:
        return sparse.eye_array(size, dtype=np.float32, format="csr")
    widening = max(1.0, new / old)
    reach = LOBES * widening
    rows, columns, weights = [], [], []
    for row in range(new_size):
        center = row * new / old
        start, stop = math.ceil(center - reach), math.floor(center + reach) + 1
        x = (np.arange(start, stop) - center) / widening
        kernel = np.sinc(x) * np.sinc(x / LOBES)
        rows.append(np.full(len(x), row))
        columns.append(reflect_indices(start, stop, size))
        weights.append(kernel / kernel.sum())
    entries = (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns)))
    return sparse.coo_array(entries, (new_size, size)).tocsr().astype(np.float32)
