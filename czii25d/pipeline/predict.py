"""Pick the particles of many tomograms with one or several networks."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from czii25d.data.volumes import open_volume, read_meta
from czii25d.errors import InputError, did_you_mean
from czii25d.geometry import Shape3D, Spacing3D
from czii25d.inference import InferenceOptions, TorchPredictor, pick_heatmap, predict_heatmap
from czii25d.metrics import DEFAULT_THRESHOLD
from czii25d.models.checkpoint import ModelCard, load_checkpoint
from czii25d.particles import ParticleSet
from czii25d.picks import concat_picks, read_picks_csv, write_scored_picks_csv, write_submission_csv

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SPACING_TOLERANCE = 0.05
CHECKPOINT_SUFFIXES = (".ckpt", ".safetensors", ".pt", ".pth")


def predict(cfg: DictConfig) -> pd.DataFrame:
    """Write ``submission.csv`` and ``scored_picks.csv`` for a split; return the submitted picks.

    Each run's picks are kept in ``<predictions>/runs/`` as soon as they are known, under a key of all that determines
    them, so an interrupted prediction goes on with the next run.
    """
    paths = find_checkpoints(cfg.checkpoints)
    given = {key: value for key, value in cfg.model.items() if value is not None}
    members, cards = zip(*(load_checkpoint(path, **given) for path in paths), strict=True)
    card, channels = agree(cards, paths)
    particles = ParticleSet.from_config(card.particles)
    tile: Shape3D = (card.model["img_depth"], card.model["img_size"], card.model["img_size"])
    options = inference_options(cfg.infer, tile, card.nms_radius)
    thresholds = choose_thresholds(cfg.thresholds, cards, particles)
    if min(thresholds.values()) < options.floor:
        lowest = min(thresholds, key=thresholds.__getitem__)
        raise InputError(
            "key infer.floor",
            f"at most the lowest threshold, {thresholds[lowest]:g} of {lowest}",
            f"{options.floor:g}",
            "lower infer.floor or raise thresholds",
        )
    folders = find_volumes(Path(cfg.paths.output) / "volumes" / cfg.split, cfg.runs)
    for folder in folders:
        check_spacing(folder, cards)
    predictor = create_predictor(cfg.infer, members, channels)
    results = Path(cfg.predictions)
    logger.info(
        "%d network%s on %s, %d run%s",
        len(paths),
        "s"[: len(paths) > 1],
        predictor.device,
        len(folders),
        "s"[: len(folders) > 1],
    )
    recipe = {
        "checkpoints": [content_hash(path) for path in paths],
        "model": {str(key): str(value) for key, value in given.items()},
        "options": {key: value for key, value in asdict(options).items() if key != "batch_size"},
        "dtype": str(predictor.dtype),
    }
    frames: list[pd.DataFrame] = []
    rows: list[Mapping[str, Any]] = []
    with progress_bar() as bar:
        task = bar.add_task("predicting", total=len(folders))
        for folder in folders:
            part = results / "runs" / f"{folder.name}.{digest(recipe | {'volume': read_meta(folder)})}.csv"
            row: Mapping[str, float] = {}
            if not part.is_file():
                tiles = bar.add_task(folder.name, total=None)
                picks, row = pick_run(
                    folder,
                    predictor,
                    particles,
                    options,
                    card,
                    lambda n, of, t=tiles: bar.update(t, completed=n, total=of),
                )
                bar.remove_task(tiles)
                write_scored_picks_csv(part, picks)
            picks = read_picks_csv(part, scored=True)  # rounded, so that an interruption changes nothing
            frames.append(picks)
            rows.append({"run": folder.name, **row})
            bar.advance(task)
    scored = concat_picks(frames, scored=True)
    kept = scored[scored["score"].to_numpy() >= scored["particle"].map(thresholds).to_numpy(float)]
    write_scored_picks_csv(results / "scored_picks.csv", scored)
    write_submission_csv(results / "submission.csv", kept)
    Console(stderr=True).print(as_rich_table(rows, kept, particles, thresholds))
    logger.info(
        "%d picks in %s, all %d with scores in scored_picks.csv",
        len(kept),
        results / "submission.csv",
        len(scored),
    )
    return kept


def pick_run(
    folder: Path,
    predictor: TorchPredictor,
    particles: ParticleSet,
    options: InferenceOptions,
    card: ModelCard,
    progress: Any,
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Return the scored picks of one run, and the seconds that it took."""
    volume = open_volume(folder, card.normalization)
    start = time.perf_counter()
    heatmap = predict_heatmap(volume, predictor, len(particles), options, progress)
    if not torch.isfinite(heatmap.amax()):  # a maximum passes NaN on
        raise InputError(f"run {folder.name}", "finite heatmaps", "NaN or infinity", "set infer.precision=fp32")
    middle = time.perf_counter()
    picks = pick_heatmap(heatmap, particles, options, volume.voxel_spacing, card.offset_voxel)
    return picks.assign(run=folder.name), {"predict": middle - start, "peaks": time.perf_counter() - middle}


