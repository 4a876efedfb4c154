"""Convert picks between the files of other programs: copick, CSV, RELION 4 and 5, IMOD and crYOLO."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from czii25d.data.runs import find_tomograms
from czii25d.data.tomogram import as_voxel_spacing, open_tomogram
from czii25d.errors import InputError
from czii25d.formats import TomogramGrid, check_picks_fit, find_format, read_picks, write_picks
from czii25d.formats.base import Grids
from czii25d.geometry import Shape3D
from czii25d.particles import ParticleSet
from czii25d.pipeline.app import run

logger = logging.getLogger("czii25d.pipeline.convert")  # as a program its name is __main__


def convert(cfg: DictConfig) -> list[Path]:
    """Read the picks in ``source``, write them to ``target``, and return the files.

    Where the tomograms' shapes are known, picks that cannot belong to them are refused.
    """
    particles = ParticleSet.from_config(cfg.particles) if cfg.get("particles") else None
    grids = read_grids(cfg.tomograms, _plain(cfg.voxel_spacing), _plain(cfg.shape))
    source_format = find_format(cfg.source, cfg.source_format) if Path(cfg.source).exists() else cfg.source_format
    picks = read_picks(
        cfg.source,
        source_format,
        run=_text(cfg.run),
        particle=_text(cfg.particle),
        particles=particles,
        grids=grids,
        pixel_size=cfg.pixel_size,
    )
    if not len(picks):
        logger.warning("%s holds no picks", cfg.source)
    for name, own in picks.groupby("run", sort=False):
        grid = grids if isinstance(grids, TomogramGrid) else (grids or {}).get(str(name))
        if grid is not None and grid.shape is not None:
            check_picks_fit(own, grid.shape, grid.voxel_spacing, f"{cfg.source}: run {name}")
    files = write_picks(
        cfg.target,
        picks,
        cfg.target_format,
        particles=particles,
        grids=grids,
        pixel_size=cfg.pixel_size,
        user_id=str(cfg.user_id),
        session_id=str(cfg.session_id),
    )
    logger.info(
        "%d picks of %d particles in %d runs%s: %s to %s (%d files)",
        len(picks),
        picks["particle"].nunique(),
        picks["run"].nunique(),
        " with scores" if "score" in picks else "",
        source_format,
        cfg.target,
        len(files),
    )
    return files


def read_grids(tomograms: str | None, voxel_spacing: Any, shape: Any) -> Grids:
    """Return each run's grid from its tomogram, or one for all from voxel spacing and shape.

    Raises
    ------
    InputError
        If both tomograms and a shape are given, a shape without a spacing, or no three sides.
    """
    if shape is not None:
        sides = list(shape) if isinstance(shape, list) else [shape]
        if len(sides) != 3 or not all(isinstance(side, int) and side >= 1 for side in sides):
            raise InputError("key shape", "[D, H, W] in whole voxels", str(shape), "give three numbers")
        if tomograms is not None or voxel_spacing is None:
            found = "tomograms too" if tomograms is not None else "no voxel_spacing"
            raise InputError("key shape", "voxel_spacing with it, and no tomograms", found, "correct the keys")
    if tomograms is not None:
        opened = {
            found.name: open_tomogram(found.tomogram, found.voxel_spacing)
            for found in find_tomograms(tomograms, voxel_spacing=voxel_spacing)
        }
        return {name: TomogramGrid(tomogram.voxel_spacing, tomogram.shape) for name, tomogram in opened.items()}
    if voxel_spacing is None:
        return None
    sides_or_none: Shape3D | None = None if shape is None else (shape[0], shape[1], shape[2])
    return TomogramGrid(as_voxel_spacing(voxel_spacing, "key voxel_spacing"), sides_or_none)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)  # run=007 and session_id=1 are names, not numbers


def _plain(value: Any) -> Any:
    return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value


if __name__ == "__main__":
    run(convert, "convert")
