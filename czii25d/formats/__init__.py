"""Picks in and out: from and to the files of other programs.

A *picks frame* has the columns ``run, particle, x, y, z`` (angstrom, the first voxel's centre at 0) and perhaps
``score``; see `czii25d.picks`. `read_picks` and `write_picks` turn it into each of `FORMATS` and back; the
conventions of each are told in its module, and side by side in ``docs/formats.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from czii25d.errors import InputError, did_you_mean
from czii25d.formats import cbox, copick, csv, imod, relion
from czii25d.formats.base import Context, Grids, TomogramGrid, check_names
from czii25d.formats.fit import check_picks_fit
from czii25d.particles import ParticleSet

__all__ = ["FORMATS", "Format", "TomogramGrid", "check_picks_fit", "find_format", "read_picks", "write_picks"]


@dataclass(frozen=True)
class Format:
    """One kind of file that holds picks.

    Parameters
    ----------
    suffix
        Of its files.
    read, write
        From and to a picks frame.
    folders
        Whether many runs are a folder of files; otherwise one file holds them.
    """

    suffix: str
    read: Callable[[Path, Context], pd.DataFrame]
    write: Callable[[Path, pd.DataFrame, Context], list[Path]]
    folders: bool = False


FORMATS: dict[str, Format] = {
    "csv": Format(".csv", csv.read, csv.write),
    "copick": Format(".json", copick.read, copick.write, folders=True),
    "relion4": Format(".star", relion.read_relion4, relion.write_relion4),
    "relion5": Format(".star", relion.read_relion5, relion.write_relion5),
    "imod": Format(".mod", imod.read_model, imod.write_model, folders=True),
    "imod-text": Format(".txt", imod.read_text, imod.write_text, folders=True),
    "cbox": Format(".cbox", cbox.read, cbox.write, folders=True),
}


def find_format(path: Path | str, format: str | None = None) -> str:
    """Return the name of a file's or folder's format: the given one, else by its name or content.

    Raises
    ------
    InputError
        If the name is unknown, or nothing tells the format.
    """
    path = Path(path)
    if format is not None:
        if format not in FORMATS:
            found = f"'{format}'{did_you_mean(format, FORMATS)}"
            raise InputError(f"format of {path}", f"one of {', '.join(FORMATS)}", found, "choose one")
        return format
    suffix = path.suffix.lower()
    if path.is_dir():
        found_files = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
        suffixes = {file.suffix.lower() for file in found_files}
        candidates = [name for name, kind in FORMATS.items() if kind.folders and kind.suffix in suffixes]
        if len(candidates) == 1:
            return candidates[0]
        raise InputError(path, "picks of one format", ", ".join(candidates) or "none", "give the format")
    if suffix == ".star" and path.is_file():
        return relion.detect(path)
    candidates = [name for name, kind in FORMATS.items() if kind.suffix == suffix]
    if len(candidates) != 1:
        found = ", ".join(candidates) or f"a name ending in '{path.suffix}'"
        raise InputError(path, f"a known format ({', '.join(FORMATS)})", found, "give the format")
    return candidates[0]


def read_picks(
    path: Path | str,
    format: str | None = None,
    *,
    run: str | None = None,
    particle: str | None = None,
    particles: ParticleSet | None = None,
    grids: Grids = None,
    pixel_size: float | None = None,
) -> pd.DataFrame:
    """Read picks from a file, or from a folder of files.

    Parameters
    ----------
    path
        A file, or for formats with one run in a file a folder of them.
    format
        One of `FORMATS`; ``None``: by the file's name and content.
    run
        The run, where a file does not name it; else the file's name is taken.
    particle
        The particle, where a file does not name any; it goes before class numbers.
    particles
        The known particles: their order gives numbered classes their names, and a name that is not among them is
        refused.
    grids
        The tomogram's grid, one for all runs or by run: voxel spacing for formats that count in voxels, and shape
        for RELION 5, which counts from the centre.
    pixel_size
        Angstrom per unbinned pixel, for RELION files that do not state it.

    Returns
    -------
    picks
        Picks frame, in the file's order; with ``score`` if every pick has one.

    Raises
    ------
    InputError
        If the file is of another format, cut, without what is needed, or names an unknown particle.
    FileNotFoundError
        If there is no such file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(2, "no such file or folder", str(path))
    name = find_format(path, format)
    picks = FORMATS[name].read(path, Context(run, particle, particles, grids, pixel_size))
    check_names(picks, particles, path)
    return picks


def write_picks(
    path: Path | str,
    picks: pd.DataFrame,
    format: str | None = None,
    *,
    particles: ParticleSet | None = None,
    grids: Grids = None,
    pixel_size: float | None = None,
    user_id: str = "czii25d",
    session_id: str = "0",
) -> list[Path]:
    """Write picks to a file, or to a folder of files; each appears whole or not at all.

    Parameters
    ----------
    path
        A file with the format's suffix; or, for formats with one run in a file, a folder.
    picks
        Picks frame, x, y, z in angstrom, with or without ``score``.
    format
        One of `FORMATS`; ``None``: by the file's name.
    particles
        Their order numbers the classes, in formats that have no names; their radii make crYOLO's boxes.
    grids
        As in `read_picks`: needed by all but CSV, copick and RELION 4.
    pixel_size
        Angstrom per pixel of the tilt series without binning; needed by RELION.
    user_id, session_id
        In the names of copick's files.

    Returns
    -------
    files
        What was written.

    Raises
    ------
    InputError
        If the format cannot hold these picks, or something it needs is not given.
    """
    path = Path(path)
    if format is None and path.suffix.lower() == ".star":
        raise InputError(f"format of {path}", "relion4 or relion5", "none", "give the format")
    name = find_format(path, format)
    check_names(picks, particles, path)
    context = Context(None, None, particles, grids, pixel_size, user_id, session_id)
    return FORMATS[name].write(path, picks, context)
