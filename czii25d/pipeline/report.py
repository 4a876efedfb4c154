"""23: show what was picked, or how a training went, on one page."""

from __future__ import annotations

import base64
import logging
import re
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from czii25d.averages import sum_boxes
from czii25d.charts import plot_epochs, plot_precision_recall, plot_scores
from czii25d.data.predictions import STAGES, PredictedRun, Predictions, Slices, read_predictions
from czii25d.errors import InputError
from czii25d.files import write_aside
from czii25d.geometry import Shape3D, xyz_angstrom_to_zyx_voxel
from czii25d.metrics import evaluate, match, near_reference, pool, precision_recall_curve
from czii25d.particles import Particle, ParticleSet
from czii25d.picks import above_thresholds, empty_picks, read_picks_csv
from czii25d.pipeline.app import leaves, load_config
from czii25d.pipeline.cli import installed_version
from czii25d.plotting import DARK, LIGHT, fullest_slice, outline, plot_average, plot_slice, slab_of

logger = logging.getLogger(__name__)

TEMPLATE = "report.html.jinja"
AVERAGED = 200  # of a particle in a run, the best-scored so many go into its average
HALF_SIDE = 2  # of an averaged box, in radii


def write_report(cfg: DictConfig) -> Path:
    """Write ``report/report.html``, with its pictures beside it, into the folder of predictions, or of a training.

    Returns
    -------
    path
        Of the page. It needs no other file and no network.

    Raises
    ------
    InputError
        If there are no picks or no training, or a tomogram is not where it was.
    """
    begin = time.perf_counter()
    page = training_page(cfg) if cfg.training is not None else picks_page(cfg)
    target = page.folder / "report"
    with write_aside(target) as partial:
        partial.mkdir()
        album = Album(partial)
        values = page.build(album)
        (partial / "report.html").write_text(render(values), encoding="utf-8")
    logger.info("%s: %.0f s", target / "report.html", time.perf_counter() - begin)
    return target / "report.html"


def render(values: Mapping[str, Any]) -> str:
    """Fill in the page; whatever a file or a run is called, it stays text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return environment.get_template(TEMPLATE).render(values, made=made, version=installed_version())


@dataclass(frozen=True)
class Page:
    """Where a page goes, and the function that draws its pictures and returns what the template takes."""

    folder: Path
    build: Callable[[Album], dict[str, Any]]


@dataclass(frozen=True)
class Picture:
    """A picture as the page holds it: ``data:`` addresses for light and, if it differs, dark paper."""

    light: str
    dark: str | None
    alt: str
    caption: str
    width: int
    height: int


@dataclass(frozen=True)
class Album:
    """The folder of the pictures."""

    folder: Path

    def keep(self, name: str, draw: Callable[[Path], Any], alt: str, caption: str = "") -> Picture:
        """Draw a picture that suits any paper."""
        path = self.folder / f"{_file_name(name)}.png"
        draw(path)
        content = path.read_bytes()
        width, height = struct.unpack(">II", content[16:24])  # a PNG's header
        return Picture(_data(content), None, alt, caption, width, height)

    def keep_both(self, name: str, draw: Callable[[Path, Mapping[str, Any]], Any], alt: str, caption: str) -> Picture:
        """Draw a picture for light paper and for dark."""
        light = self.keep(name, lambda path: draw(path, LIGHT), alt, caption)
        dark = self.keep(f"{name}_dark", lambda path: draw(path, DARK), alt, caption)
        return Picture(light.light, dark.light, alt, caption, light.width, light.height)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)[:100].lstrip(".")


def _data(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names the rows."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    total: bool = False


# ---- picks -----------------------------------------------------------------------------------------------------------


def picks_page(cfg: DictConfig) -> Page:
    """Return the page of a folder of predictions."""
    predictions = read_predictions(cfg.predictions)
    chosen = Chosen.of(predictions, cfg.runs, Path(cfg.solution))

    def build(album: Album) -> dict[str, Any]:
        tiles = [*chosen.tiles(), *_time_tiles(chosen.runs)]
        return {
            **_frame(chosen.particles, f"Picks of {_plural(len(chosen.runs), 'run')}", cfg.note, tiles),
            "lines": [f"{predictions.folder}, picked by {', '.join(predictions.networks)}"],
            "picks": picks_section(album, chosen, cfg.pictured_runs),
        }

    return Page(predictions.folder, build)


@dataclass(frozen=True)
class Chosen:
    """The runs of a report: their picks above the thresholds, all their scored picks, and the truth.

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
        scored = predictions.picks[predictions.picks["run"].isin(names)].reset_index(drop=True)
        solution, remarks = read_truth(solution_path, names, predictions.particles)
        kept = above_thresholds(scored, predictions.thresholds).reset_index(drop=True)
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
    return Table(f"Picks that reach the threshold, of all that were scored.{weighted}", columns, rows, total=True)


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
    matches = match(chosen.solution, chosen.scored, chosen.particles) if chosen.judged else {}
    judged = chosen.scored[chosen.scored["run"].isin(chosen.judged)] if chosen.judged else chosen.scored
    near = near_reference(chosen.solution, judged, chosen.particles) if chosen.judged else None
    cards = []
    for channel, particle in enumerate(chosen.particles):
        name, threshold = particle.name, chosen.predictions.thresholds[particle.name]
        count = int((chosen.kept["particle"] == name).sum())
        pictures = []
        if name in averages:
            average = averages[name]
            pictures.append(
                album.keep(
                    f"average_{channel + 1}_{name}",
                    lambda path, average=average: plot_average(average.box, average.voxel_spacing, path),
                    f"Central xy, xz and yz slices of the average of {average.picks} picks of {name}",
                    f"Average of {_plural(average.picks, 'pick')}"
                    f"{f' (the best-scored {AVERAGED} of each run)' if average.picks < count else ''}, not aligned.",
                )
            )
        own = (judged["particle"] == name).to_numpy()
        if own.any():
            scores = judged["score"].to_numpy(float)[own]
            kinds = None if near is None else near[own]
            shown = f"{(scores >= threshold).sum():,} of {len(scores):,} reach the threshold {threshold:.2f}"
            pictures.append(
                album.keep_both(
                    f"scores_{channel + 1}_{name}",
                    lambda path, theme, s=scores, k=kinds, t=threshold, p=particle: plot_scores(
                        s, k, t, p, path, theme
                    ),
                    f"Histogram of the scores of {name}: {shown}",
                    f"Scores: {shown}.",
                )
            )
        pooled = pool(matches[name].values()) if matches else None
        if pooled is not None and pooled.references and len(pooled.scores):
            curve = precision_recall_curve(pooled)
            pictures.append(
                album.keep_both(
                    f"precision_recall_{channel + 1}_{name}",
                    lambda path, theme, c=curve, t=threshold, p=particle, n=channel: plot_precision_recall(
                        c, t, p, n, path, theme
                    ),
                    f"Precision against recall of {name}: {_at_threshold(curve, threshold)}",
                    f"Precision and recall: {_at_threshold(curve, threshold)}.",
                )
            )
        facts = f"{_plural(count, 'pick')} · radius {particle.radius:g} Å" if own.any() else "no pick, at any score"
        cards.append({"name": name, "facts": facts, "pictures": pictures})
    return cards


