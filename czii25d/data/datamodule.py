"""Which runs are trained on, which are held out, and the loaders of both."""

from __future__ import annotations

import hashlib
import logging
import signal
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from czii25d.data.augment import Augmentation
from czii25d.data.cache import Cache, choose_cache, host_memory, load_volumes
from czii25d.data.dataset import EpochSampler, Sampling, TileDataset
from czii25d.data.regions import RegionTable
from czii25d.data.targets import HeatmapTarget, open_target
from czii25d.data.tiles import TileBatch, make_tiles
from czii25d.data.volumes import Normalization, Volume, open_volume
from czii25d.errors import InputError, did_you_mean
from czii25d.geometry import Shape3D, spacings_agree
from czii25d.particles import ParticleSet
from czii25d.regions import Region, Selection
from czii25d.resampling import is_same_spacing

logger = logging.getLogger(__name__)


def split_runs(
    names: Sequence[str], fold_id: int | str | Sequence[str], train_all: bool = False
) -> tuple[list[str], list[str]]:
    """Return the names trained on and those held out.

    Parameters
    ----------
    names
        Every run, in fold order.
    fold_id
        Position of the held-out run, its name, or several names.
    train_all
        Train on every run and hold none out.

    Raises
    ------
    InputError
        If a run is listed twice or unknown, the position is out of range, or nothing is left to train on.
    """
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if list(names).count(name) > 1})
        raise InputError("key data.runs", "each run once", f"{', '.join(twice)} twice", "remove the repetition")
    if train_all:
        return list(names), []
    if isinstance(fold_id, int) and not isinstance(fold_id, bool):
        if not 0 <= fold_id < len(names):
            raise InputError(
                "key data.fold_id",
                f"0 to {len(names) - 1} ({', '.join(names)})",
                str(fold_id),
                "choose one of these positions, or a run's name",
            )
        held_out = [names[fold_id]]
    elif isinstance(fold_id, str):
        held_out = [fold_id]
    else:
        held_out = list(fold_id) if isinstance(fold_id, Sequence) else [str(fold_id)]
    if len(set(held_out)) != len(held_out):
        raise InputError("key data.fold_id", "each run once", ", ".join(map(str, held_out)), "remove the repetition")
    for name in held_out:
        if name not in names:
            hint = did_you_mean(str(name), names)
            raise InputError("key data.fold_id", f"one of {', '.join(names)}", f"{name!r}{hint}", "correct the name")
    trained = [name for name in names if name not in held_out]
    if not trained:
        raise InputError(
            "key data.fold_id",
            "a run left to train on",
            f"all of {', '.join(names)} held out",
            "hold out fewer",
        )
    return trained, held_out


