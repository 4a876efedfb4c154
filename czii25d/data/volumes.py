"""Volumes: tomograms as float16 z-scores in one flat file, so that a crop costs next to nothing.

A volume is a folder: ``volume.npy``, ``(D, H, W)`` float16, mean 0 and standard deviation 1, memory-mapped by
whoever reads it; and ``meta.json``: the tomogram's mean, standard deviation, voxel spacing and source.
float16 is enough: its rounding error, at most 0.001 standard deviations within four of them, is far below a
tomogram's noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from czii25d.errors import InputError
from czii25d.files import write_aside
from czii25d.geometry import Shape3D, Spacing3D

Normalization = Literal["volume", "global"]
FORMAT_VERSION = 1
# Mean and standard deviation of the competition's denoised tomograms, as the 4th place states them.
GLOBAL_MEAN, GLOBAL_STD = 5.2577832e-08, 7.199929e-06
_CURE = "run 01_create_dataset.py again"


@dataclass(frozen=True)
class Volume:
    """A memory-mapped volume.

    Parameters
    ----------
    folder
        Where it lies; its name is the run's.
    data
        ``(D, H, W)`` float16 z-scores, memory-mapped.
    mean, std
        Of the tomogram.
    voxel_spacing
        Angstrom per voxel along z, y, x.
    normalization
        ``"volume"``: crops are z-scores of this volume. ``"global"``: of the competition's tomograms.
    """

    folder: Path
    data: NDArray[np.float16]
    mean: float
    std: float
    voxel_spacing: Spacing3D
    normalization: Normalization = "volume"

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name

    @property
    def shape(self) -> Shape3D:
        """``(D, H, W)``."""
        d, h, w = self.data.shape
        return d, h, w

    def crop(self, start_zyx: Shape3D, shape: Shape3D) -> NDArray[np.float32]:
        """Return a normalised copy of a box, float32; the box must lie inside the volume."""
        stop = tuple(start + side for start, side in zip(start_zyx, shape, strict=True))
        if min(start_zyx) < 0 or any(end > side for end, side in zip(stop, self.data.shape, strict=True)):
            raise ValueError(f"the box {start_zyx} to {stop} is not inside the volume {self.data.shape}")
        return self._normalise(self.data[tuple(slice(a, b) for a, b in zip(start_zyx, stop, strict=True))])

    def planes(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return normalised planes ``(stop - start, H, W)``, read from the file rather than mapped.

        Mapped pages would stay in memory until the whole volume is there.
        """
        _, height, width = self.shape
        with (self.folder / "volume.npy").open("rb") as file:
            file.seek(self.data.offset + start * height * width * self.data.itemsize)  # type: ignore[attr-defined]
            flat = np.fromfile(file, self.data.dtype, (stop - start) * height * width)
        return self._normalise(flat.reshape(-1, height, width))

    def _normalise(self, voxels: NDArray[np.float16]) -> NDArray[np.float32]:
        return _normalised(voxels, self.mean, self.std, self.normalization)

    def __reduce__(self) -> tuple[Any, ...]:
        """Send the path, not the voxels, to other processes."""
        return open_volume, (self.folder, self.normalization)


