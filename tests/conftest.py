"""A miniature competition data set, made on the spot, and the paths of what lies beside the project."""

from __future__ import annotations

import faulthandler
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import settings

import czii25d  # noqa: F401  # before pandas: it keeps a thread of pyarrow's from being started, here too

settings.register_profile("no deadline", deadline=None)  # tests are not timed: a busy machine fails good code
settings.load_profile("no deadline")

PROJECT = Path(__file__).parents[1]
SPACING = (10.012444196428572, 10.012444196428572, 10.012444537618887)  # z, y, x angstrom, as the competition states
SHAPE = (24, 40, 56)
# x, y, z in angstrom; nothing symmetric, so that a swapped axis shows
POINTS = {
    "apo-ferritin": [(431.7, 92.3, 61.9), (123.4, 301.2, 187.6), (77.0, 61.5, 101.1)],
    "beta-galactosidase": [(303.3, 171.8, 98.2)],
    "ribosome": [(205.5, 266.6, 122.2), (487.1, 333.0, 40.4)],
    "thyroglobulin": [(99.9, 188.8, 55.5)],
    "virus-like-particle": [(401.0, 219.0, 171.0)],
    "beta-amylase": [(260.6, 60.2, 30.3)],
}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error: object) -> None:
    """Say how a worker of pytest-xdist ended that crashed: minus the signal that it was killed by, or its status."""
    if error:
        with suppress(subprocess.TimeoutExpired):
            print(f"worker {node.gateway.id}: exit status {node.gateway._io.popen.wait(20)}")


@pytest.fixture(autouse=True)
def a_crash_would_be_told(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test that switches off what tells where a worker crashes."""
    yield
    assert faulthandler.is_enabled() or not request.config.pluginmanager.has_plugin("faulthandler")


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """The reference data beside the project, or a skip that says so."""
    path = PROJECT.parent / "shared"
    if not (path / "reference").is_dir():
        pytest.skip("the reference data (../shared) is not here")
    return path


def write_tomogram(path: Path, volume: np.ndarray, zarr_format: int = 2, spacing=SPACING) -> None:
    """Write an OME-Zarr tomogram of that Zarr format, as an outsider would."""
    group = zarr.create_group(str(path), zarr_format=zarr_format, overwrite=True)
    extra = {"chunk_key_encoding": {"name": "v2", "separator": "/"}} if zarr_format == 2 else {}
    array = group.create_array("0", shape=volume.shape, chunks=(16, 32, 32), dtype="float32", **extra)
    array[:] = volume
    multiscales = [
        {
            "axes": [{"name": n, "type": "space", "unit": "angstrom"} for n in "zyx"],
            "datasets": [
                {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": list(spacing)}]},
            ],
            "name": "/",
            "version": "0.4" if zarr_format == 2 else "0.5",
        }
    ]
    if zarr_format == 2:
        group.attrs["multiscales"] = multiscales
    else:
        group.attrs["ome"] = {"version": "0.5", "multiscales": multiscales}


def write_picks(folder: Path, run: str, points: dict[str, list[tuple[float, float, float]]]) -> None:
    """Write the competition's pick files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, locations in points.items():
        entries = [{"location": dict(zip("xyz", p, strict=True)), "instance_id": 0} for p in locations]
        content = {"pickable_object_name": name, "run_name": run, "unit": "angstrom", "points": entries}
        (folder / f"{name}.json").write_text(json.dumps(content))


def make_run(root: Path, run: str, seed: int, split: str = "train", zarr_format: int = 2, shape=SHAPE) -> None:
    """Add a run of dark blobs in noise; its picks are the planted positions, moved a little by ``seed``."""
    rng = np.random.default_rng(seed)
    volume = 0.3 * rng.standard_normal(shape).astype(np.float32)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    points = {name: [tuple(np.add(p, rng.uniform(-8, 8, 3))) for p in rows] for name, rows in POINTS.items()}
    for width, rows in enumerate(points.values(), start=2):
        for x, y, z in rows:
            center = np.array([z, y, x]) / SPACING
            volume -= 3 * np.exp(-((grid - center) ** 2).sum(-1) / (2 * width**2)).astype(np.float32)
    volume = volume * np.float32(7.199929e-06) + np.float32(5.2577832e-08)
    write_tomogram(
        root / split / "static/ExperimentRuns" / run / "VoxelSpacing10.000/denoised.zarr", volume, zarr_format
    )
    if split == "train":
        write_picks(root / "train/overlay/ExperimentRuns" / run / "Picks", run, points)


@pytest.fixture(scope="session")
def input_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three training runs (one of them Zarr v3) and a test run. Read-only: copy it to change it."""
    root = tmp_path_factory.mktemp("data") / "input"
    for seed, run in enumerate(("TS_5_4", "TS_69_2", "TS_6_4")):
        make_run(root, run, seed, zarr_format=3 if run == "TS_69_2" else 2)
    make_run(root, "TS_99_9", 9, split="test")
    return root


def run_script(name: str, *overrides: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a numbered script as a user would; with ``check`` it must succeed."""
    result = subprocess.run(
        [sys.executable, str(PROJECT / name), *overrides], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="session")
def prepared_dir(input_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which 01, 02 and 03 have run. Read-only: copy it to change it."""
    cwd = tmp_path_factory.mktemp("work")
    (cwd / "input").symlink_to(input_dir)
    for script in ("01_create_dataset.py", "02_create_mask.py", "03_create_solution.py"):
        run_script(script, cwd=cwd)
    return cwd
