from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_script

from czii25d.errors import InputError
from czii25d.pipeline.app import _Checked, load_config, read_comments, translate_flags
from czii25d.pipeline.train import train


def test_published_flags_become_overrides() -> None:
    assert translate_flags(["--mode", "test", "--class_num=5", "a=b", "-m"]) == [
        "mode=test",
        "class_num=5",
        "a=b",
        "-m",
    ]


def test_comments_are_found_by_dotted_key(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("one: 1  # first\ntwo:  # group\n  three: x  # inner\n  four: 4\nfive: 5 # last\n")
    assert read_comments(path) == {"one": "first", "two": "group", "two.three": "inner", "five": "last"}


def test_a_job_of_a_sweep_crosses_processes() -> None:
    """Hydra's joblib and submitit launchers send it by cloudpickle."""
    cloudpickle = pytest.importorskip("cloudpickle", reason="comes with Hydra's launchers, czii25d[sweep]")
    job = cloudpickle.loads(cloudpickle.dumps(_Checked(train, "train", ["11_train.py"], "czii")))
    assert (job.function, job.config_name, job.__module__) == (train, "train", "czii25d.pipeline.train")


SCRIPTS = [
    "00_make_phantom.py",
    "01_create_dataset.py",
    "02_create_mask.py",
    "03_create_solution.py",
    "11_train.py",
    "13_soup.py",
    "21_predict.py",
    "22_score.py",
    "23_report.py",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_key(script: str, tmp_path: Path) -> None:
    shown = run_script(script, "--help", cwd=tmp_path).stdout
    lines = shown.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("key "))
    comment_column = lines[start].index("what it is")
    unexplained = [
        line.split()[0] for line in lines[start + 1 :] if not line.startswith(" ") and not line[comment_column:].strip()
    ]
    assert not unexplained, shown
    assert not list(tmp_path.iterdir()), "help must not write anything"


@pytest.mark.parametrize("script", SCRIPTS)
def test_misspelt_key_is_one_line_with_a_suggestion(script: str, tmp_path: Path) -> None:
    result = run_script(script, "paths.inptu=x", cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert result.stderr.strip().count("\n") == 0, result.stderr
    assert "error: key paths.inptu" in result.stderr and "paths.input" in result.stderr
    assert not list(tmp_path.iterdir())


def test_text_for_a_number_is_refused(tmp_path: Path) -> None:
    result = run_script("11_train.py", "opt.lr=fast", cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert "error: key opt.lr: expected a number" in result.stderr


def test_a_value_where_there_are_keys_within_is_refused(tmp_path: Path) -> None:
    result = run_script("00_make_phantom.py", "counts=1", cwd=tmp_path, check=False)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "error: key counts: expected keys within it, as counts.apo-ferritin=" in result.stderr


def test_malformed_override_is_one_line(tmp_path: Path) -> None:
    result = run_script("11_train.py", "data.fold_id=[1,", cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert result.stderr.strip().count("\n") == 0, result.stderr


def test_unknown_group_names_the_choices(tmp_path: Path) -> None:
    result = run_script("11_train.py", "model=smal", cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert "small" in result.stderr and result.stderr.strip().count("\n") == 0


def test_own_table_of_particles_replaces_the_competitions(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("spliceosome: {radius: 110}\n")
    assert list(load_config("train", [f"particles={tmp_path / 'mine.yaml'}"]).particles) == ["spliceosome"]
    objects = [
        {"name": "membrane", "is_particle": False, "label": 1},
        {"name": "ribosome", "is_particle": True, "label": 2, "radius": 150.0, "color": [0, 158, 115, 255]},
        {"name": "proteasome", "is_particle": True, "label": 3, "radius": 75},
    ]
    (tmp_path / "copick.json").write_text(json.dumps({"name": "mine", "pickable_objects": objects}))
    particles = load_config("train", [f"particles={tmp_path / 'copick.json'}"]).particles
    assert list(particles) == ["ribosome", "proteasome"] and particles.ribosome.radius == 150
    assert particles.ribosome.color.upper() == "#009E73"
    assert len(load_config("train").particles) == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "particles by name"),
        ("ribosome: {radius: 150", "a table of particles"),
        ('{"pickable_objects": [{"name": "a", "is_particle": true}]}', "a radius in angstrom"),
        ('{"pickable_objects": [{"name": "a", "radius": 1}, {"name": "a", "radius": 2}]}', "twice"),
        ('{"pickable_objects": [3]}', "each with a name"),
    ],
)
def test_a_wrong_table_of_particles_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_config("train", [f"particles={tmp_path / 'mine.yaml'}"])
    assert "\n" not in str(caught.value) and "mine.yaml" in str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for threads in /proc")
def test_no_allocator_of_pyarrow_runs_a_thread_in_our_processes() -> None:
    """It has ended processes by a segmentation fault: the reason of the environment that the package sets."""
    pytest.importorskip("pyarrow")
    code = "import czii25d, pandas, pyarrow, pathlib\n"
    code += "print([path.read_text().strip() for path in pathlib.Path('/proc/self/task').glob('*/comm')])"
    bare = {key: value for key, value in os.environ.items() if key != "JE_ARROW_MALLOC_CONF"}
    result = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True, check=True)
    assert "['" in result.stdout and "jemalloc" not in result.stdout