def _at_threshold(curve: NDArray[np.float64], threshold: float) -> str:
    kept = curve[curve[:, 0] >= threshold]
    if not len(kept):
        return f"no pick reaches the threshold {threshold:.2f}"
    return f"{kept[-1, 1]:.2f} and {kept[-1, 2]:.2f} at the threshold {threshold:.2f}"


def run_card(album: Album, chosen: Chosen, run: PredictedRun, volume: Slices) -> dict[str, Any]:
    """Return the central slice of a run and the one that shows most of its picks."""
    kept = chosen.kept[chosen.kept["run"] == run.name]
    truth = chosen.solution[chosen.solution["run"] == run.name] if run.name in chosen.judged else None
    depth, height, width = volume.shape
    dz, _, dx = volume.voxel_spacing
    fullest = fullest_slice(kept, chosen.particles, volume.voxel_spacing, depth)
    slices = {depth // 2: ["central slice"]}
    slices.setdefault(fullest, []).append("slice with most picks")
    pictures = []
    for index, what in slices.items():
        start, stop = slab_of(index, depth)
        section = volume.planes(start, stop).mean(0)
        counts: dict[str, int] = {}

        def draw(path: Path, index: int = index, section: Any = section, counts: dict[str, int] = counts) -> None:
            counts |= plot_slice(section, index * dz, volume.voxel_spacing, truth, kept, chosen.particles, path)

        title = f"{' and '.join(what).capitalize()}, z = {index * dz / 10:.0f} nm"
        picture = album.keep(f"slice_{run.name}_z{index}", draw, "", f"{title}; mean of {stop - start} planes.")
        cut = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"
        pictures.append(Picture(**{**vars(picture), "alt": f"{title} of {run.name}; picks that it cuts: {cut}"}))
    facts = f"{width} × {height} × {depth} voxels of {dx:.2f} Å · {_plural(len(kept), 'pick')}"
    return {"name": run.name, "facts": facts, "pictures": pictures}


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
    return Table("Picks that reach the threshold", columns, rows, total=True)


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


def _frame(
    particles: ParticleSet | None, title: str, note: str | None, tiles: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Return what every page has."""
    symbols = {
        particle.name: {"color": particle.color, "path": _svg_path(outline(channel))}
        for channel, particle in enumerate(particles or ())
    }
    return {"title": title, "note": note, "tiles": tiles, "symbols": symbols, "training": None, "picks": None}


def _svg_path(corners: NDArray[np.float64]) -> str:
    return "M" + "L".join(f"{x:.2f},{y:.2f}" for x, y in corners) + "Z"


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _mean_count(picks: pd.DataFrame, runs: int) -> str:
    return f"{len(picks) / max(runs, 1):.0f}"


# ---- a training ------------------------------------------------------------------------------------------------------


def training_page(cfg: DictConfig) -> Page:
    """Return the page of a training: its curves, settings, thresholds, and its picks of the held-out runs.

    Raises
    ------
    InputError
        If the folder holds no training.
    """
    folder = Path(cfg.training)
    for name in ("metrics.csv", "config.yaml"):
        if not (folder / name).is_file():
            raise InputError(
                folder / name, "what 11_train.py leaves after an epoch", "none", "name a training's folder"
            )
    settings: Any = OmegaConf.load(folder / "config.yaml")
    metrics = pd.read_csv(folder / "metrics.csv")
    particles = ParticleSet.from_config(settings.particles).first(settings.model.class_num)
    judged = folder / "held_out"
    predictions = read_predictions(judged) if judged.is_dir() else None
    chosen = None if predictions is None else Chosen.of(predictions, cfg.runs, judged / "solution.csv")

    def build(album: Album) -> dict[str, Any]:
        frame = _frame(particles, f"Training {folder.name}", cfg.note, training_tiles(metrics, settings))
        lines = ["No picks of held-out runs lie in this folder."]
        if chosen is not None:
            lines = [f"Held out: {', '.join(run.name for run in chosen.runs)}; the picks are the last validation's."]
        return {
            **frame,
            "lines": lines,
            "training": training_section(album, folder, metrics, settings, particles),
            "picks": None if chosen is None else picks_section(album, chosen, cfg.pictured_runs),
        }

    return Page(folder, build)


def training_tiles(metrics: pd.DataFrame, settings: DictConfig) -> list[tuple[str, str]]:
    """Return the numbers at the top of the page."""
    tiles = [(f"{len(metrics)}", f"epochs, of {settings.trainer.max_epochs}")]
    key = f"val/{settings.get('best_by', 'fbeta')}"
    if key in metrics and metrics[key].notna().any():
        best = metrics.loc[metrics[key].idxmax()]
        tiles.append((f"{best[key]:.3f}", f"best {key}, epoch {int(best['epoch']) + 1}"))
    tiles.append((f"{metrics['train/loss'].iloc[-1]:.4f}", "last training loss"))
    tiles.append((f"{metrics['seconds'].sum() / 60:.0f} min", "in all"))
    return tiles


def training_section(
    album: Album, folder: Path, metrics: pd.DataFrame, settings: DictConfig, particles: ParticleSet
) -> dict[str, Any]:
    """Draw a training's curves and lay out its settings and thresholds."""
    epochs = metrics["epoch"].to_numpy() + 1

    def values(columns: Mapping[str, str]) -> dict[str, NDArray[np.float64]]:
        return {
            label: metrics[column].to_numpy(float)
            for column, label in columns.items()
            if column in metrics and metrics[column].notna().any()
        }

    def chart(name: str, lines: Mapping[str, NDArray[np.float64]], caption: str, **options: Any) -> Picture:
        last = "; ".join(f"{label} ends at {line[~np.isnan(line)][-1]:.3g}" for label, line in lines.items())
        ylabel = "loss" if name == "loss" else "F4"
        return album.keep_both(
            name,
            lambda path, theme: plot_epochs(epochs, lines, ylabel, path, theme, **options),
            f"{caption} {last}",
            caption,
        )

    pictures = []
    if loss := values({"train/loss": "training loss"}):
        pictures.append(chart("loss", loss, "Training loss over epochs.", log=True))
    totals = {"val/fbeta": "fbeta", "val/fbeta_fixed": "fbeta_fixed", "val/fbeta_ranked": "fbeta_ranked"}
    if lines := values(totals):
        pictures.append(chart("validation", lines, "Weighted F4 of the held-out runs."))
    if lines := values({f"val/fbeta/{name}": name for name in particles.names}):
        pictures.append(chart("validation_particles", lines, "F4 of each particle, fbeta.", particles=particles))
    resolved = dict(leaves(OmegaConf.to_container(settings, resolve=False)))
    defaults = dict(leaves(OmegaConf.to_container(load_config("train"), resolve=True)))
    changed = {key: value for key, value in resolved.items() if defaults.get(key) != value}
    return {
        "pictures": pictures,
        "thresholds": threshold_table(folder, particles),
        "settings": _setting_table("Settings that differ from the defaults", changed),
        "all_settings": _setting_table("All settings", resolved),
    }


def threshold_table(folder: Path, particles: ParticleSet) -> Table:
    """Return the thresholds that the training's checkpoints hold."""
    from czii25d.models.checkpoint import read_card  # torch, which a report of picks does without

    cards = {path.name: read_card(path) for path in (folder / "best.ckpt", folder / "last.ckpt") if path.is_file()}
    held = {name: card.thresholds or {} for name, card in cards.items() if card is not None}
    rows = [
        [name, *(f"{held[file][name]:.2f}" if name in held[file] else "none" for file in held)]
        for name in particles.names
    ]
    return Table("Thresholds in the checkpoints", ["particle", *held], rows)


def _setting_table(caption: str, values: Mapping[str, Any]) -> Table:
    shown = {key: value for key, value in values.items() if not key.startswith("particles.")}
    return Table(caption, ["key", "value"], [[key, "null" if v is None else str(v)] for key, v in shown.items()])
