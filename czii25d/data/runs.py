"""Runs (tilt series) on disk: in the competition's layout, or any tomograms in a folder, by a glob or a CSV file."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from czii25d.data.mrc import VOLUME_SUFFIXES
from czii25d.data.tomogram import as_voxel_spacing
from czii25d.errors import InputError, did_you_mean
from czii25d.geometry import Spacing3D
from czii25d.particles import ParticleSet
from czii25d.picks import concat_picks, make_picks, read_picks_json

logger = logging.getLogger(__name__)

LAYOUT = "{split}/static/ExperimentRuns/<run>/VoxelSpacing<number>/{reconstruction}.zarr"
TOMOGRAM_SUFFIXES = (*VOLUME_SUFFIXES, ".npy", ".zarr")
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
        Its OME-Zarr, MRC or ``.npy`` file.
    picks_dir
        The folder of its pick files, if there is one.
    voxel_spacing
        Angstrom per voxel along z, y, x, in place of what the tomogram states.
    """

    name: str
    split: str
    tomogram: Path
    picks_dir: Path | None
    voxel_spacing: Spacing3D | None = None


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


def find_tomograms(
    tomograms: Path | str, split: str = "train", voxel_spacing: float | Sequence[float] | None = None
) -> list[Run]:
    """Return the runs of any tomograms, sorted by name.

    Parameters
    ----------
    tomograms
        A tomogram; a folder of them (``.mrc``, ``.rec``, ``.map``, ``.npy``, ``.zarr``); a glob such as
        ``"data/*/rec.mrc"``; or a CSV file with the columns ``run, tomogram`` and perhaps ``voxel_spacing``, whose
        relative paths start at its own folder. Without a CSV a run is called as its file, without the suffix; where
        two files share a name, as their folders.
    split
        What the runs are for.
    voxel_spacing
        Angstrom per voxel, one number or z, y, x, in place of what the tomograms state; a CSV's column goes before it.

    Raises
    ------
    InputError
        If there is no tomogram, two runs share a name, or the CSV lacks a column.
    """
    given = None if voxel_spacing is None else as_voxel_spacing(voxel_spacing)
    path = Path(tomograms)
    if path.suffix.lower() == ".csv":
        runs = _read_run_table(path, split, given)
    else:
        if path.suffix.lower() in TOMOGRAM_SUFFIXES and path.exists():
            files = [path]
        elif path.is_dir():
            files = [file for file in path.iterdir() if file.suffix.lower() in TOMOGRAM_SUFFIXES]
        else:
            files = [Path(name) for name in glob.glob(str(tomograms), recursive=True)]
        files = sorted(file for file in files if not file.name.startswith("."))
        shared = len({file.stem for file in files}) < len(files)
        runs = [Run(file.parent.name if shared else file.stem, split, file, None, given) for file in files]
    if not runs:
        raise InputError(
            tomograms,
            f"tomograms ({', '.join(TOMOGRAM_SUFFIXES)}), a glob of them or a CSV of run,tomogram",
            "none" if path.exists() else "no such file or folder",
            "correct the path",
        )
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(tomograms, "each run once", f"{', '.join(twice)} twice", "name the runs in a CSV file")
    for name in names:
        if not name or name.startswith(".") or re.search(r"[/\\\0]", name):
            raise InputError(tomograms, "names of runs that can name a folder", repr(name), "rename that run")
    return sorted(runs, key=lambda run: run.name)


def _read_run_table(path: Path, split: str, voxel_spacing: Spacing3D | None) -> list[Run]:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(path, "a CSV file of run,tomogram[,voxel_spacing]", str(error), "write it again") from None
    missing = {"run", "tomogram"} - set(table.columns)
    if missing:
        raise InputError(
            path, "the columns run, tomogram[, voxel_spacing]", ", ".join(table.columns), f"add {', '.join(missing)}"
        )
    runs = []
    for line, row in enumerate(table.to_dict("records"), start=2):
        where, spacing, text = f"{path}, line {line}", voxel_spacing, row.get("voxel_spacing", "")
        if text:
            try:
                spacing = as_voxel_spacing(float(text), where)
            except ValueError as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(where, "a voxel spacing in angstrom", repr(text), "correct that line") from None
        if not row["tomogram"] or not (path.parent / row["tomogram"]).exists():
            raise InputError(where, "a tomogram", f"none at '{row['tomogram']}'", "correct that line")
        runs.append(Run(row["run"], split, path.parent / row["tomogram"], None, spacing))
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
    locations: dict[str, NDArray[np.float64]] = {}
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
        locations[name] = read_picks_json(path, name)
    return _without_duplicates(run, locations)


def picks_by_run(picks: pd.DataFrame, particles: ParticleSet) -> dict[str, pd.DataFrame]:
    """Return the picks frame of every run that a frame names, by name: the wanted particles in channel order.

    A pick that repeats another of its class is dropped, with a warning that counts them.
    """
    return {
        str(run): _without_duplicates(
            str(run),
            {name: own.loc[own["particle"] == name, ["x", "y", "z"]].to_numpy(np.float64) for name in particles.names},
        )
        for run, own in picks.groupby("run")
    }


def _without_duplicates(run: str, locations: Mapping[str, NDArray[np.float64]]) -> pd.DataFrame:
    frames: list[pd.DataFrame] = []
    duplicates = 0
    for name, rows in locations.items():
        pairs = cKDTree(rows).query_pairs(DUPLICATE_ANGSTROM) if len(rows) else set()
        repeated = sorted({later for _, later in pairs})
        duplicates += len(repeated)
        frames.append(make_picks(run, name, np.delete(rows, repeated, axis=0)))
    if duplicates:
        logger.warning("run %s: dropped %d duplicate picks", run, duplicates)
    return concat_picks(frames)
