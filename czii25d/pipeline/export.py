"""Export: from checkpoints to ONNX files and TensorRT engines that are proven equal before they are kept."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from czii25d.data.volumes import open_volume
from czii25d.errors import InputError
from czii25d.export.manifest import Manifest, content_hash, manifest_path, read_manifest, write_manifest
from czii25d.export.onnx import FusedEnsemble, Precision, export_onnx, require_onnx
from czii25d.export.tensorrt import EngineOptions, build_engine, engine_key
from czii25d.geometry import Shape3D
from czii25d.inference import Predictor
from czii25d.models.checkpoint import ModelCard
from czii25d.models.timm3d3 import check_tile_shape
from czii25d.pipeline.members import (
    ENGINE_SUFFIX,
    GRAPH_SUFFIX,
    NetworkFile,
    agree,
    find_network_files,
    member_weights,
    open_network_file,
    shape_key,
)
from czii25d.runtimes.torch import TorchNetwork

logger = logging.getLogger(__name__)

FORMATS = ("auto", "onnx", "engine")
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-2}
LIBRARIES = ("czii25d", "torch", "timm", "onnx", "onnxscript", "onnxruntime", "openvino")
SEED, RANDOM_TILES, REAL_TILES = 0, 2, 2


def export(cfg: DictConfig) -> list[Path]:
    """Write ``<engines>/<name>.<precision>.onnx`` and, where TensorRT is, ``.engine``; return what was asked for.

    A file appears with the JSON that describes it (`czii25d.export.manifest`), and only if its heatmaps agree with
    those of torch in float32. What is up to date is left alone.

    Raises
    ------
    InputError
        If a key is not right, a library is missing, or a file does not agree.
    """
    want_engine = choose_format(str(cfg.export.format))
    require_onnx()
    given = {str(key): value for key, value in cfg.model.items() if value is not None}
    files = [open_network_file(path, given) for path in find_network_files(cfg.checkpoints)]
    for file in files:
        if file.network is None:
            raise InputError(file.path, "a checkpoint", "an export", "export the checkpoint it came from")
    engine_options = EngineOptions(
        tuple(cfg.export.batch),
        cfg.export.workspace_gib,
        cfg.export.optimization_level,
        cfg.export.hardware_compatible,
        cfg.export.version_compatible,
    )
    if cfg.export.precision not in TOLERANCE:
        raise InputError("key export.precision", ", ".join(TOLERANCE), repr(cfg.export.precision), "choose one")
    made, rows = [], []
    for job in plan_jobs(cfg, files):
        graph = make_graph(cfg, job)
        kept = make_engine(cfg, job, graph, engine_options) if want_engine else graph
        made.append(kept)
        rows.append((kept, read_manifest(kept)))
    print_table(rows)
    return made


def choose_format(given: str) -> bool:
    """Return whether engines are to be made; where they cannot be, ``auto`` says so in one line."""
    if given not in FORMATS:
        raise InputError("key export.format", ", ".join(FORMATS), repr(given), "choose one")
    if given == "onnx":
        return False
    from czii25d.runtimes.tensorrt import require_tensorrt

    try:
        require_tensorrt()
    except InputError as error:
        if given == "engine":
            raise
        logger.info("ONNX files only, no engines: %s", error)
        return False
    return True


@dataclass(frozen=True)
class Job:
    """One graph to make.

    Parameters
    ----------
    name
        Of its files, without precision and suffix.
    network
        On the CPU, in float32; several checkpoints may be in it.
    """

    name: str
    network: nn.Module
    card: ModelCard
    sources: list[dict[str, Any]]
    tile: Shape3D


def plan_jobs(cfg: DictConfig, files: Sequence[NetworkFile]) -> list[Job]:
    """Return a job for each checkpoint, or one for all of them."""
    weights = member_weights(cfg.export.weights, len(files))
    sources = [
        {"checkpoint": file.path.name, "sha256": file.sha256, "weight": weight}
        for file, weight in zip(files, weights, strict=True)
    ]
    tiles = [shape_key(cfg.export.tile, "export.tile") or file.nominal_tile for file in files]
    for tile in tiles:
        check_tile_shape(tile, "key export.tile")
    if not cfg.export.fuse:
        names = unique_names([file.path for file in files])
        return [
            Job(name, torch_network(file), file.card, [{**source, "weight": 1.0}], tile)
            for name, file, source, tile in zip(names, files, sources, tiles, strict=True)
        ]
    card, channels = agree(files)
    if len(set(tiles)) > 1:
        raise InputError("key export.tile", "one tile for all fused networks", str(tiles), "set export.tile")
    network = FusedEnsemble([torch_network(file) for file in files], channels, weights)
    return [Job("ensemble", network, fused_card(card, [file.card for file in files]), sources, tiles[0])]


def torch_network(file: NetworkFile) -> nn.Module:
    """Return a checkpoint's network."""
    assert file.network is not None
    return file.network


