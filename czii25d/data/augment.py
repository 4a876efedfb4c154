"""Random poses and intensities of training tiles: one resampling of the image, none of the target."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from czii25d.errors import InputError
from czii25d.geometry import Shape3D

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Pose:
    """How a tile lies in a tomogram: rotated in the plane, scaled alike along all axes, mirrored.

    Turning about z keeps the missing wedge near where the network will meet it only on average; the published
    recipe turns by any angle all the same, and it pays.

    Parameters
    ----------
    center_zyx
        Where the middle of the tile lies, in voxels of the tomogram.
    angle
        In-plane, radians, from y towards x.
    scale
        Above 1 the tile shows a larger part of the tomogram, so particles look smaller.
    flip_z, flip_x
        Mirrored along that axis of the tile.
    """

    center_zyx: tuple[float, float, float]
    angle: float = 0.0
    scale: float = 1.0
    flip_z: bool = False
    flip_x: bool = False

    @property
    def matrix(self) -> NDArray[np.float64]:
        """``(3, 3)``: a step in tile voxels, z y x, to the step in tomogram voxels."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        turn = np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])
        mirror = np.diag([-1.0 if self.flip_z else 1.0, 1.0, -1.0 if self.flip_x else 1.0])
        return self.scale * turn @ mirror

    def to_tomogram(self, points_zyx: NDArray[np.float64], tile_shape: Shape3D) -> NDArray[np.float64]:
        """Map ``(N, 3)`` voxel positions in the tile to positions in the tomogram."""
        middle = (np.array(tile_shape) - 1) / 2
        return (points_zyx - middle) @ self.matrix.T + self.center_zyx

    def to_tile(self, points_zyx: NDArray[np.float64], tile_shape: Shape3D) -> NDArray[np.float64]:
        """Map ``(N, 3)`` voxel positions in the tomogram to positions in the tile."""
        middle = (np.array(tile_shape) - 1) / 2
        return (points_zyx - np.asarray(self.center_zyx)) @ np.linalg.inv(self.matrix).T + middle

    def resample(
        self,
        crop: Callable[[Shape3D, Shape3D], NDArray[np.float32]],
        volume_shape: Shape3D,
        tile_shape: Shape3D,
    ) -> NDArray[np.float32]:
        """Read the tile out of a tomogram by linear interpolation; outside it, the mean (0).

        Parameters
        ----------
        crop
            ``(start_zyx, shape) -> (d, h, w)`` float32, for boxes inside the volume.
        volume_shape, tile_shape
            ``(D, H, W)``.

        Returns
        -------
        tile
            ``tile_shape``, float32.
        """
        corners = np.array([(z, y, x) for z in (0, 1) for y in (0, 1) for x in (0, 1)]) * (np.array(tile_shape) - 1)
        corners = self.to_tomogram(corners, tile_shape)
        low = np.floor(corners.min(0) + 1e-6).astype(int)
        high = np.ceil(corners.max(0) - 1e-6).astype(int) + 1
        inside_low, inside_high = np.clip(low, 0, volume_shape), np.clip(high, 0, volume_shape)
        box = np.zeros(high - low, np.float32)
        if (inside_high > inside_low).all():
            place = tuple(slice(a, b) for a, b in zip(inside_low - low, inside_high - low, strict=True))
            z, y, x = (int(side) for side in inside_high - inside_low)
            start = (int(inside_low[0]), int(inside_low[1]), int(inside_low[2]))
            box[place] = crop(start, (z, y, x))
        if self.angle == 0 and self.scale == 1 and box.shape == tuple(tile_shape):
            return np.ascontiguousarray(box[:: -1 if self.flip_z else 1, :, :: -1 if self.flip_x else 1])
        # The pose never mixes z with the plane, so the slices are channels of one 2D resampling ...
        plane = np.stack(np.meshgrid(*(np.arange(side) for side in tile_shape[1:]), indexing="ij"), -1).reshape(-1, 2)
        points = np.concatenate([np.zeros((len(plane), 1)), plane], 1)
        source_yx = self.to_tomogram(points, tile_shape)[:, 1:] - low[1:]
        sides = np.array(box.shape[1:])
        grid_xy = (2 * source_yx / np.maximum(sides - 1, 1) - 1)[:, ::-1].reshape(1, *tile_shape[1:], 2)
        grid = torch.from_numpy(np.ascontiguousarray(grid_xy, np.float32))
        turned = F.grid_sample(torch.from_numpy(box)[None], grid, align_corners=True, padding_mode="zeros")[0]
        # ... and z is interpolated by a small matrix.
        points = np.zeros((tile_shape[0], 3))
        points[:, 0] = np.arange(tile_shape[0])
        source_z = self.to_tomogram(points, tile_shape)[:, 0] - low[0]
        weights = np.maximum(0, 1 - np.abs(source_z[:, None] - np.arange(box.shape[0])))
        mix = torch.from_numpy(weights.astype(np.float32))
        return (mix @ turned.flatten(1)).reshape(tile_shape).numpy()


@dataclass(frozen=True)
class Augmentation:
    """Draws poses and changes intensities.

    Intensities stay plain floats: clipping z-scored voxels to [0, 1], as image libraries do, would erase two
    thirds of a tile.

    Parameters
    ----------
    rotate_prob, scale_range
        Probability of an in-plane turn by any angle together with a scale of ``1 ± scale_range``.
    flip_x_prob, flip_z_prob
        Probabilities of mirroring.
    contrast_prob, contrast_range, brightness_range
        Probability of ``x -> a x + b`` with ``a`` in ``1 ± contrast_range`` and ``b`` in ``± brightness_range``
        standard deviations.
    noise_prob, noise_range
        Probability of added Gaussian noise with a standard deviation up to ``noise_range``.
    """

    rotate_prob: float = 0.5
    scale_range: float = 0.1
    flip_x_prob: float = 0.5
    flip_z_prob: float = 0.0
    contrast_prob: float = 0.3
    contrast_range: float = 0.3
    brightness_range: float = 0.3
    noise_prob: float = 0.0
    noise_range: float = 0.3

    def __post_init__(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            limit = 1.0 if field.name.endswith("_prob") else math.inf
            if field.name in ("scale_range", "contrast_range"):
                limit = 0.9
            if not isinstance(value, int | float) or not 0 <= value <= limit:
                raise InputError(
                    f"key data.augment.{field.name}", f"a number in [0, {limit}]", repr(value), "correct it"
                )

    def draw_pose(self, center_zyx: tuple[float, float, float], rng: np.random.Generator) -> Pose:
        """Draw how a tile about that centre lies."""
        turn, flip_x, flip_z = rng.random(3) < (self.rotate_prob, self.flip_x_prob, self.flip_z_prob)
        angle, scale = rng.uniform(-math.pi, math.pi), 1 + rng.uniform(-self.scale_range, self.scale_range)
        if not turn:
            angle, scale = 0.0, 1.0
        return Pose(center_zyx, angle, scale, bool(flip_z), bool(flip_x))

    def change_intensity(self, tile: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
        """Return the tile with changed contrast, brightness and noise."""
        change, noise = rng.random(2) < (self.contrast_prob, self.noise_prob)
        if change:
            factor = 1 + rng.uniform(-self.contrast_range, self.contrast_range)
            tile = tile * np.float32(factor) + np.float32(rng.uniform(-self.brightness_range, self.brightness_range))
        if noise:
            tile = tile + rng.standard_normal(tile.shape, np.float32) * np.float32(rng.uniform(0, self.noise_range))
        return tile
