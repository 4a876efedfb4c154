"""Recall of one particle against the number of picks, beside a Laplacian-of-Gaussian picker; tables and a picture.

python benchmarks/ribosomes.py VOLUME PARTICLES SOLUTION SCORED_PICKS REGIONS [--picture FILE] [--sigma 2.2] [--nms 7]

VOLUME is what 01 made, SOLUTION what 03 wrote for the same REGIONS that 21 picked in. The baseline's scale and distance
are in voxels; its peaks are cut to the region too.

An annotation may be incomplete: two more tables say how much of the best picks is annotated, rank by rank, and compare
the mean grey value at each distance from annotated picks and from the others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage

from czii25d.baseline import blob_response
from czii25d.data.regions import read_regions
from czii25d.data.volumes import Volume, open_volume
from czii25d.geometry import xyz_angstrom_to_zyx_voxel, zyx_voxel_to_xyz_angstrom
from czii25d.metrics import match, near_reference
from czii25d.particles import load_particles
from czii25d.peaks import find_peaks
from czii25d.picks import read_picks_csv

SHARES = (0.5, 1, 2, 3, 4)  # picks per annotated particle


def find_baseline(volume: np.ndarray, spacing: tuple[float, ...], sigma: float, nms: float) -> pd.DataFrame:
    """Return all maxima of the Laplacian of a Gaussian, with their response as score."""
    response = blob_response(volume, sigma * spacing[0], spacing)
    [(centers, scores)] = find_peaks(response[None], np.array([[nms] * 3]), 0.0)
    return pd.DataFrame(zyx_voxel_to_xyz_angstrom(centers, spacing), columns=["x", "y", "z"]).assign(score=scores)


def main() -> None:
    """Print the table; draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("volume", "particles", "solution", "scored_picks", "regions"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--sigma", type=float, default=2.2, help="voxels")
    parser.add_argument("--nms", type=float, default=7.0, help="voxels between peaks")
    arguments = parser.parse_args()
    particles = load_particles(arguments.particles)
    [particle] = particles
    volume = open_volume(arguments.volume)
    truth = read_picks_csv(arguments.solution)
    truth = truth[truth["run"] == volume.name]
    picks = read_picks_csv(arguments.scored_picks, scored=True)
    baseline = find_baseline(volume.planes(0, volume.shape[0]), volume.voxel_spacing, arguments.sigma, arguments.nms)
    baseline = baseline.assign(run=volume.name, particle=particle.name)
    selection = read_regions(arguments.regions).select(volume.name, volume.shape, volume.voxel_spacing)
    if selection is not None:
        baseline, _ = selection.keep(baseline)
    print(f"{len(truth)} annotated; a hit lies within {particle.radius / 2:g} angstrom\n")
    print(f"| picks | {' | '.join(f'{share:g} × annotated' for share in SHARES)} |\n|{'---|' * (len(SHARES) + 1)}")
    curves = {}
    for name, found in (("network", picks), ("Laplacian of Gaussian", baseline)):
        matches = match(truth, found, particles)[particle.name][volume.name]
        best_first = matches.scores[::-1]
        counts = [matches.count(score) for score in best_first]
        curves[name] = np.array([(picked, hits / references) for references, picked, hits in counts])
        at = [curves[name][min(round(share * len(truth)), len(counts)) - 1, 1] for share in SHARES]
        print(f"| {name}, recall | {' | '.join(f'{recall:.3f}' for recall in at)} |")
    best = picks.sort_values("score", ascending=False, ignore_index=True).head(2 * len(truth))
    compare(volume, best, near_reference(truth, best, particles), particle.radius)
    if arguments.picture:
        draw(curves, len(truth), arguments.picture)


def compare(volume: Volume, best: pd.DataFrame, annotated: np.ndarray, radius: float) -> None:
    """Print how many of the best picks are annotated, ``(N,)``, and what these and the others look like."""
    quarters = np.array_split(annotated, 4)
    print(f"\n| picks by rank | {' | '.join(f'{i + 1} of 4' for i in range(4))} |\n|{'---|' * 5}")
    print(f"| annotated | {' | '.join(f'{quarter.mean():.2f}' for quarter in quarters)} |")
    voxels = volume.planes(0, volume.shape[0])
    voxels = (voxels - voxels.mean()) / voxels.std()
    centers = xyz_angstrom_to_zyx_voxel(best[["x", "y", "z"]], volume.voxel_spacing)
    shells = np.arange(0, 1.75 * radius, volume.voxel_spacing[0])
    print(f"\n| angstrom from the centre | {' | '.join(f'{shell:.0f}' for shell in shells)} |")
    print(f"|{'---|' * (len(shells) + 1)}")
    groups = [("annotated", annotated), ("others", ~annotated)]
    for name, chosen in [group for group in groups if group[1].any()]:
        means = [shell_mean(voxels, centers[chosen], shell / np.array(volume.voxel_spacing)) for shell in shells]
        print(f"| {name}, {chosen.sum()} picks | {' | '.join(f'{mean:.2f}' for mean in means)} |")


def shell_mean(voxels: np.ndarray, centers: np.ndarray, radius: np.ndarray) -> float:
    """Return the mean of the voxels at a radius (voxels along z, y, x) from any of the centres ``(N, 3)`` z, y, x."""
    directions = np.random.default_rng(0).normal(size=(100, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    points = (centers[:, None] + radius * directions).reshape(-1, 3)
    return float(ndimage.map_coordinates(voxels, points.T, order=1, mode="nearest").mean())


def draw(curves: dict[str, np.ndarray], annotated: int, path: Path) -> None:
    """Draw recall against the number of picks."""
    from matplotlib.figure import Figure

    figure = Figure((5.2, 3.2), layout="constrained")
    ax = figure.subplots()
    for (name, curve), (color, style) in zip(curves.items(), (("#009E73", "-"), ("#555555", "--")), strict=True):
        ax.plot(*curve.T, style, color=color, lw=2, label=name)
    ax.axvline(2 * annotated, color="0.7", lw=1)
    ax.text(2 * annotated, 0.02, " twice the annotated", fontsize=8, color="0.35")
    ax.set(xlim=(0, 3.5 * annotated), ylim=(0, 1.02), xlabel="picks, best first", ylabel="recall of the annotated")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.1))
    figure.savefig(path, dpi=200)


if __name__ == "__main__":
    main()
