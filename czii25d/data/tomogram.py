"""Tomograms as they come (OME-Zarr, MRC, ``.npy``), checked before anything is made of them.

Nothing is read when a tomogram is opened but its metadata: a Zarr decodes chunk by chunk, an MRC or ``.npy`` file is
memory-mapped.
"""

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

from czii25d.data.mrc import MRC_SUFFIXES, VOLUME_SUFFIXES, open_mrc
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
        Its OME-Zarr, MRC or ``.npy`` file.
    shape
        ``(D, H, W)`` voxels.
    voxel_spacing
        Angstrom per voxel along z, y, x.
    array
        ``(D, H, W)`` real numbers: the Zarr array itself, or the file, memory-mapped. A slice of it reads that slice.
    """

    path: Path
    shape: Shape3D
    voxel_spacing: Spacing3D
    array: zarr.Array | NDArray[Any]


def open_tomogram(path: Path | str, voxel_spacing: float | Sequence[float] | None = None, level: int = 0) -> Tomogram:
    """Open a tomogram and check its metadata.

    Parameters
    ----------
    path
        An OME-Zarr (Zarr v2 or v3), an MRC file (``.mrc``, ``.rec``, ``.map``) or a NumPy file (``.npy``). Where an
        OME-Zarr lies in a folder ``VoxelSpacing<number>``, its metadata must agree with that number within 5 %.
    voxel_spacing
        Angstrom per voxel, one number or z, y, x. It goes before what the file states, for headers that lie; a
        ``.npy`` states nothing and needs it. ``None``: as the file states.
    level
        Of an OME-Zarr's resolution pyramid; 0 is full resolution.

    Raises
    ------
    InputError
        If it cannot be opened, is of another format, compressed or cut; if its voxel spacing is missing or not
        positive; if its axes are not z, y, x; or if it has no voxels.
    """
    path = Path(path)
    given = None if voxel_spacing is None else as_voxel_spacing(voxel_spacing)
    if path.suffix.lower() in MRC_SUFFIXES and path.is_file():
        array, spacing = open_mrc(path, given)
        return Tomogram(path, (array.shape[0], array.shape[1], array.shape[2]), spacing, array)
    if path.suffix.lower() == ".npy" and path.is_file():
        return _open_npy(path, given)
    if path.is_dir():
        return _open_zarr(path, given, level)
    raise InputError(
        path,
        f"a tomogram (an OME-Zarr folder, {', '.join(VOLUME_SUFFIXES)} or .npy)",
        "no such file" if not path.exists() else f"a file ending in '{path.suffix}'",
        "correct the path" if not path.exists() else _unpacking_cure(path),
    )


def as_voxel_spacing(voxel_spacing: float | Sequence[float], where: object = "voxel_spacing") -> Spacing3D:
    """Return one number, or three (z, y, x), of angstrom per voxel as a checked triple."""
    sides = list(voxel_spacing) if isinstance(voxel_spacing, Sequence) else [voxel_spacing] * 3
    numbers = [side for side in sides if isinstance(side, int | float) and not isinstance(side, bool)]
    if len(sides) != 3 or len(numbers) != 3 or not all(math.isfinite(side) and side > 0 for side in numbers):
        raise InputError(
            where, "a voxel spacing above 0 angstrom, one number or z, y, x", repr(voxel_spacing), "correct it"
        )
    return float(numbers[0]), float(numbers[1]), float(numbers[2])


def _unpacking_cure(path: Path) -> str:
    packed = path.suffix.lower() in (".gz", ".bz2", ".xz", ".zip")
    return "unpack it first (gunzip, bunzip2, ...)" if packed else "convert it to one of these"


def _open_npy(path: Path, given: Spacing3D | None) -> Tomogram:
    if given is None:
        raise InputError(path, "a voxel spacing", "none: .npy files hold no metadata", "give voxel_spacing")
    return _of_array(path, load_npy(path), given, "export it again")


def load_npy(path: Path) -> Any:
    """Memory-map a ``.npy`` file; `InputError` if it is cut or holds objects."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:  # a truncated file cannot be mapped
        raise InputError(path, "a whole .npy file", f"{type(error).__name__}: {error}", "copy it again") from None


def wrap_array(array: NDArray[Any], voxel_spacing: float | Sequence[float] | None, name: str = "array") -> Tomogram:
    """Return an array ``(D, H, W)`` in memory as a tomogram; ``name`` takes the path's place.

    Raises
    ------
    InputError
        If it is no 3D array of real numbers, or there is no voxel spacing.
    """
    if voxel_spacing is None:
        raise InputError(name, "a voxel spacing", "none: arrays hold no metadata", "give voxel_spacing")
    return _of_array(Path(name), array, as_voxel_spacing(voxel_spacing), "give it as (D, H, W)")


