"""Pasted particles: where they come from, where they go, and that nothing else changes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from czii25d.data.augment import Intensity, Pose
from czii25d.data.paste import SOFT_EDGE, Paste, Pasting
from czii25d.data.targets import HeatmapTarget
from czii25d.data.tiles import Tile, make_tiles, plan_batch
from czii25d.particles import load_particles

PARTICLES = load_particles()
SPACING = (13.0, 11.0, 7.0)
VOLUME = (40, 64, 80)
TILE = (16, 32, 48)
BACKGROUND = np.random.default_rng(0).standard_normal(VOLUME).astype(np.float16)
RADIUS = PARTICLES.radii[0]


def make_target(centers: list[tuple[float, float, float]], channels: list[int]) -> HeatmapTarget:
    sigma = {particle.name: particle.radius / 2 for particle in PARTICLES}
    places = np.array(centers, float).reshape(-1, 3)
    return HeatmapTarget("TS", PARTICLES, places, np.array(channels, int), sigma, SPACING, VOLUME)


def make(tile: Tile, *volumes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    image, heatmap = make_tiles(plan_batch([tile], TILE), [torch.from_numpy(volume) for volume in volumes])
    return image[0, 0].numpy(), heatmap[0].numpy()


@pytest.mark.parametrize("place", [(7.3, 15.8, 22.1), (1.0, 30.0, 45.5)])  # the second reaches beyond the tile
def test_a_ball_comes_from_there_in_its_pose_and_the_target_gains_it(place: tuple[float, float, float]) -> None:
    target = make_target([], [])
    source = np.random.default_rng(1).standard_normal(VOLUME).astype(np.float16)
    center = np.array([20.4, 33.3, 41.6])
    pose = Pose((19.5, 31.5, 39.5), 0.4, (1.1, 0.9, 1.0), flip_x=True, voxel_spacing=SPACING)
    turned = replace(pose, angle=-2.0)
    pasted = Paste(1, center, turned, np.array(place), 0, RADIUS)
    tile = Tile(0, pose, Intensity(), target.centers_zyx_voxel, target.channels, target.sigma_voxel)
    plain, empty = make(tile, BACKGROUND, source)
    image, heatmap = make(replace(tile, paste=pasted), BACKGROUND, source)

    steps = np.stack(np.meshgrid(*(np.arange(n) for n in TILE), indexing="ij"), -1) - place
    distance = np.linalg.norm(steps * SPACING * pose.scale, axis=-1)  # angstrom of the specimen
    there = (steps.reshape(-1, 3) @ turned.matrix.T + center).T
    expected = ndimage.map_coordinates(source.astype(float), there, order=1).reshape(TILE)
    inside, outside = distance <= RADIUS, distance >= (1 + SOFT_EDGE) * RADIUS
    np.testing.assert_allclose(image[inside], expected[inside], atol=1e-3)
    np.testing.assert_array_equal(image[outside], plain[outside])
    edge = ~inside & ~outside
    assert inside.sum() > 50 and edge.sum() > 50 and not np.allclose(image[edge], plain[edge], atol=0.1)
    assert empty.max() == 0
    sigma = target.sigma_angstrom[PARTICLES.names[0]]
    np.testing.assert_allclose(heatmap[0], np.exp(-0.5 * (distance / sigma) ** 2), atol=2e-3)
    assert heatmap[1:].max() == 0


def test_a_batch_of_pastes_is_each_of_them() -> None:
    target = make_target([], [])
    pose = Pose((19.5, 31.5, 39.5), voxel_spacing=SPACING)
    plain = Tile(0, pose, Intensity(), target.centers_zyx_voxel, target.channels, target.sigma_voxel)
    tiles = [plain]
    for number in range(3):
        turned, place = replace(pose, angle=number, flip_z=number == 1), np.array([5.0 + number, 14.0, 20.0])
        pasted = Paste(0, np.array([20.0, 30.0 + number, 41.0]), turned, place, number, PARTICLES.radii[number])
        tiles.append(replace(plain, paste=pasted))
    images, heatmaps = make_tiles(plan_batch(tiles, TILE), [torch.from_numpy(BACKGROUND)])
    for tile, image, heatmap in zip(tiles, images, heatmaps, strict=True):
        own_image, own_heatmap = make(tile, BACKGROUND)
        np.testing.assert_allclose(image[0], own_image, atol=2e-4)
        np.testing.assert_allclose(heatmap, own_heatmap, atol=1e-6)
    assert heatmaps.amax((2, 3, 4)).round().tolist()[1:] == [[float(c == n) for c in range(6)] for n in range(3)]


def test_only_particles_that_stand_alone_are_copied_and_only_into_free_places() -> None:
    alone, near, other, at_the_face = (20.0, 30.0, 30.0), (20.0, 50.0, 60.0), (20.0, 52.0, 62.0), (1.0, 10.0, 10.0)
    targets = [make_target([alone, near, other, at_the_face], [0, 0, 1, 0]), make_target([(20.0, 30.0, 40.0)], [5])]
    pasting = Pasting(targets, [np.ones(4, bool), np.ones(1, bool)])
    pose = Pose((20.0, 30.0, 40.0), 1.0, voxel_spacing=SPACING)
    rng = np.random.default_rng(0)
    drawn = [pasting.draw(1, pose, TILE, rng) for _ in range(60)]
    pasted = [each for each in drawn if each is not None]
    of_first = [each for each in pasted if each.channel == 0]
    assert len(of_first) > 10 and all(each.volume == 0 and tuple(each.center_zyx) == alone for each in of_first)
    assert {each.channel for each in pasted} <= {0, 5}, "the others touch something, or are cut off"
    for each in pasted:
        place = pose.to_tomogram(each.place_zyx[None], TILE)
        distance = np.linalg.norm((place - (20.0, 30.0, 40.0)) * SPACING)
        assert distance > each.radius + PARTICLES.radii[5]
        assert each.pose.scale == pose.scale and -math.pi <= each.pose.angle <= math.pi


def test_nothing_is_pasted_where_there_is_nothing_or_no_room() -> None:
    rng = np.random.default_rng(0)
    assert Pasting([make_target([], [])], [np.empty(0, bool)]).draw(0, Pose((20.0, 30.0, 40.0)), TILE, rng) is None
    crowded = [(20.0, y, x) for y in np.arange(8.0, 64, 8) for x in np.arange(10.0, 80, 10)]
    targets = [make_target([(20.0, 30.0, 30.0)], [0]), make_target(crowded, [5] * len(crowded))]
    assert (
        Pasting(targets, [np.ones(1, bool), np.zeros(len(crowded), bool)]).draw(
            1, Pose((20.0, 30.0, 40.0), voxel_spacing=SPACING), TILE, rng
        )
        is None
    )
