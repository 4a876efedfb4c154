"""Thresholds that are judged on runs they have not seen, and how sure their score is. Pure NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from czii25d.errors import InputError
from czii25d.metrics import (
    BETA,
    DEFAULT_THRESHOLD,
    DISTANCE_MULTIPLIER,
    choose_threshold,
    fbeta,
    fbeta_curve,
    match,
    pool,
)
from czii25d.particles import ParticleSet, load_particles

RANKS = np.geomspace(1, 4, 9)  # picks per reference; empirical: about where recall that counts 16-fold has its best


@dataclass(frozen=True)
class CrossFit:
    """Thresholds fitted to all runs, and to all but each one; what both find. R runs, C particles.

    Parameters
    ----------
    runs
        In alphabetical order.
    particles
        In channel order.
    thresholds
        ``(C,)``, fitted to all runs: the ones to use. NaN: no hit to fit it to.
    left_out
        ``(R, C)``, fitted to all runs but this one. NaN as above; `czii25d.metrics.DEFAULT_THRESHOLD` stands in for it.
    counts
        ``(R, C, 3)``: references, picks and hits of each run at the thresholds that have not seen it.
    counts_on_all
        ``(R, C, 3)``: the same at the thresholds fitted to all runs.
    curves
        C arrays ``(N, 2)``: thresholds, descending, and F-beta of all runs together.
    beta
        Of F-beta.
    """

    runs: tuple[str, ...]
    particles: ParticleSet
    thresholds: NDArray[np.float64]
    left_out: NDArray[np.float64]
    counts: NDArray[np.int64]
    counts_on_all: NDArray[np.int64]
    curves: tuple[NDArray[np.float64], ...]
    beta: float = BETA

    @property
    def weights(self) -> NDArray[np.float64]:
        """``(C,)``, of the particles in the total."""
        return np.array([particle.weight for particle in self.particles])

    @property
    def fbeta(self) -> NDArray[np.float64]:
        """``(C + 1,)``, the total last: runs pooled, each judged at thresholds that have not seen it."""
        return total_fbeta(self.counts.sum(0), self.weights, self.beta)

    @property
    def fbeta_optimistic(self) -> NDArray[np.float64]:
        """``(C + 1,)``, the total last, at thresholds fitted to the very runs that they are judged on."""
        return total_fbeta(self.counts_on_all.sum(0), self.weights, self.beta)

    @property
    def spread(self) -> NDArray[np.float64]:
        """``(C, 2)``: lowest and highest of the thresholds fitted with one run left out; NaN where there is none."""
        known = [column[~np.isnan(column)] for column in self.left_out.T]
        return np.array([[column.min(), column.max()] if len(column) else [np.nan, np.nan] for column in known])


def cross_fit(
    solution: pd.DataFrame,
    scored_picks: pd.DataFrame,
    particles: ParticleSet | None = None,
    distance_multiplier: float = DISTANCE_MULTIPLIER,
    beta: float = BETA,
) -> CrossFit:
    """Fit thresholds to all runs but one and count what they find in that one, for each run in turn.

    How a threshold is fitted: `czii25d.metrics.choose_threshold`. Leaving out one at a time is Stone's
    cross-validation (J. R. Stat. Soc. B 36, 1974, 111-147). Picks and references are matched once.

    Parameters
    ----------
    solution, scored_picks
        As `czii25d.metrics.fit_thresholds`. The picks of a run must come from networks that have not seen it.

    Raises
    ------
    InputError
        If there are fewer than two runs, or as `czii25d.metrics.score`.
    """
    particles = particles or load_particles()
    matches = match(solution, scored_picks, particles, distance_multiplier)
    runs = tuple(sorted(next(iter(matches.values()))))
    if len(runs) < 2:
        raise InputError(
            "thresholds",
            "at least two runs, to fit on one and judge the other",
            ", ".join(runs) or "none",
            "hold out more runs",
        )
    thresholds, left_out, curves = np.full(len(particles), np.nan), np.full((len(runs), len(particles)), np.nan), []
    for channel, by_run in enumerate(matches.values()):
        curves.append(fbeta_curve(pool(by_run.values()), beta))
        thresholds[channel] = (choose_threshold(curves[-1]) or (np.nan,))[0]
        for index, run in enumerate(runs):
            others = pool(each for name, each in by_run.items() if name != run)
            left_out[index, channel] = (choose_threshold(fbeta_curve(others, beta)) or (np.nan,))[0]
    counts, counts_on_all = (
        np.array(
            [
                [by_run[run].count(least) for by_run, least in zip(matches.values(), row, strict=True)]
                for run, row in zip(runs, np.nan_to_num(table, nan=DEFAULT_THRESHOLD), strict=True)
            ]
        )
        for table in (left_out, np.tile(thresholds, (len(runs), 1)))
    )
    return CrossFit(runs, particles, thresholds, left_out, counts, counts_on_all, tuple(curves), beta)


def total_fbeta(counts: NDArray[np.integer], weights: ArrayLike, beta: float = BETA) -> NDArray[np.float64]:
    """Return F-beta of each particle and, last, their weighted mean, as the competition takes it.

    Parameters
    ----------
    counts
        ``(..., C, 3)``: references, picks, hits.
    weights
        ``(C,)`` or ``(..., C)``; a particle of weight 0 does not count.

    Returns
    -------
    fbeta
        ``(..., C + 1)``.
    """
    references, picks, hits = np.moveaxis(np.asarray(counts, float), -1, 0)
    values, shares = fbeta(hits, picks, references, beta), np.asarray(weights, float)
    total = (values * shares).sum(-1) / np.maximum(np.broadcast_to(shares, values.shape).sum(-1), np.finfo(float).tiny)
    return np.concatenate([values, total[..., None]], -1)


def bootstrap(
    counts: NDArray[np.integer],
    weights: Sequence[float] | NDArray[np.float64],
    beta: float = BETA,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Return percentile intervals of pooled F-beta over resamples of the runs.

    Runs, not picks, are drawn with replacement, because picks of one tomogram share its fate. Percentile intervals:
    Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13. The thresholds stay as they are. R runs
    give no more than ``(2 R - 1)! / (R! (R - 1)!)`` different resamples, 10 for three: with so few the interval is
    too short.

    Parameters
    ----------
    counts
        ``(R, C, 3)``: references, picks, hits of each run and particle, as in `CrossFit`.
    weights
        ``(C,)``, of the particles in the total.
    samples, level, seed
        Number of resamples, share of them within the interval (between 0 and 1), and seed.

    Returns
    -------
    intervals
        ``(C + 1, 2)``, the total last: lower and upper end. A resample in which a particle has no reference says
        nothing of it and is left out of its interval; in the total of that resample it has no weight. NaN where
        there is no reference at all.

    Raises
    ------
    InputError
        If ``samples`` or ``level`` are impossible.
    """
    if samples < 1:
        raise InputError("key bootstrap.samples", "at least 1", str(samples), "raise it")
    if not 0 < level < 1:
        raise InputError("key bootstrap.level", "a share between 0 and 1", str(level), "correct it, e.g. to 0.95")
    counts = np.asarray(counts)
    run_num = len(counts)
    drawn = np.random.default_rng(seed).multinomial(run_num, np.full(run_num, 1 / run_num), samples)
    pooled = np.tensordot(drawn, counts, 1)  # (samples, C, 3)
    absent = pooled[..., 0] == 0
    never = absent.all(0)  # as in the score itself, these count as 0 in every total
    values = total_fbeta(pooled, np.where(absent & ~never, 0.0, np.asarray(weights, float)), beta)
    values[:, :-1][absent] = np.nan
    ends = [(1 - level) / 2, (1 + level) / 2]
    known = [column[~np.isnan(column)] for column in values.T]
    return np.array([np.quantile(column, ends) if len(column) else [np.nan, np.nan] for column in known])


