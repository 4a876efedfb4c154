"""21 and 22: from checkpoints and volumes to a submission and its score."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from conftest import PROJECT, SPACING, run_script
from omegaconf import DictConfig
from safetensors.torch import save_file

from czii25d.data.predictions import read_predictions
from czii25d.data.volumes import open_volume, write_volume
from czii25d.errors import InputError
from czii25d.geometry import PUBLISHED_OFFSET_VOXEL
from czii25d.inference import Ensemble, InferenceOptions, Member, pick_volume, predict_heatmap
from czii25d.metrics import DEFAULT_THRESHOLD, score
from czii25d.models import create_model
from czii25d.models.checkpoint import ModelCard, load_checkpoint, save_weights
from czii25d.particles import ParticleSet, conf_dir, load_particles
from czii25d.picks import concat_picks, make_picks, read_picks_csv, write_solution_csv, write_submission_csv
from czii25d.pipeline import predict as predict_module
from czii25d.pipeline.members import find_network_files
from czii25d.pipeline.predict import predict
from czii25d.pipeline.score import score_submission
from czii25d.runtimes.torch import TorchNetwork

MODEL: dict[str, Any] = {
    "arch": "timm3d3",
    "backbone": "test_convnext",
    "in_channels": 3,
    "class_num": 2,
    "img_depth": 16,
    "img_size": 32,
    "decoder_channels": [16, 12, 8],
}
PARTICLES = load_particles().first(2)
APO, GALACTOSIDASE = PARTICLES.names
RUNS = {"TS_1": (24, 40, 56), "TS_2": (17, 33, 61)}
FLOOR = "infer.floor=0.001"  # below what a network with random weights gives
OPTIONS = InferenceOptions((16, 32, 32), (12, 24, 24), floor=0.001)
LOW = "thresholds=0.2"


def save(path: Path, seed: int, particles: ParticleSet = PARTICLES, **card: Any) -> Path:
    """Write a network with random weights."""
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {"particles": particles.to_config(), "voxel_spacing": SPACING}
    save_weights(path, create_model(**MODEL, pretrained=False), ModelCard(model=MODEL, **{**defaults, **card}))
    return path


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prepared volumes and two checkpoints. Read-only."""
    root = tmp_path_factory.mktemp("predict")
    for seed, (run, shape) in enumerate(RUNS.items()):
        volume = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        write_volume(root / "output/volumes/test" / run, volume, SPACING, {"seed": seed})
    save(root / "folds/a.safetensors", 1)
    save(root / "folds/b.safetensors", 2)
    return root


