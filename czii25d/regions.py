"""Regions: which voxels of a tomogram are used, to train on and to pick in.

A region is a set of voxels: those whose centres lie in a box, in a polygon and in a mask, as far as these are given. A
point belongs to the region if the voxel nearest to it does, so that two ranges that share an end share no voxel and no
point, and what is trained on and what is picked are told apart by the same rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from czii25d.errors import InputError
from czii25d.geometry import Shape3D, Spacing3D, xyz_angstrom_to_zyx_voxel

if TYPE_CHECKING:
    Range = tuple[float | None, float | None]

AXES = ("z", "y", "x")
SLACK = 1e-6  # voxels: an end given as 128 x 31.36 angstrom is at voxel 128
PLANES_AT_ONCE = 32  # of a mask that is shrunk; bounds memory


@dataclass(frozen=True, eq=False)
class Region:
    """A set of voxels of a tomogram; make it with `Region.of`.

    Parameters
    ----------
    shape
        ``(D, H, W)`` of the tomogram.
    voxel_spacing
        Angstrom per voxel along z, y, x.
    depth
        First plane, and the one after the last.
    plane
        ``(H, W)``: what is used of each of these planes.
    mask
        ``(D, H, W)``, not 0 where voxels are used; it may be memory-mapped. ``None``: all of them are.
    """

    shape: Shape3D
    voxel_spacing: Spacing3D
    depth: tuple[int, int]
    plane: NDArray[np.bool_] = field(repr=False)
    mask: NDArray[Any] | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        shape: Shape3D,
        voxel_spacing: Spacing3D,
        ranges: Mapping[str, Range] | None = None,
        polygon: Sequence[tuple[float, float]] | None = None,
        mask: NDArray[Any] | None = None,
        where: object = "region",
    ) -> Region:
        """Return the voxels whose centres lie in all that is given.

        Parameters
        ----------
        ranges
            By axis, ``"x"``, ``"y"`` or ``"z"``: the lowest angstrom and the one above the highest; ``None``: no end.
        polygon
            Corners ``(x, y)`` in angstrom, the same in every plane; where it crosses itself, by the even-odd rule.
        mask
            ``(D, H, W)``, not 0 where voxels are used.
        where
            The origin of these, for messages.

        Raises
        ------
        InputError
            If a range or the polygon lies outside the tomogram, the mask has another shape or is 0 everywhere, or no
            voxel lies in all of them.
        """
        kept = [_voxel_range(axis, index, shape, voxel_spacing, ranges or {}, where) for index, axis in enumerate(AXES)]
        plane = np.zeros(shape[1:], bool)
        plane[kept[1], kept[2]] = True
        if polygon is not None:
            y, x = (
                np.arange(size, dtype=np.float64) * side
                for size, side in zip(shape[1:], voxel_spacing[1:], strict=True)
            )
            inside = _in_polygon(np.asarray(polygon, np.float64), y, x)
            if not inside.any():
                expected = f"a polygon within x 0 to {x[-1]:.0f} and y 0 to {y[-1]:.0f} angstrom"
                raise InputError(f"{where}: polygon", expected, f"no voxel in {polygon}", "correct its corners (x, y)")
            plane &= inside
        if mask is not None and mask.shape != tuple(shape):
            hint = "; its axes are in another order" if sorted(mask.shape) == sorted(shape) else ""
            expected = f"the tomogram's shape {tuple(shape)} (z, y, x)"
            raise InputError(f"{where}: mask", expected, f"{mask.shape}{hint}", "make it of this tomogram")
        region = cls(shape, voxel_spacing, (kept[0].start, kept[0].stop), plane, mask)
        if not any(region.crop((z, 0, 0), (1, *shape[1:])).any() for z in range(*region.depth)):
            what = "a mask that is not 0 everywhere" if mask is not None else "a voxel that lies in all of it"
            raise InputError(where, what, "no voxel to use", "correct the region")
        return region

    def crop(self, start_zyx: Shape3D, shape: Shape3D) -> NDArray[np.bool_]:
        """Return a box, ``shape``, True where voxels are used; it may reach beyond the tomogram, which is not used."""
        crop = np.zeros(shape, bool)
        low = np.clip(start_zyx, (self.depth[0], 0, 0), None)
        high = np.minimum(np.add(start_zyx, shape), (self.depth[1], *self.shape[1:]))
        if (low < high).all():
            place = tuple(slice(a, b) for a, b in zip(low - start_zyx, high - start_zyx, strict=True))
            z, y, x = (slice(a, b) for a, b in zip(low, high, strict=True))
            crop[place] = self.plane[y, x]
            if self.mask is not None:
                crop[place] &= np.asarray(self.mask[z, y, x]) != 0
        return crop

    def lookup(self, z: NDArray[np.int_], y: NDArray[np.int_], x: NDArray[np.int_]) -> NDArray[np.bool_]:
        """Return whether voxels are used, by indices that broadcast; those outside the tomogram are not."""
        _, height, width = self.shape
        used = (z >= self.depth[0]) & (z < self.depth[1]) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        z, y, x = (np.clip(index, 0, size - 1) for index, size in zip((z, y, x), self.shape, strict=True))
        used = used & self.plane[y, x]
        return used if self.mask is None else used & (np.asarray(self.mask[z, y, x]) != 0)

    def contains(self, locations_xyz_angstrom: ArrayLike) -> NDArray[np.bool_]:
        """Return ``(N,)``: whether the tomogram's voxels that are nearest to ``(N, 3)`` points are used."""
        centers = xyz_angstrom_to_zyx_voxel(locations_xyz_angstrom, self.voxel_spacing)
        z, y, x = np.clip(np.floor(centers + 0.5).astype(int), 0, np.subtract(self.shape, 1)).T
        return self.lookup(z, y, x)

    def overlaps(self, low_zyx_angstrom: ArrayLike, high_zyx_angstrom: ArrayLike) -> bool:
        """Return whether a voxel is used whose centre lies in a box, its ends included."""
        low = np.ceil(np.asarray(low_zyx_angstrom) / self.voxel_spacing - SLACK)
        high = np.floor(np.asarray(high_zyx_angstrom) / self.voxel_spacing + SLACK) + 1
        low, high = (np.clip(end, 0, self.shape).astype(int) for end in (low, high))
        return bool((low < high).all()) and bool(self.crop(_triple(low), _triple(high - low)).any())

    def shrunk(self, margin: float) -> Region:
        """Return the voxels at least ``margin`` angstrom, to half a voxel, inside the region and the tomogram."""
        if not margin:
            return self
        rim = math.ceil(margin / self.voxel_spacing[0] - 0.5 - SLACK)
        plane = np.pad(self.plane, 1)
        plane = _far_inside(plane, self.voxel_spacing[1:], margin)[1:-1, 1:-1]
        mask = self.mask
        if mask is not None:
            shrunk, reach = np.zeros(self.shape, bool), math.ceil(margin / self.voxel_spacing[0]) + 1
            for first in range(self.depth[0], self.depth[1], PLANES_AT_ONCE):
                low, stop = max(0, first - reach), min(first + PLANES_AT_ONCE, self.depth[1])
                block = _far_inside(np.asarray(mask[low : stop + reach]) != 0, self.voxel_spacing, margin)
                shrunk[first:stop] = block[first - low : stop - low]
            mask = shrunk
        return replace(self, depth=(self.depth[0] + rim, self.depth[1] - rim), plane=plane, mask=mask)

    @cached_property
    def counts(self) -> NDArray[np.int_]:
        """How many voxels of each plane are used, ``(D,)``."""
        counts = np.zeros(self.shape[0], int)
        for z in range(*self.depth):
            counts[z] = self.crop((z, 0, 0), (1, *self.shape[1:])).sum() if self.mask is not None else self.plane.sum()
        return counts

    def random_voxel(self, rng: np.random.Generator) -> Shape3D:
        """Return the index of a used voxel, each as likely as any other."""
        ends = np.cumsum(self.counts)
        z = int(np.searchsorted(ends, rng.integers(ends[-1]), side="right"))
        used = np.flatnonzero(self.crop((z, 0, 0), (1, *self.shape[1:])))
        y, x = divmod(int(rng.choice(used)), self.shape[2])
        return z, y, x


