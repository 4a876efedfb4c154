"""The networks as a library: the picks of 21, from any file or an array."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import PROJECT, SPACING, write_tomogram
from test_mrc import write as write_mrc
from test_predict_score import APO, GALACTOSIDASE, MODEL, OPTIONS, PARTICLES, assert_same_picks, compose, save

import czii25d
from czii25d.data.volumes import open_volume, write_volume
from czii25d.errors import InputError
from czii25d.geometry import PUBLISHED_OFFSET_VOXEL
from czii25d.inference import predict_heatmap
from czii25d.models.checkpoint import load_checkpoint
from czii25d.picker import Picker
from czii25d.picks import read_picks_csv
from czii25d.pipeline.members import cached_graph, open_network_file
from czii25d.pipeline.predict import predict
from czii25d.runtimes.torch import TorchNetwork

SHAPES = {"TS_1": (24, 40, 56), "TS_2": (17, 33, 61), "TS_3": (20, 37, 44)}
FILES = {"TS_1": "TS_1.mrc", "TS_2": "TS_2.zarr", "TS_3": "TS_3.npy"}
LOW: dict[str, Any] = {"floor": 0.001, "thresholds": 0.2}  # for networks with random weights
NETWORKS = {
    "checkpoint": ["a.safetensors"],
    "as published": ["published.safetensors"],
    "graph": ["b.onnx"],
    "ensemble": ["a.safetensors", "b.onnx"],
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tomogram of each format, of grey values as tomograms have them, a table of them, and networks. Read-only."""
    root = tmp_path_factory.mktemp("picker")
    for seed, (run, shape) in enumerate(SHAPES.items()):
        volume = np.random.default_rng(seed).normal(1e-6, 9e-6, shape).astype(np.float32)
        match Path(FILES[run]).suffix:
            case ".mrc":
                write_mrc(root / FILES[run], volume, SPACING)
            case ".zarr":
                write_tomogram(root / FILES[run], volume)
            case _:
                np.save(root / FILES[run], volume)
    rows = [f"{run},{file},{10.02 if file.endswith('npy') else ''}" for run, file in FILES.items()]
    (root / "tomograms.csv").write_text("\n".join(["run,tomogram,voxel_spacing", *rows]))
    save(root / "a.safetensors", 1, thresholds={APO: 0.2, GALACTOSIDASE: 0.3})
    save(root / "published.safetensors", 1, normalization="global", offset_voxel=PUBLISHED_OFFSET_VOXEL)
    graph = open_network_file(save(root / "b.safetensors", 2), {})
    made = cached_graph(graph, (16, 32, 32), root / "made")
    made.rename(root / "b.onnx")
    Path(f"{made}.json").rename(root / "b.onnx.json")
    return root


def load(project: Path, *names: str, **options: Any) -> Picker:
    return Picker.load(
        [project / name for name in names or ("a.safetensors",)], **{"runtime": "torch", **LOW, **options}
    )


@pytest.mark.parametrize("names", NETWORKS.values(), ids=list(NETWORKS))
def test_the_picks_are_those_of_21(names: list[str], project: Path, tmp_path: Path) -> None:
    runtime = "auto" if "b.onnx" in names else "torch"
    checkpoints = ",".join(str(project / name) for name in names)
    overrides = [f"checkpoints=[{checkpoints}]", f"tomograms={project / 'tomograms.csv'}", f"paths.output={tmp_path}"]
    overrides += [f"infer.runtime={runtime}", "infer.floor=0.001"]
    predict(compose("predict", *overrides, "thresholds=0.2"))
    scored = read_picks_csv(tmp_path / "predictions/scored_picks.csv", scored=True)
    by_run = scored.groupby("run")["score"]
    scores = np.unique(scored["score"])
    scores = scores[(scores >= by_run.min().max()) & (scores <= by_run.max().min())]
    widest = np.diff(scores).argmax()  # the file rounds scores: none may lie at the threshold
    threshold = float(scores[widest] + scores[widest + 1]) / 2
    kept = predict(compose("predict", *overrides, f"thresholds={threshold}"))

    picker = load(project, *names, runtime=runtime, onnx_folder=tmp_path / "onnx", thresholds=threshold)
    for run, file in FILES.items():
        spacing = 10.02 if file.endswith("npy") else None
        found = picker.pick(project / file, spacing, all_scores=True)
        assert list(found.columns) == ["run", "particle", "x", "y", "z", "score"] and set(found["run"]) == {run}
        expected = scored[scored["run"] == run].reset_index(drop=True)
        assert set(expected["particle"]) == set(PARTICLES.names)
        assert_same_picks(found.astype(expected.dtypes.to_dict()), expected)
        above = picker.pick(str(project / file), spacing)
        assert 0 < len(above) == (kept["run"] == run).sum() < len(found)
        assert (above["score"] >= threshold).all() and list(above.index) == list(range(len(above)))

    array = np.load(project / "TS_3.npy")
    before = array.copy()
    from_array = picker.pick(array, [10.02, 10.02, 10.02], all_scores=True)
    assert set(from_array["run"]) == {"array"} and (array == before).all()
    pd.testing.assert_frame_equal(from_array.assign(run="TS_3"), found)
    assert set(picker.pick(array.astype(np.float64), np.float32(10.02), run="mine")["run"]) == {"mine"}


