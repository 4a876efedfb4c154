"""Time the data path beside the published one, both in one run; print a table in Markdown.

``python benchmarks/run.py INPUT [--repeats 3]``, INPUT being a data set in the competition's layout. Each preparation
and each set-up runs in a process of its own, whose peak memory the operating system reports. Needs albumentations
for the published sample.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import published
import torch

from czii25d.data.augment import Augmentation
from czii25d.data.dataset import Sampling, TileDataset
from czii25d.data.targets import open_target
from czii25d.data.volumes import open_volume
from czii25d.heatmap import render_heatmap
from czii25d.inference import NMS_RADIUS_FACTOR
from czii25d.particles import load_particles
from czii25d.peaks import find_peaks
from czii25d.pipeline.app import keep_freed_memory

PROJECT = Path(__file__).parents[1]
HERE = Path(__file__).parent
BATCH = 32


def run_process(*command: str) -> tuple[float, float]:
    """Return the seconds and the peak memory (GB) of a command."""
    os.sync()  # what others wrote is not to be waited for
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def time_within(*command: str) -> tuple[float, float]:
    """Return the seconds that a command prints, and its peak memory (GB)."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return float(printed), usage.ru_maxrss / 2**20


def size_on_disk(folder: Path) -> float:
    """Return GB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def prepare(source: Path, work: Path, repeats: int) -> list[tuple[str, str, str]]:
    """01, 02 and 03."""
    theirs, ours = [], []
    for _ in range(repeats):
        shutil.rmtree(work / "published", ignore_errors=True)
        theirs.append(run_process(str(HERE / "published.py"), "prepare", str(source), str(work / "published")))
        shutil.rmtree(work / "ours", ignore_errors=True)
        paths = [f"paths.input={source}", f"paths.output={work / 'ours'}"]
        steps = [
            run_process(str(PROJECT / script), *paths)
            for script in ("01_create_dataset.py", "02_create_mask.py", "03_create_solution.py")
        ]
        ours.append((sum(seconds for seconds, _ in steps), max(memory for _, memory in steps)))
    rows = [("01 + 02 + 03, s", *(f"{statistics.median(s for s, _ in each):.1f}" for each in (theirs, ours)))]
    rows.append(("their peak memory, GB", *(f"{max(m for _, m in each):.2f}" for each in (theirs, ours))))
    rows.append(("on disk, GB", *(f"{size_on_disk(work / name):.2f}" for name in ("published", "ours"))))
    return rows


SETUP = """
import sys, time
from pathlib import Path
from czii25d.data.augment import Augmentation
from czii25d.data.datamodule import TomogramDataModule
from czii25d.data.dataset import Sampling
from czii25d.particles import load_particles
start = time.perf_counter()
output = Path(sys.argv[1])
runs = sorted(path.name for path in (output / "volumes/train").iterdir())
TomogramDataModule(output / "volumes/train", output / "heatmaps", runs[1:], runs[:1], load_particles(), (16, 128, 128),
                   Sampling(), Augmentation())
print(time.perf_counter() - start)
"""


def set_up(source: Path, work: Path, repeats: int) -> list[tuple[str, str, str]]:
    """Open the data of one fold; the seconds are those after all imports."""
    theirs = [
        time_within(str(HERE / "published.py"), "setup", str(source), str(work / "published")) for _ in range(repeats)
    ]
    ours = [time_within("-c", SETUP, str(work / "ours")) for _ in range(repeats)]
    return [
        ("set-up of a fold, s", *(f"{statistics.median(s for s, _ in each):.2f}" for each in (theirs, ours))),
        ("its peak memory, GB", *(f"{max(m for _, m in each):.2f}" for each in (theirs, ours))),
    ]


def sample(work: Path, count: int) -> list[tuple[str, str, str]]:
    """One training tile of 16 x 128 x 128 with its target, in one thread; and batches of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()  # as 11 does on a CPU
    run = min((work / "ours/volumes/train").iterdir()).name
    dataset = TileDataset(
        [open_volume(work / "ours/volumes/train" / run)],
        [open_target(work / f"ours/heatmaps/{run}.zarr")],
        (16, 128, 128),
        Sampling(),
        Augmentation(),
    )
    seconds = []
    for key in range(count):
        start = time.perf_counter()
        dataset[key * 7 % len(dataset)]
        seconds.append(time.perf_counter() - start)
    batches = []
    for first in range(0, count, BATCH):
        start = time.perf_counter()
        dataset.__getitems__([key * 7 % len(dataset) for key in range(first, first + BATCH)])
        batches.append((time.perf_counter() - start) / BATCH)
    torch.set_num_threads(threads)
    ours = f"{1e3 * statistics.median(seconds):.1f} (mean {1e3 * statistics.mean(seconds):.1f})"
    theirs = published.time_samples(work / "published", count)
    a_second = (f"{1 / theirs:.0f}", f"{1 / statistics.median(batches):.0f}")
    return [
        ("a training sample, ms (median)", f"{1e3 * theirs:.1f}", ours),
        (f"training samples a second and core, in batches of {BATCH}", *a_second),
    ]


def peaks(repeats: int) -> tuple[str, str, str]:
    """Peaks of a (6, 184, 640, 640) heatmap with 100 particles a class and smooth noise of standard deviation 0.02."""
    shape, particles, rng = (184, 640, 640), load_particles(), np.random.default_rng(0)
    centers, channels = rng.uniform(0, shape, (600, 3)), np.repeat(np.arange(6), 100)
    sigma = np.array(particles.radii) / 2 / 10
    heatmap = torch.from_numpy(render_heatmap(centers, channels, sigma, shape, 6))
    coarse = torch.randn(1, 1, 62, 214, 214, generator=torch.Generator().manual_seed(0))
    noise = torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear")[0, 0]
    heatmap += 0.02 * noise / noise.std()
    radius = NMS_RADIUS_FACTOR * np.array(particles.radii) / 10
    theirs, ours = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        published.find_peaks(heatmap.numpy())
        middle = time.perf_counter()
        find_peaks(heatmap, radius, 0.1)
        theirs.append(middle - start)
        ours.append(time.perf_counter() - middle)
    return "peaks of (6, 184, 640, 640), s", f"{statistics.median(theirs):.2f}", f"{statistics.median(ours):.2f}"


def main() -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="czii25d-benchmark-") as name:
        work = Path(name)
        rows = prepare(arguments.input.resolve(), work, arguments.repeats)
        rows += set_up(arguments.input.resolve(), work, arguments.repeats)
        rows += sample(work, 192)
    rows.append(peaks(arguments.repeats))
    runs = len(published.run_names(arguments.input))
    print(f"{datetime.date.today()}, {os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__},")
    print(f"Python {platform.python_version()}, {runs} tomograms, median of {arguments.repeats}\n")
    print("| what | published | czii25d |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
