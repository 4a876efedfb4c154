"""crYOLO's CBOX: a box around each pick, in voxels; one run and one particle in a file.

Conventions, as crYOLO 1.8 and newer write it (https://cryolo.readthedocs.io): a STAR file whose block ``data_cryolo``
holds ``CoordinateX`` and ``CoordinateY``, the *corner* of the box, but ``CoordinateZ``, its *centre*, as tracing
through the slices leaves it; ``Width, Height, Depth`` along x, y, z; ``Confidence``, the score. All are in voxels of
the tomogram, the first voxel's centre at 0. ``data_cryolo_include`` lists the slices that hold boxes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from czii25d.errors import InputError
from czii25d.formats.base import Context, file_name, files_for, frame_of, join, locations_of, scores_of
from czii25d.formats.star import numbers, read_star, write_star
from czii25d.geometry import xyz_angstrom_to_zyx_voxel, zyx_voxel_to_xyz_angstrom

CORNER_AND_CENTER = ("CoordinateX", "CoordinateY", "CoordinateZ")
SIDES = ("Width", "Height")
SCORE = "Confidence"


def read(path: Path, context: Context) -> pd.DataFrame:
    """Read a file, or a folder of ``<particle>/<run>.cbox``; see `czii25d.formats.read_picks`."""
    if path.is_file():
        return _read_file(path, context, path)
    files = sorted(path.glob("*/*.cbox")) or sorted(path.glob("*.cbox"))
    if not files:
        raise InputError(path, "CBOX files (<particle>/<run>.cbox)", "none", "correct the path")
    return join(_read_file(file, context, path) for file in files)


def _read_file(path: Path, context: Context, root: Path) -> pd.DataFrame:
    blocks = read_star(path)
    table = blocks.get("cryolo")
    if not isinstance(table, pd.DataFrame):
        found = ", ".join(f"data_{name}" for name in blocks)
        raise InputError(path, "a block data_cryolo", found, "pick with crYOLO 1.8 or newer, or give the format")
    run = context.run if context.run is not None and path == root else path.stem
    particle = context.particle
    if particle is None and path.parent.parent == root:
        particle = path.parent.name
    if particle is None:
        particle = context.name_of_class(1, path) if context.particles and len(context.particles) == 1 else None
    if particle is None:
        raise InputError(path, "its particle's name, which CBOX does not hold", "none", "give particle")
    corner, sides = numbers(table, CORNER_AND_CENTER, path), numbers(table, SIDES, path)
    x, y = (corner[:, :2] + sides / 2).T
    spacing = context.grid(run, path).voxel_spacing
    locations = zyx_voxel_to_xyz_angstrom(np.stack([corner[:, 2], y, x], axis=1), spacing)
    # A box drawn by hand has no confidence, or "<NA>".
    scored = SCORE in table and (not len(table) or not table[SCORE].isna().any())
    return frame_of(run, particle, locations, numbers(table, [SCORE], path)[:, 0] if scored else None)


def write(path: Path, picks: pd.DataFrame, context: Context) -> list[Path]:
    """Write a file (``.cbox``) or ``<particle>/<run>.cbox`` in a folder; see `czii25d.formats.write_picks`."""
    particles = list(dict.fromkeys(picks["particle"]))
    single = path.suffix.lower() == ".cbox"
    if single and len(particles) != 1:
        raise InputError(path, "the picks of one particle", ", ".join(particles) or "none", "name a folder")
    files: list[Path] = []
    for particle in particles:
        folder = path if single else path / file_name(particle, path)
        for file, own in files_for(folder, ".cbox", picks[picks["particle"] == particle]):
            _write_file(file, own, particle, context)
            files.append(file)
    return files


def _write_file(path: Path, picks: pd.DataFrame, particle: str, context: Context) -> None:
    if context.particles is None:
        raise InputError(path, "the particle's radius, which makes its box", "none", "give particles")
    radius = context.particles[context.particles.channel(particle)].radius
    spacing = context.grid(str(picks["run"].iloc[0]), path).voxel_spacing
    z, y, x = xyz_angstrom_to_zyx_voxel(locations_of(picks), spacing).T
    depth, height, width = (2 * radius / side for side in spacing)
    scores = scores_of(picks)
    missing = np.full(len(picks), np.nan)
    table = pd.DataFrame(
        {
            "CoordinateX": x - width / 2,
            "CoordinateY": y - height / 2,
            "CoordinateZ": z,
            "Width": width,
            "Height": height,
            "Depth": depth,
            "EstWidth": width,
            "EstHeight": height,
            SCORE: missing if scores is None else scores,
            "NumBoxes": missing,
            "Angle": missing,
        }
    )
    slices = pd.DataFrame({"slice_index": np.unique(np.round(z)).astype(int)})
    write_star(path, {"global": {"cbox_format_version": "1.0"}, "cryolo": table, "cryolo_include": slices})
