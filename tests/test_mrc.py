from __future__ import annotations

import bz2
import gzip
import logging
import warnings
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import zarr
from conftest import run_script, write_tomogram

from czii25d.data.runs import find_tomograms
from czii25d.data.tomogram import describe_source, open_tomogram, read_volume
from czii25d.data.volumes import open_volume
from czii25d.errors import InputError

SHAPE = (5, 7, 11)
SPACING = (13.0, 11.0, 7.5)  # z, y, x
VALUES = np.random.default_rng(0).integers(-90, 90, SHAPE)
UNSIGNED = np.random.default_rng(1).integers(0, 250, SHAPE)
MODES = {0: np.int8, 1: np.int16, 2: np.float32, 6: np.uint16, 12: np.float16}


def write(path: Path, volume: np.ndarray, spacing: tuple[float, float, float] = SPACING) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with mrcfile.new(path, overwrite=True) as file:
            file.set_data(volume)
            z, y, x = spacing
            file.voxel_size = (x, y, z)
    return path


def patch(path: Path, word: int, value: int | float) -> None:
    """Overwrite one 4-byte word of the header, counted from 1 as the specification does."""
    content = bytearray(path.read_bytes())
    content[4 * word - 4 : 4 * word] = np.array(value, "<f4" if isinstance(value, float) else "<i4").tobytes()
    path.write_bytes(content)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "TS_1.mrc", VALUES.astype(np.float32))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("suffix", [".mrc", ".rec", ".map"])
def test_each_mode_is_read(tmp_path: Path, mode: int, suffix: str) -> None:
    stored = (UNSIGNED if mode == 6 else VALUES).astype(MODES[mode])
    tomogram = open_tomogram(write(tmp_path / f"t{suffix}", stored))
    assert tomogram.shape == SHAPE and tomogram.voxel_spacing == pytest.approx(SPACING)
    assert isinstance(tomogram.array, np.memmap) and tomogram.array.dtype.itemsize == stored.dtype.itemsize
    volume = read_volume(tomogram)
    assert volume.dtype == np.float32
    np.testing.assert_array_equal(volume, stored.astype(np.float32))
    np.testing.assert_array_equal(tomogram.array[3], stored[3])


def test_big_endian_with_extended_header(tmp_path: Path) -> None:
    path = tmp_path / "big.mrc"
    with mrcfile.new(path) as file:
        file.set_data(VALUES.astype(">i2"))
        file.voxel_size = (7.5, 11.0, 13.0)
        file.set_extended_header(np.zeros(33, ">i4"))
    assert path.read_bytes()[212:214] == b"\x11\x11"
    tomogram = open_tomogram(path)
    assert tomogram.voxel_spacing == pytest.approx(SPACING)
    np.testing.assert_array_equal(read_volume(tomogram), VALUES.astype(np.float32))


def test_imods_unsigned_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "t.rec", UNSIGNED.astype(np.uint8).view(np.int8))
    patch(path, 39, 1146047817)
    np.testing.assert_array_equal(read_volume(open_tomogram(path)), UNSIGNED.astype(np.float32))
    patch(path, 40, 1)  # IMOD's flag for signed bytes
    assert read_volume(open_tomogram(path)).min() < 0