def ranked_fbeta(
    solution: pd.DataFrame,
    scored_picks: pd.DataFrame,
    particles: ParticleSet | None = None,
    distance_multiplier: float = DISTANCE_MULTIPLIER,
    beta: float = BETA,
) -> dict[str, float]:
    """Return F-beta by particle and its weighted ``total`` without any threshold, to choose between networks.

    It is the mean of the F-beta of the best-scored picks, as many as there are references up to four times as many
    (``RANKS``, evenly in the logarithm). No maximum is taken over anything, so a lucky threshold does not count, and
    only the order of the scores matters, so a network that scores low throughout is not at a disadvantage. Where
    there are fewer picks, all of them are taken. Arguments as `czii25d.metrics.fit_thresholds`.
    """
    particles = particles or load_particles()
    values = {}
    for name, by_run in match(solution, scored_picks, particles, distance_multiplier).items():
        pooled = pool(by_run.values())
        values[name] = 0.0
        if pooled.references and len(pooled.scores):
            ranks = np.minimum(np.ceil(RANKS * pooled.references - 1e-9).astype(int), len(pooled.scores))
            counts = np.array([pooled.count(pooled.scores[-rank]) for rank in ranks], float)
            values[name] = float(fbeta(counts[:, 2], counts[:, 1], counts[:, 0], beta).mean())
    weights = np.array([particle.weight for particle in particles])
    total = float(np.dot(list(values.values()), weights) / max(weights.sum(), np.finfo(float).tiny))
    return {**values, "total": total}
