from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from czii25d.data.targets import make_recipe, open_target, read_recipe, target_from_recipe, write_heatmap
from czii25d.errors import InputError
from czii25d.heatmap import quantize
from czii25d.particles import Particle, ParticleSet
from czii25d.picks import concat_picks, empty_picks, make_picks

SHAPE = (40, 140, 150)  # more than one chunk along each axis
SPACING = (13.0, 11.0, 7.0)
PARTICLES = ParticleSet([Particle("wide", 90, color="#E69F00"), Particle("absent", 70), Particle("narrow", 30)])
SIGMA = {"wide": 45.0, "absent": 35.0, "narrow": 15.0}
WIDE = [(7 * 30.25, 11 * 120.5, 13 * 33.0), (7 * 131.0, 11 * 20.0, 13 * 5.0)]  # x, y, z
NARROW = [(7 * 127.5, 11 * 127.5, 13 * 31.5)]  # at a corner of eight chunks
PICKS = concat_picks([make_picks("TS_1", "narrow", NARROW), make_picks("TS_1", "wide", WIDE)])
RECIPE = make_recipe("TS_1", PARTICLES, PICKS, SIGMA, SPACING, SHAPE)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("heatmaps") / "TS_1.zarr"
    write_heatmap(path, RECIPE)
    return path


def test_stored_is_what_training_renders(path: Path) -> None:
    stored = zarr.open_group(str(path), mode="r")["0"][...]
    target = open_target(path)
    rendered = target.render((0, 0, 0), SHAPE)
    assert rendered.dtype == np.float32 and stored.dtype == np.uint8 and stored.shape == (3, *SHAPE)
    np.testing.assert_array_equal(stored, quantize(rendered))
    assert [int((heat > 0).any()) for heat in stored] == [1, 0, 1]


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_tile_is_the_part_of_the_stored(path: Path, data: st.DataObject) -> None:
    start = tuple(data.draw(st.integers(0, side - 1)) for side in SHAPE)
    shape = tuple(data.draw(st.integers(1, min(64, side - a))) for a, side in zip(start, SHAPE, strict=True))
    place = tuple(slice(a, a + side) for a, side in zip(start, shape, strict=True))
    stored = zarr.open_group(str(path), mode="r")["0"][(slice(None), *place)]
    np.testing.assert_array_equal(quantize(open_target(path).render(start, shape)), stored)


def test_peaks_are_where_the_picks_are(path: Path) -> None:
    stored = zarr.open_group(str(path), mode="r")["0"]
    assert stored[0, 5, 20, 131] == 255
    assert stored[0, 33, 120, 30] == stored[0, 33, 121, 30] == stored[0].max(initial=0, where=_half(stored.shape[1:]))
    sigma = np.array([15 / 13, 15 / 11, 15 / 7])
    assert stored[2, 31, 127, 127] == round(255 * np.exp(-((0.5 / sigma) ** 2).sum() / 2))


