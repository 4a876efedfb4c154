from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from czii25d.geometry import xyz_angstrom_to_zyx_voxel, zyx_voxel_to_xyz_angstrom

SPACING = (13.0, 11.0, 7.0)  # z, y, x, all different
numbers = st.floats(-1e5, 1e5)
points = st.lists(st.tuples(numbers, numbers, numbers), max_size=5)
spacings = st.tuples(*[st.floats(0.1, 100)] * 3)


def test_centre_of_the_first_voxel_is_at_zero_angstrom() -> None:
    assert xyz_angstrom_to_zyx_voxel([(0, 0, 0)], SPACING).tolist() == [[0, 0, 0]]


def test_axes_turn_around_and_each_has_its_own_spacing() -> None:
    assert xyz_angstrom_to_zyx_voxel([(7, 22, 39)], SPACING).tolist() == [[3, 2, 1]]
    assert zyx_voxel_to_xyz_angstrom([(3, 2, 1)], SPACING).tolist() == [[7, 22, 39]]


def test_offset_is_added_in_voxels() -> None:
    assert zyx_voxel_to_xyz_angstrom([(3.5, 2.5, 1.5)], SPACING, -0.5).tolist() == [[7, 22, 39]]


def test_no_points_stay_no_points() -> None:
    assert xyz_angstrom_to_zyx_voxel([], SPACING).shape == (0, 3)
    assert zyx_voxel_to_xyz_angstrom([], SPACING).shape == (0, 3)


@given(points, spacings)
def test_there_and_back(locations: list[tuple[float, float, float]], spacing: tuple[float, float, float]) -> None:
    back = zyx_voxel_to_xyz_angstrom(xyz_angstrom_to_zyx_voxel(locations, spacing), spacing)
    np.testing.assert_allclose(back, np.reshape(locations, (-1, 3)), rtol=1e-12, atol=1e-12)
