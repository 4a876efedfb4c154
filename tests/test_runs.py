from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from czii25d.data.runs import Run, find_picks, find_runs, read_run_picks
from czii25d.errors import InputError
from czii25d.particles import load_particles

POINTS = {
    "apo-ferritin": [(431.7, 92.3, 61.9), (123.4, 301.2, 187.6)],
    "beta-galactosidase": [(303.3, 171.8, 98.2)],
    "ribosome": [],
}
THREE = load_particles().first(3)


def make_run(
    root: Path, name: str, split: str = "train", spacing: str = "VoxelSpacing10.000", picks: bool = True
) -> None:
    (root / split / "static/ExperimentRuns" / name / spacing / "denoised.zarr").mkdir(parents=True)
    if picks:
        folder = root / split / "overlay/ExperimentRuns" / name / "Picks"
        folder.mkdir(parents=True)
        for particle, locations in POINTS.items():
            write_points(folder / f"{particle}.json", locations)


def write_points(path: Path, locations: list[tuple[float, float, float]]) -> None:
    points = [{"location": dict(zip("xyz", location, strict=True))} for location in locations]
    path.write_text(json.dumps({"points": points, "unit": "angstrom"}))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("TS_6_4", "TS_5_4", "TS_69_2", "TS_99_9"):
        make_run(tmp_path, name)
    return tmp_path


def test_runs_come_in_the_published_order(root: Path) -> None:
    (root / "train/static/ExperimentRuns/.DS_Store").touch()
    (root / "train/static/ExperimentRuns/.cache").mkdir()
    runs = find_runs(root, "train")
    assert [run.name for run in runs] == ["TS_5_4", "TS_69_2", "TS_6_4", "TS_99_9"]
    assert runs[0] == Run(
        "TS_5_4",
        "train",
        root / "train/static/ExperimentRuns/TS_5_4/VoxelSpacing10.000/denoised.zarr",
        root / "train/overlay/ExperimentRuns/TS_5_4/Picks",
    )


def test_a_test_run_has_no_picks(root: Path) -> None:
    make_run(root, "TS_1", split="test", picks=False)
    (run,) = find_runs(root, "test")
    assert run.picks_dir is None
    with pytest.raises(InputError, match=r"run TS_1: expected a folder of pick files"):
        read_run_picks(run, THREE)


def test_any_voxel_spacing_is_a_folder_and_several_need_a_choice(root: Path) -> None:
    make_run(root, "TS_7", spacing="VoxelSpacing13.480")
    assert find_runs(root, "train")[-2].tomogram.parent.name == "VoxelSpacing13.480"
    (root / "train/static/ExperimentRuns/TS_7/VoxelSpacing6.740/denoised.zarr").mkdir(parents=True)
    with pytest.raises(InputError, match=r"TS_7: expected one folder.*VoxelSpacing13.480.*voxel_spacing_folder"):
        find_runs(root, "train")
    with pytest.raises(InputError, match=r"TS_5_4: expected one folder VoxelSpacing6\.740"):
        find_runs(root, "train", voxel_spacing_folder="VoxelSpacing6.740")


def test_other_reconstructions(root: Path) -> None:
    for run in ("TS_5_4", "TS_69_2", "TS_6_4", "TS_99_9"):
        (root / f"train/static/ExperimentRuns/{run}/VoxelSpacing10.000/wbp.zarr").mkdir()
    assert find_runs(root, "train", "wbp")[0].tomogram.name == "wbp.zarr"
    with pytest.raises(InputError, match=r"TS_5_4.*found denoised, wbp \(did you mean 'denoised'\?\)"):
        find_runs(root, "train", "denoise")


