"""Particles copied from elsewhere into the background of a tile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from czii25d.data.augment import Pose
from czii25d.data.targets import HeatmapTarget
from czii25d.geometry import Shape3D

SOFT_EDGE = 0.3  # of the radius: so far beyond it the copy fades out; empirical
TRIES = 8


@dataclass(frozen=True)
class Paste:
    """A ball about a particle, and where in a tile it goes.

    Parameters
    ----------
    volume, center_zyx
        Where it is copied from, voxels.
    pose
        How the copy lies; its centre is of no account.
    place_zyx
        Where the particle comes to lie in the tile, voxels.
    channel, radius
        Of the particle; the radius in angstrom.
    """

    volume: int
    center_zyx: NDArray[np.float64]
    pose: Pose
    place_zyx: NDArray[np.float64]
    channel: int
    radius: float


class Pasting:
    """Draws what is pasted into a tile: particles that stand alone, each class equally often.

    Parameters
    ----------
    targets
        Of the volumes, in their order.
    labelled
        Which of each one's particles may be copied.
    """

    def __init__(self, targets: Sequence[HeatmapTarget], labelled: Sequence[NDArray[np.bool_]]) -> None:
        self._targets = list(targets)
        self._radii = [np.array(target.particles.radii) for target in targets]
        self._sources: dict[int, list[tuple[int, NDArray[np.float64]]]] = {}
        for volume, target in enumerate(targets):
            for particle in np.flatnonzero(labelled[volume] & self._stand_alone(volume)):
                own = self._sources.setdefault(int(target.channels[particle]), [])
                own.append((volume, target.centers_zyx_voxel[particle]))

    def _stand_alone(self, volume: int) -> NDArray[np.bool_]:
        """Tell which particles' balls, soft edge included, lie inside the volume and touch no other particle."""
        target = self._targets[volume]
        centers, radius = target.centers_zyx_voxel * target.voxel_spacing, self._radii[volume][target.channels]
        reach = (1 + SOFT_EDGE) * radius
        last = (np.array(target.shape) - 1) * target.voxel_spacing
        inside = ((centers >= reach[:, None]) & (centers <= last - reach[:, None])).all(1)
        gap = cdist(centers, centers) - reach[:, None] - radius
        np.fill_diagonal(gap, np.inf)
        return inside & (gap > 0).all(1)

    def draw(self, volume: int, pose: Pose, tile_shape: Shape3D, rng: np.random.Generator) -> Paste | None:
        """Draw a particle and a free place in a tile for it; ``None`` where a few tries find none."""
        if not self._sources:
            return None
        channel = int(rng.choice(list(self._sources)))
        source, center = self._sources[channel][rng.integers(len(self._sources[channel]))]
        radius = float(self._radii[source][channel])
        target = self._targets[volume]
        others = target.centers_zyx_voxel * target.voxel_spacing
        free = (1 + SOFT_EDGE) * radius + self._radii[volume][target.channels]
        places = rng.uniform(0, np.array(tile_shape) - 1, (TRIES, 3))
        angle = rng.uniform(-math.pi, math.pi)
        distances = cdist(pose.to_tomogram(places, tile_shape) * target.voxel_spacing, others)
        is_free = (distances > free).all(1)
        if not is_free.any():
            return None
        turned = replace(pose, angle=angle, voxel_spacing=self._targets[source].voxel_spacing)
        return Paste(source, center, turned, places[is_free.argmax()], channel, radius)
