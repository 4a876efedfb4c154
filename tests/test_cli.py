"""The program czii25d: the same functions, keys and errors as the numbered scripts."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from conftest import PROJECT, run_script

from czii25d.pipeline.cli import COMMANDS

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROJECT)}
TINY = [
    "shape=[32,56,64]",
    "train_runs=[TS_1]",
    "test_runs=[TS_9]",
    *(f"counts.{name}=1" for name in ("apo-ferritin", "beta-galactosidase", "thyroglobulin", "beta-amylase")),
    *("counts.ribosome=0", "counts.virus-like-particle=0"),
    *(f"look_alikes.{name}=0" for name in ("globule", "bead", "filament")),
]


def czii25d(*arguments: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the program as a user would; with ``check`` it must succeed."""
    command = [sys.executable, "-m", "czii25d", *arguments]
    result = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_without_a_command_all_are_listed(tmp_path: Path) -> None:
    shown = czii25d(cwd=tmp_path).stdout
    assert shown == czii25d("--help", cwd=tmp_path).stdout
    lines = {line.split()[0]: line for line in shown.splitlines() if line.startswith("  ")}
    assert list(lines) == list(COMMANDS)
    for name, command in COMMANDS.items():
        assert lines[name].split(maxsplit=1)[1] == command.summary
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_what_runs_nothing_imports_nothing_slow(option: str) -> None:
    code = (
        f"import sys; sys.argv = ['czii25d', '{option}']\n"
        "from czii25d.pipeline.cli import main; main()\n"
        "print([name for name in ('torch', 'hydra', 'numpy', 'pandas') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("czii25d ") and result.stdout.splitlines()[-1] == "[]"


def test_an_unknown_command_is_one_line_with_a_suggestion(tmp_path: Path) -> None:
    result = czii25d("predcit", "checkpoints=x", cwd=tmp_path, check=False)
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: command: expected one of phantom, ")
    assert "found 'predcit' (did you mean 'predict'?)" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_says_of_a_command_what_its_script_does(name: str) -> None:
    command = COMMANDS[name]
    module = f"czii25d.pipeline.{command.function.split(':')[0]}"
    function = getattr(import_module(module), command.function.split(":")[1])
    path = command.script.removeprefix("-m ").replace(".", "/") + ".py" if "-m" in command.script else command.script
    tree = ast.parse((PROJECT / path).read_text())
    assert ast.get_docstring(tree) == command.summary
    [call] = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "run"
    ]
    called, config = call.args
    assert isinstance(called, ast.Name) and called.id == function.__name__
    assert isinstance(config, ast.Constant) and config.value == command.config
    origins = {
        alias.name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert origins.get(called.id, module) == module


def test_every_script_is_a_command() -> None:
    scripts = {path.name for pattern in ("[0-9][0-9]_*.py", "export_*.py") for path in PROJECT.glob(pattern)}
    assert len(scripts) == 11 and scripts == {each.script for each in COMMANDS.values() if "-m" not in each.script}


@pytest.mark.parametrize("name", ["phantom", "convert", "view"])
def test_help_is_that_of_the_script(name: str, tmp_path: Path) -> None:
    script = [str(PROJECT / word) if word.endswith(".py") else word for word in COMMANDS[name].script.split()]
    expected = subprocess.run(
        [sys.executable, *script, "--help"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True
    ).stdout
    found = czii25d(name, "--help", cwd=tmp_path).stdout
    assert found == expected and COMMANDS[name].summary in " ".join(found.split())
    assert "paths.output" in found and not list(tmp_path.iterdir())


def test_a_data_set_and_its_solution_are_those_of_the_scripts(tmp_path: Path) -> None:
    for folder in ("scripts", "commands"):
        (tmp_path / folder).mkdir()
    run_script("00_make_phantom.py", *TINY, cwd=tmp_path / "scripts")
    run_script("03_create_solution.py", "--class_num", "2", cwd=tmp_path / "scripts")
    czii25d("phantom", *TINY, cwd=tmp_path / "commands")
    czii25d("solution", "--class_num", "2", cwd=tmp_path / "commands")
    scripts, commands = (tmp_path / folder for folder in ("scripts", "commands"))
    assert contents(commands / "input") == contents(scripts / "input")
    solution = (commands / "output/solution.csv").read_text()
    assert solution == (scripts / "output/solution.csv").read_text() and solution.count("TS_1") == 2
    for folder in (scripts, commands):  # one folder of logs for each step, whatever program ran it
        assert {path.name for path in (folder / "output/hydra").iterdir()} == {"phantom", "create_solution"}


def test_sweeps_go_through_a_command(tmp_path: Path) -> None:
    czii25d("phantom", "-m", *TINY, "seed=0,1", "paths.input=data${seed}", cwd=tmp_path)
    one, other = (contents(tmp_path / name) for name in ("data0", "data1"))
    assert set(one) == set(other) and one["test_solution.csv"] != other["test_solution.csv"]


@pytest.mark.parametrize("override", ["paths.inptu=x", "class_num=many", "class_num=[1,"])
def test_errors_are_those_of_the_script(override: str, tmp_path: Path) -> None:
    expected = run_script("03_create_solution.py", override, cwd=tmp_path, check=False)
    found = czii25d("solution", override, cwd=tmp_path, check=False)
    assert found.returncode == expected.returncode == 2 and found.stdout == expected.stdout == ""
    assert found.stderr == expected.stderr and found.stderr.strip().count("\n") == 0


def test_other_processes_of_a_training_get_the_same_command(tmp_path: Path) -> None:
    """Lightning starts them with ``sys.argv``."""
    code = (
        "import sys\n"
        "import czii25d.pipeline.phantom as module\n"
        "from czii25d.pipeline.cli import main\n"
        "module.make_phantom = lambda cfg: print(cfg.seed, *sys.argv)\n"
        "sys.argv[0] = 'prog'\n"
        "main()"
    )
    arguments = ["phantom", "seed=3"]
    for _ in range(2):  # what is started so starts the same again
        command = [sys.executable, "-c", code, *arguments]
        result = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        seed, program, *arguments = result.stdout.split()
        assert (seed, program, arguments[:2]) == ("3", "prog", ["phantom", "seed=3"])
