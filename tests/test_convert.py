from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import PROJECT, run_script
from test_formats import a_frame, in_order
from test_mrc import write

from czii25d.data.targets import open_target
from czii25d.data.volumes import open_volume
from czii25d.errors import InputError
from czii25d.formats import FORMATS, TomogramGrid, read_picks, write_picks
from czii25d.pipeline.convert import read_grids

SHAPE = (24, 40, 56)
PAGE = (PROJECT / "docs/formats.md").read_text()
PICKS = a_frame(
    [
        ("TS_1", "ribosome", 100.25, 200.5, 50.125, 0.75),
        ("TS_1", "apo-ferritin", 501.0, 20.0, 150.0, 0.25),
        ("TS_2", "ribosome", 20.0, 340.0, 180.0, 0.125),
    ],
    scored=True,
)


def convert(*overrides: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "czii25d.pipeline.convert", *overrides]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tomograms of 10 angstrom and scored picks of both."""
    (tmp_path / "tomograms").mkdir()
    for seed, run in enumerate(("TS_1", "TS_2")):
        volume = np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)
        write(tmp_path / "tomograms" / f"{run}.mrc", volume, (10.0, 10.0, 10.0))
    write_picks(tmp_path / "scored_picks.csv", PICKS)
    return tmp_path


def test_the_pages_commands_hand_the_picks_around(folder: Path) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert len(commands) == 8
    for program, *arguments in commands:
        assert program == "python"
        arguments = [str(PROJECT / word) if word.endswith("_dataset.py") else word for word in arguments]
        result = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f"{arguments}: {result.stderr}"
    back = read_picks(folder / "back.csv")
    ours, theirs = back.sort_values(["run", "x"]), PICKS.sort_values(["run", "x"])
    assert ours[["run", "particle"]].to_numpy().tolist() == theirs[["run", "particle"]].to_numpy().tolist()
    np.testing.assert_allclose(ours[["x", "y", "z", "score"]], theirs[["x", "y", "z", "score"]], atol=1e-3)
    assert open_volume(folder / "output/volumes/train/TS_2").voxel_spacing == (10, 10, 10)
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, timeout=300)
    assert in_order(read_picks(folder / "picks.csv")) == in_order(PICKS)
    [table] = re.findall(r"```csv\n(.*?)```", PAGE, re.DOTALL)
    (folder / "runs.csv").write_text(table)
    assert read_grids(str(folder / "runs.csv"), None, None) == {"TS_1": TomogramGrid((10.0,) * 3, SHAPE)}


def test_own_picks_make_heatmaps_and_a_solution(folder: Path) -> None:
    grids = TomogramGrid((10.0,) * 3, SHAPE)
    write_picks(folder / "models", pd.concat([PICKS, PICKS[:1]]), "imod", grids=grids)
    run_script("01_create_dataset.py", "tomograms=tomograms", cwd=folder)
    shown = run_script("02_create_mask.py", "picks=models", "class_num=3", cwd=folder).stderr
    assert "run TS_1: dropped 1 duplicate picks" in shown, shown
    run_script("03_create_solution.py", "picks=models", cwd=folder)
    solution = read_picks(folder / "output/solution.csv")
    assert in_order(solution) == in_order(PICKS)
    target = open_target(folder / "output/heatmaps/TS_2.zarr")
    assert target.particles.names == ("apo-ferritin", "beta-galactosidase", "ribosome")
    np.testing.assert_allclose(target.centers_zyx_voxel, [[18, 34, 2]], atol=1e-4)
    for picks, message in (("none", "none: no such file or folder"), ("wrong.csv", "did you mean 'ribosome'")):
        write_picks(folder / "wrong.csv", PICKS.assign(particle="ribosom"))
        result = run_script("03_create_solution.py", f"picks={picks}", cwd=folder, check=False)
        assert result.returncode == 2 and message in result.stderr, result.stderr


def test_the_page_names_every_format() -> None:
    assert re.findall(r"^\| `([\w-]+)` \|", PAGE, re.MULTILINE) == list(FORMATS)


def test_picks_of_another_frame_are_refused(folder: Path) -> None:
    swapped = PICKS.rename(columns={"x": "z", "z": "x"})
    write_picks(folder / "swapped.csv", swapped)
    result = convert(
        "source=swapped.csv",
        "target=out.star",
        "target_format=relion4",
        "tomograms=tomograms",
        "pixel_size=2",
        cwd=folder,
    )
    assert result.returncode == 2 and result.stderr.strip().count("\n") == 0, result.stderr
    assert "error: swapped.csv: run TS_1: expected picks inside" in result.stderr
    assert "with x and z exchanged all are inside" in result.stderr and not (folder / "out.star").exists()


def test_what_was_done_is_said_and_slips_are_one_line(folder: Path) -> None:
    done = convert("source=scored_picks.csv", "target=new.csv", cwd=folder)
    assert done.stderr.strip() == ("3 picks of 2 particles in 2 runs with scores: csv to new.csv (1 files)"), (
        done.stderr
    )
    assert (folder / "new.csv").read_bytes() == (folder / "scored_picks.csv").read_bytes()
    for overrides, message in (
        (("target=a.csv",), "source"),
        (("source=none.csv", "target=a.csv"), "error: none.csv: no such file or folder"),
        (("source=scored_picks.csv", "target=a.star"), "expected relion4 or relion5"),
        (("source=scored_picks.csv", "target=a.csv", "pixel_size=two"), "pixel_size: expected a number above 0"),
        (("source=scored_picks.csv", "target=a.mod", "voxel_spacing=0"), "voxel spacing above 0"),
        (("source=scored_picks.csv", "target=a", "target_format=imod", "voxel_spacng=3"), "voxel_spacing"),
    ):
        wrong = convert(*overrides, cwd=folder)
        assert wrong.returncode == 2 and message in wrong.stderr, wrong.stderr
        assert wrong.stderr.strip().count("\n") == 0, wrong.stderr


def test_help_explains_every_key(tmp_path: Path) -> None:
    lines = convert("--help", cwd=tmp_path).stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("key "))
    column = lines[start].index("what it is")
    assert not [line for line in lines[start + 1 :] if not line.startswith(" ") and not line[column:].strip()]
    assert not list(tmp_path.iterdir())


def test_grids(folder: Path) -> None:
    tomograms = str(folder / "tomograms")
    assert read_grids(None, None, None) is None
    assert read_grids(None, 7.5, None) == TomogramGrid((7.5,) * 3)
    assert read_grids(None, [3.0, 2.0, 1.0], [4, 5, 6]) == TomogramGrid((3.0, 2.0, 1.0), (4, 5, 6))
    assert read_grids(tomograms, None, None) == {run: TomogramGrid((10.0,) * 3, SHAPE) for run in ("TS_1", "TS_2")}
    assert read_grids(tomograms, 13.7, None)["TS_2"].voxel_spacing == (13.7,) * 3  # type: ignore[index]
    for given in ((None, None, [1, 2, 3]), (tomograms, 10.0, [1, 2, 3]), (None, 1.0, [1, 2]), (None, 1.0, [1, 2, 0.5])):
        with pytest.raises(InputError, match="key shape"):
            read_grids(*given)