def check_spacing(folder: Path, cards: Sequence[ModelCard]) -> None:
    """Raise `InputError` if a network was trained on voxels of another size than this run's."""
    own = open_volume(folder).voxel_spacing
    for card in cards:
        ratios = [a / b for a, b in zip(own, card.voxel_spacing or own, strict=True)]
        if max(*ratios, *(1 / ratio for ratio in ratios)) > 1 + SPACING_TOLERANCE:
            raise InputError(
                f"run {folder.name}",
                f"the voxel spacing the network was trained on, {as_text(card.voxel_spacing or own)}",
                as_text(own),
                "rescale the tomogram, or train on this spacing",
            )


def as_text(voxel_spacing: Spacing3D) -> str:
    """Write a voxel spacing for people."""
    return f"{' x '.join(f'{side:.4g}' for side in voxel_spacing)} angstrom (z, y, x)"


def find_checkpoints(given: Any) -> list[Path]:
    """Return the files that ``checkpoints`` names: one, a list, or the checkpoints in a folder.

    Of a folder that a training wrote that is ``best.ckpt``; of a folder of such folders, each one's.
    """
    paths: list[Path] = []
    for name in given if isinstance(given, list | tuple | ListConfig) else [given]:
        path = Path(str(name))
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix in CHECKPOINT_SUFFIXES)
            best = [file for file in found if file.name == "best.ckpt"]  # of one training, the chosen one
            found = best or found or sorted(path.glob("*/best.ckpt"))
        if not found or not all(file.is_file() for file in found):
            raise InputError(
                "key checkpoints", "checkpoint files, or a folder of them", f"none at {path}", "correct the path"
            )
        paths += found
    if not paths:
        raise InputError("key checkpoints", "at least one checkpoint", "an empty list", "name one")
    return paths


def agree(cards: Sequence[ModelCard], paths: Sequence[Path]) -> tuple[ModelCard, list[list[int]]]:
    """Return the first card, and each member's channels in the first one's order.

    Raises
    ------
    InputError
        If members find other particles, decode with another offset, or expect other grey values or tiles.
    """
    first = cards[0]
    names = list(first.particles)
    for card, path in zip(cards, paths, strict=True):
        for what, own, common in (
            ("particles", sorted(card.particles), sorted(names)),
            ("offset_voxel", card.offset_voxel, first.offset_voxel),
            ("normalization", card.normalization, first.normalization),
            (
                "tile",
                [card.model[k] for k in ("img_depth", "img_size")],
                [first.model[k] for k in ("img_depth", "img_size")],
            ),
        ):
            if own != common:
                raise InputError(path, f"the {what} of {paths[0].name}, {common}", str(own), "predict them separately")
    return first, [[list(card.particles).index(name) for name in names] for card in cards]


def inference_options(
    infer: DictConfig, nominal_tile: Shape3D, nms_radius: Mapping[str, float] | None = None
) -> InferenceOptions:
    """Build the options from ``conf/infer``; ``nms_radius`` is the checkpoint's, used where the key is null."""
    tile = shape_key(infer.tile, "infer.tile") or nominal_tile
    stride = shape_key(infer.stride, "infer.stride")
    if stride is None:
        if not 0 <= infer.overlap < 1:
            raise InputError("key infer.overlap", "a share from 0 to below 1", str(infer.overlap), "lower it")
        d, h, w = (max(1, round(side * (1 - infer.overlap))) for side in tile)
        stride = (d, h, w)
    radius: Any = (
        OmegaConf.to_container(infer.nms_radius) if isinstance(infer.nms_radius, DictConfig) else infer.nms_radius
    )
    return InferenceOptions(
        tile,
        stride,
        infer.window,
        infer.batch_size,
        nms_radius if radius is None else radius,
        infer.floor,
        infer.refine,
    )


