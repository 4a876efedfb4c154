from __future__ import annotations

import json
import logging
import re
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import starfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from czii25d.errors import InputError
from czii25d.formats import FORMATS, TomogramGrid, check_picks_fit, find_format, read_picks, write_picks
from czii25d.formats import imod as imod_module
from czii25d.particles import ParticleSet
from czii25d.picks import PICK_COLUMNS, empty_picks, make_picks

SHAPE, SPACING = (24, 40, 56), (13.0, 11.0, 7.0)  # z, y, x: nothing equal
GRID = TomogramGrid(SPACING, SHAPE)
EVEN = TomogramGrid((10.0, 10.0, 10.0), SHAPE)
PIXEL_SIZE = 1.625
PARTICLES = ParticleSet.from_config(
    {"ribosome": {"radius": 150}, "apo-ferritin": {"radius": 60}, "007": {"radius": 80}}
)
ONE_PER_FILE = ("copick", "imod", "imod-text", "cbox")


def a_frame(rows: list[tuple], scored: bool) -> pd.DataFrame:
    columns = [*PICK_COLUMNS, "score"] if scored else list(PICK_COLUMNS)
    frame = pd.DataFrame([row[: len(columns)] for row in rows], columns=columns)
    return frame if rows else empty_picks(scored)


def in_order(picks: pd.DataFrame) -> list[list]:
    return sorted(picks[["run", "particle", "x", "y", "z"]].astype(object).to_numpy().tolist())


PICKS = a_frame(
    [
        ("TS_1", "ribosome", 100.25, 200.5, 50.125, 0.75),
        ("TS_1", "ribosome", 3.0, 420.0, 290.0, 0.5),
        ("TS_1", "apo-ferritin", 301.0, 20.0, 150.0, 0.25),
        ("TS_22", "ribosome", 20.0, 40.0, 280.0, 0.125),
    ],
    scored=True,
)
OPTIONS = {"grids": {"TS_1": GRID, "TS_22": GRID}, "particles": PARTICLES, "pixel_size": PIXEL_SIZE}


def target_of(name: str, folder: Path) -> Path:
    return folder / name if FORMATS[name].folders else folder / f"picks{FORMATS[name].suffix}"


box = st.tuples(
    st.sampled_from(["TS_1", "TS_22"]),
    st.sampled_from(PARTICLES.names),
    *(st.floats(-0.5 * step, (side - 0.5) * step) for side, step in zip(SHAPE[::-1], SPACING[::-1], strict=True)),
    st.floats(0, 1),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(box, min_size=1, max_size=6), scored=st.booleans())
@pytest.mark.parametrize("name", FORMATS)
def test_there_and_back(name: str, tmp_path_factory: pytest.TempPathFactory, rows: list[tuple], scored: bool) -> None:
    folder = tmp_path_factory.mktemp("formats")
    picks = a_frame(rows, scored)
    options = OPTIONS
    if name == "imod":
        options = {**OPTIONS, "grids": TomogramGrid((13.0, 7.0, 7.0), SHAPE)}
    files = write_picks(target_of(name, folder), picks, name, **options)
    assert files and all(file.is_file() for file in files)
    back = read_picks(target_of(name, folder), name, **options)
    assert ("score" in back) == scored and list(back.columns) == list(picks.columns)
    key = [*PICK_COLUMNS]
    ours = back.sort_values(["run", "particle"], kind="stable").reset_index(drop=True)
    theirs = picks.sort_values(["run", "particle"], kind="stable").reset_index(drop=True)
    assert ours[key[:2]].to_numpy().tolist() == theirs[key[:2]].to_numpy().tolist()
    np.testing.assert_allclose(ours[key[2:]], theirs[key[2:]], atol=1e-3)
    if scored:
        np.testing.assert_allclose(ours["score"], theirs["score"], atol=1e-6)
    assert not list(folder.rglob(".*"))


