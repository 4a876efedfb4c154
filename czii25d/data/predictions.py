"""What 21 leaves beside its picks, so that others can show them: particles, thresholds, tomograms and times.

``<predictions>/prediction.json`` is written with ``scored_picks.csv``. The effort of each run lies beside its own picks
and stays when the same command is given again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from czii25d.data.tomogram import Tomogram, open_tomogram
from czii25d.data.volumes import open_volume
from czii25d.errors import InputError, did_you_mean
from czii25d.files import write_aside
from czii25d.geometry import Shape3D, Spacing3D
from czii25d.particles import ParticleSet
from czii25d.picks import PICK_COLUMNS, read_picks_csv

STAGES = ("read", "predict", "peaks", "write")
RECORD = "prediction.json"
FORMAT_VERSION = 1
_CURE = "give the command of 21_predict.py again; what has been picked is not picked twice"


@dataclass(frozen=True)
class Effort:
    """What picking a run took.

    Parameters
    ----------
    seconds
        By stage (``STAGES``).
    tiles
        Their number.
    memory_gb
        The most that the process had used until then.
    """

    seconds: dict[str, float]
    tiles: int
    memory_gb: float


class Slices(Protocol):
    """A tomogram that is read a few planes at a time."""

    @property
    def shape(self) -> Shape3D:
        """``(D, H, W)``."""

    @property
    def voxel_spacing(self) -> Spacing3D:
        """Angstrom per voxel along z, y, x."""

    def planes(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return planes ``(stop - start, H, W)``."""


