"""21: pick the particles of many tomograms with one or several networks."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import multiprocessing
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from czii25d.data.heatmaps import HeatmapWriter
from czii25d.data.predictions import STAGES, Effort, PredictedRun, read_effort, write_effort, write_record
from czii25d.data.preparation import VOLUME_CONTRAST, Preparation
from czii25d.data.runs import Run
from czii25d.data.tomogram import open_tomogram
from czii25d.data.volumes import Volume, open_volume, read_meta
from czii25d.errors import InputError, did_you_mean
from czii25d.files import write_aside
from czii25d.geometry import Shape3D, Spacing3D
from czii25d.inference import pick_slabs, tiles_of_region
from czii25d.inference.ahead import ahead
from czii25d.particles import ParticleSet
from czii25d.picks import above_thresholds, concat_picks, read_picks_csv, write_scored_picks_csv, write_submission_csv
from czii25d.pipeline.app import check_value_types, keep_freed_memory, leaves, load_config, set_up_logging
from czii25d.pipeline.dataset import convert_volume, create_volume, find_input
from czii25d.pipeline.members import (
    Group,
    NetworkFile,
    agree,
    choose_device,
    choose_runtime,
    choose_thresholds,
    create_groups,
    find_network_files,
    inference_options,
    member_weights,
    open_network_file,
    predict_groups,
    prepare_graph,
    spacing_to_predict,
    tile_of,
)
from czii25d.pipeline.regions import keep_selected, regions_key
from czii25d.regions import is_crowded
from czii25d.runtimes.torch import TorchNetwork

logger = logging.getLogger(__name__)

SOURCES = ("auto", "volumes", "tomograms")


def predict(cfg: DictConfig) -> pd.DataFrame:
    """Write ``submission.csv`` and ``scored_picks.csv`` for a split; return the submitted picks.

    Each run's picks are kept in ``<predictions>/runs/`` as soon as they are known, under a key of all that determines
    them, so an interrupted prediction goes on with the next run, and shards find each other's. A run that fails does
    not stop the others.

    Raises
    ------
    InputError
        If a key or a network is not right; or, once all the others are done, if a run failed.
    """
    keep_freed_memory()
    plan = Plan(cfg)
    sources = find_sources(cfg)
    mine = shard(sources, cfg.infer.shard)
    picked = pick_missing(plan, sources, mine)
    done = picked.done
    others = [source.name for source in sources if source.name not in done | picked.failed]
    kept = pd.DataFrame()
    whole = bool(done) and not others  # of several shards, the last one collects what all have found
    found = {source.name: plan.picks(source) for source in (sources if whole else mine) if source.name in done}
    if whole:
        kept = collect(plan, [source for source in sources if source.name in found], list(found.values()))
    counts = {name: len(plan.submitted(picks)) for name, picks in found.items()}
    Console(stderr=True).print(as_rich_table(mine, picked.outcomes, counts))
    if others:
        logger.info(
            "%d of %d runs are left to other shards; the last one writes submission.csv", len(others), len(sources)
        )
    refuse_failed(picked.failed, len(mine))
    return kept


@dataclass(frozen=True)
class Source:
    """A run to pick: a volume that 01 prepared, or a tomogram that is prepared on the way."""

    name: str
    folder: Path | None = None
    run: Run | None = None

    def identity(self, preparation: Preparation) -> Any:
        """Return what tells its content from another's; the same for a tomogram and the volume made of it."""
        if self.folder is not None:
            return read_meta(self.folder)["source"]
        assert self.run is not None
        return preparation.describe(open_tomogram(self.run.tomogram, self.run.voxel_spacing))

    @property
    def grid(self) -> tuple[Shape3D, Spacing3D]:
        """Its shape ``(D, H, W)`` and voxel spacing (z, y, x) in angstrom."""
        if self.folder is not None:
            volume = open_volume(self.folder)
            return volume.shape, volume.voxel_spacing
        assert self.run is not None
        tomogram = open_tomogram(self.run.tomogram, self.run.voxel_spacing)
        return tomogram.shape, tomogram.voxel_spacing