@pytest.mark.parametrize("name", ["csv", "relion4", "relion5"])
def test_one_file_keeps_the_order(name: str, tmp_path: Path) -> None:
    write_picks(target_of(name, tmp_path), PICKS, name, **OPTIONS)
    back = read_picks(target_of(name, tmp_path), **OPTIONS)  # by its content
    assert back[["run", "particle"]].to_numpy().tolist() == PICKS[["run", "particle"]].to_numpy().tolist()


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ONE_PER_FILE])
def test_no_picks(name: str, tmp_path: Path) -> None:
    for scored, particles in ((True, PARTICLES), (False, PARTICLES), (True, None)):
        options = {**OPTIONS, "particles": particles}
        write_picks(target_of(name, tmp_path), empty_picks(scored), name, **options)
        back = read_picks(target_of(name, tmp_path), **OPTIONS)
        assert len(back) == 0 and list(back.columns) == list(empty_picks(scored).columns)


def test_an_empty_model_is_a_model(tmp_path: Path) -> None:
    write_picks(tmp_path / "a.mod", empty_picks(), grids=EVEN)
    assert len(read_picks(tmp_path / "a.mod")) == 0
    write_picks(tmp_path / "a.txt", empty_picks(), grids=EVEN)
    assert len(read_picks(tmp_path / "a.txt", grids=EVEN)) == 0


@pytest.mark.parametrize("name", FORMATS)
def test_equal_picks_make_equal_files(name: str, tmp_path: Path) -> None:
    options = {**OPTIONS, "grids": EVEN}
    first = [file.read_bytes() for file in write_picks(target_of(name, tmp_path), PICKS, name, **options)]
    assert first == [file.read_bytes() for file in write_picks(target_of(name, tmp_path), PICKS, name, **options)]


# What each program would read and write, counted by hand: the voxel z, y, x = 5, 20, 30 of a tomogram of SHAPE.
VOXEL = make_picks("TS_1", "ribosome", [(30 * 7.0, 20 * 11.0, 5 * 13.0)]).assign(score=0.5)


def test_relion4_counts_unbinned_pixels(tmp_path: Path) -> None:
    write_picks(tmp_path / "a.star", VOXEL, "relion4", pixel_size=3.5)
    blocks = starfile.read(tmp_path / "a.star")
    row = blocks["particles"].iloc[0]
    assert [row[f"rlnCoordinate{axis}"] for axis in "XYZ"] == pytest.approx([60, 220 / 3.5, 65 / 3.5], abs=1e-6)
    assert row["rlnTomoName"] == "TS_1" and row["rlnClassNumber"] == 1 and row["rlnAutopickFigureOfMerit"] == 0.5
    assert blocks["optics"]["rlnTomoTiltSeriesPixelSize"].item() == 3.5 and row["rlnOpticsGroup"] == 1
    assert [row[f"rlnOrigin{axis}Angst"] for axis in "XYZ"] == [0, 0, 0]
    assert (tmp_path / "a.star").read_text().count("# version 30001") == 3


@pytest.mark.parametrize("binning", [1, 2, 4])
def test_relion5_counts_from_the_pickers_centre(tmp_path: Path, binning: int) -> None:
    """RELION's picker: index times binning times pixel size, minus (unbinned size / 2 - 1) times pixel size."""
    pixel_size = 10 / binning
    write_picks(tmp_path / "a.star", VOXEL, "relion5", grids=EVEN, pixel_size=pixel_size)
    row = starfile.read(tmp_path / "a.star")["particles"].iloc[0]
    for axis, place, side in zip("XYZ", (21, 22, 6.5), SHAPE[::-1], strict=True):
        expected = place * binning * pixel_size - (side * binning / 2 - 1) * pixel_size
        assert row[f"rlnCenteredCoordinate{axis}Angst"] == pytest.approx(expected, abs=1e-5)
    assert row["rlnTomoName"] == "TS_1" and (tmp_path / "a.star").read_text().count("# version 50001") == 3


