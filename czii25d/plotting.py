"""Pictures of slices with true and found particles, and of scores against thresholds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from matplotlib.patheffects import withStroke
from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar
from scipy.spatial import cKDTree

from czii25d.files import write_aside

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from czii25d.geometry import Spacing3D
    from czii25d.particles import ParticleSet
    from czii25d.thresholds import CrossFit

_OUTLINE = [withStroke(linewidth=2.2, foreground="#00000099")]  # keeps light colours legible on a light slice
_DASHES = (0, (2, 1.5))
_ROUND_LENGTHS_NM = np.array([1, 2, 5, 10, 20, 50, 100, 200, 500, 1000])


def plot_picks(
    volume: NDArray[np.floating],
    voxel_spacing: Spacing3D,
    truth: pd.DataFrame | None,
    found: pd.DataFrame | None,
    particles: ParticleSet,
    path: Path | str,
    *,
    slice_num: int = 3,
    slab_size: int = 5,
    distance_multiplier: float = 0.5,
) -> None:
    """Draw slices of a tomogram with its true particles as circles and the found ones as marks.

    A true particle that was found has a full circle, a missed one a dashed; a found one that is true has a
    dot, a false one a cross. A slice shows those that it cuts within half their radius.

    Parameters
    ----------
    volume
        ``(D, H, W)``.
    voxel_spacing
        Angstrom per voxel along z, y, x.
    truth, found
        Picks of this tomogram, with columns ``particle, x, y, z`` in angstrom; ``None`` leaves them out.
    particles
        Radii and colours.
    path
        Where the picture goes; its suffix says what format.
    slice_num
        Number of slices, evenly spread over the depth.
    slab_size
        Number of voxels along z that a slice is the mean of.
    distance_multiplier
        A found particle is true within this multiple of its radius, as in the score.
    """
    dz, dy, dx = voxel_spacing
    depth, height, width = volume.shape
    centers_z = np.unique(((np.arange(slice_num) + 0.5) * depth / slice_num).astype(int))
    panel_height = 3.2 * height * dy / (width * dx)
    figure = Figure((3.2 * len(centers_z) + 1.7, panel_height + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(centers_z), squeeze=False)[0]
    for ax, center_z in zip(axes, centers_z, strict=True):
        start = max(0, center_z - slab_size // 2)
        section = volume[start : start + slab_size].mean(0, dtype=np.float32)
        low, high = np.percentile(section, [0.5, 99.5])
        edges = (-0.5 * dx, (width - 0.5) * dx, (height - 0.5) * dy, -0.5 * dy)
        ax.imshow(section, cmap="gray", vmin=low, vmax=high, extent=edges, interpolation="bilinear")
        ax.set(xlim=edges[:2], ylim=edges[2:], xticks=[], yticks=[])
        ax.set_title(f"z = {center_z * dz / 10:.0f} nm", fontsize=9)
        for particle in particles:
            true, picked = (_locations(frame, particle.name) for frame in (truth, found))
            reach = distance_multiplier * particle.radius
            is_hit, is_right = _nearest(true, picked)[0] <= reach, _nearest(picked, true)[0] <= reach
            is_cut = np.abs(true[:, 2] - center_z * dz) <= particle.radius / 2
            for (x, y, _), hit in zip(true[is_cut], is_hit[is_cut], strict=True):
                style = "-" if hit or found is None else _DASHES
                circle = Circle((x, y), particle.radius, fill=False, ec=particle.color, lw=1.2, ls=style)
                ax.add_patch(circle).set_path_effects(_OUTLINE)
            picked_z = picked[:, 2].copy()
            picked_z[is_right] = true[_nearest(picked, true)[1][is_right], 2]  # beside the circle it belongs to
            is_cut = np.abs(picked_z - center_z * dz) <= particle.radius / 2
            for marker, chosen in ((".", is_right | (truth is None)), ("x", ~is_right & (truth is not None))):
                x, y, _ = picked[is_cut & chosen].T
                ax.plot(x, y, marker, color=particle.color, ms=4, path_effects=_OUTLINE)
    _add_scale_bar(axes[0], width * dx)
    figure.legend(
        handles=_legend(particles, truth is not None, found is not None),
        loc="outside right center",
        fontsize=8,
        frameon=False,
    )
    with write_aside(path) as partial:
        figure.savefig(partial, dpi=200, format=Path(path).suffix[1:] or "png")


def plot_thresholds(fitted: CrossFit, path: Path | str) -> None:
    """Draw F-beta of all runs together against the threshold, a panel for each particle.

    The line is the threshold fitted to all runs, the band what leaving out one run at a time makes of it, and the
    dashes F-beta out of fold. A panel's title says what it shows, so that nothing hangs on its colour.

    Parameters
    ----------
    fitted
        See `czii25d.thresholds.cross_fit`.
    path
        Where the picture goes; its suffix says what format.
    """
    columns = min(3, len(fitted.particles))
    rows = -(-len(fitted.particles) // columns)
    figure = Figure((2.6 * columns + 0.4, 2.1 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for ax in panels.flat[len(fitted.particles) :]:
        ax.set_axis_off()
    for ax, particle, curve, chosen, (low, high), value in zip(
        panels.flat, fitted.particles, fitted.curves, fitted.thresholds, fitted.spread, fitted.fbeta, strict=False
    ):
        ax.set(xlim=(0, 1), ylim=(0, 1.02))
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
        ax.set_title(f"{particle.name}: none to fit to" if np.isnan(chosen) else particle.name, fontsize=9)
        if not np.isnan(low):
            ax.axvspan(low, high, color="0.85", lw=0)
        if not np.isnan(chosen):
            ax.axvline(chosen, color="0.2", lw=1)
            ax.axhline(value, color="0.2", lw=0.8, ls=_DASHES)
        # down to the next lower score, which is not included, a threshold keeps the same picks
        threshold, score = curve[::-1].T
        ax.plot(threshold, score, color=particle.color, lw=1.6, drawstyle="steps-pre", path_effects=_OUTLINE)
    figure.supxlabel("threshold", fontsize=9)
    figure.supylabel(f"F{fitted.beta:g}", fontsize=9)
    style: dict[str, Any] = {"color": "0.2"}
    handles = [
        Line2D([], [], lw=1, label="fitted to all runs", **style),
        Line2D([], [], lw=6, label="with one run left out", color="0.85"),
        Line2D([], [], lw=0.8, ls=_DASHES, label=f"F{fitted.beta:g} out of fold", **style),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    with write_aside(path) as partial:
        figure.savefig(partial, dpi=200, format=Path(path).suffix[1:] or "png")


def _locations(picks: pd.DataFrame | None, name: str) -> NDArray[np.float64]:
    """Return the ``(N, 3)`` locations, x y z in angstrom, of one particle."""
    if picks is None:
        return np.zeros((0, 3))
    return picks.loc[picks["particle"] == name, ["x", "y", "z"]].to_numpy(np.float64)


def _nearest(points: NDArray[np.float64], others: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Return for each of ``(N, 3)`` points distance and index of the nearest of the others, if any."""
    if not len(others):
        return np.full(len(points), np.inf), np.zeros(len(points), np.intp)
    distances, indices = cKDTree(others).query(points)
    return np.atleast_1d(distances), np.atleast_1d(indices)


