"""Cut a volume into overlapping tiles and weigh them so that they add up to it again. Pure arithmetic."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from czii25d.errors import InputError
from czii25d.geometry import Shape3D

Window = Literal["pyramid", "gaussian", "published"]
GAUSSIAN_WIDTH = 0.25  # sigma of the gaussian window, in tile sides; e^-2 at the faces


def tile_starts(size: int, tile: int, stride: int) -> tuple[int, ...]:
    """Return where tiles start along one axis: evenly spaced, at most ``stride`` apart, flush with both ends.

    Parameters
    ----------
    size, tile, stride
        Voxels; a size below the tile's gives one tile at 0.
    """
    last = size - tile
    if last <= 0:
        return (0,)
    steps = -(-last // stride)
    return tuple(round(step * last / steps) for step in range(steps + 1))


@dataclass(frozen=True)
class TileGrid:
    """Overlapping tiles that cover a volume.

    Parameters
    ----------
    volume_shape, tile_shape
        ``(D, H, W)``.
    stride
        Largest distance between the starts of neighbouring tiles along z, y, x: 1 to the tile's side.

    Raises
    ------
    InputError
        If a stride is below 1 or above the tile's side, which would leave gaps.
    """

    volume_shape: Shape3D
    tile_shape: Shape3D
    stride: Shape3D

    def __post_init__(self) -> None:
        check_stride(self.tile_shape, self.stride)

    @cached_property
    def axis_starts(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Starts along z, y and x; the grid is their product."""
        z, y, x = (tile_starts(*sides) for sides in zip(self.volume_shape, self.tile_shape, self.stride, strict=True))
        return z, y, x

    @property
    def starts(self) -> list[Shape3D]:
        """``(z, y, x)`` of every tile, z slowest."""
        return list(itertools.product(*self.axis_starts))

    def __len__(self) -> int:
        z, y, x = self.axis_starts
        return len(z) * len(y) * len(x)


def check_stride(tile_shape: Shape3D, stride: Shape3D) -> None:
    """Raise `InputError` for a stride of tiles that is 0, negative or leaves gaps."""
    if min(tile_shape) < 1 or not all(1 <= step <= tile for step, tile in zip(stride, tile_shape, strict=True)):
        raise InputError(
            "key infer.stride",
            f"1 to the tile's side along each axis, {tuple(tile_shape)}",
            str(tuple(stride)),
            "change the stride or the tile",
        )


def axis_profile(tile: int, window: Window) -> NDArray[np.float32]:
    """Return the weights along one axis of a tile, ``(tile,)``, 1 at its middle.

    ``pyramid`` falls linearly and ``gaussian`` smoothly, and both stay above 0. ``published`` is the 4th place's
    triangle, which is 0 at both ends.
    """
    index = np.arange(tile)
    if window == "gaussian":
        return np.exp(-0.5 * ((index - (tile - 1) / 2) / (GAUSSIAN_WIDTH * tile)) ** 2).astype(np.float32)
    from_edge = np.minimum(index, tile - 1 - index) + (0.5 if window == "pyramid" else 0.0)
    return (from_edge / max(from_edge.max(), 0.5)).astype(np.float32)


def blend_window(tile_shape: Shape3D, window: Window = "pyramid") -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return a tile's blending weights as a factor along z, ``(D,)``, and one in the plane, ``(H, W)``.

    Raises
    ------
    InputError
        If there is no such window.
    """
    if window not in get_args(Window):
        raise InputError("key infer.window", f"one of {', '.join(get_args(Window))}", repr(window), "choose one")
    along_z, along_y, along_x = (axis_profile(side, window) for side in tile_shape)
    if window == "gaussian":
        return along_z, np.multiply.outer(along_y, along_x)
    return along_z, np.minimum.outer(along_y, along_x)


class Blender:
    """Weights of each tile of a grid, divided already by the sum of all weights at each voxel.

    A grid is a product, and so is the sum of its weights: a factor along z and one in the plane are all there is to
    keep, whatever the size of the volume. The tiles' weighted values simply add up to the blend.

    ``window="published"`` divides by ``max(sum, 1)`` instead, which fades the volume's faces (a third of the voxels of
    a CZII tomogram); it exists to compare with the 4th place's validation.
    """

    def __init__(self, grid: TileGrid, window: Window = "pyramid") -> None:
        self.grid, self.window = grid, window
        self._z, self._plane = blend_window(grid.tile_shape, window)
        depth, height, width = (max(sides) for sides in zip(grid.volume_shape, grid.tile_shape, strict=True))
        z_starts, y_starts, x_starts = grid.axis_starts
        tile_d, tile_h, tile_w = grid.tile_shape
        self._z_sum = np.zeros(depth, np.float64)
        for z in z_starts:
            self._z_sum[z : z + tile_d] += self._z
        self._plane_sum = np.zeros((height, width), np.float64)
        for y, x in itertools.product(y_starts, x_starts):
            self._plane_sum[y : y + tile_h, x : x + tile_w] += self._plane

    def weight(self, start_zyx: Shape3D) -> NDArray[np.float32]:
        """Return the normalised weights of the tile that starts there, ``(D, H, W)``."""
        z, y, x = start_zyx
        tile_d, tile_h, tile_w = self.grid.tile_shape
        z_sum = self._z_sum[z : z + tile_d]
        plane_sum = self._plane_sum[y : y + tile_h, x : x + tile_w]
        weight = np.multiply.outer(self._z.astype(np.float64), self._plane)
        if self.window == "published":
            return (weight / np.maximum(np.multiply.outer(z_sum, plane_sum), 1.0)).astype(np.float32)
        return (weight / np.multiply.outer(z_sum, plane_sum)).astype(np.float32)
