"""Training tiles in batches, on any device: cut from the volumes, resampled in their poses, their heatmaps rendered.

What is random has been drawn before (`czii25d.data.augment`), on the host and item by item. Here are the voxels: boxes
of the volumes, wherever these lie, are copied, and everything else is done to the whole batch at once on the device
that the boxes have come to, CPU or GPU. Nothing waits for a GPU: no value is read back from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from czii25d.data.augment import Intensity, Pose
from czii25d.data.paste import SOFT_EDGE, Paste
from czii25d.geometry import Shape3D, Spacing3D
from czii25d.heatmap import TRUNCATE
from czii25d.regions import Region

T = TypeVar("T")


@dataclass(frozen=True)
class Tile:
    """One tile, not yet made.

    Parameters
    ----------
    volume
        Which of the volumes.
    pose, intensity
        How it lies, and what happens to its values.
    centers_zyx, channels, sigma_voxel
        Particles in the tomogram: ``(N, 3)`` fractional indices, ``(N,)`` classes; and of each class ``(C, 3)``.
    paste
        A particle that it gains.
    region
        Which voxels of the tomogram are labelled; ``None``: all.
    """

    volume: int
    pose: Pose
    intensity: Intensity
    centers_zyx: NDArray[np.float64]
    channels: NDArray[np.intp]
    sigma_voxel: NDArray[np.float64]
    paste: Paste | None = None
    region: Region | None = None


@dataclass(frozen=True)
class Boxes:
    """Boxes of volumes, all of one shape, and the tiles that they become.

    Parameters
    ----------
    items
        ``(n,)``: the tiles' places in the batch.
    volumes, starts
        Which volume, and the first voxel there; a box may reach beyond its volume.
    shape
        ``(d, h, w)`` of all.
    voxels
        ``(n, d, h, w)`` z-scores once they are cut, 0 outside the volume.
    flips
        For tiles that are boxes: the axes along which these are mirrored.
    to_box
        ``(n, 3, 4)``: from a place in the tile, z y x from -1 to 1, to one in the box, likewise; ``None`` for tiles
        that are boxes.
    is_tilted
        Whether some tile's planes are no planes of its box.
    """

    items: Tensor
    volumes: tuple[int, ...]
    starts: tuple[Shape3D, ...]
    shape: Shape3D
    voxels: Tensor | None = None
    flips: tuple[int, ...] = ()
    to_box: Tensor | None = None
    is_tilted: bool = False


@dataclass(frozen=True)
class Gaussians:
    """The particles that a batch of heatmaps shows.

    Parameters
    ----------
    centers, sigma
        ``(N, 3)`` in voxels of the tile, z y x.
    channels
        ``(M,)``: the channel of the first ``M``, no two of which share one. A channel is the place in the batch times
        the number of classes, plus the class.
    others
        Channel and place, z y x, of each of the remaining.
    """

    centers: Tensor
    sigma: Tensor
    channels: Tensor
    others: tuple[tuple[int, tuple[slice, ...]], ...]


@dataclass(frozen=True)
class Pastes:
    """Balls that are laid over tiles.

    Parameters
    ----------
    boxes
        What they are copied from.
    shape
        Of the cubes about the balls.
    tiles, starts
        Each cube's tile in the batch, and its first voxel there; it may reach beyond the tile.
    offsets, steps
        ``(n, 3)``: from the particle to the cube's first voxel, and the length of a voxel in radii, z y x.
    """

    boxes: Boxes
    shape: Shape3D
    tiles: tuple[int, ...]
    starts: tuple[Shape3D, ...]
    offsets: Tensor
    steps: Tensor


@dataclass(frozen=True)
class Filters:
    """Tiles that meet a function of their frequencies.

    Parameters
    ----------
    items
        ``(n,)``: their places in the batch.
    to_tilt_frame
        ``(n, 3, 3)``, see `Pose.to_tilt_frame`.
    tilt
        ``(n,)`` radians: the largest tilt of the series.
    softness
        How far beyond the measured frequencies the filter falls to 0: one sample of the tile, per unit of spacing.
    """

    items: Tensor
    to_tilt_frame: Tensor
    tilt: Tensor
    softness: float


@dataclass(frozen=True)
class Noise:
    """Tiles to which noise is added; ``keys, std`` are ``(n, 1, 1, 1)``, the filter is ``None`` for white noise."""

    items: Tensor
    keys: Tensor
    std: Tensor
    filters: Filters | None
    pink: float


@dataclass(frozen=True)
class Unlabelled:
    """Voxels whose heatmaps are not known: ``masks[i]``, ``(D, H, W)``, of tile ``tiles[i]`` of the batch."""

    tiles: tuple[int, ...]
    masks: Tensor


class TileBatch:
    """All that a batch is made of, small enough to be sent anywhere; `make_tiles` makes it.

    Not a dataclass, whose tensors Lightning would turn into float32 one by one before it moves the batch.

    Parameters
    ----------
    size, tile_shape, class_num
        Shape of the batch.
    boxes, gaussians
        What its tiles and heatmaps show.
    pastes
        What is laid over the tiles; ``None`` for nothing.
    wedges
        Tiles that lose a wedge; ``None`` if there are none.
    gain, shift
        ``(B, 1, 1, 1)``.
    noise
        ``None`` if there is none.
    unlabelled
        Heatmaps are NaN there; ``None``: nowhere.
    """

    def __init__(
        self,
        size: int,
        tile_shape: Shape3D,
        class_num: int,
        boxes: Sequence[Boxes],
        gaussians: Gaussians,
        pastes: Pastes | None,
        wedges: Filters | None,
        gain: Tensor,
        shift: Tensor,
        noise: Noise | None,
        unlabelled: Unlabelled | None,
    ) -> None:
        self.size, self.tile_shape, self.class_num = size, tile_shape, class_num
        self.boxes, self.gaussians, self.pastes, self.wedges = tuple(boxes), gaussians, pastes, wedges
        self.gain, self.shift, self.noise, self.unlabelled = gain, shift, noise, unlabelled

    def _with(self, **parts: Any) -> TileBatch:
        return TileBatch(**{**vars(self), **parts})

    def _map(self, change: Any) -> TileBatch:
        return self._with(**{name: _map_tensors(part, change) for name, part in vars(self).items()})

    def to(self, device: torch.device | str) -> TileBatch:
        """Return it with its tensors on a device; from pinned memory, without waiting for them."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=torch.device(device).type == "cuda"))

    def pin_memory(self) -> TileBatch:
        """Return it with its tensors in pinned memory."""
        return self._map(Tensor.pin_memory)

    def cut_from(self, volumes: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> TileBatch:
        """Return it with its boxes cut, where they were not yet."""

        def with_voxels(boxes: Boxes) -> Boxes:
            return boxes if boxes.voxels is not None else replace(boxes, voxels=cut(volumes, boxes, dtype))

        pastes = self.pastes
        if pastes is not None:
            pastes = replace(pastes, boxes=with_voxels(pastes.boxes))
        return self._with(boxes=[with_voxels(each) for each in self.boxes], pastes=pastes)


def _map_tensors(part: Any, change: Any) -> Any:
    if isinstance(part, Tensor):
        return change(part)
    if isinstance(part, tuple) and part and isinstance(part[0], Boxes):
        return tuple(_map_tensors(each, change) for each in part)
    if isinstance(part, Boxes | Gaussians | Pastes | Filters | Noise | Unlabelled):
        own = {field.name: getattr(part, field.name) for field in fields(part)}
        return replace(part, **{name: _map_tensors(value, change) for name, value in own.items()})
    return part


def plan_batch(
    tiles: Sequence[Tile], tile_shape: Shape3D, noise_tilt: float = 90.0, noise_pink: float = 0.0
) -> TileBatch:
    """Collect what a batch of tiles is made of.

    Parameters
    ----------
    tiles
        Their classes are those of the first.
    noise_tilt, noise_pink
        See `Augmentation`.
    """
    class_num = len(tiles[0].sigma_voxel)
    straight: dict[tuple[int, ...], list[int]] = {}
    turned = []
    for item, tile in enumerate(tiles):
        pose = tile.pose
        if pose.is_straight and not any((np.array(pose.center_zyx) - (np.array(tile_shape) - 1) / 2) % 1):
            flips = tuple(axis for axis, flip in ((-3, pose.flip_z), (-1, pose.flip_x)) if flip)
            straight.setdefault(flips, []).append(item)
        else:
            turned.append(item)
    boxes = [_straight_boxes(tiles, items, tile_shape, flips) for flips, items in straight.items()]
    if turned:
        poses, volumes = [tiles[item].pose for item in turned], [tiles[item].volume for item in turned]
        boxes.append(_turned_boxes(turned, volumes, poses, tile_shape))
    gain, shift = (
        torch.tensor([getattr(tile.intensity, name) for tile in tiles], dtype=torch.float32).reshape(-1, 1, 1, 1)
        for name in ("gain", "shift")
    )
    wedged = [item for item, tile in enumerate(tiles) if tile.intensity.wedge_tilt < 90]
    wedges = None
    if wedged:
        angles = [tiles[item].intensity.wedge_angle for item in wedged]
        tilts = [tiles[item].intensity.wedge_tilt for item in wedged]
        wedges = _filters(tiles, wedged, tilts, angles, tile_shape)
    noisy = [item for item, tile in enumerate(tiles) if tile.intensity.noise_std > 0]
    noise = None
    if noisy:
        keys, std = (
            torch.tensor([getattr(tiles[item].intensity, name) for item in noisy], dtype=dtype).reshape(-1, 1, 1, 1)
            for name, dtype in (("noise_key", torch.int64), ("noise_std", torch.float32))
        )
        is_white = noise_tilt >= 90 and not noise_pink
        filters = (
            None if is_white else _filters(tiles, noisy, [noise_tilt] * len(noisy), [0.0] * len(noisy), tile_shape)
        )
        noise = Noise(torch.tensor(noisy), keys, std, filters, noise_pink)
    gaussians = _gaussians(tiles, tile_shape, class_num)
    unlabelled = None
    if partly := [item for item, tile in enumerate(tiles) if tile.region is not None]:
        masks = [~labelled_in_pose(tile.region, tile.pose, tile_shape) for tile in tiles if tile.region is not None]
        unlabelled = Unlabelled(tuple(partly), torch.from_numpy(np.stack(masks)))
    return TileBatch(
        len(tiles), tile_shape, class_num, boxes, gaussians, _pastes(tiles), wedges, gain, shift, noise, unlabelled
    )


def _as_shape(row: NDArray[np.int_]) -> Shape3D:
    z, y, x = row.tolist()
    return z, y, x


def _straight_boxes(tiles: Sequence[Tile], items: list[int], tile_shape: Shape3D, flips: tuple[int, ...]) -> Boxes:
    starts = [_as_shape(tiles[item].pose.box(tile_shape)[0]) for item in items]
    return Boxes(
        torch.tensor(items), tuple(tiles[item].volume for item in items), tuple(starts), tile_shape, flips=flips
    )


def _turned_boxes(items: list[int], volumes: list[int], poses: list[Pose], tile_shape: Shape3D) -> Boxes:
    corners = [pose.box(tile_shape) for pose in poses]
    shape = _as_shape(np.max([high - low for low, high in corners], 0))
    half = (np.array(tile_shape) - 1) / 2
    last = np.maximum(np.array(shape) - 1, 1)[:, None]
    to_box = [
        np.column_stack([pose.matrix * half, np.array(pose.center_zyx) - low - last[:, 0] / 2]) * 2 / last
        for pose, (low, _) in zip(poses, corners, strict=True)
    ]
    return Boxes(
        torch.tensor(items),
        tuple(volumes),
        tuple(_as_shape(low) for low, _ in corners),
        shape,
        to_box=torch.from_numpy(np.stack(to_box).astype(np.float32)),
        is_tilted=any(pose.tilt for pose in poses),
    )


def _pastes(tiles: Sequence[Tile]) -> Pastes | None:
    items = [item for item, tile in enumerate(tiles) if tile.paste is not None]
    pastes = [tile.paste for tile in tiles if tile.paste is not None]
    if not items:
        return None
    steps = [np.array(each.pose.voxel_spacing) * each.pose.scale / each.radius for each in pastes]
    shape = _as_shape(np.ceil(2 * (1 + SOFT_EDGE) / np.min(steps, 0)).astype(int) + 2)
    half = (np.array(shape) - 1) / 2
    starts = [np.ceil(each.place_zyx - half).astype(int) for each in pastes]
    offsets = [start - each.place_zyx for start, each in zip(starts, pastes, strict=True)]
    poses = []
    for each, offset in zip(pastes, offsets, strict=True):
        z, y, x = each.center_zyx + each.pose.matrix @ (half + offset)
        poses.append(replace(each.pose, center_zyx=(float(z), float(y), float(x))))
    return Pastes(
        _turned_boxes(items, [each.volume for each in pastes], poses, shape),
        shape,
        tuple(items),
        tuple(_as_shape(start) for start in starts),
        *(torch.from_numpy(np.array(rows, np.float32)) for rows in (offsets, steps)),
    )


def _filters(
    tiles: Sequence[Tile], items: list[int], tilts: Sequence[float], angles: Sequence[float], tile_shape: Shape3D
) -> Filters:
    matrices = [tiles[item].pose.to_tilt_frame(angle) for item, angle in zip(items, angles, strict=True)]
    spacing: Spacing3D = tiles[items[0]].pose.voxel_spacing
    return Filters(
        torch.tensor(items),
        torch.from_numpy(np.stack(matrices).astype(np.float32)),
        torch.deg2rad(torch.tensor(tilts, dtype=torch.float32)),
        1 / (tile_shape[0] * spacing[0]),
    )


def _gaussians(tiles: Sequence[Tile], tile_shape: Shape3D, class_num: int) -> Gaussians:
    """Collect the particles whose Gaussians reach into their tile."""
    channels, centers, sigmas = [], [], []
    for item, tile in enumerate(tiles):
        center, channel = tile.pose.to_tile(tile.centers_zyx, tile_shape), tile.channels
        if tile.paste is not None:
            center = np.concatenate([center, tile.paste.place_zyx[None]])
            channel = np.append(channel, tile.paste.channel)
        # Axes of the tile are axes of the Gaussian: turns are those of the specimen, where it is a ball.
        sigma = (tile.sigma_voxel / tile.pose.scale)[channel]
        middle = (np.array(tile_shape) - 1) / 2
        seen = np.flatnonzero((np.abs(center - middle) <= middle + TRUNCATE * sigma).all(1))
        channels.append(item * class_num + channel[seen])
        centers.append(center[seen])
        sigmas.append(sigma[seen])
    center, sigma = np.concatenate(centers), np.concatenate(sigmas)
    first: dict[int, int] = {}
    others = []
    for particle, number in enumerate(np.concatenate(channels).tolist()):
        if first.setdefault(number, particle) != particle:
            low = np.maximum(np.ceil(center[particle] - TRUNCATE * sigma[particle]), 0).astype(int).tolist()
            stop = np.floor(center[particle] + TRUNCATE * sigma[particle]).astype(int) + 1
            place = tuple(slice(a, b) for a, b in zip(low, stop.tolist(), strict=True))
            others.append((particle, number, place))
    order = [*first.values(), *(particle for particle, _, _ in others)]
    return Gaussians(
        torch.from_numpy(center[order].astype(np.float32)),
        torch.from_numpy(sigma[order].astype(np.float32)),
        torch.tensor(list(first), dtype=torch.int64),
        tuple((number, place) for _, number, place in others),
    )


def labelled_in_pose(region: Region, pose: Pose, tile_shape: Shape3D) -> NDArray[np.bool_]:
    """Return which voxels ``(D, H, W)`` of a tile in that pose show a voxel of the region; the nearest one counts."""
    depth, height, width = tile_shape
    if pose.tilt:
        index = np.stack(np.meshgrid(*(np.arange(side) for side in tile_shape), indexing="ij"), -1).reshape(-1, 3)
        z, y, x = np.rint(pose.to_tomogram(index.astype(float), tile_shape)).astype(int).T.reshape(3, *tile_shape)
        return region.lookup(z, y, x)
    along_z = np.zeros((depth, 3))
    along_z[:, 0] = np.arange(depth)
    plane = np.stack(np.meshgrid([0], np.arange(height), np.arange(width), indexing="ij"), -1).reshape(-1, 3)
    # The pose never mixes z with the plane.
    z = np.rint(pose.to_tomogram(along_z, tile_shape)[:, 0]).astype(int)
    _, y, x = np.rint(pose.to_tomogram(plane.astype(float), tile_shape)).astype(int).T.reshape(3, 1, height, width)
    return region.lookup(z[:, None, None], y, x)


def cut(volumes: Sequence[Tensor], boxes: Boxes, dtype: torch.dtype) -> Tensor:
    """Copy boxes out of volumes, ``(n, d, h, w)``; outside them, the mean (0).

    One copy a box: a fraction of what a gather by index would move.
    """
    device = volumes[boxes.volumes[0]].device
    voxels = torch.empty((len(boxes.starts), *boxes.shape), dtype=dtype, device=device)
    for box, number, start in zip(voxels, boxes.volumes, boxes.starts, strict=True):
        volume = volumes[number]
        low = [max(a, 0) for a in start]
        high = [min(a + side, end) for a, side, end in zip(start, boxes.shape, volume.shape, strict=True)]
        if [b - a for a, b in zip(low, high, strict=True)] != list(boxes.shape):
            box.zero_()
        if all(a < b for a, b in zip(low, high, strict=True)):
            place = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
            box[place].copy_(volume[tuple(slice(a, b) for a, b in zip(low, high, strict=True))])
    return voxels


def make_tiles(
    batch: TileBatch, volumes: Sequence[Tensor], out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Make the images and heatmaps of a batch, on the device of its tensors.

    Parameters
    ----------
    batch
        From `plan_batch`.
    volumes
        ``(D, H, W)`` float16 each; not used where the batch's boxes are cut.
    out
        Where to write them, or ``None``.

    Returns
    -------
    image, heatmap
        ``(B, 1, D, H, W)`` and ``(B, C, D, H, W)``, float32; heatmaps are NaN where nothing is labelled.
    """
    device = batch.gain.device
    if out is None:
        out = (
            torch.empty((batch.size, 1, *batch.tile_shape), device=device),
            torch.empty((batch.size, batch.class_num, *batch.tile_shape), device=device),
        )
    image, heatmap = out
    batch = batch.cut_from(volumes)
    tiles = _sample(batch)
    if batch.pastes is not None:
        paste(tiles, batch.pastes)
    if batch.wedges is not None:
        tiles[batch.wedges.items] = lose_wedge(tiles[batch.wedges.items], batch.wedges)
    torch.addcmul(batch.shift, tiles, batch.gain, out=image[:, 0])
    if batch.noise is not None:
        image[batch.noise.items, 0] += make_noise(batch.noise, batch.tile_shape)
    render_heatmaps(batch.gaussians, heatmap)
    if batch.unlabelled is not None:
        for item, mask in zip(batch.unlabelled.tiles, batch.unlabelled.masks, strict=True):
            heatmap[item].masked_fill_(mask, math.nan)
    return image, heatmap


def _sample(batch: TileBatch) -> Tensor:
    """Return the tiles ``(B, D, H, W)`` of a batch whose boxes are cut."""
    if len(batch.boxes) == 1:
        return resample(batch.boxes[0], batch.tile_shape)
    tiles = torch.empty((batch.size, *batch.tile_shape), device=batch.gain.device)
    for boxes in batch.boxes:
        tiles[boxes.items] = resample(boxes, batch.tile_shape)
    return tiles


def resample(boxes: Boxes, tile_shape: Shape3D) -> Tensor:
    """Return tiles ``(n, D, H, W)``, float32, by linear interpolation in boxes that are cut."""
    assert boxes.voxels is not None
    if boxes.to_box is None:
        return boxes.voxels.flip(boxes.flips).float() if boxes.flips else boxes.voxels.float()
    voxels = boxes.voxels.float()
    z, y, x = (_minus_one_to_one(side, voxels.device) for side in tile_shape)
    if boxes.is_tilted:
        by_z, by_y, by_x, middle = (column[:, None, None, None] for column in boxes.to_box.flip(1).unbind(-1))
        grid = by_z * z[:, None, None, None] + by_y * y[:, None, None] + by_x * x[:, None] + middle
        return F.grid_sample(voxels[:, None], grid, align_corners=True)[:, 0]
    # The pose never mixes z with the plane, so the slices are channels of one 2D resampling ...
    by_y, by_x, middle = (column[:, None, None] for column in boxes.to_box[:, 1:, 1:].flip(1).unbind(-1))
    turned = F.grid_sample(voxels, by_y * y[:, None, None] + by_x * x[:, None] + middle, align_corners=True)
    # ... and z is interpolated by a small matrix.
    source_z = (boxes.to_box[:, 0, 0, None] * z + boxes.to_box[:, 0, 3, None] + 1) * (max(boxes.shape[0] - 1, 1) / 2)
    weights = (1 - (source_z[..., None] - torch.arange(boxes.shape[0], device=voxels.device)).abs()).clamp_min(0)
    return (weights @ turned.flatten(2)).unflatten(2, tile_shape[1:])


def _minus_one_to_one(side: int, device: torch.device) -> Tensor:
    return (torch.arange(side, device=device) * 2 - (side - 1)) / max(side - 1, 1)


def paste(tiles: Tensor, pastes: Pastes) -> None:
    """Lay balls over tiles ``(B, D, H, W)``, in place; beyond their radius they fade out."""
    balls = resample(pastes.boxes, pastes.shape)
    squares = [
        ((torch.arange(side, device=tiles.device) + pastes.offsets[:, axis, None]) * pastes.steps[:, axis, None]) ** 2
        for axis, side in enumerate(pastes.shape)
    ]
    radii = (squares[0][:, :, None, None] + squares[1][:, None, :, None] + squares[2][:, None, None]).sqrt()
    weights = ((1 + SOFT_EDGE - radii) / SOFT_EDGE).clamp(0, 1)
    for item, start, ball, weight in zip(pastes.tiles, pastes.starts, balls, weights, strict=True):
        low = [max(first, 0) for first in start]
        high = [min(first + n, side) for first, n, side in zip(start, pastes.shape, tiles.shape[1:], strict=True)]
        under = tiles[item][tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        inside = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
        under.lerp_(ball[inside], weight[inside])


def render_heatmaps(gaussians: Gaussians, out: Tensor) -> Tensor:
    """Render the heatmaps of a batch into ``(B, C, D, H, W)``, as `czii25d.heatmap.render_heatmap` renders one.

    A Gaussian is the product of its profiles, so that all channels with one particle, or none, are one product. The few
    further particles of a channel are laid over it.
    """
    *_, depth, height, width = out.shape
    channels = out.view(-1, depth, height, width)
    profiles = []
    for axis, side in enumerate((depth, height, width)):
        distance = torch.arange(side, device=out.device) - gaussians.centers[:, axis, None]
        distance = distance / gaussians.sigma[:, axis, None]
        profiles.append(torch.exp(-0.5 * distance.square()) * (distance.abs() <= TRUNCATE))
    count = len(gaussians.channels)
    z, y, x = (
        torch.zeros(len(channels), profile.shape[1], device=out.device).index_copy_(
            0, gaussians.channels, profile[:count]
        )
        for profile in profiles
    )
    torch.mul(z[:, :, None, None], (y[:, :, None] * x[:, None])[:, None], out=channels)
    for number, (channel, place) in enumerate(gaussians.others, count):
        z, y, x = (profile[number, along] for profile, along in zip(profiles, place, strict=True))
        under = channels[channel][place]
        torch.maximum(under, z[:, None, None] * (y[:, None] * x), out=under)
    return out


def lose_wedge(tiles: Tensor, wedges: Filters) -> Tensor:
    """Filter tiles ``(n, D, H, W)`` as if tilt series of a smaller range had shown them.

    The mean and the standard deviation of each stay: a tomogram with a larger wedge is normalised like any other.
    """
    std, mean = torch.std_mean(tiles, dim=(1, 2, 3), keepdim=True)
    spectrum = torch.fft.rfftn(tiles - mean, dim=(1, 2, 3))
    frequencies = _frequencies(wedges, tiles.shape[1:])
    filtered = torch.fft.irfftn(spectrum * _measured(frequencies, wedges), tiles.shape[1:], dim=(1, 2, 3))
    return filtered * (std / filtered.std(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6)) + mean


def make_noise(noise: Noise, tile_shape: Shape3D) -> Tensor:
    """Return ``(n, D, H, W)`` noise that is a function of the keys: the same for any batch, on any device."""
    values = keyed_normal(noise.keys, tile_shape)
    if noise.filters is not None:
        frequencies = _frequencies(noise.filters, tile_shape)
        gain = _measured(frequencies, noise.filters)
        if noise.pink:
            length = frequencies.square().sum(-1).sqrt()
            gain = gain * length.clamp_min(noise.filters.softness / 4) ** (-noise.pink / 2)
        spectrum = torch.fft.rfftn(values, dim=(1, 2, 3)) * gain
        values = torch.fft.irfftn(spectrum, tile_shape, dim=(1, 2, 3))
        values = values / values.std(dim=(1, 2, 3), keepdim=True)
    return values * noise.std


def keyed_normal(keys: Tensor, tile_shape: Shape3D) -> Tensor:
    """Return a standard normal number for each voxel of each key, ``(n, D, H, W)`` for keys ``(n, 1, 1, 1)``.

    The voxel's number plus the key goes through a 32-bit integer hash (C. Wellons and T. Thielen's hash prospector,
    github.com/skeeto/hash-prospector: 16 21f0aaad 15 735a2d97 15), so that no generator has a state that a batch or a
    device would share. Products stay below 2^63.
    """
    voxel = torch.arange(math.prod(tile_shape), device=keys.device).reshape(tile_shape)
    bits = (voxel * 0x9E3779B1 + keys) & 0xFFFFFFFF
    bits = (bits ^ (bits >> 16)) * 0x21F0AAAD & 0xFFFFFFFF
    bits = (bits ^ (bits >> 15)) * 0x735A2D97 & 0xFFFFFFFF
    bits = (bits ^ (bits >> 15)) >> 9  # float32 holds so many, and a half
    return torch.erfinv((bits.float() + 0.5) / 2**22 - 1) * math.sqrt(2)


def _frequencies(filters: Filters, tile_shape: Sequence[int]) -> Tensor:
    """Return ``(n, D, H, W // 2 + 1, 3)``: z y x of the tilt series' frame for every frequency of a tile."""
    device = filters.tilt.device
    axes = [torch.fft.fftfreq(side, device=device) for side in tile_shape[:2]]
    axes.append(torch.fft.rfftfreq(tile_shape[2], device=device))
    z, y, x = (column[:, None, None, None] for column in filters.to_tilt_frame.unbind(-1))  # (n, 1, 1, 1, 3)
    return z * axes[0][:, None, None, None] + y * axes[1][:, None, None] + x * axes[2][:, None]


def _measured(frequencies: Tensor, filters: Filters) -> Tensor:
    """Return 1 for frequencies within the tilts, 0 in the missing wedge, between them a slope of one sample.

    The beam is along z, the tilt axis along y, as in `czii25d.phantom`.
    """
    tilt = filters.tilt[:, None, None, None]
    outside = frequencies[..., 0].abs() * torch.cos(tilt) - frequencies[..., 2].abs() * torch.sin(tilt)
    return (1 - outside / filters.softness).clamp(0, 1)
