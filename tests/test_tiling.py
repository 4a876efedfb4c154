"""Tiles cover a volume, and their weights add up to one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from czii25d.errors import InputError
from czii25d.tiling import Blender, TileGrid, blend_window, reflect_indices, tile_starts


@given(size=st.integers(1, 200), tile=st.integers(1, 64), data=st.data())
def test_tiles_cover_an_axis_flush_with_its_ends(size: int, tile: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, tile))
    starts = tile_starts(size, tile, stride)
    assert starts[0] == 0 and starts[-1] == max(0, size - tile)
    assert all(1 <= later - earlier <= stride for earlier, later in itertools.pairwise(starts))
    assert len(starts) == 1 + -(-max(0, size - tile) // stride)  # and no more than that takes


def test_a_grid_lists_its_tiles_z_slowest() -> None:
    grid = TileGrid((10, 7, 5), (6, 4, 5), (4, 3, 5))
    assert grid.starts == [(0, 0, 0), (0, 3, 0), (4, 0, 0), (4, 3, 0)]
    assert len(grid) == 4


def test_the_published_grid_has_1782_tiles() -> None:
    assert len(TileGrid((184, 640, 640), (16, 128, 128), (8, 64, 64))) == 1782


@pytest.mark.parametrize("stride", [(0, 4, 4), (7, 4, 4), (6, 4, -1)])
def test_strides_that_leave_gaps_are_refused(stride: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match=r"stride.*\(6, 4, 4\)"):
        TileGrid((10, 7, 5), (6, 4, 4), stride)


def test_an_unknown_window_is_refused() -> None:
    with pytest.raises(InputError, match="pyramid, gaussian, published"):
        blend_window((4, 4, 4), "hann")  # type: ignore[arg-type]


@pytest.mark.parametrize("window", ["pyramid", "gaussian"])
@given(shape=st.tuples(*[st.integers(1, 33)] * 3))
def test_windows_are_symmetric_and_never_zero(window, shape: tuple[int, int, int]) -> None:
    along_z, plane = blend_window(shape, window)
    weights = np.multiply.outer(along_z, plane)
    assert weights.shape == shape and weights.min() > 0 and weights.max() <= 1
    for axis in range(3):
        np.testing.assert_allclose(weights, np.flip(weights, axis), rtol=1e-5)


@pytest.mark.parametrize("window", ["pyramid", "gaussian"])
@given(data=st.data())
def test_normalised_weights_add_up_to_one(window, data: st.DataObject) -> None:
    tile = data.draw(st.tuples(*[st.integers(1, 9)] * 3))
    shape = tuple(data.draw(st.integers(side, 24)) for side in tile)
    stride = tuple(data.draw(st.integers(1, side)) for side in tile)
    grid = TileGrid(shape, tile, stride)  # type: ignore[arg-type]
    blender, total = Blender(grid, window), np.zeros(shape)
    for start in grid.starts:
        total[tuple(slice(s, s + side) for s, side in zip(start, tile, strict=True))] += blender.window
    np.testing.assert_allclose(total * blender.norm(0, shape[0]), 1, atol=2e-6)


def published_sum(grid: TileGrid) -> np.ndarray:
    """Add the published window up over a grid: what is left of each voxel is the sum, or 1 where it is more."""
    along_z, plane = blend_window(grid.tile_shape, "published")
    (depth, *_), (tile_d, tile_h, tile_w) = grid.volume_shape, grid.tile_shape
    z_sum, plane_sum = np.zeros(depth), np.zeros(grid.volume_shape[1:])
    for z in grid.axis_starts[0]:
        z_sum[z : z + tile_d] += along_z
    for y in grid.axis_starts[1]:
        for x in grid.axis_starts[2]:
            plane_sum[y : y + tile_h, x : x + tile_w] += plane
    return np.multiply.outer(z_sum, plane_sum)


def test_the_published_window_fades_the_faces_as_it_did() -> None:
    """Figures from a run of the 4th place's own code, of the 630 voxels a side that are not its padding."""
    left = published_sum(TileGrid((184, 640, 640), (16, 128, 128), (8, 64, 64)))[:, :630, :630]
    assert np.mean(left < 0.999) == pytest.approx(0.308, abs=5e-3)  # many lie at 1, where rounding decides
    assert np.mean(left < 0.5) == pytest.approx(0.139, abs=5e-4)
    assert np.mean(left == 0) == pytest.approx(0.014, abs=5e-4)


def test_the_published_blend_divides_by_no_less_than_one() -> None:
    grid = TileGrid((24, 40, 56), (8, 16, 20), (4, 8, 10))
    blender, total = Blender(grid, "published"), np.zeros(grid.volume_shape)
    for z, y, x in grid.starts:
        total[z : z + 8, y : y + 16, x : x + 20] += blender.window
    total *= blender.norm(0, 24)
    np.testing.assert_allclose(total, np.minimum(published_sum(grid), 1), atol=1e-6)
    assert total[0].max() == 0 and total.max() == pytest.approx(1)


@given(size=st.integers(1, 12), before=st.integers(0, 30), after=st.integers(0, 30))
def test_reflected_indices_are_those_of_numpy(size: int, before: int, after: int) -> None:
    expected = np.pad(np.arange(size), (before, after), mode="reflect")
    np.testing.assert_array_equal(reflect_indices(-before, size + after, size), expected)
