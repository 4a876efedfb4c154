"""03: from pick files to one table of the truth."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig

from czii25d.data.runs import find_picks
from czii25d.particles import ParticleSet
from czii25d.picks import concat_picks, write_solution_csv

logger = logging.getLogger(__name__)


def create_solution(cfg: DictConfig) -> Path:
    """Write every pick of the training runs to ``<paths.output>/solution.csv`` and return its path."""
    particles = ParticleSet.from_config(cfg.particles).first(cfg.class_num)
    runs = find_picks(cfg.paths.input, "train", particles)
    picks = concat_picks(runs.values())
    path = Path(cfg.paths.output) / "solution.csv"
    write_solution_csv(path, picks)
    logger.info("%d picks of %d runs in %s", len(picks), len(runs), path)
    return path
