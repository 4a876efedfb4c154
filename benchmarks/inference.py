"""Time inference beside the published procedure: per tile, per tomogram, and the score of every setting.

    python benchmarks/inference.py VOLUME CHECKPOINT SOLUTION

VOLUME is a run's folder under output/volumes, CHECKPOINT a network trained without it, SOLUTION the CSV of 03. The
first two tables need a network of the published size only; its weights are random.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import published
import torch
from torch import nn

from czii25d import create_model
from czii25d.data.volumes import Volume, open_volume
from czii25d.export.onnx import export_onnx
from czii25d.geometry import Shape3D
from czii25d.inference import InferenceOptions, Predictor, pick_volume
from czii25d.metrics import evaluate, fit_thresholds
from czii25d.models.checkpoint import load_checkpoint
from czii25d.models.folding import fold
from czii25d.particles import ParticleSet
from czii25d.picks import above_thresholds, read_picks_csv
from czii25d.pipeline.app import keep_freed_memory
from czii25d.runtimes.onnxruntime import OnnxRuntimeNetwork
from czii25d.runtimes.openvino import OpenVinoNetwork
from czii25d.runtimes.torch import TorchNetwork

TILE: Shape3D = (16, 128, 128)
PUBLISHED_TILES = 1782
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OVERLAPS = (0.0, 0.125, 0.25, 0.5)


def runtimes(network: nn.Module, tile: Shape3D, folder: Path) -> Iterator[tuple[str, Callable[[], Predictor]]]:
    """Yield each runtime of this machine by name, and what starts it."""
    folder.mkdir(parents=True, exist_ok=True)
    graph = folder / f"{'x'.join(map(str, tile))}.onnx"
    if not graph.is_file():
        export_onnx(network, graph, tile)
    folded = fold(network, "phases") if DEVICE == "cpu" else network  # as 21 does
    yield "torch fp32", lambda: TorchNetwork(folded, DEVICE)
    yield "torch bf16", lambda: TorchNetwork(folded, DEVICE, torch.bfloat16)
    if DEVICE == "cuda":
        yield "torch bf16 compiled", lambda: TorchNetwork(network, DEVICE, torch.bfloat16, "max-autotune")
        return
    yield "onnxruntime fp32", lambda: OnnxRuntimeNetwork(graph)
    yield "openvino fp32", lambda: OpenVinoNetwork(graph, "fp32")
    yield "openvino bf16", lambda: OpenVinoNetwork(graph, "bf16")


def seconds_per_tile(predictor: Predictor, tile: Shape3D, batch: int, repeats: int) -> float:
    """Return the median over the repeats."""
    tiles = torch.randn(batch, 1, *tile, device=predictor.device)
    predictor(tiles)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        predictor(tiles)
        if tiles.is_cuda:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / batch)
    return statistics.median(seconds)


def as_published(network: nn.Module) -> nn.Module:
    """Return a copy whose channels come first in memory, as they do there."""
    network = copy.deepcopy(network)
    network.stem.channels_last = False
    return network


@torch.no_grad()
def with_few_peaks(network: nn.Module, volume: Volume) -> nn.Module:
    """Lower an untrained network's heatmaps until about as few voxels exceed the floor as with a trained one.

    Otherwise its noise has over a million peaks, and finding them takes longer than anything else.
    """
    d, h, w = TILE
    tile = torch.from_numpy(volume.planes(0, d)[:, :h, :w])[None, None]
    high = network(tile).flatten().sort().values[-100]
    network.get_submodule("segmentation_head").bias -= high - InferenceOptions(TILE, TILE).floor
    return network


def tile_table(network: nn.Module, folder: Path, repeats: int) -> None:
    """Per tile of the published network; its first row is the eager network as it is published."""
    print("| runtime | s per tile | against the first |\n|---|---|---|")
    first = seconds_per_tile(TorchNetwork(as_published(network), DEVICE), TILE, 4, repeats)
    print(f"| torch fp32, eager, as published | {first:.3f} | 1 |", flush=True)
    for name, start in runtimes(network, TILE, folder):
        seconds = seconds_per_tile(start(), TILE, 4, repeats)
        print(f"| {name} | {seconds:.3f} | {first / seconds:.2f} |", flush=True)


def tomogram_table(volume: Volume, network: nn.Module, particles: ParticleSet, folder: Path, share: float) -> None:
    """One tomogram and the published network: its own procedure, and ours at the defaults."""
    seconds = published_seconds(volume, TorchNetwork(as_published(network), DEVICE), share)
    print("| one tomogram, the published network | s | against published |\n|---|---|---|")
    said = "" if share == 1 else f" ({share:.0%} of its tiles timed, scaled; peaks in full)"
    print(
        f"| published: {PUBLISHED_TILES} tiles, torch fp32, host arrays, scipy peaks{said} | {seconds:.0f} | 1 |",
        flush=True,
    )
    for overlap in OVERLAPS:
        *_, (name, start) = runtimes(network, TILE, folder)
        predictor = start()
        begin = time.perf_counter()
        with threads_for(name):
            pick_volume(volume, predictor, particles, options(TILE, overlap, None), volume.voxel_spacing)
        own = time.perf_counter() - begin
        print(f"| {name}, tile {as_text(TILE)}, overlap {overlap:g} | {own:.0f} | {seconds / own:.1f} |", flush=True)


def published_seconds(volume: Volume, predictor: Predictor, share: float) -> float:
    """Return the seconds of the published procedure, its tiles scaled from a share of them."""
    depth, height, width = 184, 640, 640
    padded = np.zeros((depth, height, width), np.float32)
    voxels = volume.planes(0, volume.shape[0])
    padded[: voxels.shape[0], : voxels.shape[1], : voxels.shape[2]] = voxels
    total, weights = np.zeros((6, depth, height, width), np.float32), np.zeros((depth, height, width), np.float32)
    triangles = [np.concatenate([np.arange(side // 2), np.arange(side // 2)[::-1]]) / (side // 2) for side in TILE]
    window = (triangles[0][:, None, None] * np.minimum.outer(triangles[1], triangles[2])).astype(np.float32)
    places = [
        (z, y, x)
        for z in range(0, depth - 15, 8)
        for y in range(0, height - 127, 64)
        for x in range(0, width - 127, 64)
    ]
    assert len(places) == PUBLISHED_TILES
    timed = places[: max(8, int(share * len(places)) // 4 * 4)]
    start = time.perf_counter()
    for first in range(0, len(timed), 4):
        batch = timed[first : first + 4]
        tiles = np.stack([padded[z : z + 16, y : y + 128, x : x + 128] for z, y, x in batch])
        heatmaps = predictor(torch.from_numpy(tiles)[:, None].to(predictor.device)).cpu().numpy()
        for (z, y, x), heatmap in zip(batch, heatmaps, strict=True):
            total[:, z : z + 16, y : y + 128, x : x + 128] += heatmap * window
            weights[z : z + 16, y : y + 128, x : x + 128] += window
    seconds = (time.perf_counter() - start) / len(timed) * len(places)
    start = time.perf_counter()
    total /= np.maximum(weights, 1)
    published.find_peaks(total)
    return seconds + time.perf_counter() - start


def score_table(volume: Volume, checkpoint: Path, solution: Path, folder: Path) -> None:
    """Seconds and score of every tile, overlap and runtime with a trained network."""
    network, card = load_checkpoint(checkpoint)
    particles = ParticleSet.from_config(card.particles)
    truth = read_picks_csv(solution)
    truth = truth[truth["run"] == volume.name]
    print(
        "| tile | overlap | runtime | s | F4, the checkpoint's thresholds | F4, the best |\n|---|---|---|---|---|---|"
    )
    own = depth, size, _ = card.tile_shape
    fastest = "torch bf16" if torch.cuda.is_available() else "openvino bf16"
    settings = [(own, overlap, fastest) for overlap in OVERLAPS]
    settings += [(tile, 0.25, fastest) for tile in ((depth, 2 * size, 2 * size), (2 * depth, size, size))]
    others = [name for name, _ in runtimes(network, own, folder) if name != fastest]
    settings += [(own, 0.25, name) for name in others]
    for tile, overlap, wanted in settings:
        predictor = dict(runtimes(network, tile, folder))[wanted]()
        predictor(torch.zeros(1, 1, *tile, device=predictor.device))
        begin = time.perf_counter()
        how = options(tile, overlap, card.nms_radius)
        with threads_for(wanted):
            picks = pick_volume(volume, predictor, particles, how, volume.voxel_spacing, card.offset_voxel)
        picks = picks.assign(run=volume.name)
        seconds = time.perf_counter() - begin
        thresholds = card.thresholds or {}
        fixed = evaluate(truth, above_thresholds(picks, thresholds), particles=particles).loc["total", "fbeta"]
        fitted = fit_thresholds(truth, picks, particles).fbeta
        best = sum(fitted[each.name] * each.weight for each in particles) / sum(each.weight for each in particles)
        print(f"| {as_text(tile)} | {overlap:g} | {wanted} | {seconds:.1f} | {fixed:.4f} | {best:.4f} |", flush=True)


@contextmanager
def threads_for(runtime: str) -> Iterator[None]:
    """Give torch one thread where another runtime predicts, as 21 does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if runtime.startswith("torch") else 1)
    yield
    torch.set_num_threads(threads)