@dataclass(frozen=True)
class MemoryVolume:
    """A volume in memory: the same voxels, to the last bit, as `Volume` has in its file.

    Parameters
    ----------
    data
        ``(D, H, W)`` float16 z-scores.
    mean, std, voxel_spacing, normalization
        See `Volume`.
    """

    data: NDArray[np.float16]
    mean: float
    std: float
    voxel_spacing: Spacing3D
    normalization: Normalization = "volume"

    @classmethod
    def of(
        cls, volume: NDArray[np.float32], voxel_spacing: Spacing3D, normalization: Normalization = "volume"
    ) -> MemoryVolume:
        """Make one of a tomogram's voxels ``(D, H, W)``, finite and not constant (see `read_volume`)."""
        mean, std = _mean_and_std(volume)
        data = np.empty(volume.shape, np.float16)
        for plane, z_scores in zip(data, _z_scores(volume, mean, std), strict=True):
            plane[...] = z_scores
        return cls(data, mean, std, voxel_spacing, normalization)

    @property
    def shape(self) -> Shape3D:
        """``(D, H, W)``."""
        d, h, w = self.data.shape
        return d, h, w

    def planes(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return normalised planes ``(stop - start, H, W)``."""
        return _normalised(self.data[start:stop], self.mean, self.std, self.normalization)


def _mean_and_std(volume: NDArray[np.float32]) -> tuple[float, float]:
    # In double precision plane by plane, which are equally large: no copy of the whole is made.
    means, variances = np.array([(p.mean(dtype=np.float64), p.var(dtype=np.float64)) for p in volume]).T
    return float(means.mean()), math.sqrt(variances.mean() + means.var())


def _z_scores(volume: NDArray[np.float32], mean: float, std: float) -> Iterator[NDArray[np.float16]]:
    for plane in volume:
        yield ((plane - np.float32(mean)) * np.float32(1 / std)).astype("<f2")


def _normalised(
    voxels: NDArray[np.float16], mean: float, std: float, normalization: Normalization
) -> NDArray[np.float32]:
    voxels_f32 = voxels.astype(np.float32)
    if normalization == "global":
        gain, shift = gain_and_shift(mean, std, normalization)
        voxels_f32 *= np.float32(gain)
        voxels_f32 += np.float32(shift)
    return voxels_f32


def gain_and_shift(mean: float, std: float, normalization: Normalization) -> tuple[float, float]:
    """Return ``a, b`` that turn stored voxels into normalised ones, ``a x + b``."""
    return (std / GLOBAL_STD, (mean - GLOBAL_MEAN) / GLOBAL_STD) if normalization == "global" else (1.0, 0.0)


def write_volume(
    folder: Path | str, volume: NDArray[np.float32], voxel_spacing: Spacing3D, source: dict[str, Any]
) -> dict[str, Any]:
    """Write a volume, slice by slice, and return its metadata.

    Parameters
    ----------
    volume
        ``(D, H, W)``, finite and not constant (see `read_volume`).
    source
        Where it came from; kept as it is, to tell whether the volume is up to date.
    """
    mean, std = _mean_and_std(volume)
    meta = {
        "format_version": FORMAT_VERSION,
        "shape": list(volume.shape),
        "voxel_spacing": list(voxel_spacing),
        "mean": mean,
        "std": std,
        "source": source,
    }
    with write_aside(folder) as partial:
        partial.mkdir()
        with (partial / "volume.npy").open("wb") as file:
            header = {"descr": "<f2", "fortran_order": False, "shape": volume.shape}
            np.lib.format.write_array_header_1_0(file, header)
            for plane in _z_scores(volume, mean, std):
                file.write(plane.data)
        (partial / "meta.json").write_text(json.dumps(meta, indent=2))
    return meta


def read_meta(folder: Path | str) -> dict[str, Any]:
    """Return a volume's metadata; `InputError` if they are missing or not of this format."""
    path = Path(folder) / "meta.json"
    try:
        meta = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(folder, "a volume", "none", "run 01_create_dataset.py first") from None
    except ValueError as error:
        raise InputError(path, "a volume's metadata", f"malformed JSON ({error})", _CURE) from None
    if not isinstance(meta, dict) or meta.get("format_version") != FORMAT_VERSION:
        found = str(meta.get("format_version")) if isinstance(meta, dict) else "none"
        raise InputError(path, f"format version {FORMAT_VERSION}", found, _CURE)
    return meta


def open_volume(folder: Path | str, normalization: Normalization = "volume") -> Volume:
    """Open what 01 wrote for a run; nothing is read but the metadata.

    Raises
    ------
    InputError
        If there is no volume, it is damaged, or ``normalization`` is unknown.
    """
    folder = Path(folder)
    if normalization not in get_args(Normalization):
        raise InputError("normalization", " or ".join(get_args(Normalization)), repr(normalization), "choose one")
    meta = read_meta(folder)
    try:
        data = np.load(folder / "volume.npy", mmap_mode="r")
        mean, std = float(meta["mean"]), float(meta["std"])
        z, y, x = (float(side) for side in meta["voxel_spacing"])
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise InputError(folder, "a volume and its metadata", f"{type(error).__name__}: {error}", _CURE) from None
    if data.dtype != np.float16 or list(data.shape) != meta.get("shape"):
        raise InputError(
            folder / "volume.npy", f"{meta.get('shape')} of float16", f"{data.shape} of {data.dtype}", _CURE
        )
    return Volume(folder, data, mean, std, (z, y, x), normalization)
