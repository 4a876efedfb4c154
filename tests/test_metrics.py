"""The competition's score, by hand and by its own numbers; thresholds that are the best there are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import czii25d
from czii25d.errors import InputError
from czii25d.metrics import DEFAULT_THRESHOLD, PLATEAU, evaluate, fbeta, fit_thresholds, score
from czii25d.particles import Particle, ParticleSet
from czii25d.picks import empty_picks

PARTICLES = ParticleSet([Particle("small", 20.0, 1.0), Particle("large", 60.0, 3.0), Particle("unscored", 40.0, 0.0)])
COMPETITION_COLUMNS = ["experiment", "particle_type", "x", "y", "z"]


def picks(*rows: tuple) -> pd.DataFrame:
    columns = ["run", "particle", "x", "y", "z", "score"]
    return pd.DataFrame(rows, columns=columns[: len(rows[0])]) if rows else empty_picks()


@pytest.mark.data
def test_the_competitions_own_numbers(reference_dir: Path) -> None:
    cases = json.loads((reference_dir / "reference/metric_cases.json").read_text())
    assert len(cases) == 3
    for case in cases:
        frames = [pd.DataFrame(case[name], columns=COMPETITION_COLUMNS) for name in ("solution", "submission")]
        options = {"distance_multiplier": case["distance_multiplier"], "beta": case["beta"]}
        assert czii25d.score(*frames, **options) == pytest.approx(case["score"], abs=1e-9)
        assert score(*frames, **options, weighted=False) == pytest.approx(case["unweighted_score"], abs=1e-9)


def test_a_case_on_paper() -> None:
    solution = picks(
        ("A", "small", 100, 50, 20),
        ("A", "small", 300, 50, 20),
        ("B", "small", 100, 50, 20),
        ("A", "large", 500, 400, 300),
    )
    submission = picks(
        ("A", "small", 109, 50, 20),  # a hit
        ("A", "small", 95, 50, 20),  # the same particle again: false
        ("B", "small", 300, 50, 20),  # right place, wrong run: false
        ("A", "large", 500, 400, 329),  # a hit, for a large one
        ("A", "unscored", 0, 0, 0),
    )
    table = evaluate(solution, submission, particles=PARTICLES)
    assert table.loc["small", ["references", "picks", "hits"]].tolist() == [3, 3, 1]
    small = 17 * 1 / (16 * 3 + 3)  # (1 + b²) hits / (b² references + picks)
    assert table["fbeta"].tolist() == pytest.approx([small, 1.0, 0.0, (small + 3) / 4])
    assert table.loc["small", ["precision", "recall"]].tolist() == pytest.approx([1 / 3, 1 / 3])
    assert table.loc["total", ["references", "picks", "hits"]].tolist() == [4, 5, 2]
    assert score(solution, submission, particles=PARTICLES) == table.loc["total", "fbeta"]
    assert score(solution, submission, particles=PARTICLES, weighted=False) == pytest.approx((small + 1) / 3)


def test_one_pick_may_hit_two_references_and_precision_exceed_one() -> None:
    solution = picks(("A", "large", 0, 0, 0), ("A", "large", 40, 0, 0))
    row = evaluate(solution, picks(("A", "large", 20, 0, 0)), particles=PARTICLES).loc["large"]
    assert row["hits"] == 2 and row["precision"] == 2 and row["recall"] == 1
    assert row["fbeta"] == pytest.approx(17 * 2 / 1 / (16 * 2 / 1 + 1))


@pytest.mark.parametrize(("distance", "hits"), [(10.0, 1), (10.0 + 1e-6, 0)])
def test_the_limit_itself_is_a_hit(distance: float, hits: int) -> None:
    table = evaluate(picks(("A", "small", 3, 4, 5)), picks(("A", "small", 3, 4 + distance, 5)), particles=PARTICLES)
    assert table.loc["small", "hits"] == hits


def test_runs_outside_the_solution_do_not_count() -> None:
    solution, good = picks(("A", "small", 1, 2, 3)), ("A", "small", 1, 2, 3)
    alone = score(solution, picks(good), particles=PARTICLES)
    assert score(solution, picks(good, ("Z", "small", 1, 2, 3)), particles=PARTICLES) == alone == 0.25


def test_no_picks_and_no_references_score_nothing() -> None:
    some = picks(("A", "small", 1, 2, 3))
    assert score(some, empty_picks(), particles=PARTICLES) == 0
    assert score(empty_picks(), some, particles=PARTICLES) == 0


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (picks(("A", "smal", 1, 2, 3)), "did you mean 'small'"),
        (picks(("A", "small", 1, np.nan, 3)), "submission: expected finite"),
        (picks(("A", "small", 1, 2, 3)).drop(columns="z"), "submission: .*no z"),
    ],
)
def test_bad_frames_are_one_clear_line(frame: pd.DataFrame, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score(picks(("A", "small", 1, 2, 3)), frame, particles=PARTICLES)


def test_fbeta_is_van_rijsbergens() -> None:
    precision, recall = 7 / 9, 7 / 12
    for beta in (0.5, 1.0, 4.0):
        expected = (1 + beta**2) * precision * recall / (beta**2 * precision + recall)
        assert fbeta(np.array([7.0]), np.array([9.0]), np.array([12.0]), beta)[0] == pytest.approx(expected)


# ---- thresholds ------------------------------------------------------------------------------------------------------


def scored_case(seed: int, levels: int = 1000) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two runs with true picks of high and false ones of low score, some references unfound, some found twice."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for run in ("A", "B"):
        for x, y, z in rng.uniform(0, 3000, (20, 3)):
            truth.append((run, "small", x, y, z))
            for _ in range(rng.integers(0, 3)):
                found.append((run, "small", *(rng.normal((x, y, z), 2)), rng.beta(6, 3)))
        found += [(run, "small", *xyz, rng.beta(3, 6)) for xyz in rng.uniform(0, 3000, (40, 3))]
    frame = picks(*found)
    return picks(*truth), frame.assign(score=(frame["score"] * levels).round() / levels)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), levels=st.sampled_from([8, 1000]))
def test_curves_are_what_the_score_gives_at_each_threshold(seed: int, levels: int) -> None:
    solution, found = scored_case(seed, levels)
    fitted = fit_thresholds(solution, found, PARTICLES)
    curve = fitted.curves["small"]
    assert curve[:, 0].tolist() == sorted(found["score"].unique(), reverse=True)
    for threshold, value in curve[:: max(1, len(curve) // 10)]:
        table = evaluate(solution, found[found["score"] >= threshold], particles=PARTICLES)
        assert value == pytest.approx(table.loc["small", "fbeta"], abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), levels=st.sampled_from([8, 1000]))
def test_the_chosen_threshold_is_as_good_as_the_best(seed: int, levels: int) -> None:
    solution, found = scored_case(seed, levels)
    fitted = fit_thresholds(solution, found, PARTICLES)
    table = evaluate(solution, found[found["score"] >= fitted.thresholds["small"]], particles=PARTICLES)
    assert fitted.fbeta["small"] == pytest.approx(table.loc["small", "fbeta"], abs=1e-12)
    assert fitted.fbeta["small"] >= fitted.curves["small"][:, 1].max() - PLATEAU


def test_a_threshold_between_well_separated_scores_is_halfway() -> None:
    solution = picks(*[("A", "small", 100.0 * i, 7, 9) for i in range(5)])
    right = [("A", "small", 100.0 * i, 7, 9, 0.8) for i in range(5)]
    wrong = [("A", "small", 100.0 * i + 50, 7, 9, 0.2) for i in range(20)]
    fitted = fit_thresholds(solution, picks(*right, *wrong), PARTICLES)
    assert fitted.thresholds["small"] == pytest.approx(0.5) and fitted.fbeta["small"] == 1


def test_particles_without_a_hit_keep_the_default() -> None:
    solution = picks(("A", "small", 1, 2, 3), ("A", "large", 1, 2, 3))
    fitted = fit_thresholds(solution, picks(("A", "small", 900, 2, 3, 0.7)), PARTICLES)
    assert fitted.thresholds == dict.fromkeys(PARTICLES.names, DEFAULT_THRESHOLD)
    assert fitted.fbeta == dict.fromkeys(PARTICLES.names, 0.0)
