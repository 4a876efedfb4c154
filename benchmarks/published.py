"""The published data path, written anew from its description, so that ours can be timed beside it.

The 4th place's procedure (github.com/yu4u/kaggle-czii-4th): every volume as float32 .npy; a (D, H, W, 6) uint8 mask
per run, painted with one 45-voxel Gaussian patch of sigma 6 for every class at ``int(angstrom / spacing + 1)``; the
data module holds all volumes and all masks as zero-padded float32; a sample is cut and sent through albumentations
with its slices as channels; peaks are scipy's 3-voxel maximum filter above 0.1, class by class.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import zarr
from scipy import ndimage

NAMES = ("apo-ferritin", "beta-galactosidase", "ribosome", "thyroglobulin", "virus-like-particle", "beta-amylase")
SPACING, MEAN, STD = 10.012444, 5.2577832e-08, 7.199929e-06


def run_names(source: Path) -> list[str]:
    return sorted(path.name for path in (source / "train/static/ExperimentRuns").iterdir())


def centers(source: Path, run: str, name: str) -> np.ndarray:
    picks = json.loads((source / f"train/overlay/ExperimentRuns/{run}/Picks/{name}.json").read_text())
    return np.array([[point["location"][axis] for axis in "zyx"] for point in picks["points"]]).reshape(-1, 3)


def create_dataset(source: Path, target: Path) -> None:
    for run in run_names(source):
        path = source / f"train/static/ExperimentRuns/{run}/VoxelSpacing10.000/denoised.zarr"
        np.save(target / f"{run}.npy", zarr.open_group(str(path), mode="r")["0"][:])


def create_mask(source: Path, target: Path) -> None:
    axis = np.arange(-22, 23)
    line = np.exp(-(axis**2) / (2 * 6.0**2))
    patch = (255 * line[:, None, None] * line[:, None] * line).astype(np.uint8)
    for run in run_names(source):
        shape = np.load(target / f"{run}.npy", mmap_mode="r").shape
        mask = np.zeros((*shape, len(NAMES)), np.uint8)
        for channel, name in enumerate(NAMES):
            for center in (centers(source, run, name) / SPACING + 1).astype(int):
                low, high = np.maximum(center - 22, 0), np.minimum(center + 23, shape)
                inside = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
                cut = tuple(slice(a - c + 22, b - c + 22) for a, b, c in zip(low, high, center, strict=True))
                np.maximum(mask[inside][..., channel], patch[cut], out=mask[inside][..., channel])
        np.save(target / f"{run}_mask.npy", mask)


def create_solution(source: Path, target: Path) -> None:
    lines = ["id,experiment,particle_type,x,y,z"]
    for run in run_names(source):
        for name in NAMES:
            lines += [f"{len(lines) - 1},{run},{name},{x},{y},{z}" for z, y, x in centers(source, run, name)]
    (target / "solution.csv").write_text("\n".join(lines))


def prepare(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    create_dataset(source, target)
    create_mask(source, target)
    create_solution(source, target)


def load_run(mask_path: Path) -> tuple[np.ndarray, np.ndarray]:
    volume = (np.load(str(mask_path).replace("_mask", "")) - MEAN) / STD
    pad = [(0, 0)] + [(0, -side % 32) for side in volume.shape[1:]]
    mask = np.load(mask_path).astype(np.float32) / 255
    return np.pad(volume, pad), np.pad(mask, [*pad, (0, 0)])


def load_all(target: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    return [load_run(path) for path in sorted(target.glob("*_mask.npy"))]


def time_samples(target: Path, count: int) -> float:
    import albumentations as A

    volume, mask = load_run(min(target.glob("*_mask.npy")))
    augment = A.Compose(
        [
            A.ShiftScaleRotate(shift_limit=0.05, scale_limit=0.1, rotate_limit=180, border_mode=0, p=0.5),
            A.HorizontalFlip(p=0.5),
            A.RandomBrightnessContrast(brightness_limit=0.3, contrast_limit=0.3, p=0.3),
        ]
    )
    rng = np.random.default_rng(0)
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        z, y, x = (int(rng.integers(n - t + 1)) for n, t in zip(volume.shape, (16, 128, 128), strict=True))
        image = volume[z : z + 16, y : y + 128, x : x + 128].transpose(1, 2, 0)
        heat = mask[z : z + 16, y : y + 128, x : x + 128].transpose(1, 2, 0, 3).reshape(128, 128, -1)
        out = augment(image=np.ascontiguousarray(image), mask=np.ascontiguousarray(heat))
        np.ascontiguousarray(out["image"].transpose(2, 0, 1))
        np.ascontiguousarray(out["mask"].reshape(128, 128, 16, -1).transpose(3, 2, 0, 1))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def find_peaks(heatmap: np.ndarray) -> list[np.ndarray]:
    """Peaks of a (C, D, H, W) prediction."""
    found = []
    for plane in heatmap:
        maximum = ndimage.maximum_filter(plane, size=3)
        found.append(np.argwhere((plane == maximum) & (plane >= 0.1)))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["prepare", "setup"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    if arguments.step == "prepare":
        prepare(arguments.source, arguments.target)
    else:
        start = time.perf_counter()
        load_all(arguments.target)
        print(time.perf_counter() - start)
