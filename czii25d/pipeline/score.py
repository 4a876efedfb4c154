"""Score a submission and print the table."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from czii25d.errors import InputError
from czii25d.files import write_aside
from czii25d.metrics import evaluate
from czii25d.particles import ParticleSet
from czii25d.picks import read_picks_csv


def score_submission(cfg: DictConfig) -> float:
    """Print F-beta, precision and recall per particle; write ``score.json`` beside the submission.

    Returns
    -------
    score
        The competition's number.
    """
    particles = ParticleSet.from_config(cfg.particles)
    submission, solution = read_picks_csv(cfg.submission), read_picks_csv(cfg.solution)
    if cfg.runs is not None:
        runs = [cfg.runs] if isinstance(cfg.runs, str) else list(cfg.runs)
        unknown = set(runs) - set(solution["run"])
        if unknown:
            known = ", ".join(sorted(solution["run"].unique()))
            raise InputError("key runs", f"runs of the solution ({known})", ", ".join(sorted(unknown)), "correct them")
        solution = solution[solution["run"].isin(runs)]
    if not len(solution):
        raise InputError(cfg.solution, "particles", "none", "write it with 03_create_solution.py")
    if not set(submission["run"]) & set(solution["run"]) and len(submission):
        raise InputError(
            cfg.submission,
            f"picks of the solution's runs ({', '.join(sorted(solution['run'].unique()))})",
            ", ".join(sorted(submission["run"].unique())),
            "score it against the solution of its own split",
        )
    table = evaluate(solution, submission, cfg.distance_multiplier, cfg.beta, particles)
    title = f"F{cfg.beta:g} of {cfg.submission}"
    Console().print(as_rich_table(table, title, f"F{cfg.beta:g}"))
    with write_aside(Path(cfg.submission).with_name("score.json")) as partial:
        partial.write_text(json.dumps(table.to_dict(orient="index"), indent=2))
    return float(table["fbeta"]["total"])


def as_rich_table(evaluation: pd.DataFrame, title: str, score_name: str) -> Table:
    """Lay out what `evaluate` returns within 80 columns."""
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    table.add_column("particle", no_wrap=True)
    for name in (score_name, "precision", "recall", "hits", "references", "picks", "weight"):
        table.add_column(name, justify="right")
    for label, row in evaluation.iterrows():
        table.add_row(
            str(label),
            *(f"{row[key]:.3f}" for key in ("fbeta", "precision", "recall")),
            *(f"{row[key]:.0f}" for key in ("hits", "references", "picks")),
            f"{row['weight']:g}",
            style="bold" if label == "total" else None,
        )
    return table
