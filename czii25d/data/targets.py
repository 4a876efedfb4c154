"""What a network is to predict for a run: rendered whole by 02, crop by crop in training."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import zarr
from numcodecs import Blosc
from numpy.typing import NDArray

from czii25d.errors import InputError
from czii25d.files import write_aside
from czii25d.geometry import Shape3D, Spacing3D, xyz_angstrom_to_zyx_voxel, zyx_voxel_to_xyz_angstrom
from czii25d.heatmap import render_heatmap
from czii25d.particles import ParticleSet
from czii25d.picks import concat_picks, make_picks

FORMAT_VERSION = 1
CHUNK = (32, 128, 128)  # of all classes, z y x
_KEY = "czii25d"  # of the recipe among the Zarr's attributes
_CURE = "run 02_create_mask.py again"


@dataclass(frozen=True)
class HeatmapTarget:
    """The heatmaps of one run, not yet rendered.

    Parameters
    ----------
    run
        Its name.
    particles
        The classes, in channel order.
    centers_zyx_voxel
        ``(N, 3)`` fractional indices.
    channels
        ``(N,)`` integers: each centre's class.
    sigma_angstrom
        Of each class, by name.
    voxel_spacing
        Angstrom per voxel along z, y, x.
    shape
        ``(D, H, W)`` of the volume.
    """

    run: str
    particles: ParticleSet
    centers_zyx_voxel: NDArray[np.float64]
    channels: NDArray[np.intp]
    sigma_angstrom: Mapping[str, float]
    voxel_spacing: Spacing3D
    shape: Shape3D

    @property
    def sigma_voxel(self) -> NDArray[np.float64]:
        """``(C, 3)``: of each class along z, y, x."""
        return np.array([self.sigma_angstrom[name] for name in self.particles.names])[:, None] / self.voxel_spacing

    def picks(self) -> pd.DataFrame:
        """Return the particles as a picks frame."""
        return concat_picks(
            make_picks(
                self.run,
                name,
                zyx_voxel_to_xyz_angstrom(self.centers_zyx_voxel[self.channels == channel], self.voxel_spacing),
            )
            for channel, name in enumerate(self.particles.names)
        )

    def render(self, start_zyx: Shape3D, shape: Shape3D) -> NDArray[np.float32]:
        """Render a box, ``(C, *shape)`` float32 in [0, 1]; it may reach beyond the volume."""
        return render_heatmap(
            self.centers_zyx_voxel, self.channels, self.sigma_voxel, shape, len(self.particles), start_zyx
        )


def make_recipe(
    run: str,
    particles: ParticleSet,
    picks: pd.DataFrame,
    sigma_angstrom: Mapping[str, float],
    voxel_spacing: Spacing3D,
    shape: Shape3D,
) -> dict[str, Any]:
    """Return all that a heatmap is made of, in terms of JSON; equal recipes make equal heatmaps."""
    return {
        "format_version": FORMAT_VERSION,
        "run": run,
        "channels": list(particles.names),  # JSON objects have no order
        "particles": particles.to_config(),
        "sigma_angstrom": {name: float(sigma_angstrom[name]) for name in particles.names},
        "voxel_spacing": list(voxel_spacing),
        "shape": list(shape),
        "picks": {
            name: picks.loc[picks.particle == name, ["x", "y", "z"]].to_numpy().tolist() for name in particles.names
        },
    }


def target_from_recipe(recipe: Mapping[str, Any]) -> HeatmapTarget:
    """Return the target a recipe describes."""
    particles = ParticleSet.from_config({name: recipe["particles"][name] for name in recipe["channels"]})
    (dz, dy, dx), (d, h, w) = recipe["voxel_spacing"], recipe["shape"]
    locations = [np.array(recipe["picks"][name], np.float64).reshape(-1, 3) for name in particles.names]
    return HeatmapTarget(
        run=recipe["run"],
        particles=particles,
        centers_zyx_voxel=xyz_angstrom_to_zyx_voxel(np.concatenate(locations), (dz, dy, dx)),
        channels=np.repeat(np.arange(len(particles)), [len(rows) for rows in locations]),
        sigma_angstrom={name: recipe["sigma_angstrom"][name] for name in particles.names},
        voxel_spacing=(dz, dy, dx),
        shape=(d, h, w),
    )


def write_heatmap(path: Path | str, recipe: Mapping[str, Any]) -> None:
    """Render a recipe into an OME-Zarr (Zarr v2, OME-NGFF 0.4) of uint8, ``(c, z, y, x)``.

    Chunk by chunk, so memory stays small; chunks without particles are not stored. The recipe goes into the
    attributes, for `open_target`.
    """
    target = target_from_recipe(recipe)
    shape = (len(target.particles), *target.shape)
    with write_aside(path) as partial:
        array = create_heatmap_array(partial, target.run, target.particles, target.voxel_spacing, target.shape)
        zarr.open_group(str(partial)).attrs[_KEY] = dict(recipe)
        chunks = array.chunks
        buffer = np.empty(chunks, np.uint8)
        for z, y, x in itertools.product(
            *(range(0, side, chunk) for side, chunk in zip(shape[1:], chunks[1:], strict=True))
        ):
            block = buffer[:, : shape[1] - z, : shape[2] - y, : shape[3] - x]
            block.fill(0)
            render_heatmap(
                target.centers_zyx_voxel,
                target.channels,
                target.sigma_voxel,
                (block.shape[1], block.shape[2], block.shape[3]),
                shape[0],
                (z, y, x),
                out=block,
            )
            if block.any():
                array[:, z : z + chunks[1], y : y + chunks[2], x : x + chunks[3]] = block


def create_heatmap_array(
    path: Path | str, name: str, particles: ParticleSet, voxel_spacing: Spacing3D, shape: Shape3D
) -> zarr.Array:
    """Create an empty OME-Zarr (Zarr v2, OME-NGFF 0.4) and return its array, uint8 ``(c, z, y, x)``.

    Its chunks hold all classes and ``CHUNK`` voxels.
    """
    group = zarr.create_group(str(path), zarr_format=2)
    group.attrs.update(_ome_metadata(name, particles, voxel_spacing))
    return group.create_array(
        "0",
        shape=(len(particles), *shape),
        chunks=(len(particles), *(min(chunk, side) for chunk, side in zip(CHUNK, shape, strict=True))),
        dtype=np.uint8,
        compressors=Blosc("lz4", clevel=5, shuffle=Blosc.NOSHUFFLE),
        fill_value=0,
        config={"write_empty_chunks": True},  # Zarr's own test for emptiness takes longer than all the rest
        chunk_key_encoding={"name": "v2", "separator": "/"},
    )


def open_heatmap_array(path: Path | str, particles: ParticleSet) -> tuple[zarr.Array, Spacing3D]:
    """Return what `create_heatmap_array` made, ``(c, z, y, x)``, and its angstrom per voxel along z, y, x.

    Raises
    ------
    InputError
        If it is damaged, or of other particles.
    """
    try:
        attributes: Any = zarr.open_group(str(path), mode="r").attrs.asdict()
        labels = [channel["label"] for channel in attributes["omero"]["channels"]]
        [dataset] = attributes["multiscales"][0]["datasets"]
        _, z, y, x = dataset["coordinateTransformations"][0]["scale"]
        array = zarr.open_array(f"{path}/0", mode="r")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(path, "heatmaps as OME-Zarr", f"{type(error).__name__}: {error}", "write them again") from None
    if labels != list(particles.names):
        raise InputError(path, f"heatmaps of {', '.join(particles.names)}", ", ".join(labels), "write them again")
    return array, (float(z), float(y), float(x))


def _ome_metadata(name: str, particles: ParticleSet, voxel_spacing: Spacing3D) -> dict[str, Any]:
    scale = {"type": "scale", "scale": [1.0, *voxel_spacing]}
    window = {"min": 0, "max": 255, "start": 0, "end": 255}
    return {
        "multiscales": [
            {
                "version": "0.4",
                "name": name,
                "axes": [
                    {"name": "c", "type": "channel"},
                    *({"name": axis, "type": "space", "unit": "angstrom"} for axis in "zyx"),
                ],
                "datasets": [{"path": "0", "coordinateTransformations": [scale]}],
            }
        ],
        "omero": {
            "version": "0.4",
            "channels": [
                {
                    "label": particle.name,
                    "color": particle.color.removeprefix("#"),
                    "active": True,
                    "window": window,
                }
                for particle in particles
            ],
        },
    }


def read_recipe(path: Path | str) -> dict[str, Any]:
    """Return the recipe in the attributes of what 02 wrote; `InputError` if there is none of this format."""
    if not Path(path).is_dir():
        raise InputError(path, "the heatmaps of a run", "none", "run 02_create_mask.py first")
    try:
        recipe = zarr.open_group(str(path), mode="r").attrs[_KEY]
    except Exception as error:  # every store and format fails in its own way
        raise InputError(path, "heatmaps", f"{type(error).__name__}: {error}", _CURE) from None
    if not isinstance(recipe, dict) or recipe.get("format_version") != FORMAT_VERSION:
        raise InputError(path, f"heatmaps of format version {FORMAT_VERSION}", "another", _CURE)
    return recipe


def open_target(path: Path | str) -> HeatmapTarget:
    """Open what 02 wrote for a run; no voxel is read.

    Raises
    ------
    InputError
        If 02 has not run, or what it wrote is damaged.
    """
    recipe = read_recipe(path)
    try:
        return target_from_recipe(recipe)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(path, "a recipe of heatmaps", f"{type(error).__name__}: {error}", _CURE) from None
