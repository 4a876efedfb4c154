"""23 for a training: its curves, thresholds, settings, and its picks of the held-out runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from czii25d.charts import plot_epochs
from czii25d.data.predictions import read_predictions
from czii25d.errors import InputError
from czii25d.models.checkpoint import read_card
from czii25d.particles import ParticleSet
from czii25d.pipeline.app import leaves, load_config
from czii25d.pipeline.page import Album, Page, Picture, Table, page_values
from czii25d.pipeline.picks_report import Chosen, picks_section


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
        values = page_values(particles, f"Training {folder.name}", cfg.note, training_tiles(metrics, settings))
        lines = ["No picks of held-out runs lie in this folder."]
        if chosen is not None:
            lines = [f"Held out: {', '.join(run.name for run in chosen.runs)}; the picks are the last validation's."]
        return {
            **values,
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
        best = int(np.nanargmax(metrics[key].to_numpy(float)))
        tiles.append((f"{metrics[key][best]:.3f}", f"best {key}, epoch {metrics['epoch'][best] + 1}"))
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
