"""What is done to a tomogram before it becomes a volume: its contrast and its voxel spacing are brought to order."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from czii25d.contrast import Contrast, contrast_of, protein_skewness
from czii25d.data.tomogram import Tomogram, describe_source, read_volume
from czii25d.errors import InputError
from czii25d.geometry import Shape3D, Spacing3D, spacing_text
from czii25d.resampling import is_same_spacing, resample_planes, resampled_shape

logger = logging.getLogger(__name__)

VOLUME_CONTRAST: Contrast = "dark"  # of protein in every volume
GivenContrast = Literal["dark", "bright", "auto"]


def empty(shape: Shape3D) -> NDArray[np.float32]:
    """Return room for voxels in memory."""
    return np.empty(shape, np.float32)


@dataclass(frozen=True)
class Preparation:
    """How tomograms are read.

    Parameters
    ----------
    fill_missing_chunks
        See `czii25d.data.tomogram.read_volume`.
    contrast
        What protein is in the tomograms: ``"dark"``, ``"bright"``, or ``"auto"``: look and say.
    wanted_contrast
        What it shall be: where it is the other, voxels are mirrored about their mean.
    voxel_spacing
        Angstrom per voxel along z, y, x that the tomograms are brought to; ``None``: their own.

    Raises
    ------
    InputError
        If the contrast is none of these.
    """

    fill_missing_chunks: bool = False
    contrast: GivenContrast = VOLUME_CONTRAST
    wanted_contrast: Contrast = VOLUME_CONTRAST
    voxel_spacing: Spacing3D | None = None

    def __post_init__(self) -> None:
        if self.contrast not in get_args(GivenContrast):
            raise InputError("key contrast", ", ".join(get_args(GivenContrast)), repr(self.contrast), "choose one")

    def describe(self, tomogram: Tomogram) -> dict[str, Any]:
        """Return what tells the prepared tomogram from others; of one that stays as it is, as `describe_source`."""
        source = describe_source(tomogram)
        if self.contrast != self.wanted_contrast:
            source |= {"contrast": [self.contrast, self.wanted_contrast]}
        if self._resamples(tomogram):
            source |= {"resampled_to": list(self.voxel_spacing or ())}
        return source

    def read(
        self, tomogram: Tomogram, run: str, room: Callable[[Shape3D], NDArray[np.float32]] = empty
    ) -> tuple[NDArray[np.float32], Spacing3D]:
        """Read a tomogram, and return its voxels and their spacing.

        Parameters
        ----------
        run
            Its name, for what is said.
        room
            Makes the array for resampled voxels, which may be a file.

        Raises
        ------
        InputError
            As `read_volume`; or if ``contrast`` is ``"auto"`` and cannot be told.
        """
        volume = read_volume(tomogram, self.fill_missing_chunks)
        if self._contrast(volume, tomogram.voxel_spacing, run) != self.wanted_contrast:
            mean = volume.mean(dtype=np.float64)
            volume *= -1
            volume += np.float32(2 * mean)
        if not self._resamples(tomogram):
            return volume, tomogram.voxel_spacing
        assert self.voxel_spacing is not None
        old, new = tomogram.voxel_spacing, self.voxel_spacing
        return resample(lambda start, stop: volume[start:stop], tomogram.shape, old, new, run, room), new

    def _resamples(self, tomogram: Tomogram) -> bool:
        return self.voxel_spacing is not None and not is_same_spacing(tomogram.voxel_spacing, self.voxel_spacing)

    def _contrast(self, volume: NDArray[np.float32], voxel_spacing: Spacing3D, run: str) -> Contrast:
        skewness = protein_skewness(volume, voxel_spacing)
        found = contrast_of(skewness)
        if self.contrast != "auto":
            if found == "bright" and self.contrast == "dark":
                logger.warning(
                    "run %s: taken as it is, but protein seems bright (skewness %+.2f); if it is, give contrast=bright",
                    *(run, skewness),
                )
            return self.contrast
        if found is None:
            raise InputError(
                f"run {run}",
                "a density whose skewness tells whether protein is dark (below 0) or bright",
                f"{skewness:+.2f}",
                "look at it, and set contrast=dark or contrast=bright",
            )
        logger.info("run %s: protein is %s (skewness %+.2f)", run, found, skewness)
        return found


def resample(
    planes: Callable[[int, int], NDArray[np.float32]],
    shape: Shape3D,
    old: Spacing3D,
    new: Spacing3D,
    run: str,
    room: Callable[[Shape3D], NDArray[np.float32]] = empty,
) -> NDArray[np.float32]:
    """Return a resampled volume, and say so; see `czii25d.resampling.resample_planes` and `Preparation.read`."""
    logger.info("run %s: resampled from %s to %s", run, *map(spacing_text, (old, new)))
    resampled = room(resampled_shape(shape, old, new))
    for place, plane in zip(resampled, resample_planes(planes, shape, old, new), strict=True):
        place[...] = plane
    return resampled
