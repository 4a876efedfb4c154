from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from czii25d.data.augment import Augmentation, Pose
from czii25d.errors import InputError

VOLUME = (30, 44, 60)
TILE = (12, 20, 28)


def crop_of(volume: np.ndarray):
    def crop(start, shape):
        assert all(a >= 0 and a + n <= side for a, n, side in zip(start, shape, volume.shape, strict=True))
        return volume[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))].copy()

    return crop


poses = st.builds(
    Pose,
    st.tuples(st.floats(10, 20), st.floats(12, 30), st.floats(15, 45)),
    st.floats(-math.pi, math.pi),
    st.floats(0.8, 1.2),
    st.booleans(),
    st.booleans(),
)


@given(poses, st.lists(st.tuples(*[st.floats(-50, 90)] * 3), min_size=1, max_size=4))
def test_to_tile_undoes_to_tomogram(pose: Pose, points: list[tuple[float, float, float]]) -> None:
    back = pose.to_tile(pose.to_tomogram(np.array(points), TILE), TILE)
    np.testing.assert_allclose(back, points, atol=1e-9)


@given(poses)
def test_resampling_a_linear_ramp_is_exact_at_every_pose(pose: Pose) -> None:
    z, y, x = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in VOLUME), indexing="ij")
    ramp = 3 * z - 2 * y + 0.5 * x
    tile = pose.resample(crop_of(ramp), VOLUME, TILE)
    index = np.stack(np.meshgrid(*(np.arange(n) for n in TILE), indexing="ij"), -1).reshape(-1, 3)
    source = pose.to_tomogram(index.astype(float), TILE)
    inside = ((source >= 0) & (source <= np.array(VOLUME) - 1)).all(1)
    expected = source @ [3, -2, 0.5]
    assert tile.shape == TILE and tile.dtype == np.float32
    assert inside.any()
    np.testing.assert_allclose(tile.reshape(-1)[inside], expected[inside], atol=2e-3)


def test_an_unturned_tile_is_the_crop_itself() -> None:
    volume = np.random.default_rng(0).standard_normal(VOLUME).astype(np.float32)
    pose = Pose((5 + 5.5, 7 + 9.5, 9 + 13.5))
    np.testing.assert_array_equal(pose.resample(crop_of(volume), VOLUME, TILE), volume[5:17, 7:27, 9:37])
    mirrored = Pose((5 + 5.5, 7 + 9.5, 9 + 13.5), flip_z=True, flip_x=True)
    expected = volume[5:17, 7:27, 9:37][::-1, :, ::-1]
    np.testing.assert_array_equal(mirrored.resample(crop_of(volume), VOLUME, TILE), expected)


def test_outside_the_volume_is_zero() -> None:
    tile = Pose((0.0, 0.0, 0.0)).resample(crop_of(np.ones(VOLUME, np.float32)), VOLUME, (11, 21, 27))
    assert tile[:5].sum() == 0 and tile[:, :10].sum() == 0 and tile[..., :13].sum() == 0
    assert (tile[5:, 10:, 13:] == 1).all()


def test_intensities_are_never_clipped() -> None:
    rng = np.random.default_rng(0)
    tile = rng.standard_normal((16, 64, 64)).astype(np.float32)
    always = Augmentation(contrast_prob=1.0)
    for _ in range(20):
        changed = always.change_intensity(tile, rng)
        slope, shift = np.polyfit(tile.ravel(), changed.ravel(), 1)
        np.testing.assert_allclose(changed, slope * tile + shift, atol=1e-4)
        assert 0.7 <= slope <= 1.3 and abs(shift) <= 0.3
        assert changed.min() < -2


def test_no_augmentation_changes_nothing() -> None:
    off = Augmentation(rotate_prob=0, flip_x_prob=0, contrast_prob=0)
    rng = np.random.default_rng(0)
    assert off.draw_pose((1.0, 2.0, 3.0), rng) == Pose((1.0, 2.0, 3.0))
    tile = np.ones((2, 3, 4), np.float32)
    assert off.change_intensity(tile, rng) is tile


def test_out_of_range_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"data\.augment\.rotate_prob"):
        Augmentation(rotate_prob=1.5)
    with pytest.raises(InputError, match=r"data\.augment\.scale_range"):
        Augmentation(scale_range=-0.1)