def _add_scale_bar(ax: Axes, width: float) -> None:
    """Draw a bar of a round length, at most a quarter of the slice's ``width`` in angstrom."""
    nm = max(_ROUND_LENGTHS_NM[0], *_ROUND_LENGTHS_NM[_ROUND_LENGTHS_NM <= width / 40])
    bar = AnchoredSizeBar(
        ax.transData,
        nm * 10,
        f"{nm} nm",
        "lower left",
        pad=0.3,
        borderpad=0.4,
        sep=3,
        size_vertical=width / 100,
    )
    bar.patch.set(alpha=0.8, lw=0)
    ax.add_artist(bar)


def _legend(particles: ParticleSet, has_truth: bool, has_found: bool) -> list[Line2D]:
    """Return the legend's entries: what each colour and each mark means."""
    entries = [Line2D([], [], color=p.color, lw=3, label=p.name) for p in particles]
    circle, dashed = {"ls": "-", "lw": 1.2}, {"ls": _DASHES, "lw": 1.2}
    dot, cross = {"ls": "", "marker": ".", "ms": 5}, {"ls": "", "marker": "x", "ms": 5}
    marks: list[tuple[str, dict[str, Any]]] = []
    if has_truth and has_found:
        marks = [
            ("true, found", circle),
            ("true, missed", dashed),
            ("found, true", dot),
            ("found, false", cross),
        ]
    elif has_truth:
        marks = [("true", circle)]
    elif has_found:
        marks = [("found", dot)]
    return entries + [Line2D([], [], color="0.2", label=label, **style) for label, style in marks]
