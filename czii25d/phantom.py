"""Simulated tomograms with a known truth: the demonstration's data, and the tests'.

Six procedural particles have the sizes and point-group symmetries of the six of the CZII challenge. Each is a
sum of Gaussian blobs, closed under its point group, which can be evaluated at any orientation and sub-voxel
position: its centre of mass *is* the pick. Unlabelled look-alikes share size and mass with them, but not
structure.

The image is formed in Fourier space: missing wedge (beam along z, tilt axis along y), loss of the lowest
frequencies as in the contrast transfer of a defocused microscope, and a Gaussian band limit. Noise goes the
same way. Protein is dark, and values have the mean and the spread of the competition's denoised tomograms.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import fft
from scipy.spatial.distance import cdist
from scipy.spatial.transform import Rotation

from czii25d.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from czii25d.geometry import Shape3D, Spacing3D
    from czii25d.particles import ParticleSet

    Points = NDArray[np.float64]  # (N, 3), x y z

VALUE_MEAN, VALUE_STD = 5.2577832e-08, 7.199929e-06  # the constants the published 4th place normalises with
LOOK_ALIKES = ("globule", "bead", "filament")


@dataclass(frozen=True)
class Imaging:
    """How a specimen becomes a tomogram; solid protein has contrast 1 before.

    Parameters
    ----------
    noise
        Standard deviation of the noise, after filtering.
    drift
        Standard deviation of the slow variation of the background, as from ice thickness.
    drift_angstrom
        Half of the drift's amplitude is left at this wavelength, less at shorter ones.
    wedge_degrees
        Largest tilt, above 0; 90 leaves no wedge missing.
    low_cut_angstrom
        Half of the contrast is left at this wavelength, less at longer ones; 0 switches the loss off.
    resolution_angstrom
        Half of the contrast is left at this wavelength, less at shorter ones.
    """

    noise: float = 0.05
    drift: float = 0.03
    drift_angstrom: float = 400.0
    wedge_degrees: float = 60.0
    low_cut_angstrom: float = 250.0
    resolution_angstrom: float = 40.0

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"imaging.{key}", "a number of at least 0", repr(value), "correct it")
        if not 0 < self.wedge_degrees <= 90:
            raise InputError("imaging.wedge_degrees", "above 0, at most 90", str(self.wedge_degrees), "correct it")


@dataclass(frozen=True)
class _Body:
    """Equal Gaussian blobs about the origin, their centre of mass; angstrom."""

    centers: Points
    sigma: float
    contrast: float  # where the blobs are densest
    is_chain: bool = False  # takes the room of its blobs rather than of a ball about them all

    def occupied(self) -> tuple[Points, float]:
        """Return centres and radius of the balls that other bodies keep out of."""
        if self.is_chain:
            return self.centers, self.sigma
        return np.zeros((1, 3)), float(np.linalg.norm(self.centers, axis=1).max()) + self.sigma

    def rotated(self, rotation: Rotation) -> _Body:
        return _Body(rotation.apply(self.centers), self.sigma, self.contrast, self.is_chain)


def _ball_of(centers: Points, sigma: float, radius: float, contrast: float = 1.0) -> _Body:
    """Scale blobs to fill a ball of ``radius`` angstrom, and centre them."""
    centers = centers - centers.mean(0)
    scale = radius / (np.linalg.norm(centers, axis=1).max() + sigma)
    return _Body(centers * scale, sigma * scale, contrast)


def _orbit(group: str, *points: tuple[float, float, float]) -> Points:
    """Return the images of points under a point group."""
    rotations = Rotation.create_group(group)  # type: ignore[arg-type]  # its stubs want a literal "Cn"
    return np.concatenate([rotation.apply(np.array(points)) for rotation in rotations])


def _ellipsoid(center: tuple[float, float, float], semi_axes: tuple[float, float, float]) -> Points:
    """Return the points of a cubic lattice, one apart, inside an ellipsoid."""
    ticks = np.arange(-9, 10)
    lattice = np.stack(np.meshgrid(ticks, ticks, ticks), -1).reshape(-1, 3)
    return lattice[((lattice / np.array(semi_axes)) ** 2).sum(1) <= 1] + np.array(center)


# Blob centres and sigma, in any unit: they are scaled to the particle's radius.
STRUCTURES: dict[str, tuple[Points, float]] = {
    "apo-ferritin": (_orbit("O", (0.66, 0.40, 0.16)), 0.17),  # 24 chains about an empty core
    "beta-galactosidase": (_orbit("D2", (0.30, 0.18, 0.16), (0.62, 0.22, 0.20), (0.40, 0.52, 0.12)), 0.16),
    "ribosome": (  # two unequal subunits with a cleft between
        np.concatenate([_ellipsoid((1.3, 0.0, 0.0), (2.8, 3.3, 3.0)), _ellipsoid((-3.1, 0.5, 0.5), (1.0, 3.0, 1.9))]),
        0.5,
    ),
    "thyroglobulin": (  # a long, twisted dimer
        _orbit("C2", (0.16, 0.1, 0.0), (0.36, 0.24, 0.1), (0.58, 0.2, -0.1), (0.8, 0.04, 0.02), (0.48, -0.1, 0.1)),
        0.15,
    ),
    "virus-like-particle": (_orbit("I", (0.61, 0.45, 0.30), (0.50, 0.58, 0.10)), 0.11),  # an empty shell
    "beta-amylase": (_orbit("C4", (0.52, 0.10, 0.14), (0.44, 0.30, -0.20)), 0.22),
}


def _look_alike(kind: str, radii: Sequence[float], rng: np.random.Generator) -> _Body:
    """Return an object that is none of the particles, but as large and heavy as one of ``radii`` angstrom."""
    if kind == "bead":  # as of colloidal gold: small and strong
        return _Body(np.zeros((1, 3)), 25.0, rng.uniform(2.0, 3.0))
    radius = float(rng.choice(radii))
    if kind == "filament":
        return _Body(np.arange(-5, 6)[:, None] * np.array([0.55 * radius, 0.0, 0.0]), 0.35 * radius, 1.0, is_chain=True)
    directions = rng.standard_normal((16, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return _ball_of(directions * rng.uniform(0, 0.4, (16, 1)) ** (1 / 3), 0.25, 0.9 * radius, rng.uniform(0.8, 1.2))


def _find_room(
    body: _Body, margin: float, box: Points, taken: Points, rng: np.random.Generator
) -> NDArray[np.float64] | None:
    """Return a random place, x y z, for a body; ``None`` where 4096 tries find no room.

    ``taken`` holds the balls of all bodies before: ``(N, 4)``, x y z radius.
    """
    if (box < 2 * margin).any():
        return None
    balls, radius = body.occupied()
    for _ in range(64):
        tries = rng.uniform(margin, box - margin, (64, 3))
        distances = cdist((tries[:, None] + balls).reshape(-1, 3), taken[:, :3])
        is_free = (distances >= radius + taken[:, 3]).reshape(64, -1).all(1)
        if is_free.any():
            return tries[is_free.argmax()]
    return None


def _render(volume: NDArray[np.float32], body: _Body, location: Points, voxel_spacing: Spacing3D) -> None:
    """Add a body at ``location``, x y z, to a volume ``(D, H, W)``; what lies outside is cut off."""
    centers, sigma = body.centers + location, body.sigma
    profiles, window = [], []
    for length, spacing, along in zip(volume.shape, voxel_spacing, centers.T[::-1], strict=True):
        first = max(0, math.ceil((along.min() - 4 * sigma) / spacing))
        stop = min(length, math.floor((along.max() + 4 * sigma) / spacing) + 1)
        profiles.append(np.exp(-((np.arange(first, stop) * spacing - along[:, None]) ** 2) / (2 * sigma**2)))
        window.append(slice(first, stop))
    z, y, x = profiles  # (N, d), (N, h), (N, w): a Gaussian is the product of its profiles
    densest = np.exp(-cdist(centers, centers, "sqeuclidean") / (2 * sigma**2)).sum(1).max()
    plane = (y[:, :, None] * x[:, None]).reshape(len(centers), -1)
    density = (body.contrast / densest) * (z.T @ plane)
    volume[tuple(window)] += density.reshape(z.shape[1], y.shape[1], x.shape[1])


def form_image(
    specimen: NDArray[np.float32], voxel_spacing: Spacing3D, imaging: Imaging, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Return what a reconstructed tilt series would show of a specimen ``(D, H, W)``, protein still bright.

    A tilt series about y measures the directions within ``wedge_degrees`` of the x axis in the x-z plane.
    """
    shape = specimen.shape
    kz, ky = (fft.fftfreq(n, d).astype(np.float32) for n, d in zip(shape[:2], voxel_spacing[:2], strict=True))
    kx = fft.rfftfreq(shape[2], voxel_spacing[2]).astype(np.float32)
    kz, ky = kz[:, None, None], ky[:, None]
    k2 = kz**2 + ky**2 + kx**2
    tilt = math.radians(imaging.wedge_degrees)
    half_sample = 0.5 / (shape[0] * voxel_spacing[0])
    is_measured = np.abs(kz) * math.cos(tilt) <= kx * math.sin(tilt) + half_sample
    transfer = is_measured * np.exp2(-k2 * imaging.resolution_angstrom**2)
    if imaging.low_cut_angstrom:
        transfer *= 1 - np.exp2(-k2 * imaging.low_cut_angstrom**2)

    def filtered(volume: NDArray[np.float32], gain: NDArray[np.float32]) -> NDArray[np.float32]:
        return fft.irfftn(fft.rfftn(volume) * gain, shape)

    image = filtered(specimen, transfer)
    slow = is_measured * np.exp2(-k2 * imaging.drift_angstrom**2) * (k2 > 0)
    for std, gain in ((imaging.noise, transfer), (imaging.drift, slow)):
        if std:
            noise = filtered(rng.standard_normal(shape, np.float32), gain)
            image += noise * (std / noise.std())
    return image


