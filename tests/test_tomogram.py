from __future__ import annotations

import copy
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from czii25d.data.tomogram import describe_source, open_tomogram, read_volume
from czii25d.errors import InputError

SHAPE = (24, 40, 56)
SPACING = [10.012444196428572, 10.012444196428572, 10.012444537618887]
VOLUME = np.random.default_rng(0).normal(5e-8, 7e-6, SHAPE).astype(np.float32)
COMPRESSORS: dict[str, tuple[int, Any]] = {
    "v2-auto": (2, "auto"),
    "v2-none": (2, None),
    "v3-auto": (3, "auto"),
    "v3-none": (3, None),
    "v3-blosc": (3, zarr.codecs.BloscCodec()),
    "v3-gzip": (3, zarr.codecs.GzipCodec()),
}


def multiscales(spacing: Any = SPACING, unit: Any = "angstrom", axes: str = "zyx", levels: int = 1) -> list[dict]:
    scales = [[side * 2**level for side in spacing] if spacing else None for level in range(levels)]
    return [
        {
            "axes": [{"name": name, "type": "space", **({"unit": unit} if unit else {})} for name in axes],
            "datasets": [
                {
                    "path": str(level),
                    **({"coordinateTransformations": [{"type": "scale", "scale": scale}]} if scale else {}),
                }
                for level, scale in enumerate(scales)
            ],
        }
    ]


def write(
    path: Path,
    volume: np.ndarray = VOLUME,
    zarr_format: int = 2,
    metadata: list[dict] | None = None,
    levels: int = 1,
    **options: Any,
) -> Path:
    group = zarr.create_group(str(path), zarr_format=zarr_format, overwrite=True)
    for level in range(levels):
        data = volume[(slice(None, None, 2**level),) * volume.ndim]
        extra = {"chunk_key_encoding": {"name": "v2", "separator": "/"}} if zarr_format == 2 else {}
        array = group.create_array(
            str(level), shape=data.shape, dtype=data.dtype, **{"chunks": (16, 32, 32), **extra, **options}
        )
        array[...] = data
    metadata = multiscales(levels=levels) if metadata is None else metadata
    group.attrs.update({"multiscales": metadata} if zarr_format == 2 else {"ome": {"multiscales": metadata}})
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "TS_5_4" / "VoxelSpacing10.000" / "denoised.zarr"


@pytest.mark.parametrize(("zarr_format", "compressors"), COMPRESSORS.values(), ids=COMPRESSORS.keys())
def test_both_formats_are_read(path: Path, zarr_format: int, compressors: Any) -> None:
    tomogram = open_tomogram(write(path, zarr_format=zarr_format, compressors=compressors))
    assert tomogram.path == path and tomogram.shape == SHAPE
    assert tomogram.voxel_spacing == tuple(SPACING)
    volume = read_volume(tomogram)
    assert volume.dtype == np.float32
    np.testing.assert_array_equal(volume, VOLUME)


def test_sharded_arrays_are_read(path: Path) -> None:
    tomogram = open_tomogram(write(path, zarr_format=3, shards=(16, 64, 64)))
    np.testing.assert_array_equal(read_volume(tomogram), VOLUME)


def test_integer_tomograms_become_float(path: Path) -> None:
    volume = np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.int16)
    np.testing.assert_array_equal(read_volume(open_tomogram(write(path, volume))), volume.astype(np.float32))


def test_levels_and_their_spacing(path: Path) -> None:
    write(path, levels=3)
    tomogram = open_tomogram(path, level=2)
    assert tomogram.shape == (6, 10, 14) and tomogram.voxel_spacing == tuple(4 * side for side in SPACING)
    np.testing.assert_array_equal(read_volume(tomogram), VOLUME[::4, ::4, ::4])
    for level in (3, -1):
        with pytest.raises(InputError, match=rf"resolution level {level}, found 3 levels"):
            open_tomogram(path, level=level)


def test_spacing_is_read_per_axis_and_unit(tmp_path: Path) -> None:
    path = write(tmp_path / "any.zarr", metadata=multiscales([1.3, 1.1, 0.7], unit="nanometer"))
    assert open_tomogram(path).voxel_spacing == pytest.approx((13.0, 11.0, 7.0))


def test_scale_of_all_levels_is_applied(path: Path) -> None:
    metadata = multiscales([1.0, 1.0, 1.0])
    metadata[0]["coordinateTransformations"] = [{"type": "scale", "scale": SPACING}]
    assert open_tomogram(write(path, metadata=metadata)).voxel_spacing == tuple(SPACING)


def with_translation(shift: float) -> list[dict]:
    metadata = multiscales()
    metadata[0]["datasets"][0]["coordinateTransformations"].append(
        {"type": "translation", "translation": [0, shift, 0]}
    )
    return metadata