def find_sources(cfg: DictConfig) -> list[Source]:
    """Return the runs to pick, by name: 01's volumes, or tomograms if there are none or ``tomograms`` names them."""
    if cfg.source not in SOURCES:
        raise InputError("key source", ", ".join(SOURCES), repr(cfg.source), "choose one")
    split = Path(cfg.paths.output) / "volumes" / cfg.split
    volumes = {path.name: Source(path.name, folder=path) for path in sorted(split.glob("[!.]*")) if path.is_dir()}
    found: dict[str, Source] = volumes
    named = cfg.source == "tomograms" or cfg.tomograms is not None
    if named or (cfg.source == "auto" and not volumes):
        try:
            found = {run.name: Source(run.name, run=run) for run in find_input(cfg, cfg.split)}
        except InputError as error:
            if named:
                raise
            raise InputError(
                split,
                "volumes that 01_create_dataset.py made, or tomograms in the input",
                f"neither ({error})",
                "run 01_create_dataset.py first, or choose another split",
            ) from None
    if not found:
        raise InputError(split, "volumes", "none", "run 01_create_dataset.py first, or choose another split")
    if found is volumes and cfg.contrast != VOLUME_CONTRAST:
        raise InputError(
            "key contrast",
            f"{VOLUME_CONTRAST}, as protein is in all volumes that 01_create_dataset.py makes",
            repr(cfg.contrast),
            "give it to 01_create_dataset.py, or set source=tomograms",
        )
    given = cfg.runs
    wanted = list(found) if given is None else [given] if isinstance(given, str) else [str(name) for name in given]
    for name in wanted:
        if name not in found:
            hint = did_you_mean(name, found)
            raise InputError("key runs", f"runs of {cfg.split} ({', '.join(found)})", f"'{name}'{hint}", "correct it")
    return [found[name] for name in wanted]


def shard(sources: Sequence[Source], given: Any) -> list[Source]:
    """Return the share ``infer.shard=i/n`` of the runs, ``i`` from 0; all of them for null."""
    if given is None:
        return list(sources)
    try:
        index, count = (int(number) for number in str(given).split("/"))
    except ValueError:
        index, count = -1, 0
    if not 0 <= index < count:
        raise InputError("key infer.shard", "i/n with i from 0 to n - 1, as in 0/8", repr(given), "correct it")
    return list(sources[index::count])