class TomogramDataModule(L.LightningDataModule):
    """Volumes and their targets, split by fold; opening them reads next to nothing.

    Parameters
    ----------
    volumes_dir, heatmaps_dir
        What 01 and 02 wrote: ``<volumes_dir>/<run>/`` and ``<heatmaps_dir>/<run>.zarr``.
    train_runs, held_out_runs
        Names.
    particles
        What the network is to find; must be what 02 was made for.
    tile_shape
        ``(D, H, W)`` voxels of a training tile.
    sampling, augmentation
        Where tiles are cut, and what is random of them.
    normalization
        See `czii25d.data.volumes.Volume`.
    batch_size
        Tiles of a step of each process.
    num_workers
        Processes that draw and cut tiles; 0: the training's own does.
    seed
        Of what is drawn, together with the epoch.
    regions
        What is labelled of each run; ``None``: all of all. Tiles are cut there, and the rest has no part in the loss.
    cache
        Where the training volumes lie, see `czii25d.data.cache.choose_cache`.
    reconstructions
        Further volumes of each training run, ``<volumes_dir>/<run>/<reconstruction>/``.

    Raises
    ------
    InputError
        If a folder is missing or not of these particles, runs differ in voxel spacing, or a particle has no pick.
    """

    def __init__(
        self,
        volumes_dir: Path,
        heatmaps_dir: Path,
        train_runs: Sequence[str],
        held_out_runs: Sequence[str],
        particles: ParticleSet,
        tile_shape: Shape3D,
        sampling: Sampling,
        augmentation: Augmentation,
        normalization: Normalization = "volume",
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        regions: RegionTable | None = None,
        cache: Cache = "auto",
        reconstructions: Sequence[str] = (),
    ) -> None:
        super().__init__()
        choose_cache(cache, 0, None, 0)  # refuses what it does not know
        if batch_size < 1:
            raise InputError("key data.batch_size", "at least 1", str(batch_size), "raise it")
        if num_workers < 0:
            raise InputError("key data.num_workers", "at least 0", str(num_workers), "raise it")
        self.batch_size, self.num_workers, self.seed, self.cache = batch_size, num_workers, seed, cache
        self._on_device: list[Tensor] = []
        self._epoch, self._batch = 0, 0  # where a resumed training stands

        def open_runs(names: Sequence[str]) -> list[tuple[Volume, HeatmapTarget]]:
            return [
                (
                    open_volume(volumes_dir / name, normalization),
                    check_target(open_target(heatmaps_dir / f"{name}.zarr"), particles, heatmaps_dir / f"{name}.zarr"),
                )
                for name in names
            ]

        train, self.held_out = open_runs(train_runs), open_runs(held_out_runs)
        for volume, target in (*train, *self.held_out):
            if volume.data.shape != target.shape:
                raise InputError(
                    f"run {target.run}",
                    f"heatmaps of the volume's shape {volume.data.shape}",
                    f"{target.shape}",
                    "run 02_create_mask.py again",
                )
        selections = [
            None if regions is None else regions.select(volume.name, volume.shape, volume.voxel_spacing)
            for volume, _ in (*train, *self.held_out)
        ]
        self.held_out_selections = selections[len(train) :]
        labelled = [
            None if selection is None else _labelled(selection, volume.name)
            for selection, (volume, _) in zip(selections, train, strict=False)
        ]
        self.is_partly_labelled = any(region is not None for region in labelled)
        self.voxel_spacing = train[0][0].voxel_spacing
        for volume, target in (*train, *self.held_out):
            if not spacings_agree(volume.voxel_spacing, self.voxel_spacing):
                raise InputError(
                    f"run {target.run}",
                    f"the voxel spacing of the other runs, {self.voxel_spacing} angstrom",
                    f"{volume.voxel_spacing}",
                    "bring them to one: 01_create_dataset.py resample_to=ANGSTROM, then 02_create_mask.py",
                )
        self.dataset = TileDataset(
            [volume for volume, _ in train],
            [target for _, target in train],
            tile_shape,
            sampling,
            augmentation,
            seed,
            labelled,
            [
                [_open_other(volume, name, volumes_dir / volume.name / name) for name in reconstructions]
                for volume, _ in train
            ],
        )

        check_classes(self.dataset.present_channels, particles)

    def setup(self, stage: str) -> None:
        """Bring the volumes to where tiles are cut from them, as Lightning asks before a training."""
        if stage == "fit":
            self.move_to(self.trainer.strategy.root_device if self.trainer else torch.device("cpu"))

    def move_to(self, device: torch.device) -> None:
        """Prepare for a training on a device: tiles are made there."""
        size = sum(volume.data.nbytes for volume in self.dataset.all_volumes)
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
        host = host_memory() // (self.trainer.num_devices if self.trainer else 1)  # each process has its own copy
        cache, why = choose_cache(self.cache, size, free, host)
        try:
            voxels = load_volumes(self.dataset.all_volumes, cache, device)
        except torch.OutOfMemoryError:  # free, but in pieces, or taken meanwhile
            cache, why = choose_cache(self.cache, size, 0, host)
            voxels = load_volumes(self.dataset.all_volumes, cache, device)
        if why:
            logger.info("data.cache=%s: %s", cache, why)
        on_device = cache == "device"
        self._on_device = voxels if on_device else []
        if not on_device:
            self.dataset.voxels = voxels
        self.dataset.delivers = "tiles" if device.type == "cpu" else "plans" if on_device else "boxes"

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Make the tiles of a training batch on the device that it has come to."""
        return make_tiles(batch, self._on_device) if isinstance(batch, TileBatch) else batch

    def state_dict(self) -> dict[str, Any]:
        """Return which batch of which epoch comes next, and of what data."""
        if self.trainer is None:
            return {}
        epoch, batch = self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.completed
        if batch >= self.trainer.num_training_batches:
            epoch, batch = epoch + 1, 0
        return {"epoch": epoch, "batch": batch, "world_size": self.trainer.world_size, **self._contents()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint stands.

        Raises
        ------
        InputError
            If it was trained on other runs, or stands within an epoch that another number of processes shared.
        """
        for key, value in self._contents().items():
            if state_dict.get(key, value) != value:
                raise InputError(
                    "resume",
                    f"the {key} of the interrupted training, {_listed(state_dict[key])}",
                    _listed(value),
                    "choose another wandb.name, restore the data, or start over with resume=false",
                )
        world_size = self.trainer.world_size if self.trainer else 1
        if state_dict["batch"] and state_dict["world_size"] != world_size:
            raise InputError(
                "key trainer.devices",
                f"{state_dict['world_size']} processes, which share the epoch that was interrupted",
                str(world_size),
                "restore it until the epoch has ended",
            )
        self._epoch, self._batch = state_dict["epoch"], state_dict["batch"]

    def _contents(self) -> dict[str, Any]:
        return {
            "training runs": [target.run for target in self.dataset.targets],
            "held-out runs": [target.run for _, target in self.held_out],
            "number of samples": len(self.dataset),
            "content of the runs": self._fingerprint(),
        }

    def _fingerprint(self) -> str:
        """Tell data from others of the same names, without reading voxels."""
        own = [*zip(self.dataset.volumes, self.dataset.targets, strict=True), *self.held_out]
        told = hashlib.sha256()
        for volume, target in own:
            told.update(repr((volume.shape, volume.mean, volume.std, volume.voxel_spacing)).encode())
            told.update(np.ascontiguousarray(target.centers_zyx_voxel).tobytes())
            told.update(target.channels.astype(np.int64).tobytes() + target.sigma_voxel.tobytes())
        return told.hexdigest()[:12]

    def train_dataloader(self) -> DataLoader:
        """Return the loader of batches, `on_after_batch_transfer` makes images and heatmaps of them.

        ``(B, 1, D, H, W)`` and ``(B, C, D, H, W)``.
        """
        world_size = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        sampler = EpochSampler(
            len(self.dataset), self.seed, rank, world_size, self._epoch, self._batch * self.batch_size
        )
        return DataLoader(
            self.dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            worker_init_fn=leave_signals_to_the_trainer,
            collate_fn=_as_it_is,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.trainer is not None and self.trainer.accelerator.__class__.__name__ == "CUDAAccelerator",
            drop_last=len(self.dataset) // world_size >= self.batch_size,
        )

    def val_dataloader(self) -> DataLoader | list:
        """Return a loader of positions in ``held_out``, one whole tomogram each, dealt out to the processes.

        Every process gets equally many; -1 stands for none.
        """
        world_size = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        mine = list(range(len(self.held_out)))[rank::world_size]
        positions: Any = mine + [-1] * (-(-len(self.held_out) // world_size) - len(mine))
        return DataLoader(positions, batch_size=None) if self.held_out else []


def check_classes(present: Collection[int], particles: ParticleSet) -> None:
    """Refuse particles without a pick, where the training runs are labelled; ``present`` are the channels that have."""
    absent = [name for channel, name in enumerate(particles.names) if channel not in present]
    if absent:
        raise InputError(
            "training runs",
            f"picks of each of the {len(particles)} particles, within the regions",
            f"none of {', '.join(absent)}",
            "hold out another run (data.fold_id), add runs that have them, "
            "or leave them out of the particles and run 02_create_mask.py again",
        )


def leave_signals_to_the_trainer(worker: int) -> None:
    """Let a worker live on when the whole job is told to end: the trainer still needs its step's batch."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _listed(value: Any) -> str:
    return ", ".join(value) or "none" if isinstance(value, list) else str(value)


def _open_other(volume: Volume, reconstruction: str, folder: Path) -> Volume:
    if not folder.is_dir():
        cure = f"run 01_create_dataset.py more_reconstructions=[{reconstruction}], or remove it"
        raise InputError("key data.reconstructions", f"a volume {reconstruction} of {volume.name}", "none", cure)
    other = open_volume(folder, volume.normalization)
    if other.shape != volume.shape or not is_same_spacing(other.voxel_spacing, volume.voxel_spacing):
        expected = f"the run's shape {volume.shape} and voxel spacing {volume.voxel_spacing}"
        raise InputError(folder, expected, f"{other.shape}, {other.voxel_spacing}", "run 01_create_dataset.py again")
    return other


def _as_it_is(batch: Any) -> Any:
    return batch


def _labelled(selection: Selection, run: str) -> Region:
    """Return the region without its margin."""
    region = selection.region.shrunk(selection.margin)
    if not region.counts.any():
        found = f"none at {selection.margin:g} angstrom"
        raise InputError(f"run {run}", "a region with a voxel beyond its margin", found, "lower it")
    return region


def check_target(target: HeatmapTarget, particles: ParticleSet, where: Path) -> HeatmapTarget:
    """Return the target if 02 made it for these particles; raise `InputError` otherwise."""
    if target.particles.names != particles.names:
        raise InputError(
            where,
            f"heatmaps of the {len(particles)} classes asked for (model.class_num): {', '.join(particles.names)}",
            f"{len(target.particles)}: {', '.join(target.particles.names)}",
            f"run 02_create_mask.py class_num={len(particles)}, or change model.class_num",
        )
    return target
