"""02: from picks to heatmaps."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track

from czii25d.data.targets import make_recipe, read_recipe, write_heatmap
from czii25d.data.volumes import open_volume
from czii25d.errors import InputError
from czii25d.formats.fit import check_picks_fit
from czii25d.geometry import Shape3D, Spacing3D
from czii25d.heatmap import default_sigma
from czii25d.particles import ParticleSet
from czii25d.pipeline.solution import gather_picks

logger = logging.getLogger(__name__)


def create_mask(cfg: DictConfig) -> list[Path]:
    """Write ``<paths.output>/heatmaps/<run>.zarr`` for every training run, and return the paths.

    A run whose heatmaps were made by the same recipe is skipped.
    """
    particles = ParticleSet.from_config(cfg.particles).first(cfg.class_num)
    chosen = cfg.heatmap.sigma_angstrom or {}
    output = Path(cfg.paths.output)
    recipes = {}
    for run, picks in gather_picks(cfg, particles).items():
        volume = open_volume(output / "volumes" / "train" / run)
        shape: Shape3D = volume.data.shape
        inside = drop_outside(picks, run, volume.voxel_spacing, shape)
        sigma = choose_sigma(particles, volume.voxel_spacing, cfg.heatmap.sigma, chosen)
        recipes[output / "heatmaps" / f"{run}.zarr"] = make_recipe(
            run, particles, inside, sigma, volume.voxel_spacing, shape
        )
    console = Console(stderr=True)
    # All is checked before the first is written.
    for path in track(list(recipes), "heatmaps", console=console, transient=True, disable=not console.is_terminal):
        recipe = recipes[path]
        made = not is_done(path, recipe)
        if made:
            write_heatmap(path, recipe)
        counts = ", ".join(f"{len(rows)} {name}" for name, rows in recipe["picks"].items())
        logger.info("%s: %s%s", recipe["run"], counts, "" if made else " (was there)")
    return list(recipes)


def choose_sigma(
    particles: ParticleSet, voxel_spacing: Spacing3D, sigma: float | None, sigma_angstrom: Mapping[str, float]
) -> dict[str, float]:
    """Return the sigma of each class in angstrom.

    Parameters
    ----------
    sigma
        Voxels, for all classes; ``None``: each class has its own, by its radius.
    sigma_angstrom
        Of single classes, by name; it goes before ``sigma``.
    """
    for name in sigma_angstrom:
        particles.channel(name)
    side = float(np.mean(voxel_spacing))
    chosen = {
        particle.name: default_sigma(particle.radius) if sigma is None else sigma * side for particle in particles
    } | dict(sigma_angstrom)
    for name, value in chosen.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < np.inf:
            raise InputError(f"key heatmap: sigma of {name}", "a number above 0", repr(value), "correct it")
    return chosen


def drop_outside(picks: pd.DataFrame, run: str, voxel_spacing: Spacing3D, shape: Shape3D) -> pd.DataFrame:
    """Return the picks inside the volume.

    A few outside it are dropped with a warning; many, or picks crowded into a corner, have another unit, axis
    order or voxel spacing than the volume, and raise `InputError`.
    """
    inside = check_picks_fit(picks, shape, voxel_spacing, f"run {run}")
    if not inside.all():
        logger.warning("run %s: dropped %d of %d picks, outside the volume", run, (~inside).sum(), len(picks))
    return picks[inside]


def is_done(path: Path, recipe: Mapping[str, object]) -> bool:
    """Return whether the heatmaps there were made by this very recipe."""
    try:
        return read_recipe(path) == json.loads(json.dumps(recipe))
    except InputError:
        return False
