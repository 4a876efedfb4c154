"""Pictures of slices with true and found particles, of average particles, and of scores against thresholds.

A particle's outline has the area of its disc and a shape that goes with its colour, so that nothing hangs on colours
alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon
from matplotlib.patheffects import AbstractPathEffect, withStroke
from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar
from PIL import Image
from scipy.spatial import cKDTree

from czii25d.files import write_aside

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from czii25d.geometry import Spacing3D
    from czii25d.particles import ParticleSet
    from czii25d.thresholds import CrossFit

LIGHT: dict[Any, Any] = {}  # colours of text and paper: matplotlib's own, black on white
DARK: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#d5d9de"),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "#171a1f"),
}

STROKE: list[AbstractPathEffect] = [
    withStroke(linewidth=2.2, foreground="#00000099")
]  # keeps light colours legible on a light slice
_DASHES = (0, (2, 1.5))
_ROUND_LENGTHS_NM = np.array([1, 2, 5, 10, 20, 50, 100, 200, 500, 1000])


def _star(corners: int, inner: float) -> NDArray[np.float64]:
    angles = np.pi * np.arange(2 * corners) / corners
    radii = np.where(np.arange(2 * corners) % 2, inner, 1.0)
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], 1)


def _polygon(corners: int, turn: float = 0.0) -> NDArray[np.float64]:
    angles = 2 * np.pi * (np.arange(corners) / corners + turn)
    return np.stack([np.sin(angles), -np.cos(angles)], 1)


# The first is a circle; neighbours, which are often of one size, differ most. y points down.
_SHAPES = [
    _polygon(48),
    _polygon(4),
    _polygon(3),
    _polygon(4, 1 / 8),
    _polygon(6),
    _polygon(3, 1 / 2),
    _star(5, 0.5),
    _star(4, 0.5),
]


def outline(channel: int) -> NDArray[np.float64]:
    """Return the ``(N, 2)`` corners, x y with y downwards, of a particle's outline of the area of the unit disc.

    They repeat after eight particles.
    """
    corners = _SHAPES[channel % len(_SHAPES)]
    x, y = corners.T
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    return corners * np.sqrt(np.pi / area)


def outline_marker(channel: int) -> NDArray[np.float64]:
    """Return the closed `outline` as a marker, whose y points upwards."""
    corners = outline(channel) * (1, -1)
    return np.vstack([corners, corners[:1]])


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
    """Draw slices of a tomogram with its true particles as outlines and the found ones as marks.

    A true particle that was found has a full outline, a missed one a dashed; a found one that is true has a
    dot, a false one a cross in a thin outline. A slice shows those that it cuts within half their radius.

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
    _, dy, dx = voxel_spacing
    depth, height, width = volume.shape
    centers_z = np.unique(((np.arange(slice_num) + 0.5) * depth / slice_num).astype(int))
    panel_height = 3.2 * height * dy / (width * dx)
    with saved_figure(path, (3.2 * len(centers_z) + 1.7, panel_height + 0.3)) as figure:
        axes = figure.subplots(1, len(centers_z), squeeze=False)[0]
        for ax, center_z in zip(axes, centers_z, strict=True):
            section = volume[slice(*slab_of(center_z, depth, slab_size))].mean(0, dtype=np.float32)
            _draw_section(ax, section, voxel_spacing)
            _draw_particles(ax, center_z * voxel_spacing[0], truth, found, particles, distance_multiplier)
            ax.set_title(f"z = {center_z * voxel_spacing[0] / 10:.0f} nm", fontsize=9)
        _add_scale_bar(axes[0], width * dx)
        figure.legend(
            handles=_legend(particles, truth is not None, found is not None),
            loc="outside right center",
            fontsize=8,
            frameon=False,
        )


