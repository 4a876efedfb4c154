"""Resampling: values stay where they are in angstrom, what voxels cannot hold is left out, and picks are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial import cKDTree
from torch import Tensor, nn
from torch.nn import functional

from czii25d.data.volumes import open_volume
from czii25d.errors import InputError
from czii25d.models import ARCHITECTURES
from czii25d.models.checkpoint import ModelCard, save_weights
from czii25d.particles import Particle, ParticleSet, conf_dir
from czii25d.picker import Picker
from czii25d.pipeline import predict as predict_module
from czii25d.pipeline.dataset import create_dataset
from czii25d.pipeline.predict import predict
from czii25d.resampling import is_same_spacing, resample_planes, resampled_shape

SPACINGS = st.tuples(*[st.floats(5.0, 20.0)] * 3)


def resample(volume: np.ndarray, old: Any, new: Any) -> np.ndarray:
    asked = []

    def planes(start: int, stop: int) -> np.ndarray:
        asked.append((start, stop))
        return volume[start:stop]

    result = np.stack(list(resample_planes(planes, volume.shape, old, new)))
    assert [start for start, _ in asked] == [0, *(stop for _, stop in asked[:-1])], "each plane once, in order"
    assert result.shape == resampled_shape(volume.shape, old, new) and result.dtype == np.float32
    return result


def places(shape: tuple[int, ...], spacing: Any) -> list[np.ndarray]:
    return np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij", sparse=True)


@settings(max_examples=40)
@given(SPACINGS, SPACINGS, st.integers(0, 99))
def test_a_slow_wave_is_the_same_at_every_angstrom(old: Any, new: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(int(320 // side) for side in old)
    waves = [(rng.normal(0, 1, 3), rng.uniform(0, 2 * np.pi)) for _ in range(3)]

    def field(spacing: Any, shape: Any) -> np.ndarray:
        z, y, x = places(shape, spacing)
        turns = [2 * np.pi / 160 / np.linalg.norm(k) * (k[0] * z + k[1] * y + k[2] * x) for k, _ in waves]
        return sum(np.cos(turn + phase) for turn, (_, phase) in zip(turns, waves, strict=True)).astype(np.float32)

    found = resample(field(old, shape), old, new)
    inner = tuple(slice(int(70 / side) + 1, -int(70 / side) - 1) for side in new)  # the faces are mirrored
    error = (found - field(new, found.shape))[inner]
    assert error.size and np.abs(error).max() < 0.06


@given(SPACINGS, SPACINGS)
@settings(max_examples=20)
def test_a_constant_stays_and_all_voxels_lie_inside(old: Any, new: Any) -> None:
    volume = np.full((9, 14, 11), 3.5, np.float32)
    found = resample(volume, old, new)
    np.testing.assert_allclose(found, 3.5, rtol=1e-5)
    last_old, last_new = (np.subtract(v.shape, 1) * s for v, s in ((volume, old), (found, new)))
    assert (last_new <= last_old + 1e-4).all() and (last_new + np.array(new) > last_old - 1e-4).all()


def test_what_coarser_voxels_cannot_hold_is_left_out_not_folded() -> None:
    shape, old, new = (40, 41, 43), (7.84,) * 3, (13.7,) * 3
    z, y, x = places(shape, old)
    fast = (np.cos(2 * np.pi * x / 19) + 0 * y + 0 * z).astype(np.float32)  # finer than 2 x 13.7
    inner = (slice(5, -5),) * 3
    kept = resample(fast, old, new)[inner]
    assert kept.std() < 0.03 * fast.std()
    assert np.interp(np.arange(24) * 13.7, np.arange(43) * 7.84, fast[0, 0]).std() > 0.5 * fast.std()


def test_the_same_spacing_changes_nothing() -> None:
    volume = np.random.default_rng(0).random((5, 6, 7), np.float32)
    np.testing.assert_array_equal(resample(volume, (10.0, 9.0, 8.0), (10.0, 9.0, 8.0)), volume)
    assert is_same_spacing((10.0, 9.0, 8.0), (10.005, 9.0, 8.0))
    assert not is_same_spacing((10.0, 9.0, 8.0), (10.0, 9.2, 8.0))


# ---- the same picks at every spacing ---------------------------------------------------------------------------------

PARTICLES = ParticleSet([Particle("small", 60.0), Particle("large", 120.0)])
KNOWN = (10.0, 10.0, 10.0)
SIGMAS = {"small": 22.0, "large": 50.0}
EXTENT = np.array([400.0, 900.0, 1000.0])  # z, y, x


class BlobNetwork(nn.Module):
    """A network without training: it smooths by the particles' widths, at the voxels it knows, and subtracts."""

    def __init__(
        self,
        class_num: int,
        img_depth: int,
        img_size: int,
        backbone: str = "none",
        in_channels: int = 1,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        for name, sigma in SIGMAS.items():
            profile = torch.exp(-0.5 * (torch.arange(-12.0, 13.0) * KNOWN[0] / sigma).square())
            self.register_buffer(name, profile / profile.sum())

    def forward(self, tiles: Tensor) -> Tensor:
        small, large = (self._smooth(-tiles, profile) for profile in (self.small, self.large))
        # A blob of width s keeps (s^2 / (s^2 + t^2))^1.5 of its height under the width t. Of the other kind, nothing is
        # left: a small blob keeps 0.354 and 0.065, a large one 0.767 and 0.354.
        return torch.cat([small - 2.2 * large, large - 0.19 * small], 1).clamp_min(0) * 0.5

    def _smooth(self, tiles: Tensor, profile: Tensor) -> Tensor:
        for axis in range(3):
            shape = [1, 1, 1, 1, 1]
            shape[2 + axis] = len(profile)
            padding = [0, 0, 0]
            padding[axis] = len(profile) // 2
            tiles = functional.conv3d(tiles, profile.view(shape), padding=padding)
        return tiles


def truth() -> pd.DataFrame:
    rows = [(180, 640, 230, 1), (620, 210, 180, 1), (800, 700, 150, 1)]
    rows += [(240, 180, 110, 0), (420, 420, 260, 0), (880, 330, 280, 0), (500, 790, 190, 0), (120, 380, 300, 0)]
    return pd.DataFrame(
        [(PARTICLES.names[kind], x + 3.3, y + 1.7, z + 0.9) for x, y, z, kind in rows], columns=["particle", *"xyz"]
    )


def tomogram(spacing: float, protein: str = "dark") -> np.ndarray:
    """Blobs, drawn at that spacing, in noise of equal strength per angstrom."""
    z, y, x = places(tuple(int(side / spacing) + 1 for side in EXTENT), (spacing,) * 3)
    volume = np.random.default_rng(5).normal(0, 0.1 * (10 / spacing) ** 1.5, (z + y + x).shape)
    for row in truth().itertuples():
        sigma = SIGMAS[str(row.particle)]
        volume -= np.exp(-((z - row.z) ** 2 + (y - row.y) ** 2 + (x - row.x) ** 2) / (2 * sigma**2))
    return (volume if protein == "dark" else -volume).astype(np.float32) * 3 + 7


def assert_found(picks: pd.DataFrame) -> None:
    """All particles within a tenth of their radius, and nothing else."""
    assert picks["particle"].value_counts().to_dict() == {"small": 5, "large": 3}, picks
    for particle in PARTICLES:
        own, there = (frame.loc[frame["particle"] == particle.name, ["x", "y", "z"]] for frame in (picks, truth()))
        distances, which = cKDTree(own).query(there)
        assert distances.max() < 0.1 * particle.radius and len(set(which)) == len(there)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Blobs at three spacings, and the network that knows one of them."""
    monkeypatch.setitem(ARCHITECTURES, "blobs", BlobNetwork)
    monkeypatch.chdir(tmp_path)
    model = {"arch": "blobs", "backbone": "none", "in_channels": 1, "class_num": 2, "img_depth": 32, "img_size": 64}
    card = ModelCard(model, PARTICLES.to_config(), KNOWN, thresholds={"small": 0.4, "large": 0.4})
    save_weights("blobs.safetensors", BlobNetwork(2, 32, 64), card)
    for spacing in (7.84, 10.0, 13.7):
        np.save(f"at_{spacing}.npy", tomogram(spacing))
    rows = [f"TS_{spacing:g},at_{spacing}.npy,{spacing}" for spacing in (7.84, 10.0, 13.7)]
    Path("tomograms.csv").write_text("\n".join(["run,tomogram,voxel_spacing", *rows]))
    return tmp_path


def compose(name: str, *overrides: str) -> Any:
    with hydra.initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        return hydra.compose(name, [*overrides])


def run_predict(*overrides: str) -> pd.DataFrame:
    keys = "checkpoints=blobs.safetensors", "infer.runtime=torch", "infer.floor=0.2", "infer.margin=[8,8,8]"
    return predict(compose("predict", *keys, *overrides))


def test_the_same_particles_are_found_at_every_spacing(work: Path) -> None:
    straight = run_predict("tomograms=tomograms.csv")
    assert set(straight["run"]) == {"TS_7.84", "TS_10", "TS_13.7"}
    for _, own in straight.groupby("run"):
        assert_found(own)
    assert not list(Path("output/predictions/.volumes").iterdir())
    create_dataset(compose("create_dataset", "mode=test", "tomograms=tomograms.csv"))
    prepared = run_predict("predictions=prepared", "source=volumes")
    pd.testing.assert_frame_equal(prepared, straight, atol=0.2, rtol=0)  # rounded to float16 once more
    assert not list(Path("prepared/.volumes").iterdir())
    picker = Picker.load("blobs.safetensors", runtime="torch", floor=0.2, margin=(8, 8, 8))
    for spacing in (7.84, 13.7):
        found = picker.pick(np.load(f"at_{spacing}.npy"), spacing)
        expected = straight[straight["run"] == f"TS_{spacing:g}"].reset_index(drop=True)
        np.testing.assert_allclose(found[["x", "y", "z"]], expected[["x", "y", "z"]], atol=2e-3)
        heatmap = picker.heatmap(np.load(f"at_{spacing}.npy"), spacing)
        best = found.iloc[found.loc[found["particle"] == "large", "score"].argmax()]
        assert heatmap.shape[0] == 2 and np.subtract(heatmap.shape[1:], EXTENT / 10).max() <= 1
        large = found[found["particle"] == "large"].iloc[0]
        top = np.unravel_index(heatmap[1].argmax(), heatmap.shape[1:])
        np.testing.assert_allclose(np.array(top)[::-1] * picker.voxel_spacing, large[["x", "y", "z"]].tolist(), atol=8)
        assert best["score"] <= heatmap.max() + 1e-6


def test_a_region_holds_in_the_tomograms_own_voxels(work: Path) -> None:
    mask = np.zeros(tomogram(13.7).shape, np.uint8)
    mask[:, :, : round(510 / 13.7)] = 1
    np.save("mask.npy", mask)
    found = run_predict("tomograms=tomograms.csv", "runs=TS_13.7", "regions={TS_13.7: {mask: mask.npy}}")
    whole = run_predict("tomograms=tomograms.csv", "runs=TS_13.7", "predictions=whole")
    expected = whole[np.floor(whole["x"] / 13.7 + 0.5) < round(510 / 13.7)]
    assert 3 < len(expected) < 8
    pd.testing.assert_frame_equal(found, expected.reset_index(drop=True))


def test_01_brings_tomograms_to_one_spacing(work: Path) -> None:
    keys = "mode=train", "tomograms=tomograms.csv", "resample_to=10"
    volumes = {volume.name: volume for volume in create_dataset(compose("create_dataset", *keys))}
    assert {volume.voxel_spacing for volume in volumes.values()} == {(10.0, 10.0, 10.0)}
    reference = ndimage.gaussian_filter(tomogram(10.0), 2.0)
    for volume in volumes.values():
        d, h, w = volume.shape
        own = volume.planes(0, d)
        smooth = ndimage.gaussian_filter(own, 2.0)  # of each, the noise is another
        inner = (slice(3, d - 3), slice(3, h - 3), slice(3, w - 3))
        assert np.corrcoef(smooth[inner].ravel(), reference[inner].ravel())[0, 1] > 0.97
        assert abs(own.mean()) < 1e-3 and own.std() == pytest.approx(1, abs=1e-3)
    assert [path.name for path in Path("output/volumes/train").iterdir() if path.name.startswith(".")] == []
    before = {name: (volume.folder / "volume.npy").stat().st_mtime_ns for name, volume in volumes.items()}
    again = create_dataset(compose("create_dataset", *keys))
    assert {volume.name: (volume.folder / "volume.npy").stat().st_mtime_ns for volume in again} == before
    create_dataset(compose("create_dataset", *keys[:2], "resample_to=[12,10,10]"))
    assert open_volume("output/volumes/train/TS_13.7").voxel_spacing == (12.0, 10.0, 10.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["infer.rescale=never"],
            r"TS_7\.84: expected the voxel spacing.*10 x 10 x 10.*found 7\.84 .*infer\.rescale=auto",
        ),
        (["infer.rescale_limit=1.2"], r"TS_7\.84: .*by a factor of at most 1\.2, found 7\.84.*see that it is right"),
        (["voxel_spacing=1", "tomograms=at_10.0.npy"], r"at_10\.0: .*a factor of at most 2, found 1 x 1 x 1 angstrom"),
        (["infer.rescale=maybe"], r"key infer\.rescale: expected auto or never, found 'maybe'"),
        (["contrast=light"], r"key contrast: expected dark, bright, auto, found 'light'"),
    ],
)
def test_spacings_that_are_too_far_are_refused(work: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        run_predict("tomograms=tomograms.csv", *overrides)
    assert "\n" not in str(caught.value)


def test_a_spacing_of_nothing_is_refused_by_01(work: Path) -> None:
    with pytest.raises(InputError, match=r"key resample_to: expected a voxel spacing above 0"):
        create_dataset(compose("create_dataset", "tomograms=tomograms.csv", "resample_to=0"))


# ---- contrast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contrast", ["bright", "auto"])
def test_bright_protein_is_picked_as_dark_is(
    work: Path, contrast: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save("bright.npy", tomogram(10.0, "bright"))
    monkeypatch.setattr(predict_module.logger.parent, "propagate", True)
    caplog.set_level("INFO")
    expected = run_predict("tomograms=at_10.0.npy", "voxel_spacing=10")
    assert_found(expected)
    found = run_predict("tomograms=bright.npy", "voxel_spacing=10", f"contrast={contrast}", "predictions=b")
    np.testing.assert_allclose(found[["x", "y", "z"]], expected[["x", "y", "z"]], atol=0.2)
    said = [message for message in caplog.messages if "protein is bright" in message]
    assert len(said) == (contrast == "auto") and all("skewness +" in message for message in said)
    create_dataset(
        compose("create_dataset", "mode=test", "tomograms=bright.npy", "voxel_spacing=10", "contrast=bright")
    )
    prepared = run_predict("source=volumes", "predictions=c")
    np.testing.assert_allclose(prepared[["x", "y", "z"]], expected[["x", "y", "z"]], atol=0.2)
    picker = Picker.load("blobs.safetensors", runtime="torch", floor=0.2, margin=(8, 8, 8))
    assert_found(picker.pick("bright.npy", 10, contrast=contrast))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"key contrast: expected dark, as protein is in all volumes.*'bright'"):
        run_predict("source=volumes", "contrast=bright")


def test_nothing_is_inverted_unasked_but_a_doubt_is_said(
    work: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save("bright.npy", tomogram(10.0, "bright"))
    monkeypatch.setattr(predict_module.logger.parent, "propagate", True)
    found = run_predict("tomograms=bright.npy", "voxel_spacing=10", "thresholds=0.3")
    assert found.empty or cKDTree(found[["x", "y", "z"]]).query(truth()[["x", "y", "z"]])[0].min() > 30
    [said] = [message for message in caplog.messages if "seems bright" in message]
    assert said.startswith("run bright: taken as it is") and "give contrast=bright" in said
    caplog.clear()
    run_predict("tomograms=at_10.0.npy", "voxel_spacing=10", "contrast=auto")
    noise = np.random.default_rng(0).normal(0, 1, (40, 90, 100)).astype(np.float32)
    np.save("noise.npy", noise)
    with pytest.raises(InputError, match=r"noise: expected a density whose skewness tells.*set contrast=dark or"):
        run_predict("tomograms=noise.npy", "voxel_spacing=10", "contrast=auto")


def test_a_network_of_bright_protein_gets_bright_protein(work: Path) -> None:
    model = {"arch": "blobs", "backbone": "none", "in_channels": 1, "class_num": 2, "img_depth": 32, "img_size": 64}

    class Inverted(BlobNetwork):
        def forward(self, tiles: Tensor) -> Tensor:
            return super().forward(-tiles)

    ARCHITECTURES["blobs"] = Inverted
    card = ModelCard(model, PARTICLES.to_config(), KNOWN, thresholds={"small": 0.4, "large": 0.4}, contrast="bright")
    save_weights("blobs.safetensors", Inverted(2, 32, 64), card)
    assert_found(run_predict("tomograms=at_10.0.npy", "voxel_spacing=10"))
    create_dataset(compose("create_dataset", "mode=test", "tomograms=at_13.7.npy", "voxel_spacing=13.7"))
    assert_found(run_predict("source=volumes", "predictions=volumes"))
