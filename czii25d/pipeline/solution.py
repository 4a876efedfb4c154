"""03: from pick files to one table of the truth."""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from czii25d.data.runs import find_picks, picks_by_run
from czii25d.data.volumes import open_volume
from czii25d.errors import InputError
from czii25d.formats import TomogramGrid, check_picks_fit, read_picks
from czii25d.particles import ParticleSet
from czii25d.picks import concat_picks, write_solution_csv
from czii25d.pipeline.regions import keep_selected, regions_key

logger = logging.getLogger(__name__)


def create_solution(cfg: DictConfig) -> Path:
    """Write every pick of the training runs to ``<paths.output>/solution.csv`` and return its path."""
    particles = ParticleSet.from_config(cfg.particles).first(cfg.class_num)
    runs = gather_picks(cfg, particles)
    regions = regions_key(cfg.regions)
    for run in runs:
        folder = Path(cfg.paths.output) / "volumes" / "train" / run
        if folder.is_dir():  # this step needs no volume, but where there is one the picks must be of it
            volume = open_volume(folder)
            check_picks_fit(runs[run], volume.shape, volume.voxel_spacing, f"run {run}")
        if regions.entry(run) is not None:
            volume = open_volume(folder)
            selection = regions.select(run, volume.shape, volume.voxel_spacing)
            runs[run] = keep_selected(runs[run], selection, f"run {run}")
    picks = concat_picks(runs.values())
    path = Path(cfg.paths.output) / "solution.csv"
    write_solution_csv(path, picks)
    logger.info("%d picks of %d runs in %s", len(picks), len(runs), path)
    return path


def gather_picks(cfg: DictConfig, particles: ParticleSet) -> dict[str, pd.DataFrame]:
    """Return the true picks of every training run: from the file or folder ``picks``, else from ``paths.input``.

    Formats that count in voxels are read with the voxel spacing and shape of the volumes that 01 wrote.
    """
    if cfg.picks is None:
        return find_picks(cfg.paths.input, "train", particles)
    volumes = Path(cfg.paths.output) / "volumes" / "train"
    opened = [open_volume(folder) for folder in sorted(volumes.glob("[!.]*")) if folder.is_dir()]
    grids = {volume.name: TomogramGrid(volume.voxel_spacing, volume.shape) for volume in opened}
    # All names are known, also of particles beyond class_num; those are left out below.
    picks = read_picks(cfg.picks, particles=ParticleSet.from_config(cfg.particles), grids=grids)
    runs = picks_by_run(picks, particles)
    if not any(map(len, runs.values())):
        raise InputError(cfg.picks, f"picks of {', '.join(particles.names)}", "none", "see that it is the right file")
    return runs
