"""Is protein dark or bright? In the competition's tomograms it is dark, and so it is in this project's volumes."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from czii25d.geometry import Spacing3D

Contrast = Literal["dark", "bright"]
BLOCK_ANGSTROM = 40.0  # half a particle: averages over it keep particles and lose noise
SLOW_ANGSTROM = 400.0  # wider variations are ice and illumination
ENOUGH_VOXELS = 2e7  # about the middle plane; more take time and say nothing new
LEAST_SKEWNESS = 0.1  # below it in magnitude the sign says nothing. Empirical


def protein_skewness(volume: NDArray[np.floating], voxel_spacing: Spacing3D) -> float:
    """Return the skewness of the smoothed density: below 0 where what is dense is dark.

    Proteins, membranes and gold are few and dense, water is everywhere: the long tail of the grey values lies on the
    side of what is dense. Noise, which is symmetric, is averaged away before, and slow variations are subtracted.
    Of a large tomogram the middle is taken.

    Parameters
    ----------
    volume
        ``(D, H, W)``.
    voxel_spacing
        Angstrom per voxel along z, y, x.
    """
    block = [
        min(max(1, round(BLOCK_ANGSTROM / side)), size) for side, size in zip(voxel_spacing, volume.shape, strict=True)
    ]
    wanted = max(block[0], round(ENOUGH_VOXELS / (volume.shape[1] * volume.shape[2])))
    first = max(0, (len(volume) - wanted) // 2)
    volume = volume[first : len(volume) - first]
    d, h, w = (size // side for size, side in zip(volume.shape, block, strict=True))
    means = np.empty((d, h, w))
    for z in range(d):
        planes = volume[z * block[0] : (z + 1) * block[0], : h * block[1], : w * block[2]]
        plane = planes.mean(0, dtype=np.float32).astype(np.float64)  # of a few planes, which float32 can add up
        means[z] = plane.reshape(h, block[1], w, block[2]).mean((1, 3))
    means -= ndimage.gaussian_filter(means, SLOW_ANGSTROM / BLOCK_ANGSTROM / 2)
    means -= means.mean()
    return float((means**3).mean() / max(means.std(), np.finfo(float).tiny) ** 3)


def contrast_of(skewness: float) -> Contrast | None:
    """Return what `protein_skewness` says; ``None``: nothing."""
    if abs(skewness) < LEAST_SKEWNESS:
        return None
    return "bright" if skewness > 0 else "dark"
