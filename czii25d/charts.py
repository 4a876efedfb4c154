"""Charts of scores, of precision and recall, and of a training, for light and for dark paper."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from czii25d.plotting import LIGHT, STROKE, outline_marker, saved_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray

    from czii25d.particles import Particle, ParticleSet

_SIZE = (3.1, 2.0)  # inches
_BINS = 40
_GRAY = "#8a9099"  # legible on both papers
_STYLES = ("-", "--", ":")


def plot_scores(
    scores: NDArray[np.float64],
    is_near: NDArray[np.bool_] | None,
    threshold: float,
    particle: Particle,
    path: Path | str,
    theme: Mapping[str, Any] = LIGHT,
) -> None:
    """Draw how many picks of a particle have which score, and the threshold.

    Parameters
    ----------
    scores
        ``(N,)``.
    is_near
        ``(N,)``: whether a true particle is near, for a histogram of either kind; ``None``: not known.
    path
        Where the picture goes; its suffix says what format.
    theme
        `czii25d.plotting.LIGHT` or ``DARK``.
    """
    edges = np.linspace(min(0.0, scores.min(initial=0)), max(1.0, scores.max(initial=1)), _BINS + 1)
    kinds = {"picks": scores}
    if is_near is not None:
        kinds = {"false": scores[~is_near], "true": scores[is_near]}
    with saved_figure(path, _SIZE, theme) as figure:
        ax = _axes(figure.subplots(), "score", "picks")
        for (label, values), color in zip(kinds.items(), [_GRAY, particle.color][-len(kinds) :], strict=True):
            edge = 0.7 * np.array(to_rgb(color)) + 0.3 * np.array(to_rgb(ax.xaxis.label.get_color()))
            style: dict[str, Any] = {"histtype": "stepfilled", "fc": f"{color}66", "ec": edge, "lw": 1.3}
            ax.hist(values, list(edges), label=label, hatch="////" if color == _GRAY else None, **style)
        ax.set_yscale("log")
        ax.set_ylim(0.7, None if len(scores) else 10)
        ax.set_xlim(edges[0], edges[-1])
        ax.axvline(threshold, color=ax.xaxis.label.get_color(), lw=1.2, ls="--", label="threshold")
        _legend_above(ax)


def plot_precision_recall(
    curve: NDArray[np.float64],
    threshold: float,
    particle: Particle,
    channel: int,
    path: Path | str,
    theme: Mapping[str, Any] = LIGHT,
) -> None:
    """Draw precision against recall, with the mark of the particle at the threshold.

    Parameters
    ----------
    curve
        ``(N, 3)``, as `czii25d.metrics.precision_recall_curve` gives it.
    channel
        Of the particle: its shape.
    path, theme
        As `plot_scores`.
    """
    tried, precision, recall = curve.T
    kept = np.flatnonzero(tried >= threshold)
    with saved_figure(path, _SIZE, theme) as figure:
        ax = _axes(figure.subplots(), "recall", "precision")
        ax.set(xlim=(0, 1.03), ylim=(0, 1.05))
        ax.plot(recall, precision, color=particle.color, lw=1.8, path_effects=STROKE)
        if len(kept):
            style: dict[str, Any] = {"marker": outline_marker(channel), "mfc": particle.color}
            at = recall[kept[-1]], precision[kept[-1]]
            ink = ax.xaxis.label.get_color()
            ax.plot(*at, ls="", mec=ink, ms=11, clip_on=False, zorder=3, label="at the threshold", **style)
            _legend_above(ax)


def plot_epochs(
    epochs: ArrayLike,
    lines: Mapping[str, NDArray[np.float64]],
    ylabel: str,
    path: Path | str,
    theme: Mapping[str, Any] = LIGHT,
    *,
    particles: ParticleSet | None = None,
    log: bool = False,
) -> None:
    """Draw one or more values of a training over its epochs, counted from 1; NaN: not measured then.

    Parameters
    ----------
    lines
        By label; those called as one of ``particles`` have its colour and mark.
    log
        A logarithmic axis; otherwise it goes from 0 to 1.
    path, theme
        As `plot_scores`.
    """
    with saved_figure(path, _SIZE, theme) as figure:
        ax = _axes(figure.subplots(), "epoch", ylabel)
        for index, (label, values) in enumerate(lines.items()):
            known = ~np.isnan(values)
            style: dict[str, Any] = {
                "color": ax.xaxis.label.get_color(),
                "ls": _STYLES[index % len(_STYLES)],
                "marker": ".",
            }
            if particles is not None:
                channel = particles.channel(label)
                style = {"color": particles[channel].color, "marker": outline_marker(channel), "path_effects": STROKE}
            ax.plot(np.asarray(epochs)[known], values[known], lw=1.5, ms=5, label=label, **style)
        ax.set_xlim(np.min(epochs) - 0.5, np.max(epochs) + 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if log:
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.yaxis.set_minor_locator(NullLocator())
        else:
            ax.set_ylim(0, 1.03)
        if particles is None and len(lines) > 1:
            _legend_above(ax)


def _axes(ax: Axes, xlabel: str, ylabel: str) -> Axes:
    ax.set_xlabel(xlabel, fontsize=8.5)
    ax.set_ylabel(ylabel, fontsize=8.5)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _legend_above(ax: Axes) -> None:
    """Put the legend in one line above the axes, where it hides nothing."""
    ax.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.2)
