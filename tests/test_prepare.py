"""01, 02 and 03 on the miniature data set."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr
from hydra import compose, initialize_config_dir

from czii25d.data.targets import open_target
from czii25d.data.volumes import open_volume, read_meta
from czii25d.errors import InputError
from czii25d.heatmap import quantize
from czii25d.particles import conf_dir, load_particles
from czii25d.picks import make_picks, read_picks_csv, read_picks_json
from czii25d.pipeline.dataset import create_dataset
from czii25d.pipeline.mask import choose_sigma, create_mask, drop_outside
from czii25d.pipeline.solution import create_solution

PROJECT = Path(__file__).parents[1]
RUNS = ["TS_5_4", "TS_69_2", "TS_6_4"]
SPACING = (13.0, 11.0, 7.0)
SHAPE = (24, 40, 56)


def configure(name: str, work: Path, *overrides: str):
    with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        return compose(name, [f"paths.input={work}/input", f"paths.output={work}/output", *overrides])


def start(script: str, work: Path, *arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, str(PROJECT / script), *arguments]
    return subprocess.Popen(
        command,
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
        **options,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but those that tell the time."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and "hydra" not in file.relative_to(folder).parts and file.name != "meta.json"
    }


@pytest.fixture
def work(input_dir: Path, tmp_path: Path) -> Path:
    """A working folder in which nothing has run; its input may be changed."""
    shutil.copytree(input_dir, tmp_path / "input")
    return tmp_path


@pytest.fixture
def prepared(prepared_dir: Path, work: Path) -> Path:
    """A working folder in which 01, 02 and 03 have run; it may be changed."""
    for script, function in (("create_dataset", create_dataset), ("create_mask", create_mask)):
        function(configure(script, work))
    return work


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("czii25d"), "propagate", True)  # the scripts turn it off
    caplog.set_level(logging.INFO, "czii25d")
    return caplog


def test_volumes_of_both_splits_and_formats(prepared_dir: Path, input_dir: Path) -> None:
    volumes = prepared_dir / "output/volumes"
    assert sorted(path.name for path in (volumes / "train").iterdir()) == RUNS
    assert sorted(path.name for path in (volumes / "test").iterdir()) == ["TS_99_9"]
    for run in RUNS:
        volume = open_volume(volumes / "train" / run)
        tomogram = input_dir / "train/static/ExperimentRuns" / run / "VoxelSpacing10.000/denoised.zarr"
        raw = zarr.open_group(str(tomogram), mode="r")["0"][...].astype(float)
        np.testing.assert_allclose(volume.data, (raw - raw.mean()) / raw.std(), rtol=1e-3, atol=1e-4)
        assert volume.mean == pytest.approx(raw.mean(), rel=1e-6) and volume.std == pytest.approx(raw.std(), rel=1e-6)
        assert volume.voxel_spacing == (10.012444196428572, 10.012444196428572, 10.012444537618887)


def test_heatmaps_are_of_the_picks(prepared_dir: Path, input_dir: Path) -> None:
    for run in RUNS:
        path = prepared_dir / f"output/heatmaps/{run}.zarr"
        target = open_target(path)
        assert target.particles == load_particles() and target.shape == SHAPE and target.run == run
        assert target.sigma_angstrom["thyroglobulin"] == 65
        stored = zarr.open_group(str(path), mode="r")["0"][...]
        np.testing.assert_array_equal(stored, quantize(target.render((0, 0, 0), SHAPE)))
        for channel, name in enumerate(load_particles().names):
            locations = read_picks_json(input_dir / f"train/overlay/ExperimentRuns/{run}/Picks/{name}.json", name)
            for z, y, x in np.rint(locations[:, ::-1] / target.voxel_spacing).astype(int):
                # at most half a voxel away along each axis, at the narrowest sigma of 3 voxels
                assert stored[channel, z, y, x] >= 255 * np.exp(-3 * (0.5 / 2.99) ** 2 / 2) - 1


def test_solution_is_of_the_picks(prepared_dir: Path, input_dir: Path) -> None:
    path = prepared_dir / "output/solution.csv"
    assert path.read_text().splitlines()[0] == "id,experiment,particle_type,x,y,z"
    solution = read_picks_csv(path)
    assert solution["run"].unique().tolist() == RUNS
    for (run, name), ours in solution.groupby(["run", "particle"]):
        theirs = read_picks_json(input_dir / f"train/overlay/ExperimentRuns/{run}/Picks/{name}.json", str(name))
        np.testing.assert_allclose(ours[["x", "y", "z"]], theirs, atol=1e-3)
    assert len(solution) == 3 * 9


def test_what_is_done_is_skipped(prepared: Path, messages: pytest.LogCaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in (prepared / "output").rglob("*")}
    create_dataset(configure("create_dataset", prepared))
    create_mask(configure("create_mask", prepared))
    assert {path: path.stat().st_mtime_ns for path in (prepared / "output").rglob("*")} == before
    assert sum("was there" in message for message in messages.messages) == 4 + 3


def test_changed_tomogram_is_done_again(prepared: Path) -> None:
    tomogram = prepared / "input/train/static/ExperimentRuns/TS_6_4/VoxelSpacing10.000/denoised.zarr"
    array = zarr.open_group(str(tomogram), mode="r+")["0"]
    array[...] = array[...] * 2
    before = {run: read_meta(prepared / "output/volumes/train" / run) for run in RUNS}
    create_dataset(configure("create_dataset", prepared))
    after = {run: read_meta(prepared / "output/volumes/train" / run) for run in RUNS}
    assert after["TS_6_4"]["std"] == pytest.approx(2 * before["TS_6_4"]["std"])
    assert after["TS_5_4"] == before["TS_5_4"]


def test_damaged_volume_is_done_again(prepared: Path) -> None:
    file = prepared / "output/volumes/train/TS_6_4/volume.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    create_dataset(configure("create_dataset", prepared))
    assert file.read_bytes() == whole


@pytest.mark.parametrize("change", ["class_num=5", "heatmap.sigma=6", "heatmap.sigma_angstrom={ribosome: 60}"])
def test_changed_recipe_is_done_again(prepared: Path, change: str) -> None:
    create_mask(configure("create_mask", prepared, change))
    target = open_target(prepared / "output/heatmaps/TS_69_2.zarr")
    names = load_particles().names
    if change == "class_num=5":
        assert target.particles.names == names[:5] and target.channels.max() == 4
    elif change == "heatmap.sigma=6":
        np.testing.assert_allclose(target.sigma_voxel, 6, rtol=1e-6)
    else:
        assert target.sigma_angstrom == {p.name: p.radius / 2 for p in load_particles()} | {"ribosome": 60}
    stored = zarr.open_group(str(prepared / "output/heatmaps/TS_69_2.zarr"), mode="r")["0"][...]
    np.testing.assert_array_equal(stored, quantize(target.render((0, 0, 0), SHAPE)))


def test_moved_pick_is_done_again(prepared: Path) -> None:
    path = prepared / "input/train/overlay/ExperimentRuns/TS_5_4/Picks/ribosome.json"
    content = json.loads(path.read_text())
    content["points"] = [{"location": {"x": 300.0, "y": 200.0, "z": 100.0}}]
    path.write_text(json.dumps(content))
    create_mask(configure("create_mask", prepared))
    picks = open_target(prepared / "output/heatmaps/TS_5_4.zarr").picks()
    np.testing.assert_allclose(picks.loc[picks["particle"] == "ribosome", ["x", "y", "z"]], [(300, 200, 100)])


def test_mode_chooses_the_split(work: Path) -> None:
    create_dataset(configure("create_dataset", work, "mode=test"))
    assert [path.name for path in (work / "output/volumes").iterdir()] == ["test"]
    shutil.rmtree(work / "input/test")
    assert [volume.name for volume in create_dataset(configure("create_dataset", work))] == RUNS
    with pytest.raises(InputError, match=r"test.*no such folder"):
        create_dataset(configure("create_dataset", work, "mode=test"))
    with pytest.raises(InputError, match=r"key mode.*'valid'"):
        create_dataset(configure("create_dataset", work, "mode=valid"))


def test_further_reconstructions_lie_with_their_run(prepared: Path, messages: pytest.LogCaptureFixture) -> None:
    for run in RUNS:
        tomogram = prepared / f"input/train/static/ExperimentRuns/{run}/VoxelSpacing10.000/denoised.zarr"
        shutil.copytree(tomogram, tomogram.with_name("wbp.zarr"))
        array = zarr.open_array(str(tomogram.with_name("wbp.zarr") / "0"), mode="r+")
        array[:] = array[:][:, ::-1] * 3
    before = contents(prepared / "output/volumes")
    returned = create_dataset(configure("create_dataset", prepared, "more_reconstructions=[wbp]"))
    assert [volume.name for volume in returned] == [*RUNS, "TS_99_9"]
    after = contents(prepared / "output/volumes")
    added = {f"train/{run}/wbp/volume.npy" for run in RUNS}
    assert set(after) - set(before) == added and all(after[name] == content for name, content in before.items())
    folder = prepared / "output/volumes/train/TS_6_4"
    own, other = open_volume(folder), open_volume(folder / "wbp")
    np.testing.assert_allclose(other.data, own.data[:, ::-1], atol=2e-3)
    create_dataset(configure("create_dataset", prepared, "more_reconstructions=[wbp]"))
    assert messages.messages[-1].endswith("was there")
    with pytest.raises(InputError, match="more_reconstructions"):
        create_dataset(configure("create_dataset", prepared, "more_reconstructions=[denoised]"))


def test_02_needs_01(work: Path) -> None:
    with pytest.raises(InputError, match=r"TS_5_4.*run 01_create_dataset\.py first"):
        create_mask(configure("create_mask", work))
    assert not (work / "output").exists()


def test_03_leaves_out_what_lies_outside_the_regions(prepared: Path, messages: pytest.LogCaptureFixture) -> None:
    path = prepared / "output/solution.csv"
    create_solution(configure("create_solution", prepared))
    every = read_picks_csv(path)
    create_solution(configure("create_solution", prepared, "regions={TS_5_4: {x: [0, 300], margin: 10}}"))
    near = (every["x"] > 300 - 15.1) | (every[["x", "y", "z"]].min(axis=1) < 4.9)
    kept = every[(every["run"] != "TS_5_4") | ~near]
    assert 27 - 9 < len(kept) < 27
    pd.testing.assert_frame_equal(read_picks_csv(path), kept.reset_index(drop=True))
    assert any(message.startswith("run TS_5_4: dropped ") for message in messages.messages)


def test_03_refuses_picks_that_are_not_of_the_volume(prepared: Path) -> None:
    path = prepared / "input/train/overlay/ExperimentRuns/TS_5_4/Picks/apo-ferritin.json"
    content = json.loads(path.read_text())
    for point in content["points"]:
        point["location"] = {axis: 10 * value for axis, value in point["location"].items()}
    path.write_text(json.dumps(content))
    for name, function in (("create_solution", create_solution), ("create_mask", create_mask)):
        with pytest.raises(InputError, match=r"run TS_5_4: expected picks inside the volume.*\d+ of 9 outside"):
            function(configure(name, prepared))
    assert not (prepared / "output/solution.csv").exists()


def test_03_needs_no_tomogram(work: Path) -> None:
    for tomogram in work.glob("input/train/static/ExperimentRuns/*/*/*.zarr"):
        shutil.rmtree(tomogram)
    path = create_solution(configure("create_solution", work, "class_num=1"))
    assert set(pd.read_csv(path)["particle_type"]) == {"apo-ferritin"}


def test_commands_of_the_published_readme(work: Path, prepared_dir: Path) -> None:
    for command in (
        "01_create_dataset.py --mode train",
        "02_create_mask.py --class_num 6",
        "03_create_solution.py",
    ):
        script, *arguments = command.split()
        process = start(script, work, *arguments)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    expected = {
        name: content
        for name, content in contents(prepared_dir / "output").items()
        if not name.startswith("volumes/test")
    }
    assert contents(work / "output") == expected


def test_kill_and_start_again_is_as_if_nothing_had_happened(work: Path, prepared_dir: Path) -> None:
    for script, made in (("01_create_dataset.py", "volumes/train"), ("02_create_mask.py", "heatmaps")):
        process = start(script, work)
        deadline = time.monotonic() + 60
        while not (work / "output" / made).is_dir() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for path in (work / "output" / made).glob("[!.]*"):  # whatever is there is whole
            open_volume(path) if made.startswith("volumes") else open_target(path)
        process = start(script, work)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    expected = contents(prepared_dir / "output")
    del expected["solution.csv"]
    assert contents(work / "output") == expected


def test_no_room_is_one_line_and_leaves_nothing_behind(work: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # a volume takes 107 520 bytes

    process = start("01_create_dataset.py", work, preexec_fn=limit)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith("error: ") and "Traceback" not in errors, errors
    assert contents(work / "output") == {} and list((work / "output/volumes/train").iterdir()) == []


def test_error_is_one_line_that_names_the_file(work: Path) -> None:
    broken = work / "input/train/overlay/ExperimentRuns/TS_69_2/Picks/ribosome.json"
    broken.write_text('{"points": [')
    process = start("03_create_solution.py", work)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith("error: ") and "Traceback" not in errors, errors
    assert "TS_69_2/Picks/ribosome.json" in errors and "malformed JSON" in errors
    assert not (work / "output/solution.csv").exists()


def test_sigma_of_each_class() -> None:
    particles = load_particles().first(3)
    by_radius = {"apo-ferritin": 30, "beta-galactosidase": 45, "ribosome": 75}
    assert choose_sigma(particles, SPACING, None, {}) == by_radius
    assert choose_sigma(particles, SPACING, 6, {}) == pytest.approx(dict.fromkeys(particles.names, 62))
    assert choose_sigma(particles, SPACING, None, {"ribosome": 50.0}) == by_radius | {"ribosome": 50}
    with pytest.raises(InputError, match="did you mean 'ribosome'"):
        choose_sigma(particles, SPACING, None, {"ribosom": 50.0})
    for sigma, chosen in (
        (0, {}),
        (-1, {}),
        (float("nan"), {}),
        (None, {"ribosome": 0}),
        (None, {"ribosome": "wide"}),
    ):
        with pytest.raises(InputError, match="a number above 0"):
            choose_sigma(particles, SPACING, sigma, chosen)


def random_picks(count: int, seed: int = 0) -> np.ndarray:
    """Locations x, y, z all over a volume of SHAPE and SPACING."""
    return np.random.default_rng(seed).uniform(0, 1, (count, 3)) * (np.array(SHAPE) - 1)[::-1] * SPACING[::-1]


def test_picks_inside_stay(messages: pytest.LogCaptureFixture) -> None:
    edges = [(-0.49 * 7, 0, 0), (55.49 * 7, 39.49 * 11, 23.49 * 13)]
    picks = make_picks("TS_1", "ribosome", [*random_picks(20), *edges])
    assert drop_outside(picks, "TS_1", SPACING, SHAPE).equals(picks)
    assert not messages.messages


def test_a_few_outside_are_dropped_and_counted(messages: pytest.LogCaptureFixture) -> None:
    locations = random_picks(300)
    locations[[7, 200]] = [(-50.0, 10.0, 10.0), (10.0, 11 * 41.0, 10.0)]
    kept = drop_outside(make_picks("TS_1", "ribosome", locations), "TS_1", SPACING, SHAPE)
    np.testing.assert_array_equal(kept[["x", "y", "z"]], np.delete(locations, [7, 200], axis=0))
    assert messages.messages == ["run TS_1: dropped 2 of 300 picks, outside the volume"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p + np.array([0, 0, 250]), r"\d+ of 40 outside, the first at"),
        (lambda p: p * 10, r"\d+ of 40 outside"),
        (lambda p: p[:, ::-1], "with x and z exchanged all are inside"),
        (lambda p: p / 10, "none beyond.*if the picks are in voxels"),
    ],
    ids=["shifted", "ten times too large", "exchanged", "ten times too small"],
)
def test_picks_that_do_not_belong_to_the_volume_are_refused(change, message: str) -> None:
    locations = random_picks(40)
    locations[0] = (7 * 54, 11 * 38, 13 * 1)
    with pytest.raises(InputError, match=message) as caught:
        drop_outside(make_picks("TS_1", "ribosome", change(locations)), "TS_1", SPACING, SHAPE)
    assert "run TS_1: expected picks inside the volume, 392 x 440 x 312 angstrom" in str(caught.value)


def test_one_particle_in_a_corner_is_nothing_odd() -> None:
    picks = make_picks("TS_1", "ribosome", [(7.0, 11.0, 13.0)])
    assert len(drop_outside(picks, "TS_1", SPACING, SHAPE)) == 1
    assert len(drop_outside(picks[:0], "TS_1", SPACING, SHAPE)) == 0
