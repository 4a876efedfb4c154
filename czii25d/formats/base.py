"""What the formats share: where a tomogram's voxels lie, and what a file does not say by itself."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from czii25d.errors import InputError, did_you_mean
from czii25d.geometry import Shape3D, Spacing3D
from czii25d.particles import ParticleSet
from czii25d.picks import empty_picks, make_picks


@dataclass(frozen=True)
class TomogramGrid:
    """The voxels in which a run's picks are counted.

    Parameters
    ----------
    voxel_spacing
        Angstrom per voxel along z, y, x, of the tomogram that was picked.
    shape
        Its ``(D, H, W)``; needed where coordinates count from the tomogram's centre.
    """

    voxel_spacing: Spacing3D
    shape: Shape3D | None = None

    def __post_init__(self) -> None:
        if not all(math.isfinite(side) and side > 0 for side in self.voxel_spacing):
            raise InputError("voxel_spacing", "a spacing above 0 angstrom", f"{self.voxel_spacing}", "correct it")
        if self.shape is not None and min(self.shape) < 1:
            raise InputError("shape", "at least one voxel along z, y, x", f"{self.shape}", "correct it")


Grids = TomogramGrid | Mapping[str, TomogramGrid] | None


@dataclass(frozen=True)
class Context:
    """What a file of picks may leave unsaid.

    Parameters
    ----------
    run
        The run of a file that holds one and does not name it; ``None``: the file's name.
    particle
        The particle of a file that does not name any.
    particles
        The known particles, in the order of their class numbers.
    grids
        The tomogram of each run, by name, or one for all.
    pixel_size
        Angstrom per pixel of the tilt series, without binning: RELION's unit.
    user_id, session_id
        Under which copick files are written.
    """

    run: str | None = None
    particle: str | None = None
    particles: ParticleSet | None = None
    grids: Grids = None
    pixel_size: float | None = None
    user_id: str = "czii25d"
    session_id: str = "0"

    def __post_init__(self) -> None:
        size = self.pixel_size
        is_number = isinstance(size, int | float) and not isinstance(size, bool)
        if size is not None and not (is_number and math.isfinite(size) and size > 0):
            raise InputError("pixel_size", "a number above 0 angstrom", repr(self.pixel_size), "correct it")

    def grid(self, run: str, where: object) -> TomogramGrid:
        """Return the grid of a run; `InputError` if there is none."""
        if isinstance(self.grids, TomogramGrid):
            return self.grids
        known = self.grids or {}
        if run not in known:
            found = f"{', '.join(sorted(known)) or 'none'}{did_you_mean(run, known)}"
            cure = "give voxel_spacing (and shape), or the tomograms"
            raise InputError(f"{where}: run {run}", "its tomogram's voxel spacing", found, cure)
        return known[run]

    def has_grid(self, run: str) -> bool:
        """Return whether the grid of a run is known."""
        return isinstance(self.grids, TomogramGrid) or run in (self.grids or {})

    def class_names(self, picks: pd.DataFrame) -> list[str]:
        """Return the particles in the order of their class numbers, the first being class 1."""
        found = list(dict.fromkeys(picks["particle"]))
        known = list(self.particles.names) if self.particles else []
        return known + [name for name in found if name not in known]

    def name_of_class(self, number: int, where: object) -> str:
        """Return the particle of a class number that starts at 1; ``particle`` goes before ``particles``."""
        if self.particle is not None:
            return self.particle
        if self.particles is None:
            raise InputError(where, "the names of its particles", "numbers only", "give particle, or particles")
        if not 1 <= number <= len(self.particles):
            expected = f"classes 1 to {len(self.particles)} ({', '.join(self.particles.names)})"
            raise InputError(where, expected, f"class {number}", "give the table of its particles")
        return self.particles.names[number - 1]


def frame_of(
    run: str, particle: str, locations_xyz_angstrom: ArrayLike, scores: ArrayLike | None = None
) -> pd.DataFrame:
    """Return the picks frame of one particle in one run; see `czii25d.picks.make_picks`."""
    picks = make_picks(run, particle, locations_xyz_angstrom)
    if scores is None:
        return picks
    return picks.assign(score=np.asarray(scores, np.float64)) if len(picks) else empty_picks(scored=True)


def join(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Return several frames as one; it has scores if all that hold picks have them."""
    frames = list(frames)
    filled = [frame for frame in frames if len(frame)] or frames
    scored = bool(filled) and all("score" in frame for frame in filled)
    if not any(map(len, filled)):
        return empty_picks(scored)
    columns = list(empty_picks(scored).columns)
    return pd.concat([frame[columns] for frame in filled], ignore_index=True)


def locations_of(picks: pd.DataFrame) -> NDArray[np.float64]:
    """Return a frame's ``(N, 3)`` locations, x y z in angstrom."""
    return picks[["x", "y", "z"]].to_numpy(np.float64)


def scores_of(picks: pd.DataFrame) -> NDArray[np.float64] | None:
    """Return a frame's ``(N,)`` scores, if it has any."""
    return picks["score"].to_numpy(np.float64) if "score" in picks else None


def check_names(picks: pd.DataFrame, particles: ParticleSet | None, where: object) -> None:
    """Raise `InputError` for a particle that is not among the known ones."""
    if particles is None:
        return
    for name in dict.fromkeys(picks["particle"]):
        if name not in particles.names:
            raise InputError(
                where,
                f"particles among {', '.join(particles.names)}",
                f"'{name}'{did_you_mean(name, particles.names)}",
                "correct the name or add the particle to the table (particles=...)",
            )


def file_name(name: str, where: object) -> str:
    """Return a run's or particle's name if it can name a file, else raise `InputError`."""
    if not name or name in (".", "..") or re.search(r"[/\\\0]", name):
        raise InputError(where, "names that can name a file", repr(name), "rename it")
    return name


def files_for(path: Path, suffix: str, picks: pd.DataFrame) -> Iterator[tuple[Path, pd.DataFrame]]:
    """Yield the file of each run, and its picks: ``path`` itself, or ``<path>/<run><suffix>`` if it is a folder."""
    runs = list(dict.fromkeys(picks["run"]))
    if path.suffix.lower() == suffix:
        if len(runs) > 1:
            raise InputError(path, "the picks of one run", ", ".join(runs), "name a folder: each run gets a file")
        yield path, picks
        return
    for run in runs:
        yield path / f"{file_name(run, path)}{suffix}", picks[picks["run"] == run]