@pytest.fixture
def work(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compose(name: str, *overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        return hydra.compose(name, [*overrides])


def run_predict(*overrides: str) -> pd.DataFrame:
    return predict(compose("predict", "checkpoints=folds/a.safetensors", "infer.runtime=torch", FLOOR, LOW, *overrides))


def expected_picks(work: Path, *names: str) -> pd.DataFrame:
    """Pick with the functions of the package, without the script."""
    members, cards = zip(*(load_checkpoint(work / "folds" / name) for name in names), strict=True)
    frames = []
    for run in RUNS:
        volume = open_volume(work / "output/volumes/test" / run)
        picks = pick_volume(
            volume,
            Ensemble([Member(TorchNetwork(member)) for member in members]),
            PARTICLES,
            OPTIONS,
            volume.voxel_spacing,
            cards[0].offset_voxel,
        )
        frames.append(picks.assign(run=run))
    return concat_picks(frames, scored=True)


def assert_same_picks(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one, other, check_dtype=False, check_exact=False, atol=2e-3, rtol=0)


# ---- 21 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checkpoints", "members"),
    [
        ("folds/b.safetensors", ["b.safetensors"]),
        ("[folds/a.safetensors,folds/b.safetensors]", ["a.safetensors", "b.safetensors"]),
        ("folds", ["a.safetensors", "b.safetensors"]),
    ],
)
def test_one_or_several_checkpoints_are_predicted(work: Path, checkpoints: str, members: list[str]) -> None:
    kept = run_predict(f"checkpoints={checkpoints}")
    folder = work / "output/predictions"
    scored = read_picks_csv(folder / "scored_picks.csv", scored=True)
    expected = expected_picks(work, *members)
    assert_same_picks(scored, expected)
    assert set(expected["particle"]) == set(PARTICLES.names) and set(expected["run"]) == set(RUNS)
    submission = pd.read_csv(folder / "submission.csv")
    assert list(submission.columns) == ["id", "experiment", "particle_type", "x", "y", "z"]
    assert 0 < len(submission) == len(kept) == (scored["score"] >= 0.2).sum() < len(scored)


def test_members_with_other_orders_of_channels_are_aligned(work: Path) -> None:
    swapped = ParticleSet([PARTICLES[1], PARTICLES[0]])
    save(work / "folds/swapped.safetensors", 1, swapped)
    run_predict("checkpoints=[folds/swapped.safetensors,folds/swapped.safetensors]")
    alone = read_picks_csv(work / "output/predictions/scored_picks.csv", scored=True)
    run_predict("checkpoints=[folds/b.safetensors,folds/swapped.safetensors]", "predictions=mixed")
    mixed = read_picks_csv(work / "mixed/scored_picks.csv", scored=True)
    net_b, net_swapped = (load_checkpoint(work / f"folds/{name}.safetensors")[0] for name in ("b", "swapped"))
    volume = open_volume(work / "output/volumes/test/TS_1")
    predictor = Ensemble([Member(TorchNetwork(net_b)), Member(TorchNetwork(net_swapped), [1, 0])])
    expected = pick_volume(volume, predictor, PARTICLES, OPTIONS, SPACING).assign(run="TS_1")
    assert_same_picks(mixed[mixed["run"] == "TS_1"].reset_index(drop=True), expected)
    assert not mixed.equals(alone)


def test_the_offset_of_a_published_checkpoint_is_applied(work: Path) -> None:
    save(work / "folds/published.safetensors", 1, offset_voxel=PUBLISHED_OFFSET_VOXEL)
    run_predict()
    ours = read_picks_csv("output/predictions/scored_picks.csv", scored=True)
    run_predict("checkpoints=folds/published.safetensors", "predictions=other")
    theirs = read_picks_csv("other/scored_picks.csv", scored=True)
    shift = theirs[["x", "y", "z"]].to_numpy() - ours[["x", "y", "z"]].to_numpy()
    np.testing.assert_allclose(shift, np.tile(np.array(SPACING)[::-1] * -0.5, (len(ours), 1)), atol=2e-3)


def test_bare_weights_are_predicted_with_keys_of_the_model(work: Path) -> None:
    net, _ = load_checkpoint("folds/a.safetensors")
    save_file(dict(net.state_dict()), "bare.safetensors")
    with pytest.raises(InputError, match="backbone, in_channels, class_num"):
        run_predict("checkpoints=bare.safetensors")
    keys = [f"model.{key}={str(value).replace(' ', '')}" for key, value in MODEL.items()]
    assert len(run_predict("checkpoints=bare.safetensors", *keys))


def test_what_it_takes_to_show_picks_is_kept_and_a_second_call_keeps_the_times(work: Path) -> None:
    run_predict("runs=TS_1")
    first = read_predictions("output/predictions")
    assert first.particles == PARTICLES and first.thresholds == dict.fromkeys(PARTICLES.names, 0.2)
    assert list(first.runs) == ["TS_1"] and first.networks == ["folds/a.safetensors"]
    volume = first.runs["TS_1"].open()
    assert volume.shape == RUNS["TS_1"] and volume.voxel_spacing == SPACING
    effort = first.runs["TS_1"].effort
    assert effort is not None and effort.seconds["predict"] > 0 and effort.tiles > 0 and effort.memory_gb > 0
    run_predict("thresholds=0.3")
    second = read_predictions("output/predictions")
    assert second.runs["TS_1"].effort == effort and set(second.thresholds.values()) == {0.3}
    assert list(second.runs) == list(RUNS) and second.runs["TS_2"].effort != effort
    for path in Path("output/predictions/runs").glob("*.json"):  # a version before this one
        path.unlink()
    run_predict()
    assert read_predictions("output/predictions").runs["TS_1"].effort is None


def test_what_is_done_is_not_done_again_and_an_interruption_changes_nothing(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_predict()
    whole = {path.name: path.read_bytes() for path in Path("output/predictions").glob("*.csv")}
    picked, pick_run = [], predict_module.pick_run

    def interrupted(plan: Any, source: Any, *rest: Any) -> Any:
        picked.append(source.name)
        if len(picked) == 2:
            raise KeyboardInterrupt
        return pick_run(plan, source, *rest)

    monkeypatch.setattr(predict_module, "pick_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_predict("predictions=again")
    assert not list(Path("again").glob("*.csv")) and picked == ["TS_1", "TS_2"]
    run_predict("predictions=again")
    assert picked == ["TS_1", "TS_2", "TS_2"]
    run_predict("predictions=again", "thresholds=0.3", "infer.batch_size=1")
    assert picked == ["TS_1", "TS_2", "TS_2"]  # thresholds need no new prediction
    run_predict("predictions=again")
    assert {path.name: path.read_bytes() for path in Path("again").glob("*.csv")} == whole
    shutil.copy("folds/b.safetensors", "folds/a.safetensors")
    run_predict("predictions=again", "runs=TS_1")
    assert picked[3:] == ["TS_1"]  # other weights under the same name do


def test_thresholds_are_the_keys_else_the_checkpoints_mean_else_the_default(
    work: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = [
        ModelCard(MODEL, PARTICLES.to_config(), thresholds=thresholds)
        for thresholds in ({APO: 0.2, GALACTOSIDASE: 0.5}, {APO: 0.4}, None)
    ]
    choose = predict_module.choose_thresholds
    assert choose(None, cards, PARTICLES) == pytest.approx({APO: 0.3, GALACTOSIDASE: 0.5})
    assert choose(0.7, cards, PARTICLES) == {APO: 0.7, GALACTOSIDASE: 0.7}
    assert choose({APO: 0.9}, cards, PARTICLES) == {APO: 0.9, GALACTOSIDASE: 0.5}
    monkeypatch.setattr(predict_module.logger.parent, "propagate", True)
    with caplog.at_level("INFO"):
        assert choose(None, cards[1:], PARTICLES)[GALACTOSIDASE] == DEFAULT_THRESHOLD
    assert len(caplog.messages) == 1 and GALACTOSIDASE in caplog.messages[0] and APO not in caplog.messages[0]
    for wrong in ({"apo": 0.1}, "high", {APO: "high"}):
        with pytest.raises(InputError):
            choose(wrong, cards, PARTICLES)


def test_the_nms_radius_of_the_checkpoint_holds_unless_the_key_says_otherwise(work: Path) -> None:
    save(work / "folds/a.safetensors", 1, nms_radius={APO: 200.0, GALACTOSIDASE: 200.0})
    few, more = run_predict(), run_predict("infer.nms_radius=20")
    assert 0 < len(few) < len(more)


def test_a_folder_of_trainings_gives_the_best_of_each(tmp_path: Path) -> None:
    for name in ("fold_a/best.ckpt", "fold_a/last.ckpt", "fold_b/best.ckpt", "fold_b/config.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_network_files(str(tmp_path))
    assert [str(path.relative_to(tmp_path)) for path in found] == ["fold_a/best.ckpt", "fold_b/best.ckpt"]
    assert find_network_files(str(tmp_path / "fold_a")) == [tmp_path / "fold_a/best.ckpt"]


def test_a_soup_beside_trainings_does_not_stand_for_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/best.ckpt", "b/best.ckpt", "unfinished/last.ckpt", "soup/soup.safetensors", "old_soup.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(predict_module.logger.parent, "propagate", True)
    assert find_network_files(str(tmp_path)) == [tmp_path / "a/best.ckpt", tmp_path / "b/best.ckpt"]
    assert "without unfinished, which has no best.ckpt" in caplog.text
    assert find_network_files(str(tmp_path / "soup")) == [tmp_path / "soup/soup.safetensors"]
    assert find_network_files(str(tmp_path / "unfinished")) == [tmp_path / "unfinished/last.ckpt"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoints=nowhere.ckpt"], "key checkpoints.*none at nowhere.ckpt"),
        (["checkpoints=[]"], "key checkpoints"),
        (["split=train"], "01_create_dataset.py"),
        (["runs=[TS_1,TS_3]"], "key runs.*TS_3"),
        (["infer.stride=[0,8,8]"], "infer.stride"),
        (["infer.tile=[16,32]"], "infer.tile"),
        (["infer.overlap=1"], "infer.overlap"),
        (["infer.window=hann"], "infer.window"),
        (["infer.device=tpu"], "infer.device"),
        (["infer.precision=fp8"], "infer.precision"),
        (["infer.floor=0.5"], "infer.floor.*0.2"),
        (["thresholds={apo-feritin: 0.3}"], "did you mean 'apo-ferritin'"),
    ],
)
def test_bad_keys_are_one_clear_line_and_leave_nothing(work: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_predict(*overrides)
    assert not (work / "output/predictions").exists()


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"offset_voxel": -0.5}, "offset_voxel"),
        ({"normalization": "global"}, "normalization"),
        ({"particles": load_particles()[1:3]}, "particles"),
    ],
)
def test_members_that_contradict_each_other_are_refused(work: Path, card: dict[str, Any], message: str) -> None:
    save(work / "folds/c.safetensors", 3, **card)
    with pytest.raises(InputError, match=f"c.safetensors.*{message}"):
        run_predict("checkpoints=[folds/a.safetensors,folds/c.safetensors]")


def test_a_run_that_cannot_be_picked_does_not_stop_the_others(work: Path) -> None:
    volume = np.random.default_rng(0).standard_normal((20, 33, 34)).astype(np.float32)
    write_volume("output/volumes/test/TS_0", volume, (10.0, 2.8, 10.0), {})
    with pytest.raises(InputError, match=r"1 of 3 runs.*TS_0.*10.01.*2.8.*start the same command again"):
        run_predict()
    assert set(read_picks_csv("output/predictions/submission.csv")["run"]) == {"TS_1", "TS_2"}
    with pytest.raises(InputError, match=r"1 of 1 runs.*TS_0"):
        run_predict("runs=[TS_0]", "predictions=none")
    assert not Path("none/submission.csv").exists()


def test_a_network_that_gives_nan_is_said_to(work: Path) -> None:
    net, card = load_checkpoint("folds/a.safetensors")
    list(net.parameters())[-1].data.fill_(float("nan"))
    save_weights("folds/a.safetensors", net, card)
    with pytest.raises(InputError, match=r"TS_1.*NaN"):
        run_predict()


def results(folder: str = "output/predictions") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).rglob("*.csv"))}