class Plan:
    """All that a process needs to pick runs; networks are put on their device when they are first used.

    Raises
    ------
    InputError
        If the networks do not fit together, or a threshold lies below ``infer.floor``.
    """

    def __init__(self, cfg: DictConfig, device: str | None = None) -> None:
        self.cfg = cfg
        devices = cfg.infer.device
        self.devices = [str(each) for each in devices] if isinstance(devices, ListConfig) else [str(devices)]
        self.infer = OmegaConf.create({**cfg.infer, "device": device or self.devices[0]})
        given = {str(key): value for key, value in cfg.model.items() if value is not None}
        self.files: list[NetworkFile] = [open_network_file(path, given) for path in find_network_files(cfg.checkpoints)]
        self.card, self.channels = agree(self.files)
        self.particles = ParticleSet.from_config(self.card.particles)
        self.thresholds = choose_thresholds(cfg.thresholds, [file.card for file in self.files], self.particles)
        self.regions = regions_key(cfg.regions)
        self.preparation = Preparation(cfg.fill_missing_chunks, cfg.contrast, self.card.contrast)
        self.results, self.cache = Path(cfg.predictions), Path(cfg.paths.output) / "onnx"
        lowest = min(self.thresholds, key=self.thresholds.__getitem__)
        if self.thresholds[lowest] < cfg.infer.floor:
            raise InputError(
                "key infer.floor",
                f"at most the lowest threshold, {self.thresholds[lowest]:g} of {lowest}",
                f"{cfg.infer.floor:g}",
                "lower infer.floor or raise thresholds",
            )
        self.options = [
            inference_options(self.infer, tile_of(file, self.infer), self.card.nms_radius) for file in self.files
        ]
        if not cfg.infer.min_distance >= 0:
            raise InputError(
                "key infer.min_distance", "angstrom, at least 0", str(cfg.infer.min_distance), "correct it"
            )
        for file in self.files:
            choose_runtime(str(self.infer.runtime), file, choose_device(self.infer.device))
        options = [{key: value for key, value in asdict(each).items() if key != "batch_size"} for each in self.options]
        # What determines the picks of a run, besides its voxels; nothing that only changes speed.
        self.recipe = {
            "networks": [file.sha256 for file in self.files],
            "model": {key: str(value) for key, value in given.items()},
            "weights": member_weights(self.infer.weights, len(self.files)),
            "views": list(self.infer.tta or ()),
            "runtime": [str(self.infer.runtime), str(self.infer.precision)],
            "options": options,
        }

    @cached_property
    def groups(self) -> list[Group]:
        """The networks, on their runtimes."""
        groups = create_groups(self.infer, self.files, self.channels, self.options, self.cache)
        if not any(isinstance(member.predictor, TorchNetwork) for each in groups for member in each.predictor.members):
            torch.set_num_threads(1)  # torch's threads wait by spinning, in the way of the threads that predict
        return groups

    def part(self, source: Source) -> Path:
        """Return the file for the picks of a run."""
        limits = self.regions.limits(source.name)  # only what is outside them is not predicted
        identity = source.identity(self.preparation)
        recipe = self.recipe | {"source": identity} | ({"region": limits} if limits else {})
        key = json.dumps(recipe, sort_keys=True, default=str)
        return self.results / "runs" / f"{source.name}.{hashlib.sha256(key.encode()).hexdigest()[:12]}.csv"

    def picks(self, source: Source) -> pd.DataFrame:
        """Return the scored picks of a run that has been picked; what ``regions`` drops is said and left out."""
        picks = read_picks_csv(self.part(source), scored=True)
        if self.regions.entry(source.name) is None:
            return picks
        return keep_selected(picks, self.regions.select(source.name, *source.grid), source.name)

    def submitted(self, picks: pd.DataFrame) -> pd.DataFrame:
        """Return the picks that reach their thresholds and keep ``infer.min_distance`` from better ones."""
        kept = above_thresholds(picks, self.thresholds)
        if not self.cfg.infer.min_distance:
            return kept
        crowded = np.zeros(len(kept), bool)
        for rows in kept.groupby("run").indices.values():
            own = kept.iloc[rows]
            crowded[rows] = is_crowded(own[["x", "y", "z"]], own["score"], self.cfg.infer.min_distance)
        return kept[~crowded]


def compose_plan(keys: Mapping[str, Any]) -> Plan:
    """Return the plan of ``conf/predict.yaml`` with some keys as Python values, by dotted name; None: as it is there.

    Raises
    ------
    InputError
        If a key is unknown or its value is none for it; and as `Plan`.
    """
    cfg = load_config("predict")
    defaults = cfg.copy()
    known = dict(leaves(OmegaConf.to_container(defaults, resolve=False)))
    for key, value in keys.items():
        if key not in known:
            raise InputError(
                f"key {key}", "a key of conf/predict.yaml", f"none of that name{did_you_mean(key, known)}", "correct it"
            )
        try:
            if value is not None:
                OmegaConf.update(cfg, key, value, merge=False)
        except OmegaConfBaseException:
            raise InputError(
                f"key {key}", "text, numbers, or lists or dictionaries of them", repr(value), "convert it"
            ) from None
    check_value_types(cfg, defaults)
    return Plan(cfg)


@dataclass
class Outcome:
    """What became of a run: seconds per stage, tiles and peak memory, or an error."""

    run: str
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    tiles: int = 0
    memory_gb: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class Picked:
    """What became of all runs: the file of each one's picks, there or not, and why some have none."""

    parts: dict[str, Path]
    outcomes: list[Outcome]
    failed: dict[str, str]

    @property
    def done(self) -> dict[str, Path]:
        """The files that are there."""
        return {name: part for name, part in self.parts.items() if part.is_file()}


