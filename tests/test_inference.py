"""Tiles in, picks out: nothing is lost at the seams or the faces, and what is planted is found."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from czii25d.errors import InputError
from czii25d.geometry import PUBLISHED_OFFSET_VOXEL, xyz_angstrom_to_zyx_voxel
from czii25d.heatmap import render_heatmap
from czii25d.inference import (
    NMS_RADIUS_FACTOR,
    ArrayVolume,
    Ensemble,
    InferenceOptions,
    Member,
    View,
    merge_slabs,
    pick_volume,
    predict_heatmap,
    predict_slabs,
)
from czii25d.particles import Particle, ParticleSet
from czii25d.runtimes.torch import TorchNetwork

PARTICLES = ParticleSet([Particle("small", 60.0), Particle("large", 100.0)])
SPACING = (11.0, 9.0, 10.0)


class Scale(nn.Module):
    """Channels that are multiples of the input."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.register_buffer("factors", torch.tensor(factors)[:, None, None, None])

    def forward(self, tiles: Tensor) -> Tensor:
        return tiles * self.factors


class Split(nn.Module):
    """A perfect network for volumes in which the classes are told apart by their sign."""

    def forward(self, tiles: Tensor) -> Tensor:
        return torch.cat([tiles, -tiles], 1).clamp_min(0)


