"""12: thresholds fitted and judged out of fold, each run predicted by the networks that have not seen it."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from czii25d.data.predictions import effort_path
from czii25d.errors import InputError, did_you_mean
from czii25d.files import write_aside
from czii25d.metrics import DEFAULT_THRESHOLD, PLATEAU
from czii25d.models.checkpoint import ModelCard, read_card, store_thresholds
from czii25d.particles import ParticleSet
from czii25d.picks import concat_picks, read_picks_csv, write_scored_picks_csv
from czii25d.pipeline.app import keep_freed_memory
from czii25d.pipeline.members import ENGINE_SUFFIX, GRAPH_SUFFIX, NetworkFile, agree, find_network_files
from czii25d.pipeline.predict import Plan, Source, find_sources, pick_missing, refuse_failed
from czii25d.pipeline.regions import keep_selected, regions_key
from czii25d.plotting import plot_thresholds
from czii25d.thresholds import CrossFit, bootstrap, cross_fit

logger = logging.getLogger(__name__)


def fit_out_of_fold(cfg: DictConfig) -> dict[str, Any]:
    """Fit thresholds to the picks of networks that have not seen the run, store them, and return the report.

    Leaves ``thresholds.json`` (the report), ``thresholds.png`` and ``picks.csv`` in ``<predictions>/``. Each
    run's picks are kept there as 21 keeps them, so an interrupted call goes on, and the same one again, though the
    thresholds have been stored, predicts nothing.

    Raises
    ------
    InputError
        If a checkpoint has held out no run, a run was held out by none of them or has neither volume nor truth, fewer
        than two runs are left, or a run cannot be predicted.
    """
    keep_freed_memory()
    if cfg.infer.shard is not None:
        raise InputError("key infer.shard", "null: 12 needs the picks of all runs", str(cfg.infer.shard), "leave it")
    cards = read_folds(list(dict.fromkeys(find_network_files(cfg.checkpoints))))
    first, _ = agree([NetworkFile(path, "", card) for path, card in cards.items()])
    particles = ParticleSet.from_config(first.particles)
    groups = group_runs(cfg, cards)
    runs = sorted(run for group in groups.values() for run in group)
    solution = read_solution(cfg, runs, particles)
    sources = {source.name: source for source in find_sources(_with_runs(cfg, None))}
    if missing := [run for run in runs if run not in sources]:
        raise InputError(
            f"split {cfg.split}",
            "a tomogram of every run to be judged",
            f"none of {', '.join(missing)}",
            "prepare it with 01_create_dataset.py, or name others with runs=",
        )
    bootstrap(np.ones((1, 1, 3), int), [1.0], **cfg.bootstrap)  # refuses its keys before the work
    solution = in_regions(cfg, solution, [sources[run] for run in runs])
    plans = [
        Fold(Plan(fold_config(cfg, files, group)), [sources[run] for run in group]) for files, group in groups.items()
    ]
    picks = predict_folds(plans, len(runs))
    fitted = cross_fit(solution, picks, particles, cfg.distance_multiplier, cfg.beta)
    intervals = bootstrap(fitted.counts, fitted.weights, cfg.beta, **cfg.bootstrap)
    by_run = {run: [str(path) for path in files] for files, group in groups.items() for run in group}
    report = make_report(cfg, fitted, intervals, by_run)
    folder = Path(cfg.predictions)
    write_scored_picks_csv(folder / "picks.csv", picks)
    plot_thresholds(fitted, folder / "thresholds.png")
    with write_aside(folder / "thresholds.json") as partial:
        partial.write_text(json.dumps(report, indent=2, allow_nan=False))
    Console().print(as_rich_table(report))
    say_what_is_weak(cfg, fitted, solution)
    if cfg.store:
        store(plans, list(cards), fitted)
    return report


def read_folds(paths: Sequence[Path]) -> dict[Path, ModelCard]:
    """Return the cards of checkpoints that have held out runs; any other file raises ``InputError``."""
    cards = {}
    for path in paths:
        if path.suffix in (GRAPH_SUFFIX, ENGINE_SUFFIX):
            raise InputError(
                path,
                "a checkpoint, which can hold thresholds",
                f"a {path.suffix} file",
                "give the checkpoint, and export it again afterwards",
            )
        card = read_card(path)
        if card is None or not card.fold:
            raise InputError(
                path,
                "a checkpoint that names the runs it held out",
                "one without a card" if card is None else "one that held out none",
                "leave it out, or train folds with 11_train.py data.fold_id=...",
            )
        cards[path] = card
    return cards


def group_runs(cfg: DictConfig, cards: Mapping[Path, ModelCard]) -> dict[tuple[Path, ...], list[str]]:
    """Return, by the checkpoints that held them out, the runs to be judged."""
    held_out: dict[str, list[Path]] = {}
    for path, card in cards.items():
        for run in dict.fromkeys(card.fold):
            held_out.setdefault(run, []).append(path)
    given = cfg.runs
    wanted = sorted(held_out) if given is None else [given] if isinstance(given, str) else [str(run) for run in given]
    for run in wanted:
        if run not in held_out:
            raise InputError(
                "key runs",
                f"runs that a checkpoint held out ({', '.join(sorted(held_out))})",
                f"'{run}'{did_you_mean(run, held_out)}",
                "leave it out, or add the fold that held it out to checkpoints",
            )
    if len(set(wanted)) < 2:
        raise InputError(
            "keys checkpoints and runs",
            "at least two runs that were held out, to fit on one and judge the other",
            ", ".join(wanted) or "none",
            "add the checkpoints of other folds",
        )
    groups: dict[tuple[Path, ...], list[str]] = {}
    for run in dict.fromkeys(wanted):
        groups.setdefault(tuple(held_out[run]), []).append(run)
    return groups


def read_solution(cfg: DictConfig, runs: Sequence[str], particles: ParticleSet) -> pd.DataFrame:
    """Return the true picks of these runs; particles that the networks do not look for are named and left out."""
    solution = read_picks_csv(cfg.solution)
    if others := sorted(set(solution["run"]) - set(runs)):
        logger.info("left out, as no checkpoint held them out or runs= names others: %s", ", ".join(others))
    solution = solution[solution["run"].isin(runs)]
    known = solution["particle"].isin(particles.names)
    if not known.all():
        unknown = ", ".join(sorted(solution.loc[~known, "particle"].unique()))
        logger.info("left out, as the checkpoints do not look for them: %s", unknown)
    solution = solution[known]
    if missing := sorted(set(runs) - set(solution["run"])):
        raise InputError(
            cfg.solution,
            "true picks of every run to be judged",
            f"none of {', '.join(missing)}",
            "write it with 03_create_solution.py, or name others with runs=",
        )
    return solution


def in_regions(cfg: DictConfig, solution: pd.DataFrame, sources: Sequence[Source]) -> pd.DataFrame:
    """Return the true picks that ``regions`` keeps: those that can be found."""
    regions = regions_key(cfg.regions)
    frames = []
    for source in sources:
        own = solution[solution["run"] == source.name]
        if regions.entry(source.name) is not None:
            selection = regions.select(source.name, *source.grid)
            own = keep_selected(own, selection, f"{cfg.solution}: {source.name}")
        frames.append(own)
    return concat_picks(frames)


@dataclass(frozen=True)
class Fold:
    """Runs, and the networks that have not seen them."""

    plan: Plan
    sources: list[Source]


def fold_config(cfg: DictConfig, files: Sequence[Path], runs: Sequence[str]) -> DictConfig:
    """Return the configuration with which 21 would predict these runs; its recipe is 21's too."""
    values: Any = OmegaConf.to_container(_with_runs(cfg, list(runs)), resolve=True)
    checkpoints = [str(path) for path in files]
    # Cards rebuild their networks; the thresholds are yet to be fitted, 1 is above any infer.floor.
    return OmegaConf.create({**values, "checkpoints": checkpoints, "model": {}, "thresholds": 1.0})