def _of_array(path: Path, array: Any, voxel_spacing: Spacing3D, cure: str) -> Tomogram:
    if not isinstance(array, np.ndarray) or array.ndim != 3 or 0 in array.shape or array.dtype.kind not in "iuf":
        found = f"{array.shape} of {array.dtype}" if isinstance(array, np.ndarray) else "an archive"
        raise InputError(path, "a 3D array of real numbers with at least one voxel", found, cure)
    return Tomogram(path, (array.shape[0], array.shape[1], array.shape[2]), voxel_spacing, array)


def _open_zarr(path: Path, given: Spacing3D | None, level: int) -> Tomogram:
    try:
        group = zarr.open_group(str(path), mode="r")
    except Exception as error:  # every store and format fails in its own way
        raise InputError(path, "an OME-Zarr group", f"{type(error).__name__}: {error}", "copy it again") from None
    attributes = group.attrs.asdict()
    multiscales = attributes.get("multiscales") or _mapping(attributes.get("ome")).get("multiscales")
    if not isinstance(multiscales, list) or not multiscales or not isinstance(multiscales[0], Mapping):
        raise InputError(path, "OME-Zarr metadata ('multiscales')", "none", "export it as OME-Zarr 0.4 or 0.5")
    unit = _read_unit(multiscales[0].get("axes"), path, needed=given is None)
    datasets = multiscales[0].get("datasets")
    if not isinstance(datasets, list) or not 0 <= level < len(datasets):
        found = f"{len(datasets)} levels" if isinstance(datasets, list) else "none"
        raise InputError(path, f"resolution level {level}", found, "choose a lower level")
    if given is None:
        spacings = [_read_spacing(multiscales[0], dataset, unit, path) for dataset in (datasets[0], datasets[level])]
    else:
        spacings = [given, given]
    if (match := re.fullmatch(r"VoxelSpacing(\d+\.?\d*)", path.parent.name)) and given is None:
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


def _read_unit(axes: Any, path: Path, needed: bool) -> float:
    """Return angstroms per unit of length; where it is not needed, only the axes' order is checked."""
    axes = [_mapping(axis) for axis in axes] if isinstance(axes, list) else []
    names = [axis.get("name") for axis in axes]
    if names != ["z", "y", "x"]:
        raise InputError(path, "the axes z, y, x", str(names), "export it with these axes")
    units = {axis.get("unit") for axis in axes}
    if not needed:
        return 1.0
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
    volume = _read_zarr(array, path, fill_missing_chunks) if isinstance(array, zarr.Array) else _read_mapped(array)
    low, high = float(volume.min()), float(volume.max())  # NaN wins in both
    if not (math.isfinite(low) and math.isfinite(high)):
        count = int(volume.size - np.isfinite(volume).sum())
        raise InputError(path, "finite voxels", f"{count} NaN or infinite ones", "reconstruct or copy it again")
    if low == high:
        raise InputError(path, "a tomogram with contrast", f"{low} in every voxel", "reconstruct or copy it again")
    return volume


def _read_zarr(array: zarr.Array, path: Path, fill_missing_chunks: bool) -> NDArray[np.float32]:
    if not fill_missing_chunks and array.nchunks_initialized != array.nchunks:
        raise InputError(
            path,
            f"{array.nchunks} chunks",
            f"{array.nchunks_initialized}",
            "copy the missing ones again, or set fill_missing_chunks=true if they are empty on purpose",
        )
    try:
        # Two chunks at once: ten of the competition's, Zarr's default, are 1 GB.
        with zarr.config.set({"async.concurrency": 2}):
            return np.asarray(array[...], np.float32)
    except Exception as error:  # every codec fails in its own way
        raise InputError(
            path,
            "readable chunks",
            f"a truncated or corrupt one ({type(error).__name__}: {error})",
            "copy the tomogram again",
        ) from None


def _read_mapped(array: NDArray[Any]) -> NDArray[np.float32]:
    volume = np.empty(array.shape, np.float32)
    for plane, stored in zip(volume, array, strict=True):  # by planes: one pass over the file, no second copy
        plane[...] = stored
    return volume


def describe_source(tomogram: Tomogram) -> dict[str, Any]:
    """Return what tells this tomogram from another, or from itself before a change; no voxel is read."""
    if isinstance(tomogram.array, zarr.Array):
        name = tomogram.array.path
        stored = [file.stat() for file in sorted((tomogram.path / name).rglob("*")) if file.is_file()]
    else:
        name, stored = "", [tomogram.path.stat()]
    return {
        "tomogram": str(tomogram.path),
        "array": name,
        "shape": list(tomogram.shape),
        "voxel_spacing": list(tomogram.voxel_spacing),
        "bytes": sum(status.st_size for status in stored),
        "modified_ns": max((status.st_mtime_ns for status in stored), default=0),
    }
