"""From heatmaps back to points: local maxima with sub-voxel centres."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Peaks = tuple[NDArray[np.float64], NDArray[np.float32]]

OFFSETS_AT_ONCE = 64  # neighbours compared before the losers are dropped
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
    flat = volume.reshape(-1)
    candidates = _indices_of_at_least(flat, threshold)
    for offsets in _neighbours(radius):
        candidates = _keep_winners(volume, candidates, offsets)
    scores = flat[candidates]
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


def _neighbours(radius: NDArray[np.float64]) -> list[NDArray[np.int64]]:
    """Return the offsets to the voxels of the ball in groups, nearest first, the 26 around the centre always included."""
    reach = np.maximum(np.floor(radius).astype(int), 1)
    grid = np.stack(np.meshgrid(*(np.arange(-side, side + 1) for side in reach), indexing="ij"), -1).reshape(
        -1, 3
    )
    distance = np.square(grid / np.maximum(radius, 1e-6)).sum(1)
    near = np.abs(grid).max(1)
    grid = grid[((distance <= 1) | (near <= 1)) & (near > 0)]
    grid = grid[np.argsort(np.square(grid).sum(1), kind="stable")]
    singles = [grid[i : i + 1] for i in range(6)]  # each of the first six halves what is left
    rest = [grid[6:26]] + [
        grid[start : start + OFFSETS_AT_ONCE] for start in range(26, len(grid), OFFSETS_AT_ONCE)
    ]
    return singles + [group for group in rest if len(group)]


def _keep_winners(volume: Tensor, candidates: Tensor, offsets: NDArray[np.int64]) -> Tensor:
    """Return the candidates (flat indices) that no voxel at these offsets beats."""
    if not len(candidates):
        return candidates
    _, height, width = volume.shape
    flat = volume.reshape(-1)
    value = flat[candidates]
    z, rest = (
        torch.div(candidates, height * width, rounding_mode="floor"),
        candidates % (height * width),
    )
    y, x = torch.div(rest, width, rounding_mode="floor"), rest % width
    wins = torch.ones(len(candidates), dtype=torch.bool, device=flat.device)
    for dz, dy, dx in offsets.tolist():
        step = (dz * height + dy) * width + dx
        inside = _shift_stays_inside(z, dz, volume.shape[0]) & _shift_stays_inside(y, dy, height)
        inside &= _shift_stays_inside(x, dx, width)
        other = flat[(candidates + step).clamp_(0, len(flat) - 1)]
        # The first of equals wins: a voxel earlier in memory beats by being as high, a later one only by being higher.
        beaten = other >= value if step < 0 else other > value
        wins &= ~(beaten & inside)
    return candidates[wins]


def _shift_stays_inside(index: Tensor, shift: int, size: int) -> Tensor:
    if shift == 0:
        return torch.ones_like(index, dtype=torch.bool)
    return index >= -shift if shift < 0 else index < size - shift


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
        ``(N, 3)`` float64, each at most one step from its index.
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
