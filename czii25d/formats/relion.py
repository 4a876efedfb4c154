"""RELION's particle STAR files, of version 4 (pixels) and 5 (angstrom from the tomogram's centre).

Conventions
-----------
- RELION 4: ``rlnCoordinateX/Y/Z`` in pixels of the *unbinned* tilt series, whose pixel size is
  ``rlnTomoTiltSeriesPixelSize`` of the optics group. The first voxel's centre is at 0.
- RELION 5: ``rlnCenteredCoordinateX/Y/ZAngst`` in angstrom from the tomogram's centre, which RELION's own picker puts
  at ``(size / 2 - 1) * pixel size`` with the *unbinned* size and pixel size
  (https://github.com/3dem/relion/issues/1137). With the shape, voxel spacing and pixel size at hand the centre is
  ``shape * spacing / 2 - pixel size``: the binned tomogram's ``(size / 2 - 1) * spacing`` would lie up to a voxel
  away, which is why the pixel size is asked for.
- A particle is at its coordinate *minus* ``rlnOriginX/Y/ZAngst``, which are turned by the particle's subtomogram angles
  first (``ParticleSet::getPosition``, https://github.com/3dem/relion/blob/master/src/jaz/tomography/particle_set.cpp).
- Scores are in ``rlnAutopickFigureOfMerit``, classes in ``rlnClassNumber``. RELION has no names for classes: a further
  block, ``data_czii25d_classes``, which RELION does not read, holds them.

Labels: https://relion.readthedocs.io/en/latest/Reference/STA/Datatypes/particle_set.html
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from czii25d.errors import InputError
from czii25d.formats.base import Context, locations_of
from czii25d.formats.star import check_word, numbers, read_star, write_star
from czii25d.picks import empty_picks

PIXELS = tuple(f"rlnCoordinate{axis}" for axis in "XYZ")
CENTERED = tuple(f"rlnCenteredCoordinate{axis}Angst" for axis in "XYZ")
ORIGINS = tuple(f"rlnOrigin{axis}Angst" for axis in "XYZ")
ANGLES = tuple(f"rlnAngle{angle}" for angle in ("Rot", "Tilt", "Psi"))
SUBTOMOGRAM_ANGLES = tuple(f"rlnTomoSubtomogram{angle}" for angle in ("Rot", "Tilt", "Psi"))
TOMOGRAM, MICROGRAPH, CLASS, SCORE = "rlnTomoName", "rlnMicrographName", "rlnClassNumber", "rlnAutopickFigureOfMerit"
SCORES = (SCORE, "rlnLCCmax")  # the second is PyTom's
PIXEL_SIZE = "rlnTomoTiltSeriesPixelSize"
PIXEL_SIZES = (PIXEL_SIZE, "rlnMicrographOriginalPixelSize", "rlnDetectorPixelSize", "rlnPixelSize")
OPTICS_GROUP = "rlnOpticsGroup"
CLASSES_BLOCK, CLASSES_NUMBER, CLASSES_NAME = "czii25d_classes", "czii25dClassNumber", "czii25dParticle"
VERSIONS = {4: "version 30001", 5: "version 50001"}


def detect(path: Path) -> str:
    """Return ``"relion4"`` or ``"relion5"`` by the columns of a STAR file."""
    table = _particles(read_star(path), path)
    if CENTERED[0] in table:
        return "relion5"
    if PIXELS[0] in table:
        return "relion4"
    raise InputError(
        path,
        f"a RELION particle file with {PIXELS[0]} or {CENTERED[0]}",
        f"the columns {', '.join(map(str, table.columns))}",
        "export it from RELION, or give its format",
    )


def read_relion4(path: Path, context: Context) -> pd.DataFrame:
    """Read pixel coordinates; see `czii25d.formats.read_picks`."""
    return _read(path, context, 4)


def read_relion5(path: Path, context: Context) -> pd.DataFrame:
    """Read centred coordinates; see `czii25d.formats.read_picks`."""
    return _read(path, context, 5)


def write_relion4(path: Path, picks: pd.DataFrame, context: Context) -> list[Path]:
    """Write pixel coordinates; see `czii25d.formats.write_picks`."""
    return _write(path, picks, context, 4)


def write_relion5(path: Path, picks: pd.DataFrame, context: Context) -> list[Path]:
    """Write centred coordinates; see `czii25d.formats.write_picks`."""
    return _write(path, picks, context, 5)


def _read(path: Path, context: Context, version: int) -> pd.DataFrame:
    blocks = read_star(path, (TOMOGRAM, MICROGRAPH, CLASSES_NAME))
    table = _particles(blocks, path)
    runs = _runs(table, context, path)
    names = _names(blocks, table, context, path)
    scores = next((numbers(table, [name], path)[:, 0] for name in SCORES if name in table), None)
    stored = numbers(table, PIXELS if version == 4 else CENTERED, path)
    if not len(table):
        return empty_picks(scored=scores is not None)
    pixel_sizes = _pixel_sizes(blocks, table, context, path)
    locations = stored * pixel_sizes[:, None] if version == 4 else stored
    if version == 5:
        for run in dict.fromkeys(runs):
            own = runs == run
            locations[own] += _center(run, pixel_sizes[own], context, path)
    x, y, z = (locations - _shifts(table, path)).T
    picks = pd.DataFrame({"run": runs, "particle": names, "x": x, "y": y, "z": z})
    return picks if scores is None else picks.assign(score=scores)


def _particles(blocks: dict[str, Any], path: Path) -> pd.DataFrame:
    """Return the table of particles: the block of that name, or the only block."""
    block = blocks.get("particles", next(iter(blocks.values())) if len(blocks) == 1 else None)
    if isinstance(block, dict):  # a single particle may stand outside a loop
        block = pd.DataFrame([block])
    if block is None:
        found = ", ".join(f"data_{name}" for name in blocks)
        raise InputError(path, "a block data_particles", found, "export the particles from RELION")
    return block


def _runs(table: pd.DataFrame, context: Context, path: Path) -> NDArray[np.object_]:
    for column in (TOMOGRAM, MICROGRAPH):
        if column in table:
            names = [PurePosixPath(str(name)).name for name in table[column]]
            known = (".tomostar", ".mrc", ".rec", ".mrcs")  # Warp and older RELION write file names
            stems = [name[: -len(end)] if (end := PurePosixPath(name).suffix) in known else name for name in names]
            return np.array(stems, object)
    run = context.run
    if run is None:
        raise InputError(path, f"a column {TOMOGRAM} or {MICROGRAPH}", ", ".join(table.columns), "give run")
    return np.array([run] * len(table), object)


def _names(blocks: dict[str, Any], table: pd.DataFrame, context: Context, path: Path) -> list[str]:
    classes = blocks.get(CLASSES_BLOCK)
    if context.particle is None and isinstance(classes, pd.DataFrame) and CLASSES_NAME in classes:
        keys = numbers(classes, [CLASSES_NUMBER], path)[:, 0].astype(int)
        known = dict(zip(keys.tolist(), classes[CLASSES_NAME].astype(str), strict=True))
    else:
        known = {}
    column = numbers(table, [CLASS], path)[:, 0].astype(int) if CLASS in table else np.ones(len(table), int)
    return [known[number] if number in known else context.name_of_class(number, path) for number in column.tolist()]


def _pixel_sizes(blocks: dict[str, Any], table: pd.DataFrame, context: Context, path: Path) -> NDArray[np.float64]:
    """Return ``(N,)``: the unbinned pixel size of each particle, by its optics group if there is one."""
    optics = blocks.get("optics")
    if isinstance(optics, dict):
        optics = pd.DataFrame([optics])
    for source in (table, optics):
        column = None if source is None else next((name for name in PIXEL_SIZES if name in source), None)
        if source is None or column is None:
            continue
        sizes = numbers(source, [column], path)[:, 0]
        if (sizes <= 0).any():
            raise InputError(path, f"a {column} above 0 angstrom", f"{sizes.min():g}", "correct it")
        if source is table:
            return sizes
        if len(sizes) == 1:
            return np.full(len(table), sizes[0])
        groups = numbers(source, [OPTICS_GROUP], path)[:, 0].tolist()
        by_group = dict(zip(groups, sizes.tolist(), strict=True))
        own = numbers(table, [OPTICS_GROUP], path)[:, 0].tolist()
        unknown = [group for group in own if group not in by_group]
        if unknown:
            raise InputError(path, f"optics groups {groups}", f"group {unknown[0]:g}", "export it again")
        return np.array([by_group[group] for group in own])
    if context.pixel_size is None:
        raise InputError(path, f"a pixel size ({PIXEL_SIZE} in data_optics)", "none", "give pixel_size")
    return np.full(len(table), context.pixel_size)


def _center(run: str, pixel_sizes: ArrayLike, context: Context, path: Path) -> NDArray[np.float64]:
    """Return ``(N, 3)``: RELION 5's centre of a tomogram for each of ``(N,)`` pixel sizes, x y z in angstrom."""
    grid = context.grid(run, path)
    if grid.shape is None:
        raise InputError(f"{path}: run {run}", "its tomogram's shape", "none", "give shape, or the tomograms")
    return (np.array(grid.shape) * grid.voxel_spacing / 2)[::-1] - np.reshape(pixel_sizes, (-1, 1))


