"""MRC files (``.mrc``, ``.rec``, ``.map``): the header is checked, the voxels are memory-mapped.

Format: MRC2014 (https://www.ccpem.ac.uk/mrc_format/mrc2014.php; Cheng et al. 2015, doi:10.1016/j.jsb.2015.04.002) and
IMOD's additions (https://bio3d.colorado.edu/imod/doc/mrc_format.txt). The header is parsed by ``mrcfile``; what it
would only warn of is refused here, in one line.

The first section, row and column are z, y, x = 0; the header's origin and ``nxstart`` are not applied, as IMOD,
RELION and the pickers do not apply them either.
"""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
from numpy.typing import NDArray

from czii25d.errors import InputError
from czii25d.geometry import Spacing3D

logger = logging.getLogger(__name__)

VOLUME_SUFFIXES = (".mrc", ".rec", ".map")
STACK_SUFFIXES = (".mrcs", ".st", ".ali", ".preali")  # images of a tilt series, by the habits of RELION and IMOD
MRC_SUFFIXES = (*VOLUME_SUFFIXES, *STACK_SUFFIXES)
MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
HEADER_BYTES = 1024
PACKED = {
    b"\x1f\x8b\x08": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"PK\x03\x04": ("zip", "unzip"),
}
IMOD_STAMP, IMOD_SIGNED_BYTES = 1146047817, 1  # words 39 and 40 of the header: "IMOD", and a bit of its flags


def open_mrc(path: Path, voxel_spacing: Spacing3D | None = None) -> tuple[NDArray[Any], Spacing3D]:
    """Check an MRC file's header and map its voxels.

    Parameters
    ----------
    path
        The file, of either byte order and with or without an extended header.
    voxel_spacing
        Angstrom per voxel along z, y, x, in place of the header's.

    Returns
    -------
    array, voxel_spacing
        ``(D, H, W)``, read-only and memory-mapped; angstrom per voxel along z, y, x.

    Raises
    ------
    InputError
        If it is compressed, no MRC file, a stack of images or of volumes, of complex numbers, stored in another
        order than x, y, z, of another length than its header says, or without a voxel size that is not given either.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
    for magic, (name, command) in PACKED.items():
        if not start.startswith(magic):
            continue
        raise InputError(path, "an MRC file, which can be memory-mapped", f"a {name} archive", f"unpack it ({command})")
    header = _read_header(path, size)
    nx, ny, nz = int(header.nx), int(header.ny), int(header.nz)
    mode, extended = int(header.mode), int(header.nsymbt)
    if mode not in MODES:
        known = ", ".join(map(str, MODES))
        raise InputError(
            path, f"real numbers (MRC mode {known})", f"mode {mode}", "convert it to mode 2 (32-bit float)"
        )
    if min(nx, ny, nz) < 1 or extended < 0:
        found = f"{nx} x {ny} x {nz} voxels (x, y, z) and {extended} bytes of extended header"
        raise InputError(path, "an MRC header with positive sides", found, "copy or export it again")
    dtype = np.dtype(_signed(MODES[mode], header)).newbyteorder(header.dtype["nx"].byteorder)
    expected = HEADER_BYTES + extended + nx * ny * nz * dtype.itemsize
    if size != expected:
        raise InputError(
            path,
            f"{expected} bytes ({nx} x {ny} x {nz} voxels of {dtype.itemsize}, header {HEADER_BYTES + extended})",
            f"{size} bytes",
            "copy it again; it is cut" if size < expected else "export it again; its header does not describe it",
        )
    _check_is_volume(path, header, nz)
    spacing = _spacing(path, header) if voxel_spacing is None else voxel_spacing
    return np.memmap(path, dtype, "r", HEADER_BYTES + extended, (nz, ny, nx)), spacing


def _read_header(path: Path, size: int) -> Any:
    if size < HEADER_BYTES:
        raise InputError(path, f"an MRC header of {HEADER_BYTES} bytes", f"{size} bytes", "copy it again; it is cut")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of is checked above, or harmless: no MAP stamp
            with mrcfile.open(path, permissive=True, header_only=True) as file:
                return file.header.copy()
    except (ValueError, OSError) as error:
        raise InputError(path, "an MRC header", f"{type(error).__name__}: {error}", "copy or export it again") from None


def _signed(kind: str, header: Any) -> str:
    """Return the type of mode 0's bytes: IMOD's are unsigned unless its flags say otherwise, MRC2014's are signed."""
    extra = bytes(header.extra2.tobytes())
    stamp, flags = np.frombuffer(extra, header.dtype["nx"], 2, offset=40).tolist()
    return "u1" if kind == "i1" and stamp == IMOD_STAMP and not flags & IMOD_SIGNED_BYTES else kind


def _check_is_volume(path: Path, header: Any, nz: int) -> None:
    axes = (int(header.mapc), int(header.mapr), int(header.maps))
    if axes not in ((1, 2, 3), (0, 0, 0)):  # zeros: written before the fields had a meaning
        raise InputError(
            path,
            "columns, rows and sections along x, y, z (mapc, mapr, maps = 1, 2, 3)",
            f"{axes[0]}, {axes[1]}, {axes[2]}",
            "rewrite it in that order",
        )
    space_group, sections = int(header.ispg), int(header.mz)
    if space_group >= 400:
        raise InputError(path, "one volume", f"a stack of volumes (ispg {space_group})", "extract the tomogram from it")
    # Reconstructions are often marked as image stacks (ispg 0); what tells a stack is one section per unit cell.
    if nz == 1 or (space_group == 0 and sections == 1) or path.suffix.lower() in STACK_SUFFIXES:
        found = "one image" if nz == 1 else f"a stack of {nz} images"
        cure = "give the reconstruction; if it is one, name it .mrc and mark it as a volume (ispg 1, mz = nz)"
        raise InputError(path, "a tomogram", found, cure)


def _spacing(path: Path, header: Any) -> Spacing3D:
    cell = [float(header.cella[axis]) for axis in "zyx"]
    samples = [int(header[name]) for name in ("mz", "my", "mx")]
    z, y, x = (side / count if count > 0 else 0.0 for side, count in zip(cell, samples, strict=True))
    if not all(math.isfinite(side) and side > 0 for side in (z, y, x)):
        raise InputError(
            path, "a voxel size above 0 in its header", f"{z:g}, {y:g}, {x:g} angstrom (z, y, x)", "give voxel_spacing"
        )
    if z == y == x == 1:
        logger.warning(
            "%s: its header says 1 angstrom per voxel, as programs write that do not know; if it is another, give "
            "voxel_spacing",
            path,
        )
    return z, y, x
