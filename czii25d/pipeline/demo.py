"""The end of the demo: the baseline beside the network, a picture, and whether both are where they should be.

``python -m czii25d.pipeline.demo``
"""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig
from rich.console import Console

from czii25d.baseline import find_blobs
from czii25d.data.targets import open_target
from czii25d.data.volumes import Volume, open_volume
from czii25d.errors import InputError
from czii25d.metrics import evaluate, fit_thresholds
from czii25d.particles import ParticleSet
from czii25d.picks import above_thresholds, read_picks_csv
from czii25d.pipeline.app import run
from czii25d.pipeline.score import as_rich_table
from czii25d.plotting import plot_picks

logger = logging.getLogger(__name__)


def finish_demo(cfg: DictConfig) -> dict[str, float]:
    """Judge network and baseline on a run that neither has seen, and draw the network's picks.

    The baseline's thresholds are chosen on the network's validation run, as the network's were.

    Raises
    ------
    InputError
        If the network falls short of ``least_fbeta``, or the baseline does too well for the phantom to mean anything.
    """
    particles = ParticleSet.from_config(cfg.particles)
    volumes = Path(cfg.paths.output) / "volumes"
    unseen = open_volume(volumes / "test" / cfg.run)
    solution = read_picks_csv(cfg.solution)
    solution = solution[solution["run"] == cfg.run]
    submission = read_picks_csv(Path(cfg.predictions) / "submission.csv")

    fold = open_target(Path(cfg.paths.output) / "heatmaps" / f"{cfg.fold}.zarr")
    blobs = find_all_blobs(open_volume(volumes / "train" / cfg.fold), cfg.fold, particles)
    thresholds = fit_thresholds(fold.picks(), blobs, particles).thresholds
    blobs = find_all_blobs(unseen, cfg.run, particles)
    blobs = above_thresholds(blobs, thresholds)

    network, baseline = (
        evaluate(solution, submission, particles=particles),
        evaluate(solution, blobs, particles=particles),
    )
    console = Console()
    console.print(as_rich_table(baseline, f"\nFor comparison: Laplacian of Gaussian on {cfg.run} (simulated)", "F4"))
    console.print(as_rich_table(network, f"\nThe network on {cfg.run} (simulated), which it has not seen", "F4"))
    plot_picks(unseen.crop((0, 0, 0), unseen.shape), unseen.voxel_spacing, solution, submission, particles, cfg.picture)
    scores = {"network": float(network["fbeta"]["total"]), "baseline": float(baseline["fbeta"]["total"])}
    console.print(
        f"\nweighted F4: network {scores['network']:.3f}, baseline {scores['baseline']:.3f}; picture: {cfg.picture}",
        highlight=False,
    )
    for name, wrong, bound in (
        ("network", scores["network"] < cfg.least_fbeta, f"at least {cfg.least_fbeta}"),
        ("baseline", scores["baseline"] > cfg.most_baseline_fbeta, f"at most {cfg.most_baseline_fbeta}"),
    ):
        if wrong:
            raise InputError(
                f"F4 of the {name}",
                bound,
                f"{scores[name]:.3f}",
                "see the tables above; a change has made the method worse",
            )
    return scores


def find_all_blobs(volume: Volume, run_name: str, particles: ParticleSet) -> pd.DataFrame:
    """Return the baseline's scored picks of a whole volume."""
    picks = find_blobs(volume.crop((0, 0, 0), volume.shape), volume.voxel_spacing, particles)
    return picks.assign(run=run_name)


if __name__ == "__main__":
    run(finish_demo, "demo")
