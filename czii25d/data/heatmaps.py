"""Predicted heatmaps on disk, written while they are predicted."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from czii25d.data.targets import create_heatmap_array
from czii25d.geometry import Shape3D, Spacing3D
from czii25d.heatmap import quantize
from czii25d.particles import ParticleSet


class HeatmapWriter:
    """Writes heatmaps that come slab by slab as OME-Zarr of uint8, ``(c, z, y, x)``, in a thread of its own.

    Parameters
    ----------
    path
        Of the OME-Zarr.
    run
        Its name there.
    voxel_spacing
        Angstrom per voxel along z, y, x.
    shape
        ``(D, H, W)`` of the whole volume.
    """

    def __init__(
        self, path: Path | str, run: str, particles: ParticleSet, voxel_spacing: Spacing3D, shape: Shape3D
    ) -> None:
        self._array = create_heatmap_array(path, run, particles, voxel_spacing, shape)
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._planes: list[NDArray[np.uint8]] = []  # those that do not fill a chunk yet
        self._z = 0

    def __enter__(self) -> HeatmapWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._write(sum(planes.shape[1] for planes in self._planes))
                self._wait()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def keep(self, slabs: Iterator[Tensor]) -> Iterator[Tensor]:
        """Pass slabs ``(C, d, H, W)`` on, and write them."""
        depth = self._array.chunks[1]
        for slab in slabs:
            self._planes.append(quantize(slab.clamp(0, 1).cpu().numpy()))
            ready = sum(planes.shape[1] for planes in self._planes) // depth * depth
            if ready:
                self._write(ready)
            yield slab

    def _write(self, depth: int) -> None:
        if not depth:
            return
        planes = np.concatenate(self._planes, 1)
        whole, self._planes = planes[:, :depth], [planes[:, depth:]]
        self._wait()
        self._pending = self._pool.submit(
            self._array.__setitem__, (slice(None), slice(self._z, self._z + depth)), whole
        )
        self._z += depth

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
