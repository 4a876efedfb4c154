"""23: a page of planted picks says what was planted."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.image import imread
from omegaconf import OmegaConf

from czii25d.averages import sum_boxes
from czii25d.data.predictions import Effort, PredictedRun, read_predictions, write_record
from czii25d.data.volumes import write_volume
from czii25d.errors import InputError
from czii25d.particles import Particle, ParticleSet
from czii25d.picks import (
    above_thresholds,
    concat_picks,
    make_picks,
    write_scored_picks_csv,
    write_solution_csv,
    write_submission_csv,
)
from czii25d.pipeline.app import load_config
from czii25d.pipeline.report import write_report

SPACING = (10.0, 11.0, 12.0)
SHAPE = (24, 40, 56)
PARTICLES = ParticleSet(
    [Particle("ball", 60.0, color="#E69F00"), Particle("rod", 40.0, 2.0, "#56B4E9"), Particle("none", 50.0)]
)
THRESHOLDS = {"ball": 0.5, "rod": 0.3, "none": 0.4}
EFFORT = Effort({"read": 0.1, "predict": 2.0, "peaks": 0.4, "write": 0.0}, 12, 1.5)
HOSTILE = "<script src=x>&\"'é</script>"


class Page(HTMLParser):
    """What a reader of the page gets: addresses, pictures and table cells."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.images: list[dict[str, Any]] = []
        self.rows: list[list[str]] = []
        self.words = ""
        self._in_cell = False
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.addresses += [str(values[key]) for key in ("src", "href", "srcset", "action", "data") if key in values]
        if tag == "img":
            self.images.append(values)
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self._in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.words += data
        if self._in_cell:
            self.rows[-1][-1] += data.strip()

    def row(self, name: str) -> list[list[str]]:
        """Return the rows that begin with a name, one for each table."""
        return [row for row in self.rows if row[0] == name]


def scored(run: str, particle: str, points: list[tuple[float, float, float]], scores: list[float]) -> pd.DataFrame:
    return make_picks(run, particle, points).assign(score=scores)


# x, y, z: two balls are found and one is missed, one pick is false, one is below the threshold; a rod is found
TRUE_BALLS = [(120.0, 110.0, 60.0), (400.0, 300.0, 120.0), (600.0, 100.0, 200.0)]
FOUND = {
    "ball": ([(121.0, 112.0, 61.0), (402.0, 300.0, 121.0), (300.0, 50.0, 120.0), (600.0, 100.0, 200.0)],
             [0.9, 0.8, 0.7, 0.2]),
    "rod": ([(240.0, 220.0, 120.0)], [0.6]),
}  # fmt: skip
TRUTH = {"ball": TRUE_BALLS, "rod": [(240.0, 220.0, 120.0)], "none": [(500.0, 400.0, 30.0)]}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plant(*runs: str, found: bool = True, truth: bool = True, folder: str = "output/predictions") -> None:
    """Write what 21 and 03 would for runs of noise with a dark ball at each true one."""
    predicted, picks, solution = [], [], []
    for seed, run in enumerate(runs):
        volume = np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)
        for x, y, z in TRUE_BALLS:
            volume[tuple(slice(max(0, int(c) - 2), int(c) + 3) for c in np.array([z, y, x]) / SPACING)] -= 9
        home = Path(f"output/volumes/test/{seed}")
        write_volume(home, volume, SPACING, {})
        predicted.append(PredictedRun(run, home, effort=EFFORT if seed == 0 else None))
        if found:
            picks += [scored(run, name, *rows) for name, rows in FOUND.items()]
        solution += [make_picks(run, name, points) for name, points in TRUTH.items()]
    Path(folder).mkdir(parents=True)
    write_record(Path(folder), PARTICLES, THRESHOLDS, ["saved_models/a/best.ckpt"], predicted)
    all_picks = concat_picks(picks, scored=True)
    write_scored_picks_csv(Path(folder) / "scored_picks.csv", all_picks)
    write_submission_csv(Path(folder) / "submission.csv", above_thresholds(all_picks, THRESHOLDS))
    if truth:
        write_solution_csv("output/solution.csv", concat_picks(solution))


def report(*overrides: str) -> Page:
    return Page(write_report(load_config("report", overrides)))


def check_offline(page: Page) -> None:
    assert page.addresses and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"url\(|@import|https?:", page.text) and "script" not in page.tags
    assert "default-src 'none'" in page.text
    for image in page.images:
        assert image["alt"].strip() and int(image["width"]) > 100 and int(image["height"]) > 100
    assert page.tags.count("img") == len(page.images) > 0


