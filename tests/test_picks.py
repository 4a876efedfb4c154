from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from czii25d.errors import InputError
from czii25d.picks import (
    PICK_COLUMNS,
    concat_picks,
    empty_picks,
    make_picks,
    read_picks_csv,
    read_picks_json,
    write_picks_json,
    write_scored_picks_csv,
    write_solution_csv,
    write_submission_csv,
)

LOCATIONS = [(431.7, 92.3, 61.9), (123.4005, 301.2, 187.6)]
names = st.text(st.characters(blacklist_categories=["C", "Z"]), min_size=1, max_size=8)
coordinates = st.floats(-1e5, 1e5)
rows = st.lists(st.tuples(names, names, coordinates, coordinates, coordinates, st.floats(0, 1)), max_size=6)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("picks")


@given(rows)
def test_csv_there_and_back(scratch: Path, table: list[tuple]) -> None:
    picks = pd.DataFrame(table, columns=[*PICK_COLUMNS, "score"]) if table else empty_picks(scored=True)
    write_scored_picks_csv(scratch / "picks.csv", picks)
    back = read_picks_csv(scratch / "picks.csv", scored=True)
    assert list(back.columns) == [*PICK_COLUMNS, "score"]
    assert back[["run", "particle"]].to_numpy().tolist() == picks[["run", "particle"]].to_numpy().tolist()
    np.testing.assert_allclose(back[["x", "y", "z"]].to_numpy(float), picks[["x", "y", "z"]].to_numpy(float), atol=1e-3)
    np.testing.assert_allclose(back["score"], picks["score"].astype(float), atol=1e-6)
    assert all(dtype.kind == "f" for dtype in back.dtypes[["x", "y", "z", "score"]])


@given(st.lists(st.tuples(coordinates, coordinates, coordinates), max_size=5))
def test_json_there_and_back(scratch: Path, locations: list[tuple[float, float, float]]) -> None:
    write_picks_json(scratch / "picks.json", "TS_1", "ribosome", locations)
    back = read_picks_json(scratch / "picks.json", "ribosome")
    assert back.shape == (len(locations), 3) and back.dtype == np.float64
    np.testing.assert_allclose(back, np.reshape(locations, (-1, 3)), atol=1e-3)


def test_submission_is_what_the_competition_takes(tmp_path: Path) -> None:
    picks = make_picks("TS_5_4", "ribosome", LOCATIONS).assign(score=0.5)
    write_submission_csv(tmp_path / "submission.csv", picks)
    assert (tmp_path / "submission.csv").read_text().splitlines() == [
        "id,experiment,particle_type,x,y,z",
        "0,TS_5_4,ribosome,431.7,92.3,61.9",
        "1,TS_5_4,ribosome,123.4,301.2,187.6",
    ]
    write_solution_csv(tmp_path / "solution.csv", picks)
    assert (tmp_path / "solution.csv").read_bytes() == (tmp_path / "submission.csv").read_bytes()
    write_scored_picks_csv(tmp_path / "scored.csv", picks)
    assert (tmp_path / "scored.csv").read_text().splitlines()[1] == "0,TS_5_4,ribosome,431.7,92.3,61.9,0.5"


def test_either_vocabulary_in_any_order_with_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "picks.csv"
    path.write_text("z,y,x,fold,particle_type,experiment\n3,2,1,0,NA,007\n")
    assert read_picks_csv(path).to_numpy().tolist() == [["007", "NA", 1.0, 2.0, 3.0]]
    path.write_text("run,particle,x,y,z\n007,NA,1,2,3\n")
    assert read_picks_csv(path).to_numpy().tolist() == [["007", "NA", 1.0, 2.0, 3.0]]


