from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from czii25d.data.augment import Augmentation
from czii25d.data.cache import choose_cache, host_memory, load_volumes
from czii25d.data.datamodule import TomogramDataModule, check_classes, split_runs
from czii25d.data.dataset import EpochSampler, Sampling, TileDataset
from czii25d.data.targets import HeatmapTarget, open_target
from czii25d.data.tiles import TileBatch, make_tiles
from czii25d.data.volumes import open_volume
from czii25d.errors import InputError
from czii25d.heatmap import render_heatmap
from czii25d.particles import load_particles
from czii25d.regions import Region

TILE = (8, 24, 20)
OFF = Augmentation(rotate_prob=0, flip_x_prob=0, contrast_prob=0)
RUNS = ("TS_5_4", "TS_69_2", "TS_6_4")


@pytest.fixture
def opened(prepared_dir: Path):
    output = prepared_dir / "output"
    volumes = [open_volume(output / "volumes/train" / run) for run in RUNS]
    targets = [open_target(output / f"heatmaps/{run}.zarr") for run in RUNS]
    return volumes, targets


def test_an_item_is_the_volume_and_the_heatmap_of_the_same_place(opened) -> None:
    volumes, targets = opened
    dataset = TileDataset(volumes, targets, TILE, Sampling("balanced", particle_prob=1.0), OFF)
    whole = [target.render((0, 0, 0), target.shape) for target in targets]
    seen = 0
    for key in range(12):
        image, heatmap = (part.numpy() for part in dataset[key])
        assert image.shape == (1, *TILE) and heatmap.shape == (6, *TILE)
        hits = [
            (run, start)
            for run, volume in enumerate(volumes)
            for start in np.argwhere(
                np.isclose(np.asarray(volume.data[:-7, :-23, :-19], np.float32), image[0, 0, 0, 0])
            )
            if np.allclose(volume.crop(tuple(int(i) for i in start), TILE), image[0])
        ]
        assert len(hits) == 1
        run, (z, y, x) = hits[0]
        np.testing.assert_allclose(heatmap, whole[run][:, z : z + 8, y : y + 24, x : x + 20], atol=1e-6)
        seen += heatmap.max() > 0.5
    assert seen > 6


def test_runs_of_several_spacings_are_refused_with_the_cure(prepared_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared_dir / "output", tmp_path / "output")
    meta = tmp_path / "output/volumes/train/TS_69_2/meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "voxel_spacing": [13.7, 13.7, 13.7]}))
    folders = tmp_path / "output/volumes/train", tmp_path / "output/heatmaps"
    with pytest.raises(
        InputError, match=r"run TS_69_2: expected the voxel spacing.*found.*13\.7.*resample_to=ANGSTROM"
    ):
        TomogramDataModule(*folders, RUNS, [], load_particles(), TILE, Sampling(), OFF)


@pytest.mark.parametrize(("kind", "tilt_range"), [("grid", 0.0), ("balanced", 0.0), ("balanced", 20.0)])
def test_tiles_are_cut_in_the_regions_and_what_is_outside_is_not_labelled(opened, kind: Any, tilt_range: float) -> None:
    volumes, targets = opened
    mask = np.zeros(volumes[1].shape, bool)
    mask[3:9, 4:12, 30:50] = True
    regions = [
        Region.of(volumes[0].shape, volumes[0].voxel_spacing, {"y": (0, 140)}),
        Region.of(volumes[1].shape, volumes[1].voxel_spacing, mask=mask),
        None,
    ]
    augmentation = Augmentation(rotate_prob=0.5, scale_range=0.2, tilt_range=tilt_range, contrast_prob=0)
    sampling = Sampling(kind, particle_prob=0.5, samples_per_epoch=40)
    dataset = TileDataset(volumes, targets, TILE, sampling, augmentation, regions=regions)
    whole = TileDataset(volumes, targets, TILE, sampling, augmentation)
    labelled = 0
    for key in range(40):
        rng = np.random.default_rng((0, 0, key))
        run, center = dataset._draw_center(key, rng)
        pose = augmentation.draw_pose(center, rng, volumes[run].voxel_spacing)
        heatmap = dataset[key][1].numpy()
        corners = np.stack(np.meshgrid(*(np.arange(side) for side in TILE), indexing="ij"), -1).reshape(-1, 3)
        z, y, x = np.rint(pose.to_tomogram(corners.astype(float), TILE)).astype(int).T
        if run == 2:
            expected = np.ones(TILE, bool)
        elif run == 0:
            inside = (z >= 0) & (z < 24) & (y >= 0) & (x >= 0) & (x < 56)
            expected = (inside & (y * volumes[0].voxel_spacing[1] < 140)).reshape(TILE)
        else:
            expected = ((z >= 3) & (z < 9) & (y >= 4) & (y < 12) & (x >= 30) & (x < 50)).reshape(TILE)
        for channel in heatmap:
            np.testing.assert_array_equal(np.isfinite(channel), expected)
        centers, sigma = pose.to_tile(targets[run].centers_zyx_voxel, TILE), targets[run].sigma_voxel / pose.scale
        rendered = render_heatmap(centers, targets[run].channels, sigma, TILE, 6)
        np.testing.assert_allclose(heatmap[:, expected], rendered[:, expected], atol=2e-3)
        labelled += expected.any()
    assert tilt_range or labelled == 40
    assert len(TileDataset(volumes, targets, TILE, Sampling("grid"), OFF, regions=regions)) < len(
        TileDataset(volumes, targets, TILE, Sampling("grid"), OFF)
    )
    assert not np.isnan(whole[0][1].numpy()).any()


