"""From heatmaps to picks, whole or slab by slab, with the same result."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from torch import Tensor

from czii25d.geometry import Spacing3D, zyx_voxel_to_xyz_angstrom
from czii25d.inference.sliding import Planes, Progress, Wanted, predict_slabs
from czii25d.peaks import Peaks, find_peaks, find_peaks_in_slabs
from czii25d.picks import empty_picks

if TYPE_CHECKING:
    from czii25d.geometry import Shape3D
    from czii25d.inference.ensemble import Predictor
    from czii25d.inference.options import InferenceOptions
    from czii25d.particles import ParticleSet
    from czii25d.regions import Selection

BEYOND = 4  # voxels: a pick is up to 1.5 from its voxel by refinement and offset, which must differ from those about it


def pick_heatmap(
    heatmap: Tensor,
    particles: ParticleSet,
    options: InferenceOptions,
    voxel_spacing: Spacing3D,
    offset_voxel: float = 0.0,
) -> pd.DataFrame:
    """Find the picks of one run's heatmaps.

    Parameters
    ----------
    heatmap
        ``(C, D, H, W)``.
    offset_voxel
        Of the network, see `czii25d.geometry`.

    Returns
    -------
    picks
        Columns ``run`` (empty), ``particle, x, y, z`` (angstrom), ``score``; best first for each particle.
    """
    radii = options.nms_radius_voxel(particles, voxel_spacing)
    peaks = find_peaks(heatmap, radii, options.floor, options.refine)
    return _as_picks(peaks, particles, voxel_spacing, offset_voxel)


def pick_slabs(
    slabs: Iterable[Tensor],
    particles: ParticleSet,
    options: InferenceOptions,
    voxel_spacing: Spacing3D,
    offset_voxel: float = 0.0,
) -> pd.DataFrame:
    """Find the same picks in heatmaps ``(C, d, H, W)`` that come slab by slab; see `pick_heatmap`."""
    radii = options.nms_radius_voxel(particles, voxel_spacing)
    peaks = find_peaks_in_slabs(slabs, radii, options.floor, options.refine)
    return _as_picks(peaks, particles, voxel_spacing, offset_voxel)


def pick_volume(
    volume: Planes,
    predictor: Predictor,
    particles: ParticleSet,
    options: InferenceOptions,
    voxel_spacing: Spacing3D,
    offset_voxel: float = 0.0,
    progress: Progress | None = None,
    wanted: Wanted | None = None,
) -> pd.DataFrame:
    """Predict a tomogram and pick it; arguments and result as `predict_slabs` and `pick_heatmap`."""
    slabs = predict_slabs(volume, predictor, len(particles), options, progress, wanted)
    return pick_slabs((slab for _, slab in slabs), particles, options, voxel_spacing, offset_voxel)


def pick_selected(
    volume: Planes,
    predictor: Predictor,
    particles: ParticleSet,
    options: InferenceOptions,
    voxel_spacing: Spacing3D,
    offset_voxel: float,
    selection: Selection | None,
) -> pd.DataFrame:
    """Pick what a selection asks for of a tomogram, all without one; nothing else is predicted."""
    wanted = tiles_of_region(selection, particles, options, voxel_spacing)
    picks = pick_volume(volume, predictor, particles, options, voxel_spacing, offset_voxel, wanted=wanted)
    return picks if selection is None else selection.keep(picks)[0]


def tiles_of_region(
    selection: Selection | None, particles: ParticleSet, options: InferenceOptions, voxel_spacing: Spacing3D
) -> Wanted | None:
    """Tell which tiles are needed for the picks in a region to be those of the whole tomogram; ``None``: all.

    Those that touch the region, and those in which a peak could lie that suppresses one in the region.

    Parameters
    ----------
    voxel_spacing
        Angstrom per voxel along z, y, x of what is predicted; the region may have another.
    """
    if selection is None:
        return None
    region, reach = selection.region, options.nms_radius_voxel(particles, voxel_spacing).max(0) + BEYOND

    def wanted(start: Shape3D, stop: Shape3D) -> bool:
        return region.overlaps((start - reach) * voxel_spacing, (np.array(stop) - 1 + reach) * voxel_spacing)

    return wanted


def _as_picks(
    peaks: Iterable[Peaks], particles: ParticleSet, voxel_spacing: Spacing3D, offset_voxel: float
) -> pd.DataFrame:
    frames = [empty_picks(scored=True)]
    for particle, (centers, scores) in zip(particles, peaks, strict=True):
        if len(centers):
            frame = pd.DataFrame(
                zyx_voxel_to_xyz_angstrom(centers, voxel_spacing, offset_voxel), columns=["x", "y", "z"]
            )
            frame.insert(0, "run", "")
            frame.insert(1, "particle", particle.name)
            frames.append(frame.assign(score=scores.astype(np.float64)))
    return pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0]
