"""The competition's score, a table per particle, and thresholds fitted to it. Pure NumPy on pick frames."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from czii25d.errors import InputError
from czii25d.particles import ParticleSet, load_particles

DISTANCE_MULTIPLIER = 0.5  # of a particle's radius: how far a hit may lie
BETA = 4.0
DEFAULT_THRESHOLD = 0.3  # empirical; for a class that no reference has
PLATEAU = 0.01  # F-beta this near the best counts as as good


def score(
    solution: pd.DataFrame,
    submission: pd.DataFrame,
    distance_multiplier: float = DISTANCE_MULTIPLIER,
    beta: float = BETA,
    particles: ParticleSet | None = None,
    weighted: bool = True,
) -> float:
    """Return the number the CZII competition would give.

    Hits are *distinct references* with a pick within ``distance_multiplier`` radii, the limit included; every pick
    beyond their number is false, so one pick may hit two references. Counts are pooled over runs, F-beta is
    taken per particle, and the total is the mean weighted by the particles' weights. Runs that the solution does not
    name do not count.

    Parameters
    ----------
    solution, submission
        Columns ``experiment`` (or ``run``), ``particle_type`` (or ``particle``), ``x``, ``y``, ``z`` in angstrom.
    particles
        Radii and weights; the competition's six by default.
    weighted
        ``False``: the plain mean over particles.

    Raises
    ------
    InputError
        If columns are missing, coordinates are not finite, or a particle is unknown.
    """
    table = evaluate(solution, submission, distance_multiplier, beta, particles)
    rows = table.drop(index="total")
    return float(table["fbeta"]["total"] if weighted else rows["fbeta"].mean())


def evaluate(
    solution: pd.DataFrame,
    submission: pd.DataFrame,
    distance_multiplier: float = DISTANCE_MULTIPLIER,
    beta: float = BETA,
    particles: ParticleSet | None = None,
) -> pd.DataFrame:
    """Return counts, precision, recall and F-beta of each particle, and a ``total`` row; arguments as `score`.

    Columns ``references, picks, hits, precision, recall, fbeta, weight``. The total's precision and recall are those of
    all picks together; its F-beta is the weighted mean.
    """
    particles = particles or load_particles()
    truth = _normalise(solution, particles, "solution")
    picks = _normalise(submission, particles, "submission")
    picks = picks[picks["run"].isin(truth["run"].unique())]
    rows = {}
    for particle in particles:
        pairs = list(_point_sets(truth, picks, particle.name))
        references, found = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
        reach = particle.radius * distance_multiplier
        hits = sum(int(_is_hit(points, candidates, reach).sum()) for points, candidates, _ in pairs)
        rows[particle.name] = {
            "references": references,
            "picks": found,
            "hits": hits,
            "weight": particle.weight,
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    counts = table[["references", "picks", "hits"]]
    of_all, of_picks, of_hits = counts.to_numpy(float).T
    table["fbeta"] = fbeta(of_hits, of_picks, of_all, beta)
    total = counts.sum().to_dict() | {"weight": table["weight"].sum()}
    weight = max(float(table["weight"].sum()), np.finfo(float).tiny)
    total["fbeta"] = float((table["fbeta"] * table["weight"]).sum() / weight)
    table.loc["total"] = total
    table["precision"] = _ratio(table["hits"].to_numpy(float), table["picks"].to_numpy(float))
    table["recall"] = _ratio(table["hits"].to_numpy(float), table["references"].to_numpy(float))
    for name in ("references", "picks", "hits"):
        table[name] = table[name].astype(int)
    return table[["references", "picks", "hits", "precision", "recall", "fbeta", "weight"]]


def fbeta(
    hits: NDArray[np.float64], picks: NDArray[np.float64], references: NDArray[np.float64], beta: float = BETA
) -> NDArray[np.float64]:
    """Return ``(1 + b²) P R / (b² P + R)``, which is ``(1 + b²) hits / (b² references + picks)``; 0 without hits.

    After van Rijsbergen, Information Retrieval, 1979. Arrays broadcast.
    """
    return _ratio((1 + beta**2) * hits, beta**2 * references + picks)


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(below > 0, above / np.where(below > 0, below, 1), 0.0)


@dataclass(frozen=True)
class Thresholds:
    """Thresholds fitted to references.

    Parameters
    ----------
    thresholds
        By particle: keep picks of at least this score.
    fbeta
        By particle: what they give on the data they were fitted to.
    curves
        By particle: ``(N, 2)`` thresholds, descending, and their F-beta.
    """

    thresholds: dict[str, float]
    fbeta: dict[str, float]
    curves: dict[str, NDArray[np.float64]]


def fit_thresholds(
    solution: pd.DataFrame,
    scored_picks: pd.DataFrame,
    particles: ParticleSet | None = None,
    distance_multiplier: float = DISTANCE_MULTIPLIER,
    beta: float = BETA,
) -> Thresholds:
    """Choose each particle's threshold for the highest F-beta.

    Every score that occurs is tried, not a grid. Of the stretch of thresholds about the best one that do as well within
    ``PLATEAU``, the middle is taken: it holds better on other data than the very best. A particle without
    references gets ``DEFAULT_THRESHOLD``.

    Parameters
    ----------
    solution, scored_picks
        As `score`; the picks with a column ``score``, none left out above the smallest threshold of interest.
    """
    particles = particles or load_particles()
    thresholds, values, curves = {}, {}, {}
    for name, by_run in match(solution, scored_picks, particles, distance_multiplier).items():
        curves[name] = fbeta_curve(pool(by_run.values()), beta)
        thresholds[name], values[name] = choose_threshold(curves[name]) or (DEFAULT_THRESHOLD, 0.0)
    return Thresholds(thresholds, values, curves)


@dataclass(frozen=True)
class Matches:
    """Picks and references of one particle in one run, brought together once to count hits at any threshold.

    Parameters
    ----------
    references
        Their number.
    scores
        ``(M,)`` of the picks, ascending.
    best_hits
        ``(H,)``, ascending: of each reference that any pick hits, the highest score of such a pick.
    """

    references: int
    scores: NDArray[np.float64]
    best_hits: NDArray[np.float64]

    def count(self, threshold: float) -> tuple[int, int, int]:
        """Return references, picks and hits, of picks that score at least ``threshold``."""
        below = np.searchsorted(self.scores, threshold), np.searchsorted(self.best_hits, threshold)
        return self.references, len(self.scores) - int(below[0]), len(self.best_hits) - int(below[1])


def match(
    solution: pd.DataFrame,
    scored_picks: pd.DataFrame,
    particles: ParticleSet | None = None,
    distance_multiplier: float = DISTANCE_MULTIPLIER,
) -> dict[str, dict[str, Matches]]:
    """Bring picks and references together, by particle and by run of the solution; arguments as `fit_thresholds`."""
    particles = particles or load_particles()
    truth = _normalise(solution, particles, "solution")
    picks = _normalise(scored_picks, particles, "picks", scored=True)
    runs = [str(run) for run in truth["run"].unique()]
    return {
        particle.name: {
            run: Matches(len(points), np.sort(scores), np.sort(_best_hit(points, candidates, scores, reach)))
            for run, (points, candidates, scores) in zip(runs, _point_sets(truth, picks, particle.name), strict=True)
        }
        for particle in particles
        for reach in [particle.radius * distance_multiplier]
    }


def pool(matches: Iterable[Matches]) -> Matches:
    """Return several runs as one, as the competition counts them."""
    parts = list(matches)
    scores, best_hits = (
        np.sort(np.concatenate([np.empty(0), *arrays]))
        for arrays in ([part.scores for part in parts], [part.best_hits for part in parts])
    )
    return Matches(sum(part.references for part in parts), scores, best_hits)


def fbeta_curve(matches: Matches, beta: float = BETA) -> NDArray[np.float64]:
    """Return ``(N, 2)``: every score that occurs, descending, and the F-beta of the picks of at least that score."""
    tried, found, hits, references = _counts_at_scores(matches)
    return np.stack([tried, fbeta(hits, found, references, beta)], 1)


def precision_recall_curve(matches: Matches) -> NDArray[np.float64]:
    """Return ``(N, 3)``: every score that occurs, descending, and precision and recall of the picks of at least that.

    Hits are distinct references, as in `score`.
    """
    tried, found, hits, references = _counts_at_scores(matches)
    return np.stack([tried, _ratio(hits, found), _ratio(hits, references)], 1)


def _counts_at_scores(matches: Matches) -> tuple[NDArray[np.float64], ...]:
    """Return four arrays ``(N,)``: every score that occurs, descending; picks, hits and references from it up."""
    tried = np.unique(matches.scores)[::-1]
    found = (len(matches.scores) - np.searchsorted(matches.scores, tried)).astype(float)
    hits = (len(matches.best_hits) - np.searchsorted(matches.best_hits, tried)).astype(float)
    return tried, found, hits, np.full(len(tried), float(matches.references))


def near_reference(
    solution: pd.DataFrame,
    picks: pd.DataFrame,
    particles: ParticleSet,
    distance_multiplier: float = DISTANCE_MULTIPLIER,
) -> NDArray[np.bool_]:
    """Tell of each pick whether a reference of its particle and run lies within ``distance_multiplier`` radii."""
    near = np.zeros(len(picks), bool)
    truth = {key: frame[["x", "y", "z"]].to_numpy(float) for key, frame in solution.groupby(["run", "particle"])}
    for key, rows in picks.groupby(["run", "particle"]).indices.items():
        if key in truth:
            reach = particles[particles.channel(str(key[1]))].radius * distance_multiplier
            near[rows] = _is_hit(picks[["x", "y", "z"]].to_numpy(float)[rows], truth[key], reach)
    return near


def choose_threshold(curve: NDArray[np.float64]) -> tuple[float, float] | None:
    """Return the middle of the stretch about the best threshold that does as well within ``PLATEAU``, and its F-beta.

    Parameters
    ----------
    curve
        ``(N, 2)``, as `fbeta_curve` gives it. One without a hit has no best threshold: ``None``.
    """
    tried, values = curve.T
    if not len(tried) or values.max() == 0:
        return None
    best = int(values.argmax())
    worse = np.flatnonzero(values < values[best] - PLATEAU)
    first = int(worse[worse < best].max(initial=-1)) + 1
    last = int(worse[worse > best].min(initial=len(values))) - 1
    below = tried[min(last + 1, len(tried) - 1)]  # down to the next score, nothing changes
    middle = float(tried[first] + below) / 2
    return middle, float(values[np.flatnonzero(tried >= middle).max()])


def _normalise(frame: pd.DataFrame, particles: ParticleSet, where: str, scored: bool = False) -> pd.DataFrame:
    """Return columns ``run, particle, x, y, z`` (and ``score``) whichever vocabulary the frame uses."""
    frame = frame.rename(columns={"experiment": "run", "particle_type": "particle"})
    wanted = ["run", "particle", "x", "y", "z", *(["score"] if scored else [])]
    missing = [name for name in wanted if name not in frame.columns]
    if missing:
        raise InputError(where, f"columns {', '.join(wanted)}", f"no {', '.join(missing)}", "add them")
    frame = frame[wanted]
    for name in frame["particle"].unique():
        particles.channel(str(name))
    if not np.isfinite(frame[wanted[2:]].to_numpy(float)).all():
        raise InputError(where, "finite numbers", "NaN or infinity", "correct these rows")
    return frame


def _point_sets(
    truth: pd.DataFrame, picks: pd.DataFrame, name: str
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]]:
    """Yield references ``(N, 3)``, picks ``(M, 3)`` and their scores ``(M,)`` of one particle, run by run."""
    axes = ["x", "y", "z"]
    references = dict(list(truth[truth["particle"] == name].groupby("run")))
    found = dict(list(picks[picks["particle"] == name].groupby("run")))
    for run in truth["run"].unique():
        points, candidates = references.get(run, truth[:0]), found.get(run, picks[:0])
        scores = candidates["score"].to_numpy(float) if "score" in candidates else np.zeros(len(candidates))
        yield points[axes].to_numpy(float), candidates[axes].to_numpy(float), scores


def _is_hit(references: NDArray[np.float64], candidates: NDArray[np.float64], reach: float) -> NDArray[np.bool_]:
    """Tell of each reference whether a pick lies within ``reach`` angstrom."""
    if not len(references) or not len(candidates):
        return np.zeros(len(references), bool)
    return np.asarray(cKDTree(candidates).query_ball_point(references, reach, return_length=True)) > 0


def _best_hit(
    references: NDArray[np.float64],
    candidates: NDArray[np.float64],
    scores: NDArray[np.float64],
    reach: float,
) -> NDArray[np.float64]:
    """Return the highest score within ``reach`` of each reference that has one."""
    if not len(references) or not len(candidates):
        return np.empty(0)
    near = cKDTree(candidates).query_ball_point(references, reach)
    return np.array([scores[hits].max() for hits in near if hits])
