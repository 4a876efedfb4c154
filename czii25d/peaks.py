"""From heatmaps back to points: local maxima with sub-voxel centres."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Peaks = tuple[NDArray[np.float64], NDArray[np.float32]]

COMPARISONS_AT_ONCE = 2**20  # of candidates with neighbours, before the losers are dropped
SLAB_VOXELS = 2**24  # voxels compared with the threshold at once


def find_peaks(
    heatmap: Tensor | NDArray[np.floating],
    radius_voxel: ArrayLike,
    threshold: float | Sequence[float],
    refine: bool = True,
) -> list[Peaks]:
    """Find the local maxima of each class.

    A peak is a voxel of at least ``threshold`` whose value no other voxel within ``radius_voxel`` exceeds; of equals the
    first one counts. The rule is local, as that of max-pooling, but in a ball (an ellipsoid for anisotropic voxels).

    It is fast because it is sparse: few voxels reach the threshold, most of those lose against one of their first
    neighbours, and only what is left is compared with the whole ball.

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
    heatmap = torch.as_tensor(heatmap)
    class_num = len(heatmap)
    radii = np.asarray(radius_voxel, np.float64)
    radii = np.broadcast_to(radii[:, None] if radii.ndim == 1 else radii, (class_num, 3))
    thresholds = np.broadcast_to(np.asarray(threshold, np.float64), (class_num,))
    return [
        _find_in_class(plane.contiguous(), radius, float(least), refine)
        for plane, radius, least in zip(heatmap, radii, thresholds, strict=True)
    ]


def _find_in_class(volume: Tensor, radius: NDArray[np.float64], threshold: float, refine: bool) -> Peaks:
    offsets = _ball(radius)
    candidates = _indices_of_at_least(volume.reshape(-1), threshold)
    candidates = _keep_winners_in_row(volume, candidates)
    candidates = _keep_winners(volume, candidates, offsets)
    scores = volume.reshape(-1)[candidates]
    order = torch.argsort(scores, descending=True, stable=True)
    candidates, scores = candidates[order], scores[order]
    centers = torch.stack(torch.unravel_index(candidates, volume.shape), 1)
    refined = refine_centers(volume, centers, radius) if refine else centers.double()
    return refined.cpu().numpy(), scores.float().cpu().numpy()


def _indices_of_at_least(flat: Tensor, threshold: float) -> Tensor:
    """Return the indices of values of at least ``threshold``, slab by slab to bound memory."""
    parts = []
    for start in range(0, len(flat), SLAB_VOXELS):
        mask = flat[start : start + SLAB_VOXELS] >= threshold
        if mask.device.type == "cpu":  # NumPy finds the few True among many False several times faster
            found = torch.from_numpy(np.flatnonzero(mask.numpy()))
        else:
            found = mask.nonzero()[:, 0]
        parts.append(found + start)
    return torch.cat(parts)


def _keep_winners_in_row(volume: Tensor, candidates: Tensor) -> Tensor:
    """Return the candidates that exceed both neighbours along x: of a smooth blob, one voxel in each row.

    Needs no coordinates, as candidates come in memory order: a neighbour matters if it is a candidate too, since
    nothing below the threshold beats one.
    """
    if len(candidates) < 2:
        return candidates
    value = volume.reshape(-1)[candidates]
    # Neighbours in memory, and not the end of one row with the start of the next.
    adjacent = (candidates[1:] - candidates[:-1] == 1) & (candidates[1:] % volume.shape[2] != 0)
    rises = value[1:] > value[:-1]
    wins = torch.ones(len(candidates), dtype=torch.bool, device=candidates.device)
    wins[1:] &= ~adjacent | rises
    wins[:-1] &= ~(adjacent & rises)
    return candidates[wins]


def _ball(radius: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the ``(K, 3)`` offsets to the voxels of the ball, nearest first; the 26 about the centre are always in."""
    reach = np.maximum(np.floor(radius).astype(int), 1)
    grid = np.stack(np.meshgrid(*(np.arange(-side, side + 1) for side in reach), indexing="ij"), -1).reshape(-1, 3)
    in_ball = np.square(grid / np.maximum(radius, 1e-6)).sum(1) <= 1
    near = np.abs(grid).max(1)
    grid = grid[(in_ball | (near == 1)) & (near > 0)]
    return grid[np.argsort(np.square(grid).sum(1), kind="stable")]


def _keep_winners(volume: Tensor, candidates: Tensor, offsets: NDArray[np.int64]) -> Tensor:
    """Return the candidates (flat indices) that no voxel at these offsets beats, in the order they come."""
    depth, height, width = volume.shape
    flat = volume.reshape(-1)
    sides = torch.tensor(volume.shape, device=flat.device)
    first = 0
    while first < len(offsets) and len(candidates):
        # Few offsets at a time while there are many candidates: most of them lose early.
        count = max(1, min(len(offsets) - first, COMPARISONS_AT_ONCE // len(candidates)))
        group = torch.from_numpy(offsets[first : first + count]).to(flat.device)
        first += count
        survivors = []
        for part in candidates.split(COMPARISONS_AT_ONCE):
            place = torch.stack(torch.unravel_index(part, volume.shape), 1)  # (n, 3)
            other = place[:, None] + group  # (n, k, 3)
            inside = ((other >= 0) & (other < sides)).all(2)
            step = (group[:, 0] * height + group[:, 1]) * width + group[:, 2]
            rival = flat[(part[:, None] + step).clamp_(0, len(flat) - 1)]
            value = flat[part][:, None]
            # The first of equals wins: an earlier voxel beats by being as high, a later one only by being higher.
            beats = inside & ((rival > value) | ((rival == value) & (step < 0)))
            survivors.append(part[~beats.any(1)])
        candidates = torch.cat(survivors)
    return candidates


def refine_centers(volume: Tensor, centers: Tensor, radius: NDArray[np.float64]) -> Tensor:
    """Move maxima to where a parabola through the logarithm of three voxels peaks, axis by axis.

    Exact for a Gaussian. The three voxels are about a third of the radius apart, which keeps noise and quantisation
    from moving the vertex; next to a face they lie on its inner side.

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
        ``(N, 3)`` float64, at most a voxel from their indices.
    """
    refined = centers.double()
    for axis, size in enumerate(volume.shape):
        step = max(1, round(float(radius[axis]) / 3))
        if size < 2 * step + 1:
            continue
        middle = centers.clone()
        middle[:, axis] = centers[:, axis].clamp(step, size - 1 - step)
        triple = []
        for shift in (-step, 0, step):
            at = middle.clone()
            at[:, axis] += shift
            triple.append(volume[at[:, 0], at[:, 1], at[:, 2]].double())
        low, mid, high = triple
        positive = (low > 0) & (mid > 0) & (high > 0)
        low, mid, high = (torch.where(positive, value.clamp_min(1e-30).log(), value) for value in triple)
        curvature = low - 2 * mid + high
        vertex = 0.5 * step * (low - high) / torch.where(curvature < 0, curvature, -1.0)
        vertex = torch.where(curvature < 0, vertex, 0.0)
        moved = middle[:, axis] + vertex
        refined[:, axis] = torch.maximum(torch.minimum(moved, centers[:, axis] + 1.0), centers[:, axis] - 1.0)
    return refined