def fused_card(first: ModelCard, cards: Sequence[ModelCard]) -> ModelCard:
    """Return the first card with the mean of all thresholds."""
    known = [card.thresholds for card in cards if card.thresholds]
    means: dict[str, float] = {}
    for name in first.particles:
        values = [thresholds[name] for thresholds in known if name in thresholds]
        means |= {name: sum(values) / len(values)} if values else {}
    return ModelCard(**{**asdict(first), "thresholds": means or None, "voxel_spacing": first.voxel_spacing})


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each checkpoint: its own, or its training's for ``best.ckpt`` and ``last.ckpt``."""
    names = [path.parent.name if path.stem in ("best", "last") and path.parent.name else path.stem for path in paths]
    return [name if names.count(name) == 1 else f"{name}-{index}" for index, name in enumerate(names)]


def make_graph(cfg: DictConfig, job: Job) -> Path:
    """Return the ONNX file of a job, made and checked unless it is up to date."""
    precision: Precision = cfg.export.precision
    path = Path(cfg.engines) / f"{job.name}.{precision}{GRAPH_SUFFIX}"
    if is_up_to_date(path, job, precision):
        logger.info("%s is up to date", path)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as scratch:
        partial = Path(scratch) / path.name
        export_onnx(job.network, partial, job.tile, precision)
        errors: dict[str, float] = {}
        for runtime, predictor in graph_runtimes(partial, precision).items():
            errors |= compare(cfg, job, runtime, predictor, path)
        if not errors:
            raise InputError(
                path, "a runtime that can check it", "neither onnxruntime nor openvino", "pip install 'czii25d[export]'"
            )
        manifest = Manifest(job.card, job.sources, job.tile, precision, None, errors, versions(LIBRARIES))
        write_manifest(partial, manifest)
        publish(partial, path)
    return path


def graph_runtimes(path: Path, precision: str) -> dict[str, Predictor]:
    """Return the runtimes here that can run a graph on the CPU."""
    found: dict[str, Predictor] = {}
    if find_spec("openvino"):
        from czii25d.runtimes.openvino import OpenVinoNetwork

        found["openvino"] = OpenVinoNetwork(path, "fp32")  # the graph's own rounding is what is to be seen
    if find_spec("onnxruntime") and precision != "bf16":  # ONNX Runtime has no bf16 convolution on a CPU
        from czii25d.runtimes.onnxruntime import OnnxRuntimeNetwork

        found["onnxruntime"] = OnnxRuntimeNetwork(path)
    return found


def make_engine(cfg: DictConfig, job: Job, graph: Path, options: EngineOptions) -> Path:
    """Return the TensorRT engine of a graph, built and checked unless it is up to date."""
    from czii25d.runtimes.tensorrt import TensorRTNetwork, require_tensorrt

    trt_version = require_tensorrt().__version__
    device = torch.device(cfg.export.device)
    gpu = torch.cuda.get_device_name(device)
    key = engine_key(content_hash(graph), options, gpu, trt_version)
    path = graph.with_suffix(ENGINE_SUFFIX)
    if path.is_file() and manifest_path(path).is_file() and read_manifest(path).options.get("key") == key:
        logger.info("%s is up to date", path)
        return path
    timing = graph.parent / f"timing-{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}-{trt_version}.cache"
    logger.info("building %s for %s with TensorRT %s; this takes minutes", path.name, gpu, trt_version)
    with torch.cuda.device(device):
        engine = build_engine(graph, (1, *job.tile), options, timing)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as scratch:
        partial = Path(scratch) / path.name
        partial.write_bytes(engine)
        predictor = TensorRTNetwork(partial, str(device), options.version_compatible)
        errors = compare(cfg, job, "tensorrt", predictor, path)
        manifest = Manifest(
            job.card,
            job.sources,
            job.tile,
            cfg.export.precision,
            options.batch,
            {**read_manifest(graph).largest_error, **errors},
            versions(LIBRARIES) | {"tensorrt": trt_version},
            gpu,
            {**asdict(options), "key": key},
        )
        write_manifest(partial, manifest)
        publish(partial, path)
    return path