def _with_runs(cfg: DictConfig, runs: list[str] | None) -> DictConfig:
    return OmegaConf.merge(cfg, {"runs": runs})  # type: ignore[return-value]


def predict_folds(folds: Sequence[Fold], run_num: int) -> pd.DataFrame:
    """Return the scored picks of all runs; those that are not there yet are found."""
    found: dict[str, pd.DataFrame] = {}
    failed: dict[str, str] = {}
    for fold in folds:
        names = ", ".join(source.name for source in fold.sources)
        logger.info("%s: by %s", names, ", ".join(str(file.path) for file in fold.plan.files))
        picked = pick_missing(fold.plan, fold.sources, fold.sources)
        fold.plan.__dict__.pop("groups", None)  # the next fold needs the device's memory
        found |= {source.name: fold.plan.picks(source) for source in fold.sources if source.name in picked.done}
        failed |= picked.failed
    refuse_failed(failed, run_num)
    return concat_picks([found[run] for run in sorted(found)], scored=True)


def make_report(
    cfg: DictConfig, fitted: CrossFit, intervals: NDArray[np.float64], checkpoints: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Return what ``thresholds.json`` holds; ``null`` stands for what cannot be known."""
    counts = fitted.counts.sum(0).tolist()
    particles = {}
    for channel, particle in enumerate(fitted.particles):
        left_out = dict(zip(fitted.runs, map(_or_none, fitted.left_out[:, channel]), strict=True))
        particles[particle.name] = {
            "fbeta": fitted.fbeta[channel],
            "interval": [_or_none(end) for end in intervals[channel]],
            "fbeta_optimistic": fitted.fbeta_optimistic[channel],
            "threshold": _or_none(fitted.thresholds[channel]),
            "threshold_spread": [_or_none(end) for end in fitted.spread[channel]],
            "threshold_without_run": left_out,
            **dict(zip(("references", "picks", "hits"), counts[channel], strict=True)),
            "weight": particle.weight,
        }
    total = {
        "fbeta": fitted.fbeta[-1],
        "interval": [_or_none(end) for end in intervals[-1]],
        "fbeta_optimistic": fitted.fbeta_optimistic[-1],
    }
    return {
        "particles": particles,
        "total": total,
        "runs": dict(sorted(checkpoints.items())),
        "beta": cfg.beta,
        "distance_multiplier": cfg.distance_multiplier,
        "bootstrap": OmegaConf.to_container(cfg.bootstrap),
        "default_threshold": DEFAULT_THRESHOLD,
    }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def as_rich_table(report: Mapping[str, Any]) -> Table:
    """Lay out what `make_report` returns within 80 columns."""
    settings, count = report["bootstrap"], len(report["runs"])
    title = f"F{report['beta']:g} of {count} runs, each at thresholds fitted to the other {count - 1}"
    caption = (
        f"{100 * settings['level']:g} %: of {settings['samples']} resamples of {count} runs. optimistic: at the "
        "thresholds fitted to all runs, which are stored. leaving one out: the lowest and the highest threshold."
    )
    table = Table(
        title=title, title_justify="left", caption=caption, caption_justify="left", box=None, header_style="bold"
    )
    table.pad_edge = False
    table.add_column("particle", overflow="fold")
    score_name = f"F{report['beta']:g}"
    for name in (score_name, f"{100 * settings['level']:g} %", "optimistic", "threshold", "leaving one out"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in report["particles"].items():
        spread = _span(row["threshold_spread"])
        threshold = "-" if row["threshold"] is None else f"{row['threshold']:.3f}"
        table.add_row(
            name, f"{row['fbeta']:.3f}", _span(row["interval"]), f"{row['fbeta_optimistic']:.3f}", threshold, spread
        )
    total = report["total"]
    cells = f"{total['fbeta']:.3f}", _span(total["interval"]), f"{total['fbeta_optimistic']:.3f}"
    table.add_row("total", *cells, style="bold")
    return table


def _span(ends: Sequence[float | None]) -> str:
    return "-" if None in ends else f"{ends[0]:.3f} - {ends[1]:.3f}"


def say_what_is_weak(cfg: DictConfig, fitted: CrossFit, solution: pd.DataFrame) -> None:
    """Log for which particles the numbers rest on little."""
    for channel, particle in enumerate(fitted.particles):
        run_num = solution.loc[solution["particle"] == particle.name, "run"].nunique()
        curve = fitted.curves[channel]
        if np.isnan(fitted.thresholds[channel]):
            logger.info("%s: no hit to fit a threshold to; none is stored", particle.name)
        elif np.isnan(fitted.left_out[:, channel]).any():
            logger.info(
                "%s: in %d run(s) only; without it there is no hit to fit to, so it is judged at %g",
                *(particle.name, run_num, DEFAULT_THRESHOLD),
            )
        elif curve[-1, 1] >= curve[:, 1].max() - PLATEAU:
            logger.info(
                "%s: the lowest score that is kept does as well as any; a lower infer.floor (%g) may do better",
                *(particle.name, cfg.infer.floor),
            )


def store(folds: Sequence[Fold], paths: Sequence[Path], fitted: CrossFit) -> None:
    """Write the thresholds fitted to all runs into the checkpoints, and keep the runs' picks findable."""
    thresholds = {
        particle.name: float(value)
        for particle, value in zip(fitted.particles, fitted.thresholds, strict=True)
        if not math.isnan(value)
    }
    if not thresholds:
        logger.info("no threshold could be fitted; the checkpoints stay as they are")
        return
    before = [[fold.plan.part(source) for source in fold.sources] for fold in folds]
    for path in paths:
        store_thresholds(path, thresholds)
    # A recipe names the networks by their files' hashes, which have changed; what they find has not.
    for fold, parts in zip(folds, before, strict=True):
        plan = Plan(fold.plan.cfg)
        for source, old in zip(fold.sources, parts, strict=True):
            new = plan.part(source)
            for before_storing, after in ((old, new), (effort_path(old), effort_path(new))):
                if after != before_storing:
                    with suppress(FileNotFoundError):
                        os.replace(before_storing, after)
    logger.info("stored the thresholds in %s", ", ".join(map(str, paths)))