def test_missing_folders_name_the_layout(root: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.*VoxelSpacing<number>/denoised\.zarr.*no such folder.*paths\.input"):
        find_runs(root / "nowhere", "train")
    (root / "test/static/ExperimentRuns").mkdir(parents=True)
    with pytest.raises(InputError, match=r"at least one run \(test/static.*found none"):
        find_runs(root, "test")


def test_run_without_tomogram_is_refused(root: Path) -> None:
    (root / "train/static/ExperimentRuns/TS_6_4/VoxelSpacing10.000/denoised.zarr").rmdir()
    with pytest.raises(InputError, match=r"run TS_6_4: expected the tomogram.*found no tomogram"):
        find_runs(root, "train")
    (root / "train/static/ExperimentRuns/TS_6_4/VoxelSpacing10.000").rmdir()
    with pytest.raises(InputError, match=r"run TS_6_4: expected one folder VoxelSpacing\*.*found none"):
        find_runs(root, "train")


def test_picks_are_read_in_channel_order(root: Path) -> None:
    picks = find_picks(root, "train", THREE)
    assert list(picks) == ["TS_5_4", "TS_69_2", "TS_6_4", "TS_99_9"]
    frame = picks["TS_6_4"]
    assert frame["particle"].tolist() == ["apo-ferritin", "apo-ferritin", "beta-galactosidase"]
    assert frame[["x", "y", "z"]].to_numpy().tolist() == [list(p) for rows in POINTS.values() for p in rows]
    assert set(frame["run"]) == {"TS_6_4"}
    assert read_run_picks(find_runs(root, "train")[2], THREE).equals(frame)


def test_unknown_pick_file_is_no_matter_and_a_missing_one_is(root: Path) -> None:
    folder = root / "train/overlay/ExperimentRuns/TS_6_4/Picks"
    (folder / "membrane.json").write_text("not even JSON")
    assert len(find_picks(root, "train", THREE)["TS_6_4"]) == 3
    (folder / "ribosome.json").unlink()
    with pytest.raises(
        InputError, match=r"run TS_6_4: expected the pick file .*ribosome\.json.*apo-ferritin.*class_num"
    ):
        find_picks(root, "train", THREE)
    assert len(find_picks(root, "train", THREE.first(2))["TS_6_4"]) == 3


def test_run_whose_picks_folder_is_missing_is_refused(root: Path) -> None:
    make_run(root, "TS_0", picks=False)
    with pytest.raises(InputError, match=r"run TS_0: expected the pick file.*found no pick file"):
        find_picks(root, "train", THREE)


def test_duplicates_are_dropped_and_counted(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = root / "train/overlay/ExperimentRuns/TS_6_4/Picks/apo-ferritin.json"
    first, near, far = (100.0, 200.0, 50.0), (100.0, 200.0004, 50.0), (100.0, 200.1, 50.0)
    write_points(path, [first, far, near, first])
    monkeypatch.setattr(logging.getLogger("czii25d"), "propagate", True)  # the scripts turn it off
    with caplog.at_level(logging.WARNING):
        frame = find_picks(root, "train", THREE.first(1))["TS_6_4"]
    np.testing.assert_array_equal(frame[["x", "y", "z"]], [first, far])
    assert caplog.messages == ["run TS_6_4: dropped 2 duplicate picks"]


def test_classes_may_share_a_place(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = root / "train/overlay/ExperimentRuns/TS_6_4/Picks/ribosome.json"
    write_points(path, POINTS["apo-ferritin"])
    assert len(find_picks(root, "train", THREE)["TS_6_4"]) == 5
    assert not caplog.messages


@pytest.mark.data
def test_real_run_is_read_as_it_is(reference_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "train").symlink_to(reference_dir / "data/real/czii_TS_5_4")
    (run,) = find_runs(tmp_path, "train")
    assert run.name == "TS_5_4"
    counts = read_run_picks(run, load_particles())["particle"].value_counts().to_dict()
    assert counts == {
        "apo-ferritin": 46,
        "thyroglobulin": 30,
        "ribosome": 31,
        "beta-galactosidase": 12,
        "virus-like-particle": 11,
        "beta-amylase": 10,
    }
