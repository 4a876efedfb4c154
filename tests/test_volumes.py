from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from czii25d.data.volumes import GLOBAL_MEAN, GLOBAL_STD, open_volume, read_meta, write_volume
from czii25d.errors import InputError

SHAPE = (24, 40, 56)
SPACING = (13.0, 11.0, 7.0)
RAW = np.random.default_rng(0).normal(5e-8, 7e-6, SHAPE).astype(np.float32)
RAW += np.linspace(0, 1e-5, SHAPE[0], dtype=np.float32)[:, None, None]  # planes differ in their means


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volumes") / "TS_5_4"
    write_volume(folder, RAW, SPACING, {"tomogram": "denoised.zarr"})
    return folder


def test_what_is_written_is_what_is_opened(folder: Path) -> None:
    volume = open_volume(folder)
    assert volume.name == "TS_5_4" and volume.voxel_spacing == SPACING
    assert volume.mean == pytest.approx(RAW.mean(dtype=np.float64), rel=1e-9)
    assert volume.std == pytest.approx(RAW.std(dtype=np.float64), rel=1e-9)
    assert isinstance(volume.data, np.memmap) and volume.data.dtype == np.float16 and volume.data.shape == SHAPE
    np.testing.assert_allclose(volume.data, (RAW.astype(float) - volume.mean) / volume.std, rtol=1e-3, atol=1e-5)
    assert abs(volume.data.mean(dtype=float)) < 1e-4 and volume.data.std(dtype=float) == pytest.approx(1, abs=1e-4)
    assert read_meta(folder)["source"] == {"tomogram": "denoised.zarr"}
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "volume.npy"]


def test_a_large_mean_does_no_harm(tmp_path: Path) -> None:
    raw = (RAW / 7e-6 + 3e4).astype(np.float32)
    meta = write_volume(tmp_path / "run", raw, SPACING, {})
    assert meta["std"] == pytest.approx(raw.std(dtype=np.float64), rel=1e-9)
    np.testing.assert_allclose(
        open_volume(tmp_path / "run").data,
        (raw.astype(float) - meta["mean"]) / meta["std"],
        rtol=2e-3,
        atol=5e-3,
    )


@given(st.data())
def test_crop_is_that_part(folder: Path, data: st.DataObject) -> None:
    start = tuple(data.draw(st.integers(0, side - 1)) for side in SHAPE)
    shape = tuple(data.draw(st.integers(1, side - a)) for a, side in zip(start, SHAPE, strict=True))
    volume = open_volume(folder)
    crop = volume.crop(start, shape)
    assert crop.dtype == np.float32 and crop.flags.c_contiguous and crop.flags.writeable
    place = tuple(slice(a, a + side) for a, side in zip(start, shape, strict=True))
    np.testing.assert_array_equal(crop, volume.data[place].astype(np.float32))


def test_crop_is_a_copy(folder: Path) -> None:
    crop = open_volume(folder).crop((0, 0, 0), SHAPE)
    crop[:] = 9
    assert open_volume(folder).crop((0, 0, 0), SHAPE).max() < 9


@pytest.mark.parametrize(
    ("start", "shape"), [((-1, 0, 0), (2, 2, 2)), ((0, 39, 0), (2, 2, 2)), ((0, 0, 0), (24, 40, 57))]
)
def test_crop_stays_inside(folder: Path, start: tuple, shape: tuple) -> None:
    with pytest.raises(ValueError, match="not inside"):
        open_volume(folder).crop(start, shape)


def test_global_normalisation_uses_the_published_constants(folder: Path) -> None:
    crop = open_volume(folder, "global").crop((3, 5, 7), (4, 6, 8))
    expected = (RAW[3:7, 5:11, 7:15].astype(float) - GLOBAL_MEAN) / GLOBAL_STD
    np.testing.assert_allclose(crop, expected, rtol=2e-3, atol=2e-3)
    with pytest.raises(InputError, match=r"normalization.*'none'"):
        open_volume(folder, "none")  # type: ignore[arg-type]


def test_other_processes_get_the_path_and_not_the_voxels(folder: Path) -> None:
    volume = open_volume(folder, "global")
    sent = pickle.dumps(volume)
    assert len(sent) < 1000
    again = pickle.loads(sent)
    assert isinstance(again.data, np.memmap)
    np.testing.assert_array_equal(again.crop((1, 2, 3), (4, 5, 6)), volume.crop((1, 2, 3), (4, 5, 6)))


def damage(folder: Path, how: str) -> None:
    voxels, meta = folder / "volume.npy", folder / "meta.json"
    if how == "truncated":
        voxels.write_bytes(voxels.read_bytes()[:-100])
    elif how == "no voxels":
        voxels.unlink()
    elif how == "empty":
        voxels.write_bytes(b"")
    elif how == "pickle":
        np.save(voxels, np.array([{}], object), allow_pickle=True)
    elif how == "other type":
        np.save(voxels, RAW)
    elif how == "other shape":
        np.save(voxels, RAW[:3].astype(np.float16))
    elif how == "malformed":
        meta.write_text("{")
    elif how == "other version":
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "format_version": 99}))
    elif how == "no mean":
        meta.write_text(json.dumps({k: v for k, v in json.loads(meta.read_text()).items() if k != "mean"}))
    else:
        meta.write_text("[]")


@pytest.mark.parametrize(
    "how",
    [
        *("truncated", "no voxels", "empty", "pickle", "other type", "other shape"),
        *("malformed", "other version", "no mean", "no object"),
    ],
)
def test_damage_says_run_01_again(tmp_path: Path, how: str) -> None:
    write_volume(tmp_path / "run", RAW, SPACING, {})
    damage(tmp_path / "run", how)
    with pytest.raises(InputError, match=r"run 01_create_dataset\.py again") as caught:
        open_volume(tmp_path / "run")
    assert str(tmp_path / "run") in str(caught.value)


def test_missing_volume_says_run_01_first(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run 01_create_dataset\.py first"):
        open_volume(tmp_path / "run")
