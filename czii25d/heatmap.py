"""Heatmaps: a Gaussian of height 1 at each particle's sub-voxel centre, one channel per class.

What 02 stores and what tests plant come from `render_heatmap`; training renders the same in batches
(`czii25d.data.tiles.render_heatmaps`, tested against it).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from czii25d.errors import InputError
from czii25d.geometry import Shape3D

SIGMA_PER_RADIUS = 0.5  # sigma is the distance within which the competition counts a pick as a hit
TRUNCATE = 22 / 6  # sigmas; the published patch reaches 22 voxels from its centre at sigma 6. What is cut is < 0.0013


def default_sigma(radius_angstrom: float) -> float:
    """Return the sigma in angstrom for a particle of that radius: its match distance."""
    return SIGMA_PER_RADIUS * radius_angstrom


def quantize(heatmap: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return ``round(255 p)``, for p in [0, 1]."""
    return np.rint(heatmap * np.float32(255)).astype(np.uint8)


def render_heatmap(
    centers_zyx_voxel: ArrayLike,
    channels: ArrayLike,
    sigma_voxel: ArrayLike,
    shape: Shape3D,
    class_num: int,
    origin_zyx: Shape3D = (0, 0, 0),
    out: NDArray | None = None,
    dtype: DTypeLike = np.float32,
) -> NDArray:
    """Render the heatmaps of a volume or of any box of it; a box of the whole is the same as the box alone.

    Where particles of a class overlap, the larger value counts.

    Parameters
    ----------
    centers_zyx_voxel
        ``(N, 3)`` fractional indices in the volume; they may lie outside the box, or the volume.
    channels
        ``(N,)`` integers in ``[0, class_num)``.
    sigma_voxel
        Per class ``(C,)``, per class and axis ``(C, 3)`` z y x, or one number for all.
    shape
        ``(D, H, W)`` of the box.
    origin_zyx
        Index of the box's first voxel in the volume.
    out
        ``(C, D, H, W)`` float32 or uint8 to draw into, over what is there; a new array of zeros if ``None``.
    dtype
        Of the new array: float32, in [0, 1], or uint8, ``round(255 p)``.

    Returns
    -------
    heatmap
        ``(C, D, H, W)``.

    Raises
    ------
    InputError
        If a sigma is not positive or a channel is out of range.
    """
    centers = np.asarray(centers_zyx_voxel, np.float64).reshape(-1, 3)
    channels = np.asarray(channels, np.intp).reshape(-1)
    sigma = np.asarray(sigma_voxel, np.float64)
    sigma = np.broadcast_to(sigma[:, None] if sigma.ndim == 1 else sigma, (class_num, 3))
    if not (sigma > 0).all() or not np.isfinite(sigma).all():
        raise InputError("heatmap sigma", "numbers above 0", str(sigma.tolist()), "raise it")
    if len(channels) and not 0 <= channels.min() <= channels.max() < class_num:
        raise InputError(
            "heatmap channels",
            f"0 to {class_num - 1}",
            f"{channels.min()} to {channels.max()}",
            "raise class_num",
        )
    heatmap = np.zeros((class_num, *shape), dtype) if out is None else out
    own_sigma = sigma[channels]  # (N, 3)
    reach = TRUNCATE * own_sigma
    # First and one-past-last voxel of each Gaussian in the volume, and of its part inside the box.
    first, stop = np.ceil(centers - reach).astype(int), np.floor(centers + reach).astype(int) + 1
    low, high = np.maximum(first, origin_zyx), np.minimum(stop, np.add(origin_zyx, shape))
    seen = np.flatnonzero((low < high).all(1))
    if not len(seen):
        return heatmap
    # All profiles at once, (n, 3, longest), each over its whole reach: no voxel's value depends on the box.
    voxels = first[seen][..., None] + np.arange((stop - first)[seen].max())
    profiles = np.exp(-0.5 * ((voxels - centers[seen][..., None]) / own_sigma[seen][..., None]) ** 2).astype(np.float32)
    in_profile = np.stack([low - first, high - first], -1)[seen].tolist()
    in_box = np.stack([low - origin_zyx, high - origin_zyx], -1)[seen].tolist()
    for channel, profile, ((z, ze), (y, ye), (x, xe)), ((bz, bze), (by, bye), (bx, bxe)) in zip(
        channels[seen].tolist(), profiles, in_profile, in_box, strict=True
    ):
        patch = (profile[0, z:ze, None] * profile[1, y:ye])[..., None] * profile[2, x:xe]
        place = heatmap[channel, bz:bze, by:bye, bx:bxe]
        np.maximum(place, patch if heatmap.dtype == np.float32 else quantize(patch), out=place)
    return heatmap