def test_the_heatmap_is_the_networks(project: Path, tmp_path: Path) -> None:
    volume = np.load(project / "TS_3.npy")
    write_volume(tmp_path / "TS_3", volume, SPACING, {})
    network, _ = load_checkpoint(project / "a.safetensors")
    expected = predict_heatmap(open_volume(tmp_path / "TS_3"), TorchNetwork(network), 2, OPTIONS).numpy()
    seen: list[tuple[int, int]] = []
    found = load(project).heatmap(volume, SPACING, progress=lambda done, of: seen.append((done, of)))
    assert found.dtype == np.float32 and found.shape == (2, *SHAPES["TS_3"])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert seen[-1][0] == seen[-1][1] > 1 and [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_defaults_are_those_of_the_configuration_and_arguments_go_before_them(project: Path) -> None:
    infer = compose("predict", "checkpoints=x").infer
    picker = Picker.load(project / "a.safetensors", runtime="torch")
    [options] = picker._plan.options
    assert (options.batch_size, options.floor, options.window) == (infer.batch_size, infer.floor, infer.window)
    assert options.tile_shape == (16, 32, 32) and options.stride == (14, 28, 28)  # an eighth overlaps
    assert picker.thresholds == {APO: 0.2, GALACTOSIDASE: 0.3}  # the checkpoint's
    assert picker.particles == PARTICLES and picker.voxel_spacing == pytest.approx(SPACING)
    options_given = {
        "tile": (16, 64, 64),
        "overlap": 0.5,
        "batch_size": 2,
        "thresholds": {APO: np.float32(0.5)},
        "nms_radius": 70,
        "tta": ["flip_x"],
        "weights": np.array([3.0, 1.0]),
        "device": torch.device("cpu"),
    }
    picker = load(project, "a.safetensors", "a.safetensors", **options_given)
    assert picker._plan.options[0] == picker._plan.options[1]
    options = picker._plan.options[0]
    assert (options.tile_shape, options.stride, options.batch_size) == ((16, 64, 64), (8, 32, 32), 2)
    assert options.nms_radius == 70 and options.floor == 0.001
    assert picker.thresholds == {APO: 0.5, GALACTOSIDASE: 0.3}
    [group] = picker._plan.groups
    assert group.predictor.views == ["flip_x"] and [member.weight for member in group.predictor.members] == [3, 1]


def test_bare_weights_are_built_from_arguments(project: Path, tmp_path: Path) -> None:
    network, _ = load_checkpoint(project / "a.safetensors")
    torch.save(network.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(InputError, match="backbone, in_channels, class_num"):
        load(tmp_path, "bare.pt")
    picker = load(tmp_path, "bare.pt", model=MODEL)
    expected = load(project, "published.safetensors").pick(project / "TS_1.mrc")
    assert len(expected) > 100
    pd.testing.assert_frame_equal(picker.pick(project / "TS_1.mrc"), expected)


def test_it_loads_within_another_programs_hydra(project: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text("mine: 3\n")
    with hydra.initialize_config_dir(str(tmp_path), job_name="theirs", version_base="1.3"):
        assert load(project).particles == PARTICLES
        assert hydra.compose("theirs").mine == 3
        assert hydra.compose("theirs", return_hydra_config=True).hydra.job.name == "theirs"


def test_the_package_offers_it_and_imports_it_late() -> None:
    assert czii25d.Picker is Picker and "Picker" in dir(czii25d)
    code = "import czii25d, sys; print('torch' in sys.modules); czii25d.Picker; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert printed.stdout.split() == ["False", "True"]


def test_a_region_and_a_least_distance(project: Path) -> None:
    picker = load(project, min_distance=60)
    spacing = np.array(SPACING)[::-1]
    every = picker.pick(project / "TS_1.mrc", all_scores=True)
    mask = np.zeros(SHAPES["TS_1"], bool)
    mask[:, :20, 10:] = True
    for region in ({"y": (0, 20 * SPACING[1]), "x": (10 * SPACING[2], None)}, {"mask": mask}):
        found = picker.pick(project / "TS_1.mrc", all_scores=True, region=region)
        index = np.floor(every[["x", "y", "z"]] / spacing + 0.5)
        expected = every[(index["y"] < 20) & (index["x"] >= 10)].reset_index(drop=True)
        assert 10 < len(expected) < len(every) / 2
        assert_same_picks(found, expected)
    picks = picker.pick(project / "TS_1.mrc")[["x", "y", "z"]].to_numpy()
    assert np.linalg.norm(picks[:, None] - picks + 1e6 * np.eye(len(picks))[..., None], axis=-1).min() > 60
    with pytest.raises(InputError, match=r"region: polygon: expected at least three corners"):
        picker.pick(project / "TS_1.mrc", region={"polygon": [(0, 0)]})


# ---- wrong on purpose ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiel": (16, 32, 32)}, r"key infer\.tiel.*did you mean 'infer\.tile'"),
        ({"model": {"backbon": "resnet18"}}, r"key model\.backbon.*did you mean 'model\.backbone'"),
        ({"overlap": "half"}, r"key infer\.overlap: expected a number such as 0\.\d+, found 'half'"),
        ({"overlap": 1.0}, r"key infer\.overlap"),
        ({"tile": (16, 32)}, r"key infer\.tile"),
        ({"tile": (16, 33, 32)}, r"key infer\.tile"),
        ({"tile": torch.zeros(3)}, r"key infer\.tile: expected text, numbers.*tensor"),
        ({"batch_size": 0}, r"key infer\.batch_size"),
        ({"precision": "fp8"}, r"key infer\.precision"),
        ({"runtime": "tensorrt"}, r"key infer\.runtime"),
        ({"device": "tpu"}, r"key infer\.device"),
        ({"device": ["cpu", "cpu"]}, r"key infer\.device: expected one device.*load a Picker for each"),
        ({"weights": [1, 1]}, r"key infer\.weights: expected 1 numbers above 0"),
        ({"tta": ["flip"]}, r"key infer\.tta"),
        ({"thresholds": "high"}, r"key thresholds"),
        ({"thresholds": {"apo-feritin": 0.3}}, "did you mean 'apo-ferritin'"),
        ({"thresholds": 0.0001}, r"key infer\.floor.*0\.0001"),
        ({"shard": "0/2"}, r"key infer\.shard: expected no key for many runs"),
    ],
)
def test_wrong_arguments_are_one_clear_line(project: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(project, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("checkpoints", ["nowhere.ckpt", [], "."])
def test_networks_that_are_not_there_are_refused(
    checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="key checkpoints"):
        Picker.load(checkpoints)
    assert not list(tmp_path.iterdir())


def a_volume(value: float | None = None) -> np.ndarray:
    volume = np.random.default_rng(0).standard_normal((20, 37, 44)).astype(np.float32)
    if value is not None:
        volume[3, 4, 5] = value
    return volume


@pytest.mark.parametrize(
    ("tomogram", "spacing", "message"),
    [
        ("TS_9.mrc", None, "TS_9.mrc.*no such file"),
        ("TS_3.npy", None, "TS_3.npy: expected a voxel spacing"),
        (a_volume(), None, "array: expected a voxel spacing, found none: arrays hold no metadata; give voxel_spacing"),
        (a_volume(), 0, "voxel spacing above 0"),
        (a_volume(), [10, 10], "voxel spacing above 0"),
        (a_volume(), 23.7, r"run array: expected the voxel spacing the network was trained on, 10\.01.*found 23\.7"),
        ("TS_1.mrc", 1, r"run TS_1: .*10\.01.*by a factor of at most 2, found 1 x 1 x 1 angstrom"),
        (a_volume()[0], 10, r"array: expected a 3D array.*found \(37, 44\)"),
        (a_volume()[:0], 10, "array: expected a 3D array.*at least one voxel"),
        (a_volume() + 0j, 10, "array: expected a 3D array of real numbers.*complex64"),
        (a_volume(np.nan), 10, "array: expected finite voxels, found 1 NaN"),
        (np.ones((20, 37, 44), np.float32), 10, "array: expected a tomogram with contrast"),
        ([[[0.0]]], 10, "tomogram: expected a path or a numpy array.*found list"),
        (torch.zeros(3, 4, 5), 10, "tomogram: expected a path or a numpy array.*found Tensor"),
    ],
)
def test_a_tomogram_that_cannot_be_picked_is_one_clear_line(
    project: Path, tomogram: Any, spacing: Any, message: str
) -> None:
    given = project / tomogram if isinstance(tomogram, str) else tomogram
    picker = load(project)
    for call in (picker.pick, picker.heatmap):
        with pytest.raises(InputError, match=message) as caught:
            call(given, spacing)
        assert "\n" not in str(caught.value)
