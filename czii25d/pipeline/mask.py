"""02: from picks to heatmaps."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track

from czii25d.data.runs import find_picks
from czii25d.data.targets import make_recipe, read_recipe, write_heatmap
from czii25d.data.volumes import open_volume
from czii25d.errors import InputError
from czii25d.geometry import Shape3D, Spacing3D, xyz_angstrom_to_zyx_voxel
from czii25d.heatmap import default_sigma
from czii25d.particles import ParticleSet

logger = logging.getLogger(__name__)

MOST_OUTSIDE = 0.01  # share of a run's picks that may lie outside its volume: slips of hand, not of units
CROWDED = 0.25  # picks in voxels taken for angstrom all lie in the first tenth of a 10 angstrom volume
FEWEST_TO_JUDGE = 5


def create_mask(cfg: DictConfig) -> list[Path]:
    """Write ``<paths.output>/heatmaps/<run>.zarr`` for every training run, and return the paths.

    A run whose heatmaps were made by the same recipe is skipped.
    """
    particles = ParticleSet.from_config(cfg.particles).first(cfg.class_num)
    chosen = cfg.heatmap.sigma_angstrom or {}
    output = Path(cfg.paths.output)
    recipes = {}
    for run, picks in find_picks(cfg.paths.input, "train", particles).items():
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
    centers = xyz_angstrom_to_zyx_voxel(picks[["x", "y", "z"]], voxel_spacing)
    outside = _outside(centers, shape)
    extent = " x ".join(f"{side * step:.0f}" for side, step in zip(shape[::-1], voxel_spacing[::-1], strict=True))
    expected = f"picks inside the volume, {extent} angstrom (x, y, z)"
    if outside.sum() > MOST_OUTSIDE * len(picks):
        exchanged = xyz_angstrom_to_zyx_voxel(picks[["z", "y", "x"]], voxel_spacing)
        hint = " (with x and z exchanged all are inside)" if not _outside(exchanged, shape).any() else ""
        first = picks[["x", "y", "z"]].to_numpy()[outside][0].round(1).tolist()
        raise InputError(
            f"run {run}",
            expected,
            f"{outside.sum()} of {len(picks)} outside, the first at {first}{hint}",
            "check the picks' axes and unit and the tomogram's voxel spacing",
        )
    if len(centers) >= FEWEST_TO_JUDGE and (centers.max(0) < CROWDED * np.array(shape)).all():
        raise InputError(
            f"run {run}",
            f"{expected}, all over it",
            f"none beyond {picks[['x', 'y', 'z']].max().round(1).tolist()}",
            "if the picks are in voxels, convert them to angstrom; else check the tomogram's voxel spacing",
        )
    if outside.any():
        logger.warning("run %s: dropped %d of %d picks, outside the volume", run, outside.sum(), len(picks))
    return picks[~outside]


def _outside(centers_zyx_voxel: NDArray[np.float64], shape: Shape3D) -> NDArray[np.bool_]:
    return np.any((centers_zyx_voxel < -0.5) | (centers_zyx_voxel > np.array(shape) - 0.5), axis=1)


def is_done(path: Path, recipe: Mapping[str, object]) -> bool:
    """Return whether the heatmaps there were made by this very recipe."""
    try:
        return read_recipe(path) == json.loads(json.dumps(recipe))
    except InputError:
        return False
