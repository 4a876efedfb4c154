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
from pathlib import Path

import numpy as np

from czii25d.data.volumes import write_volume

PROJECT = Path(__file__).parents[1]
SHAPES = ((184, 630, 630), (368, 630, 630), (368, 1260, 1260))
SPACING = (10.012, 10.012, 10.012)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("override", nargs="*")
    arguments = parser.parse_args()
    print(f"{datetime.date.today()}, {os.cpu_count()} cores ({platform.machine()})\n")
    print("| tomogram | voxels, millions | peak host memory of 21, GB | s |\n|---|---|---|---|")
    rng = np.random.default_rng(0)
    for shape in ((16, 128, 128), *SHAPES):
        with tempfile.TemporaryDirectory(prefix="czii25d-benchmark-") as name:
            noise = np.broadcast_to(rng.standard_normal(shape[1:], np.float32), shape)  # takes no memory itself
            write_volume(Path(name) / "output/volumes/test/TS_1", noise, SPACING, {})
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
