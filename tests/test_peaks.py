"""Planted particles come back, and the rule for peaks is the one that is stated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from czii25d.heatmap import quantize, render_heatmap
from czii25d.peaks import find_peaks, find_peaks_in_slabs

SHAPE = (40, 56, 72)


def peaks_by_definition(volume: np.ndarray, radius: np.ndarray, threshold: float) -> set[tuple[int, ...]]:
    """Look at every voxel and at all others in its ball, one by one."""
    radius = np.maximum(radius, 3**0.5)  # the 26 neighbours always count
    index = np.stack(np.meshgrid(*map(np.arange, volume.shape), indexing="ij"), -1).reshape(-1, 3)
    values = volume.reshape(-1)
    found = set()
    for number in np.flatnonzero(values >= threshold):
        near = np.square((index - index[number]) / radius).sum(1) <= 1 + 1e-9
        rivals = values[near]
        earlier = np.flatnonzero(near) < number
        if not ((rivals > values[number]) | ((rivals == values[number]) & earlier)).any():
            found.add(tuple(index[number].tolist()))
    return found


def plant(rng: np.random.Generator, count: int, least_distance: float, shape=SHAPE) -> np.ndarray:
    centers: list[np.ndarray] = []
    while len(centers) < count:
        center = rng.uniform(0, np.array(shape) - 1)
        if all(np.linalg.norm(center - other) > least_distance for other in centers):
            centers.append(center)
    return np.array(centers)


def errors(found: np.ndarray, planted: np.ndarray) -> np.ndarray:
    assert len(found) == len(planted)
    return np.linalg.norm(found[:, None] - planted, axis=2).min(0)


def has_ties(draw_levels: int) -> st.SearchStrategy[float]:
    return st.integers(0, draw_levels).map(lambda level: level / draw_levels)


@settings(max_examples=150, deadline=None)
@given(
    volume=hnp.arrays(np.float32, hnp.array_shapes(min_dims=3, max_dims=3, max_side=11), elements=has_ties(4)),
    radius=st.tuples(*[st.floats(0.3, 5)] * 3),
    threshold=st.sampled_from([0.25, 0.5, 1.0]),
)
def test_peaks_are_those_of_the_definition_with_ties(volume, radius, threshold: float) -> None:
    [(centers, scores)] = find_peaks(volume[None], np.array([radius]), threshold, refine=False)
    found = [tuple(center) for center in centers.astype(int).tolist()]
    assert len(set(found)) == len(found)
    assert set(found) == peaks_by_definition(volume, np.array(radius), threshold)
    assert (np.diff(scores) <= 0).all()
    assert [volume[center] for center in found] == scores.tolist()


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("radius", [5.0, 4.999999999999999])
def test_a_voxel_at_the_end_of_the_radius_is_within_it(axis: int, radius: float) -> None:
    volume = np.zeros((14, 15, 16), np.float32)
    volume[3, 4, 5] = 1
    second = [3, 4, 5]
    second[axis] += 5
    volume[tuple(second)] = 0.9
    [(centers, _)] = find_peaks(volume[None], radius, 0.5, refine=False)
    assert centers.tolist() == [[3, 4, 5]]
    slabs = iter(torch.from_numpy(volume[None]).split(2, 1))
    [(centers, _)] = find_peaks_in_slabs(slabs, radius, 0.5, refine=False)
    assert centers.tolist() == [[3, 4, 5]]


@pytest.mark.parametrize("radius", [1.0, 2.5, 3.6, 6.3, 9.0])
def test_peaks_are_those_of_the_definition_in_noise(radius: float) -> None:
    volume = np.random.default_rng(int(radius)).random((19, 23, 28), np.float32)
    [(centers, _)] = find_peaks(volume[None], radius, 0.9, refine=False)
    expected = peaks_by_definition(volume, np.full(3, radius), 0.9)
    assert {tuple(center) for center in centers.astype(int).tolist()} == expected


@pytest.mark.parametrize("sigma", [3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
@pytest.mark.parametrize("quantized", [False, True])
def test_planted_particles_come_back_within_a_tenth_of_a_voxel(sigma: float, quantized: bool) -> None:
    """Faces included; sigma is half the radius, the peak finder's radius 0.6 of it, as in the whole pipeline."""
    planted = plant(np.random.default_rng(int(sigma)), 5, 4 * sigma)
    heatmap = render_heatmap(planted, np.zeros(5, int), sigma, SHAPE, 1)
    [(centers, scores)] = find_peaks(quantize(heatmap) / np.float32(255) if quantized else heatmap, 1.2 * sigma, 0.1)
    assert errors(centers, planted).max() < (0.1 if quantized else 1e-3)
    assert scores.min() > 0.9