def _half(shape: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[:, :, : shape[2] // 2] = True
    return mask


def test_target_holds_all_there_is_to_know(path: Path) -> None:
    target = open_target(path)
    assert target.run == "TS_1" and target.particles == PARTICLES
    assert target.voxel_spacing == SPACING and target.shape == SHAPE and target.sigma_angstrom == SIGMA
    assert target.channels.tolist() == [0, 0, 2]
    np.testing.assert_allclose(target.centers_zyx_voxel, [(33, 120.5, 30.25), (5, 20, 131), (31.5, 127.5, 127.5)])
    np.testing.assert_allclose(target.sigma_voxel[2], (15 / 13, 15 / 11, 15 / 7))
    picks = target.picks()
    assert picks["particle"].tolist() == ["wide", "wide", "narrow"] and set(picks["run"]) == {"TS_1"}
    np.testing.assert_allclose(picks[["x", "y", "z"]], WIDE + NARROW)


def test_chunks_without_particles_are_not_stored(path: Path) -> None:
    array = zarr.open_group(str(path), mode="r")["0"]
    assert array.chunks == (3, 32, 128, 128)
    stored = {
        file.relative_to(path / "0").as_posix()
        for file in (path / "0").rglob("*")
        if file.is_file() and not file.name.startswith(".")
    }
    heat = open_target(path).render((0, 0, 0), SHAPE)
    wanted = {
        f"0/{z}/{y}/{x}"
        for z, y, x in np.ndindex(2, 2, 2)
        if quantize(heat)[:, 32 * z : 32 * z + 32, 128 * y : 128 * y + 128, 128 * x : 128 * x + 128].any()
    }
    assert stored == wanted


def test_few_particles_few_chunks(tmp_path: Path) -> None:
    picks = make_picks("TS_1", "narrow", [(70.0, 110.0, 65.0)])
    write_heatmap(tmp_path / "a.zarr", make_recipe("TS_1", PARTICLES, picks, SIGMA, SPACING, SHAPE))
    assert [file.name for file in (tmp_path / "a.zarr/0").rglob("*") if file.name.isdigit() and file.is_file()] == ["0"]
    write_heatmap(tmp_path / "b.zarr", make_recipe("TS_1", PARTICLES, empty_picks(), SIGMA, SPACING, SHAPE))
    assert zarr.open_group(str(tmp_path / "b.zarr"), mode="r")["0"][...].max() == 0
    assert len(open_target(tmp_path / "b.zarr").picks()) == 0


def test_volume_smaller_than_a_chunk(tmp_path: Path) -> None:
    small = make_recipe(
        "TS_1", PARTICLES, make_picks("TS_1", "wide", [(70.0, 110.0, 65.0)]), SIGMA, SPACING, (7, 13, 17)
    )
    write_heatmap(tmp_path / "a.zarr", small)
    stored = zarr.open_group(str(tmp_path / "a.zarr"), mode="r")["0"][...]
    np.testing.assert_array_equal(stored, quantize(target_from_recipe(small).render((0, 0, 0), (7, 13, 17))))


def test_viewers_find_axes_scale_names_and_colours(path: Path) -> None:
    attributes = json.loads((path / ".zattrs").read_text())
    (multiscale,) = attributes["multiscales"]
    assert [axis["name"] for axis in multiscale["axes"]] == list("czyx")
    assert [axis.get("unit") for axis in multiscale["axes"]] == [None, "angstrom", "angstrom", "angstrom"]
    assert multiscale["datasets"][0]["coordinateTransformations"] == [{"type": "scale", "scale": [1.0, *SPACING]}]
    channels = attributes["omero"]["channels"]
    assert [(c["label"], c["color"]) for c in channels] == [
        ("wide", "E69F00"),
        ("absent", "0072B2"),
        ("narrow", "0072B2"),
    ]
    layout = json.loads((path / "0/.zarray").read_text())
    assert (layout["zarr_format"], layout["dimension_separator"], layout["compressor"]["cname"]) == (
        2,
        "/",
        "lz4",
    )


def test_recipe_is_the_same_after_storage(path: Path) -> None:
    assert read_recipe(path) == json.loads(json.dumps(RECIPE))


def test_missing_heatmaps_say_run_02_first(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run 02_create_mask\.py first"):
        open_target(tmp_path / "TS_2.zarr")


@pytest.mark.parametrize("damage", ["no group", "no recipe", "malformed", "other version", "lacks picks", "empty"])
def test_damage_says_run_02_again(path: Path, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "TS_1.zarr"
    shutil.copytree(path, copy)
    attributes = json.loads((copy / ".zattrs").read_text())
    if damage == "no group":
        (copy / ".zgroup").unlink()
    elif damage == "empty":
        shutil.rmtree(copy)
        copy.mkdir()
    else:
        if damage == "no recipe":
            del attributes["czii25d"]
        elif damage == "other version":
            attributes["czii25d"]["format_version"] = 99
        elif damage == "lacks picks":
            del attributes["czii25d"]["picks"]["narrow"]
        (copy / ".zattrs").write_text("{" if damage == "malformed" else json.dumps(attributes))
    with pytest.raises(InputError, match=r"run 02_create_mask\.py again") as caught:
        open_target(copy)
    assert str(copy) in str(caught.value)