def test_header_alone_is_no_picks(tmp_path: Path) -> None:
    write_submission_csv(tmp_path / "none.csv", empty_picks())
    assert read_picks_csv(tmp_path / "none.csv").equals(empty_picks())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected a CSV file"),
        ("\xff\xfe\x00", "expected a CSV file|column"),
        ("id,experiment,particle_type,x,y\n0,a,b,1,2\n", "column 'z' once, found it 0 times"),
        (
            "id,experiment,particle_typ,x,y,z\n0,a,b,1,2,3\n",
            "column 'particle_type'.*did you mean 'particle_typ'",
        ),
        ("run,experiment,particle,x,y,z\na,a,b,1,2,3\n", "column 'experiment' once, found it 2 times"),
        (
            "run,particle,x,y,z\na,b,1,2,3\na,b,1,nan,3\n",
            "line 3: expected a finite number as y, found 'nan'",
        ),
        ("run,particle,x,y,z\na,b,1,,3\n", "line 2: expected a finite number as y"),
        ("run,particle,x,y,z\na,b,1,inf,3\n", "finite number as y"),
        ("run,particle,x,y,z\na,b,1,two,3\n", "found 'two'"),
        ("run,particle,x,y,z\na,,1,2,3\n", "line 2: expected a name as particle"),
        ("run,particle,x,y,z\na,b,1,2,3\na,b,1,2,3,4,5,6\n", "expected a CSV file"),
    ],
)
def test_wrong_csv_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "wrong.csv"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=message) as caught:
        read_picks_csv(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_scores_are_asked_for(tmp_path: Path) -> None:
    write_submission_csv(tmp_path / "picks.csv", make_picks("a", "b", LOCATIONS))
    with pytest.raises(InputError, match="column 'score'"):
        read_picks_csv(tmp_path / "picks.csv", scored=True)


def point(x: object, y: object = 2.0, z: object = 3.0) -> dict:
    return {"location": {"x": x, "y": y, "z": z}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"points": [', "malformed JSON"),
        ("", "malformed JSON"),
        ("[]", "'points'"),
        ("{}", "'points'"),
        (json.dumps({"points": {"a": 1}}), "'points'"),
        (json.dumps({"points": [point(1.0), {"place": 1}]}), "point 1: expected a location"),
        (json.dumps({"points": [{"location": [1, 2, 3]}]}), "point 0: expected a location"),
        (json.dumps({"points": [{"location": {"x": 1, "y": 2}}]}), "point 0"),
        (json.dumps({"points": [point("1.0")]}), "finite numbers"),
        (json.dumps({"points": [point(float("nan"))]}), "finite numbers"),
        (json.dumps({"points": [point(float("inf"))]}), "finite numbers"),
        (json.dumps({"points": [point(True)]}), "finite numbers"),
        (json.dumps({"points": [None]}), "point 0"),
        (json.dumps({"points": [point(1.0)], "unit": "nanometer"}), "unit angstrom, found 'nanometer'"),
    ],
)
def test_wrong_json_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "ribosome.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read_picks_json(path, "ribosome")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_frames_join_without_warnings() -> None:
    frame = make_picks("a", "b", LOCATIONS)
    assert len(concat_picks([empty_picks(), frame, make_picks("a", "c", []), frame])) == 4
    assert concat_picks([]).equals(empty_picks())
    assert list(concat_picks([], scored=True).columns) == [*PICK_COLUMNS, "score"]


@pytest.mark.data
def test_real_pick_files_agree_with_the_published_table(reference_dir: Path) -> None:
    folder = reference_dir / "data/real/czii_TS_5_4/overlay/ExperimentRuns/TS_5_4/Picks"
    table = read_picks_csv(reference_dir / "data/czii_train_picks.csv")
    assert len(table) == 1269
    for particle, theirs in table[table["run"] == "TS_5_4"].groupby("particle"):
        ours = read_picks_json(folder / f"{particle}.json", str(particle))
        np.testing.assert_allclose(np.sort(ours, 0), np.sort(theirs[["x", "y", "z"]].to_numpy(), 0), atol=1e-3)