@dataclass(frozen=True)
class Selection:
    """Which picks of a tomogram are kept, by where they lie.

    Parameters
    ----------
    region
        Picks outside are dropped.
    margin
        Angstrom; picks nearer to a face of the tomogram, or to a voxel outside the region, are dropped.
    avoid
        A structure, such as a membrane. ``None``: there is none.
    avoid_distance
        Angstrom; picks in the structure, or as near to it, are dropped.
    """

    region: Region
    margin: float = 0.0
    avoid: Region | None = None
    avoid_distance: float = 0.0

    def keep(self, picks: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, int]]:
        """Return the picks that are kept, and how many are not, by reason."""
        dropped: dict[str, int] = {}
        spacing = self.region.voxel_spacing

        def drop(reason: str, unwanted: Callable[[NDArray[np.float64]], NDArray[np.bool_]]) -> None:
            nonlocal picks
            out = unwanted(picks[["x", "y", "z"]].to_numpy(np.float64))
            if out.any():
                dropped[reason] = int(out.sum())
                picks = picks[~out]

        drop("outside the region", lambda points: ~self.region.contains(points))
        if self.margin:

            def outside(start: Shape3D, shape: Shape3D) -> NDArray[np.bool_]:
                return ~self.region.crop(start, shape)

            reason = f"within {self.margin:g} angstrom of the region's border or a face"
            drop(reason, lambda points: is_near(points, outside, spacing, self.margin))
        if self.avoid is not None:
            crop, distance = self.avoid.crop, self.avoid_distance
            reason = f"within {distance:g} angstrom of the structure to avoid"
            drop(reason, lambda points: is_near(points, crop, spacing, distance))
        return picks.reset_index(drop=True), dropped


