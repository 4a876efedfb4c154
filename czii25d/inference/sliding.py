"""Slide a predictor over a volume, slab by slab, in memory that does not grow with the volume's depth."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from czii25d.errors import InputError
from czii25d.geometry import Shape3D
from czii25d.inference.ahead import ahead
from czii25d.inference.ensemble import Predictor
from czii25d.inference.options import InferenceOptions
from czii25d.tiling import Blender, TileGrid, reflect_indices

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
YIELDED_AT_ONCE = 4  # planes; who receives them lets them go as soon as these are done with
Wanted = Callable[[Shape3D, Shape3D], bool]


class Planes(Protocol):
    """A volume that is read a few planes at a time."""

    @property
    def shape(self) -> Shape3D:
        """``(D, H, W)``."""

    def planes(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return the normalised planes ``start`` to ``stop``, ``(stop - start, H, W)``; not to be written to."""


@dataclass(frozen=True)
class ArrayVolume:
    """An array in memory, ``(D, H, W)``, as `Planes`."""

    array: NDArray[np.float32]

    @property
    def shape(self) -> Shape3D:
        """``(D, H, W)``."""
        d, h, w = self.array.shape
        return d, h, w

    def planes(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return planes."""
        return self.array[start:stop]


def predict_slabs(
    volume: Planes,
    predictor: Predictor,
    class_num: int,
    options: InferenceOptions,
    progress: Progress | None = None,
    wanted: Wanted | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Predict a volume slab by slab, from the top to the bottom.

    Only the planes that further tiles may still reach are kept, so memory depends on the tile's depth, not on the
    volume's. The next planes are read while these are predicted. Beyond its faces the volume is mirrored, as far as
    margins, or tiles larger than itself, reach.

    Parameters
    ----------
    progress
        Called with the number of tiles done and of all.
    wanted
        ``(first voxel, the one after the last) -> bool``: tiles for which it is false are left out. Where no tile is,
        the heatmaps are 0; where all tiles that reach a voxel are there, its value is as without it.

    Yields
    ------
    z, heatmap
        The slab's first plane and its finished ``(C, d, H, W)`` float32 heatmaps on the predictor's device.

    Raises
    ------
    InputError
        If a single tile does not fit into memory.
    """
    depth, height, width = volume.shape
    core = options.core_shape
    if any(side < tile for side, tile in zip(volume.shape, core, strict=True)):
        logger.info("volume %s is smaller than a tile %s: mirrored at its far faces", volume.shape, core)
    grid = TileGrid(volume.shape, core, options.stride)
    blender = Blender(grid, options.window)
    device = predictor.device
    window = torch.from_numpy(blender.window).to(device)
    z_starts, y_starts, x_starts = grid.axis_starts
    places = list(itertools.product(y_starts, x_starts))
    core_d, core_h, core_w = core

    def is_wanted(z: int, y: int, x: int) -> bool:
        stop = min(z + core_d, depth), min(y + core_h, height), min(x + core_w, width)
        return wanted is None or wanted((z, y, x), stop)

    places_at = {z: [(y, x) for y, x in places if is_wanted(z, y, x)] for z in z_starts}
    tile_num = sum(map(len, places_at.values()))
    _, tile_h, tile_w = options.tile_shape
    inner = (..., *(slice(rim, rim + side) for rim, side in zip(options.margin, core, strict=True)))
    planes = torch.zeros(class_num, core_d, max(height, core_h), max(width, core_w), device=device)
    batch_size, done = options.batch_size, 0
    blocks = ahead(_read_block(volume, z, options) for z in z_starts)
    for z, next_z, block_array in zip(z_starts, (*z_starts[1:], depth), blocks, strict=True):
        block = torch.from_numpy(block_array).to(device)
        left = places_at[z]
        while left:
            batch = left[:batch_size]
            tiles = torch.stack([block[:, y : y + tile_h, x : x + tile_w] for y, x in batch])[:, None]
            try:
                heatmaps = predictor(tiles)
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                batch_size = _halve(len(batch), options.tile_shape)
                continue
            for (y, x), heatmap in zip(batch, heatmaps, strict=True):
                planes[:, :, y : y + core_h, x : x + core_w].addcmul_(heatmap[inner], window)
            left = left[len(batch) :]
            done += len(batch)
            if progress is not None:
                progress(done, tile_num)
        finished = min(next_z, depth) - z
        for first in range(0, finished, YIELDED_AT_ONCE):
            last = min(first + YIELDED_AT_ONCE, finished)
            norm = torch.from_numpy(blender.norm(z + first, z + last)).to(device)
            yield z + first, planes[:, first:last, :height, :width] * norm
        step = min(next_z - z, core_d)
        planes[:, : core_d - step] = planes[:, step:].clone()
        planes[:, core_d - step :] = 0


def predict_heatmap(
    volume: Planes,
    predictor: Predictor,
    class_num: int,
    options: InferenceOptions,
    progress: Progress | None = None,
    wanted: Wanted | None = None,
) -> Tensor:
    """Predict a whole volume: ``(C, D, H, W)`` float32 on the predictor's device; see `predict_slabs`."""
    heatmap = torch.empty(class_num, *volume.shape, device=predictor.device)
    for z, slab in predict_slabs(volume, predictor, class_num, options, progress, wanted):
        heatmap[:, z : z + slab.shape[1]] = slab
    return heatmap


def _read_block(volume: Planes, z: int, options: InferenceOptions) -> NDArray[np.float32]:
    """Return the planes of all tiles whose cores start at ``z``, mirrored where they reach beyond the volume."""
    depth, height, width = volume.shape
    (core_d, core_h, core_w), (rim_z, rim_y, rim_x) = options.core_shape, options.margin
    z_index = reflect_indices(z - rim_z, z + core_d + rim_z, depth)
    y_index = reflect_indices(-rim_y, max(height, core_h) + rim_y, height)
    x_index = reflect_indices(-rim_x, max(width, core_w) + rim_x, width)
    first = int(z_index.min())
    block = volume.planes(first, int(z_index.max()) + 1)
    for axis, index in enumerate((z_index - first, y_index, x_index)):
        if len(index) != block.shape[axis] or (index != np.arange(len(index))).any():
            block = block.take(index, axis)
    return block


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        words in text for words in ("out of memory", "can't allocate memory", "failed to allocate memory")
    )


def _halve(batch_size: int, tile_shape: Shape3D) -> int:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if batch_size == 1:
        raise InputError("key infer.tile", "a tile that fits into memory", str(tile_shape), "choose a smaller one")
    logger.info("%d tiles at once do not fit into memory: going on with %d", batch_size, batch_size // 2)
    return batch_size // 2
