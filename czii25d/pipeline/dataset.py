"""01: from tomograms to volumes that are cheap to crop."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import track

from czii25d.data.runs import Run, find_runs, find_tomograms
from czii25d.data.tomogram import as_voxel_spacing, describe_source, open_tomogram, read_volume
from czii25d.data.volumes import Volume, open_volume, read_meta, write_volume
from czii25d.errors import InputError
from czii25d.pipeline.app import keep_freed_memory

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)

SPLITS = ("train", "test")


def create_dataset(cfg: DictConfig) -> list[Volume]:
    """Write ``<paths.output>/volumes/<split>/<run>/`` for every run, and return the volumes.

    A run whose volume was made from the same tomogram, as it is now, is skipped.
    """
    keep_freed_memory()  # the next tomogram fits where this one was
    if cfg.mode not in (None, *SPLITS):
        raise InputError("key mode", "train, test or null for both", repr(cfg.mode), "choose one")
    splits = [cfg.mode] if cfg.mode else ["train"]
    # The hidden test set is often not there: without a choice, take what is.
    if not cfg.mode and cfg.tomograms is None and (Path(cfg.paths.input) / "test").is_dir():
        splits.append("test")
    runs = [run for split in splits for run in find_input(cfg, split)]
    console = Console(stderr=True)
    rows, volumes = [], []
    for run in track(runs, "volumes", console=console, transient=True, disable=not console.is_terminal):
        begin = time.perf_counter()
        volume, made = create_volume(
            run, Path(cfg.paths.output) / "volumes" / run.split / run.name, cfg.level, cfg.fill_missing_chunks
        )
        volumes.append(volume)
        rows.append((run, volume, f"{time.perf_counter() - begin:.1f} s" if made else "was there"))
    width = max(len(run.name) for run in runs)
    for run, volume, took in rows:
        shape, spacing = (
            "x".join(map(str, volume.data.shape)),
            " ".join(f"{side:.3f}" for side in volume.voxel_spacing),
        )
        logger.info(
            "%-5s %-*s  %s voxels of %s angstrom, mean %.4g, std %.4g, %s",
            *(run.split, width, run.name, shape, spacing, volume.mean, volume.std, took),
        )
    return volumes


def find_input(cfg: DictConfig, split: str) -> list[Run]:
    """Return the runs that ``tomograms``, or else ``paths.input``, holds, with the voxel spacing of the key."""
    keys: Any = OmegaConf.to_container(cfg)
    given = keys["voxel_spacing"]
    spacing = None if given is None else as_voxel_spacing(given, "key voxel_spacing")
    if cfg.tomograms is not None:
        return find_tomograms(cfg.tomograms, split, spacing)
    runs = find_runs(cfg.paths.input, split, cfg.reconstruction, cfg.voxel_spacing_folder)
    return [replace(run, voxel_spacing=spacing) for run in runs]


def create_volume(run: Run, folder: Path, level: int, fill_missing_chunks: bool) -> tuple[Volume, bool]:
    """Return the volume of a run, and whether it had to be made."""
    tomogram = open_tomogram(run.tomogram, run.voxel_spacing, level)
    source = describe_source(tomogram)
    try:
        if read_meta(folder).get("source") == source:
            return open_volume(folder), False
    except InputError:  # missing or damaged
        pass
    write_volume(folder, read_volume(tomogram, fill_missing_chunks), tomogram.voxel_spacing, source)
    return open_volume(folder), True