@pytest.mark.parametrize(
    ("given", "expected"), [(None, SPACING), (10.0, (10.0,) * 3), ([3, 2.0, 1.0], (3.0, 2.0, 1.0))]
)
def test_the_given_spacing_goes_first(path: Path, given: object, expected: tuple[float, ...]) -> None:
    assert open_tomogram(path, given).voxel_spacing == pytest.approx(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf"), [1.0, 2.0], [1.0, 2.0, 0.0], True, "10"])
def test_a_wrong_spacing_is_refused(path: Path, wrong: object) -> None:
    with pytest.raises(InputError, match="voxel spacing above 0"):
        open_tomogram(path, wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("word", [8, 9, 10, 11, 12, 13])  # mx, my, mz; the cell's sides
def test_a_voxel_size_of_zero_needs_the_key(path: Path, word: int) -> None:
    patch(path, word, 0 if word < 11 else 0.0)
    with pytest.raises(InputError, match=r"expected a voxel size above 0 in its header, found .*; give voxel_spacing"):
        open_tomogram(path)
    assert open_tomogram(path, 7.84).voxel_spacing == (7.84,) * 3


def test_one_angstrom_is_doubted(path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, VALUES.astype(np.float32), (1.0, 1.0, 1.0))
    monkeypatch.setattr(logging.getLogger("czii25d"), "propagate", True)  # the scripts turn it off
    with caplog.at_level(logging.WARNING):
        assert open_tomogram(path).voxel_spacing == (1.0, 1.0, 1.0)
    assert "1 angstrom per voxel" in caplog.text


BYTES = 1024 + 4 * 5 * 7 * 11


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-3]), rf"expected {BYTES} bytes.*found {BYTES - 3} bytes.*cut"),
        (lambda p: p.write_bytes(p.read_bytes() + b"xx"), rf"expected {BYTES} bytes.*found {BYTES + 2} bytes"),
        (lambda p: p.write_bytes(p.read_bytes()[:1000]), "header of 1024 bytes, found 1000 bytes"),
        (lambda p: p.write_bytes(b""), "header of 1024 bytes, found 0 bytes"),
        (lambda p: p.write_bytes(b"\0" * 4000), "MRC"),
        (lambda p: p.write_bytes(gzip.compress(p.read_bytes())), "found a gzip archive; unpack it .gunzip"),
        (lambda p: p.write_bytes(bz2.compress(p.read_bytes())), "found a bzip2 archive; unpack it .bunzip2"),
        (lambda p: patch(p, 4, 4), r"found mode 4; convert it to mode 2"),
        (lambda p: patch(p, 4, 101), r"found mode 101"),
        (lambda p: patch(p, 1, -11), "MRC"),
        (lambda p: patch(p, 24, -4), "expected an MRC header"),
        (lambda p: patch(p, 17, 3) or patch(p, 19, 1), r"mapc, mapr, maps = 1, 2, 3\), found 3, 2, 1"),
        (lambda p: patch(p, 23, 0) or patch(p, 10, 1), "expected a tomogram, found a stack of 5 images"),
        (lambda p: patch(p, 23, 401), "a stack of volumes"),
    ],
)
def test_what_is_no_volume_is_refused(path: Path, change, message: str) -> None:
    change(path)
    with pytest.raises(InputError, match=message) as caught:
        open_tomogram(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_stacks_and_single_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found one image"):
        open_tomogram(write(tmp_path / "a.mrc", VALUES[:1].astype(np.float32)))
    with pytest.raises(InputError, match="found a stack of 5 images"):
        open_tomogram(write(tmp_path / "a.st", VALUES.astype(np.float32)))


def test_a_reconstruction_marked_as_image_stack_is_read(path: Path) -> None:
    patch(path, 23, 0)  # as IMOD writes it; mz says that it is a volume
    assert open_tomogram(path).shape == SHAPE


def test_npy(tmp_path: Path) -> None:
    path = tmp_path / "TS.npy"
    np.save(path, np.asfortranarray(VALUES.astype(np.int16)))
    tomogram = open_tomogram(path, [13.0, 11.0, 7.5])
    assert tomogram.shape == SHAPE and tomogram.voxel_spacing == SPACING and isinstance(tomogram.array, np.memmap)
    np.testing.assert_array_equal(read_volume(tomogram), VALUES.astype(np.float32))
    with pytest.raises(InputError, match=r"found none: \.npy files hold no metadata; give voxel_spacing"):
        open_tomogram(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"a whole \.npy file"):
        open_tomogram(path, 10.0)
    for wrong in (VALUES[0], VALUES.astype(complex), VALUES[:0]):
        np.save(path, wrong)
        with pytest.raises(InputError, match="3D array of real numbers"):
            open_tomogram(path, 10.0)
    np.save(path, np.array([{}], object), allow_pickle=True)
    with pytest.raises(InputError, match=r"a whole \.npy file"):
        open_tomogram(path, 10.0)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mrc.gz").touch()
    for name, message in (("a.mrc.gz", "unpack it first"), ("b.mrc", "no such file"), ("c", "no such file")):
        with pytest.raises(InputError, match=message):
            open_tomogram(tmp_path / name)


def test_a_zarr_takes_the_given_spacing(tmp_path: Path) -> None:
    path = tmp_path / "VoxelSpacing10.000" / "a.zarr"
    write_tomogram(path, VALUES.astype(np.float32), spacing=(1, 1, 1))
    with pytest.raises(InputError, match=r"about 10\.0 angstrom"):
        open_tomogram(path)
    assert open_tomogram(path, 13.7).voxel_spacing == (13.7,) * 3
    metadata = zarr.open_group(str(path))
    scales = metadata.attrs["multiscales"]
    del scales[0]["axes"][0]["unit"]
    metadata.attrs["multiscales"] = scales
    assert open_tomogram(path, 13.7).voxel_spacing == (13.7,) * 3


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite_and_constant_are_refused(path: Path, value: float) -> None:
    volume = VALUES.astype(np.float32)
    volume[4, 6, 10] = value
    with pytest.raises(InputError, match="1 NaN or infinite"):
        read_volume(open_tomogram(write(path, volume)))
    with pytest.raises(InputError, match=r"2\.0 in every voxel"):
        read_volume(open_tomogram(write(path, np.full(SHAPE, 2, np.float32))))


def test_source_tells_a_changed_file(path: Path) -> None:
    first = describe_source(open_tomogram(path))
    assert first == describe_source(open_tomogram(path)) and first["bytes"] == BYTES
    assert first != describe_source(open_tomogram(path, 10.0))
    write(path, VALUES[:4].astype(np.float32))
    assert first != describe_source(open_tomogram(path))


def test_tomograms_by_folder_glob_and_table(tmp_path: Path) -> None:
    for folder, name in (("a", "TS_2.mrc"), ("a", "TS_1.rec"), ("b", "rec.mrc"), ("c", "rec.mrc")):
        (tmp_path / folder).mkdir(exist_ok=True)
        write(tmp_path / folder / name, VALUES.astype(np.float32))
    (tmp_path / "a" / "notes.txt").touch()
    runs = find_tomograms(tmp_path / "a", "test", 10)
    assert [(run.name, run.split, run.tomogram.name, run.voxel_spacing) for run in runs] == [
        ("TS_1", "test", "TS_1.rec", (10.0,) * 3),
        ("TS_2", "test", "TS_2.mrc", (10.0,) * 3),
    ]
    assert [run.name for run in find_tomograms(f"{tmp_path}/*/rec.mrc")] == ["b", "c"]
    assert [run.name for run in find_tomograms(tmp_path / "a" / "TS_2.mrc")] == ["TS_2"]
    table = tmp_path / "runs.csv"
    table.write_text("run,tomogram,voxel_spacing\nx,a/TS_2.mrc,\nw,b/rec.mrc,7.84\n")
    runs = find_tomograms(table, voxel_spacing=13.7)
    assert [(run.name, run.tomogram, run.voxel_spacing) for run in runs] == [
        ("w", tmp_path / "b/rec.mrc", (7.84,) * 3),
        ("x", tmp_path / "a/TS_2.mrc", (13.7,) * 3),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a CSV file of run,tomogram"),
        ("run,tomo\nx,a.mrc\n", "expected the columns run, tomogram.*found run, tomo; add tomogram"),
        ("run,tomogram\nx,b.mrc\n", "line 2: expected a tomogram, found none at 'b.mrc'"),
        ("run,tomogram\nx,\n", "line 2: expected a tomogram"),
        ("run,tomogram\nx,a.mrc\nx,a.mrc\n", "x twice"),
        ("run,tomogram\n../x,a.mrc\n", "name a folder"),
        ("run,tomogram\n,a.mrc\n", "name a folder"),
        ("run,tomogram\n", "expected tomograms"),
        ("run,tomogram,voxel_spacing\nx,a.mrc,ten\n", "line 2: expected a voxel spacing in angstrom, found 'ten'"),
        ("run,tomogram,voxel_spacing\nx,a.mrc,0\n", "line 2: expected a voxel spacing above 0"),
    ],
)
def test_wrong_tables_of_runs_are_refused(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "a.mrc", VALUES.astype(np.float32))
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        find_tomograms(tmp_path / "runs.csv")
    assert "runs.csv" in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        find_tomograms(tmp_path / "*.mrc")
    with pytest.raises(InputError, match="found none"):
        find_tomograms(tmp_path)


def test_01_takes_own_tomograms(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine/TS_1.mrc", VALUES.astype(np.int16))
    run_script("01_create_dataset.py", "tomograms=mine", "voxel_spacing=[13,11,7.5]", cwd=tmp_path)
    volume = open_volume(tmp_path / "output/volumes/train/TS_1")
    assert volume.shape == SHAPE and volume.voxel_spacing == SPACING
    expected = (VALUES - VALUES.mean()) / VALUES.std()
    np.testing.assert_allclose(volume.crop((0, 0, 0), SHAPE), expected, atol=2e-3)
    again = run_script("01_create_dataset.py", "tomograms=mine", "voxel_spacing=[13,11,7.5]", cwd=tmp_path)
    assert "was there" in again.stderr


@pytest.mark.data
def test_a_real_reconstruction(reference_dir: Path) -> None:
    tomogram = open_tomogram(reference_dir / "data/real/empiar_11658_171.mrc")
    assert tomogram.shape == (128, 256, 256) and tomogram.voxel_spacing == pytest.approx((31.36,) * 3)
    assert read_volume(tomogram).std() > 0