def test_a_page_says_what_was_planted(work: Path) -> None:
    plant("TS_1", "TS_2")
    page = report("note=simulated data")
    check_offline(page)
    by_particle, by_run = page.row("ball")[0], page.row("TS_1")[0]
    assert by_particle == ["ball", "60", "0.50", "6", "8", "0.667", "0.667", "0.667", "4", "6", "1"]
    assert page.row("none")[0] == ["none", "50", "0.40", "0", "0", "0.000", "0.000", "0.000", "0", "2", "1"]
    assert page.row("total")[0][3:5] == ["8", "10"]
    assert by_run == ["TS_1", "3", "1", "0", "4", "0.750", "0.600"]
    assert page.row("TS_1")[1] == ["TS_1", "0.1", "2.0", "0.4", "0.0", "2.5", "6.0", "1.5"]
    assert set(page.row("TS_2")[1][1:]) == {"not kept"}
    assert "simulated data" in page.words and "Average of 6 picks, not aligned" in page.words
    # one slice of each run, as the central one has most picks; three pictures of two particles, none of the third
    names = {path.name for path in Path("output/predictions/report").iterdir()}
    assert len(page.images) == 2 + 6 and {"report.html", "average_1_ball.png", "slice_1_z12_TS_1.png"} <= names
    assert not any("none" in name for name in names)
    central = next(image["alt"] for image in page.images if image["alt"].startswith("Central slice"))
    assert central.endswith("slice with most picks, z = 12 nm of TS_1; picks that it cuts: 2 ball, 1 rod")
    assert page.tags.count("source") == 4  # of the charts: the same for dark paper


def test_the_average_is_that_of_the_particle(work: Path) -> None:
    plant("TS_1")
    report()
    xy = imread("output/predictions/report/average_1_ball.png")[..., :3].mean(-1)[60:, :240]
    dark = xy[xy.shape[0] // 2 - 20 : xy.shape[0] // 2 + 20, 100:140]
    assert dark.mean() < xy[:, 20:60].mean() - 0.2


@pytest.mark.parametrize("truth", ["missing", "of other runs"])
def test_without_a_solution_there_are_no_scores_and_the_page_says_so(work: Path, truth: str) -> None:
    plant("TS_1", truth=False)
    if truth == "of other runs":
        write_solution_csv("output/solution.csv", make_picks("TS_9", "ball", TRUE_BALLS))
    page = report()
    check_offline(page)
    assert "so there are no scores" in page.words and not [row for row in page.rows if "F4" in row]
    assert page.row("ball")[0] == ["ball", "60", "0.50", "3", "4"] and page.row("TS_1")[0][1:] == ["3", "1", "0", "4"]
    assert not list(Path("output/predictions/report").glob("precision*"))


def test_no_pick_at_all(work: Path) -> None:
    plant("TS_1", found=False)
    page = report()
    check_offline(page)
    assert page.row("total")[0][3:6] == ["0", "0", "0.000"] and len(page.images) == 1
    assert page.words.count("no pick, at any score") == 3
    assert page.images[0]["alt"].startswith("Central slice and slice with most picks")


@pytest.mark.parametrize("truth", [True, False])
def test_hostile_names_stay_text(work: Path, truth: bool) -> None:
    plant(HOSTILE, "../../up", truth=truth)
    page = report(f"note={json.dumps(HOSTILE, ensure_ascii=False)}")
    check_offline(page)
    assert page.row(HOSTILE) and HOSTILE in page.words and page.words.count(HOSTILE) > 3
    assert any(HOSTILE in image["alt"] for image in page.images)
    assert {path.name for path in work.iterdir()} == {"output"}
    assert {path.name for path in Path("output").iterdir()} <= {"volumes", "predictions", "solution.csv"}
    assert all(re.fullmatch(r"[\w.-]+", path.name) for path in Path("output/predictions/report").iterdir())


def test_what_21_left_out_of_the_submission_is_left_out(work: Path) -> None:
    """Not by its threshold, but as too near a better pick, say."""
    plant("TS_1")
    submission = pd.read_csv("output/predictions/submission.csv")
    submission.iloc[1:].to_csv("output/predictions/submission.csv", index=False)
    assert report().row("ball")[0][3:8] == ["2", "4", f"{17 / (16 * 3 + 2):.3f}", "0.500", "0.333"]


def test_runs_are_chosen_and_only_some_are_drawn(work: Path) -> None:
    plant("TS_1", "TS_2", "TS_3")
    page = report("pictured_runs=1")
    assert "of the first 1 runs" in page.words and "Average of 3 picks" in page.words
    assert sum("slice" in image["alt"] and "z =" in image["alt"] for image in page.images) == 1
    assert page.row("TS_3")[0][4] == "4"
    page = report("runs=[TS_2]")
    assert page.row("TS_2") and not page.row("TS_1") and page.row("ball")[0][3] == "3"
    with pytest.raises(InputError, match=r"TS_22.*did you mean 'TS_2'"):
        report("runs=TS_22")


def test_what_is_left_out_is_counted(work: Path) -> None:
    plant("TS_1", "TS_2", truth=False)
    truth = [make_picks("TS_1", "ball", TRUE_BALLS), make_picks("TS_1", "unknown", TRUE_BALLS[:2])]
    write_solution_csv("output/solution.csv", concat_picks(truth))
    page = report()
    assert "2 true particles that the networks do not look for are left out: unknown" in page.words
    assert "Scores are of 1 of 2 runs" in page.words
    assert page.row("ball")[0][3:] == ["6", "8", "0.667", "0.667", "0.667", "2", "3", "1"]
    assert page.row("TS_2")[0][-2:] == ["", ""]


def test_what_is_missing_or_broken_is_one_line(work: Path) -> None:
    with pytest.raises(InputError, match=r"prediction\.json: expected what 21_predict"):
        report()
    plant("TS_1")
    record = Path("output/predictions/prediction.json")
    for text in ("{", "[]", '{"format_version": 1}', record.read_text().replace('"ball": 0.5', '"ball": "x"')):
        record.write_text(text)
        with pytest.raises(InputError, match=r"prediction\.json.*give the command of 21"):
            report()
    assert not Path("output/predictions/report").exists()


def test_the_record_comes_back_and_moves_with_its_volumes(work: Path) -> None:
    plant("TS_1", "TS_2")
    Path("output").rename("moved")
    found = read_predictions("moved/predictions")
    assert found.particles == PARTICLES and found.thresholds == THRESHOLDS and list(found.runs) == ["TS_1", "TS_2"]
    assert found.runs["TS_1"].effort == EFFORT and found.runs["TS_2"].effort is None
    assert found.runs["TS_2"].open().shape == SHAPE
    assert len(found.picks_of("TS_1")) == 4 and len(found.picks_of("TS_1", all_scores=True)) == 5


def test_tomograms_without_a_volume_are_read_as_they_are(work: Path) -> None:
    plant("TS_1")
    np.save("raw.npy", 1e-6 * np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32))
    run = PredictedRun("TS_1", None, Path("raw.npy"), SPACING)
    write_record(Path("output/predictions"), PARTICLES, THRESHOLDS, ["a.ckpt"], [run])
    assert len(report().images) == 1 + 6
    Path("raw.npy").unlink()
    with pytest.raises(InputError, match=r"raw\.npy"):
        report()


