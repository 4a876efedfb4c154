"""Thresholds out of fold: planted ones are found, no run is judged by what has seen it, and 21 uses what 12 stores."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SPACING, run_script
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib.image import imread
from omegaconf import DictConfig

from czii25d.data.volumes import open_volume, write_volume
from czii25d.errors import InputError
from czii25d.inference import InferenceOptions, pick_volume
from czii25d.metrics import DEFAULT_THRESHOLD, evaluate, fit_thresholds
from czii25d.models import create_model
from czii25d.models.checkpoint import ModelCard, load_checkpoint, read_card, save_weights, store_thresholds
from czii25d.particles import Particle, ParticleSet, conf_dir, load_particles
from czii25d.picks import concat_picks, read_picks_csv, write_solution_csv
from czii25d.pipeline import predict as predict_module
from czii25d.pipeline.predict import predict
from czii25d.pipeline.thresholds import fit_out_of_fold
from czii25d.pipeline.train import check_before_work, create_trainer
from czii25d.plotting import plot_thresholds
from czii25d.runtimes.torch import TorchNetwork
from czii25d.thresholds import RANKS, bootstrap, cross_fit, ranked_fbeta, total_fbeta

SMALL, LARGE = "small", "large"
PAIR = ParticleSet([Particle(SMALL, 20.0, 1.0, "#F0E442"), Particle(LARGE, 60.0, 3.0, "#0072B2")])


def rows(run: str, particle: str, scores: Any, hit: bool, offset: int = 0) -> pd.DataFrame:
    """Picks with these scores, the n-th at the n-th reference of `truth`, or 1 km away from any."""
    scores = np.atleast_1d(np.asarray(scores, float))
    x = 1000.0 * (np.arange(len(scores)) + offset) + (0 if hit else 1e7)
    return pd.DataFrame({"run": run, "particle": particle, "x": x, "y": 7.0, "z": 9.0, "score": scores})


def truth(run: str, particle: str, count: int) -> pd.DataFrame:
    return rows(run, particle, np.ones(count), hit=True).drop(columns="score")


def planted(runs: str = "ABCD", seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """True picks score above, false ones below 0.6 (small) and 0.3 (large), 0.1 apart, in every run."""
    rng = np.random.default_rng(seed)
    solution, found = [], []
    for run in runs:
        for name, limit in ((SMALL, 0.6), (LARGE, 0.3)):
            solution.append(truth(run, name, 10))
            found.append(rows(run, name, [limit + 0.05, *rng.uniform(limit + 0.05, 1, 9)], hit=True))
            found.append(rows(run, name, [*[limit - 0.05] * 20, *rng.uniform(0.05, limit - 0.05, 180)], hit=False))
    return concat_picks(solution), concat_picks(found, scored=True)


# ---- cross-fitting ---------------------------------------------------------------------------------------------------


def test_planted_thresholds_are_found_in_every_fit() -> None:
    fitted = cross_fit(*planted(), PAIR)
    np.testing.assert_allclose(fitted.thresholds, [0.6, 0.3])
    np.testing.assert_allclose(fitted.left_out, np.tile([0.6, 0.3], (4, 1)))
    np.testing.assert_allclose(fitted.spread, [[0.6, 0.6], [0.3, 0.3]])
    assert fitted.fbeta.tolist() == fitted.fbeta_optimistic.tolist() == [1, 1, 1]


def test_a_run_has_no_say_in_the_thresholds_it_is_judged_at() -> None:
    solution, found = planted()
    before = cross_fit(solution, found, PAIR)
    adverse = found.copy()
    in_c = adverse["run"] == "C"
    adverse.loc[in_c, "score"] = 1 - adverse.loc[in_c, "score"]  # now its false picks score highest
    after = cross_fit(solution, adverse, PAIR)
    judged = before.runs.index("C")
    np.testing.assert_array_equal(after.left_out[judged], before.left_out[judged])
    others = [index for index in range(4) if index != judged]
    assert (after.left_out[others] != before.left_out[others]).any(), "an adverse run does move the other fits"
    assert (after.thresholds != before.thresholds).any()


def test_a_fit_without_a_run_is_the_fit_to_the_others_and_is_judged_as_the_score_judges() -> None:
    solution, found = planted()
    rng = np.random.default_rng(1)
    found["score"] = np.clip(found["score"] + rng.normal(0, 0.15, len(found)), 0.05, 1)
    fitted = cross_fit(solution, found, PAIR)
    kept = []
    for run, left_out in zip(fitted.runs, fitted.left_out, strict=True):
        expected = fit_thresholds(solution[solution["run"] != run], found[found["run"] != run], PAIR).thresholds
        assert left_out.tolist() == list(expected.values())
        own = found[found["run"] == run]
        kept.append(own[own["score"] >= own["particle"].map(expected)])
    table = evaluate(solution, concat_picks(kept, scored=True), particles=PAIR)
    assert fitted.fbeta.tolist() == pytest.approx(table["fbeta"].tolist())
    expected = fit_thresholds(solution, found, PAIR)
    assert fitted.thresholds.tolist() == list(expected.thresholds.values())
    assert fitted.fbeta_optimistic[:2].tolist() == pytest.approx(list(expected.fbeta.values()))
    assert len(set(fitted.left_out[:, 0])) > 1, "the case is to be one in which the fits differ"


def test_two_runs_on_paper() -> None:
    solution = concat_picks([truth("A", SMALL, 4), truth("B", SMALL, 4)])
    found = [rows("A", SMALL, [0.8] * 4, hit=True), rows("A", SMALL, [0.6] * 40, hit=False)]
    found += [rows("B", SMALL, [0.5] * 4, hit=True), rows("B", SMALL, [0.1] * 40, hit=False)]
    fitted = cross_fit(solution, concat_picks(found, scored=True), PAIR.first(1))
    np.testing.assert_allclose(fitted.left_out[:, 0], [0.3, 0.7])  # A's is fitted on B, and B's on A
    assert fitted.counts[:, 0].tolist() == [[4, 44, 4], [4, 0, 0]]
    assert fitted.fbeta[0] == pytest.approx(17 * 4 / (16 * 8 + 44))
    assert fitted.thresholds[0] == pytest.approx(0.3)  # 17 * 8 / (16 * 8 + 48) with, 17 * 4 / (16 * 8 + 4) without B
    assert fitted.fbeta_optimistic[0] == pytest.approx(17 * 8 / (16 * 8 + 48))
    np.testing.assert_allclose(fitted.spread, [[0.3, 0.7]])


def test_a_particle_of_one_run_is_judged_there_at_the_default() -> None:
    solution, found = planted("AB")
    solution = solution[(solution["run"] == "A") | (solution["particle"] == SMALL)]
    fitted = cross_fit(solution, found, PAIR)
    assert np.isnan(fitted.left_out[:, 1]).tolist() == [True, False]
    own = found[(found["run"] == "A") & (found["particle"] == LARGE)]
    assert fitted.counts[0, 1].tolist() == [10, (own["score"] >= DEFAULT_THRESHOLD).sum(), 10]
    np.testing.assert_allclose(fitted.spread[1], 0.3)
    nothing = cross_fit(solution[solution["particle"] == SMALL], found, PAIR)
    assert np.isnan(nothing.thresholds[1]) and np.isnan(nothing.spread[1]).all() and nothing.fbeta[1] == 0


def test_one_run_is_too_few() -> None:
    with pytest.raises(InputError, match="at least two runs"):
        cross_fit(*planted("A"), PAIR)


# ---- the interval ----------------------------------------------------------------------------------------------------


def test_two_runs_have_three_resamples() -> None:
    counts = np.array([[[10, 12, 9]], [[10, 30, 4]]])
    of_one, of_other, of_both = (
        total_fbeta(each, [1.0])[0] for each in (counts[:1].sum(0), counts[1:].sum(0), counts.sum(0))
    )
    ends = bootstrap(counts, [1.0], samples=4000, level=0.9)
    np.testing.assert_allclose(ends, [[of_other, of_one]] * 2)  # a quarter of the resamples is twice the same run
    np.testing.assert_allclose(bootstrap(counts, [1.0], samples=4000, level=0.4), [[of_both, of_both]] * 2)


def test_a_seed_repeats_an_interval_and_another_does_not() -> None:
    counts = np.random.default_rng(0).integers(5, 50, (9, 2, 3))
    one = bootstrap(counts, [1.0, 3.0], samples=200, seed=5)
    np.testing.assert_array_equal(one, bootstrap(counts, [1.0, 3.0], samples=200, seed=5))
    assert (one != bootstrap(counts, [1.0, 3.0], samples=200, seed=6)).any()


def test_the_interval_covers_the_true_value_as_often_as_it_says() -> None:
    """Runs differ in the number of particles and in how well these are found; the truth is the ratio of means."""
    rng = np.random.default_rng(7)
    run_num, trials = 25, 400
    references = rng.integers(5, 40, (trials, run_num))
    hits = rng.binomial(references, rng.beta(6, 3, references.shape))
    picks = hits + rng.poisson(8, references.shape)
    true = 17 * (22 * 6 / 9) / (16 * 22 + 22 * 6 / 9 + 8)  # means: 22 references, two thirds of them hit, 8 false
    counts = np.stack([references, picks, hits], -1)[:, :, None]
    for level in (0.5, 0.9):
        ends = np.array([bootstrap(each, [1.0], samples=500, level=level)[0] for each in counts])
        covered = ((ends[:, 0] <= true) & (true <= ends[:, 1])).mean()
        assert abs(covered - level) < 0.08, level  # binomial error 0.025 and what a percentile interval lacks


def test_resamples_without_a_particle_say_nothing_of_it() -> None:
    counts = np.array([[[10, 10, 10], [5, 5, 5]], [[10, 10, 10], [0, 3, 0]], [[10, 10, 10], [0, 0, 0]]])
    ends = bootstrap(counts, [1.0, 1.0])
    assert ends[0].tolist() == [1, 1]
    assert 0.7 < ends[1, 0] < 1 == ends[1, 1], "never 0, though many resamples lack the only run that has it"
    assert ends[2, 0] > 0.8
    counts[0, 1] = 0
    assert np.isnan(bootstrap(counts, [1.0, 1.0])[1]).all()
    np.testing.assert_allclose(bootstrap(counts, [1.0, 1.0])[2], 0.5)  # as in the score, where it counts as 0


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"level": 0.0}, {"level": 1.0}, {"level": math.nan}])
def test_impossible_intervals_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"bootstrap.{next(iter(wrong))}"):
        bootstrap(np.ones((2, 1, 3), int), [1.0], **wrong)


# ---- the choice of a checkpoint --------------------------------------------------------------------------------------


def test_ranked_fbeta_on_paper() -> None:
    solution = truth("A", SMALL, 4)
    found = concat_picks([rows("A", SMALL, [0.9, 0.8], hit=True), rows("A", SMALL, [0.85] * 3, hit=False)], scored=True)
    # 4, 5, 6, ... 16 picks are asked for: the best four hit one, and five, of which two hit, are all there are
    expected = (17 / (64 + 4) + 8 * 34 / (64 + 5)) / 9
    assert ranked_fbeta(solution, found, PAIR.first(1)) == pytest.approx({SMALL: expected, "total": expected})
    more = concat_picks([found, rows("A", SMALL, [0.1] * 2 + [0.05] * 100, hit=False)], scored=True)
    # 4, 5, 6, 7, 8, 10, 12, 14 and 16 are asked for; scores that are equal come together
    expected = (17 / 68 + 34 / 69 + 2 * 34 / (64 + 7) + 5 * 34 / (64 + 107)) / 9
    assert np.ceil(4 * RANKS).tolist() == [4, 5, 6, 7, 8, 10, 12, 14, 16]
    assert ranked_fbeta(solution, more, PAIR.first(1))[SMALL] == pytest.approx(expected)


def test_ranked_fbeta_knows_no_threshold() -> None:
    solution, found = planted()
    found["score"] = np.clip(found["score"] + np.random.default_rng(1).normal(0, 0.2, len(found)), 0.05, 1)
    squeezed = found.assign(score=found["score"] ** 3 / 2)
    value = ranked_fbeta(solution, found, PAIR)
    assert value == ranked_fbeta(solution, squeezed, PAIR)
    assert value["total"] == pytest.approx((value[SMALL] + 3 * value[LARGE]) / 4)
    assert ranked_fbeta(solution, found[:0], PAIR) == {SMALL: 0, LARGE: 0, "total": 0}


def test_a_lucky_threshold_does_not_choose_a_checkpoint() -> None:
    """One network does best at a single threshold, beyond which it falls; the other does nearly as well anywhere."""
    solution = truth("A", SMALL, 10)
    hits = rows("A", SMALL, np.linspace(0.9, 0.97, 8), hit=True)
    lucky = [hits, rows("A", SMALL, np.linspace(0.1, 0.89, 100), hit=False)]
    steady = [hits, rows("A", SMALL, [0.98] * 4, hit=False)]
    swept, ranked = [], []
    for frames in (lucky, steady):
        found = concat_picks(frames, scored=True)
        swept.append(fit_thresholds(solution, found, PAIR.first(1)).fbeta[SMALL])
        ranked.append(ranked_fbeta(solution, found, PAIR.first(1))[SMALL])
    assert swept[0] > swept[1] and ranked[0] < ranked[1]


@pytest.mark.parametrize("overrides", [[], ["best_by=fbeta"], ["experiment=reproduce_4th_place"]])
def test_best_by_is_what_the_checkpoint_watches(overrides: list[str], tmp_path: Path) -> None:
    cfg = compose("train", *overrides, "trainer.accelerator=cpu", "trainer.precision=32-true", "wandb.mode=disabled")
    watched = [
        callback.monitor
        for callback in create_trainer(cfg, tmp_path, judged=True).callbacks  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and callback.monitor
    ]
    assert watched == (["val/fbeta"] if overrides else ["val/fbeta_ranked"])


def test_best_by_is_a_figure_that_is_logged() -> None:
    with pytest.raises(InputError, match=r"best_by.*fbeta_ranked, fbeta, fbeta_fixed"):
        check_before_work(compose("train", "best_by=loss", "trainer.accelerator=cpu"))


# ---- the picture -----------------------------------------------------------------------------------------------------


def test_the_picture_shows_each_curve_in_its_colour_and_the_threshold(tmp_path: Path) -> None:
    solution, found = planted()
    for particles in (PAIR, PAIR.first(1)):
        own = [frame[frame["particle"].isin(particles.names)] for frame in (solution, found)]
        plot_thresholds(cross_fit(*own, particles), tmp_path / "a.png")
        image = (imread(tmp_path / "a.png")[..., :3] * 255).round().astype(int)
        for particle, shown in ((PAIR[0], True), (PAIR[1], len(particles) == 2)):
            color = [int(particle.color[start : start + 2], 16) for start in (1, 3, 5)]
            assert ((np.abs(image - color).max(-1) < 8).sum() > 100) == shown, particle.name
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_particles_without_picks_are_drawn(tmp_path: Path) -> None:
    solution, found = planted()
    plot_thresholds(cross_fit(solution, found[:0], PAIR), tmp_path / "a.png")
    assert imread(tmp_path / "a.png").std() > 0


# ---- 12 --------------------------------------------------------------------------------------------------------------

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
RUNS = {"TS_1": (24, 40, 56), "TS_2": (17, 33, 61), "TS_3": (18, 41, 37)}
FOLDS = {"one/best.ckpt": ["TS_1"], "other/best.ckpt": ["TS_3", "TS_2"]}
FLOOR = 0.001  # below what a network with random weights gives
PLANTED = dict(zip(PARTICLES.names, (0.3, 0.25), strict=True))


def lightning_file(path: Path, seed: int, card: ModelCard | None) -> None:
    """Write a checkpoint as a training does, with an average, an optimizer and the state of callbacks."""
    torch.manual_seed(seed)
    state = {}
    for prefix in ("model.", "model_ema.module."):
        state |= {prefix + key: value for key, value in create_model(**MODEL, pretrained=False).state_dict().items()}
    content: dict[str, Any] = {
        "epoch": 3,
        "state_dict": state,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.rand(5), "step": torch.tensor(7.0)}}}],
        "callbacks": {"EpochLog": {"rows": [{"epoch": 0, "val/fbeta": 0.5}]}, "best": {"score": torch.tensor(0.5)}},
        "loops": {"fit_loop": {"n": 4}},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**content, **({} if card is None else {"czii25d": card.to_dict()})}, path)


def make_card(**fields: Any) -> ModelCard:
    return ModelCard(MODEL, **{"particles": PARTICLES.to_config(), "voxel_spacing": SPACING, **fields})


def pick_with(path: Path, run: str, root: Path) -> pd.DataFrame:
    """Pick with the functions of the package, without a script."""
    volume, (network, card) = open_volume(root / "output/volumes/train" / run), load_checkpoint(path)
    options = InferenceOptions((16, 32, 32), (12, 24, 24), floor=FLOOR)
    picks = pick_volume(volume, TorchNetwork(network), PARTICLES, options, volume.voxel_spacing, card.offset_voxel)
    return picks.assign(run=run)


def best_score(picks: pd.DataFrame, run: str) -> float:
    return float(picks.loc[picks["run"] == run, "score"].max())


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes, two folds, and a truth that is what the right fold finds above ``PLANTED``. Read-only."""
    root = tmp_path_factory.mktemp("thresholds")
    for seed, (run, shape) in enumerate(RUNS.items()):
        volume = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        write_volume(root / "output/volumes/train" / run, volume, SPACING, {"seed": seed})
    found = []
    for seed, (name, fold) in enumerate(FOLDS.items()):
        lightning_file(root / "saved" / name, seed, make_card(fold=fold, thresholds={PARTICLES.names[0]: 0.9}))
        found += [pick_with(root / "saved" / name, run, root) for run in fold]
    picks = concat_picks(found, scored=True).sort_values("run", kind="stable", ignore_index=True)
    picks.to_pickle(root / "picks.pickle")
    write_solution_csv(root / "output/solution.csv", picks[picks["score"] >= picks["particle"].map(PLANTED)])
    return root