def plot_slice(
    section: NDArray[np.floating],
    z: float,
    voxel_spacing: Spacing3D,
    truth: pd.DataFrame | None,
    found: pd.DataFrame | None,
    particles: ParticleSet,
    path: Path | str,
    *,
    distance_multiplier: float = 0.5,
) -> dict[str, int]:
    """Draw one slice as `plot_picks` does, with its legend below; return how many of each particle it shows as found.

    Parameters
    ----------
    section
        ``(H, W)``, the mean of the planes about ``z``.
    z
        Angstrom.
    truth, found, particles, path, distance_multiplier
        See `plot_picks`.
    """
    _, dy, dx = voxel_spacing
    height, width = section.shape
    handles = _legend(particles, truth is not None, found is not None, DARK["text.color"])
    columns = 2
    rows = -(-len(handles) // columns)
    with _saved_small(path, (5.0, 5.0 * height * dy / (width * dx) + 0.2 * rows + 0.1)) as figure:
        ax = figure.subplots()
        _draw_section(ax, section, voxel_spacing)
        counts = _draw_particles(ax, z, truth, found, particles, distance_multiplier)
        for handle in handles[: len(particles)] if found is not None else ():
            handle.set_label(f"{handle.get_label()} ({counts[str(handle.get_label())]})")
        _add_scale_bar(ax, width * dx)
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=columns,
            fontsize=9,
            frameon=False,
            labelspacing=0.35,
        )
    return counts