def publish(partial: Path, path: Path) -> None:
    """Move a file and its manifest into place; between the two renames the old file has no manifest."""
    manifest_path(path).unlink(missing_ok=True)
    partial.replace(path)
    manifest_path(partial).replace(manifest_path(path))


def is_up_to_date(path: Path, job: Job, precision: str) -> bool:
    """Tell whether a file was made of the same checkpoints in the same way by the same libraries."""
    try:
        there = read_manifest(path)
    except InputError:
        return False
    return (there.sources, there.tile_shape, there.precision, there.versions, there.card) == (
        job.sources,
        job.tile,
        precision,
        versions(LIBRARIES),
        job.card,
    )


def compare(cfg: DictConfig, job: Job, runtime: str, predictor: Predictor, path: Path) -> dict[str, float]:
    """Return the largest error beside torch in float32, on random and real tiles, as a share of the range.

    Raises
    ------
    InputError
        If it is more than ``export.atol``.
    """
    atol = TOLERANCE[cfg.export.precision] if cfg.export.atol is None else cfg.export.atol
    eager = TorchNetwork(job.network)
    errors = {}
    for kind, tiles in parity_tiles(Path(cfg.paths.output), job).items():
        expected = eager(tiles)
        found = predictor(tiles.to(predictor.device)).cpu()
        error = float((found - expected).abs().max() / (expected.max() - expected.min()))
        errors[f"{runtime}, {kind} tiles"] = error
        if not error <= atol:  # NaN is no pass
            raise InputError(
                path,
                f"heatmaps of torch within {atol:g} of their range (export.atol)",
                f"{error:.2g} off by {runtime} on {kind} tiles",
                "nothing was kept; choose another export.precision or atol",
            )
    return errors


def parity_tiles(output: Path, job: Job) -> dict[str, Tensor]:
    """Return seeded random tiles and, where 01 has prepared a volume, tiles of it; ``(B, 1, D, H, W)``."""
    generator = torch.Generator().manual_seed(SEED)
    tiles = {"random": torch.randn(RANDOM_TILES, 1, *job.tile, generator=generator)}
    for folder in sorted((output / "volumes").glob("*/[!.]*"))[:1]:
        volume = open_volume(folder, job.card.normalization)
        if all(side >= tile for side, tile in zip(volume.shape, job.tile, strict=True)):
            room = [side - tile for side, tile in zip(volume.shape, job.tile, strict=True)]
            crops = []
            for share in range(1, REAL_TILES + 1):
                z, y, x = (side * share // (REAL_TILES + 1) for side in room)
                crops.append(torch.from_numpy(volume.crop((z, y, x), job.tile)))
            tiles["real"] = torch.stack(crops)[:, None]
    if "real" not in tiles:
        logger.info("no volume in %s: compared on random tiles only", output / "volumes")
    return tiles


def versions(names: Sequence[str]) -> dict[str, str]:
    """Return the installed versions."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


def print_table(rows: Sequence[tuple[Path, Manifest]]) -> None:
    """Say what was made and how near it is to torch."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("file", "MB", "networks", "largest error (share of the range)"):
        table.add_column(name, justify="left" if name == "file" else "right")
    for path, manifest in rows:
        worst = max(manifest.largest_error, key=manifest.largest_error.__getitem__)
        error = f"{manifest.largest_error[worst]:.1e} ({worst})"
        table.add_row(path.name, f"{path.stat().st_size / 1e6:.0f}", str(len(manifest.sources)), error)
    console = Console(stderr=True)
    console.print(table)
    console.print(f"in {rows[0][0].parent}")