def test_cbox_has_corners_in_x_and_y_but_centres_in_z(tmp_path: Path) -> None:
    write_picks(tmp_path / "TS_1.cbox", VOXEL, grids=GRID, particles=PARTICLES)
    blocks = starfile.read(tmp_path / "TS_1.cbox")
    row = blocks["cryolo"].iloc[0]
    width, height, depth = 300 / 7, 300 / 11, 300 / 13
    assert [row["CoordinateX"], row["CoordinateY"], row["CoordinateZ"]] == pytest.approx(
        [30 - width / 2, 20 - height / 2, 5], abs=1e-5
    )
    assert [row["Width"], row["Height"], row["Depth"]] == pytest.approx([width, height, depth], abs=1e-5)
    assert row["Confidence"] == 0.5 and blocks["cryolo_include"]["slice_index"].tolist() == [5]
    assert "_cbox_format_version" in (tmp_path / "TS_1.cbox").read_text()


def test_imods_first_voxel_is_at_a_half_but_for_z(tmp_path: Path) -> None:
    write_picks(tmp_path / "TS_1.mod", VOXEL, grids=TomogramGrid((13.0, 7.0, 7.0), SHAPE), particles=PARTICLES)
    content = (tmp_path / "TS_1.mod").read_bytes()
    assert content[:8] == b"IMODV1.2" and content[-4:] == b"IEOF"
    assert struct.unpack_from(">4i", content, 8 + 128) == (56, 40, 24, 1)
    at = content.index(b"CONT")
    assert struct.unpack_from(">i", content, at + 4) == (1,)
    assert struct.unpack_from(">3f", content, at + 20) == pytest.approx((30.5, 220 / 7 + 0.5, 5))
    assert content[8 + 232 : 8 + 232 + 12] == b"OBJTribosome"
    write_picks(tmp_path / "TS_1.txt", VOXEL, grids=GRID, particles=PARTICLES)
    assert [float(word) for word in (tmp_path / "TS_1.txt").read_text().split()] == [1, 1, 30.5, 20.5, 5, 0.5]
    back = read_picks(tmp_path / "TS_1.mod")  # the model states its spacing, also in z
    np.testing.assert_allclose(back[["x", "y", "z"]], VOXEL[["x", "y", "z"]], atol=1e-3)


def test_copick_names_and_scores(tmp_path: Path) -> None:
    files = write_picks(tmp_path, PICKS, "copick", user_id="me", session_id="7")
    assert sorted(str(file.relative_to(tmp_path)) for file in files) == [
        "ExperimentRuns/TS_1/Picks/me_7_apo-ferritin.json",
        "ExperimentRuns/TS_1/Picks/me_7_ribosome.json",
        "ExperimentRuns/TS_22/Picks/me_7_ribosome.json",
    ]
    content = json.loads(files[0].read_text())
    assert content["pickable_object_name"] == "ribosome" and content["run_name"] == "TS_1"
    assert content["points"][1]["location"] == {"x": 3.0, "y": 420.0, "z": 290.0}
    assert content["points"][1]["score"] == 0.5
    for name in ("pickable_object_name", "run_name"):
        del content[name]
    files[0].write_text(json.dumps(content))  # then the names of file and folder tell
    assert in_order(read_picks(tmp_path)) == in_order(PICKS)
    with pytest.raises(InputError, match="without underscores"):
        write_picks(tmp_path / "b", PICKS, "copick", user_id="a_b")
    (files[0].parent / "you_7_ribosome.json").write_text(files[0].read_text())
    with pytest.raises(InputError, match=r"one file of ribosome in run TS_1, found me_7_ribosome.json and you_7"):
        read_picks(tmp_path)


RELION4 = """
# version 30001

data_optics

loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2
_rlnTomoTiltSeriesPixelSize #3
           2 opticsGroup2     1.500000
           1 opticsGroup1     2.000000


# version 30001

data_particles

loop_
_rlnTomoName #1
_rlnCoordinateX #2
_rlnCoordinateY #3
_rlnCoordinateZ #4
_rlnOriginXAngst #5
_rlnOriginYAngst #6
_rlnOriginZAngst #7
_rlnOpticsGroup #8
_rlnClassNumber #9
TS_1   10.0 20.0 30.0   1.0 -2.0 3.5   1 2
007   10.0 20.0 30.0   0.0 0.0 0.0   2 1
"""