def _shifts(table: pd.DataFrame, path: Path) -> NDArray[np.float64]:
    """Return ``(N, 3)``: the origin columns, in the tomogram's frame, x y z in angstrom."""
    if not any(name in table for name in ORIGINS):
        return np.zeros((len(table), 3))
    shifts = numbers(table, ORIGINS, path)
    if not any(name in table for name in SUBTOMOGRAM_ANGLES):
        return shifts
    angles = numbers(table, SUBTOMOGRAM_ANGLES, path)
    # RELION's matrix of (rot, tilt, psi) is the inverse of the intrinsic z-y-z rotation.
    return Rotation.from_euler("ZYZ", angles, degrees=True).inv().apply(shifts)


def _write(path: Path, picks: pd.DataFrame, context: Context, version: int) -> list[Path]:
    if context.pixel_size is None:
        raise InputError(
            path,
            "the pixel size of the unbinned tilt series, in which RELION counts",
            "none",
            "give pixel_size (the voxel spacing, if the tomogram is not binned)",
        )
    pixel_size = round(context.pixel_size, 6)  # as it is written below
    locations = locations_of(picks)
    if version == 4:
        coordinates, columns = locations / pixel_size, PIXELS
    else:
        columns, coordinates = CENTERED, locations.copy()
        for run in dict.fromkeys(picks["run"]):
            coordinates[(picks["run"] == run).to_numpy()] -= _center(str(run), pixel_size, context, path)
    names = context.class_names(picks)
    number_of = {name: number for number, name in enumerate(names, start=1)}
    count = len(picks)
    # Coordinates first: a line that begins with a tomogram's name could be taken for the start of a block.
    table = pd.DataFrame(dict(zip(columns, coordinates.T, strict=True)))
    table[TOMOGRAM] = [check_word(str(run), path) for run in picks["run"]]
    table[CLASS] = [number_of[name] for name in picks["particle"]]
    if "score" in picks:
        table[SCORE] = picks["score"].to_numpy(np.float64)
    table[OPTICS_GROUP] = np.ones(count, int)
    for column in (*ANGLES, *ORIGINS):
        table[column] = np.zeros(count)
    optics = {OPTICS_GROUP: 1, "rlnOpticsGroupName": "opticsGroup1", PIXEL_SIZE: pixel_size}
    classes = {CLASSES_NUMBER: range(1, len(names) + 1), CLASSES_NAME: [check_word(name, path) for name in names]}
    blocks = {"optics": pd.DataFrame([optics])}
    if names:
        blocks[CLASSES_BLOCK] = pd.DataFrame(classes)
    blocks["particles"] = table  # last: starfile cannot read a table without rows if a comment follows it
    write_star(path, blocks, VERSIONS[version])
    return [path]
