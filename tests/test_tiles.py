"""Tiles and heatmaps of a batch beside independent references: scipy's interpolation, the Gaussian's formula."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy import ndimage
from test_augment import SPACING, poses

from czii25d.data.augment import Intensity, Pose
from czii25d.data.tiles import Tile, keyed_normal, make_tiles, plan_batch
from czii25d.heatmap import TRUNCATE, render_heatmap

VOLUME = (30, 44, 60)
TILE = (12, 20, 28)
RNG = np.random.default_rng(0)
NOISE = RNG.standard_normal(VOLUME).astype(np.float16)
CENTERS = RNG.uniform(-3, np.array(VOLUME) + 3, (40, 3))
CHANNELS = np.sort(RNG.integers(0, 3, 40))
SIGMA = np.array([20.0, 30.0, 45.0])  # angstrom


def tile(pose: Pose, intensity: Intensity = Intensity(), volume: int = 0) -> Tile:  # noqa: B008
    return Tile(volume, pose, intensity, CENTERS, CHANNELS, SIGMA[:, None] / np.array(pose.voxel_spacing))


def make(*tiles: Tile, volumes=(NOISE,), noise_tilt: float = 90.0, noise_pink: float = 0.0):
    """Images (B, D, H, W) and heatmaps (B, C, D, H, W)."""
    batch = plan_batch(tiles, TILE, noise_tilt, noise_pink)
    image, heatmap = make_tiles(batch, [torch.from_numpy(volume) for volume in volumes])
    assert image.shape == (len(tiles), 1, *TILE) and heatmap.shape == (len(tiles), 3, *TILE)
    assert image.dtype == heatmap.dtype == torch.float32
    return image[:, 0].numpy(), heatmap.numpy()


def places(pose: Pose) -> np.ndarray:
    """Where every voxel of the tile lies in the volume, (D * H * W, 3)."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in TILE), indexing="ij"), -1).reshape(-1, 3)
    return pose.to_tomogram(index.astype(float), TILE)


@settings(max_examples=40)
@given(poses)
def test_a_tile_is_the_linear_interpolation_at_its_places(pose: Pose) -> None:
    for each in (pose, replace(pose, tilt=0.0)):
        expected = ndimage.map_coordinates(NOISE.astype(float), places(each).T, order=1, mode="grid-constant")
        np.testing.assert_allclose(make(tile(each))[0].reshape(-1), expected, atol=2e-4)


@settings(max_examples=30)
@given(poses)
def test_a_heatmap_is_the_gaussian_of_the_specimen_at_its_places(pose: Pose) -> None:
    pose = replace(pose, voxel_spacing=SPACING)
    angstrom = (places(pose)[:, None] - CENTERS) * SPACING
    value = np.exp(-0.5 * (angstrom**2).sum(-1) / SIGMA[CHANNELS] ** 2)
    expected = np.stack([value[:, CHANNELS == channel].max(1) for channel in range(3)])
    cut_off = math.exp(-0.5 * TRUNCATE**2)
    np.testing.assert_allclose(make(tile(pose))[1].reshape(3, -1), expected, atol=cut_off + 1e-5)


def test_a_straight_heatmap_is_the_one_of_02() -> None:
    pose = Pose((5 + 5.5, 7 + 9.5, 9 + 13.5), voxel_spacing=SPACING)
    sigma = SIGMA[:, None] / np.array(SPACING)
    expected = render_heatmap(CENTERS, CHANNELS, sigma, TILE, 3, (5, 7, 9))
    np.testing.assert_allclose(make(tile(pose))[1][0], expected, atol=1e-5)
    assert expected.max() > 0.5


def test_a_straight_tile_is_the_crop_itself() -> None:
    crop = NOISE[5:17, 7:27, 9:37].astype(np.float32)
    pose = Pose((5 + 5.5, 7 + 9.5, 9 + 13.5))
    both = replace(pose, flip_z=True, flip_x=True)
    images, heatmaps = make(tile(pose), tile(both), tile(replace(pose, flip_x=True)))
    np.testing.assert_array_equal(images, [crop, crop[::-1, :, ::-1], crop[..., ::-1]])
    np.testing.assert_allclose(heatmaps[1], heatmaps[0][:, ::-1, :, ::-1], atol=1e-5)


