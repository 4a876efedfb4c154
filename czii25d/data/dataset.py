"""Training tiles: where they are cut and how they lie, and, where that is asked for, made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from czii25d.data.augment import Augmentation
from czii25d.data.cache import load_volumes
from czii25d.data.paste import Pasting
from czii25d.data.targets import HeatmapTarget
from czii25d.data.tiles import Tile, TileBatch, make_tiles, plan_batch
from czii25d.data.volumes import Volume, gain_and_shift
from czii25d.errors import InputError
from czii25d.geometry import Shape3D, zyx_voxel_to_xyz_angstrom
from czii25d.regions import Region
from czii25d.tiling import TileGrid

Delivery = Literal["tiles", "boxes", "plans"]


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
        ``None``: as many as the grid has tiles. Of a grid with another number of tiles, an epoch goes on where the
        one before ended, in an order drawn anew for every pass over the grid.
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

    An item depends on ``(seed, epoch, index)`` alone, not on its batch, workers, processes, device or what was read
    before, so an interrupted training goes on exactly where it was. Items are asked for by
    ``epoch * len(self) + index`` (`EpochSampler` does so); a loader asks for a batch of them at once.

    Attributes
    ----------
    delivers
        What a loader's batch is. ``"tiles"``: images and heatmaps. ``"boxes"``: a `TileBatch` whose boxes are cut, to
        be made elsewhere; ``"plans"``: one without voxels.

    Parameters
    ----------
    volumes, targets
        One of each per training run.
    tile_shape
        ``(D, H, W)`` voxels.
    regions
        Which voxels of each run are labelled; ``None``: all. Tiles are cut where some are, and the heatmaps of the
        others are NaN (see `czii25d.losses.on_labelled`).
    others
        Further volumes of each run, as many of each; a tile is cut from any of a run's alike.
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
        others: Sequence[Sequence[Volume]] | None = None,
    ) -> None:
        self.volumes, self.targets = list(volumes), list(targets)
        self.regions = [None] * len(self.volumes) if regions is None else list(regions)
        own = [[]] * len(self.volumes) if others is None else others
        # Every run's own volume, then every run's first other one, and so on.
        self.all_volumes = [*self.volumes, *(volume for layer in zip(*own, strict=True) for volume in layer)]
        self.delivers: Delivery = "tiles"
        self._voxels: list[Tensor] | None = None
        self._sigmas = [target.sigma_voxel for target in targets]
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
        labelled = [_are_labelled(target, region) for target, region in zip(targets, self.regions, strict=True)]
        self._pass_order: tuple[int, NDArray[np.int_]] = (-1, np.empty(0, int))  # the grid's, in that pass
        self._pasting = Pasting(targets, labelled) if augmentation.paste_prob else None
        particles = [
            (int(channel), (run, center))
            for run, target in enumerate(targets)
            for channel, center, used in zip(target.channels, target.centers_zyx_voxel, labelled[run], strict=True)
            if used
        ]
        self._present = np.unique([channel for channel, _ in particles]).astype(int)
        self._of_class: dict[int, list[tuple[int, NDArray[np.float64]]]] = {int(each): [] for each in self._present}
        for channel, place in particles:
            self._of_class[channel].append(place)

    @property
    def present_channels(self) -> set[int]:
        """The particles that have a pick where these runs are labelled."""
        return set(map(int, self._present))

    def __len__(self) -> int:
        return self.sampling.samples_per_epoch or len(self._grid)

    def __getitem__(self, key: int) -> tuple[Tensor, Tensor]:
        """Return ``(1, D, H, W)`` image and ``(C, D, H, W)`` heatmap, float32."""
        image, heatmap = make_tiles(self.plan([key]), self.voxels)
        return image[0], heatmap[0]

    def __getitems__(self, keys: Sequence[int]) -> TileBatch | tuple[Tensor, Tensor]:
        """Return what `delivers` says of a batch."""
        if self.delivers != "tiles":
            plan = self.plan(keys)
            return plan if self.delivers == "plans" else plan.cut_from(self.voxels, torch.float16)
        classes = len(self.targets[0].particles)
        out = _room((len(keys), 1, *self.tile_shape)), _room((len(keys), classes, *self.tile_shape))
        return make_tiles(self.plan(keys), self.voxels, out)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the voxels: a worker that is started anew maps the files."""
        return {**vars(self), "_voxels": None}

    @property
    def voxels(self) -> list[Tensor]:
        """The volumes that boxes are cut from, where there are some: mapped from disk unless others were given."""
        if self._voxels is None:
            self._voxels = load_volumes(self.all_volumes, "disk", torch.device("cpu"))
        return self._voxels

    @voxels.setter
    def voxels(self, voxels: list[Tensor]) -> None:
        self._voxels = voxels

    def plan(self, keys: Sequence[int]) -> TileBatch:
        """Draw a batch."""
        tiles = [self._draw(key) for key in keys]
        return plan_batch(tiles, self.tile_shape, self.augmentation.noise_tilt, self.augmentation.noise_pink)

    def _draw(self, key: int) -> Tile:
        epoch, index = divmod(key, len(self))
        rng = np.random.default_rng((self.seed, epoch, index))
        run, center = self._draw_center(key, rng)
        volume, target = self.volumes[run], self.targets[run]
        pose = self.augmentation.draw_pose(center, rng, volume.voxel_spacing)
        intensity = self.augmentation.draw_intensity(rng)
        layer = 0
        if (layers := len(self.all_volumes) // len(self.volumes)) > 1:
            layer = int(rng.integers(layers)) * len(self.volumes)
            volume = self.all_volumes[run + layer]
        gain, shift = gain_and_shift(volume.mean, volume.std, volume.normalization)
        intensity = replace(intensity, gain=intensity.gain * gain, shift=intensity.gain * shift + intensity.shift)
        paste = None
        if self._pasting is not None and rng.random() < self.augmentation.paste_prob:
            paste = self._pasting.draw(run, pose, self.tile_shape, rng)
            paste = paste and replace(paste, volume=paste.volume + layer)
        return Tile(
            run + layer,
            pose,
            intensity,
            target.centers_zyx_voxel,
            target.channels,
            self._sigmas[run],
            paste,
            self.regions[run],
        )

    def _grid_tile(self, key: int) -> tuple[int, tuple[int, ...]]:
        if self.sampling.samples_per_epoch is None:
            return self._grid[key % len(self._grid)]
        number, index = divmod(key, len(self._grid))
        if self._pass_order[0] != number:
            self._pass_order = number, np.random.default_rng((self.seed, number)).permutation(len(self._grid))
        return self._grid[self._pass_order[1][index]]

    def _draw_center(self, key: int, rng: np.random.Generator) -> tuple[int, tuple[float, float, float]]:
        """Draw a run and where in it the middle of a tile lies; the unturned tile is inside the volume."""
        tile = np.array(self.tile_shape)
        half = (tile - 1) / 2
        if self.sampling.kind == "grid":
            run, start = self._grid_tile(key)
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


def _room(shape: Sequence[int]) -> Tensor:
    """Return an empty float32 tensor; in a worker process, one in shared memory, not to be copied on its way out."""
    if get_worker_info() is None:
        return torch.empty(tuple(shape))
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * 4)  # as torch's own default_collate does
    return torch.empty(0).set_(storage, 0, tuple(shape))  # type: ignore[call-overload]


def _are_labelled(target: HeatmapTarget, region: Region | None) -> NDArray[np.bool_]:
    """Return which particles lie where labels are known, ``(N,)``."""
    locations = zyx_voxel_to_xyz_angstrom(target.centers_zyx_voxel, target.voxel_spacing)
    return np.ones(len(locations), bool) if region is None else region.contains(locations)


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