def test_half_a_voxel_of_translation_is_a_pyramids(path: Path) -> None:
    assert open_tomogram(write(path, metadata=with_translation(5.0))).shape == SHAPE


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ([], "multiscales"),
        (multiscales(axes="xyz"), r"axes z, y, x, found \['x', 'y', 'z'\]"),
        (multiscales(axes="yx"), "axes z, y, x"),
        (multiscales(unit=None), "unit"),
        (multiscales(unit="parsec"), "unit.*parsec"),
        (multiscales(spacing=None), "a voxel spacing.*found None"),
        (multiscales(spacing=[10.0, 10.0]), "a voxel spacing"),
        (multiscales(spacing=["10", 10.0, 10.0]), "a voxel spacing|axes"),
        (multiscales(spacing=[0.0, 10.0, 10.0]), "above 0"),
        (multiscales(spacing=[-10.0, 10.0, 10.0]), "above 0"),
        (multiscales(spacing=[10.0, 10.0, 13.0]), r"about 10\.0 angstrom, as its folder says, found"),
        (multiscales(spacing=[1.0, 1.0, 1.0]), r"about 10\.0 angstrom"),
        (multiscales(unit="nanometer"), r"about 10\.0 angstrom"),
        (with_translation(500.0), "origin at 0"),
        ([{**multiscales()[0], "datasets": [{**multiscales()[0]["datasets"][0], "path": "9"}]}], "array '9'"),
        ([{**multiscales()[0], "datasets": None}], "resolution level 0, found none"),
        ("wrong", "multiscales"),
    ],
)
def test_wrong_metadata_are_refused(path: Path, metadata: Any, message: str) -> None:
    write(path, metadata=copy.deepcopy(metadata))
    with pytest.raises(InputError, match=message) as caught:
        open_tomogram(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_nan_spacing_is_refused(path: Path) -> None:
    write(path)
    text = (path / ".zattrs").read_text().replace(str(SPACING[2]), "NaN")
    (path / ".zattrs").write_text(text)
    with pytest.raises(InputError, match="voxel spacing"):
        open_tomogram(path)


@pytest.mark.parametrize("damage", ["no group", "no metadata of the array", "nonsense", "empty folder"])
def test_what_is_no_zarr_is_refused(path: Path, damage: str) -> None:
    write(path)
    if damage == "no group":
        (path / ".zgroup").unlink()
    elif damage == "no metadata of the array":
        (path / "0" / ".zarray").unlink()
    elif damage == "nonsense":
        (path / ".zattrs").write_text("{")
    else:
        shutil.rmtree(path)
        path.mkdir()
    with pytest.raises(InputError, match="copy it again") as caught:
        open_tomogram(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "volume",
    [np.empty((0, 40, 56), np.float32), np.ones(SHAPE, bool), np.ones(SHAPE[1:])],
    ids=["empty", "bool", "2D"],
)
def test_what_is_no_volume_is_refused(path: Path, volume: np.ndarray) -> None:
    with pytest.raises(InputError, match="3D array of real numbers"):
        open_tomogram(write(path, volume, chunks=tuple(max(1, side) for side in volume.shape)))


def chunk_files(path: Path) -> list[Path]:
    return sorted(file for file in (path / "0").rglob("*") if file.is_file() and file.name.isdigit())


@pytest.mark.parametrize(("stored", "left"), list(itertools.product(COMPRESSORS, ("half", "start", "nothing"))))
def test_truncated_chunk_is_refused(path: Path, stored: str, left: str) -> None:
    zarr_format, compressors = COMPRESSORS[stored]
    tomogram = open_tomogram(write(path, zarr_format=zarr_format, compressors=compressors))
    file = chunk_files(path)[5]
    content = file.read_bytes()
    file.write_bytes(content[: {"half": len(content) // 2, "start": 20, "nothing": 0}[left]])
    with pytest.raises(InputError, match="truncated or corrupt") as caught:
        read_volume(tomogram)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_corrupt_chunk_is_refused(path: Path) -> None:
    tomogram = open_tomogram(write(path))
    file = chunk_files(path)[3]
    content = file.read_bytes()
    file.write_bytes(content[:50] + content[50:][::-1])
    with pytest.raises(InputError, match="truncated or corrupt"):
        read_volume(tomogram)


@pytest.mark.parametrize(
    "options", [{"zarr_format": 2}, {"zarr_format": 3}, {"zarr_format": 3, "shards": (16, 64, 64)}], ids=str
)
def test_missing_chunk_is_refused_unless_trusted(path: Path, options: dict) -> None:
    tomogram = open_tomogram(write(path, **options))
    before = len(chunk_files(path))
    chunk_files(path)[-1].unlink()
    with pytest.raises(InputError, match=r"expected \d+ chunks, found \d+; copy the missing ones again") as caught:
        read_volume(tomogram)
    assert str(path) in str(caught.value)
    volume = read_volume(tomogram, fill_missing_chunks=True)
    lost = volume != VOLUME
    assert 0 < lost.mean() <= 2 / before and (volume[lost] == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_is_refused(path: Path, value: float) -> None:
    volume = VOLUME.copy()
    volume[20, 30, 50] = value
    with pytest.raises(InputError, match="1 NaN or infinite"):
        read_volume(open_tomogram(write(path, volume)))


def test_constant_is_refused(path: Path) -> None:
    with pytest.raises(InputError, match=r"0\.25 in every voxel"):
        read_volume(open_tomogram(write(path, np.full(SHAPE, 0.25, np.float32))))


def test_source_tells_a_changed_tomogram(path: Path) -> None:
    first = describe_source(open_tomogram(write(path)))
    assert first == describe_source(open_tomogram(path))
    assert first["shape"] == [24, 40, 56] and first["voxel_spacing"] == SPACING and first["tomogram"] == str(path)
    assert first != describe_source(open_tomogram(write(path, VOLUME * 2)))


@pytest.mark.data
def test_real_metadata_are_read(reference_dir: Path) -> None:
    folder = reference_dir / "data/real/czii_TS_5_4/static/ExperimentRuns/TS_5_4/VoxelSpacing10.000"
    tomogram = open_tomogram(folder / "denoised.zarr", level=2)  # the only array whose metadata is here
    assert tomogram.shape == (46, 158, 158)
    assert tomogram.voxel_spacing == tuple(4 * side for side in SPACING)
    with pytest.raises(InputError, match="1 chunks, found 0"):
        read_volume(tomogram)
