"""00: write a simulated data set in the competition's layout."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numcodecs
import numpy as np
import zarr
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track
from scipy import ndimage

from czii25d.errors import InputError
from czii25d.files import write_aside
from czii25d.particles import ParticleSet
from czii25d.phantom import Imaging, simulate_tomogram
from czii25d.picks import concat_picks, make_picks, write_picks_json, write_solution_csv

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from czii25d.geometry import Spacing3D

logger = logging.getLogger(__name__)

SETTINGS = "phantom.json"  # at the root of the data set: what it was made with, and that it is no real data


def make_phantom(cfg: DictConfig) -> None:
    """Write simulated training and test tomograms, the picks of the former and the truth of the latter.

    What an interrupted call has finished is left alone, so calling again completes it.

    Raises
    ------
    InputError
        If ``paths.input`` holds other data, or a simulation with other settings; and as `simulate_tomogram`.
    """
    root = Path(cfg.paths.input)
    settings: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    del settings["paths"]
    train_runs, test_runs = settings["train_runs"], settings["test_runs"]
    check_settings(settings)
    imaging = Imaging(**settings["imaging"])
    particles = ParticleSet.from_config(settings["particles"])
    claim_folder(root, settings)

    solution_path = root / "test_solution.csv"
    solution = []
    runs = track([*train_runs, *test_runs], "simulating", console=Console(stderr=True), transient=True)
    for index, run in enumerate(runs):
        is_train = run in train_runs
        tomogram_path = (
            root / ("train" if is_train else "test") / f"static/ExperimentRuns/{run}/VoxelSpacing10.000/denoised.zarr"
        )
        if tomogram_path.exists() and (is_train or solution_path.exists()):
            continue
        volume, table = simulate_tomogram(
            particles,
            tuple(settings["shape"]),
            tuple(settings["voxel_spacing"]),
            settings["counts"],
            settings["look_alikes"],
            imaging,
            np.random.default_rng([settings["seed"], index]),
        )
        picks = {
            name: table.loc[table["particle"] == name, ["x", "y", "z"]].to_numpy(float) for name in settings["counts"]
        }
        if is_train:  # picks before the tomogram, whose presence says that the run is complete
            for name, locations in picks.items():
                folder = root / f"train/overlay/ExperimentRuns/{run}/Picks"
                write_picks_json(folder / f"{name}.json", run, name, locations)
        else:
            solution += [make_picks(run, name, locations) for name, locations in picks.items()]
        if not tomogram_path.exists():
            write_tomogram(tomogram_path, volume, tuple(settings["voxel_spacing"]))
    if not solution_path.exists():
        write_solution_csv(solution_path, concat_picks(solution))
    logger.info("%d simulated tomograms with picks and %d without are in %s", len(train_runs), len(test_runs), root)


def check_settings(settings: dict[str, Any]) -> None:
    """Refuse a shape or a spacing that is none, and names of runs that are no folder's or occur twice."""
    for key in ("shape", "voxel_spacing"):
        value = settings[key]
        if not (isinstance(value, list) and len(value) == 3 and all(number > 0 for number in value)):
            raise InputError(f"key {key}", "three numbers above 0, in the order z, y, x", str(value), "correct it")
    runs = [*settings["train_runs"], *settings["test_runs"]]
    for run in runs:
        if not isinstance(run, str) or not run or "/" in run or run.startswith("."):
            raise InputError("keys train_runs, test_runs", "names such as TS_1", repr(run), "rename that run")
        if runs.count(run) > 1:
            raise InputError("keys train_runs, test_runs", "each name once", f"'{run}' again", "rename that run")


def claim_folder(root: Path, settings: dict[str, Any]) -> None:
    """Mark an empty or new folder as a simulation with these settings; refuse any not so marked."""
    marker = root / SETTINGS
    cure = "choose another folder (paths.input=...) or remove this one"
    if root.exists() and not root.is_dir():
        raise InputError(root, "a folder", "a file", cure)
    content = [path for path in root.glob("[!.]*") if path != marker]  # hidden: partials of a killed process
    if content and not marker.exists():
        raise InputError(root, "a new or empty folder for simulated data", f"{content[0].name} in it", cure)
    if content:
        try:
            found = json.loads(marker.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found != settings:
            keys = [key for key in settings if not isinstance(found, dict) or found.get(key) != settings[key]]
            raise InputError(root, "a simulation with the present settings", f"other {', '.join(keys)}", cure)
    with write_aside(marker) as partial:
        partial.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def write_tomogram(path: Path, volume: NDArray[np.float32], voxel_spacing: Spacing3D) -> None:
    """Write a volume ``(D, H, W)`` as the competition does: OME-NGFF 0.4 in Zarr v2 at three scales.

    Every second voxel of a smoothed volume makes the next scale, so that voxel 0 stays at 0 angstrom.
    """
    with write_aside(path) as partial:
        group = zarr.create_group(partial, zarr_format=2)
        scales: list[Any] = []
        for level in range(3):
            array = group.create_array(
                str(level),
                shape=volume.shape,
                chunks=(256, 256, 256),
                dtype="float32",
                fill_value=0.0,
                compressors=numcodecs.Blosc(cname="lz4", clevel=5, shuffle=1),
                chunk_key_encoding={"name": "v2", "separator": "/"},
            )
            array[:] = volume
            transformation = {"scale": [spacing * 2**level for spacing in voxel_spacing], "type": "scale"}
            scales.append({"coordinateTransformations": [transformation], "path": str(level)})
            volume = ndimage.gaussian_filter(volume, 0.7)[::2, ::2, ::2]
        axes: list[Any] = [{"name": name, "type": "space", "unit": "angstrom"} for name in "zyx"]
        group.attrs["multiscales"] = [{"axes": axes, "datasets": scales, "metadata": {}, "name": "/", "version": "0.4"}]
