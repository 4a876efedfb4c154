"""Regions: voxels and points in them, the table that says them, and picks that they drop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mrc import write as write_mrc

from czii25d.data.regions import read_regions
from czii25d.errors import InputError
from czii25d.inference import ArrayVolume, InferenceOptions, pick_volume, predict_heatmap, tiles_of_region
from czii25d.losses import LOSSES, create_loss, on_labelled
from czii25d.particles import Particle, ParticleSet
from czii25d.picks import make_picks
from czii25d.regions import Region, Selection, is_crowded, is_near
from czii25d.runtimes.torch import TorchNetwork

SHAPE, SPACING = (10, 14, 19), (13.0, 11.0, 7.5)
CENTERS = np.stack(np.meshgrid(*(np.arange(n) * s for n, s in zip(SHAPE, SPACING, strict=True)), indexing="ij"), -1)
MASK = np.random.default_rng(3).random(SHAPE) < 0.3
ENDS = st.integers(-500, 2000).map(lambda tenths: tenths / 10 + 0.03)  # at no voxel


def voxels(region: Region) -> np.ndarray:
    return region.crop((0, 0, 0), SHAPE)


def random_points(count: int, seed: int = 0) -> np.ndarray:
    """Points x, y, z, a few of them outside."""
    extent = (np.array(SHAPE) * SPACING)[::-1]
    return np.random.default_rng(seed).uniform(-0.6, extent, (count, 3)) - 5


# ---- which voxels, which points --------------------------------------------------------------------------------------


@given(st.sampled_from("xyz"), ENDS, st.integers(1, 100))
def test_a_range_holds_the_voxels_whose_centres_do(axis: str, low: float, length: int) -> None:
    along = CENTERS[..., "zyx".index(axis)]
    expected = (along >= low) & (along < low + length)
    if not expected.any():
        with pytest.raises(InputError, match=f"here: {axis}: expected a range within 0 to .*correct it"):
            Region.of(SHAPE, SPACING, {axis: (low, low + length)}, where="here")
        return
    np.testing.assert_array_equal(voxels(Region.of(SHAPE, SPACING, {axis: (low, low + length)})), expected)


@given(st.sampled_from("xyz"), st.integers(1, 9), st.floats(1.0, 40.0), st.integers(0, 9))
def test_two_ranges_that_share_an_end_share_nothing_and_leave_nothing(
    axis: str, cut: int, side: float, seed: int
) -> None:
    spacing = (side, side * 1.1, side * 0.9)
    end = cut * spacing["zyx".index(axis)]  # at a voxel, where rounding would show
    low, high = (Region.of(SHAPE, spacing, {axis: ends}) for ends in ((None, end), (end, None)))
    assert (voxels(low) ^ voxels(high)).all()
    points = np.random.default_rng(seed).uniform(0, 1, (50, 3)) * (np.array(SHAPE) * spacing)[::-1] * 0.9
    assert (low.contains(points) ^ high.contains(points)).all()


def test_the_half_of_a_tomogram_in_voxels() -> None:
    region = Region.of((128, 256, 40), (31.36,) * 3, {"y": (0, 4014.08)})
    assert region.crop((0, 0, 0), (1, 256, 1))[0, :, 0].tolist() == [True] * 128 + [False] * 128
    assert region.contains([(3.0, 127.4 * 31.36, 5.0), (3.0, 127.6 * 31.36, 5.0)]).tolist() == [True, False]


def test_a_polygon_by_hand() -> None:
    corners = [(10.0, 20.0), (100.0, 20.0), (100.0, 95.0), (55.0, 57.0), (10.0, 95.0)]  # an envelope, open upwards
    region = Region.of(SHAPE, SPACING, {"z": (13.0, 40.0)}, corners)
    points = [(50, 30, 26), (50, 80, 26), (20, 70, 26), (95, 70, 26), (50, 30, 52), (5, 30, 26)]
    assert region.contains(points).tolist() == [True, False, True, True, False, False]
    turned = Region.of(SHAPE, SPACING, {"z": (13.0, 40.0)}, corners[::-1])
    assert (voxels(turned) == voxels(region)).all()
    assert np.flatnonzero(voxels(region).any((1, 2))).tolist() == [1, 2, 3]


@given(st.data())
def test_a_box_of_a_region_is_the_region_there(data: st.DataObject) -> None:
    region = Region.of(SHAPE, SPACING, {"z": (13, 110), "x": (20, None)}, [(0, 0), (140, 10), (30, 150)], MASK)
    padded = np.pad(voxels(region), 5)
    start = tuple(data.draw(st.integers(-5, side + 2)) for side in SHAPE)
    shape = tuple(data.draw(st.integers(1, side + 5 - at)) for side, at in zip(SHAPE, start, strict=True))
    z, y, x = (slice(at + 5, at + 5 + side) for at, side in zip(start, shape, strict=True))
    np.testing.assert_array_equal(region.crop(start, shape), padded[z, y, x])  # type: ignore[arg-type]


def test_a_point_belongs_to_the_nearest_voxel() -> None:
    region = Region.of(SHAPE, SPACING, mask=MASK.astype(np.float32))
    points = random_points(500)
    nearest = [int(np.square(CENTERS - point[::-1]).sum(-1).argmin()) for point in points]
    expected = MASK.reshape(-1)[nearest]
    assert 20 < expected.sum() < 480 and (points < -4).any()
    np.testing.assert_array_equal(region.contains(points), expected)


@settings(max_examples=6)
@given(st.floats(0, 45), st.integers(0, 99))
def test_shrinking_and_nearness_say_the_same(margin: float, seed: int) -> None:
    """A voxel is in the shrunk region if its centre is not near what is outside, to within half a voxel."""
    mask = np.random.default_rng(seed).random(SHAPE) < 0.97
    region = Region.of(SHAPE, SPACING, {"z": (10, None)}, [(0, 0), (150, 0), (150, 100), (0, 150)], mask)
    shrunk = voxels(region.shrunk(margin))
    assert (shrunk <= voxels(region)).all()
    centers = CENTERS.reshape(-1, 3)[:, ::-1]

    def outside(start: Any, shape: Any) -> np.ndarray:
        return ~region.crop(start, shape)

    surely, hardly = (is_near(centers, outside, SPACING, margin + step).reshape(SHAPE) for step in (-6.6, 6.6))
    assert not (shrunk & surely).any() if margin > 6.6 else True
    assert shrunk[~hardly].all()


def test_voxels_are_drawn_alike() -> None:
    region = Region.of(SHAPE, SPACING, {"z": (20, 70)}, mask=MASK)
    rng = np.random.default_rng(0)
    drawn = np.zeros(SHAPE, int)
    for _ in range(4000):
        drawn[region.random_voxel(rng)] += 1
    used = voxels(region)
    assert not drawn[~used].any() and used.sum() > 200
    assert drawn[used].max() < 4000 / used.sum() * 3 and (drawn[used] == 0).mean() < 0.01


# ---- picks -----------------------------------------------------------------------------------------------------------


@given(st.floats(0, 60), st.integers(0, 99))
@settings(max_examples=30)
def test_nearness_is_the_distance_to_the_nearest_box(distance: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = np.zeros(SHAPE, bool)
    mask[tuple(rng.integers(0, SHAPE, (4, 3)).T)] = True
    points = random_points(20, seed)
    gaps = np.abs(points[:, None, ::-1] - np.argwhere(mask) * SPACING) - np.array(SPACING) / 2
    nearest = np.linalg.norm(np.maximum(gaps, 0), axis=-1).min(1)
    found = is_near(points, Region.of(SHAPE, SPACING, mask=mask).crop, SPACING, distance)
    assert ((found == (nearest <= distance)) | np.isclose(nearest, distance)).all()


def test_picks_are_dropped_by_where_they_lie_and_counted() -> None:
    membrane = np.zeros(SHAPE, np.int8)
    membrane[:, :, 9] = 1  # x 63.75 to 71.25 angstrom
    region = Region.of(SHAPE, SPACING, {"y": (0, 99)})  # its last voxel ends at 93.5
    selection = Selection(region, 15.0, Region.of(SHAPE, SPACING, mask=membrane), 10.0)
    rows = {
        "kept": (30.0, 40.0, 60.0),
        "outside": (30.0, 100.0, 60.0),
        "at the border": (30.0, 80.0, 60.0),
        "at a face": (30.0, 40.0, 8.0),
        "kept too": (30.0, 78.0, 9.0),
        "in the membrane": (67.0, 40.0, 60.0),
        "near it": (55.0, 40.0, 60.0),
        "far enough": (53.0, 40.0, 60.0),
    }
    picks = pd.concat([make_picks("TS_1", name, [row]) for name, row in rows.items()], ignore_index=True)
    kept, dropped = selection.keep(picks)
    assert kept["particle"].tolist() == ["kept", "kept too", "far enough"] and kept.index.tolist() == [0, 1, 2]
    assert dropped == {
        "outside the region": 1,
        "within 15 angstrom of the region's border or a face": 2,
        "within 10 angstrom of the structure to avoid": 2,
    }
    empty, nothing = selection.keep(picks[:0])
    assert empty.empty and nothing == {}


@given(st.integers(0, 99), st.floats(1, 80))
def test_of_picks_that_crowd_the_best_stay(seed: int, distance: float) -> None:
    rng = np.random.default_rng(seed)
    points, scores = rng.uniform(0, 200, (30, 3)), rng.integers(0, 9, 30) / 9
    crowded = is_crowded(points, scores, distance)
    kept = points[~crowded]
    between = np.linalg.norm(kept[:, None] - kept, axis=-1) + 1e9 * np.eye(len(kept))
    assert between.min() > distance
    for point, score in zip(points[crowded], scores[crowded], strict=True):
        rivals = np.linalg.norm(points - point, axis=1) <= distance
        assert (rivals & ~crowded & (scores >= score)).any()


def test_the_picks_in_a_region_are_those_of_the_whole_and_fewer_tiles_are_predicted() -> None:
    """A peak outside suppresses one inside though its own tile does not touch the region."""
    particles = ParticleSet([Particle("small", 40.0), Particle("large", 90.0)])
    options = InferenceOptions((8, 16, 16), (6, 12, 12), floor=0.05)
    volume = ArrayVolume(np.random.default_rng(0).random((20, 70, 61), np.float32))
    spacing = (10.0, 9.0, 11.0)
    seen: list[int] = []

    class Two(torch.nn.Module):
        def forward(self, tiles: torch.Tensor) -> torch.Tensor:
            seen.append(len(tiles))
            return torch.cat([tiles, tiles.roll(3, -1) * 0.9], 1)

    network = TorchNetwork(Two())
    region = Region.of(volume.shape, spacing, {"x": (0, 150), "y": (330, None), "z": (30, None)})
    whole = pick_volume(volume, network, particles, options, spacing)
    tiles_of_whole = sum(seen)
    seen.clear()
    wanted = tiles_of_region(Selection(region), particles, options, spacing)
    part = pick_volume(volume, network, particles, options, spacing, wanted=wanted)
    expected = Selection(region).keep(whole)[0]
    pd.testing.assert_frame_equal(Selection(region).keep(part)[0], expected)
    assert len(expected) > 10 and sum(seen) < tiles_of_whole / 2
    heatmap = predict_heatmap(volume, network, 2, options, wanted=lambda start, stop: start[1] >= 40)
    assert (heatmap[:, :, :30] == 0).all() and (heatmap[:, :, 60:] > 0).any()


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_not_labelled_has_no_part_in_the_loss(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.rand(2, 2, 3, 4, 5, 6, generator=generator)
    loss = create_loss(name, 0.5)
    whole = on_labelled(loss)(prediction, target)
    torch.testing.assert_close(whole, loss(prediction, target))
    target[:, :, :, 2:] = torch.nan
    torch.testing.assert_close(
        on_labelled(loss)(prediction, target), loss(prediction[:, :, :, :2], target[:, :, :, :2])
    )
    free = prediction.clone().requires_grad_()
    on_labelled(loss)(free, target).backward()
    assert free.grad is not None
    assert (free.grad[:, :, :, 2:] == 0).all() and (free.grad[:, :, :, :2] != 0).all()
    nothing = on_labelled(loss)(free, torch.full_like(target, torch.nan))
    assert nothing.item() == 0 and nothing.requires_grad


# ---- the table -------------------------------------------------------------------------------------------------------


def test_a_table_of_every_kind_of_region(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    write_mrc(tmp_path / "masks/a.mrc", MASK.astype(np.int8), (1.0, 1.0, 1.0))
    np.save(tmp_path / "b.npy", MASK)
    (tmp_path / "regions.yaml").write_text(
        "TS_1: {y: [0, 80], z: [null, 60]}\nTS_2: {mask: masks/a.mrc, margin: 5}\n7: {}\n"
        "others: {polygon: [[0, 0], [140, 0], [0, 150]], avoid: b.npy, avoid_distance: 9}\n"
    )
    table = read_regions(tmp_path / "regions.yaml")
    one, two, other = (table.select(run, SHAPE, SPACING) for run in ("TS_1", "TS_2", "TS_9"))
    assert one and two and other and table.select("7", SHAPE, SPACING) is None
    np.testing.assert_array_equal(voxels(one.region), (CENTERS[..., 1] < 80) & (CENTERS[..., 0] < 60))
    np.testing.assert_array_equal(voxels(two.region), MASK)
    assert (one.margin, two.margin) == (0, 5) and one.avoid is None
    assert other.avoid is not None and other.avoid_distance == 9
    np.testing.assert_array_equal(voxels(other.avoid), MASK)
    assert table.limits("7") == {} and set(table.limits("TS_9")) == {"polygon"} == set(table.limits("TS_8"))
    before = table.limits("TS_2")
    assert before == read_regions(tmp_path / "regions.yaml").limits("TS_2")
    write_mrc(tmp_path / "masks/a.mrc", (~MASK).astype(np.int16), (1.0, 1.0, 1.0))
    assert table.limits("TS_2") != before
    assert read_regions(None).select("TS_1", SHAPE, SPACING) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "expected regions by run, found list; write RUN"),
        ("", "expected regions by run, found NoneType"),
        ("TS_1: {y: [0, 10", "expected YAML or JSON, found .*correct it"),
        ("TS_1: 5", r"regions\.yaml: TS_1: expected some of z, y, x, polygon.*found 5"),
        ("TS_1: {ploygon: 5}", "TS_1: .*'ploygon' .did you mean 'polygon'"),
        ("TS_1: {y: 5}", "TS_1: y: expected two numbers in angstrom.*found 5"),
        ("TS_1: {y: [0, high]}", "TS_1: y: expected two numbers"),
        ("TS_1: {polygon: [[0, 0], [1, 1]]}", "TS_1: polygon: expected at least three corners"),
        ("TS_1: {margin: -1}", "TS_1: margin: expected angstrom, at least 0, found -1"),
        ("TS_1: {avoid_distance: 10}", "TS_1: expected avoid, a mask of the structure"),
        ("TS_1: {mask: [a.mrc]}", "TS_1: mask: expected the file of a mask"),
    ],
)
def test_a_wrong_table_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "regions.yaml").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_regions(tmp_path / "regions.yaml")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_table_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"regions\.yaml: expected a table of regions.*correct the path"):
        read_regions(tmp_path / "regions.yaml")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"y": [300, 400]}, r"TS_1: y: expected a range within 0 to 154 angstrom.*found \[300, 400\]"),
        ({"y": [80, 20]}, r"TS_1: y: expected a range.*the lower end first, found \[80, 20\]"),
        ({"z": [None, -20]}, "TS_1: z: expected a range within 0 to 130"),
        ({"polygon": [[500, 0], [600, 0], [600, 50]]}, "TS_1: polygon: expected a polygon within x 0 to 135 and y 0"),
        (
            {"mask": "other.npy"},
            r"TS_1: mask: expected the tomogram's shape \(10, 14, 19\).*found \(10, 14, 18\); make",
        ),
        ({"mask": "turned.npy"}, r"found \(19, 14, 10\); its axes are in another order"),
        ({"mask": "empty.npy"}, "TS_1: expected a mask that is not 0 everywhere"),
        ({"avoid": "empty.npy"}, "TS_1: avoid: expected a mask that is not 0 everywhere"),
        ({"mask": "cut.npy"}, r"cut\.npy: expected a whole \.npy file"),
        ({"mask": "nowhere.mrc"}, r"nowhere\.mrc.*no such file"),
        ({"mask": "corner.npy", "y": [100, None]}, "TS_1: expected a mask"),
        ({"margin": 65}, r"TS_1: margin: expected less than half of the tomogram, 130 x 154 x 142 .*found 65"),
    ],
)
def test_a_region_that_does_not_fit_its_tomogram_is_one_clear_line(
    tmp_path: Path, entry: dict[str, Any], message: str
) -> None:
    np.save(tmp_path / "other.npy", np.ones((10, 14, 18), np.uint8))
    np.save(tmp_path / "turned.npy", np.ones(SHAPE[::-1], np.uint8))
    np.save(tmp_path / "empty.npy", np.zeros(SHAPE, np.uint8))
    corner = np.zeros(SHAPE, np.uint8)
    corner[0, 0, 0] = 1
    np.save(tmp_path / "corner.npy", corner)
    np.save(tmp_path / "cut.npy", corner)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "corner.npy").read_bytes()[:-50])
    entry = {key: str(tmp_path / value) if key in ("mask", "avoid") else value for key, value in entry.items()}
    with pytest.raises(InputError, match=message) as caught:
        read_regions({"TS_1": entry}).select("TS_1", SHAPE, SPACING)
    assert "\n" not in str(caught.value)