def options(tile: Shape3D, overlap: float, nms_radius: object) -> InferenceOptions:
    """Return the defaults but for tile and overlap."""
    d, h, w = (max(1, round(side * (1 - overlap))) for side in tile)
    radius = nms_radius if isinstance(nms_radius, dict) else None
    batch = max(1, 4 * 128 * 128 // (tile[1] * tile[2]))
    return InferenceOptions(tile, (d, h, w), batch_size=batch, nms_radius=radius)


def as_text(tile: Shape3D) -> str:
    """Write a shape for people."""
    return " x ".join(map(str, tile))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volume", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("solution", type=Path)
    parser.add_argument("--share", type=float, default=0.05, help="of the published tiles that are timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=["tiles", "tomogram", "score"], help="one table only")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    keep_freed_memory()
    volume = open_volume(arguments.volume)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(f"{datetime.date.today()}, {os.cpu_count()} cores ({platform.machine()}){gpu}, torch {torch.__version__}\n")
    torch.manual_seed(0)
    network = with_few_peaks(create_model("timm3d3", pretrained=False).eval(), volume)
    particles = ParticleSet.from_config(load_checkpoint(arguments.checkpoint)[1].particles)
    with tempfile.TemporaryDirectory(prefix="czii25d-benchmark-") as name:
        size, trained = Path(name) / "published", Path(name) / "trained"
        if arguments.only in (None, "tiles"):
            tile_table(network, size, arguments.repeats)
            print()
        if arguments.only in (None, "tomogram"):
            tomogram_table(volume, network, particles, size, arguments.share)
            print()
        if arguments.only in (None, "score"):
            score_table(volume, arguments.checkpoint, arguments.solution, trained)


if __name__ == "__main__":
    main()