def test_noise_hardly_moves_a_centre() -> None:
    rng = np.random.default_rng(0)
    planted = plant(rng, 6, 24)
    heatmap = render_heatmap(planted, np.zeros(6, int), 4.0, SHAPE, 1)
    noisy = heatmap + 0.01 * rng.standard_normal(heatmap.shape).astype(np.float32)
    [(refined, _)], [(whole, _)] = (find_peaks(noisy, 4.8, 0.5, refine=refine) for refine in (True, False))
    assert np.median(errors(refined, planted)) < 0.2 < np.median(errors(whole, planted))


def test_each_class_has_its_own_radius_and_threshold() -> None:
    planted = np.array([[20.0, 20.0, 20.0], [20.0, 20.0, 27.0], [20.0, 45.0, 50.0]])
    heatmap = render_heatmap(np.tile(planted, (2, 1)), np.repeat([0, 1], 3), 1.5, SHAPE, 2)
    heatmap *= np.array([1, 0.5], np.float32)[:, None, None, None]
    near, far = find_peaks(heatmap, [3.0, 8.0], [0.6, 0.4])
    assert len(near[0]) == 3 and len(far[0]) == 2
    assert [len(scores) for _, scores in find_peaks(heatmap, [3.0, 8.0], 0.6)] == [3, 0]


def test_a_radius_per_axis_is_an_ellipsoid() -> None:
    volume = np.zeros((1, 20, 20, 20), np.float32)
    volume[0, 5, 5, 5] = 1.0
    volume[0, 5, 5, 9] = volume[0, 9, 5, 5] = 0.5
    [(centers, _)] = find_peaks(volume, np.array([[3.0, 3.0, 5.0]]), 0.1, refine=False)
    assert centers.tolist() == [[5, 5, 5], [9, 5, 5]]


def test_a_slab_with_a_halo_has_the_peaks_of_the_whole() -> None:
    volume = np.random.default_rng(3).random((1, 40, 24, 30), np.float32)
    radius, low, high = 4.2, 12, 25
    [(whole, _)] = find_peaks(volume, radius, 0.8, refine=False)
    [(slab, _)] = find_peaks(volume[:, low - 4 : high + 4], radius, 0.8, refine=False)
    slab = slab + np.array([low - 4, 0, 0])
    inside = [{tuple(c) for c in part.tolist() if low <= c[0] < high} for part in (whole, slab)]
    assert inside[0] == inside[1] and inside[0]


def test_nothing_is_found_below_the_threshold_and_one_peak_in_a_constant() -> None:
    for shape in (SHAPE, (1, 1, 1), (2, 7, 1)):
        flat = np.full((2, *shape), 0.5, np.float32)
        assert [centers.shape for centers, _ in find_peaks(flat, 4.0, 0.6)] == [(0, 3)] * 2
        [(centers, scores), _] = find_peaks(flat, 4.0, 0.5)
        assert centers.tolist() == [[0, 0, 0]] and scores.tolist() == [0.5]


def test_bytes_and_tensors_are_taken_too() -> None:
    planted = np.array([[11.3, 30.8, 51.2]])
    heatmap = render_heatmap(planted, [0], 4.0, SHAPE, 1)
    threads = torch.get_num_threads()
    [(of_bytes, scores)] = find_peaks(quantize(heatmap), 4.8, 100)
    [(of_tensor, _)] = find_peaks(torch.from_numpy(heatmap), 4.8, 0.1)
    assert torch.get_num_threads() == threads
    assert scores[0] > 250
    assert errors(of_bytes, planted).max() < 0.1 and errors(of_tensor, planted).max() < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_finds_the_same() -> None:
    volume = torch.rand((2, 30, 40, 50), generator=torch.Generator().manual_seed(0))
    for (here, scores), (there, others) in zip(
        find_peaks(volume, 4.2, 0.9), find_peaks(volume.cuda(), 4.2, 0.9), strict=True
    ):
        np.testing.assert_allclose(here, there, atol=1e-9)
        np.testing.assert_array_equal(scores, others)


@settings(max_examples=100, deadline=None)
@given(
    heatmap=hnp.arrays(
        np.float32,
        st.tuples(st.just(2), st.integers(1, 24), st.integers(1, 7), st.integers(1, 6)),
        elements=has_ties(6),
    ),
    radius=st.tuples(*[st.floats(0.3, 6)] * 3),
    data=st.data(),
)
def test_slabs_have_the_peaks_of_the_whole(heatmap, radius, data: st.DataObject) -> None:
    radii = np.array([radius, (1.0, 1.5, 2.0)])
    whole = find_peaks(heatmap, radii, [0.3, 0.5])
    slabs, z = [], 0
    while z < heatmap.shape[1]:
        depth = data.draw(st.integers(1, 8))
        slabs.append(torch.from_numpy(heatmap[:, z : z + depth]))
        z += depth
    for (centers, scores), (own_centers, own_scores) in zip(
        whole, find_peaks_in_slabs(slabs, radii, [0.3, 0.5]), strict=True
    ):
        np.testing.assert_array_equal(scores, own_scores)
        np.testing.assert_allclose(centers, own_centers, atol=1e-9)


def test_no_slab_at_all_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="no slab"):
        find_peaks_in_slabs([], 2.0, 0.5)
