"""From heatmaps back to points: local maxima with sub-voxel centres."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional

Peaks = tuple[NDArray[np.float64], NDArray[np.float32]]

ROUNDING = 1 + 1e-9  # a voxel at the very end of a radius lies within it, however the radius was computed
LEAST_REACH = 3**0.5  # voxels: the 26 about a peak always count
LARGEST_BLOCK = 3  # voxels a side; larger ones are no faster
DECIDED_AT_ONCE = 24  # planes; of fewer, most time goes into the planes about them
COMPARISONS_AT_ONCE = 2**16  # so few that they stay in the cache


def find_peaks(
    heatmap: Tensor | NDArray[np.floating],
    radius_voxel: ArrayLike,
    threshold: float | Sequence[float],
    refine: bool = True,
) -> list[Peaks]:
    """Find the local maxima of each class.

    A peak is a voxel of at least ``threshold`` whose value no other voxel within ``radius_voxel`` exceeds; of equals
    the first one counts. The rule is local, as max-pooling's, but in a ball (an ellipsoid for anisotropic voxels).

    It is fast because it goes from coarse to fine: one pass over memory leaves the maxima of blocks so small that each
    holds at most one peak; few reach the threshold and exceed the blocks about them; and only their highest voxels are
    compared with all voxels of the ball.

    Parameters
    ----------
    heatmap
        ``(C, D, H, W)``, on any device.
    radius_voxel
        ``(C,)``, or ``(C, 3)`` along z, y, x, or one number.
    threshold
        Smallest score kept, for all classes or each.
    refine
        Return sub-voxel centres (see `refine_centers`) rather than indices.

    Returns
    -------
    peaks
        Of each class: centres ``(N, 3)`` z y x, float64, and scores ``(N,)`` float32, best first.
    """
    return find_peaks_in_slabs([torch.as_tensor(heatmap)], radius_voxel, threshold, refine)


def find_peaks_in_slabs(
    slabs: Iterable[Tensor],
    radius_voxel: ArrayLike,
    threshold: float | Sequence[float],
    refine: bool = True,
) -> list[Peaks]:
    """Find the peaks of heatmaps that come slab by slab: those of `find_peaks` on the whole, in bounded memory.

    A peak is decided when all planes within its reach are there; those no undecided one needs are let go.

    Parameters
    ----------
    slabs
        ``(C, d, H, W)`` each, from the top to the bottom, at least one.
    radius_voxel, threshold, refine
        As of `find_peaks`.
    """
    radii, thresholds = np.empty((0, 3)), np.empty(0)
    kept: list[Tensor] = []  # the slabs from plane `first` on
    parts: list[list[Peaks]] = []
    first = end = decided = halo = 0

    def decide(upto: int) -> None:
        parts.append([])
        for channel, radius in enumerate(radii):
            low = max(first, decided - _halo(radius))
            volume = _planes_between(kept, channel, low - first, min(end, upto + _halo(radius)) - first)
            centers, scores = _find_in_class(
                volume, radius, float(thresholds[channel]), refine, decided - low, upto - low
            )
            parts[-1].append((centers + np.array([low, 0, 0]), scores))

    threads = torch.get_num_threads()
    for slab in slabs:
        if not kept:
            radii, thresholds = _per_class(len(slab), radius_voxel, threshold)
            halo = max(_halo(radius) for radius in radii)
        kept.append(slab)
        end += slab.shape[1]
        if end - halo - decided >= DECIDED_AT_ONCE:
            # The pieces are small: sharing them gains little on an idle machine and costs a hundredfold on a busy one.
            torch.set_num_threads(1)
            decide(end - halo)
            torch.set_num_threads(threads)
            decided = end - halo
            while first + kept[0].shape[1] <= decided - halo:
                first += kept.pop(0).shape[1]
    if not kept:
        raise ValueError("no slab to find peaks in")
    torch.set_num_threads(1)
    decide(end)
    torch.set_num_threads(threads)
    return [_best_first(of_class) for of_class in zip(*parts, strict=True)]


def _per_class(
    class_num: int, radius_voxel: ArrayLike, threshold: float | Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return ``(C, 3)`` radii and ``(C,)`` thresholds."""
    radii = np.asarray(radius_voxel, np.float64)
    radii = np.broadcast_to(radii[:, None] if radii.ndim == 1 else radii, (class_num, 3))
    return radii, np.broadcast_to(np.asarray(threshold, np.float64), (class_num,))


def _halo(radius: NDArray[np.float64]) -> int:
    """Return how many planes beyond its own a peak depends on."""
    return max(math.floor(max(radius[0], LEAST_REACH) * ROUNDING), 2 * _refinement_step(radius[0]))