def test_outside_the_volume_is_the_mean() -> None:
    ones = np.ones(VOLUME, np.float16)
    for pose in (Pose((-0.5, -0.5, -0.5)), Pose((-0.5, -0.5, -0.5), scale=(1.0, 1.0, 1.0 + 1e-9))):
        [image], _ = make(tile(pose), volumes=[ones])
        assert image[:6].sum() == 0 and image[:, :10].sum() == 0 and abs(image[..., :14]).max() < 1e-4
        np.testing.assert_allclose(image[6:, 10:, 14:], 1, atol=1e-4)
    assert not make(tile(Pose((500.0, 20.0, 20.0), 0.3)))[0].any()


def mixed_tiles() -> list[Tile]:
    """Straight, mirrored, turned and tilted tiles of two volumes with every change of intensity."""
    tiles = []
    for number in range(8):
        pose = Pose((14.5, 20.5 + number % 2, 25.5), flip_x=number % 3 == 0, voxel_spacing=SPACING)
        if number % 4:
            pose = replace(pose, angle=0.5 * number, scale=(0.9, 1.0, 1 + 0.02 * number), tilt=0.2 * (number == 3))
        change = Intensity(50.0 if number % 5 == 0 else 90.0, 0.3, 1 + 0.1 * number, 0.2, 0.3 * (number % 2), number)
        tiles.append(tile(pose, change, number % 2))
    return tiles


@pytest.mark.parametrize("noise", [{}, {"noise_tilt": 60.0, "noise_pink": 1.0}])
def test_a_tile_is_the_same_in_every_batch(noise: dict) -> None:
    tiles, volumes = mixed_tiles(), [NOISE, NOISE[::-1, 2:].copy()]
    images, heatmaps = make(*tiles, volumes=volumes, **noise)
    for order in ([5], [3, 0], [7, 6, 5, 4, 3, 2, 1, 0]):
        own_images, own_heatmaps = make(*(tiles[number] for number in order), volumes=volumes, **noise)
        np.testing.assert_allclose(own_images, images[order], atol=2e-4)
        np.testing.assert_allclose(own_heatmaps, heatmaps[order], atol=1e-6)
    assert len({image.tobytes() for image in images}) == len(tiles)


def test_boxes_that_were_sent_make_the_same_tiles() -> None:
    tiles, volumes = mixed_tiles(), [torch.from_numpy(NOISE), torch.from_numpy(NOISE[::-1, 2:].copy())]
    batch = plan_batch(tiles, TILE)
    sent = batch.cut_from(volumes, torch.float16).to("cpu")
    assert all(boxes.voxels.dtype == torch.float16 for boxes in sent.boxes)
    for own, expected in zip(make_tiles(sent, []), make_tiles(batch, volumes), strict=True):
        torch.testing.assert_close(own, expected, atol=2e-4, rtol=0)