def test_only_particles_in_the_region_are_tiles_cut_about(opened) -> None:
    volumes, targets = opened
    region = Region.of(volumes[0].shape, volumes[0].voxel_spacing, {"x": (300, None), "y": (150, None)})
    inside = region.contains(targets[0].picks()[["x", "y", "z"]])
    assert 0 < inside.sum() < len(inside)
    dataset = TileDataset(volumes[:1], targets[:1], TILE, Sampling("balanced", 1.0), OFF, regions=[region])
    centers = targets[0].centers_zyx_voxel[region.contains(targets[0].picks()[["x", "y", "z"]])]
    for index in range(20):
        _, middle = dataset._draw_center(index, np.random.default_rng(index))
        offsets = np.abs(centers - np.array(middle))
        assert (offsets <= np.array(TILE) / 2 + 1).all(1).any()


@pytest.mark.parametrize("out_of_plane", [{}, {"tilt_range": 20, "stretch_range": 0.2}])
def test_a_turned_tile_shows_its_particles_where_the_heatmap_says(opened, out_of_plane) -> None:
    """Planted blobs are dark: over many poses, the image is darkest where the heatmap peaks."""
    volumes, targets = opened
    augmentation = Augmentation(
        rotate_prob=1.0, scale_range=0.2, flip_x_prob=0.5, flip_z_prob=0.5, contrast_prob=0, **out_of_plane
    )
    dataset = TileDataset(volumes, targets, TILE, Sampling("balanced", particle_prob=1.0), augmentation)
    at_peaks, elsewhere = [], []
    for key in range(40):
        image, heatmap = (part.numpy() for part in dataset[key])
        mask = heatmap.max(0) > 0.8
        at_peaks.append(image[0][mask])
        elsewhere.append(image[0][heatmap.max(0) < 0.05])
    assert np.concatenate(at_peaks).mean() < np.concatenate(elsewhere).mean() - 1.5


def test_items_depend_on_seed_epoch_and_index_alone(opened) -> None:
    volumes, targets = opened
    make = lambda seed: TileDataset(volumes, targets, TILE, Sampling("grid"), Augmentation(), seed)  # noqa: E731
    one, same, other = make(1), make(1), make(2)
    same[0], same[5]  # reading others first changes nothing
    np.testing.assert_array_equal(one[3][0], same[3][0])
    assert not np.array_equal(one[3][0], other[3][0])
    assert not np.array_equal(one[3][0], one[3 + len(one)][0])


