"""Random poses and intensities of training tiles: drawn here, item by item; `czii25d.data.tiles` makes the voxels."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from czii25d.errors import InputError
from czii25d.geometry import Shape3D, Spacing3D

UPPER_LIMITS = {  # of the keys that are no probabilities; the others may be any number from 0
    "scale_range": 0.9,
    "stretch_range": 0.5,
    "contrast_range": 0.9,
    "tilt_range": 90.0,
    "noise_tilt": 90.0,
    "wedge_tilt_min": 90.0,
    "wedge_tilt_max": 90.0,
}


@dataclass(frozen=True)
class Pose:
    """How a tile lies in a tomogram: rotated, scaled, mirrored.

    Turning about z keeps the missing wedge near where the network will meet it only on average; the published
    recipe turns by any angle all the same, and it pays. Rotations are those of the specimen, in angstrom; where voxels
    are no cubes they shear the grid.

    Parameters
    ----------
    center_zyx
        Where the middle of the tile lies, in voxels of the tomogram.
    angle
        In-plane, radians, from y towards x.
    scale
        Along the tile's z, y, x. Above 1 the tile shows a larger part of the tomogram, so particles look smaller.
    flip_z, flip_x
        Mirrored along that axis of the tile.
    tilt, tilt_axis
        Turned out of the plane by ``tilt`` radians about the direction of the plane ``tilt_axis`` radians from y.
    voxel_spacing
        Of the tomogram along z, y, x, in any unit.
    """

    center_zyx: tuple[float, float, float]
    angle: float = 0.0
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    flip_z: bool = False
    flip_x: bool = False
    tilt: float = 0.0
    tilt_axis: float = 0.0
    voxel_spacing: Spacing3D = (1.0, 1.0, 1.0)

    @cached_property
    def matrix(self) -> NDArray[np.float64]:
        """``(3, 3)``: a step in tile voxels, z y x, to the step in tomogram voxels."""
        return self._turn / np.array(self.voxel_spacing)[:, None] * self._steps

    @cached_property
    def inverse(self) -> NDArray[np.float64]:
        """``(3, 3)``: a step in tomogram voxels to the step in tile voxels."""
        return self._turn.T * np.array(self.voxel_spacing) / self._steps[:, None]

    @cached_property
    def _turn(self) -> NDArray[np.float64]:
        turn = turn_about_z(self.angle)
        if not self.tilt:
            return turn
        return turn @ _turn_about((0.0, math.cos(self.tilt_axis), math.sin(self.tilt_axis)), self.tilt)

    @property
    def _steps(self) -> NDArray[np.float64]:
        """Lengths of the tile's voxels along its axes, in the unit of the spacing, below 0 where mirrored."""
        (sz, sy, sx), (z, y, x) = self.scale, self.voxel_spacing
        return np.array([-z * sz if self.flip_z else z * sz, y * sy, -x * sx if self.flip_x else x * sx])

    @property
    def is_straight(self) -> bool:
        """Whether the tile's axes are the tomogram's, mirrored at most, so that nothing is to be interpolated."""
        return self.angle == 0 and self.tilt == 0 and self.scale == (1.0, 1.0, 1.0)

    def to_tomogram(self, points_zyx: NDArray[np.float64], tile_shape: Shape3D) -> NDArray[np.float64]:
        """Map ``(N, 3)`` voxel positions in the tile to positions in the tomogram."""
        middle = (np.array(tile_shape) - 1) / 2
        return (points_zyx - middle) @ self.matrix.T + self.center_zyx

    def to_tile(self, points_zyx: NDArray[np.float64], tile_shape: Shape3D) -> NDArray[np.float64]:
        """Map ``(N, 3)`` voxel positions in the tomogram to positions in the tile."""
        middle = (np.array(tile_shape) - 1) / 2
        return (points_zyx - np.asarray(self.center_zyx)) @ self.inverse.T + middle

    def box(self, tile_shape: Shape3D) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
        """Return the first and one-past-last voxel, z y x, of the part of the tomogram that the tile shows."""
        half = np.abs(self.matrix) @ ((np.array(tile_shape) - 1) / 2)
        low = np.floor(np.array(self.center_zyx) - half + 1e-6).astype(int)
        high = np.ceil(np.array(self.center_zyx) + half - 1e-6).astype(int) + 1
        return low, high

    def to_tilt_frame(self, angle: float = 0.0) -> NDArray[np.float64]:
        """``(3, 3)``: a frequency of the tile, cycles per voxel, to one of the tilt series, per unit of spacing.

        There the beam is along z and the tilt axis along y, after a turn of the tilt axis by ``angle`` radians.
        """
        return turn_about_z(-angle) @ (self.inverse.T / np.array(self.voxel_spacing)[:, None])


def turn_about_z(angle: float) -> NDArray[np.float64]:
    """Return the ``(3, 3)`` rotation of z y x vectors by radians from y towards x."""
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])


def _turn_about(axis: tuple[float, float, float], angle: float) -> NDArray[np.float64]:
    a, b, c = axis
    cross = np.array([[0, -c, b], [c, 0, -a], [-b, a, 0]])  # Rodrigues' formula
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


