"""Picks: where particles are, as a data frame, and the files that hold them.

A *picks frame* has the columns ``run, particle, x, y, z`` and, for predictions, ``score``, with x, y, z in
angstrom. The competition's CSV files call the first two ``experiment, particle_type`` and number the rows in
``id``. Both vocabularies are read, the competition's is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from czii25d.errors import InputError, did_you_mean
from czii25d.files import write_aside

PICK_COLUMNS = ("run", "particle", "x", "y", "z")
COMPETITION_NAMES = {"run": "experiment", "particle": "particle_type"}
DECIMALS = {"x": 3, "y": 3, "z": 3, "score": 6}  # a thousandth of an angstrom is beyond any tomogram


def empty_picks(scored: bool = False) -> pd.DataFrame:
    """Return a picks frame without rows, its columns of the right types."""
    columns = [*PICK_COLUMNS, "score"] if scored else list(PICK_COLUMNS)
    return pd.DataFrame({name: pd.Series(dtype=object if name in COMPETITION_NAMES else float) for name in columns})


def make_picks(run: str, particle: str, locations_xyz_angstrom: ArrayLike) -> pd.DataFrame:
    """Return the picks frame of one particle in one run from its ``(N, 3)`` locations, x y z in angstrom."""
    locations = np.asarray(locations_xyz_angstrom, np.float64).reshape(-1, 3)
    if not len(locations):
        return empty_picks()
    return pd.DataFrame({"run": run, "particle": particle, **dict(zip("xyz", locations.T, strict=True))})


def concat_picks(frames: Iterable[pd.DataFrame], scored: bool = False) -> pd.DataFrame:
    """Return the picks of several frames as one; of none, or only empty ones, an empty frame."""
    filled = [frame for frame in frames if len(frame)]
    return pd.concat(filled, ignore_index=True) if filled else empty_picks(scored)


def above_thresholds(picks: pd.DataFrame, thresholds: Mapping[str, float]) -> pd.DataFrame:
    """Return the scored picks that reach the thresholds of their particles."""
    return picks[picks["score"].to_numpy() >= picks["particle"].map(thresholds).to_numpy(float)]


def read_picks_json(path: Path | str, particle: str) -> NDArray[np.float64]:
    """Read a pick file of the competition (copick's JSON).

    Parameters
    ----------
    path
        ``.../Picks/<particle>.json``
    particle
        Its particle's name, for messages.

    Returns
    -------
    locations_xyz_angstrom
        ``(N, 3)``.

    Raises
    ------
    InputError
        If it is no JSON, misses ``points`` or a ``location``, holds anything but finite numbers there, or
        states a unit other than angstrom.
    """
    content = load_picks_json(path, particle)
    return np.array([list(point["location"].values()) for point in content["points"]], np.float64).reshape(-1, 3)


def load_picks_json(path: Path | str, particle: str = "picks") -> dict[str, Any]:
    """Return the content of a copick JSON file once it has been checked; see `read_picks_json`.

    Each of ``content["points"]`` has a ``location`` of x, y, z in this order, in angstrom.
    """
    where = f"{path} ({particle})"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise InputError(
            where, "a JSON file of picks", f"malformed JSON ({error})", "copy or export it again"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("points"), list):
        raise InputError(where, "a list called 'points'", "none", "export the picks as copick JSON")
    unit = content.get("unit", "angstrom")
    if unit != "angstrom":
        raise InputError(where, "the unit angstrom", repr(unit), "convert the locations to angstrom")
    points = [
        {**(point if isinstance(point, dict) else {}), "location": _read_location(point, f"{where}, point {index}")}
        for index, point in enumerate(content["points"])
    ]
    return {**content, "points": points}


def _read_location(point: Any, where: str) -> dict[str, float]:
    location = point.get("location") if isinstance(point, dict) else None
    values = [location.get(axis) if isinstance(location, dict) else None for axis in "xyz"]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(where, "a location of three finite numbers x, y, z", f"{values}", "correct that point")
    return dict(zip("xyz", values, strict=True))  # type: ignore[arg-type]  # just checked


def write_picks_json(
    path: Path | str,
    run: str,
    particle: str,
    locations_xyz_angstrom: ArrayLike,
    scores: ArrayLike | None = None,
    user_id: str = "curation",
    session_id: str = "0",
) -> None:
    """Write ``(N, 3)`` locations, x y z in angstrom, and perhaps ``(N,)`` scores as copick's JSON.

    Without scores it is the competition's pick file. Copick itself names such a file
    ``<user_id>_<session_id>_<particle>.json``.
    """
    locations = np.asarray(locations_xyz_angstrom, np.float64).reshape(-1, 3).round(DECIMALS["x"])
    points: list[dict[str, Any]] = [
        {"location": dict(zip("xyz", row, strict=True)), "transformation_": np.eye(4).tolist(), "instance_id": 0}
        for row in locations.tolist()
    ]
    if scores is not None:
        values = np.asarray(scores, np.float64).round(DECIMALS["score"]).tolist()
        points = [{**point, "score": value} for point, value in zip(points, values, strict=True)]
    content = {
        "pickable_object_name": particle,
        "user_id": user_id,
        "session_id": session_id,
        "run_name": run,
        "voxel_spacing": None,
        "unit": "angstrom",
        "points": points,
    }
    with write_aside(path) as partial:
        partial.write_text(json.dumps(content), encoding="utf-8")


def read_picks_csv(
    path: Path | str, scored: bool = False, run: str | None = None, particle: str | None = None
) -> pd.DataFrame:
    """Read picks from a CSV file, by the competition's column names or this project's.

    Other columns (``id``, a fold, ...) are left out. A header without rows is a file of no picks. A file without a
    column of runs, or of particles, is read if ``run``, or ``particle``, names the only one.

    Raises
    ------
    InputError
        If the file is empty or no CSV, a column is missing, a name is empty or a number is not finite.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(path, "a CSV file of picks", str(error), "write it again") from None
    table = table.rename(columns={theirs: ours for ours, theirs in COMPETITION_NAMES.items()})
    for name, value in (("run", run), ("particle", particle)):
        if value is not None and name not in table:
            table[name] = value
    columns = [*PICK_COLUMNS, "score"] if scored else list(PICK_COLUMNS)
    for name in columns:
        if (count := list(table.columns).count(name)) != 1:
            wanted = f"column '{COMPETITION_NAMES.get(name, name)}' once"
            hint = did_you_mean(COMPETITION_NAMES.get(name, name), table.columns)
            raise InputError(path, wanted, f"it {count} times among {list(table.columns)}{hint}", "rename the columns")
    picks = empty_picks(scored)
    for name in columns:
        if name in COMPETITION_NAMES:
            picks[name] = table[name].astype(object)
            wrong = (table[name] == "").to_numpy()
        else:
            numbers = pd.to_numeric(table[name], errors="coerce").astype(float)
            picks[name] = numbers
            wrong = ~np.isfinite(numbers.to_numpy())
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            expected = "a name" if name in COMPETITION_NAMES else "a finite number"
            raise InputError(
                f"{path}, line {row + 2}",
                f"{expected} as {name}",
                repr(table[name].iloc[row]),
                "correct that line",
            )
    return picks


def write_submission_csv(path: Path | str, picks: pd.DataFrame) -> None:
    """Write picks as the competition takes them: ``id, experiment, particle_type, x, y, z``."""
    _write_csv(path, picks[list(PICK_COLUMNS)])


def write_solution_csv(path: Path | str, picks: pd.DataFrame) -> None:
    """Write true picks; a solution has the columns of a submission."""
    _write_csv(path, picks[list(PICK_COLUMNS)])


def write_scored_picks_csv(path: Path | str, picks: pd.DataFrame) -> None:
    """Write picks as a submission with one more column, ``score``."""
    _write_csv(path, picks[[*PICK_COLUMNS, "score"]])


def _write_csv(path: Path | str, picks: pd.DataFrame) -> None:
    table = picks.rename(columns=COMPETITION_NAMES).round(DECIMALS).reset_index(drop=True)
    with write_aside(path) as partial:
        table.to_csv(partial, index_label="id")
