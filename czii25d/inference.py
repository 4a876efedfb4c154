"""From a tomogram to heatmaps to picks, for any predictor. Validation and prediction both go through here."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from czii25d.errors import InputError
from czii25d.geometry import Shape3D, Spacing3D, zyx_voxel_to_xyz_angstrom
from czii25d.particles import ParticleSet
from czii25d.peaks import find_peaks
from czii25d.picks import empty_picks
from czii25d.tiling import Blender, TileGrid, Window, blend_window, check_stride

logger = logging.getLogger(__name__)

NMS_RADIUS_FACTOR = 0.6  # of the particle's radius; empirical: nearer than that there is no second one
Progress = Callable[[int, int], None]


class Predictor(Protocol):
    """Turns tiles ``(B, 1, D, H, W)`` into heatmaps ``(B, C, D, H, W)``, float32, on the tiles' device."""

    device: torch.device

    def __call__(self, tiles: Tensor) -> Tensor:
        """Return the heatmaps of tiles."""
        ...


class Croppable(Protocol):
    """A volume that is read box by box."""

    @property
    def shape(self) -> Shape3D:
        """``(D, H, W)``."""

    def crop(self, start_zyx: Shape3D, shape: Shape3D) -> NDArray[np.float32]:
        """Return a normalised copy of a box inside the volume."""


@dataclass(frozen=True)
class ArrayVolume:
    """An array in memory as a `Croppable`."""

    array: NDArray[np.float32]

    @property
    def shape(self) -> Shape3D:
        """``(D, H, W)``."""
        d, h, w = self.array.shape
        return d, h, w

    def crop(self, start_zyx: Shape3D, shape: Shape3D) -> NDArray[np.float32]:
        """Return a copy of a box."""
        box = tuple(slice(start, start + side) for start, side in zip(start_zyx, shape, strict=True))
        return self.array[box].astype(np.float32)


@dataclass(frozen=True)
class InferenceOptions:
    """How whole tomograms are predicted and picked.

    Parameters
    ----------
    tile_shape, stride
        ``(D, H, W)`` voxels; the stride is the largest distance between neighbouring tiles.
    window
        How overlapping tiles are blended, see `czii25d.tiling.axis_profile`.
    batch_size
        Tiles at once.
    nms_radius
        Angstrom, for all or by particle: of two peaks nearer than that the lower one is dropped. Where it is
        absent, ``NMS_RADIUS_FACTOR`` times the particle's radius.
    floor
        Smallest score that is kept at all.
    refine
        Sub-voxel centres.
    """

    tile_shape: Shape3D = (16, 128, 128)
    stride: Shape3D = (8, 64, 64)
    window: Window = "pyramid"
    batch_size: int = 4
    nms_radius: Mapping[str, float] | float | None = None
    floor: float = 0.05
    refine: bool = True

    def __post_init__(self) -> None:
        check_stride(self.tile_shape, self.stride)
        blend_window((1, 1, 1), self.window)
        if self.batch_size < 1:
            raise InputError("key infer.batch_size", "at least 1", str(self.batch_size), "raise it")
        if not self.floor > 0:
            raise InputError("key infer.floor", "a score above 0", str(self.floor), "raise it")
        given = self.nms_radius
        for radius in given.values() if isinstance(given, Mapping) else [1.0 if given is None else given]:
            if not radius > 0:
                raise InputError("key infer.nms_radius", "angstrom above 0", str(given), "raise it")

    def nms_radius_voxel(self, particles: ParticleSet, voxel_spacing: Spacing3D) -> NDArray[np.float64]:
        """Return ``(C, 3)``, along z, y, x."""
        given = self.nms_radius
        if isinstance(given, Mapping) or given is None:
            for name in given or ():
                particles.channel(name)  # refuses unknown ones
            given = {**{each.name: NMS_RADIUS_FACTOR * each.radius for each in particles}, **(given or {})}
            radii = [given[each.name] for each in particles]
        else:
            radii = [given] * len(particles)
        return np.array(radii)[:, None] / np.array(voxel_spacing)


