import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from czii25d.particles import Particle, ParticleSet
from czii25d.plotting import fullest_slice, outline, plot_picks, plot_slice

SPACING = (10.0, 11.0, 12.0)
RED = ParticleSet([Particle("ball", 60.0, color="#FF0000"), Particle("other", 90.0, color="#00FF00")])
COLUMNS = ["particle", "x", "y", "z"]


def draw(path, truth, found, **options):
    volume = np.random.default_rng(0).standard_normal((24, 40, 56)).astype(np.float32)
    frames = [None if rows is None else pd.DataFrame(rows, columns=COLUMNS) for rows in (truth, found)]
    plot_picks(volume, SPACING, *frames, RED, path, slice_num=1, **options)
    return imread(path)[..., :3]


def colored(image, channel):
    """Pixels of a pure colour within the slice, not in the legend."""
    others = [c for c in range(3) if c != channel]
    mask = (image[..., channel] > 0.9) & (image[..., others].max(-1) < 0.1)
    mask[:, int(0.64 * image.shape[1]) :] = False
    return mask


def test_a_circle_is_where_the_particle_is(tmp_path):
    image = draw(tmp_path / "a.png", [("ball", 168.0, 330.0, 120.0)], None)  # voxel (12, 30, 14) of (24, 40, 56)
    rows, columns = np.nonzero(colored(image, 0))
    gray = np.nonzero((np.ptp(image, axis=-1) == 0) & (image[..., 0] > 0.02) & (image[..., 0] < 0.98))
    # the slice is the only gray area of this size: its extent gives the scale
    top, bottom = np.percentile(gray[0], [0, 100])
    left = gray[1].min()
    per_angstrom = (bottom - top) / (40 * 11.0)
    middle = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
    assert (rows.max() - rows.min()) / per_angstrom == pytest.approx(120, rel=0.1)
    assert (middle[1] - left) / per_angstrom == pytest.approx(168 + 6, abs=12)  # the edge is half a voxel before 0
    assert (middle[0] - top) / per_angstrom == pytest.approx(330 + 5.5, abs=12)


def test_hits_misses_and_false_picks_look_different(tmp_path):
    spot = ("ball", 168.0, 220.0, 120.0)
    hit, missed, false = (
        colored(draw(tmp_path / f"{index}.png", *frames), 0)
        for index, frames in enumerate([([spot], [spot]), ([spot], []), ([], [spot])])
    )
    rows, columns = np.nonzero(hit)
    y, x = (rows.min() + rows.max()) // 2, (columns.min() + columns.max()) // 2
    middles = [mask[y - 1 : y + 2, x - 1 : x + 2].all() for mask in (hit, missed, false)]
    assert middles == [True, False, True]  # a dot, nothing, a cross
    diagonal = [mask[y - 4, x - 4] and not mask[y - 4, x] for mask in (hit, false)]
    assert diagonal == [False, True]
    assert hit.sum() > 1.2 * missed.sum() > 0 and hit.sum() > 1.2 * false.sum() > 0  # dashed, thin


def test_each_particle_has_its_shape_of_the_same_area():
    shapes = [outline(channel) for channel in range(8)]
    for corners in shapes:
        x, y = corners.T
        assert abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2 == pytest.approx(np.pi)
    extents = {tuple(np.concatenate([corners.min(0), corners.max(0)]).round(3)) for corners in shapes}
    assert len(extents) == 8
    np.testing.assert_allclose(np.linalg.norm(shapes[0], axis=1), 1, atol=0.01)


@pytest.mark.parametrize(("depths", "fullest"), [([], 12), ([20.0, 40.0, 200.0], 5), ([230.0], 20)])
def test_the_fullest_slice_cuts_most(depths, fullest):
    picks = pd.DataFrame([("ball", 0.0, 0.0, z) for z in depths], columns=COLUMNS)
    assert fullest_slice(picks, RED, SPACING, 24) == fullest


def test_a_slice_says_what_it_shows(tmp_path):
    found = pd.DataFrame(
        [("ball", 100.0, 100.0, 120.0), ("ball", 9.0, 9.0, 160.0), ("other", 300, 300, 90)], columns=COLUMNS
    )
    section = np.random.default_rng(0).standard_normal((40, 56))
    counts = plot_slice(section, 120.0, SPACING, None, found, RED, tmp_path / "a.png")
    assert counts == {"ball": 1, "other": 1} and imread(tmp_path / "a.png").shape[1] == 1000


def test_what_the_slice_does_not_cut_is_not_drawn(tmp_path):
    image = draw(tmp_path / "a.png", [("ball", 168.0, 220.0, 200.0)], [("ball", 168.0, 220.0, 20.0)])
    assert not colored(image, 0).any()


@pytest.mark.parametrize("truth", [None, []])
@pytest.mark.parametrize("found", [None, []])
def test_empty_frames_and_none_are_drawn(tmp_path, truth, found):
    assert draw(tmp_path / "a.png", truth, found).std() > 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("suffix", ["pdf", "svg"])
def test_the_suffix_says_the_format(tmp_path, suffix):
    volume = np.zeros((2, 40, 56), np.float32)  # thinner than the number of slices, and constant
    plot_picks(volume, SPACING, None, None, RED.first(1), tmp_path / f"a.{suffix}", slice_num=4)
    start = (tmp_path / f"a.{suffix}").read_bytes()[:5]
    assert start == {"pdf": b"%PDF-", "svg": b"<?xml"}[suffix]
