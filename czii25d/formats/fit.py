"""Do picks belong to a tomogram? Where not, say what they look like instead."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from czii25d.errors import InputError
from czii25d.geometry import Shape3D, Spacing3D, xyz_angstrom_to_zyx_voxel

MOST_OUTSIDE = 0.01  # share of a run's picks that may lie outside its volume: slips of hand, not of units
CROWDED = 0.25  # picks in voxels taken for angstrom all lie in the first tenth of a 10 angstrom volume
FEWEST_TO_JUDGE = 5
AXES = ("x", "y", "z")
# Every other order of the axes, the commonest slip first: arrays are z, y, x, points x, y, z.
ORDERS = (("z", "y", "x"), ("y", "x", "z"), ("x", "z", "y"), ("y", "z", "x"), ("z", "x", "y"))


def check_picks_fit(picks: pd.DataFrame, shape: Shape3D, voxel_spacing: Spacing3D, where: object) -> NDArray[np.bool_]:
    """Tell the picks inside a volume from a few outside; refuse picks that cannot belong to it.

    Parameters
    ----------
    picks
        Picks frame of one run; ``N`` rows, x, y, z in angstrom.
    shape
        ``(D, H, W)`` of the volume.
    voxel_spacing
        Angstrom per voxel along z, y, x.
    where
        The run or file, for messages.

    Returns
    -------
    inside
        ``(N,)``: which picks lie inside the volume, faces of its voxels included.

    Raises
    ------
    InputError
        If more than 1 % lie outside, or all crowd into the corner at the origin, as picks in voxels or nanometers do.
        It says what the picks look like: exchanged axes, voxels, nanometers, coordinates from the volume's centre.
    """
    locations = picks[list(AXES)].to_numpy(np.float64)
    inside = _inside(locations, shape, voxel_spacing)
    extent = (np.array(shape) * voxel_spacing)[::-1]
    expected = f"picks inside the volume, {' x '.join(f'{side:.0f}' for side in extent)} angstrom (x, y, z)"
    outside = len(picks) - int(inside.sum())
    if outside > MOST_OUTSIDE * len(picks):
        readings = list(_readings(picks, shape, voxel_spacing))
        hint = f" ({readings[0]})" if readings else ""
        raise InputError(
            where,
            expected,
            f"{outside} of {len(picks)} outside, the first at {locations[~inside][0].round(1).tolist()}{hint}",
            "check the picks' axes and unit and the tomogram's voxel spacing",
        )
    if len(picks) >= FEWEST_TO_JUDGE and (locations.max(0) < CROWDED * extent).all():
        raise InputError(
            where,
            f"{expected}, all over it",
            f"none beyond {locations.max(0).round(1).tolist()}{_small_unit(locations, shape, voxel_spacing)}",
            "if the picks are in voxels, convert them to angstrom; else check the tomogram's voxel spacing",
        )
    return inside


def _inside(locations_xyz: NDArray[np.float64], shape: Shape3D, voxel_spacing: Spacing3D) -> NDArray[np.bool_]:
    centers = xyz_angstrom_to_zyx_voxel(locations_xyz, voxel_spacing)
    return np.all((centers >= -0.5) & (centers <= np.array(shape) - 0.5), axis=1)


def _readings(picks: pd.DataFrame, shape: Shape3D, voxel_spacing: Spacing3D) -> Iterator[str]:
    """Yield in words each way to read the picks by which all are inside."""
    for order in ORDERS:
        if _inside(picks[list(order)].to_numpy(np.float64), shape, voxel_spacing).all():
            moved = [axis for axis, other in zip(AXES, order, strict=True) if axis != other]
            yield (
                f"with {moved[0]} and {moved[1]} exchanged all are inside"
                if len(moved) == 2
                else f"read as {', '.join(order)} all are inside"
            )
    locations = picks[list(AXES)].to_numpy(np.float64)
    extent = (np.array(shape) * voxel_spacing)[::-1]
    if (locations < 0).any() and _inside(locations + extent / 2, shape, voxel_spacing).all():
        yield "from the volume's centre all are inside, as RELION 5 counts"


def _small_unit(locations_xyz: NDArray[np.float64], shape: Shape3D, voxel_spacing: Spacing3D) -> str:
    """Say which coarser unit, if any, spreads crowded picks over the volume."""
    spacing = np.array(voxel_spacing)[::-1]
    for factors, unit in ((spacing, "voxels"), (np.full(3, 10.0), "nanometers")):
        scaled = locations_xyz * factors
        crowded = (scaled.max(0) < CROWDED * np.array(shape)[::-1] * spacing).all()
        if not crowded and _inside(scaled, shape, voxel_spacing).all():
            return f" (they look like {unit})"
    return ""
