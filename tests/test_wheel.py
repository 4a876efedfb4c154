"""The wheel: what it holds, and that it works where there is no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import PROJECT
from test_cli import TINY, contents

from czii25d.pipeline.cli import COMMANDS

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [*PIP, "wheel", str(PROJECT), "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(folder)]
    result = subprocess.run(build, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel, and nothing else, is installed into. Read-only."""
    target = tmp_path_factory.mktemp("installed")
    install = [*PIP, "install", "--no-deps", "--no-index", "-q", "--target", str(target), str(wheel)]
    result = subprocess.run(install, cwd=target, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return target


def run(installed: Path, *words: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}  # goes before an editable installation
    result = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_it_holds_the_package_and_the_configuration_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {path for path in (PROJECT / "czii25d").rglob("*") if path.suffix in (".py", ".typed", ".jinja")}
    configuration = {path for path in (PROJECT / "conf").rglob("*.yaml") if "local" not in path.parts}
    assert len(package) > 60 and len(configuration) > 20
    expected = {str(path.relative_to(PROJECT)) for path in package}
    expected |= {f"czii25d/{path.relative_to(PROJECT)}" for path in configuration}
    assert names == expected


def test_its_program_runs_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = "import czii25d, czii25d.particles as p; print(czii25d.__file__); print(p.conf_dir())"
    places = run(installed, "-c", where, cwd=tmp_path).split()
    assert places == [str(installed / "czii25d/__init__.py"), str(installed / "czii25d/conf")]
    program = str(installed / "bin/czii25d")
    shown = run(installed, program, "--help", cwd=tmp_path)
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert run(installed, program, "--version", cwd=tmp_path).split()[1][0].isdigit()
    assert "look_alikes.globule" in run(installed, program, "phantom", "--help", cwd=tmp_path)
    assert not contents(tmp_path)
    run(installed, program, "phantom", *TINY, cwd=tmp_path)
    assert "input/test_solution.csv" in contents(tmp_path)