@dataclass(frozen=True)
class TomogramSlices:
    """The planes of a tomogram as it came, without normalisation."""

    tomogram: Tomogram

    @property
    def shape(self) -> Shape3D:
        """``(D, H, W)``."""
        return self.tomogram.shape

    @property
    def voxel_spacing(self) -> Spacing3D:
        """Angstrom per voxel along z, y, x."""
        return self.tomogram.voxel_spacing

    def planes(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return planes ``(stop - start, H, W)``."""
        return np.asarray(self.tomogram.array[start:stop], np.float32)


@dataclass(frozen=True)
class PredictedRun:
    """A run that has been picked: the volume that 01 made, or the tomogram itself, and what it took.

    Parameters
    ----------
    volume, tomogram
        One of them is there.
    voxel_spacing
        Given in place of what the tomogram states.
    effort
        ``None``: not known.
    """

    name: str
    volume: Path | None
    tomogram: Path | None = None
    voxel_spacing: Spacing3D | None = None
    effort: Effort | None = None

    def open(self) -> Slices:
        """Open volume or tomogram; `InputError` if it is not where it was."""
        if self.volume is not None:
            return open_volume(self.volume)
        assert self.tomogram is not None
        return TomogramSlices(open_tomogram(self.tomogram, self.voxel_spacing))


@dataclass(frozen=True)
class Predictions:
    """Picks, and what it takes to show them.

    Parameters
    ----------
    folder
        Where they lie.
    particles, thresholds
        Of the networks; the thresholds by particle.
    networks
        Their files.
    runs
        By name.
    picks
        Picks frame with scores, those that are not submitted too.
    is_submitted
        ``(len(picks),)``: whether a pick is in ``submission.csv``: it reaches its threshold, and whatever else 21 asks.
    """

    folder: Path
    particles: ParticleSet
    thresholds: dict[str, float]
    networks: list[str]
    runs: dict[str, PredictedRun]
    picks: pd.DataFrame
    is_submitted: NDArray[np.bool_]

    def choose(self, given: str | Sequence[str] | None) -> list[PredictedRun]:
        """Return the runs of these names, all for ``None``; `InputError` for an unknown one."""
        wanted = list(self.runs) if given is None else [given] if isinstance(given, str) else [str(n) for n in given]
        for name in wanted:
            if name not in self.runs:
                found = f"'{name}'{did_you_mean(name, self.runs)}"
                raise InputError("key runs", f"runs of {self.folder} ({', '.join(self.runs)})", found, "correct it")
        return [self.runs[name] for name in dict.fromkeys(wanted)]

    def picks_of(self, run: str, all_scores: bool = False) -> pd.DataFrame:
        """Return the submitted picks of one run, or all that are scored, with their scores."""
        chosen = (self.picks["run"] == run).to_numpy()
        return self.picks[chosen if all_scores else chosen & self.is_submitted]


def effort_path(part: Path) -> Path:
    """Return the file of the effort that belongs to the file of a run's picks."""
    return part.with_suffix(".json")


def write_effort(part: Path, effort: Effort) -> None:
    """Keep the effort of a run beside its picks."""
    with write_aside(effort_path(part)) as partial:
        partial.write_text(json.dumps(asdict(effort), indent=2))


def read_effort(part: Path) -> Effort | None:
    """Return the effort kept beside a run's picks, if there is one that can be read; no pick depends on it."""
    try:
        return _as_effort(json.loads(effort_path(part).read_text()))
    except (OSError, ValueError):
        return None


def _as_effort(content: Any) -> Effort:
    try:
        seconds = {stage: float(content["seconds"][stage]) for stage in STAGES}
        return Effort(seconds, int(content["tiles"]), float(content["memory_gb"]))
    except (KeyError, TypeError) as error:
        raise ValueError(error) from None


def write_record(
    folder: Path,
    particles: ParticleSet,
    thresholds: Mapping[str, float],
    networks: Sequence[str],
    runs: Sequence[PredictedRun],
) -> None:
    """Write ``prediction.json``. Paths in it start at ``folder``, so that all may be moved together."""

    def relative(path: Path | None) -> str | None:
        # resolved: from a folder that is a link, ".." leads to where it points
        return None if path is None else os.path.relpath(path.resolve(), folder.resolve())

    content = {
        "format_version": FORMAT_VERSION,
        "networks": list(networks),
        "particles": particles.to_config(),
        "thresholds": dict(thresholds),
        "runs": {
            run.name: asdict(run) | {"volume": relative(run.volume), "tomogram": relative(run.tomogram)} for run in runs
        },
    }
    with write_aside(folder / RECORD) as partial:
        partial.write_text(json.dumps(content, indent=2))


def read_predictions(folder: Path | str) -> Predictions:
    """Return what 21 left in a folder.

    Raises
    ------
    InputError
        If there is nothing, or it cannot be understood.
    """
    folder = Path(folder)
    path = folder / RECORD
    try:
        content = json.loads(path.read_text())
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {content['format_version']}")
        particles = ParticleSet.from_config(content["particles"], path)
        thresholds = {name: float(content["thresholds"][name]) for name in particles.names}
        runs = {name: _as_run(folder, fields) for name, fields in content["runs"].items()}
        networks = [str(network) for network in content["networks"]]
    except FileNotFoundError:
        raise InputError(path, "what 21_predict.py leaves", "none", _CURE) from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(path, "what 21_predict.py leaves", f"{type(error).__name__}: {error}", _CURE) from None
    picks = read_picks_csv(folder / "scored_picks.csv", scored=True)
    if unknown := sorted(set(picks["particle"]) - set(particles.names) | set(picks["run"]) - set(runs)):
        raise InputError(
            folder / "scored_picks.csv", f"particles and runs that {path} names", ", ".join(unknown), _CURE
        )
    submission = read_picks_csv(folder / "submission.csv")
    # both files are written with the same decimals
    is_submitted = pd.MultiIndex.from_frame(picks[[*PICK_COLUMNS]]).isin(pd.MultiIndex.from_frame(submission))
    return Predictions(folder, particles, thresholds, networks, runs, picks, is_submitted)


def _as_run(folder: Path, fields: Mapping[str, Any]) -> PredictedRun:
    volume, tomogram = (None if fields[key] is None else folder / fields[key] for key in ("volume", "tomogram"))
    if volume is None and tomogram is None:
        raise ValueError(f"neither volume nor tomogram of {fields['name']}")
    spacing = fields["voxel_spacing"]
    if spacing is not None:
        z, y, x = (float(side) for side in spacing)
        spacing = (z, y, x)
    effort = None if fields["effort"] is None else _as_effort(fields["effort"])
    return PredictedRun(str(fields["name"]), volume, tomogram, spacing, effort)
