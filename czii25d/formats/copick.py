"""Copick's JSON: one file for each run and particle, x, y, z in angstrom.

Source: https://copick.github.io/copick/ (data model: ``ExperimentRuns/<run>/Picks/<user>_<session>_<object>.json``).
The competition's files have the same content and are called ``<particle>.json``. The centre of the first voxel is at
0 angstrom, as here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from czii25d.errors import InputError
from czii25d.formats.base import Context, file_name, frame_of, join, locations_of, scores_of
from czii25d.picks import load_picks_json, write_picks_json


def read(path: Path, context: Context) -> pd.DataFrame:
    """Read one file, or every file below a folder; see `czii25d.formats.read_picks`."""
    if path.is_file():
        return _read_file(path, context)
    files = sorted(file for file in path.rglob("*.json") if not file.name.startswith(".") and _is_picks(path, file))
    if not files:
        raise InputError(path, "copick pick files (<run>/Picks/*.json)", "none", "correct the path")
    frames, seen = [], dict[tuple[str, str], Path]()
    for file in files:
        run, particle = _names(file, load_picks_json(file), context)
        if (run, particle) in seen:
            raise InputError(
                path,
                f"one file of {particle} in run {run}",
                f"{seen[run, particle].name} and {file.name}",
                "keep one of them, or read the files one by one",
            )
        seen[run, particle] = file
        frames.append(_read_file(file, context))
    return join(frames)


def _is_picks(root: Path, file: Path) -> bool:
    # A project's folder holds its configuration and Zarr metadata too.
    return file.parent.name == "Picks" or (file.parent == root and root.name == "Picks")


def _read_file(path: Path, context: Context) -> pd.DataFrame:
    content = load_picks_json(path)
    run, particle = _names(path, content, context)
    points = content["points"]
    scores = [point.get("score") for point in points]
    known = all(isinstance(score, int | float) and np.isfinite(score) for score in scores)
    locations = [list(point["location"].values()) for point in points]
    return frame_of(run, particle, locations, scores if known and points else None)


def _names(path: Path, content: dict[str, Any], context: Context) -> tuple[str, str]:
    """Return run and particle: given, else by the file's content, else by its folder and name."""
    pieces = path.stem.split("_", 2)
    particle = context.particle or content.get("pickable_object_name") or pieces[-1 if len(pieces) == 3 else 0]
    folder = path.parent.parent.name if path.parent.name == "Picks" else ""
    run = context.run or content.get("run_name") or folder
    if not run or not isinstance(run, str) or not isinstance(particle, str):
        raise InputError(path, "a run's name ('run_name')", repr(run or None), "give run")
    return run, particle


def write(path: Path, picks: pd.DataFrame, context: Context) -> list[Path]:
    """Write a file (``.json``) or a copick overlay (a folder); see `czii25d.formats.write_picks`."""
    files = list(_files(path, picks, context))
    for file, run, particle, own in files:
        write_picks_json(file, run, particle, locations_of(own), scores_of(own), context.user_id, context.session_id)
    return [file for file, *_ in files]


def _files(path: Path, picks: pd.DataFrame, context: Context) -> Iterator[tuple[Path, str, str, pd.DataFrame]]:
    groups = [(str(run), str(name), own) for (run, name), own in picks.groupby(["run", "particle"], sort=False)]
    if path.suffix.lower() == ".json":
        if len(groups) != 1:
            found = ", ".join(f"{name} in {run}" for run, name, _ in groups) or "none"
            raise InputError(path, "the picks of one particle in one run", found, "name a folder")
        [(run, name, own)] = groups
        yield path, run, name, own
        return
    for name in (context.user_id, context.session_id):
        if "_" in file_name(name, path):
            raise InputError(path, "a user and a session without underscores", name, "rename it")
    for run, name, own in groups:
        folder = path / "ExperimentRuns" / file_name(run, path) / "Picks"
        yield folder / f"{context.user_id}_{context.session_id}_{file_name(name, path)}.json", run, name, own