class TorchPredictor:
    """One or several networks as a `Predictor`; several are averaged.

    Parameters
    ----------
    members
        Networks in evaluation mode, ``(B, 1, D, H, W) -> (B, C, D, H, W)``.
    channels
        Of each member: which of its channels comes first, second, ... in the common order.
    device, dtype
        Where, and in which autocast precision (``None``: float32).
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        channels: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.members = [member.to(self.device).eval() for member in members]
        orders: Sequence[Sequence[int] | None] = channels or [None] * len(self.members)
        self._orders = [None if order is None or list(order) == sorted(order) else list(order) for order in orders]

    @torch.inference_mode()
    def __call__(self, tiles: Tensor) -> Tensor:
        """Predict ``(B, C, D, H, W)`` float32 heatmaps."""
        tiles = tiles.to(self.device)
        total: Tensor | None = None
        with torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext():
            for member, order in zip(self.members, self._orders, strict=True):
                heatmap = member(tiles).float()
                heatmap = heatmap if order is None else heatmap[:, order]
                total = heatmap if total is None else total + heatmap
        assert total is not None
        return total / len(self.members) if len(self.members) > 1 else total


def predict_slabs(
    volume: Croppable,
    predictor: Predictor,
    class_num: int,
    options: InferenceOptions,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Predict a volume slab by slab, from the top to the bottom.

    Only the planes that further tiles may still reach are kept, so memory depends on the tile's depth, not on the
    volume's. A volume smaller than a tile is mirrored at its far faces, and the surplus is cut off again.

    Yields
    ------
    z, heatmap
        The slab's first plane and its finished ``(C, d, H, W)`` float32 heatmaps on the predictor's device.
    """
    shape = volume.shape
    if any(side < tile for side, tile in zip(shape, options.tile_shape, strict=True)):
        surplus = [(0, max(0, tile - side)) for side, tile in zip(shape, options.tile_shape, strict=True)]
        logger.info("volume %s is smaller than a tile %s: mirrored at its far faces", shape, options.tile_shape)
        volume = ArrayVolume(np.pad(volume.crop((0, 0, 0), shape), surplus, mode="reflect"))
    grid = TileGrid(volume.shape, options.tile_shape, options.stride)
    blender = Blender(grid, options.window)
    tile_d, tile_h, tile_w = options.tile_shape
    depth, height, width = volume.shape
    planes = torch.zeros(class_num, tile_d, height, width, device=predictor.device)
    z_starts, y_starts, x_starts = grid.axis_starts
    done = 0
    for z, next_z in zip(z_starts, (*z_starts[1:], depth), strict=True):
        places = list(itertools.product(y_starts, x_starts))
        for first in range(0, len(places), options.batch_size):
            batch = places[first : first + options.batch_size]
            tiles = torch.from_numpy(np.stack([volume.crop((z, y, x), options.tile_shape) for y, x in batch]))
            for (y, x), heatmap in zip(batch, predictor(tiles[:, None].to(predictor.device)), strict=True):
                weight = torch.from_numpy(blender.weight((z, y, x))).to(predictor.device)
                planes[:, :, y : y + tile_h, x : x + tile_w].addcmul_(heatmap, weight)
            done += len(batch)
            if progress is not None:
                progress(done, len(grid))
        finished = min(next_z, shape[0]) - z
        if finished > 0:
            yield z, planes[:, :finished, : shape[1], : shape[2]].clone()
        step = next_z - z
        if step < tile_d:
            planes[:, :-step] = planes[:, step:].clone()
        planes[:, max(0, tile_d - step) :] = 0


def predict_heatmap(
    volume: Croppable,
    predictor: Predictor,
    class_num: int,
    options: InferenceOptions,
    progress: Progress | None = None,
) -> Tensor:
    """Predict a whole volume: ``(C, D, H, W)`` float32 on the predictor's device; see `predict_slabs`."""
    heatmap = torch.empty(class_num, *volume.shape, device=predictor.device)
    for z, slab in predict_slabs(volume, predictor, class_num, options, progress):
        heatmap[:, z : z + slab.shape[1]] = slab
    return heatmap


def pick_heatmap(
    heatmap: Tensor,
    particles: ParticleSet,
    options: InferenceOptions,
    voxel_spacing: Spacing3D,
    offset_voxel: float = 0.0,
) -> pd.DataFrame:
    """Find the picks of one run's heatmaps.

    Parameters
    ----------
    heatmap
        ``(C, D, H, W)``.
    offset_voxel
        Of the network, see `czii25d.geometry`.

    Returns
    -------
    picks
        Columns ``run`` (empty), ``particle, x, y, z`` (angstrom), ``score``; best first for each particle.
    """
    frames = [empty_picks(scored=True)]
    radii = options.nms_radius_voxel(particles, voxel_spacing)
    for particle, (centers, scores) in zip(
        particles, find_peaks(heatmap, radii, options.floor, options.refine), strict=True
    ):
        if len(centers):
            frame = pd.DataFrame(
                zyx_voxel_to_xyz_angstrom(centers, voxel_spacing, offset_voxel), columns=["x", "y", "z"]
            )
            frame.insert(0, "run", "")
            frame.insert(1, "particle", particle.name)
            frames.append(frame.assign(score=scores.astype(np.float64)))
    return pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0]


def pick_volume(
    volume: Croppable,
    predictor: Predictor,
    particles: ParticleSet,
    options: InferenceOptions,
    voxel_spacing: Spacing3D,
    offset_voxel: float = 0.0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Predict a tomogram and pick it; arguments and result as `predict_heatmap` and `pick_heatmap`."""
    heatmap = predict_heatmap(volume, predictor, len(particles), options, progress)
    return pick_heatmap(heatmap, particles, options, voxel_spacing, offset_voxel)