def shape_key(value: Any, key: str) -> Shape3D | None:
    """Return a ``[D, H, W]`` key as a tuple."""
    if value is None:
        return None
    sides = list(value) if isinstance(value, list | tuple | ListConfig) else [value]
    if len(sides) != 3 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise InputError(f"key {key}", "[D, H, W] in whole voxels", str(value), "give three numbers")
    d, h, w = sides
    return d, h, w


def choose_thresholds(given: Any, cards: Sequence[ModelCard], particles: ParticleSet) -> dict[str, float]:
    """Return each particle's threshold: what the key says, else the mean of the checkpoints', else the default."""
    if isinstance(given, int | float):
        return dict.fromkeys(particles.names, float(given))
    if given is not None and not isinstance(given, Mapping | DictConfig):
        raise InputError("key thresholds", "a number, or numbers by particle", repr(given), "correct it")
    thresholds, unknown = {}, []
    for name in particles.names:
        known = [card.thresholds[name] for card in cards if card.thresholds and name in card.thresholds]
        thresholds[name] = sum(known) / len(known) if known else DEFAULT_THRESHOLD
        unknown += [] if known or name in (given or ()) else [name]
    if unknown:
        logger.info(
            "no checkpoint holds a threshold for %s: %g; see thresholds=...", ", ".join(unknown), DEFAULT_THRESHOLD
        )
    for name, value in (given or {}).items():
        particles.channel(str(name))
        if not isinstance(value, int | float):
            raise InputError(f"key thresholds.{name}", "a number", repr(value), "correct it")
        thresholds[str(name)] = float(value)
    return thresholds


def find_volumes(split: Path, names: str | Sequence[str] | None) -> list[Path]:
    """Return the folders of the runs that 01 prepared, all or the named ones."""
    folders = {path.name: path for path in sorted(split.glob("[!.]*")) if path.is_dir()}
    if not folders:
        raise InputError(split, "volumes", "none", "run 01_create_dataset.py first, or choose another split")
    wanted = list(folders) if names is None else [names] if isinstance(names, str) else [str(name) for name in names]
    for name in wanted:
        if name not in folders:
            hint = did_you_mean(name, folders)
            raise InputError("key runs", f"runs of {split} ({', '.join(folders)})", f"'{name}'{hint}", "correct it")
    return [folders[name] for name in wanted]


def create_predictor(infer: DictConfig, members: Sequence[nn.Module], channels: list[list[int]]) -> TorchPredictor:
    """Put the networks on the device that ``infer.device`` and ``infer.precision`` ask for."""
    device, precision = str(infer.device), str(infer.precision)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not device.startswith(("cpu", "cuda")) or (device.startswith("cuda") and not torch.cuda.is_available()):
        raise InputError("key infer.device", "auto, cpu, or a GPU that torch sees", device, "set infer.device=cpu")
    if precision == "auto":
        on_gpu = device.startswith("cuda")
        precision = ("bf16" if torch.cuda.is_bf16_supported() else "fp16") if on_gpu else "fp32"
    if precision not in PRECISIONS:
        raise InputError("key infer.precision", f"auto, {', '.join(PRECISIONS)}", precision, "choose one")
    return TorchPredictor(members, device, PRECISIONS[precision], channels)


def content_hash(path: Path) -> str:
    """Return the SHA-256 of a file of any size."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            sha.update(block)
    return sha.hexdigest()


def digest(recipe: Mapping[str, Any]) -> str:
    """Return a short name for a recipe."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()[:12]


def progress_bar() -> Progress:
    """Return a bar with the time left, on standard error; it shows on a terminal only."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def as_rich_table(
    rows: Sequence[Mapping[str, Any]],
    picks: pd.DataFrame,
    particles: ParticleSet,
    thresholds: Mapping[str, float],
) -> Table:
    """Lay out seconds and picks per run within 80 columns."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("run")
    for name in ("predict s", "peaks s", *(name[:9] for name in particles.names)):
        table.add_column(name, justify="right")
    table.add_row("threshold", "", "", *(f"{thresholds[name]:.2f}" for name in particles.names), style="dim")
    for row in rows:
        own = picks[picks["run"] == row["run"]]["particle"].value_counts()
        seconds = (f"{row[key]:.1f}" if key in row else "done" for key in ("predict", "peaks"))
        table.add_row(str(row["run"]), *seconds, *(str(own.get(name, 0)) for name in particles.names))
    return table