def _planes_between(slabs: Sequence[Tensor], channel: int, start: int, stop: int) -> Tensor:
    """Return planes of one class, ``(stop - start, H, W)``, from slabs that follow each other."""
    pieces, z = [], 0
    for slab in slabs:
        pieces.append(slab[channel, max(0, start - z) : max(0, stop - z)])
        z += slab.shape[1]
    volume = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return volume.contiguous() if volume.is_floating_point() else volume.float()


def _best_first(parts: Sequence[Peaks]) -> Peaks:
    if len(parts) == 1:
        return parts[0]
    centers, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(-scores, kind="stable")
    return centers[order], scores[order]


def _find_in_class(
    volume: Tensor, radius: NDArray[np.float64], threshold: float, refine: bool, start: int, stop: int
) -> Peaks:
    """Find the peaks whose highest voxels lie in the planes ``start`` to ``stop``."""
    reach = np.maximum(radius, LEAST_REACH)
    side = np.minimum(reach // 3**0.5 + 1, LARGEST_BLOCK).astype(int)  # a block's diagonal is no longer than the reach
    candidates = _block_peaks(volume, side, reach, threshold)
    plane = candidates // (volume.shape[1] * volume.shape[2])
    candidates = candidates[(plane >= start) & (plane < stop)]
    places = _unravel(_keep_winners(volume, candidates, reach), volume.shape)
    scores = volume[places].float()
    order = torch.argsort(scores, descending=True, stable=True)
    centers, scores = torch.stack(places, 1)[order], scores[order]
    refined = refine_centers(volume, centers, radius) if refine else centers.double()
    return refined.cpu().numpy(), scores.cpu().numpy()


def _block_peaks(volume: Tensor, side: NDArray[np.int_], reach: NDArray[np.float64], threshold: float) -> Tensor:
    """Return the flat indices of the highest voxel of each block that can hold a peak."""
    tops = _block_tops(volume, side)
    near = _offsets_within(reach, side, side - 1)  # blocks that lie wholly within reach of any voxel of the block
    margin = np.abs(near).max(0, initial=0)
    padded = functional.pad(tops, [int(m) for m in margin[::-1].repeat(2)], value=-torch.inf)
    flat = padded.reshape(-1)
    blocks = _true_indices(flat >= threshold)
    for step in _flat_steps(near, padded.shape):
        blocks = blocks[flat[blocks] >= flat[blocks + step]]
    corners = torch.stack(_unravel(blocks, padded.shape), 1) - torch.from_numpy(margin).to(volume.device)
    corners *= torch.from_numpy(side).to(volume.device)
    within = torch.cartesian_prod(*(torch.arange(n, device=volume.device) for n in side.tolist()))
    last = torch.tensor(volume.shape, device=volume.device) - 1
    highest = []
    for part in corners.split(COMPARISONS_AT_ONCE // len(within)):
        z, y, x = torch.minimum(part[:, None] + within, last).unbind(2)  # (n, block)
        best = volume[z, y, x].argmax(1, keepdim=True)  # the first of equals, in memory order
        highest.append(((z * volume.shape[1] + y) * volume.shape[2] + x).gather(1, best)[:, 0])
    return torch.cat(highest)


def _block_tops(volume: Tensor, side: NDArray[np.int_]) -> Tensor:
    """Return the maxima of blocks, ``(ceil(D / side), ...)`` float32; a slab at a time, to stay in the cache."""
    slabs = []
    for slab in volume.split(int(side[0])):
        for axis in range(3):
            slab = _tops_along(slab, axis, int(side[axis]))
        slabs.append(slab)
    return torch.cat(slabs).float()


def _tops_along(volume: Tensor, axis: int, side: int) -> Tensor:
    whole, rest = divmod(volume.shape[axis], side)
    parts = volume.narrow(axis, 0, whole * side).unflatten(axis, (whole, side)).unbind(axis + 1)
    tops = functools.reduce(torch.maximum, parts)  # on a CPU several times faster than amax
    if not rest:
        return tops
    return torch.cat([tops, volume.narrow(axis, whole * side, rest).amax(axis, keepdim=True)], axis)


def _keep_winners(volume: Tensor, candidates: Tensor, reach: NDArray[np.float64]) -> Tensor:
    """Return the candidates (flat indices) that no voxel of the ball beats, in memory order."""
    flat, ball = volume.reshape(-1), _offsets_within(reach)
    margin = np.abs(ball).max(0)
    inside = torch.ones(len(candidates), dtype=torch.bool, device=volume.device)
    for place, size, rim in zip(_unravel(candidates, volume.shape), volume.shape, margin.tolist(), strict=True):
        inside &= (place >= rim) & (place < size - rim)

    def straight(part: Tensor, offsets: NDArray[np.int64]) -> Tensor:
        steps = torch.tensor(_flat_steps(offsets, volume.shape), device=part.device)
        others = part[:, None] + steps
        return flat.index_select(0, others.reshape(-1)).view_as(others)

    def bounded(part: Tensor, offsets: NDArray[np.int64]) -> Tensor:
        others = torch.stack(_unravel(part, volume.shape), 1)[:, None] + torch.from_numpy(offsets).to(part.device)
        outside = ((others < 0) | (others >= torch.tensor(volume.shape, device=part.device))).any(2)
        return volume[tuple(others.masked_fill_(outside[..., None], 0).unbind(2))].masked_fill_(outside, -torch.inf)

    deep = _keep_unbeaten(volume, candidates[inside], ball, straight)
    shallow = _keep_unbeaten(volume, candidates[~inside], ball, bounded)
    return torch.cat([deep, shallow]).sort().values


def _keep_unbeaten(
    volume: Tensor,
    candidates: Tensor,
    ball: NDArray[np.int64],
    rivals: Callable[[Tensor, NDArray[np.int64]], Tensor],
) -> Tensor:
    """Compare candidates with their ``rivals``, ``(n, k)`` values at ``k`` of the ball's offsets."""
    flat = volume.reshape(-1)
    first = 0
    while first < len(ball) and len(candidates):
        # The nearest few first: most candidates lose against one of them.
        group = np.unique(ball[first : 2 * first + 6], axis=0)  # in memory order, which is faster
        first += len(group)
        later = np.array([tuple(offset) > (0, 0, 0) for offset in group.tolist()])
        # The first of equals wins: an earlier voxel beats by being as high, a later one only by being higher.
        for offsets, beats in ((group[later], torch.gt), (group[~later], torch.ge)):
            if not len(offsets):
                continue
            survivors = []
            for part in candidates.split(max(1, COMPARISONS_AT_ONCE // len(offsets))):
                survivors.append(part[~beats(rivals(part, offsets).amax(1), flat[part])])
            candidates = torch.cat(survivors)
    return candidates


def _offsets_within(reach: NDArray[np.float64], step: ArrayLike = 1, margin: ArrayLike = 0) -> NDArray[np.int64]:
    """Return the ``(K, 3)`` non-zero offsets, in steps, no longer than ``reach`` with the margin; nearest first."""
    limit = (reach * ROUNDING // np.asarray(step)).astype(int)
    grid = np.stack(np.meshgrid(*(np.arange(-n, n + 1) for n in limit), indexing="ij"), -1).reshape(-1, 3)
    length = np.square((np.abs(grid) * step + margin) / reach).sum(1)
    length[(grid == 0).all(1)] = np.inf
    order = np.argsort(length, kind="stable")
    return grid[order][: int((length <= ROUNDING).sum())]


def _flat_steps(offsets: NDArray[np.int64], shape: Sequence[int]) -> list[int]:
    _, height, width = shape
    return [int((z * height + y) * width + x) for z, y, x in offsets]


def _unravel(flat: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    _, height, width = shape
    return flat // (height * width), flat // width % height, flat % width


def _true_indices(mask: Tensor) -> Tensor:
    if mask.device.type == "cpu":  # NumPy finds the few True among many False several times faster
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero()[:, 0]


def refine_centers(volume: Tensor, centers: Tensor, radius: NDArray[np.float64]) -> Tensor:
    """Move maxima to where a parabola through the logarithm of three points peaks, axis by axis.

    Exact for a Gaussian. The three points are about a third of the radius apart, and each is the sum of nine voxels
    across the axis, so that noise and quantisation hardly move the vertex; next to a face all lie on its inner side.

    Parameters
    ----------
    volume
        ``(D, H, W)``.
    centers
        ``(N, 3)`` indices z y x.
    radius
        ``(3,)`` voxels.

    Returns
    -------
    centers
        ``(N, 3)`` float64, at most a voxel from their indices along each axis.
    """
    sizes = zip(radius.tolist(), volume.shape, strict=True)
    steps = [min(_refinement_step(r), (size - 1) // 2) for r, size in sizes]
    axes = zip(centers.unbind(1), steps, volume.shape, strict=True)
    middle = torch.stack([place.clamp(step, size - 1 - step) for place, step, size in axes], 1)
    thrice = [torch.tensor([-step, 0, step], device=volume.device) for step in steps]
    cube = (middle[:, None] + torch.cartesian_prod(*thrice)).unbind(2)  # 3 x (N, 27)
    values = volume[cube].double()
    positive = (values > 0).all(1, keepdim=True)
    values = torch.where(positive, values.clamp_min(1e-30).log(), values).unflatten(1, (3, 3, 3))
    refined = centers.double()
    for axis, step in enumerate(steps):
        low, mid, high = values.sum([other for other in (1, 2, 3) if other != axis + 1]).unbind(1)
        curvature = low - 2 * mid + high
        vertex = middle[:, axis] + 0.5 * step * (low - high) / curvature
        moved = torch.where(curvature < 0, vertex - centers[:, axis], 0.0)
        refined[:, axis] += moved.clamp(-1, 1)
    return refined


def _refinement_step(radius: float) -> int:
    return max(1, round(radius / 3))