def test_shards_find_together_what_one_process_finds(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_predict()
    assert run_predict("predictions=shared", "infer.shard=1/2").empty
    assert not Path("shared/submission.csv").exists() and len(results("shared")) == 1
    assert len(run_predict("predictions=shared", "infer.shard=0/2"))
    assert results("shared") == results()


def test_two_processes_find_what_one_finds(work: Path) -> None:
    run_predict()
    keys = "checkpoints=folds/a.safetensors", "infer.runtime=torch", FLOOR, LOW, "predictions=two"
    run_script("21_predict.py", *keys, "infer.device=[cpu,cpu]", cwd=work)
    assert results("two") == results()


def test_an_error_in_a_process_of_several_is_one_line(work: Path) -> None:
    keys = "checkpoints=folds/a.safetensors", "infer.runtime=torch", "infer.device=[cpu,tpu]", FLOOR, LOW
    result = run_script("21_predict.py", *keys, cwd=work, check=False)
    assert result.returncode == 2 and "infer.device" in result.stderr and "Traceback" not in result.stderr


def test_a_killed_run_goes_on_and_ends_with_the_same_files(work: Path) -> None:
    for number in range(3, 7):
        shutil.copytree("output/volumes/test/TS_1", f"output/volumes/test/TS_{number}")
    run_predict()
    command = [sys.executable, str(PROJECT / "21_predict.py"), "checkpoints=folds/a.safetensors", "infer.runtime=torch"]
    command += [FLOOR, LOW, "predictions=killed"]
    process = subprocess.Popen(command, cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(Path("killed/runs").glob("*.csv"))) < 2:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert 2 <= len(list(Path("killed/runs").glob("*.csv"))) and not Path("killed/submission.csv").exists()
    subprocess.run(command, cwd=work, check=True, capture_output=True)
    assert results("killed") == results()


def test_tomograms_are_picked_without_01_as_with_it(work: Path, input_dir: Path) -> None:
    keys = f"paths.input={input_dir}", "split=train"
    run_script("01_create_dataset.py", keys[0], "mode=train", cwd=work)
    run_predict(*keys)
    run_predict(*keys, "source=tomograms", "predictions=straight")
    assert results("straight") == results() and len(results()) > 2
    assert not list(Path("straight/.volumes").iterdir())
    shutil.rmtree("output/volumes/train")
    run_predict(*keys, "predictions=auto")
    assert results("auto") == results()


def test_tomograms_of_any_folder_are_picked(work: Path) -> None:
    volume = open_volume("output/volumes/test/TS_1")
    Path("mine").mkdir()
    np.save("mine/TS_1.npy", volume.planes(0, volume.shape[0]) * 5 + 3)
    spacing = f"voxel_spacing=[{','.join(map(str, SPACING))}]"
    expected = run_predict("runs=TS_1")
    found = run_predict("tomograms=mine", spacing, "predictions=other")
    assert len(found) == len(expected) > 100
    np.testing.assert_allclose(found[["x", "y", "z"]], expected[["x", "y", "z"]], atol=0.5)  # rounded once more
    Path("mine/bad.npy").write_bytes(b"no array")
    with pytest.raises(InputError, match=r"1 of 2 runs.*bad\.npy"):
        run_predict("tomograms=mine", spacing, "predictions=again")
    assert set(read_picks_csv("again/submission.csv")["run"]) == {"TS_1"}


def test_picks_outside_their_regions_are_dropped_and_counted(
    work: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_predict()
    whole = read_picks_csv("output/predictions/scored_picks.csv", scored=True)
    end, margin = 20 * SPACING[1], 25.0
    Path("regions.yaml").write_text(f"TS_1: {{y: [0, {end}], margin: {margin}}}")
    monkeypatch.setattr(predict_module.logger.parent, "propagate", True)
    picked, pick_run = [], predict_module.pick_run
    monkeypatch.setattr(predict_module, "pick_run", lambda *rest: picked.append(rest[1].name) or pick_run(*rest))
    with caplog.at_level("INFO"):
        kept = run_predict("regions=regions.yaml")
    assert picked == ["TS_1"], "a run without a region is not picked again"
    scored = read_picks_csv("output/predictions/scored_picks.csv", scored=True)
    low = -0.5 * np.array(SPACING)[::-1] + margin
    high = (np.array([56, 20, 24]) - 0.5) * np.array(SPACING)[::-1] - margin
    inside = ((whole[["x", "y", "z"]] > low) & (whole[["x", "y", "z"]] < high)).all(axis=1) | (whole["run"] == "TS_2")
    assert_same_picks(scored, whole[inside].reset_index(drop=True))
    assert 0 < (scored["run"] == "TS_1").sum() < (whole["run"] == "TS_1").sum() / 2
    assert len(kept) == (scored["score"] >= 0.2).sum()
    [said] = [message for message in caplog.messages if "dropped" in message]
    assert said.startswith("TS_1: dropped ") and "outside the region" in said and "within 25 angstrom" in said
    run_predict(f"regions={{TS_1: {{y: [0, {end}], margin: 5}}}}")
    assert picked == ["TS_1"], "another margin needs no new prediction"
    with pytest.raises(InputError, match=r"1 of 2 runs.*key regions: TS_1: y: expected a range within 0 to"):
        run_predict("regions={TS_1: {y: [7000, 8000]}}")


def test_of_picks_too_near_each_other_the_best_is_submitted(work: Path) -> None:
    every = run_predict()
    kept = run_predict("infer.min_distance=90")
    between = [
        np.linalg.norm(own[["x", "y", "z"]].to_numpy()[:, None] - own[["x", "y", "z"]].to_numpy(), axis=-1)
        for _, own in kept.groupby("run")
    ]
    assert min(np.min(each + 1e6 * np.eye(len(each))) for each in between) > 90
    assert 20 < len(kept) < len(every) and kept["particle"].nunique() == 2
    assert len(read_picks_csv("output/predictions/scored_picks.csv", scored=True)) > len(every)
    with pytest.raises(InputError, match=r"key infer\.min_distance"):
        run_predict("infer.min_distance=-1")


def test_heatmaps_are_kept_on_request(work: Path) -> None:
    run_predict("infer.save_heatmaps=true", "runs=TS_2")
    group = zarr.open_group("output/predictions/heatmaps/TS_2.zarr", mode="r")
    net, _ = load_checkpoint("folds/a.safetensors")
    volume = open_volume("output/volumes/test/TS_2")
    expected = predict_heatmap(volume, TorchNetwork(net), 2, OPTIONS).clamp(0, 1).numpy()
    assert group["0"].shape == expected.shape
    np.testing.assert_allclose(group["0"][...] / 255, expected, atol=1 / 255)
    assert [channel["label"] for channel in group.attrs["omero"]["channels"]] == list(PARTICLES.names)


def test_a_compiled_network_gives_the_same_picks(work: Path) -> None:
    expected = run_predict("runs=TS_1")
    found = run_predict("runs=TS_1", "infer.compile=true", "predictions=compiled")
    np.testing.assert_allclose(found[["x", "y", "z"]], expected[["x", "y", "z"]], atol=0.01)


# ---- 22 --------------------------------------------------------------------------------------------------------------


def write_case(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write a solution and a submission of two runs that differ in score."""
    rng = np.random.default_rng(4)
    truth, found = [], []
    for run, share in (("TS_1", 0.9), ("TS_2", 0.4)):
        for name in load_particles().names:
            points = rng.uniform(0, 5000, (10, 3))
            truth.append(make_picks(run, name, points))
            found.append(make_picks(run, name, points[rng.random(10) < share] + 5))
    frames = concat_picks(truth), concat_picks(found)
    write_solution_csv(folder / "output/solution.csv", frames[0])
    write_submission_csv(folder / "output/predictions/submission.csv", frames[1])
    return frames


def test_the_score_is_printed_returned_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    solution, submission = write_case(tmp_path)
    value = score_submission(compose("score"))
    assert value == pytest.approx(score(solution, submission), abs=1e-9) and 0.2 < value < 0.95
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for name in load_particles().names:
        assert sum(line.startswith(name) for line in lines) == 1
    assert f"{value:.3f}" in next(line for line in lines if line.startswith("total"))
    assert json.loads(Path("output/predictions/score.json").read_text())["total"]["fbeta"] == pytest.approx(value)


def test_runs_can_be_scored_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    solution, submission = write_case(tmp_path)
    for runs in ("TS_2", "[TS_2]"):
        alone = score_submission(compose("score", f"runs={runs}"))
        assert alone == pytest.approx(score(solution[solution["run"] == "TS_2"], submission))
    assert alone < score_submission(compose("score"))
    with pytest.raises(InputError, match=r"key runs.*TS_9"):
        score_submission(compose("score", "runs=[TS_9]"))


def test_a_submission_of_other_runs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    solution, _ = write_case(tmp_path)
    write_solution_csv("output/solution.csv", solution.assign(run="TS_7"))
    with pytest.raises(InputError, match="TS_7"):
        score_submission(compose("score"))
    write_solution_csv("output/solution.csv", solution[:0])
    with pytest.raises(InputError, match="03_create_solution"):
        score_submission(compose("score"))


# ---- as scripts ------------------------------------------------------------------------------------------------------


def test_the_scripts_run_one_after_the_other(work: Path) -> None:
    run_script("21_predict.py", "checkpoints=folds", FLOOR, LOW, "runs=[TS_2]", cwd=work)
    predictions = work / "output/predictions"
    found = read_picks_csv(predictions / "submission.csv")
    write_solution_csv(work / "output/solution.csv", found)
    result = run_script("22_score.py", cwd=work)
    assert "total" in result.stdout and (predictions / "score.json").is_file()
    left = {"submission.csv", "scored_picks.csv", "prediction.json", "runs", "score.json"}
    assert {path.name for path in predictions.iterdir()} == left
    run_script("23_report.py", "note=random weights", cwd=work)
    page = (predictions / "report/report.html").read_text()
    assert "TS_2" in page and "random weights" in page and "tiles/s" in page