def test_nothing_leaves_the_device_it_comes_to() -> None:
    """A device without values: it refuses tensors of other devices, and values that would be read back."""
    volumes = [torch.empty(VOLUME, dtype=torch.float16, device="meta") for _ in range(2)]
    image, heatmap = make_tiles(plan_batch(mixed_tiles(), TILE, 60.0, 1.0).to("meta"), volumes)
    assert image.device.type == heatmap.device.type == "meta" and image.shape == (8, 1, *TILE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_makes_the_same_tiles() -> None:
    tiles, volumes = mixed_tiles(), [torch.from_numpy(NOISE), torch.from_numpy(NOISE[::-1, 2:].copy())]
    batch, there = plan_batch(tiles, TILE, 60.0, 1.0), [volume.to("cuda") for volume in volumes]
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = make_tiles(batch.pin_memory().to("cuda"), there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for own, expected in zip(on_gpu, make_tiles(batch, volumes), strict=True):
        torch.testing.assert_close(own.cpu(), expected, atol=1e-3, rtol=0)


def test_intensities_are_never_clipped() -> None:
    pose = Pose((14.5, 20.5, 25.5), 0.4)
    [plain, changed], _ = make(tile(pose), tile(pose, Intensity(gain=1.3, shift=-0.2)))
    np.testing.assert_allclose(changed, 1.3 * plain - 0.2, atol=1e-5)
    assert changed.min() < -2 and changed.max() > 2


def test_noise_is_normal_and_another_for_every_key() -> None:
    one, other = keyed_normal(torch.tensor([5, 2**32 - 7]).reshape(2, 1, 1, 1), (16, 64, 128)).double().numpy()
    count = one.size
    for sample in (one, other):
        assert abs(sample.mean()) < 5 / math.sqrt(count) and abs(sample.var() - 1) < 5 * math.sqrt(2 / count)
        assert abs((sample**4).mean() - 3) < 5 * math.sqrt(96 / count) and abs(sample).max() > 4
        spectrum = np.abs(np.fft.fftn(sample)) ** 2 / count
        assert spectrum.max() < 25, "no frequency stands out"  # exponential of mean 1: e^-25 x 131072 voxels
    assert abs((one * other).mean()) < 5 / math.sqrt(count)


def wedge_angle(pose: Pose) -> np.ndarray:
    """Degrees from the x-y plane of the tilt series, about its axis, of every frequency of a tile, (D, H, W)."""
    axes = np.meshgrid(*(np.fft.fftfreq(n) for n in TILE), indexing="ij")
    z, _, x = np.moveaxis(np.stack(axes, -1) @ pose.to_tilt_frame().T, -1, 0)
    return np.degrees(np.arctan2(np.abs(z), np.abs(x)))


@pytest.mark.parametrize("angle", [0.0, 0.9])
def test_noise_is_empty_in_the_missing_wedge_of_its_tile(angle: float) -> None:
    pose = Pose((14.5, 20.5, 25.5), angle, voxel_spacing=SPACING)
    tiles = [tile(pose, Intensity(noise_std=0.3, noise_key=key)) for key in range(6)]
    noise, _ = make(*tiles, volumes=[np.zeros(VOLUME, np.float16)], noise_tilt=60.0)
    np.testing.assert_allclose(noise.std(axis=(1, 2, 3)), 0.3, rtol=1e-3)
    power = (np.abs(np.fft.fftn(noise, axes=(1, 2, 3))) ** 2).mean(0)
    degrees = wedge_angle(pose)
    degrees[:, TILE[1] // 2], degrees[..., TILE[2] // 2] = 70, 70  # the highest frequencies have no sign
    high = np.abs(np.fft.fftfreq(TILE[0]))[:, None, None] > 0.3  # where one sample is little of an angle
    assert power[(degrees > 80) & high].max() < 1e-6 * power[degrees < 55].mean()
    assert power[degrees < 55].std() < power[degrees < 55].mean(), "white within it"


def test_pink_noise_falls_with_the_frequency() -> None:
    pose = Pose((14.5, 20.5, 25.5))
    tiles = [tile(pose, Intensity(noise_std=1.0, noise_key=key)) for key in range(8)]
    noise, _ = make(*tiles, volumes=[np.zeros(VOLUME, np.float16)], noise_pink=1.0)
    power = (np.abs(np.fft.fftn(noise, axes=(1, 2, 3))) ** 2).mean(0)
    length = np.linalg.norm(np.stack(np.meshgrid(*(np.fft.fftfreq(n) for n in TILE), indexing="ij")), axis=0)
    slope, _ = np.polyfit(np.log(length[length > 0]), np.log(power[length > 0]), 1)
    assert slope == pytest.approx(-1, abs=0.1)


@pytest.mark.parametrize("axis", [0.0, math.pi / 2])
def test_a_lost_wedge_takes_the_waves_within_it_alone(axis: float) -> None:
    """Of two waves, each is seen by a tilt series about one axis and lies in the missing wedge of the other's."""
    z, y, x = np.meshgrid(*(np.arange(n) for n in (24, 40, 56)), indexing="ij")
    about_y = np.cos(2 * np.pi * (3 / 12 * z + 8 / 28 * x))
    about_x = np.cos(2 * np.pi * (3 / 12 * z + 6 / 20 * y))
    kept, lost = (about_y, about_x) if axis == 0 else (about_x, about_y)
    volume = (about_x + about_y + 0.5).astype(np.float16)
    pose = Pose((5.5 + 6, 9.5 + 10, 13.5 + 14))
    [plain, less], _ = make(tile(pose), tile(pose, Intensity(60.0, axis)), volumes=[volume])
    crop = (slice(6, 18), slice(10, 30), slice(14, 42))
    correlation = [abs(np.corrcoef(less.ravel(), wave[crop].ravel())[0, 1]) for wave in (kept, lost)]
    assert correlation[0] > 0.99 and correlation[1] < 0.05
    assert less.mean() == pytest.approx(plain.mean(), abs=1e-4) and less.std() == pytest.approx(plain.std(), abs=1e-3)
