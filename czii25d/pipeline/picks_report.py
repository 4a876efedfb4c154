"""23 for a folder of predictions: scores, averages, slices, counts and times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from omegaconf import DictConfig

from czii25d.averages import sum_boxes
from czii25d.charts import plot_precision_recall, plot_scores
from czii25d.data.predictions import STAGES, PredictedRun, Predictions, Slices, read_predictions
from czii25d.geometry import Shape3D, xyz_angstrom_to_zyx_voxel
from czii25d.metrics import evaluate, match, near_reference, pool, precision_recall_curve
from czii25d.particles import Particle, ParticleSet
from czii25d.picks import empty_picks, read_picks_csv
from czii25d.pipeline.page import Album, Page, Picture, Table, page_values, plural
from czii25d.plotting import fullest_slice, plot_average, plot_slice, slab_of

AVERAGED = 200  # of a particle in a run, the best-scored so many go into its average
HALF_SIDE = 2  # of an averaged box, in radii


def picks_page(cfg: DictConfig) -> Page:
    """Return the page of a folder of predictions."""
    predictions = read_predictions(cfg.predictions)
    chosen = Chosen.of(predictions, cfg.runs, Path(cfg.solution))

    def build(album: Album) -> dict[str, Any]:
        tiles = [*chosen.tiles(), *_time_tiles(chosen.runs)]
        return {
            **page_values(chosen.particles, f"Picks of {plural(len(chosen.runs), 'run')}", cfg.note, tiles),
            "lines": [f"{predictions.folder}, picked by {', '.join(predictions.networks)}"],
            "picks": picks_section(album, chosen, cfg.pictured_runs),
        }

    return Page(predictions.folder, build)


@dataclass(frozen=True)
class Chosen:
    """The runs of a report: their submitted picks, all their scored picks, and the truth.

    Parameters
    ----------
    solution
        Of those of the runs that it names; empty: of none of them.
    remarks
        What is missing or left out.
    """

    predictions: Predictions
    runs: list[PredictedRun]
    kept: pd.DataFrame
    scored: pd.DataFrame
    solution: pd.DataFrame
    remarks: list[str] = field(default_factory=list)

    @property
    def particles(self) -> ParticleSet:
        """What was looked for."""
        return self.predictions.particles

    @property
    def judged(self) -> list[str]:
        """The runs whose truth is known."""
        truth = set(self.solution["run"])
        return [run.name for run in self.runs if run.name in truth]

    @classmethod
    def of(cls, predictions: Predictions, given: str | Sequence[str] | None, solution_path: Path) -> Chosen:
        """Choose runs, and read the truth where it is there."""
        runs = predictions.choose(given)
        names = [run.name for run in runs]
        chosen = predictions.picks["run"].isin(names).to_numpy()
        kept = predictions.picks[chosen & predictions.is_submitted].reset_index(drop=True)
        scored = predictions.picks[chosen].reset_index(drop=True)
        solution, remarks = read_truth(solution_path, names, predictions.particles)
        return cls(predictions, runs, kept, scored, solution, remarks)

    def evaluation(self) -> pd.DataFrame | None:
        """Return F4 and counts by particle, with the total, if any truth is known."""
        if not self.judged:
            return None
        return evaluate(self.solution, self.kept if len(self.kept) else empty_picks(), particles=self.particles)

    def tiles(self) -> list[tuple[str, str]]:
        """Return the numbers at the top of the page."""
        table = self.evaluation()
        count = [(f"{len(self.kept):,}", f"picks, of {len(self.scored):,} scored")]
        if table is None:
            return [*count, (_mean_count(self.kept, len(self.runs)), "picks per run")]
        total = table.loc["total"]
        return [
            (f"{total['fbeta']:.3f}", "weighted F4"),
            *count,
            (f"{total['recall']:.1%}", "recall, all particles"),
            (f"{total['precision']:.1%}", "precision, all particles"),
        ]


def read_truth(path: Path, runs: Sequence[str], particles: ParticleSet) -> tuple[pd.DataFrame, list[str]]:
    """Return the true picks of these runs and particles, and remarks on what is missing or left out."""
    if not path.is_file():
        return empty_picks(), [f"There is no solution at {path}, so there are no scores."]
    solution = read_picks_csv(path)
    solution = solution[solution["run"].isin(runs)]
    known = solution["particle"].isin(particles.names)
    remarks = []
    if not known.all():
        names = ", ".join(sorted(solution.loc[~known, "particle"].unique()))
        remarks.append(f"{(~known).sum()} true particles that the networks do not look for are left out: {names}.")
    solution = solution[known].reset_index(drop=True)
    missing = [run for run in runs if run not in set(solution["run"])]
    if len(missing) == len(runs):
        remarks.append(f"The solution at {path} names none of these runs, so there are no scores.")
    else:
        if missing:
            names = ", ".join(missing)
            remarks.append(f"Scores are of {len(runs) - len(missing)} of {len(runs)} runs; not in {path}: {names}.")
        remarks.append(
            "Scores are the competition's: a hit lies within half a radius of a true particle. "
            "On a run that a network was trained on, or its thresholds were fitted to, they flatter."
        )
    return solution, remarks


def picks_section(album: Album, chosen: Chosen, pictured_num: int) -> dict[str, Any]:
    """Draw the pictures of picks and lay out the tables."""
    pictured = chosen.runs[:pictured_num]
    averages: dict[str, Average] = {}
    runs = []
    for run in pictured:
        volume = run.open()
        add_to_averages(averages, volume, chosen.kept[chosen.kept["run"] == run.name], chosen.particles)
        runs.append(run_card(album, chosen, run, volume))
    remarks = list(chosen.remarks)
    if len(pictured) < len(chosen.runs):
        remarks.append(f"Slices and averages are of the first {len(pictured)} runs; all are counted.")
    return {
        "remarks": remarks,
        "particles": particle_table(chosen),
        "cards": particle_cards(album, chosen, averages),
        "counts": count_table(chosen),
        "key": "Outlines have the area of a particle's disc. "
        + (
            "With a dot: found and true. Dashed: missed. With a cross: found, but not true."
            if chosen.judged
            else "With a dot: found."
        ),
        "runs": runs,
        "time": time_table(chosen.runs),
    }


def particle_table(chosen: Chosen) -> Table:
    """Return thresholds, counts and, where the truth is known, scores of each particle."""
    table = chosen.evaluation()
    scores: Mapping[str, str] = {"fbeta": "F4", "precision": "precision", "recall": "recall"}
    counts = ("hits", "references", "weight")
    counted = "picks" if table is None or len(chosen.judged) == len(chosen.runs) else "picks, all runs"
    columns = ["particle", "radius Å", "threshold", counted, "scored"]
    columns += [] if table is None else [*scores.values(), "hits", "true", "weight"]
    rows = []
    for particle in (*chosen.particles, None):
        name = particle.name if particle else "total"
        kept, scored = (
            (frame["particle"] == name).sum() if particle else len(frame) for frame in (chosen.kept, chosen.scored)
        )
        row = (
            [name, f"{particle.radius:g}", f"{chosen.predictions.thresholds[name]:.2f}"] if particle else [name, "", ""]
        )
        row += [f"{kept:,}", f"{scored:,}"]
        if table is not None:
            row += [f"{table[key][name]:.3f}" for key in scores] + [f"{table[key][name]:g}" for key in counts]
        rows.append(row)
    weighted = "" if table is None else " The total F4 is the weighted mean; precision and recall are of all together."
    return Table(f"Picks in submission.csv, of all that were scored.{weighted}", columns, rows, total=True)


@dataclass
class Average:
    """The sum of boxes about picks, in standard deviations of their tomograms."""

    total: NDArray[np.float64]
    counts: NDArray[np.int64]
    voxel_spacing: tuple[float, float, float]
    picks: int

    @property
    def box(self) -> NDArray[np.float64]:
        """The mean; 0 where no pick's box lies within its tomogram."""
        return np.where(self.counts > 0, self.total / np.maximum(self.counts, 1), 0.0)