def random_volume(shape: tuple[int, ...], seed: int = 0) -> ArrayVolume:
    return ArrayVolume(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("window", ["pyramid", "gaussian"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_an_identity_predictor_returns_the_volume(window, data: st.DataObject) -> None:
    tile = data.draw(st.tuples(*[st.integers(1, 9)] * 3))
    shape = data.draw(st.tuples(*[st.integers(1, 20)] * 3))
    stride = tuple(data.draw(st.integers(1, side)) for side in tile)
    options = InferenceOptions(tile, stride, window, batch_size=data.draw(st.integers(1, 5)))  # type: ignore[arg-type]
    volume = random_volume(shape)
    heatmap = predict_heatmap(volume, TorchNetwork(Scale(1.0, -0.5)), 2, options)
    expected = torch.from_numpy(np.stack([volume.array, -0.5 * volume.array]))
    torch.testing.assert_close(heatmap, expected, atol=1e-6, rtol=1e-6)


def test_the_published_window_loses_the_faces_only() -> None:
    volume = random_volume((24, 40, 56))
    options = InferenceOptions((8, 16, 16), (4, 8, 8), "published")
    heatmap = predict_heatmap(volume, TorchNetwork(Scale(1.0)), 1, options)[0].numpy()
    assert (heatmap[0] == 0).all() and (heatmap[:, :, -1] == 0).all()
    assert (np.abs(heatmap) <= np.abs(volume.array) + 1e-6).all()
    np.testing.assert_allclose(heatmap[12, 16, 23], volume.array[12, 16, 23], rtol=0.2)


def test_slabs_follow_each_other_and_never_exceed_a_tile() -> None:
    options = InferenceOptions((8, 16, 16), (5, 16, 16))
    seen, calls = 0, []
    slabs = predict_slabs(random_volume((30, 20, 33)), TorchNetwork(Scale(1.0)), 1, options, lambda *n: calls.append(n))
    for z, slab in slabs:
        assert z == seen and slab.shape[2:] == (20, 33) and slab.shape[1] <= 8
        seen += slab.shape[1]
    assert seen == 30
    total = calls[-1][1]
    assert calls[-1] == (total, total) and [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_a_volume_smaller_than_a_tile_is_mirrored_and_said_to_be(caplog: pytest.LogCaptureFixture) -> None:
    seen = []

    class Spy(Scale):
        def forward(self, tiles: Tensor) -> Tensor:
            seen.append(tiles[0, 0, :, 0, 0].tolist())
            return super().forward(tiles)

    volume = ArrayVolume(np.arange(5 * 9 * 7, dtype=np.float32).reshape(5, 9, 7))
    logging.getLogger("czii25d").propagate = True
    with caplog.at_level(logging.INFO):
        heatmap = predict_heatmap(volume, TorchNetwork(Spy(1.0)), 1, InferenceOptions((8, 8, 8), (8, 8, 8)))
    np.testing.assert_allclose(heatmap[0], volume.array, rtol=1e-6)
    assert seen[0] == volume.array[[0, 1, 2, 3, 4, 3, 2, 1], 0, 0].tolist()
    assert len(caplog.messages) == 1 and "(5, 9, 7) is smaller than a tile (8, 8, 8)" in caplog.messages[0]


def test_the_batch_size_changes_nothing() -> None:
    volume = random_volume((20, 30, 41))
    heatmaps = [
        predict_heatmap(volume, TorchNetwork(Scale(1.0)), 1, InferenceOptions((8, 16, 16), (4, 9, 11), batch_size=size))
        for size in (1, 3, 64)
    ]
    assert torch.equal(heatmaps[0], heatmaps[1]) and torch.equal(heatmaps[0], heatmaps[2])


def test_an_ensemble_is_the_mean_in_the_common_order_of_channels() -> None:
    members = Member(TorchNetwork(Scale(1.0, 2.0))), Member(TorchNetwork(Scale(4.0, 8.0)), [1, 0])
    assert Ensemble(members)(torch.ones(1, 1, 1, 1, 1)).flatten().tolist() == [4.5, 3.0]
    heavier = members[0], Member(TorchNetwork(Scale(4.0, 8.0)), [1, 0], weight=3.0)
    assert Ensemble(heavier)(torch.ones(1, 1, 1, 1, 1)).flatten().tolist() == [6.25, 3.5]


class Ramp(nn.Module):
    """Adds a ramp along each axis, which no view of the tile leaves alone."""

    def forward(self, tiles: Tensor) -> Tensor:
        d, h, w = (torch.arange(side) for side in tiles.shape[2:])
        return tiles + d[:, None, None] + 10 * h[:, None] + 100 * w


def test_views_are_turned_back_and_averaged() -> None:
    tiles = torch.randn(2, 1, 3, 4, 4)
    network = TorchNetwork(Ramp())
    ramp = (network(tiles) - tiles)[0, 0]
    turned_back = {
        "flip_z": ramp.flip(0),
        "flip_y": ramp.flip(1),
        "flip_x": ramp.flip(2),
        "rot90": ramp.transpose(1, 2).flip(2),
        "rot180": ramp.flip(1, 2),
        "rot270": ramp.transpose(1, 2).flip(1),
    }
    for view, expected in turned_back.items():
        got = Ensemble([Member(network)], [view])(tiles)
        torch.testing.assert_close(got, tiles + (ramp + expected) / 2)
    got = Ensemble([Member(network)], list(get_args(View)))(tiles)
    torch.testing.assert_close(got, tiles + (ramp + sum(turned_back.values())) / 7)
    with pytest.raises(InputError, match=r"flip_z, flip_y.*'mirror'"):
        Ensemble([Member(network)], ["mirror"])  # type: ignore[list-item]


@given(data=st.data())
def test_predictions_in_slabs_of_any_depths_are_averaged(data: st.DataObject) -> None:
    depth = data.draw(st.integers(1, 12))
    whole = [torch.randn(2, depth, 3, 2) for _ in range(data.draw(st.integers(1, 3)))]
    weights = data.draw(st.lists(st.floats(0.1, 3), min_size=len(whole), max_size=len(whole)))

    def cut(heatmap: Tensor) -> Iterator[tuple[int, Tensor]]:
        z = 0
        while z < depth:
            d = data.draw(st.integers(1, depth - z))
            yield z, heatmap[:, z : z + d]
            z += d

    merged = list(merge_slabs([cut(heatmap) for heatmap in whole], weights))
    assert [z for z, _ in merged] == np.cumsum([0, *(slab.shape[1] for _, slab in merged[:-1])]).tolist()
    expected = sum(weight * heatmap for weight, heatmap in zip(weights, whole, strict=True)) / sum(weights)
    torch.testing.assert_close(torch.cat([slab for _, slab in merged], 1), expected)


def test_discarded_margins_leave_the_faces_to_mirrored_voxels() -> None:
    """A network that is wrong near the faces of its tile does no harm once they are discarded."""

    class WrongAtTheFaces(nn.Module):
        def forward(self, tiles: Tensor) -> Tensor:
            wrong = torch.full_like(tiles, 1000.0)
            wrong[:, :, 1:-1, 2:-2, 3:-3] = tiles[:, :, 1:-1, 2:-2, 3:-3]
            return wrong

    for shape in ((20, 30, 41), (5, 9, 7)):
        volume = random_volume(shape)
        options = InferenceOptions((8, 16, 16), (5, 9, 10), margin=(1, 2, 3))
        heatmap = predict_heatmap(volume, TorchNetwork(WrongAtTheFaces()), 1, options)
        np.testing.assert_allclose(heatmap[0], volume.array, atol=1e-6)
    with pytest.raises(InputError, match=r"infer\.margin"):
        InferenceOptions((8, 16, 16), (1, 1, 1), margin=(4, 0, 0))


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_batch_that_does_not_fit_is_halved(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    sizes = []

    class Tight(Scale):
        def forward(self, tiles: Tensor) -> Tensor:
            sizes.append(len(tiles))
            if len(tiles) > 2:
                raise error
            return super().forward(tiles)

    volume = random_volume((16, 32, 48))
    options = InferenceOptions((8, 16, 16), (8, 16, 16), batch_size=8)
    logging.getLogger("czii25d").propagate = True
    with caplog.at_level(logging.INFO):
        heatmap = predict_heatmap(volume, TorchNetwork(Tight(1.0)), 1, options)
    np.testing.assert_allclose(heatmap[0], volume.array, rtol=1e-6)
    assert sizes == [6, 3, *[1] * 12]
    assert caplog.messages and all("do not fit into memory" in message for message in caplog.messages)

    class Tiny(Scale):
        def forward(self, tiles: Tensor) -> Tensor:
            raise error

    with pytest.raises(InputError, match=r"infer.tile.*\(8, 16, 16\)"):
        predict_heatmap(volume, TorchNetwork(Tiny(1.0)), 1, options)


def test_other_errors_of_a_network_are_not_mistaken_for_memory() -> None:
    class Broken(nn.Module):
        def forward(self, tiles: Tensor) -> Tensor:
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        predict_heatmap(
            random_volume((8, 16, 16)), TorchNetwork(Broken()), 1, InferenceOptions((8, 16, 16), (8, 16, 16))
        )


def test_members_are_put_in_evaluation_mode_and_float32_comes_out() -> None:
    member = nn.Sequential(nn.Conv3d(1, 2, 1), nn.Dropout(0.5)).train()
    predictor = TorchNetwork(member, dtype=torch.bfloat16)
    tiles = torch.randn(2, 1, 3, 4, 5)
    assert predictor(tiles).dtype == torch.float32 and torch.equal(predictor(tiles), predictor(tiles))


@pytest.mark.parametrize("offset", [0.0, PUBLISHED_OFFSET_VOXEL])
def test_planted_particles_come_back_as_angstroms(offset: float) -> None:
    """From angstroms through volume, tiles, blending, peaks and offset back to angstroms, near faces too."""
    small = [(431.7, 92.3, 61.9), (123.4, 301.2, 187.6), (7.0, 3.0, 2.0)]
    large = [(303.3, 171.8, 98.2), (556.0, 350.0, 250.0)]
    shape = (24, 40, 57)
    centers = xyz_angstrom_to_zyx_voxel([*small, *large], SPACING) - offset  # such a network peaks off by that
    sigma = np.array([[30.0], [50.0]]) / SPACING
    drawn = render_heatmap(centers, [0, 0, 0, 1, 1], sigma, shape, 2)
    options = InferenceOptions((16, 32, 32), (8, 16, 16))
    picks = pick_volume(ArrayVolume(drawn[0] - drawn[1]), TorchNetwork(Split()), PARTICLES, options, SPACING, offset)
    assert list(picks.columns) == ["run", "particle", "x", "y", "z", "score"]
    for name, planted in (("small", small), ("large", large)):
        found = picks[picks["particle"] == name]
        assert len(found) == len(planted) and (np.diff(found["score"]) <= 0).all()
        distance = np.linalg.norm(found[["x", "y", "z"]].to_numpy()[:, None] - np.array(planted), axis=2)
        assert distance.min(0).max() < 1.0  # a tenth of a voxel, in angstrom


def test_a_run_without_peaks_has_an_empty_frame() -> None:
    volume = ArrayVolume(np.zeros((8, 16, 16), np.float32))
    picks = pick_volume(volume, TorchNetwork(Split()), PARTICLES, InferenceOptions((8, 16, 16), (8, 16, 16)), SPACING)
    assert len(picks) == 0 and list(picks.columns) == ["run", "particle", "x", "y", "z", "score"]


def test_the_nms_radius_is_in_angstrom_by_particle() -> None:
    of_default = InferenceOptions().nms_radius_voxel(PARTICLES, SPACING)
    np.testing.assert_allclose(of_default, NMS_RADIUS_FACTOR * np.array([[60.0], [100.0]]) / SPACING)
    of_one = InferenceOptions(nms_radius={"large": 33.0}).nms_radius_voxel(PARTICLES, SPACING)
    np.testing.assert_allclose(of_one, np.array([[NMS_RADIUS_FACTOR * 60], [33.0]]) / SPACING)
    np.testing.assert_allclose(InferenceOptions(nms_radius=20.0).nms_radius_voxel(PARTICLES, SPACING)[1, 0], 20 / 11)
    with pytest.raises(InputError, match="did you mean 'large'"):
        InferenceOptions(nms_radius={"larg": 33.0}).nms_radius_voxel(PARTICLES, SPACING)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stride", (0, 64, 64)),
        ("stride", (17, 64, 64)),
        ("window", "hann"),
        ("batch_size", 0),
        ("floor", 0.0),
        ("nms_radius", 0.0),
        ("nms_radius", {"small": -1.0}),
    ],
)
def test_impossible_options_name_their_key(key: str, value: object) -> None:
    with pytest.raises(InputError, match=f"key infer.{key}"):
        InferenceOptions(**{key: value})  # type: ignore[arg-type]
