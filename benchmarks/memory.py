"""Peak memory of 21 on tomograms of several sizes; the network is a trained checkpoint.

python benchmarks/memory.py CHECKPOINT [OVERRIDE ...]
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from czii25d.data.volumes import write_volume

PROJECT = Path(__file__).parents[1]
SHAPES = ((184, 630, 630), (368, 630, 630), (368, 1260, 1260))
SPACING = (10.012, 10.012, 10.012)


class Noise(Sequence):
    """A volume of noise that takes no memory itself; each plane is drawn when it is asked for."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, z: int) -> np.ndarray:
        if z >= len(self):
            raise IndexError(z)
        return np.random.default_rng(z).standard_normal(self.shape[1:], np.float32)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("override", nargs="*")
    arguments = parser.parse_args()
    print(f"{datetime.date.today()}, {os.cpu_count()} cores ({platform.machine()})\n")
    print("| tomogram | voxels, millions | peak host memory of 21, GB | s |\n|---|---|---|---|")
    for shape in ((16, 128, 128), *SHAPES):
        with tempfile.TemporaryDirectory(prefix="czii25d-benchmark-") as name:
            write_volume(Path(name) / "output/volumes/test/TS_1", Noise(shape), SPACING, {})
            command = [sys.executable, str(PROJECT / "21_predict.py"), f"checkpoints={arguments.checkpoint.resolve()}"]
            start = time.perf_counter()
            process = subprocess.Popen([*command, *arguments.override], cwd=name, stderr=subprocess.PIPE, text=True)
            assert process.stderr is not None
            printed = process.stderr.read()
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise SystemExit(printed)
        seconds = time.perf_counter() - start
        size = " x ".join(map(str, shape))
        print(f"| {size} | {np.prod(shape) / 1e6:.0f} | {usage.ru_maxrss / 2**20:.2f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
