"""Imports go one way, and heavy or shell-only libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "czii25d"
LAYERS = [
    {"errors", "files", "geometry", "particles", "tiling"},
    {"picks", "heatmap", "peaks", "metrics", "losses", "phantom", "baseline", "plotting", "thresholds"}
    | {"averages", "charts"}
    | {"regions", "resampling", "contrast"},
    {"data", "models", "formats"},
    {"inference"},
    {"runtimes"},
    {"export"},
    {"training"},
    {"pipeline"},
    {"picker", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = LEVEL[part_of(path)]
    for name in imported_modules(path):
        pieces = name.split(".")
        if pieces[0] == "czii25d" and len(pieces) > 1 and pieces[1] in LEVEL:
            assert LEVEL[pieces[1]] <= own, f"{path.name} imports {name}, which lies above it"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_shell_libraries_stay_in_the_shell(path: Path) -> None:
    roots = {name.split(".")[0] for name in imported_modules(path)}
    if part_of(path) != "pipeline":
        assert not roots & {"hydra", "omegaconf", "wandb"}, path
    if part_of(path) not in ("pipeline", "training") and path.name != "datamodule.py":
        assert not roots & {"lightning", "pytorch_lightning"}, path


def test_every_module_has_a_layer() -> None:
    assert {part_of(path) for path in MODULES} == set(LEVEL)


def test_preparing_data_does_not_load_torch() -> None:
    code = (
        "import sys; import czii25d.pipeline.dataset, czii25d.pipeline.mask, czii25d.pipeline.solution;"
        "print([m for m in ('torch', 'lightning', 'timm', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