def test_relions_own_file(tmp_path: Path) -> None:
    path = tmp_path / "particles.star"
    path.write_text(RELION4)
    back = read_picks(path, particles=PARTICLES)
    expected = [["007", "ribosome", 15, 30, 45], ["TS_1", "apo-ferritin", 19, 42, 56.5]]
    assert in_order(back) == expected and "score" not in back
    assert set(read_picks(path, particle="proteasome")["particle"]) == {"proteasome"}
    with pytest.raises(InputError, match="expected the names of its particles, found numbers only; give particle"):
        read_picks(path)
    with pytest.raises(InputError, match=r"expected classes 1 to 1 \(ribosome\), found class 2"):
        read_picks(path, particles=PARTICLES[:1])


def test_origins_are_turned_by_the_subtomogram(tmp_path: Path) -> None:
    rot, tilt, psi = np.deg2rad([20.0, 50.0, 80.0])
    cp, sp, ct, stl, cc, sc = np.cos(rot), np.sin(rot), np.cos(tilt), np.sin(tilt), np.cos(psi), np.sin(psi)
    matrix = np.array(  # RELION's Euler_angles2matrix
        [
            [cc * ct * cp - sc * sp, cc * ct * sp + sc * cp, -cc * stl],
            [-sc * ct * cp - cc * sp, -sc * ct * sp + cc * cp, sc * stl],
            [stl * cp, stl * sp, ct],
        ]
    )
    table = pd.DataFrame({f"rlnCoordinate{axis}": [100.0] for axis in "XYZ"})
    table = table.assign(rlnTomoName="TS", rlnTomoTiltSeriesPixelSize=2.0)
    table = table.assign(rlnOriginXAngst=3.0, rlnOriginYAngst=-5.0, rlnOriginZAngst=7.0)
    table = table.assign(rlnTomoSubtomogramRot=20.0, rlnTomoSubtomogramTilt=50.0, rlnTomoSubtomogramPsi=80.0)
    starfile.write({"particles": table}, tmp_path / "a.star")
    back = read_picks(tmp_path / "a.star", particle="ribosome")
    np.testing.assert_allclose(back[["x", "y", "z"]].to_numpy()[0], 200 - matrix @ [3.0, -5.0, 7.0], atol=1e-5)


def test_micrograph_names_and_a_given_pixel_size(tmp_path: Path) -> None:
    table = pd.DataFrame({f"rlnCoordinate{axis}": [10.0] for axis in "XYZ"})
    starfile.write(table.assign(rlnMicrographName="warp/TS_1.tomostar", rlnLCCmax=0.3), tmp_path / "a.star")
    with pytest.raises(InputError, match=r"expected a pixel size .*give pixel_size"):
        read_picks(tmp_path / "a.star", particle="ribosome")
    back = read_picks(tmp_path / "a.star", particle="ribosome", pixel_size=7.0)
    assert back.to_numpy().tolist() == [["TS_1", "ribosome", 70.0, 70.0, 70.0, 0.3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "expected a STAR file, found no data block"),
        (lambda text: "\x00\xff nonsense", "expected a STAR file"),
        (lambda text: text[:-12], "expected a STAR file|finite number"),
        (lambda text: text.replace("rlnCoordinateX", "_ccoordX"), "RELION particle file with .*found the columns"),
        (lambda text: text.replace("rlnCoordinateZ", "rlnCoordinateQ"), "no rlnCoordinateZ among .*did you mean"),
        (lambda text: text.replace("_rlnOriginZAngst", "_other"), "no rlnOriginZAngst among"),
        (
            lambda text: text.replace("data_particles", "data_stuff"),
            "a block data_particles, found data_optics, data_s",
        ),
        (
            lambda text: text.replace("  20.0 30", " abc 30").replace("10.0 20.0", "10.0 abc", 1),
            "row 1: expected a fin",
        ),
        (lambda text: text.replace(" 2 opticsGroup2", " 3 opticsGroup2"), r"optics groups .*found group 2"),
        (lambda text: text.replace("1.500000", "0.000000"), "TiltSeriesPixelSize above 0 angstrom, found 0"),
        (lambda text: text.replace("_rlnTomoName", "_ptmName"), "a column rlnTomoName or rlnMicrographName"),
    ],
)
def test_wrong_star_files_are_refused(tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "particles.star"
    path.write_text(change(RELION4), encoding="latin-1")
    with pytest.raises(InputError, match=message) as caught:
        read_picks(path, particles=PARTICLES)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_relion_needs_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"format of .*a.star: expected relion4 or relion5"):
        write_picks(tmp_path / "a.star", PICKS, grids=GRID, pixel_size=1.0)
    for name in ("relion4", "relion5"):
        with pytest.raises(InputError, match="give pixel_size"):
            write_picks(tmp_path / "a.star", PICKS, name, grids=GRID)
    with pytest.raises(InputError, match="its tomogram's shape, found none"):
        write_picks(tmp_path / "a.star", PICKS, "relion5", grids=TomogramGrid(SPACING), pixel_size=1.0)
    with pytest.raises(InputError, match=r"run TS_22: expected its tomogram's voxel spacing, found TS_1"):
        write_picks(tmp_path / "a.star", PICKS, "relion5", grids={"TS_1": GRID}, pixel_size=1.0)
    for wrong in ("a b", "a#", "NaN", "it's", ""):
        with pytest.raises(InputError, match="names without spaces"):
            write_picks(tmp_path / "a.star", PICKS.assign(run=wrong), "relion4", pixel_size=1.0)
    assert not list(tmp_path.iterdir())