@dataclass(frozen=True)
class Intensity:
    """What happens to a tile's values, in this order.

    Parameters
    ----------
    wedge_tilt, wedge_angle
        The tile is filtered as if a tilt series up to ``wedge_tilt`` degrees had shown it, whose tilt axis lies
        ``wedge_angle`` radians from the tomogram's; 90 degrees: not at all.
    gain, shift
        ``x -> gain x + shift``.
    noise_std, noise_key
        Standard deviation of added noise; which noise, in ``[0, 2^32)``.
    """

    wedge_tilt: float = 90.0
    wedge_angle: float = 0.0
    gain: float = 1.0
    shift: float = 0.0
    noise_std: float = 0.0
    noise_key: int = 0


@dataclass(frozen=True)
class Augmentation:
    """Draws poses and changes of intensity.

    Intensities stay plain floats: clipping z-scored voxels to [0, 1], as image libraries do, would erase two
    thirds of a tile.

    Parameters
    ----------
    rotate_prob, scale_range
        Probability of an in-plane turn by any angle together with a scale of ``1 ± scale_range``.
    tilt_range, stretch_range
        The same turn also leaves the plane by up to ``tilt_range`` degrees about any axis in it, and scales each axis
        on its own by ``1 ± stretch_range``.
    flip_x_prob, flip_z_prob
        Probabilities of mirroring.
    contrast_prob, contrast_range, brightness_range
        Probability of ``x -> a x + b`` with ``a`` in ``1 ± contrast_range`` and ``b`` in ``± brightness_range``
        standard deviations.
    noise_prob, noise_range
        Probability of added Gaussian noise with a standard deviation up to ``noise_range``.
    noise_tilt, noise_pink
        The noise is empty where a tilt series up to so many degrees measures nothing (90: nowhere), and its power falls
        with the frequency to this power (0: white, 1: pink).
    wedge_prob, wedge_tilt_min, wedge_tilt_max
        Probability that a tile loses a further missing wedge: that of a tilt series up to so many degrees, its axis
        anywhere in the plane.
    paste_prob
        Probability that a tile gains a particle from elsewhere, see `czii25d.data.paste`.
    """

    rotate_prob: float = 0.5
    scale_range: float = 0.1
    tilt_range: float = 0.0
    stretch_range: float = 0.0
    flip_x_prob: float = 0.5
    flip_z_prob: float = 0.0
    contrast_prob: float = 0.3
    contrast_range: float = 0.3
    brightness_range: float = 0.3
    noise_prob: float = 0.0
    noise_range: float = 0.3
    noise_tilt: float = 90.0
    noise_pink: float = 0.0
    wedge_prob: float = 0.0
    wedge_tilt_min: float = 40.0
    wedge_tilt_max: float = 60.0
    paste_prob: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            limit = 1.0 if field.name.endswith("_prob") else UPPER_LIMITS.get(field.name, math.inf)
            if not isinstance(value, int | float) or not 0 <= value <= limit:
                raise InputError(
                    f"key data.augment.{field.name}", f"a number in [0, {limit}]", repr(value), "correct it"
                )
        for name, least, value in (
            ("noise_tilt", 0.0, self.noise_tilt),
            ("wedge_tilt_min", 0.0, self.wedge_tilt_min),
            ("wedge_tilt_max", self.wedge_tilt_min - 1e-9, self.wedge_tilt_max),
        ):
            if value <= least:
                raise InputError(f"key data.augment.{name}", f"degrees above {least:g}", str(value), "raise it")

    def draw_pose(
        self,
        center_zyx: tuple[float, float, float],
        rng: np.random.Generator,
        voxel_spacing: Spacing3D = (1.0, 1.0, 1.0),
    ) -> Pose:
        """Draw how a tile about that centre lies."""
        turn, flip_x, flip_z = rng.random(3) < (self.rotate_prob, self.flip_x_prob, self.flip_z_prob)
        angle, scale = rng.uniform(-math.pi, math.pi), 1 + rng.uniform(-self.scale_range, self.scale_range)
        if not turn:
            return Pose(center_zyx, flip_z=bool(flip_z), flip_x=bool(flip_x), voxel_spacing=voxel_spacing)
        tilt, tilt_axis, scales = 0.0, 0.0, (scale, scale, scale)
        if self.tilt_range:
            tilt, tilt_axis = math.radians(rng.uniform(0, self.tilt_range)), rng.uniform(-math.pi, math.pi)
        if self.stretch_range:
            z, y, x = scale * (1 + rng.uniform(-self.stretch_range, self.stretch_range, 3))
            scales = (float(z), float(y), float(x))
        return Pose(center_zyx, angle, scales, bool(flip_z), bool(flip_x), tilt, tilt_axis, voxel_spacing)

    def draw_intensity(self, rng: np.random.Generator) -> Intensity:
        """Draw how a tile's values change."""
        change, noise = rng.random(2) < (self.contrast_prob, self.noise_prob)
        gain, shift, noise_std, noise_key, wedge_tilt, wedge_angle = 1.0, 0.0, 0.0, 0, 90.0, 0.0
        if change:
            gain = 1 + rng.uniform(-self.contrast_range, self.contrast_range)
            shift = rng.uniform(-self.brightness_range, self.brightness_range)
        if noise:
            noise_std, noise_key = rng.uniform(0, self.noise_range), int(rng.integers(2**32))
        if self.wedge_prob and rng.random() < self.wedge_prob:
            wedge_tilt = rng.uniform(self.wedge_tilt_min, self.wedge_tilt_max)
            wedge_angle = rng.uniform(-math.pi, math.pi)
        return Intensity(wedge_tilt, wedge_angle, gain, shift, noise_std, noise_key)