@pytest.fixture
def work(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def compose(name: str, *overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        return hydra.compose(name, [*overrides])


KEYS = "checkpoints=saved", "infer.runtime=torch", f"infer.floor={FLOOR}"


def fit(*overrides: str) -> dict[str, Any]:
    return fit_out_of_fold(compose("fit_thresholds", *KEYS, *overrides))


def test_each_run_is_predicted_by_the_fold_that_held_it_out(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = fit()
    expected: Any = pd.read_pickle("picks.pickle")
    found = read_picks_csv("output/out_of_fold/picks.csv", scored=True)
    pd.testing.assert_frame_equal(found, expected[found.columns], check_dtype=False, atol=2e-3, rtol=0)
    wrong = pick_with(work / "saved/other/best.ckpt", "TS_1", work)
    assert best_score(wrong, "TS_1") != pytest.approx(best_score(found, "TS_1"), abs=1e-3), "the folds are to differ"
    assert report["runs"] == {
        "TS_1": ["saved/one/best.ckpt"],
        "TS_2": ["saved/other/best.ckpt"],
        "TS_3": ["saved/other/best.ckpt"],
    }
    best = fit_thresholds(read_picks_csv("output/solution.csv"), found, PARTICLES).thresholds
    for name, limit in PLANTED.items():
        row = report["particles"][name]
        assert row["threshold"] == best[name] == pytest.approx(limit, abs=0.03) and row["fbeta_optimistic"] > 0.98
        assert set(row["threshold_without_run"]) == set(RUNS) and 0 < row["references"] < len(expected)
        assert row["interval"][0] <= row["fbeta"] <= row["interval"][1]
        low, high = row["threshold_spread"]
        assert low == min(row["threshold_without_run"].values()) and high == max(row["threshold_without_run"].values())
    assert json.loads(Path("output/out_of_fold/thresholds.json").read_text()) == report
    assert imread("output/out_of_fold/thresholds.png").std() > 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and "3 runs" in lines[0]
    for name, row in [*report["particles"].items(), ("total", report["total"])]:
        [line] = [line for line in lines if line.startswith(name)]
        low, high = row["interval"]
        assert f"{row['fbeta']:.3f}" in line and f"{low:.3f} - {high:.3f}" in line


def test_21_uses_what_12_stores(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: torch.load(f"saved/{name}", weights_only=True) for name in FOLDS}
    report = fit()
    thresholds = {name: report["particles"][name]["threshold"] for name in PARTICLES.names}
    for name, fold in FOLDS.items():
        after = torch.load(f"saved/{name}", weights_only=True)
        card = after.pop("czii25d")
        assert card == {**before[name].pop("czii25d"), "thresholds": thresholds} and card["fold"] == fold
        assert list(after) == list(before[name])
        torch.testing.assert_close(after, before[name], rtol=0, atol=0, equal_nan=True)
        assert load_checkpoint(f"saved/{name}")[1].thresholds == thresholds
    keys = "checkpoints=saved/other", "split=train", *KEYS[1:]
    kept = predict(compose("predict", *keys))
    scored = read_picks_csv("output/predictions/scored_picks.csv", scored=True)
    expected = scored[scored["score"] >= scored["particle"].map(thresholds)]
    pd.testing.assert_frame_equal(kept, expected)
    assert 0 < len(kept) < len(scored) and len(kept) != len(predict(compose("predict", *keys, "thresholds=0.9")))

    def refuse(*_: Any) -> None:
        raise AssertionError("predicted again")

    monkeypatch.setattr(predict_module, "pick_run", refuse)
    files = [Path("saved", name) for name in FOLDS]
    stamps = [path.stat().st_mtime_ns for path in files]
    assert fit() == report  # though the files' hashes have changed
    assert [path.stat().st_mtime_ns for path in files] == stamps, "what is right is not written again"
    predict(compose("predict", *keys, "predictions=output/out_of_fold", "runs=[TS_2,TS_3]"))  # 21 takes 12's picks


def test_nothing_is_stored_unless_asked(work: Path) -> None:
    before = [Path("saved", name).read_bytes() for name in FOLDS]
    fit("store=false")
    assert [Path("saved", name).read_bytes() for name in FOLDS] == before


def test_truth_and_picks_outside_the_regions_do_not_count(work: Path) -> None:
    whole = fit()
    region = fit("regions={others: {z: [80, null]}}")
    for report in (whole, region):
        assert all(row["hits"] <= row["references"] for row in report["particles"].values())
    solution = read_picks_csv("output/solution.csv")
    volume = open_volume(next(Path("output/volumes/train").iterdir()))
    index = np.floor(solution["z"] / volume.voxel_spacing[0] + 0.5).clip(0, None)
    inside = solution[index * volume.voxel_spacing[0] >= 80]
    counts = inside["particle"].value_counts().to_dict()
    assert {name: row["references"] for name, row in region["particles"].items()} == counts
    assert 0 < len(inside) < len(solution)
    picks = read_picks_csv("output/out_of_fold/picks.csv", scored=True)
    assert len(picks) and picks["z"].min() >= 80 - volume.voxel_spacing[0] / 2


def test_a_run_that_several_folds_held_out_is_predicted_by_their_mean(work: Path) -> None:
    shutil.copytree("saved/one", "saved/same")  # the mean of a network with itself is the network
    lightning_file(work / "saved/third/best.ckpt", 9, make_card(fold=["TS_1"]))
    alone = fit("store=false")
    assert alone["runs"]["TS_1"] == [f"saved/{name}/best.ckpt" for name in ("one", "same", "third")]
    assert alone["runs"]["TS_2"] == ["saved/other/best.ckpt"]
    found = read_picks_csv("output/out_of_fold/picks.csv", scored=True)
    expected: Any = pd.read_pickle("picks.pickle")
    assert best_score(found, "TS_1") != pytest.approx(best_score(expected, "TS_1"), abs=1e-3)
    shutil.rmtree("saved/third")
    fit("store=false")
    found = read_picks_csv("output/out_of_fold/picks.csv", scored=True)
    pd.testing.assert_frame_equal(found, expected[found.columns], check_dtype=False, atol=2e-3, rtol=0)


def test_what_is_left_out_is_named(work: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(predict_module.logger.parent, "propagate", True)
    solution = read_picks_csv("output/solution.csv")
    extra = [solution[:1].assign(run="TS_8"), solution[:1].assign(particle="ribosome")]
    only = (solution["particle"] != PARTICLES.names[1]) | (solution["run"] == "TS_2")
    write_solution_csv("output/solution.csv", concat_picks([solution[only], *extra]))
    with caplog.at_level("INFO"):
        report = fit("runs=[TS_1,TS_2]", "store=false")
    assert set(report["runs"]) == {"TS_1", "TS_2"}
    text = "\n".join(caplog.messages)
    assert "TS_3, TS_8" in text and "do not look for them: ribosome" in text
    assert f"{PARTICLES.names[1]}: in 1 run(s) only" in text and f"{PARTICLES.names[0]}: in" not in text


def test_a_particle_that_was_never_hit_gets_no_threshold(work: Path) -> None:
    solution = read_picks_csv("output/solution.csv")
    write_solution_csv("output/solution.csv", solution[solution["particle"] == PARTICLES.names[0]])
    report = fit()
    assert report["particles"][PARTICLES.names[1]]["threshold"] is None
    card = read_card("saved/one/best.ckpt")
    assert card is not None and set(card.thresholds or {}) == {PARTICLES.names[0]}


def test_the_script_runs_and_says_what_it_stored(work: Path) -> None:
    result = run_script("12_fit_thresholds.py", *KEYS, cwd=work)
    assert "total" in result.stdout and "stored the thresholds in saved/one/best.ckpt" in result.stderr
    assert {path.name for path in Path("output/out_of_fold").iterdir()} == {
        "picks.csv",
        "runs",
        "thresholds.json",
        "thresholds.png",
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoints=[saved/one]"], "at least two runs.*found TS_1.*other folds"),
        (["runs=TS_2"], "at least two runs.*found TS_2"),
        (["runs=[TS_1,TS_2,TS_9]"], "key runs.*TS_1, TS_2, TS_3.*TS_9"),
        (["checkpoints=[saved/one,none.ckpt]"], "none.ckpt"),
        (["checkpoints=[saved/one,everything.safetensors]"], r"everything.safetensors.*held out none.*fold_id"),
        (["checkpoints=[saved/one,published.ckpt]"], "published.ckpt.*without a card"),
        (["checkpoints=[saved/one,graph.onnx]"], "graph.onnx.*export it again"),
        (["split=test", "source=volumes"], "volumes/test"),
        (["solution=part.csv"], "part.csv.*none of TS_2, TS_3"),
        (["infer.shard=0/2"], "infer.shard"),
        (["bootstrap.samples=0"], "bootstrap.samples"),
        (["bootstrap.level=95"], "bootstrap.level"),
        (["checkpoints=[saved/one,gone.safetensors]"], "split train.*none of TS_7"),
        (["checkpoints=[saved,swapped.safetensors]"], "swapped.safetensors.*particles"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(work: Path, overrides: list[str], message: str) -> None:
    network = create_model(**MODEL, pretrained=False)
    save_weights("everything.safetensors", network, make_card())
    save_weights("gone.safetensors", network, make_card(fold=["TS_7"]))
    save_weights("swapped.safetensors", network, make_card(fold=["TS_7"], particles=load_particles()[1:3].to_config()))
    lightning_file(Path("published.ckpt"), 1, None)
    Path("graph.onnx").write_bytes(b"graph")
    solution = read_picks_csv("output/solution.csv")
    if overrides == ["checkpoints=[saved/one,gone.safetensors]"]:
        write_solution_csv("output/solution.csv", concat_picks([solution, solution[:1].assign(run="TS_7")]))
    write_solution_csv("part.csv", solution[solution["run"] == "TS_1"])
    before = Path("saved/one/best.ckpt").read_bytes()
    with pytest.raises(InputError, match=message) as error:
        fit(*overrides)
    assert "\n" not in str(error.value)
    assert not Path("output/out_of_fold").exists() and Path("saved/one/best.ckpt").read_bytes() == before


def test_a_run_that_cannot_be_predicted_stores_nothing(work: Path) -> None:
    volume = np.random.default_rng(0).standard_normal((20, 33, 34)).astype(np.float32)
    shutil.rmtree("output/volumes/train/TS_2")
    write_volume("output/volumes/train/TS_2", volume, (10.0, 2.8, 10.0), {})
    with pytest.raises(InputError, match=r"1 of 3 runs.*TS_2.*2\.8"):
        fit()
    assert not Path("output/out_of_fold/thresholds.json").exists()
    card = read_card("saved/one/best.ckpt")
    assert card is not None and card.thresholds == {PARTICLES.names[0]: 0.9}


# ---- storing ---------------------------------------------------------------------------------------------------------


def test_safetensors_take_thresholds_and_keep_their_weights(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    network = create_model(**MODEL, pretrained=False)
    save_weights(path, network, make_card(fold=["TS_1"], nms_radius={PARTICLES.names[0]: 40.0}))
    stored = store_thresholds(path, PLANTED)
    found, card = load_checkpoint(path)
    assert card == stored == make_card(fold=["TS_1"], nms_radius={PARTICLES.names[0]: 40.0}, thresholds=PLANTED)
    torch.testing.assert_close(found.state_dict(), network.eval().state_dict(), rtol=0, atol=0)
    assert [item.name for item in tmp_path.iterdir()] == ["net.safetensors"]


def test_what_cannot_be_written_again_is_refused_untouched(tmp_path: Path) -> None:
    lightning_file(tmp_path / "published.ckpt", 1, None)
    lightning_file(tmp_path / "own.ckpt", 1, make_card())
    foreign = torch.load(tmp_path / "own.ckpt", weights_only=True)
    torch.save({**foreign, "hyper_parameters": DictConfig({"lr": 1})}, tmp_path / "foreign.ckpt")
    for name, thresholds, message in (
        ("published.ckpt", PLANTED, "a card"),
        ("own.ckpt", {"ribosome": 0.3}, "thresholds"),
        ("foreign.ckpt", PLANTED, "other libraries"),
    ):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(InputError, match=message):
            store_thresholds(tmp_path / name, thresholds)
        assert (tmp_path / name).read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3