def is_near(
    locations_xyz_angstrom: ArrayLike,
    crop: Callable[[Shape3D, Shape3D], NDArray[np.bool_]],
    voxel_spacing: Spacing3D,
    distance: float,
) -> NDArray[np.bool_]:
    """Tell which of ``(N, 3)`` points lie within ``distance`` angstrom of a set of voxels, which are boxes.

    Only the voxels about each point are looked at, ``crop(start_zyx, shape)``.
    """
    centers = xyz_angstrom_to_zyx_voxel(locations_xyz_angstrom, voxel_spacing)
    reach = np.ceil(distance / np.array(voxel_spacing)).astype(int) + 1
    near = np.zeros(len(centers), bool)
    for index, center in enumerate(centers):
        start = np.floor(center + 0.5).astype(int) - reach
        voxels = crop(_triple(start), _triple(2 * reach + 1))
        if voxels.any():
            # From a point to a voxel is as far as to the nearest point of its box.
            z, y, x = (
                np.square(np.maximum(np.abs(first + np.arange(2 * n + 1) - at) - 0.5, 0) * side)
                for first, n, at, side in zip(start, reach, center, voxel_spacing, strict=True)
            )
            near[index] = (voxels & (z[:, None, None] + y[:, None] + x <= distance**2)).any()
    return near


def is_crowded(locations_xyz_angstrom: ArrayLike, scores: ArrayLike, distance: float) -> NDArray[np.bool_]:
    """Tell which of ``(N, 3)`` points lie within ``distance`` angstrom of a better one, which is not crowded itself."""
    locations = np.asarray(locations_xyz_angstrom, np.float64).reshape(-1, 3)
    crowded = np.zeros(len(locations), bool)
    if not len(locations):
        return crowded
    tree = cKDTree(locations)
    for best in np.argsort(-np.asarray(scores, np.float64), kind="stable"):
        if not crowded[best]:
            others = tree.query_ball_point(locations[best], distance)
            crowded[[other for other in others if other != best]] = True
    return crowded


def _voxel_range(
    axis: str,
    index: int,
    shape: Shape3D,
    voxel_spacing: Spacing3D,
    ranges: Mapping[str, Range],
    where: object,
) -> slice:
    """Return the voxels along an axis whose centres lie in its range, the upper end excluded."""
    size, side = shape[index], voxel_spacing[index]
    low, high = ranges.get(axis, (None, None))
    first = 0 if low is None else math.ceil(low / side - SLACK)
    stop = size if high is None else math.ceil(high / side - SLACK)
    if not max(first, 0) < min(stop, size):
        expected = f"a range within 0 to {size * side:.0f} angstrom, the lower end first"
        found = ", ".join("null" if end is None else f"{end:g}" for end in (low, high))
        raise InputError(f"{where}: {axis}", expected, f"[{found}]", "correct it, in angstrom")
    return slice(max(first, 0), min(stop, size))


def _in_polygon(corners_xy: NDArray[np.float64], y: NDArray[np.floating], x: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Return ``(H, W)`` by the even-odd rule (Shimrat 1962, doi:10.1145/368637.368653)."""
    inside = np.zeros((len(y), len(x)), bool)
    for (x0, y0), (x1, y1) in zip(np.roll(corners_xy, 1, axis=0), corners_xy, strict=True):
        rows = (y0 <= y) != (y1 <= y)  # never where the edge is level
        if rows.any():
            crossing = x0 + (y[rows] - y0) * (x1 - x0) / (y1 - y0)
            inside[rows] ^= x < crossing[:, None]
    return inside


def _far_inside(used: NDArray[np.bool_], spacing: Sequence[float], margin: float) -> NDArray[np.bool_]:
    """Return the voxels whose centres are ``margin`` away from the nearest voxel that is not used."""
    if used.all():  # the distance to nothing is not defined
        return used
    far: NDArray[np.bool_] = ndimage.distance_transform_edt(used, spacing) >= margin + min(spacing) * (0.5 - SLACK)
    return far


def _triple(values: NDArray[np.int_]) -> Shape3D:
    z, y, x = (int(value) for value in values)
    return z, y, x
