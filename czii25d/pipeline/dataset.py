"""01: from tomograms to volumes that are cheap to crop."""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import track

from czii25d.data.preparation import VOLUME_CONTRAST, Preparation, resample
from czii25d.data.runs import Run, find_runs, find_tomograms
from czii25d.data.tomogram import as_voxel_spacing, open_tomogram
from czii25d.data.volumes import Volume, open_volume, read_meta, write_volume
from czii25d.errors import InputError
from czii25d.pipeline.app import keep_freed_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from omegaconf import DictConfig

    from czii25d.contrast import Contrast
    from czii25d.geometry import Shape3D, Spacing3D

logger = logging.getLogger(__name__)

SPLITS = ("train", "test")


def create_dataset(cfg: DictConfig) -> list[Volume]:
    """Write ``<paths.output>/volumes/<split>/<run>/`` for every run, and return the volumes.

    Those of ``more_reconstructions`` lie in ``<run>/<reconstruction>/`` and are not returned. A run whose volume was
    made from the same tomogram, as it is now, is skipped.
    """
    keep_freed_memory()  # the next tomogram fits where this one was
    if cfg.mode not in (None, *SPLITS):
        raise InputError("key mode", "train, test or null for both", repr(cfg.mode), "choose one")
    splits = [cfg.mode] if cfg.mode else ["train"]
    # The hidden test set is often not there: without a choice, take what is.
    if not cfg.mode and cfg.tomograms is None and (Path(cfg.paths.input) / "test").is_dir():
        splits.append("test")
    root = Path(cfg.paths.output) / "volumes"
    found = [(run, run.name, root / run.split / run.name) for split in splits for run in find_input(cfg, split)]
    runs = len(found)
    for name in cfg.more_reconstructions if "train" in splits else ():
        if cfg.tomograms is not None or name == cfg.reconstruction:
            expected = "other reconstructions in paths.input than the first"
            raise InputError("key more_reconstructions", expected, str(name), "remove it")
        found += [
            (run, f"{run.name} {name}", root / "train" / run.name / name) for run in find_input(cfg, "train", name)
        ]
    preparation = Preparation(
        cfg.fill_missing_chunks, cfg.contrast, voxel_spacing=spacing_key(cfg.resample_to, "resample_to")
    )
    console = Console(stderr=True)
    rows, volumes = [], []
    for run, label, folder in track(found, "volumes", console=console, transient=True, disable=not console.is_terminal):
        begin = time.perf_counter()
        volume, made = create_volume(run, folder, preparation, cfg.level)
        volumes.append(volume)
        rows.append((run.split, label, volume, f"{time.perf_counter() - begin:.1f} s" if made else "was there"))
    width = max(len(label) for _, label, _ in found)
    for split, label, volume, took in rows:
        shape, spacing = (
            "x".join(map(str, volume.data.shape)),
            " ".join(f"{side:.3f}" for side in volume.voxel_spacing),
        )
        logger.info(
            "%-5s %-*s  %s voxels of %s angstrom, mean %.4g, std %.4g, %s",
            *(split, width, label, shape, spacing, volume.mean, volume.std, took),
        )
    return volumes[:runs]


def find_input(cfg: DictConfig, split: str, reconstruction: str | None = None) -> list[Run]:
    """Return the runs that ``tomograms``, or else ``paths.input``, holds, with the voxel spacing of the key."""
    spacing = spacing_key(cfg.voxel_spacing, "voxel_spacing")
    if cfg.tomograms is not None:
        return find_tomograms(cfg.tomograms, split, spacing)
    runs = find_runs(cfg.paths.input, split, reconstruction or cfg.reconstruction, cfg.voxel_spacing_folder)
    return [replace(run, voxel_spacing=spacing) for run in runs]


def spacing_key(given: Any, key: str) -> Spacing3D | None:
    """Return a key that is null, one number or ``[z, y, x]`` in angstrom as a voxel spacing."""
    if given is None:
        return None
    plain: Any = OmegaConf.to_object(given) if OmegaConf.is_config(given) else given
    return as_voxel_spacing(plain, f"key {key}")


def create_volume(run: Run, folder: Path, preparation: Preparation, level: int = 0) -> tuple[Volume, bool]:
    """Return the volume of a run, and whether it had to be made."""
    tomogram = open_tomogram(run.tomogram, run.voxel_spacing, level)
    source = preparation.describe(tomogram)
    try:
        if read_meta(folder).get("source") == source:
            return open_volume(folder), False
    except InputError:  # missing or damaged
        pass
    with room_beside(folder) as room:
        write_volume(folder, *preparation.read(tomogram, run.name, room), source)
    return open_volume(folder), True


def convert_volume(volume: Volume, folder: Path, voxel_spacing: Spacing3D, contrast: Contrast) -> None:
    """Write another volume of a run, of that voxel spacing and contrast."""
    sign = 1 if contrast == VOLUME_CONTRAST else -1

    def planes(start: int, stop: int) -> NDArray[np.float32]:
        return volume.planes(start, stop) * np.float32(sign * volume.std) + np.float32(volume.mean)

    with room_beside(folder) as room:
        voxels = resample(planes, volume.shape, volume.voxel_spacing, voxel_spacing, volume.name, room)
        write_volume(folder, voxels, voxel_spacing, {})


@contextmanager
def room_beside(folder: Path) -> Iterator[Callable[[Shape3D], NDArray[np.float32]]]:
    """Yield what makes an array in a file beside ``folder``, which is removed at the end."""
    path = folder.with_name(f".{folder.name}.resampled.npy")

    def room(shape: Shape3D) -> NDArray[np.float32]:
        path.parent.mkdir(parents=True, exist_ok=True)
        return np.lib.format.open_memmap(path, "w+", np.float32, shape)

    try:
        yield room
    finally:
        path.unlink(missing_ok=True)
