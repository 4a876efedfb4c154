"""Runs (tilt series) on disk, in the competition's layout."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from czii25d.errors import InputError, did_you_mean
from czii25d.particles import ParticleSet
from czii25d.picks import concat_picks, make_picks, read_picks_json

logger = logging.getLogger(__name__)

LAYOUT = "{split}/static/ExperimentRuns/<run>/VoxelSpacing<number>/{reconstruction}.zarr"
DUPLICATE_ANGSTROM = 1e-3  # picks of one class as near as this are one pick written twice


@dataclass(frozen=True)
class Run:
    """One tilt series.

    Parameters
    ----------
    name
        As in the folder's name, e.g. ``"TS_5_4"``.
    split
        ``"train"`` or ``"test"``.
    tomogram
        Its OME-Zarr.
    picks_dir
        The folder of its pick files, if there is one.
    """

    name: str
    split: str
    tomogram: Path
    picks_dir: Path | None


def find_runs(
    input_dir: Path | str,
    split: str,
    reconstruction: str = "denoised",
    voxel_spacing_folder: str | None = None,
) -> list[Run]:
    """Return the runs of a split, sorted by name as the published code sorts them.

    Parameters
    ----------
    input_dir
        Holds ``train`` and ``test``.
    reconstruction
        Which tomogram of a run: ``"denoised"``, ``"wbp"``, ...
    voxel_spacing_folder
        Which ``VoxelSpacing*`` folder; needed only where a run has several.

    Raises
    ------
    InputError
        If there is no such folder, no run in it, or a run without that tomogram.
    """
    layout = LAYOUT.format(split=split, reconstruction=reconstruction)
    runs = []
    for folder in _run_folders(input_dir, split):
        tomogram = _voxel_spacing_folder(folder, layout, voxel_spacing_folder) / f"{reconstruction}.zarr"
        if not tomogram.is_dir():
            there = [path.stem for path in _subfolders(tomogram.parent, "*.zarr")]
            raise InputError(
                f"run {folder.name}",
                f"the tomogram {tomogram}",
                f"{', '.join(there) or 'no tomogram'}{did_you_mean(reconstruction, there)}",
                "add it, remove the run, or choose another reconstruction",
            )
        picks_dir = _picks_dir(input_dir, split, folder.name)
        runs.append(Run(folder.name, split, tomogram, picks_dir if picks_dir.is_dir() else None))
    return runs


def _run_folders(input_dir: Path | str, split: str) -> list[Path]:
    root = Path(input_dir) / split / "static" / "ExperimentRuns"
    folders = _subfolders(root, "*") if root.is_dir() else []
    if not folders:
        raise InputError(
            root,
            f"at least one run ({LAYOUT.format(split=split, reconstruction='denoised')})",
            "none" if root.is_dir() else "no such folder",
            "set paths.input to the folder that holds train and test",
        )
    return folders


def _picks_dir(input_dir: Path | str, split: str, run: str) -> Path:
    return Path(input_dir) / split / "overlay" / "ExperimentRuns" / run / "Picks"


def _subfolders(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if path.is_dir() and not path.name.startswith("."))


def _voxel_spacing_folder(run_folder: Path, layout: str, name: str | None) -> Path:
    folders = _subfolders(run_folder, name or "VoxelSpacing*")
    if len(folders) != 1:
        there = ", ".join(folder.name for folder in _subfolders(run_folder, "*"))
        raise InputError(
            f"run {run_folder.name}",
            f"one folder {name or 'VoxelSpacing*'} ({layout})",
            there or "none",
            "choose one with voxel_spacing_folder" if len(folders) > 1 else "add its tomogram or remove the run",
        )
    return folders[0]


def find_picks(input_dir: Path | str, split: str, particles: ParticleSet) -> dict[str, pd.DataFrame]:
    """Return the picks frame of every run of a split, by the run's name; tomograms need not be there.

    Raises
    ------
    InputError
        If there is no run, a pick file is missing or one is not right.
    """
    return {
        folder.name: _read_picks(folder.name, _picks_dir(input_dir, split, folder.name), particles)
        for folder in _run_folders(input_dir, split)
    }


def read_run_picks(run: Run, particles: ParticleSet) -> pd.DataFrame:
    """Return the picks frame of the wanted particles in one run, in channel order.

    A pick that repeats another of its class is dropped, with a warning that counts them.

    Raises
    ------
    InputError
        If a pick file is missing or not right.
    """
    if run.picks_dir is None:
        raise InputError(f"run {run.name}", "a folder of pick files", "none", "add it, or choose a run that has one")
    return _read_picks(run.name, run.picks_dir, particles)


def _read_picks(run: str, folder: Path, particles: ParticleSet) -> pd.DataFrame:
    frames: list[pd.DataFrame] = []
    duplicates = 0
    for name in particles.names:
        path = folder / f"{name}.json"
        if not path.is_file():
            there = sorted(other.stem for other in folder.glob("*.json"))
            raise InputError(
                f"run {run}",
                f"the pick file {path}",
                f"{', '.join(there) or 'no pick file'}{did_you_mean(name, there)}",
                "add it (with an empty list of points if there are none), or lower class_num",
            )
        locations = read_picks_json(path, name)
        pairs = cKDTree(locations).query_pairs(DUPLICATE_ANGSTROM) if len(locations) else set()
        repeated = sorted({later for _, later in pairs})
        duplicates += len(repeated)
        frames.append(make_picks(run, name, np.delete(locations, repeated, axis=0)))
    if duplicates:
        logger.warning("run %s: dropped %d duplicate picks", run, duplicates)
    return concat_picks(frames)