def test_boxes_add_up_to_the_planted_one() -> None:
    """Faces included: every voxel of the box has its own count, and the slabs do not matter."""
    rng = np.random.default_rng(0)
    volume, box = rng.standard_normal((9, 12, 15)), rng.standard_normal((3, 5, 7))
    volume[2:5, 3:8, 4:11] = box
    centers = np.array([[3.0, 5.0, 7.0], [0.4, 0.0, 14.2]])

    def planes(start: int, stop: int) -> Any:
        return volume[start:stop].astype(np.float32)

    (alone, ones), (both, counts) = sum_boxes(planes, volume.shape, [centers[:1], centers], [(1, 2, 3)] * 2, 2)
    np.testing.assert_allclose(alone, (box - volume.mean()) / volume.std(), atol=1e-5)
    assert (ones == 1).all() and counts[0, 2, 3] == 1 and counts[1, 2, 3] == 2 and counts[1, 2, 4] == 1
    corner = (volume[0, 0, 14] - volume.mean()) / volume.std()
    np.testing.assert_allclose(both[1, 2, 3] - alone[1, 2, 3], corner, atol=1e-5)


# ---- a training ------------------------------------------------------------------------------------------------------


def train_folder(held_out: bool) -> Path:
    """Write what 11 leaves, but for the checkpoints."""
    folder = Path("saved_models/one")
    settings = load_config("train", ["data.fold_id=TS_1", "wandb.name=one", "opt.lr=0.003"])
    content: Any = OmegaConf.to_container(settings, resolve=True)
    content["particles"], content["model"]["class_num"] = PARTICLES.to_config(), 3
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    rows = [{"epoch": e, "step": 10 * e, "seconds": 30.0, "train/loss": 1 / (e + 1)} for e in range(4)]
    rows[1] |= {"val/fbeta": 0.6, "val/fbeta_ranked": 0.4, "val/fbeta/ball": 0.7}
    rows[3] |= {"val/fbeta": 0.8, "val/fbeta_ranked": 0.3, "val/fbeta/ball": 0.9}
    pd.DataFrame(rows).to_csv(folder / "metrics.csv", index=False)
    if held_out:
        plant("TS_1", folder="saved_models/one/held_out")
        Path("output/solution.csv").rename(folder / "held_out/solution.csv")
    return folder


@pytest.mark.parametrize("held_out", [True, False])
def test_a_training_has_its_curves_and_settings(work: Path, held_out: bool) -> None:
    train_folder(held_out)
    page = report("training=saved_models/one")
    check_offline(page)
    assert "0.400" in page.words and "best val/fbeta_ranked, epoch 2" in page.words and "2 min" in page.words
    assert page.row("opt.lr") == [["opt.lr", "0.003"]] * 2 and page.row("data.batch_size")[0][1]
    assert Path("saved_models/one/report/loss.png").is_file()
    if held_out:
        assert "Held out: TS_1" in page.words and page.row("TS_1")[0][1:5] == ["3", "1", "0", "4"]
        assert len(page.images) == 3 + 1 + 6
    else:
        assert "No picks of held-out runs" in page.words and len(page.images) == 3


def test_a_folder_without_a_training_is_refused(work: Path) -> None:
    Path("empty").mkdir()
    with pytest.raises(InputError, match=r"metrics\.csv.*what 11_train"):
        report("training=empty")
