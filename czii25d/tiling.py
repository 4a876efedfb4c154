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
    """The weights that blend a grid's tiles: sum ``window`` times each tile, then multiply by ``norm``.

    A grid is a product, and so is the sum of its weights: a factor along z and one in the plane are all there is to
    keep, whatever the size of the volume.

    ``window="published"`` divides by ``max(sum, 1)`` instead, which fades the volume's faces (a third of the voxels of
    a CZII tomogram); it exists to compare with the 4th place's validation.

    Attributes
    ----------
    window
        Weights of every tile, ``(D, H, W)`` float32.
    """

    def __init__(self, grid: TileGrid, window: Window = "pyramid") -> None:
        along_z, plane = blend_window(grid.tile_shape, window)
        self.window = np.multiply.outer(along_z, plane)
        self._shape, self._least_sum = grid.volume_shape, np.float32(window == "published")
        depth, height, width = (max(sides) for sides in zip(grid.volume_shape, grid.tile_shape, strict=True))
        z_starts, y_starts, x_starts = grid.axis_starts
        tile_d, tile_h, tile_w = grid.tile_shape
        self._z_sum = np.zeros(depth, np.float32)
        for z in z_starts:
            self._z_sum[z : z + tile_d] += along_z
        self._plane_sum = np.zeros((height, width), np.float32)
        for y, x in itertools.product(y_starts, x_starts):
            self._plane_sum[y : y + tile_h, x : x + tile_w] += plane

    def norm(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return what the sum is multiplied by on planes ``start`` to ``stop``, ``(stop - start, H, W)``."""
        _, height, width = self._shape
        total = np.multiply.outer(self._z_sum[start:stop], self._plane_sum[:height, :width])
        return np.reciprocal(np.maximum(total, self._least_sum), dtype=np.float32)


def reflect_indices(start: int, stop: int, size: int) -> NDArray[np.int_]:
    """Return the places ``start`` to ``stop`` along an axis of ``size`` voxels, mirrored about its end voxels.

    The end voxels themselves are not repeated, as in ``numpy.pad(mode="reflect")``.
    """
    period = max(2 * (size - 1), 1)
    index = np.arange(start, stop) % period
    return np.minimum(index, period - index) if size > 1 else np.zeros_like(index)