def test_normalisation_is_that_of_the_volume_and_contrast_comes_after(opened) -> None:
    volumes, targets = opened
    volumes = [replace(volume, normalization="global") for volume in volumes]
    dataset = TileDataset(volumes, targets, TILE, Sampling("grid"), replace(OFF, contrast_prob=1.0))
    rng = np.random.default_rng((0, 0, 7))
    run, center = dataset._draw_center(7, rng)
    dataset.augmentation.draw_pose(center, rng)
    change = dataset.augmentation.draw_intensity(rng)
    z, y, x = (int(c - (side - 1) / 2) for c, side in zip(center, TILE, strict=True))
    expected = volumes[run].crop((z, y, x), TILE) * change.gain + change.shift
    np.testing.assert_allclose(dataset[7][0][0], expected, atol=1e-4)
    assert (
        change.gain != 1
        and np.abs(volumes[run].crop((z, y, x), TILE) - volumes[run].data[z : z + 8, y : y + 24, x : x + 20]).max()
        > 0.1
    )


EVERYTHING = Augmentation(tilt_range=5, noise_prob=0.5, noise_tilt=60, wedge_prob=0.3, flip_z_prob=0.5, paste_prob=0.5)


def test_a_batch_is_its_items_wherever_it_is_made(opened) -> None:
    volumes, targets = opened
    dataset = TileDataset(volumes, targets, TILE, Sampling("balanced"), EVERYTHING)
    keys = [3, 40, 5, 111]
    expected = [torch.stack(parts) for parts in zip(*(dataset[key] for key in keys), strict=True)]
    in_memory = load_volumes(volumes, "host", torch.device("cpu"))
    for delivers in ("tiles", "boxes", "plans"):
        dataset.delivers = delivers
        batch = dataset.__getitems__(keys)
        if isinstance(batch, TileBatch):
            assert MixedPrecision("bf16-mixed", "cpu").convert_input(batch) is batch, "Lightning leaves it as it is"
            batch = make_tiles(batch, in_memory if delivers == "plans" else [])
        for own, part in zip(batch, expected, strict=True):
            torch.testing.assert_close(own, part, atol=2e-4, rtol=0)


def test_tiles_are_cut_from_every_reconstruction_alike(opened) -> None:
    volumes, targets = opened
    others = [[replace(volume, data=volume.data + np.float16(100 * (n + 1))) for n in range(2)] for volume in volumes]
    plain = TileDataset(volumes, targets, TILE, Sampling("grid"), OFF)
    dataset = TileDataset(volumes, targets, TILE, Sampling("grid"), OFF, others=others)
    added = []
    for key in range(60):
        (own, own_heatmap), (image, heatmap) = plain[key], dataset[key]
        torch.testing.assert_close(own_heatmap, heatmap)
        added.append(round(float((image - own).mean()) / 100))
        torch.testing.assert_close(image - 100 * added[-1], own, atol=0.1, rtol=0)
    assert min(np.bincount(added, minlength=3)) > 10


def test_a_reconstruction_that_01_did_not_make_names_the_command(prepared_dir: Path) -> None:
    with pytest.raises(InputError, match=r"data\.reconstructions.*TS_5_4.*more_reconstructions=\[wbp\]"):
        make_module(prepared_dir, reconstructions=["wbp"])


def test_a_dataset_travels_without_its_voxels(opened) -> None:
    volumes, targets = opened
    dataset = TileDataset(volumes, targets, TILE, Sampling(), EVERYTHING)
    dataset.voxels = load_volumes(volumes, "host", torch.device("cpu"))
    sent = pickle.dumps(dataset)
    assert len(sent) < volumes[0].data.nbytes
    torch.testing.assert_close(pickle.loads(sent)[4][0], dataset[4][0])


GB = 10**9


@pytest.mark.parametrize(
    ("wanted", "size", "free_on_gpu", "memory", "chosen", "why"),
    [
        ("auto", GB, None, 8 * GB, "disk", None),
        ("auto", GB, 24 * GB, 8 * GB, "device", None),
        ("auto", 8 * GB, 24 * GB, 64 * GB, "host", "(8.0 GB) would take more than a quarter of the GPU's free 24.0 GB"),
        ("auto", 8 * GB, 24 * GB, 8 * GB, "disk", "a quarter of the GPU's free 24.0 GB and half of the machine's"),
        ("host", 8 * GB, 24 * GB, 8 * GB, "host", None),
        ("device", 8 * GB, 24 * GB, 8 * GB, "device", None),
        ("device", 8 * GB, 6 * GB, 64 * GB, "host", "(8.0 GB) would take more than all of the GPU's free 6.0 GB"),
        ("device", 8 * GB, 6 * GB, 8 * GB, "disk", "all of the GPU's free 6.0 GB and half of the machine's memory"),
        ("device", GB, None, 8 * GB, "disk", "there is no GPU"),
    ],
)
def test_volumes_lie_where_there_is_room_and_the_reason_is_said(wanted, size, free_on_gpu, memory, chosen, why) -> None:
    cache, said = choose_cache(wanted, size, free_on_gpu, memory)
    assert cache == chosen
    assert said is None if why is None else why in said


