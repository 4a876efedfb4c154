"""What any trained network has to beat: a Laplacian-of-Gaussian blob finder, one scale per particle."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import ndimage

from czii25d.geometry import zyx_voxel_to_xyz_angstrom
from czii25d.peaks import find_peaks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from czii25d.geometry import Spacing3D
    from czii25d.particles import ParticleSet


def blob_response(volume: NDArray[np.floating], sigma: float, voxel_spacing: Spacing3D) -> NDArray[np.float32]:
    """Return the Laplacian of the smoothed volume, z-scored: high at the centre of what is dark.

    Parameters
    ----------
    volume
        ``(D, H, W)``, protein dark.
    sigma
        Of the Gaussian, in angstrom.
    voxel_spacing
        Angstrom per voxel along z, y, x.
    """
    sigmas = [sigma / spacing for spacing in voxel_spacing]
    response: NDArray[np.float32] = np.zeros(volume.shape, np.float32)
    for axis, spacing in enumerate(voxel_spacing):
        order = [2 if axis == other else 0 for other in range(3)]
        response += ndimage.gaussian_filter(volume, sigmas, order, np.float32) / spacing**2
    return _z_score(response)


def find_blobs(
    volume: NDArray[np.floating], voxel_spacing: Spacing3D, particles: ParticleSet, threshold: float = 1.0
) -> pd.DataFrame:
    """Find blobs of each particle's size.

    A solid ball of radius r excites the Laplacian of a Gaussian most at sigma = r / √3 (Lindeberg 1998,
    doi:10.1023/A:1008045108935). Peaks of one particle are at least its radius apart.

    Parameters
    ----------
    volume
        ``(D, H, W)``, protein dark.
    voxel_spacing
        Angstrom per voxel along z, y, x.
    particles
        What is looked for.
    threshold
        Smallest response kept, in standard deviations.

    Returns
    -------
    picks
        Columns ``particle, x, y, z, score``: angstrom and response, best first for each particle.
    """
    volume = _z_score(volume)
    frames = []
    for particle in particles:
        response = blob_response(volume, particle.radius / math.sqrt(3), voxel_spacing)
        radius_voxel = particle.radius / np.array(voxel_spacing)
        [(centers, scores)] = find_peaks(response[None], radius_voxel[None], threshold)
        locations = zyx_voxel_to_xyz_angstrom(centers, voxel_spacing)
        frame = pd.DataFrame(locations, columns=["x", "y", "z"])
        frame.insert(0, "particle", particle.name)
        frames.append(frame.assign(score=np.asarray(scores, np.float64)))
    return pd.concat(frames, ignore_index=True)


def _z_score(volume: NDArray[np.floating]) -> NDArray[np.float32]:
    centered = volume - volume.mean(dtype=np.float64)
    return (centered / (centered.std() or 1.0)).astype(np.float32)