def simulate_tomogram(
    particles: ParticleSet,
    shape: Shape3D,
    voxel_spacing: Spacing3D,
    counts: Mapping[str, int],
    look_alikes: Mapping[str, int],
    imaging: Imaging,
    rng: np.random.Generator,
) -> tuple[NDArray[np.float32], pd.DataFrame]:
    """Simulate a tomogram of randomly oriented particles that neither overlap nor leave the volume.

    Parameters
    ----------
    particles
        Radii of the particles; the density is scaled to them.
    shape
        ``(D, H, W)`` voxels.
    voxel_spacing
        Angstrom per voxel along z, y, x.
    counts
        How many of each particle, by name.
    look_alikes
        How many of each of `LOOK_ALIKES`: lumpy globules of the particles' sizes and masses, strong little
        beads, filaments of the particles' widths. They may reach beyond the volume and have no pick.
    imaging
        How the specimen becomes an image.
    rng
        Source of all that is random.

    Returns
    -------
    volume, picks
        ``(D, H, W)`` float32, and a frame with columns ``particle, x, y, z`` in angstrom.

    Raises
    ------
    InputError
        For a particle without a structure, an unknown look-alike, a negative number, or too little room.
    """
    for key, numbers, known in (("counts", counts, STRUCTURES), ("look_alikes", look_alikes, LOOK_ALIKES)):
        for name, number in numbers.items():
            if name not in known:
                hint = did_you_mean(name, known)
                raise InputError(f"key {key}.{name}{hint}", f"one of {', '.join(known)}", repr(name), "correct it")
            if number < 0:
                raise InputError(f"key {key}.{name}", "a number of at least 0", str(number), "raise it")
    radii = {name: particles[particles.channel(name)].radius for name in counts}
    wanted = [name for name, number in counts.items() for _ in range(number)]
    queue = [(name, _ball_of(*STRUCTURES[name], radii[name])) for name in wanted]
    sizes = [radii[name] for name in wanted] or list(particles.radii)
    queue += [("", _look_alike(kind, sizes, rng)) for kind, number in look_alikes.items() for _ in range(number)]
    # the picky ones first: particles, which stay inside, before look-alikes; large before small
    queue.sort(key=lambda item: (not item[0], -item[1].occupied()[1]))

    specimen = np.zeros(shape, np.float32)
    box = ((np.array(shape) - 1) * voxel_spacing)[::-1]
    taken = np.zeros((0, 4))
    rows: list[tuple[str, float, float, float]] = []
    for name, upright in queue:
        body = upright.rotated(Rotation.from_quat(rng.standard_normal(4)))
        location = _find_room(body, radii[name] if name else 0.0, box, taken, rng)
        if location is None:
            raise InputError(
                f"simulated tomogram of {shape} voxels",
                f"room for {len(queue)} objects",
                f"room for {len(rows) if name else 'the particles but not all look-alikes'}",
                "lower counts or look_alikes, or raise shape",
            )
        balls, radius = body.occupied()
        taken = np.vstack([taken, np.column_stack([balls + location, np.full(len(balls), radius)])])
        _render(specimen, body, location, voxel_spacing)
        if name:
            rows.append((name, *location))
    image = form_image(specimen, voxel_spacing, imaging, rng)
    volume = (image.mean() - image) * (VALUE_STD / image.std()) + VALUE_MEAN
    return volume.astype(np.float32), pd.DataFrame(rows, columns=["particle", "x", "y", "z"])