def plot_average(average: NDArray[np.floating], voxel_spacing: Spacing3D, path: Path | str) -> None:
    """Draw the three central slices, xy, xz and yz, of a box ``(D, H, W)`` with ``voxel_spacing`` along z, y, x."""
    dz, dy, dx = voxel_spacing
    z, y, x = (side // 2 for side in average.shape)
    low, high = np.percentile(average, [0.5, 99.5])
    sections = {"xy": (average[z], dy, dx), "xz": (average[:, y], dz, dx), "yz": (average[:, :, x], dz, dy)}
    with saved_figure(path, (3.6, 1.42), DARK) as figure:
        figure.set_layout_engine("constrained", h_pad=0.07)
        axes = figure.subplots(1, 3)
        for ax, (plane, (section, down, across)) in zip(axes, sections.items(), strict=True):
            extent = (0, section.shape[1] * across, section.shape[0] * down, 0)
            ax.imshow(section, cmap="gray", vmin=low, vmax=high, extent=extent, interpolation="bilinear")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            ax.set_title(plane, fontsize=8)
        _add_scale_bar(axes[0], average.shape[2] * dx * 1.6)


def slab_of(center_z: int, depth: int, slab_size: int = 5) -> tuple[int, int]:
    """Return first plane and end of the slab, in voxels, of which a picture of a slice is the mean."""
    start = max(0, center_z - slab_size // 2)
    return start, min(start + slab_size, depth)


def fullest_slice(picks: pd.DataFrame, particles: ParticleSet, voxel_spacing: Spacing3D, depth: int) -> int:
    """Return the plane that cuts most of the picks, as `plot_picks` draws them; the middle one where there are none."""
    radii = picks["particle"].map(dict(zip(particles.names, particles.radii, strict=True))).to_numpy(float)
    distances = np.abs(np.arange(depth)[:, None] * voxel_spacing[0] - picks["z"].to_numpy(float))
    counts = (distances <= radii / 2).sum(1)
    best = np.flatnonzero(counts == counts.max())
    return int(best[np.abs(best - depth // 2).argmin()])


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
    with saved_figure(path, (2.6 * columns + 0.4, 2.1 * rows + 0.6)) as figure:
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
            ax.plot(threshold, score, color=particle.color, lw=1.6, drawstyle="steps-pre", path_effects=STROKE)
        figure.supxlabel("threshold", fontsize=9)
        figure.supylabel(f"F{fitted.beta:g}", fontsize=9)
        style: dict[str, Any] = {"color": "0.2"}
        handles = [
            Line2D([], [], lw=1, label="fitted to all runs", **style),
            Line2D([], [], lw=6, label="with one run left out", color="0.85"),
            Line2D([], [], lw=0.8, ls=_DASHES, label=f"F{fitted.beta:g} out of fold", **style),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8, frameon=False)


@contextmanager
def saved_figure(path: Path | str, size: tuple[float, float], theme: Mapping[Any, Any] = LIGHT) -> Iterator[Figure]:
    """Yield a figure of so many inches to draw in, and write it in the format that the suffix says."""
    with rc_context(dict(theme)):
        figure = Figure(size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with write_aside(path) as partial:
            figure.savefig(partial, dpi=200, format=Path(path).suffix[1:] or "png")


@contextmanager
def _saved_small(path: Path | str, size: tuple[float, float]) -> Iterator[Figure]:
    """Yield a figure for dark paper, and write it as a PNG of 256 colours: noise takes a third of the space so."""
    with rc_context(DARK):
        figure = Figure(size, layout="constrained", dpi=200)
        canvas = FigureCanvasAgg(figure)
        yield figure
        canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        with write_aside(path) as partial:
            picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(partial, "png")


def _draw_section(ax: Axes, section: NDArray[np.floating], voxel_spacing: Spacing3D) -> None:
    """Show a section ``(H, W)``, its axes in angstrom."""
    _, dy, dx = voxel_spacing
    height, width = section.shape
    low, high = np.percentile(section, [0.5, 99.5])
    edges = (-0.5 * dx, (width - 0.5) * dx, (height - 0.5) * dy, -0.5 * dy)
    ax.imshow(section, cmap="gray", vmin=low, vmax=high, extent=edges, interpolation="bilinear")
    ax.set(xlim=edges[:2], ylim=edges[2:], xticks=[], yticks=[])


def _draw_particles(
    ax: Axes,
    z: float,
    truth: pd.DataFrame | None,
    found: pd.DataFrame | None,
    particles: ParticleSet,
    distance_multiplier: float,
) -> dict[str, int]:
    """Draw what a slice at ``z`` angstrom cuts, and return how many of each particle were found in it."""
    counts = {}
    for channel, particle in enumerate(particles):
        true, picked = (_locations(frame, particle.name) for frame in (truth, found))
        reach = distance_multiplier * particle.radius
        is_hit, is_right = _nearest(true, picked)[0] <= reach, _nearest(picked, true)[0] <= reach
        shape = particle.radius * outline(channel)

        def draw(point: NDArray[np.float64], shape: NDArray[np.float64] = shape, **style: Any) -> None:
            ax.add_patch(Polygon(point + shape, fill=False, **style)).set_path_effects(STROKE)

        is_cut = np.abs(true[:, 2] - z) <= particle.radius / 2
        for point, hit in zip(true[is_cut, :2], is_hit[is_cut], strict=True):
            draw(point, ec=particle.color, lw=1.2, ls="-" if hit or found is None else _DASHES)
        picked_z = picked[:, 2].copy()
        picked_z[is_right] = true[_nearest(picked, true)[1][is_right], 2]  # beside the outline it belongs to
        is_cut = np.abs(picked_z - z) <= particle.radius / 2
        counts[particle.name] = int(is_cut.sum())
        for point in picked[is_cut & ~is_right, :2]:
            draw(point, ec=particle.color, lw=1.2 if truth is None else 0.7)
        for marker, chosen in ((".", is_right | (truth is None)), ("x", ~is_right & (truth is not None))):
            x, y, _ = picked[is_cut & chosen].T
            ax.plot(x, y, marker, color=particle.color, ms=4, path_effects=STROKE)
    return counts


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
        fontproperties=FontProperties(size=8),
    )
    bar.patch.set(alpha=0.8, lw=0)
    ax.add_artist(bar)


def _legend(
    particles: ParticleSet,
    has_truth: bool,
    has_found: bool,
    ink: str = "0.2",
) -> list[Line2D]:
    """Return the legend's entries: what each shape and colour and each mark means, the particles' first."""
    entries = []
    for channel, particle in enumerate(particles):
        style: dict[str, Any] = {"marker": outline_marker(channel), "mfc": "none", "mec": particle.color}
        entries.append(Line2D([], [], ls="", mew=1.5, ms=8, label=particle.name, **style))
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
    return entries + [Line2D([], [], color=ink, label=label, **style) for label, style in marks]