def pick_missing(plan: Plan, sources: Sequence[Source], mine: Sequence[Source]) -> Picked:
    """Pick those of ``mine`` that have not been picked by the same recipe before; ``sources`` are all runs."""
    parts, failed = {}, {}
    for source in sources:
        outcome = Outcome(source.name)
        with _caught(outcome):
            parts[source.name] = plan.part(source)
        if outcome.error is not None and source in mine:
            failed[source.name] = outcome.error
    outcomes = run_plan(plan, [each for each in mine if each.name in parts and not parts[each.name].is_file()])
    failed |= {outcome.run: outcome.error for outcome in outcomes if outcome.error}
    return Picked(parts, outcomes, failed)


def refuse_failed(failed: Mapping[str, str], count: int) -> None:
    """Raise `InputError` if any of ``count`` runs failed."""
    if failed:
        first, why = next(iter(failed.items()))
        raise InputError(
            f"{len(failed)} of {count} runs",
            "tomograms that can be picked",
            "; ".join(failed.values()) if len(failed) < 4 else f"{first}: {why}; and others",
            "mend them and start the same command again: the other runs are done",
        )


def run_plan(plan: Plan, todo: Sequence[Source]) -> list[Outcome]:
    """Pick runs, on one device or on several at once, and show how far it is."""
    if not todo:
        return []
    if len(plan.devices) > 1:
        return run_on_devices(plan, todo)
    done: list[Outcome] = []
    plan.groups  # noqa: B018  # what they have to say comes before the bar
    with Bar(len(todo)) as bar:
        for outcome in pick_sources(plan, todo, bar.update):
            done.append(outcome)
            bar.finish(outcome)
    return done


