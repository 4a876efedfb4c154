"""How whole tomograms are predicted and picked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from czii25d.errors import InputError
from czii25d.geometry import Shape3D, Spacing3D
from czii25d.particles import ParticleSet
from czii25d.tiling import Window, blend_window, check_stride

NMS_RADIUS_FACTOR = 0.6  # of the particle's radius; empirical: nearer than that there is no second one


@dataclass(frozen=True)
class InferenceOptions:
    """How whole tomograms are predicted and picked.

    Parameters
    ----------
    tile_shape
        ``(D, H, W)`` voxels that the network sees at once.
    stride
        Largest distance between neighbouring tiles along z, y, x; at most what ``margin`` leaves of a tile.
    window
        How overlapping tiles are blended, see `czii25d.tiling.axis_profile`.
    margin
        Voxels along z, y, x that are discarded at each face of a tile. The volume is mirrored at its own faces, so
        that they lie within a tile too.
    batch_size
        Tiles at once; halved when they do not fit into memory.
    nms_radius
        Angstrom, for all or by particle: of two peaks nearer than that the lower one is dropped. Where it is
        absent, ``NMS_RADIUS_FACTOR`` times the particle's radius.
    floor
        Smallest score that is kept at all.
    refine
        Sub-voxel centres.

    Raises
    ------
    InputError
        If a value is impossible, or the margin leaves nothing of a tile.
    """

    tile_shape: Shape3D = (16, 128, 128)
    stride: Shape3D = (8, 64, 64)
    window: Window = "pyramid"
    margin: Shape3D = (0, 0, 0)
    batch_size: int = 4
    nms_radius: Mapping[str, float] | float | None = None
    floor: float = 0.05
    refine: bool = True

    def __post_init__(self) -> None:
        if min(self.margin) < 0 or min(self.core_shape) < 1:
            raise InputError(
                "key infer.margin", f"less than half a tile, {self.tile_shape}", str(self.margin), "lower it"
            )
        check_stride(self.core_shape, self.stride)
        blend_window((1, 1, 1), self.window)
        if self.batch_size < 1:
            raise InputError("key infer.batch_size", "at least 1", str(self.batch_size), "raise it")
        if not self.floor > 0:
            raise InputError("key infer.floor", "a score above 0", str(self.floor), "raise it")
        given = self.nms_radius
        for radius in given.values() if isinstance(given, Mapping) else [1.0 if given is None else given]:
            if not radius > 0:
                raise InputError("key infer.nms_radius", "angstrom above 0", str(given), "raise it")

    @property
    def core_shape(self) -> Shape3D:
        """What the margin leaves of a tile, ``(D, H, W)``."""
        d, h, w = (side - 2 * rim for side, rim in zip(self.tile_shape, self.margin, strict=True))
        return d, h, w

    def nms_radius_by_name(self, particles: ParticleSet) -> dict[str, float] | None:
        """Return the angstroms that were given, particle by particle; ``None`` where none were."""
        if self.nms_radius is None or isinstance(self.nms_radius, Mapping):
            return None if self.nms_radius is None else dict(self.nms_radius)
        return dict.fromkeys(particles.names, float(self.nms_radius))

    def nms_radius_voxel(self, particles: ParticleSet, voxel_spacing: Spacing3D) -> NDArray[np.float64]:
        """Return ``(C, 3)``, along z, y, x."""
        given = self.nms_radius
        if isinstance(given, Mapping) or given is None:
            for name in given or ():
                particles.channel(name)  # refuses unknown ones
            given = {**{each.name: NMS_RADIUS_FACTOR * each.radius for each in particles}, **(given or {})}
            radii = [given[each.name] for each in particles]
        else:
            radii = [given] * len(particles)
        return np.array(radii)[:, None] / np.array(voxel_spacing)