def add_to_averages(averages: dict[str, Average], volume: Slices, kept: pd.DataFrame, particles: ParticleSet) -> None:
    """Add the boxes about a run's best-scored picks, in the voxels of the first run."""
    centers, halves, names = [], [], []
    for particle in particles:
        own = kept[kept["particle"] == particle.name].nlargest(AVERAGED, "score")
        if len(own):
            names.append(particle.name)
            centers.append(xyz_angstrom_to_zyx_voxel(own[["x", "y", "z"]].to_numpy(float), volume.voxel_spacing))
            halves.append(_half(particle, averages, volume))
    sums = sum_boxes(volume.planes, volume.shape, centers, halves)
    for name, points, (total, counts) in zip(names, centers, sums, strict=True):
        average = averages.setdefault(
            name, Average(np.zeros_like(total), np.zeros_like(counts), volume.voxel_spacing, 0)
        )
        average.total += total
        average.counts += counts
        average.picks += len(points)


def _half(particle: Particle, averages: Mapping[str, Average], volume: Slices) -> Shape3D:
    if particle.name in averages:
        z, y, x = (side // 2 for side in averages[particle.name].total.shape)
    else:
        z, y, x = (int(np.ceil(HALF_SIDE * particle.radius / side)) for side in volume.voxel_spacing)
    return z, y, x


def particle_cards(album: Album, chosen: Chosen, averages: Mapping[str, Average]) -> list[dict[str, Any]]:
    """Return for each particle its average, its scores and, where the truth is known, precision against recall."""
    judged, near, matches = chosen.scored, None, {}
    if chosen.judged:
        judged = chosen.scored[chosen.scored["run"].isin(chosen.judged)]
        near = near_reference(chosen.solution, judged, chosen.particles)
        matches = match(chosen.solution, chosen.scored, chosen.particles)
    cards = []
    for channel, particle in enumerate(chosen.particles):
        name, threshold = particle.name, chosen.predictions.thresholds[particle.name]
        count, scored = (int((frame["particle"] == name).sum()) for frame in (chosen.kept, chosen.scored))
        pictures = []
        if name in averages:
            pictures.append(average_picture(album, channel, name, averages[name], count))
        own = (judged["particle"] == name).to_numpy()
        if own.any():
            scores = judged["score"].to_numpy(float)[own]
            pictures.append(
                score_picture(album, channel, particle, threshold, scores, None if near is None else near[own])
            )
        pooled = pool(matches[name].values()) if matches else None
        if pooled is not None and pooled.references and len(pooled.scores):
            curve = precision_recall_curve(pooled)
            pictures.append(precision_recall_picture(album, channel, particle, threshold, curve))
        facts = f"{plural(count, 'pick')} · radius {particle.radius:g} Å" if scored else "no pick, at any score"
        cards.append({"name": name, "facts": facts, "pictures": pictures})
    return cards


def average_picture(album: Album, channel: int, name: str, average: Average, count: int) -> Picture:
    """Draw a particle's average; ``count`` is the number of all its picks."""
    best = f" (the best-scored {AVERAGED} of each run)" if average.picks < count else ""
    return album.keep(
        f"average_{channel + 1}_{name}",
        partial(plot_average, average.box, average.voxel_spacing),
        f"Central xy, xz and yz slices of the average of {average.picks} picks of {name}",
        f"Average of {plural(average.picks, 'pick')}{best}, not aligned.",
    )


def score_picture(
    album: Album,
    channel: int,
    particle: Particle,
    threshold: float,
    scores: NDArray[np.float64],
    near: NDArray[np.bool_] | None,
) -> Picture:
    """Draw how a particle's scores are spread."""
    shown = f"{(scores >= threshold).sum():,} of {len(scores):,} reach the threshold {threshold:.2f}"
    return album.keep_both(
        f"scores_{channel + 1}_{particle.name}",
        partial(plot_scores, scores, near, threshold, particle),
        f"Histogram of the scores of {particle.name}: {shown}",
        f"Scores: {shown}.",
    )


def precision_recall_picture(
    album: Album, channel: int, particle: Particle, threshold: float, curve: NDArray[np.float64]
) -> Picture:
    """Draw a particle's precision against its recall."""
    shown = _at_threshold(curve, threshold)
    return album.keep_both(
        f"precision_recall_{channel + 1}_{particle.name}",
        partial(plot_precision_recall, curve, threshold, particle, channel),
        f"Precision against recall of {particle.name}: {shown}",
        f"Precision and recall: {shown}.",
    )


def _at_threshold(curve: NDArray[np.float64], threshold: float) -> str:
    kept = curve[curve[:, 0] >= threshold]
    if not len(kept):
        return f"no pick reaches the threshold {threshold:.2f}"
    return f"{kept[-1, 1]:.2f} and {kept[-1, 2]:.2f} at the threshold {threshold:.2f}"


def run_card(album: Album, chosen: Chosen, run: PredictedRun, volume: Slices) -> dict[str, Any]:
    """Return the central slice of a run and the one that shows most of its picks."""
    kept = chosen.kept[chosen.kept["run"] == run.name]
    depth, height, width = volume.shape
    slices = {depth // 2: "Central slice"}
    fullest = fullest_slice(kept, chosen.particles, volume.voxel_spacing, depth)
    slices[fullest] = f"{slices[fullest]} and slice with most picks" if fullest in slices else "Slice with most picks"
    pictures = [slice_picture(album, chosen, run, volume, index, title) for index, title in slices.items()]
    facts = f"{width} × {height} × {depth} voxels of {volume.voxel_spacing[2]:.2f} Å · {plural(len(kept), 'pick')}"
    return {"name": run.name, "facts": facts, "pictures": pictures}


def slice_picture(album: Album, chosen: Chosen, run: PredictedRun, volume: Slices, index: int, title: str) -> Picture:
    """Draw the slice of plane ``index``."""
    kept = chosen.kept[chosen.kept["run"] == run.name]
    truth = chosen.solution[chosen.solution["run"] == run.name] if run.name in chosen.judged else None
    start, stop = slab_of(index, volume.shape[0])
    section, z = volume.planes(start, stop).mean(0), index * volume.voxel_spacing[0]
    counts: dict[str, int] = {}

    def draw(path: Path) -> None:
        counts.update(plot_slice(section, z, volume.voxel_spacing, truth, kept, chosen.particles, path))

    title = f"{title}, z = {z / 10:.0f} nm"
    name = f"slice_{chosen.runs.index(run) + 1}_z{index}_{run.name}"
    picture = album.keep(name, draw, title, f"{title}; mean of {stop - start} planes.")
    cut = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"
    return replace(picture, alt=f"{title} of {run.name}; picks that it cuts: {cut}")


def count_table(chosen: Chosen) -> Table:
    """Return the number of picks by run and particle, with precision and recall where the truth is known."""
    counts = chosen.kept.groupby(["run", "particle"]).size()
    names = chosen.particles.names
    rows = []
    for run in (*(run.name for run in chosen.runs), None):
        own = [
            int(counts.get((run, name), 0)) if run else int((chosen.kept["particle"] == name).sum()) for name in names
        ]
        row = [run or "total", *(f"{count:,}" for count in own), f"{sum(own):,}"]
        if chosen.judged:
            row += ["", ""]
            picks, truth = ((frame[frame["run"] == run] if run else frame) for frame in (chosen.kept, chosen.solution))
            if len(truth):
                total = evaluate(truth, picks if len(picks) else empty_picks(), particles=chosen.particles).loc["total"]
                row[-2:] = [f"{total['precision']:.3f}", f"{total['recall']:.3f}"]
        rows.append(row)
    columns = ["run", *names, "all", *(["precision", "recall"] if chosen.judged else [])]
    return Table("Picks in submission.csv", columns, rows, total=True)


def time_table(runs: Sequence[PredictedRun]) -> Table | None:
    """Return the seconds of each stage by run, if any are known."""
    if not any(run.effort for run in runs):
        return None
    rows = []
    for run in runs:
        row = [run.name, *["not kept"] * (len(STAGES) + 3)]
        if run.effort is not None:
            seconds = run.effort.seconds
            row[1:] = [f"{seconds[stage]:.1f}" for stage in STAGES] + [f"{sum(seconds.values()):.1f}"]
            row += [f"{run.effort.tiles / max(seconds['predict'], 1e-9):.1f}", f"{run.effort.memory_gb:.1f}"]
        rows.append(row)
    columns = ["run", *(f"{stage} s" for stage in STAGES), "all s", "tiles/s", "peak GB"]
    return Table("What picking took; the next run is read while one is predicted", columns, rows)


def _time_tiles(runs: Sequence[PredictedRun]) -> list[tuple[str, str]]:
    seconds = [sum(run.effort.seconds.values()) for run in runs if run.effort is not None]
    return [(f"{np.mean(seconds):.0f} s", "per run")] if seconds else []


def _mean_count(picks: pd.DataFrame, runs: int) -> str:
    return f"{len(picks) / max(runs, 1):.0f}"