def crate(*chunks: bytes, flags: int = 0, units: int = -9, pixel_size: float = 0.5, z_scale: float = 1.0) -> bytes:
    """A model as 3dmod lays it out, packed by hand."""
    header = b"name".ljust(128, b"\0") + struct.pack(">3i i I 4i", 9, 9, 9, 1, flags, 1, 0, 0, 255)
    header += struct.pack(">3f 3f 3i 2i f 2i 3f", 0, 0, 0, 1, 1, z_scale, 0, 0, 0, 3, 0, pixel_size, units, 0, 0, 0, 0)
    return b"IMODV1.2" + header + b"".join(chunks) + b"IEOF"


def an_object(name: bytes) -> bytes:
    return b"OBJT" + name.ljust(64, b"\0") + bytes(112)


def a_contour(*points: tuple[float, float, float]) -> bytes:
    return b"CONT" + struct.pack(">iIii", len(points), 0, 0, 0) + np.array(points, ">f4").tobytes()


MESH = b"MESH" + struct.pack(">iiIhh", 1, 2, 0, 0, 0) + bytes(12 + 8)
POINTS = (an_object(b"cell"), a_contour((1.5, 2.5, 3.0), (4.5, 5.5, 6.0)), b"SIZE" + struct.pack(">i2f", 8, 1, 2))


def test_a_model_with_other_chunks(tmp_path: Path) -> None:
    path = tmp_path / "TS_1.mod"
    minx = b"MINX" + struct.pack(">i18f", 72, *[1] * 9, 20, 20, 30, *[0] * 6)
    imat = b"IMAT" + struct.pack(">i", 16) + b"CONTOBJTMESHIEOF"  # data that looks like chunks
    path.write_bytes(crate(*POINTS, MESH, imat, an_object(b""), a_contour(), a_contour((0.5, 0.5, 0.0)), minx))
    back = read_picks(path, particles=ParticleSet.from_config({"cell": {"radius": 1}, "second": {"radius": 1}}))
    assert in_order(back) == [
        ["TS_1", "cell", 20, 40, 90],
        ["TS_1", "cell", 80, 100, 180],
        ["TS_1", "second", 0, 0, 0],
    ]
    path.write_bytes(crate(*POINTS, z_scale=2.0))
    assert in_order(read_picks(path))[0] == ["TS_1", "cell", 5, 10, 30]
    assert in_order(read_picks(path, run="a", grids=TomogramGrid((3.0, 2.0, 1.0))))[0] == ["a", "cell", 1, 4, 9]


