from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from czii25d.data.augment import Augmentation, Intensity, Pose
from czii25d.errors import InputError

TILE = (12, 20, 28)
SPACING = (13.0, 11.0, 7.0)
MANY = 300

poses = st.builds(
    Pose,
    st.tuples(st.floats(10, 20), st.floats(12, 30), st.floats(15, 45)),
    st.floats(-math.pi, math.pi),
    st.tuples(*[st.floats(0.8, 1.2)] * 3),
    st.booleans(),
    st.booleans(),
    st.floats(0, 0.5),
    st.floats(-math.pi, math.pi),
    st.sampled_from([(1.0, 1.0, 1.0), SPACING]),
)


@given(poses, st.lists(st.tuples(*[st.floats(-50, 90)] * 3), min_size=1, max_size=4))
def test_to_tile_undoes_to_tomogram(pose: Pose, points: list[tuple[float, float, float]]) -> None:
    back = pose.to_tile(pose.to_tomogram(np.array(points), TILE), TILE)
    np.testing.assert_allclose(back, points, atol=1e-9)


@given(poses)
def test_a_turn_keeps_lengths_in_angstrom_but_for_the_scales(pose: Pose) -> None:
    steps = pose.matrix * np.array(pose.voxel_spacing)[:, None]  # columns: a step along the tile's axes, in angstrom
    expected = np.diag((np.array(pose.voxel_spacing) * pose.scale) ** 2)
    np.testing.assert_allclose(steps.T @ steps, expected, atol=1e-9)
    np.testing.assert_allclose(np.sign(np.linalg.det(steps)), (-1) ** (pose.flip_z + pose.flip_x))


def test_angles_are_those_they_are_called() -> None:
    turned = Pose((0.0, 0.0, 0.0), angle=math.pi / 2).matrix
    np.testing.assert_allclose(turned @ [0, 0, 1], [0, 1, 0], atol=1e-12)  # x to y: y goes towards -x
    tilted = Pose((0.0, 0.0, 0.0), tilt=math.radians(30)).matrix  # about y
    assert tilted[0, 0] == pytest.approx(math.cos(math.radians(30))) and tilted[1].tolist() == [0, 1, 0]
    about_x = Pose((0.0, 0.0, 0.0), tilt=math.radians(30), tilt_axis=math.pi / 2).matrix
    np.testing.assert_allclose(about_x @ [0, 0, 1], [0, 0, 1], atol=1e-12)


@given(poses)
def test_the_box_holds_every_voxel_of_the_tile(pose: Pose) -> None:
    index = np.stack(np.meshgrid(*(np.arange(n) for n in TILE), indexing="ij"), -1).reshape(-1, 3).astype(float)
    source = pose.to_tomogram(index, TILE)
    low, high = pose.box(TILE)
    assert (source >= low - 1e-5).all() and (source <= high - 1 + 1e-5).all()
    assert (source.min(0) - low < 1 + 1e-5).all() and (high - 1 - source.max(0) < 1 + 1e-5).all()


def test_frequencies_turn_with_the_tile() -> None:
    """A wave of the tomogram, sampled in a tile, has there the frequency that maps back to the wave's."""
    wave = np.array([0.01, -0.02, 0.03])  # cycles per angstrom
    pose = Pose((5.0, 6.0, 7.0), 0.7, (1.1, 0.9, 1.0), False, True, 0.3, 1.0, SPACING)
    in_tile = (wave * SPACING) @ pose.matrix  # cycles per voxel of the tile: phase = wave · spacing · (M t + c)
    np.testing.assert_allclose(pose.to_tilt_frame() @ in_tile, wave, atol=1e-12)
    axis_along_x = pose.to_tilt_frame(math.pi / 2) @ in_tile
    np.testing.assert_allclose(np.abs(axis_along_x), np.abs(wave[[0, 2, 1]]), atol=1e-12)


def test_what_is_drawn_stays_in_its_range() -> None:
    augmentation = Augmentation(
        rotate_prob=1.0,
        tilt_range=10,
        stretch_range=0.2,
        contrast_prob=1.0,
        noise_prob=1.0,
        wedge_prob=1.0,
    )
    rng = np.random.default_rng(0)
    drawn = [augmentation.draw_pose((1.0, 2.0, 3.0), rng) for _ in range(MANY)]
    tilts, scales = np.degrees([pose.tilt for pose in drawn]), np.array([pose.scale for pose in drawn])
    assert 0 <= tilts.min() < 1 and 9 < tilts.max() <= 10
    assert scales.min() >= 0.9 * 0.8 and scales.max() <= 1.1 * 1.2 and np.std(scales[:, 0] / scales[:, 2]) > 0.05
    changes = [augmentation.draw_intensity(rng) for _ in range(MANY)]
    for name, low, high in (("gain", 0.7, 1.3), ("shift", -0.3, 0.3), ("noise_std", 0, 0.3), ("wedge_tilt", 40, 60)):
        values = [getattr(change, name) for change in changes]
        margin = 0.05 * (high - low)
        assert low <= min(values) < low + margin and high - margin < max(values) <= high, name
    assert len({change.noise_key for change in changes}) == MANY


def test_no_augmentation_changes_nothing() -> None:
    off = Augmentation(rotate_prob=0, flip_x_prob=0, contrast_prob=0)
    rng = np.random.default_rng(0)
    assert off.draw_pose((1.0, 2.0, 3.0), rng) == Pose((1.0, 2.0, 3.0))
    assert off.draw_intensity(rng) == Intensity()


@pytest.mark.parametrize("name", [field.name for field in fields(Augmentation)])
def test_out_of_range_is_refused_by_name(name: str) -> None:
    for value in (-0.1, 91 if "tilt" in name else 1.5 if name.endswith("_prob") else math.nan, "much"):
        with pytest.raises(InputError, match=rf"data\.augment\.{name}"):
            Augmentation(**{name: value})


def test_tilts_that_leave_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="noise_tilt"):
        Augmentation(noise_tilt=0)
    with pytest.raises(InputError, match="wedge_tilt_max"):
        Augmentation(wedge_tilt_min=50, wedge_tilt_max=40)