def test_an_unknown_cache_is_refused() -> None:
    with pytest.raises(InputError, match=r"data\.cache.*auto, device, host, disk"):
        choose_cache("ram", 0, None, 0)  # type: ignore[arg-type]


def test_a_gpu_that_is_full_after_all_leaves_the_volumes_where_they_are(
    prepared_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Free memory in pieces is found out by trying only; no GPU here, so what it answers is stood in for."""
    data = make_module(prepared_dir)

    def load(volumes, cache, device):
        if cache == "device":
            raise torch.OutOfMemoryError("in pieces")
        return load_volumes(volumes, cache, device)

    monkeypatch.setattr("czii25d.data.datamodule.load_volumes", load)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GB, 12 * GB))
    monkeypatch.setattr(logging.getLogger("czii25d"), "propagate", True)
    with caplog.at_level("INFO"):
        data.move_to(torch.device("cuda"))
    assert data.dataset.delivers == "boxes" and "data.cache=host: the volumes" in caplog.text


def test_memory_is_what_the_cgroup_grants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("czii25d.data.cache.CGROUPS", tmp_path)
    machine = host_memory()
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory() == machine
    (tmp_path / "memory.max").write_text("123456\n")
    assert host_memory() == 123456


def test_grid_is_the_published_half_overlapping_one(opened) -> None:
    volumes, targets = opened
    dataset = TileDataset(volumes, targets, (16, 24, 20), Sampling("grid"), OFF)
    # (24, 40, 56) by 16x24x20 with half overlap: 2 x 3 x 5 (the last tiles end flush), for three runs
    assert len(dataset) == 3 * 2 * 3 * 5


def test_short_epochs_go_through_the_whole_grid(opened) -> None:
    volumes, targets = opened
    whole = TileDataset(volumes, targets, (16, 24, 20), Sampling("grid"), OFF)
    short = TileDataset(volumes, targets, (16, 24, 20), Sampling("grid", samples_per_epoch=7), OFF)
    tiles = len(whole)
    assert len(short) == 7 and tiles > 5 * 7
    for number in range(3):
        keys = range(number * tiles, (number + 1) * tiles)
        seen = [short._grid_tile(key) for key in keys]
        assert sorted(seen) == sorted(whole._grid), "each tile once in every pass"
        assert len({run for run, _ in seen[:7]}) > 1, "an epoch is not of one tomogram alone"
    orders = [[short._grid_tile(number * tiles + i) for i in range(tiles)] for number in range(2)]
    assert orders[0] != orders[1], "another order in every pass"
    again = TileDataset(volumes, targets, (16, 24, 20), Sampling("grid", samples_per_epoch=7), OFF)
    assert again._grid_tile(2 * tiles + 3) == short._grid_tile(2 * tiles + 3), "whatever was asked for before"


def test_balanced_sampling_shows_each_class_alike(opened) -> None:
    volumes, targets = opened
    dataset = TileDataset(volumes, targets, TILE, Sampling("balanced", particle_prob=1.0), OFF)
    counts = np.zeros(6)
    for key in range(240):
        run, center = dataset._draw_center(key, np.random.default_rng(key))
        low = np.array(center) - (np.array(TILE) - 1) / 2
        inside = ((targets[run].centers_zyx_voxel >= low - 0.5) & (targets[run].centers_zyx_voxel < low + TILE)).all(1)
        counts += np.bincount(targets[run].channels[inside], minlength=6) > 0
    assert counts.min() > 20, counts


def test_volume_without_picks_can_be_trained_on(opened) -> None:
    volumes, targets = opened
    empty = HeatmapTarget(**{**vars(targets[0]), "centers_zyx_voxel": np.empty((0, 3)), "channels": np.empty(0, int)})
    dataset = TileDataset(volumes[:1], [empty], TILE, Sampling("balanced"), OFF)
    assert dataset[0][1].abs().sum() == 0


def test_processes_share_an_epoch_without_overlap() -> None:
    shares = []
    for rank in range(3):
        sampler = EpochSampler(20, seed=1, rank=rank, world_size=3)
        sampler.set_epoch(4)
        share = list(sampler)
        assert len(share) == len(sampler) == 6
        shares += share
    assert len(set(shares)) == 18 and all(80 <= key < 100 for key in shares)
    sampler = EpochSampler(20, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    assert sorted(first) == list(range(20)) != first
    assert [key - 20 for key in sampler] != first


def test_a_fold_is_a_named_run() -> None:
    assert split_runs(RUNS, 2) == (["TS_5_4", "TS_69_2"], ["TS_6_4"])
    assert split_runs(RUNS, "TS_69_2") == (["TS_5_4", "TS_6_4"], ["TS_69_2"])
    assert split_runs(RUNS, ["TS_5_4", "TS_6_4"]) == (["TS_69_2"], ["TS_5_4", "TS_6_4"])
    assert split_runs(RUNS, 0, train_all=True) == (list(RUNS), [])


@pytest.mark.parametrize(
    ("names", "fold", "message"),
    [
        (RUNS, 3, r"fold_id.*0 to 2.*found 3"),
        (RUNS, -1, r"fold_id.*0 to 2.*found -1"),
        (RUNS, "TS_6_5", r"TS_6_5.*did you mean"),
        (RUNS, list(RUNS), "left to train on"),
        (("a", "b", "a"), 0, r"data\.runs.*twice"),
    ],
)
def test_impossible_folds_are_refused(names, fold, message) -> None:
    with pytest.raises(InputError, match=message):
        split_runs(names, fold)


def make_module(prepared_dir: Path, particles=None, **changes) -> TomogramDataModule:
    output = prepared_dir / "output"
    arguments = {
        "train_runs": RUNS[:2],
        "held_out_runs": RUNS[2:],
        "particles": particles or load_particles(),
        "tile_shape": TILE,
        "sampling": Sampling(),
        "augmentation": OFF,
        "batch_size": 4,
    }
    return TomogramDataModule(output / "volumes/train", output / "heatmaps", **{**arguments, **changes})


def test_loaders_give_batches_and_whole_tomograms(prepared_dir: Path) -> None:
    data = make_module(prepared_dir)
    image, heatmap = next(iter(data.train_dataloader()))
    assert image.shape == (4, 1, *TILE) and heatmap.shape == (4, 6, *TILE)
    assert list(data.val_dataloader()) == [0]
    assert data.held_out[0][1].run == "TS_6_4"


@pytest.mark.parametrize("cache", ["host", "disk", "device"])
def test_workers_and_caches_change_nothing(prepared_dir: Path, cache: str) -> None:
    plain, other = make_module(prepared_dir), make_module(prepared_dir, num_workers=2, cache=cache)
    other.move_to(torch.device("cpu"))
    for one, two in zip(plain.train_dataloader(), other.train_dataloader(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_class_count_that_differs_from_02_is_refused(prepared_dir: Path) -> None:
    with pytest.raises(InputError, match=r"class_num=5"):
        make_module(prepared_dir, particles=load_particles().first(5))


def test_missing_steps_name_the_script(prepared_dir: Path) -> None:
    with pytest.raises(InputError, match=r"01_create_dataset\.py"):
        make_module(prepared_dir, train_runs=("TS_nowhere",))


def test_particles_without_picks_are_an_error(opened) -> None:
    volumes, targets = opened
    particles = load_particles()
    ribosome = particles.names.index("ribosome")

    def without(target: HeatmapTarget) -> HeatmapTarget:
        keep = target.channels != ribosome
        return replace(target, centers_zyx_voxel=target.centers_zyx_voxel[keep], channels=target.channels[keep])

    def present(used: Sequence[HeatmapTarget]) -> set[int]:
        return TileDataset(volumes[: len(used)], used, TILE, Sampling("grid"), OFF).present_channels

    check_classes(present([targets[0], without(targets[1])]), particles)
    with pytest.raises(InputError, match=r"picks of each of the 6 particles.*found none of ribosome; hold out another"):
        check_classes(present([without(target) for target in targets]), particles)