def test_another_spacing_than_the_models_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("czii25d"), "propagate", True)
    (tmp_path / "a.mod").write_bytes(crate(*POINTS))
    read_picks(tmp_path / "a.mod", grids=TomogramGrid((5.0, 5.0, 5.0)))
    assert not caplog.messages
    read_picks(tmp_path / "a.mod", grids=EVEN)
    assert "says (5.0, 5.0, 5.0) angstrom per voxel" in caplog.messages[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected an IMOD model"),
        (b"imod 1\nobject", "expected an IMOD model .IMODV1.2., found b'imod 1"),
        (crate(*POINTS)[:100], "a cut one"),
        (crate(*POINTS)[:-4], "ends in IEOF"),
        (crate(*POINTS)[:-30], "a cut one"),
        (crate(*POINTS, flags=1 << 16), "y and z flipped; run imodtrans -Y"),
        (crate(*POINTS, units=0), "its tomogram's voxel spacing, found none; give voxel_spacing"),
        (crate(*POINTS, pixel_size=0.0), "its tomogram's voxel spacing, found none"),
        (crate(*POINTS, b"ABCD" + struct.pack(">i", -8)), "one of -8 bytes"),
        (crate(an_object(b""), a_contour((1, 1, 1))), "names of its particles"),
    ],
)
def test_wrong_models_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.mod").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_picks(tmp_path / "a.mod")
    assert "a.mod" in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_cannot_have_two_spacings_in_the_plane(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one voxel spacing in x and y"):
        write_picks(tmp_path / "a.mod", VOXEL, grids=GRID)


def test_text_points_with_fewer_columns(tmp_path: Path) -> None:
    path = tmp_path / "TS.txt"
    for line, particle in (("1.5 2.5 3", "ribosome"), ("1 1.5 2.5 3", "ribosome"), ("2 1 1.5 2.5 3", "apo-ferritin")):
        path.write_text(f"{line}\n\n{line}\n")
        assert in_order(read_picks(path, particles=PARTICLES, grids=GRID)) == [["TS", particle, 7, 22, 39]] * 2
    for text, message in (
        ("1 2\n", "2 columns"),
        ("1 2 3\n1 2 3 4\n", "3 and 4 col"),
        ("a b c\n", "numbers"),
        ("1 2 inf\n", "finite"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_picks(path, particles=PARTICLES, grids=GRID)


def test_boxes_drawn_by_hand_have_no_score(tmp_path: Path) -> None:
    path = tmp_path / "TS.cbox"
    columns = "CoordinateX CoordinateY CoordinateZ Width Height Depth Confidence".split()
    header = "data_cryolo\n\nloop_\n" + "".join(f"_{name}\n" for name in columns)
    path.write_text(f"{header}10 20 30 8 4 1 <NA>\n")
    back = read_picks(path, particle="ribosome", grids=TomogramGrid((3.0, 2.0, 1.0)))
    assert back.to_numpy().tolist() == [["TS", "ribosome", 14.0, 44.0, 90.0]]
    with pytest.raises(InputError, match="its particle's name, which CBOX does not hold"):
        read_picks(path, grids=GRID)
    path.write_text("10\t20\t8\t8\t0.5\t8\t8\n")  # before crYOLO 1.8
    with pytest.raises(InputError, match="expected a STAR file"):
        read_picks(path, particle="ribosome", grids=GRID)
    path.write_text(header.replace("data_cryolo", "data_other") + "1 1 1 1 1 1 1\n")
    with pytest.raises(InputError, match="a block data_cryolo, found data_other"):
        read_picks(path, particle="ribosome", grids=GRID)
    with pytest.raises(InputError, match="radius, which makes its box"):
        write_picks(path, VOXEL, grids=GRID)


def test_names_that_cannot_be_files_or_are_unknown(tmp_path: Path) -> None:
    for name in ("copick", "imod", "imod-text", "cbox"):
        with pytest.raises(InputError, match="names that can name a file"):
            write_picks(tmp_path / "out", VOXEL.assign(run="../up"), name, grids=EVEN, particles=PARTICLES)
    write_picks(tmp_path / "a.csv", VOXEL.assign(particle="ribosom"))
    with pytest.raises(InputError, match=r"a.csv: expected particles among .*found 'ribosom' .did you mean 'ribosome'"):
        read_picks(tmp_path / "a.csv", particles=PARTICLES)
    with pytest.raises(InputError, match="the picks of one run"):
        write_picks(tmp_path / "a.mod", PICKS, grids=EVEN)
    with pytest.raises(InputError, match="the picks of one particle"):
        write_picks(tmp_path / "a.cbox", PICKS, grids=EVEN, particles=PARTICLES)
    with pytest.raises(InputError, match="one particle in one run"):
        write_picks(tmp_path / "a.json", PICKS)


def test_formats_are_found(tmp_path: Path) -> None:
    assert find_format("a.CSV") == "csv" and find_format("a.cbox") == "cbox" and find_format("a", "imod") == "imod"
    with pytest.raises(InputError, match=r"found 'relion' .did you mean 'relion"):
        find_format("a", "relion")
    with pytest.raises(InputError, match=re.escape("a name ending in '.xyz'; give the format")):
        find_format("a.xyz")
    with pytest.raises(InputError, match="found none"):
        find_format(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_picks(tmp_path / "none.csv")
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="pixel_size: expected a number above 0"):
            write_picks(tmp_path / "a.star", PICKS, "relion4", pixel_size=wrong)
        with pytest.raises(InputError, match="voxel_spacing: expected a spacing above 0"):
            TomogramGrid((1.0, wrong, 1.0))


def test_a_csv_without_runs_takes_the_given_one(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y,z,particle_type\n1,2,3,ribosome\n")
    assert in_order(read_picks(tmp_path / "a.csv", run="TS")) == [["TS", "ribosome", 1, 2, 3]]
    with pytest.raises(InputError, match="column 'experiment' once"):
        read_picks(tmp_path / "a.csv")


def scattered(count: int = 60) -> np.ndarray:
    """Locations x, y, z all over a volume of SHAPE and SPACING, one of them near its far corner."""
    extent = (np.array(SHAPE) - 1)[::-1] * np.array(SPACING)[::-1]
    return np.vstack([np.random.default_rng(0).uniform(0, 1, (count, 3)), [[1, 1, 1]]]) * extent


SPREAD = (np.array([56, 40, 24]), np.array([7.0, 11.0, 13.0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[:, ::-1], "with x and z exchanged all are inside"),
        (lambda p: p[:, [1, 0, 2]], "with x and y exchanged all are inside"),
        (lambda p: p[:, [0, 2, 1]], "with y and z exchanged all are inside"),
        (lambda p: p[:, [2, 0, 1]], "read as y, z, x all are inside"),
        (lambda p: p - SPREAD[0] * SPREAD[1] / 2, "from the volume's centre all are inside, as RELION 5 counts"),
        (lambda p: p * 7, r"\d+ of 61 outside, the first at \[[^]]*\]; check"),
        (lambda p: p / SPREAD[1], "none beyond .*they look like voxels"),
        (lambda p: p / 10, "none beyond .*they look like nanometers"),
        (lambda p: p / 500, r"none beyond \[[^]]*\]; if the picks are in voxels"),
    ],
)
def test_picks_that_cannot_belong_are_told_apart(change, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        check_picks_fit(make_picks("TS_1", "ribosome", change(scattered())), SHAPE, SPACING, "TS_1.csv")
    assert str(caught.value).startswith(
        "TS_1.csv: expected picks inside the volume, 392 x 440 x 312 angstrom (x, y, z)"
    )


def test_picks_that_fit(tmp_path: Path) -> None:
    locations = np.vstack([scattered(300), [[-50.0, 1, 1]]])
    inside = check_picks_fit(make_picks("TS_1", "ribosome", locations), SHAPE, SPACING, "TS_1")
    assert inside.tolist() == [True] * 301 + [False]
    assert check_picks_fit(empty_picks(), SHAPE, SPACING, "TS_1").shape == (0,)


def test_the_structures_have_the_sizes_of_the_specification() -> None:
    assert imod_module._HEADER.size == 232 and imod_module._OBJECT.size == 176 and imod_module._STORE.itemsize == 12
