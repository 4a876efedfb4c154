"""Training tiles: where they are cut, how they lie, and their target rendered for that pose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from czii25d.data.augment import Augmentation, Pose
from czii25d.data.targets import HeatmapTarget
from czii25d.data.volumes import Volume
from czii25d.errors import InputError
from czii25d.geometry import Shape3D, zyx_voxel_to_xyz_angstrom
from czii25d.heatmap import render_heatmap
from czii25d.regions import Region
from czii25d.tiling import TileGrid


@dataclass(frozen=True)
class Sampling:
    """Where training tiles are cut.

    Parameters
    ----------
    kind
        ``"grid"``: every tile of a half-overlapping grid once an epoch, jittered by up to a quarter tile, as
        published. ``"balanced"``: about a random particle, each class equally often, or anywhere.
    particle_prob
        For ``"balanced"``: the probability that a tile is cut about a particle.
    samples_per_epoch
        ``None``: as many as the grid has tiles.
    """

    kind: Literal["grid", "balanced"] = "grid"
    particle_prob: float = 0.75
    samples_per_epoch: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("grid", "balanced"):
            raise InputError("key data.sampling.kind", "grid or balanced", repr(self.kind), "choose one")
        if not 0 <= self.particle_prob <= 1:
            raise InputError(
                "key data.sampling.particle_prob", "a number in [0, 1]", str(self.particle_prob), "correct it"
            )
        if self.samples_per_epoch is not None and self.samples_per_epoch < 1:
            raise InputError(
                "key data.sampling.samples_per_epoch", "at least 1", str(self.samples_per_epoch), "raise it"
            )


class TileDataset(Dataset[tuple[Tensor, Tensor]]):
    """Tiles of several tomograms with their heatmaps.

    An item depends on ``(seed, epoch, index)`` alone, not on workers, processes or what was read before, so an
    interrupted training goes on exactly where it was. Items are asked for by ``epoch * len(self) + index``
    (`EpochSampler` does so).

    Parameters
    ----------
    volumes, targets
        One of each per training run.
    tile_shape
        ``(D, H, W)`` voxels.
    regions
        Which voxels of each run are labelled; ``None``: all. Tiles are cut where some are, and the heatmaps of the
        others are NaN (see `czii25d.losses.on_labelled`).
    """

    def __init__(
        self,
        volumes: Sequence[Volume],
        targets: Sequence[HeatmapTarget],
        tile_shape: Shape3D,
        sampling: Sampling,
        augmentation: Augmentation,
        seed: int = 0,
        regions: Sequence[Region | None] | None = None,
    ) -> None:
        self.volumes, self.targets = list(volumes), list(targets)
        self.regions = [None] * len(self.volumes) if regions is None else list(regions)
        self.tile_shape, self.sampling, self.augmentation, self.seed = (
            tile_shape,
            sampling,
            augmentation,
            seed,
        )
        d, h, w = (max(1, side // 2) for side in tile_shape)
        self._grid = [
            (run, start)
            for run, volume in enumerate(volumes)
            for start in TileGrid(volume.shape, tile_shape, (d, h, w)).starts
            if self._is_labelled(run, np.array(start))
        ]
        particles = [
            (int(channel), (run, center))
            for run, (target, region) in enumerate(zip(targets, self.regions, strict=True))
            for channel, center, used in zip(
                target.channels, target.centers_zyx_voxel, _are_labelled(target, region), strict=True
            )
            if used
        ]
        self._present = np.unique([channel for channel, _ in particles]).astype(int)
        self._of_class: dict[int, list[tuple[int, NDArray[np.float64]]]] = {int(each): [] for each in self._present}
        for channel, place in particles:
            self._of_class[channel].append(place)

    def __len__(self) -> int:
        return self.sampling.samples_per_epoch or len(self._grid)

    def __getitem__(self, key: int) -> tuple[Tensor, Tensor]:
        """Return ``(1, D, H, W)`` image and ``(C, D, H, W)`` heatmap, float32."""
        epoch, index = divmod(key, len(self))
        rng = np.random.default_rng((self.seed, epoch, index))
        run, center = self._draw_center(index, rng)
        pose = self.augmentation.draw_pose(center, rng)
        volume, target = self.volumes[run], self.targets[run]
        tile = pose.resample(volume.crop, volume.data.shape, self.tile_shape)
        tile = self.augmentation.change_intensity(tile, rng)
        heatmap = render_in_pose(target, pose, self.tile_shape)
        if (region := self.regions[run]) is not None:
            heatmap[:, ~labelled_in_pose(region, pose, self.tile_shape)] = np.nan
        return torch.from_numpy(tile)[None], torch.from_numpy(heatmap)

    def _draw_center(self, index: int, rng: np.random.Generator) -> tuple[int, tuple[float, float, float]]:
        """Draw a run and where in it the middle of a tile lies; the unturned tile is inside the volume."""
        tile = np.array(self.tile_shape)
        half = (tile - 1) / 2
        if self.sampling.kind == "grid":
            run, start = self._grid[index % len(self._grid)]
            jitter = rng.integers(-(tile // 4), tile // 4 + 1)
            middle = np.array(start) + half + (jitter if self._is_labelled(run, start + jitter) else 0)
        elif len(self._present) and rng.random() < self.sampling.particle_prob:
            run, center = (pool := self._of_class[int(rng.choice(self._present))])[rng.integers(len(pool))]
            middle = np.round(center) + rng.integers(-(tile // 2), (tile + 1) // 2) + half % 1
        else:
            run = int(rng.integers(len(self.volumes)))
            if (region := self.regions[run]) is None:
                middle = np.floor(rng.random(3) * self.volumes[run].data.shape) + half % 1
            else:
                middle = region.random_voxel(rng) + half % 1
        last = np.maximum(np.array(self.volumes[run].data.shape) - 1 - half, half)
        z, y, x = np.clip(middle, half, last)
        return run, (float(z), float(y), float(x))

    def _is_labelled(self, run: int, start: NDArray[np.int_]) -> bool:
        """Return whether a tile that starts there, moved into the volume, holds a labelled voxel."""
        region = self.regions[run]
        if region is None:
            return True
        z, y, x = (int(each) for each in np.clip(start, 0, np.maximum(np.subtract(region.shape, self.tile_shape), 0)))
        return bool(region.crop((z, y, x), self.tile_shape).any())


def _are_labelled(target: HeatmapTarget, region: Region | None) -> NDArray[np.bool_]:
    """Return which particles lie where labels are known, ``(N,)``."""
    locations = zyx_voxel_to_xyz_angstrom(target.centers_zyx_voxel, target.voxel_spacing)
    return np.ones(len(locations), bool) if region is None else region.contains(locations)


def labelled_in_pose(region: Region, pose: Pose, tile_shape: Shape3D) -> NDArray[np.bool_]:
    """Return which voxels ``(D, H, W)`` of a tile in that pose show a voxel of the region; the nearest one counts."""
    depth, height, width = tile_shape
    along_z = np.zeros((depth, 3))
    along_z[:, 0] = np.arange(depth)
    plane = np.stack(np.meshgrid([0], np.arange(height), np.arange(width), indexing="ij"), -1).reshape(-1, 3)
    # The pose never mixes z with the plane.
    z = np.rint(pose.to_tomogram(along_z, tile_shape)[:, 0]).astype(int)
    _, y, x = np.rint(pose.to_tomogram(plane.astype(float), tile_shape)).astype(int).T.reshape(3, 1, height, width)
    return region.lookup(z[:, None, None], y, x)


def render_in_pose(target: HeatmapTarget, pose: Pose, tile_shape: Shape3D) -> NDArray[np.float32]:
    """Render the ``(C, D, H, W)`` heatmap of a tile in that pose from the particles' exact positions."""
    return render_heatmap(
        pose.to_tile(target.centers_zyx_voxel, tile_shape),
        target.channels,
        np.asarray(target.sigma_voxel) / pose.scale,
        tile_shape,
        len(target.particles),
    )


class EpochSampler(Sampler[int]):
    """Shuffles the items of an epoch, the same way in every process, and hands each process its share.

    Lightning calls `set_epoch`. Every process gets equally many items: up to ``world_size - 1`` at the end of
    the shuffled order are left out of an epoch.

    Parameters
    ----------
    length, seed
        Number of items of an epoch, and what its order is drawn from, together with the epoch.
    rank, world_size
        Which process of how many this is.
    epoch, done
        Where a resumed training stands: in that epoch, the first ``done`` items of this process are left out. Known
        from the start because loaders with workers ask for items before Lightning calls `set_epoch`.
    """

    def __init__(
        self, length: int, seed: int = 0, rank: int = 0, world_size: int = 1, epoch: int = 0, done: int = 0
    ) -> None:
        self.length, self.seed, self.rank, self.world_size = length, seed, rank, world_size
        self.epoch, self._resumed_epoch, self._done = epoch, epoch, done

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the items of a whole epoch, also of the one that is resumed: batches keep their numbers."""
        return self.length // self.world_size

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        share = order[self.rank : len(self) * self.world_size : self.world_size]
        remaining = share[self._done if self.epoch == self._resumed_epoch else 0 :]
        return iter((self.epoch * self.length + remaining).tolist())
