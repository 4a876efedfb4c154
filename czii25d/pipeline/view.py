"""Look at runs in napari: tomogram, picks of each particle and, if they were kept, heatmaps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from czii25d.data.predictions import PredictedRun, Predictions, read_predictions
from czii25d.data.targets import open_heatmap_array
from czii25d.data.tomogram import open_tomogram
from czii25d.data.volumes import open_volume
from czii25d.errors import InputError
from czii25d.geometry import Spacing3D, xyz_angstrom_to_zyx_voxel
from czii25d.particles import ParticleSet
from czii25d.picks import read_picks_csv
from czii25d.pipeline.app import run

SYMBOLS = ("disc", "diamond", "triangle_up", "square", "star", "triangle_down", "cross", "clobber")  # napari's names


@dataclass(frozen=True)
class Layer:
    """A layer of napari: ``viewer.add_<kind>(data, **options)``, in voxels, z y x; its scale makes them angstroms."""

    kind: Literal["image", "points"]
    data: Any
    options: dict[str, Any]


def view(cfg: DictConfig) -> None:
    """Open a window for each run, and wait until they are closed.

    Raises
    ------
    InputError
        If napari is not there, a run has not been picked, or its tomogram is not where it was.
    """
    predictions = read_predictions(cfg.predictions)
    runs = predictions.choose(cfg.runs)
    solution = read_picks_csv(cfg.solution) if Path(cfg.solution).is_file() else None
    try:
        napari = import_module("napari")
    except ImportError:
        raise InputError(
            "czii25d view", "napari", "none installed", "pip install 'napari[all]', or 'czii25d[view]'"
        ) from None
    thick = out_of_slice(napari.__version__)
    for chosen in runs:
        viewer = napari.Viewer(title=f"{chosen.name} · czii25d")
        for layer in run_layers(predictions, chosen, solution, cfg.all_scores):
            options = layer.options | thick if layer.kind == "points" else layer.options
            getattr(viewer, f"add_{layer.kind}")(layer.data, **options)
        if "projection_mode" in thick:
            reach = (max(predictions.particles.radii), 0.0, 0.0)
            viewer.dims.margin_left = viewer.dims.margin_right = reach
        viewer.scale_bar.visible = True
    napari.run()


def out_of_slice(version: str) -> dict[str, Any]:
    """Return the options by which a napari of this version shows spheres in all slices that they reach."""
    major, minor = (int(number) for number in version.split(".")[:2])
    return {"projection_mode": "rescale_spherical"} if (major, minor) >= (0, 9) else {"out_of_slice_display": True}


def run_layers(
    predictions: Predictions, chosen: PredictedRun, solution: pd.DataFrame | None = None, all_scores: bool = False
) -> list[Layer]:
    """Return what is shown of a run: the tomogram, heatmaps (hidden), true particles (hidden) and picks.

    Nothing is read of tomogram and heatmaps but what sets the contrast.
    """
    voxels, spacing = _voxels(chosen)
    depth = voxels.shape[0]
    low, high = np.percentile(np.asarray(voxels[depth // 2], np.float32), [0.5, 99.5])
    limits = (float(low), max(float(high), float(np.nextafter(low, np.inf))))
    image = {"name": chosen.name, **_in_angstrom(spacing), "colormap": "gray", "contrast_limits": limits}
    layers = [Layer("image", voxels, image)]
    heatmaps = predictions.folder / "heatmaps" / f"{chosen.name}.zarr"
    if heatmaps.is_dir():
        layers += heatmap_layers(*open_heatmap_array(heatmaps, predictions.particles), predictions.particles)
    if solution is not None and len(truth := solution[solution["run"] == chosen.name]):
        hidden = {"visible": False, "opacity": 0.6}
        layers += point_layers(truth, spacing, predictions.particles, "true ", hidden)
    picks = predictions.picks_of(chosen.name, all_scores)
    return layers + point_layers(picks, spacing, predictions.particles)


def _in_angstrom(spacing: Spacing3D) -> dict[str, Any]:
    return {"scale": spacing, "units": "angstrom"}


def _voxels(chosen: PredictedRun) -> tuple[Any, Spacing3D]:
    """Return the ``(D, H, W)`` array of a run, memory-mapped or chunked, and its angstrom per voxel."""
    if chosen.volume is not None:
        volume = open_volume(chosen.volume)
        return volume.data, volume.voxel_spacing
    assert chosen.tomogram is not None
    tomogram = open_tomogram(chosen.tomogram, chosen.voxel_spacing)
    return tomogram.array, tomogram.voxel_spacing


def heatmap_layers(heatmaps: Any, spacing: Spacing3D, particles: ParticleSet) -> list[Layer]:
    """Return an image for each channel of heatmaps ``(C, D, H, W)``, hidden, to lay over the tomogram."""
    layers = []
    for channel, particle in enumerate(particles):
        options = {
            "name": f"heatmap {particle.name}",
            **_in_angstrom(spacing),
            "colormap": particle.color,  # from black to this
            "blending": "additive",
            "contrast_limits": (0, 255),
            "visible": False,
        }
        layers.append(Layer("image", _Channel(heatmaps, channel), options))
    return layers


class _Channel:
    """One channel of a chunked array ``(C, D, H, W)``, read when it is shown."""

    def __init__(self, array: Any, channel: int) -> None:
        self._array, self._channel = array, channel
        self.shape, self.dtype, self.ndim = array.shape[1:], array.dtype, array.ndim - 1
        self.size = int(np.prod(self.shape))

    def __getitem__(self, key: Any) -> Any:
        return self._array[(self._channel, *(key if isinstance(key, tuple) else (key,)))]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(self._array[self._channel], dtype)


def point_layers(
    picks: pd.DataFrame,
    spacing: Spacing3D,
    particles: ParticleSet,
    prefix: str = "",
    more: Mapping[str, Any] | None = None,
) -> list[Layer]:
    """Return a layer of points, as large as the particle, for each that has any; the score is a feature of theirs.

    In voxels, as the tomogram, so that one step of napari's slider is one plane.
    """
    layers = []
    for channel, particle in enumerate(particles):
        own = picks[picks["particle"] == particle.name]
        if not len(own):
            continue
        options: dict[str, Any] = {
            "name": f"{prefix}{particle.name} ({len(own)})",
            **_in_angstrom(spacing),
            "size": 2 * particle.radius / spacing[2],
            "symbol": SYMBOLS[channel % len(SYMBOLS)],
            "face_color": "transparent",
            "border_color": particle.color,
            "border_width": 0.08,  # of the size
            **(more or {}),
        }
        if "score" in own:
            options["features"] = {"score": own["score"].to_numpy(float)}
        centers = xyz_angstrom_to_zyx_voxel(own[["x", "y", "z"]].to_numpy(float), spacing)
        layers.append(Layer("points", centers, options))
    return layers


if __name__ == "__main__":
    run(view, "view")
