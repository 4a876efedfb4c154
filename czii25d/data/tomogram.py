"""Tomograms as they come: OME-Zarr of either Zarr format, checked before anything is made of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import zarr
from numpy.typing import NDArray

from czii25d.errors import InputError
from czii25d.geometry import Shape3D, Spacing3D

ANGSTROM_PER_UNIT = {"angstrom": 1.0, "nanometer": 10.0}
FOLDER_TOLERANCE = 0.05  # VoxelSpacing10.000 holds tomograms of 10.012 angstrom


@dataclass(frozen=True)
class Tomogram:
    """A tomogram that has been opened, not read.

    Parameters
    ----------
    path
        Its OME-Zarr.
    shape
        ``(D, H, W)`` voxels.
    voxel_spacing
        Angstrom per voxel along z, y, x.
    array
        The Zarr array itself.
    """

    path: Path
    shape: Shape3D
    voxel_spacing: Spacing3D
    array: zarr.Array


def open_tomogram(path: Path | str, level: int = 0) -> Tomogram:
    """Open one level of an OME-Zarr (Zarr v2 or v3) and check its metadata.

    Parameters
    ----------
    path
        ``.../VoxelSpacing10.000/denoised.zarr``. The number in its folder's name, if it has one, must agree
        with the metadata within 5 %.
    level
        Of the resolution pyramid; 0 is full resolution.

    Raises
    ------
    InputError
        If it cannot be opened, its axes are not z, y, x in angstrom or nanometer, its voxel spacing is
        missing, not positive or at odds with the folder, its origin is not 0, or it has no voxels.
    """
    path = Path(path)
    try:
        group = zarr.open_group(str(path), mode="r")
    except Exception as error:  # every store and format fails in its own way
        raise InputError(path, "an OME-Zarr group", f"{type(error).__name__}: {error}", "copy it again") from None
    attributes = group.attrs.asdict()
    multiscales = attributes.get("multiscales") or _mapping(attributes.get("ome")).get("multiscales")
    if not isinstance(multiscales, list) or not multiscales or not isinstance(multiscales[0], Mapping):
        raise InputError(path, "OME-Zarr metadata ('multiscales')", "none", "export it as OME-Zarr 0.4 or 0.5")
    unit = _read_unit(multiscales[0].get("axes"), path)
    datasets = multiscales[0].get("datasets")
    if not isinstance(datasets, list) or not 0 <= level < len(datasets):
        found = f"{len(datasets)} levels" if isinstance(datasets, list) else "none"
        raise InputError(path, f"resolution level {level}", found, "choose a lower level")
    spacings = [_read_spacing(multiscales[0], dataset, unit, path) for dataset in (datasets[0], datasets[level])]
    if match := re.fullmatch(r"VoxelSpacing(\d+\.?\d*)", path.parent.name):
        folder = float(match[1])
        if any(abs(spacing / folder - 1) > FOLDER_TOLERANCE for spacing in spacings[0]):
            raise InputError(
                path,
                f"a voxel spacing of about {folder} angstrom, as its folder says",
                f"{spacings[0]} angstrom",
                "correct the metadata or the folder's name",
            )
    name = str(_mapping(datasets[level]).get("path"))
    try:
        array = group[name]
    except Exception as error:
        raise InputError(
            path,
            f"the array '{name}' its metadata names",
            f"{type(error).__name__}: {error}",
            "copy it again",
        ) from None
    if not isinstance(array, zarr.Array) or array.ndim != 3 or 0 in array.shape or array.dtype.kind not in "iuf":
        found = f"{array.shape} of {array.dtype}" if isinstance(array, zarr.Array) else "a group"
        raise InputError(path / name, "a 3D array of real numbers with at least one voxel", found, "export it again")
    return Tomogram(path, (array.shape[0], array.shape[1], array.shape[2]), spacings[1], array)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _read_unit(axes: Any, path: Path) -> float:
    """Return angstroms per unit of length."""
    axes = [_mapping(axis) for axis in axes] if isinstance(axes, list) else []
    names = [axis.get("name") for axis in axes]
    if names != ["z", "y", "x"]:
        raise InputError(path, "the axes z, y, x", str(names), "export it with these axes")
    units = {axis.get("unit") for axis in axes}
    if len(units) != 1 or (unit := units.pop()) not in ANGSTROM_PER_UNIT:
        found = ", ".join(str(axis.get("unit")) for axis in axes)
        raise InputError(
            path,
            f"one unit of its axes ({' or '.join(ANGSTROM_PER_UNIT)})",
            found,
            "add the unit to its metadata",
        )
    return ANGSTROM_PER_UNIT[unit]


def _read_spacing(multiscale: Mapping[str, Any], dataset: Any, unit: float, path: Path) -> Spacing3D:
    """Return the voxel spacing of a level in angstrom: its own scale times the one of all levels, if any."""
    own = _transformations(_mapping(dataset))
    common = _transformations(multiscale)
    scale = own.get("scale")
    if not _is_triple(scale):
        raise InputError(path, "a voxel spacing (a scale of z, y, x)", str(scale), "add it to its metadata")
    spacing = [value * unit for value in scale]
    if _is_triple(factors := common.get("scale")):
        spacing = [value * factor for value, factor in zip(spacing, factors, strict=True)]
    if not all(math.isfinite(value) and value > 0 for value in spacing):
        raise InputError(path, "a voxel spacing above 0", f"{spacing} angstrom", "correct its metadata")
    for translation in (own.get("translation"), common.get("translation")):
        # The levels of a pyramid are shifted by a fraction of a voxel; more is another frame than the picks'.
        if _is_triple(translation) and any(
            abs(shift * unit) > 0.51 * side for shift, side in zip(translation, spacing, strict=True)
        ):
            raise InputError(path, "an origin at 0", f"a translation of {translation}", "export it without translation")
    return spacing[0], spacing[1], spacing[2]


def _transformations(fields: Mapping[str, Any]) -> dict[str, Any]:
    entries = fields.get("coordinateTransformations")
    entries = [_mapping(entry) for entry in entries] if isinstance(entries, list) else []
    return {str(entry.get("type")): entry.get(str(entry.get("type"))) for entry in entries}


def _is_triple(values: Any) -> TypeGuard[Sequence[float]]:
    return (
        isinstance(values, Sequence)
        and len(values) == 3
        and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    )


def read_volume(tomogram: Tomogram, fill_missing_chunks: bool = False) -> NDArray[np.float32]:
    """Read a whole tomogram.

    Parameters
    ----------
    fill_missing_chunks
        Zarr writers may leave out chunks that hold nothing but the fill value, and a broken copy lacks
        chunks in the very same way. ``True`` trusts the tomogram; ``False`` refuses it.

    Returns
    -------
    volume
        ``(D, H, W)``.

    Raises
    ------
    InputError
        If chunks are missing or cannot be decoded, or if the volume is constant or not finite.
    """
    array, path = tomogram.array, tomogram.path
    if not fill_missing_chunks and array.nchunks_initialized != array.nchunks:
        raise InputError(
            path,
            f"{array.nchunks} chunks",
            f"{array.nchunks_initialized}",
            "copy the missing ones again, or set fill_missing_chunks=true if they are empty on purpose",
        )
    try:
        # One chunk after the other: decoding is quick, and ten of the competition's chunks at once are 1 GB.
        with zarr.config.set({"async.concurrency": 1}):
            volume = np.asarray(array[...], np.float32)
    except Exception as error:  # every codec fails in its own way
        raise InputError(
            path,
            "readable chunks",
            f"a truncated or corrupt one ({type(error).__name__}: {error})",
            "copy the tomogram again",
        ) from None
    low, high = float(volume.min()), float(volume.max())  # NaN wins in both
    if not (math.isfinite(low) and math.isfinite(high)):
        count = int(volume.size - np.isfinite(volume).sum())
        raise InputError(path, "finite voxels", f"{count} NaN or infinite ones", "reconstruct or copy it again")
    if low == high:
        raise InputError(path, "a tomogram with contrast", f"{low} in every voxel", "reconstruct or copy it again")
    return volume


def describe_source(tomogram: Tomogram) -> dict[str, Any]:
    """Return what tells this tomogram from another, or from itself before a change; no voxel is read."""
    stored = [file.stat() for file in sorted((tomogram.path / tomogram.array.path).rglob("*")) if file.is_file()]
    return {
        "tomogram": str(tomogram.path),
        "array": tomogram.array.path,
        "shape": list(tomogram.shape),
        "voxel_spacing": list(tomogram.voxel_spacing),
        "bytes": sum(status.st_size for status in stored),
        "modified_ns": max((status.st_mtime_ns for status in stored), default=0),
    }