def run_on_devices(plan: Plan, todo: Sequence[Source]) -> list[Outcome]:
    """Pick runs in one process for each device; each takes the next run from one list."""
    context = multiprocessing.get_context("spawn")
    tasks, messages = context.Queue(), context.Queue()
    for source in todo:
        tasks.put(source)
    for _ in plan.devices:
        tasks.put(None)
    for file, options in zip(plan.files, plan.options, strict=True):
        prepare_graph(plan.infer, file, options.tile_shape, plan.cache)  # once, not in every process
    config = OmegaConf.to_container(plan.cfg, resolve=True)
    threads = max(1, torch.get_num_threads() // len(plan.devices))
    workers = [
        context.Process(target=_work, args=(config, device, threads, tasks, messages), daemon=True)
        for device in plan.devices
    ]
    for worker in workers:
        worker.start()
    done: list[Outcome] = []
    running = len(workers)
    with Bar(len(todo)) as bar:
        while running:
            kind, content = messages.get()
            if kind == "progress":
                bar.update(*content)
            elif kind == "outcome":
                done.append(content)
                bar.finish(content)
            elif kind == "end":
                running -= 1
            else:
                for worker in workers:
                    worker.terminate()
                raise content
    for worker in workers:
        worker.join()
    return done


def _work(config: Any, device: str, threads: int, tasks: Any, messages: Any) -> None:
    set_up_logging()
    keep_freed_memory()
    torch.set_num_threads(threads)
    try:
        plan = Plan(OmegaConf.create(config), device)
        for outcome in pick_sources(plan, iter(tasks.get, None), lambda *state: messages.put(("progress", state))):
            messages.put(("outcome", outcome))
        messages.put(("end", None))
    except (InputError, OSError) as error:
        messages.put(("refused", error))
    except Exception:
        messages.put(("crash", RuntimeError(traceback.format_exc())))


def pick_sources(plan: Plan, todo: Iterable[Source], progress: Any) -> Iterator[Outcome]:
    """Pick runs one after the other; the next one's voxels are prepared meanwhile."""
    scratch = plan.results / ".volumes"

    def prepare() -> Iterator[tuple[Outcome, Source, Volume | None]]:
        for source in todo:
            outcome = Outcome(source.name)
            with _caught(outcome), _clocked(outcome, "read"):
                yield outcome, source, open_source(plan, source, scratch)
                continue
            yield outcome, source, None

    for outcome, source, volume in ahead(prepare()):
        if volume is not None:
            with _caught(outcome):
                pick_run(plan, source, volume, outcome, progress)
            if volume.folder.is_relative_to(scratch):
                shutil.rmtree(volume.folder)
        yield outcome


def open_source(plan: Plan, source: Source, scratch: Path) -> Volume:
    """Return the volume of a run as the networks know volumes; what 01 has not made so is made in ``scratch``."""
    _, own = source.grid
    spacing = spacing_to_predict(source.name, own, [file.card for file in plan.files], plan.infer)
    folder = scratch / source.name
    if source.run is not None:
        create_volume(source.run, folder, replace(plan.preparation, voxel_spacing=spacing))
    else:
        assert source.folder is not None
        if spacing is None and plan.card.contrast == VOLUME_CONTRAST:
            return open_volume(source.folder, plan.card.normalization)
        convert_volume(open_volume(source.folder), folder, spacing or own, plan.card.contrast)
    return open_volume(folder, plan.card.normalization)


def pick_run(plan: Plan, source: Source, volume: Volume, outcome: Outcome, progress: Any) -> None:
    """Write the scored picks of one run."""

    def watch(done: int, of: int) -> None:
        outcome.tiles = of
        progress(source.name, done / of)

    clocked = ClockedPlanes(volume)
    options = plan.groups[0].options
    selection = plan.regions.select(source.name, *source.grid)
    wanted = tiles_of_region(selection, plan.particles, options, volume.voxel_spacing)
    heatmaps = predict_groups(source.name, clocked, plan.groups, len(plan.particles), watch, wanted)
    slabs = timed_slabs(heatmaps, outcome)
    begin = time.perf_counter()
    with heatmaps_kept(plan, source, volume, slabs) as kept:
        picks = pick_slabs(kept, plan.particles, options, volume.voxel_spacing, plan.card.offset_voxel)
    outcome.seconds["peaks"] = time.perf_counter() - begin - outcome.seconds["predict"]
    with _clocked(outcome, "write"):
        write_scored_picks_csv(plan.part(source), picks.assign(run=source.name))
    outcome.seconds["read"] += clocked.seconds
    outcome.memory_gb = peak_memory_gb()
    write_effort(plan.part(source), Effort(outcome.seconds, outcome.tiles, outcome.memory_gb))


class ClockedPlanes:
    """A volume that adds up the seconds its planes take to read."""

    def __init__(self, volume: Volume) -> None:
        self._volume, self.shape, self.seconds = volume, volume.shape, 0.0

    def planes(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return normalised planes."""
        begin = time.perf_counter()
        planes = self._volume.planes(start, stop)
        self.seconds += time.perf_counter() - begin
        return planes


def timed_slabs(slabs: Iterator[Tensor], outcome: Outcome) -> Iterator[Tensor]:
    """Yield heatmaps, and add up the seconds they take."""
    while True:
        with _clocked(outcome, "predict"):
            slab = next(slabs, None)
            if slab is not None and slab.device.type == "cuda":
                torch.cuda.synchronize(slab.device)
        if slab is None:
            return
        yield slab


@contextmanager
def heatmaps_kept(plan: Plan, source: Source, volume: Volume, slabs: Iterator[Tensor]) -> Iterator[Iterator[Tensor]]:
    """Pass slabs on and, if ``infer.save_heatmaps`` says so, write them meanwhile."""
    if not plan.cfg.infer.save_heatmaps:
        yield slabs
        return
    path = plan.results / "heatmaps" / f"{source.name}.zarr"
    with (
        write_aside(path) as partial,
        HeatmapWriter(partial, source.name, plan.particles, volume.voxel_spacing, volume.shape) as writer,
    ):
        yield writer.keep(slabs)


def collect(plan: Plan, sources: Sequence[Source], frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Write what was found in all runs as one, and what is known of it; return what is submitted of it."""
    scored = concat_picks(frames, scored=True)
    kept = plan.submitted(scored)
    if crowded := len(above_thresholds(scored, plan.thresholds)) - len(kept):
        logger.info("dropped %d picks within %g angstrom of a better one", crowded, plan.cfg.infer.min_distance)
    with _one_at_a_time(plan.results):
        write_scored_picks_csv(plan.results / "scored_picks.csv", scored)
        write_submission_csv(plan.results / "submission.csv", kept)
        predicted = [predicted_run(source, read_effort(plan.part(source))) for source in sources]
        networks = [str(file.path) for file in plan.files]
        write_record(plan.results, plan.particles, plan.thresholds, networks, predicted)
    logger.info(
        "%d picks in %s, all %d with scores in scored_picks.csv",
        *(len(kept), plan.results / "submission.csv", len(scored)),
    )
    return kept


def predicted_run(source: Source, effort: Effort | None) -> PredictedRun:
    """Return what the record keeps of a run."""
    if source.folder is not None:
        return PredictedRun(source.name, source.folder, effort=effort)
    assert source.run is not None
    return PredictedRun(source.name, None, source.run.tomogram, source.run.voxel_spacing, effort)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep other processes (shards that end at once) from writing the same files."""
    with (folder / "runs" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _caught(outcome: Outcome) -> Iterator[None]:
    """Note what is wrong with a run instead of stopping the others; a full disk stops all."""
    try:
        yield
    except InputError as error:
        outcome.error = str(error)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        outcome.error = f"{error.filename or outcome.run}: {error.strerror or error}"


@contextmanager
def _clocked(outcome: Outcome, stage: str) -> Iterator[None]:
    begin = time.perf_counter()
    try:
        yield
    finally:
        outcome.seconds[stage] += time.perf_counter() - begin


def peak_memory_gb() -> float:
    """Return the most memory this process ever used, of the host and of GPUs, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    gpu = sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    return (host + gpu) / 1e9


class Bar:
    """Runs done, the time left, and the runs at work; on standard error. Without a terminal, a line for each run."""

    def __init__(self, total: int) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.1f} of {task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("runs", total=total)
        self._shares: dict[str, float] = {}
        self._total, self._done = total, 0
        self._begin = time.perf_counter()

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, run: str, share: float) -> None:
        """Show that a share (0 to 1) of a run is predicted."""
        self._shares[run] = share
        self._progress.update(
            self._task, completed=self._done + sum(self._shares.values()), description=", ".join(self._shares)
        )

    def finish(self, outcome: Outcome) -> None:
        """Show that a run is done."""
        self._shares.pop(outcome.run, None)
        self._done += 1
        self._progress.update(self._task, completed=self._done + sum(self._shares.values()))
        if not self._console.is_terminal:
            left = (time.perf_counter() - self._begin) / self._done * (self._total - self._done)
            logger.info(
                "%s: %s · %d of %d runs · %.0f min left",
                *(outcome.run, outcome.error or f"{sum(outcome.seconds.values()):.1f} s"),
                *(self._done, self._total, left / 60),
            )


def as_rich_table(
    sources: Sequence[Source],
    outcomes: Sequence[Outcome],
    counts: Mapping[str, int],
) -> Table:
    """Lay out what each run took, and how many picks of it are submitted."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("run")
    for name in (*(f"{stage} s" for stage in STAGES), "tiles/s", "peak GB", "picks"):
        table.add_column(name, justify="right")
    by_run = {outcome.run: outcome for outcome in outcomes}
    for source in sources:
        outcome = by_run.get(source.name)
        if outcome is None and source.name in counts:
            cells = ["done before", *[""] * (len(STAGES) + 1)]
        elif outcome is None or outcome.error:
            cells = ["failed", *[""] * (len(STAGES) + 1)]
        else:
            speed = outcome.tiles / max(outcome.seconds["predict"], 1e-9)
            cells = [f"{outcome.seconds[stage]:.1f}" for stage in STAGES] + [f"{speed:.1f}", f"{outcome.memory_gb:.1f}"]
        table.add_row(source.name, *cells, str(counts.get(source.name, "")))
    return table
