from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from czii25d.errors import InputError
from czii25d.heatmap import TRUNCATE, default_sigma, quantize, render_heatmap

SHAPE = (24, 40, 56)
coordinate = st.floats(-12, 68)
centers_and_channels = st.lists(st.tuples(coordinate, coordinate, coordinate, st.integers(0, 2)), max_size=8)
sigmas = st.lists(st.tuples(*[st.floats(0.3, 8)] * 3), min_size=3, max_size=3)


def by_the_formula(centers: np.ndarray, channels: np.ndarray, sigma: np.ndarray, class_num: int) -> np.ndarray:
    heatmap = np.zeros((class_num, *SHAPE))
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    for center, channel in zip(centers, channels, strict=True):
        offset = (grid - center) / sigma[channel]
        value = np.exp(-(offset**2).sum(-1) / 2) * (np.abs(offset) <= TRUNCATE).all(-1)
        heatmap[channel] = np.maximum(heatmap[channel], value)
    return heatmap


def split(planted: list[tuple[float, float, float, int]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(planted, float).reshape(-1, 4)
    return table[:, :3], table[:, 3].astype(int)


@settings(deadline=None, max_examples=40)
@given(centers_and_channels, sigmas)
def test_it_is_the_formula(planted: list, sigma: list) -> None:
    centers, channels = split(planted)
    heatmap = render_heatmap(centers, channels, sigma, SHAPE, 3)
    assert heatmap.shape == (3, *SHAPE) and heatmap.dtype == np.float32
    # a voxel exactly at the rim may fall on either side of it
    np.testing.assert_allclose(
        heatmap, by_the_formula(centers, channels, np.array(sigma), 3), atol=2e-3 if planted else 0
    )


def test_value_at_a_voxel_to_the_last_digit() -> None:
    heatmap = render_heatmap([(11.25, 20.5, 30.0)], [1], [(1.0, 1.0, 1.0), (3.0, 4.0, 5.0)], SHAPE, 2)
    assert heatmap[0].max() == 0
    assert heatmap[1, 11, 20, 30] == pytest.approx(np.exp(-((0.25 / 3) ** 2 + (0.5 / 4) ** 2) / 2), rel=1e-6)
    assert heatmap[1, 12, 22, 27] == pytest.approx(
        np.exp(-((0.75 / 3) ** 2 + (1.5 / 4) ** 2 + (3 / 5) ** 2) / 2), rel=1e-6
    )
    assert np.unravel_index(heatmap[1].argmax(), SHAPE) in [(11, 20, 30), (11, 21, 30)]


@settings(deadline=None, max_examples=60)
@given(
    centers_and_channels,
    sigmas,
    st.tuples(st.integers(-5, 23), st.integers(-5, 39), st.integers(-5, 55)),
    st.tuples(st.integers(1, 16), st.integers(1, 24), st.integers(1, 24)),
    st.sampled_from([np.float32, np.uint8]),
)
def test_box_of_the_whole_is_the_box_alone(planted: list, sigma: list, start: tuple, shape: tuple, dtype: type) -> None:
    centers, channels = split(planted)
    pad = 6 + 16 + 24
    whole = render_heatmap(
        centers, channels, sigma, tuple(side + 2 * pad for side in SHAPE), 3, (-pad, -pad, -pad), dtype=dtype
    )
    box = render_heatmap(centers, channels, sigma, shape, 3, start, dtype=dtype)
    place = tuple(slice(a + pad, a + pad + side) for a, side in zip(start, shape, strict=True))
    np.testing.assert_array_equal(box, whole[(slice(None), *place)])


@settings(deadline=None, max_examples=30)
@given(centers_and_channels, sigmas)
def test_stored_is_the_rounded_one(planted: list, sigma: list) -> None:
    centers, channels = split(planted)
    stored = render_heatmap(centers, channels, sigma, SHAPE, 3, dtype=np.uint8)
    assert stored.dtype == np.uint8
    np.testing.assert_array_equal(stored, quantize(render_heatmap(centers, channels, sigma, SHAPE, 3)))


def test_mirrored_particles_give_mirrored_heatmaps() -> None:
    center, last = np.array([9.3, 17.8, 31.1]), np.array(SHAPE) - 1
    heatmap = render_heatmap([center], [0], 4.0, SHAPE, 1)
    mirrored = render_heatmap([last - center], [0], 4.0, SHAPE, 1)
    np.testing.assert_allclose(mirrored, heatmap[:, ::-1, ::-1, ::-1], atol=1e-6)


def test_larger_value_wins_and_classes_do_not_mix() -> None:
    pair = render_heatmap([(10, 20, 20), (10, 20, 26)], [0, 0], [4.0, 2.0], SHAPE, 2)
    assert pair[0, 10, 20, 20] == pair[0, 10, 20, 26] == 1
    assert pair[0, 10, 20, 23] == pytest.approx(np.exp(-((3 / 4) ** 2) / 2))
    assert pair[1].max() == 0


def test_out_is_drawn_over() -> None:
    out = np.full((1, *SHAPE), 0.5, np.float32)
    assert render_heatmap([(10, 20, 20)], [0], 2.0, SHAPE, 1, out=out) is out
    assert out.min() == 0.5 and out.max() == 1


def test_no_particles_no_heat() -> None:
    assert render_heatmap([], [], [1.0, 2.0], SHAPE, 2).max() == 0
    assert render_heatmap([(10, 20, 300)], [1], [1.0, 2.0], SHAPE, 2).max() == 0


def test_default_sigma_is_the_match_distance() -> None:
    assert default_sigma(60.0) == 30.0


@pytest.mark.parametrize("sigma", [0.0, -1.0, np.nan, np.inf, [1.0, 0.0]])
def test_sigma_is_above_zero(sigma: object) -> None:
    with pytest.raises(InputError, match="sigma"):
        render_heatmap([(1, 2, 3)], [0], sigma, SHAPE, 2)


@pytest.mark.parametrize("channel", [-1, 2])
def test_channel_is_one_of_the_classes(channel: int) -> None:
    with pytest.raises(InputError, match="channels"):
        render_heatmap([(1, 2, 3)], [channel], 2.0, SHAPE, 2)
