"""Draw docs/images/coordinates.png: one particle on a row of voxels, as each format's own code writes it.

python docs/figures/coordinates.py [TARGET]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import pandas as pd
import starfile

from czii25d.formats import TomogramGrid, write_picks
from czii25d.particles import Particle, ParticleSet

SPACING, BINNING, SHAPE, X = 10.0, 4, (8, 8, 8), 50.0  # angstrom, pixels per voxel, voxels, angstrom
PARTICLES = ParticleSet([Particle("ribosome", radius=20.0)])
BLUE, RED, GREY = "#0072B2", "#D55E00", "0.45"


def stored_x() -> dict[str, float]:
    """Return what each format writes for x, by format."""
    picks = pd.DataFrame({"run": ["TS_1"], "particle": ["ribosome"], "x": [X], "y": [X], "z": [X]})
    grid = TomogramGrid((SPACING,) * 3, SHAPE)
    with tempfile.TemporaryDirectory() as folder:

        def write(name: str, format: str) -> Path:
            target = Path(folder) / name
            write_picks(target, picks, format, particles=PARTICLES, grids=grid, pixel_size=SPACING / BINNING)
            return target

        relion4 = starfile.read(write("4.star", "relion4"), always_dict=True)["particles"]["rlnCoordinateX"]
        relion5 = starfile.read(write("5.star", "relion5"), always_dict=True)["particles"][
            "rlnCenteredCoordinateXAngst"
        ]
        imod = write("TS_1.txt", "imod-text").read_text().split()[2]
        cbox = starfile.read(write("TS_1.cbox", "cbox"), always_dict=True)["cryolo"]["CoordinateX"]
        return {
            "relion4": float(relion4.iloc[0]),
            "relion5": float(relion5.iloc[0]),
            "imod": float(imod),
            "cbox": float(cbox.iloc[0]),
        }


def draw(target: Path) -> None:
    """Draw the row of voxels, and a ruler of each format below it."""
    stored = stored_x()
    rulers = (  # name; angstrom of its 0; angstrom per unit; what it writes; of which place in angstrom
        ("czii25d, copick: angstrom", 0.0, 1.0, X, X, 10),
        ("voxel index", 0.0, SPACING, X / SPACING, X, 1),
        ("RELION 4: unbinned pixels", 0.0, SPACING / BINNING, stored["relion4"], X, 4),
        ("RELION 5: angstrom from its centre", X - stored["relion5"], 1.0, stored["relion5"], X, 10),
        ("IMOD, x and y: voxels", X - stored["imod"] * SPACING, SPACING, stored["imod"], X, 1),
        ("CBOX, x and y: corner of the box", 0.0, SPACING, stored["cbox"], stored["cbox"] * SPACING, 1),
    )
    figure, axes = plt.subplots(figsize=(9, 4.6), dpi=130)
    left, right = -SPACING / 2, (SHAPE[2] - 0.5) * SPACING
    for index in range(SHAPE[2]):
        axes.add_patch(plt.Rectangle((left + index * SPACING, 0.3), SPACING, 1, facecolor="0.93", edgecolor="0.6"))
        axes.plot(index * SPACING, 0.8, ".", color=GREY, markersize=4)
        axes.text(index * SPACING, 1.4, f"voxel {index}", ha="center", fontsize=8, color=GREY)
    axes.plot(X, 0.8, "o", color=RED, markersize=11)
    axes.axvline(X, 0.08, 0.86, zorder=0, color=RED, linewidth=0.8, linestyle=":")
    for row, (name, zero, unit, value, place, step) in enumerate(rulers):
        height = -0.55 - 0.85 * row
        axes.plot([left, right], [height, height], color="0.3", linewidth=0.8)
        first = -int((zero - left) / (unit * step))
        count = int((right - zero) / (unit * step))
        for tick in range(first, count + 1):
            at = zero + tick * step * unit
            is_zero = tick == 0
            axes.plot(
                [at, at], [height, height + 0.16], color=BLUE if is_zero else "0.3", linewidth=2 if is_zero else 0.8
            )
            axes.text(
                *(at, height - 0.08, f"{tick * step:g}"),
                ha="center",
                va="top",
                fontsize=7,
                color=BLUE if is_zero else GREY,
                fontweight="bold" if is_zero else "normal",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
        axes.plot(place, height, "o", color=RED, markersize=5)
        axes.text(right + 3, height, f"{value:g}", va="center", color=RED, fontsize=10, fontweight="bold")
        axes.text(left - 2, height, name, va="center", ha="right", fontsize=8)
    axes.plot(
        [stored["cbox"] * SPACING, 2 * X - stored["cbox"] * SPACING], [height] * 2, color=RED, linewidth=4, alpha=0.3
    )
    axes.text(right + 3, 0.8, "x", va="center", color=RED, fontsize=10, fontweight="bold")
    axes.set(xlim=(left - 42, right + 10), ylim=(-0.55 - 0.85 * len(rulers) + 0.2, 1.8))
    axes.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(target, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "images/coordinates.png")
