"""The submission notebook runs from top to bottom on a phantom, offline."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from conftest import PROJECT, SPACING, run_script
from nbclient import NotebookClient
from test_predict_score import MODEL

from czii25d.models import create_model
from czii25d.models.checkpoint import ModelCard, save_weights
from czii25d.particles import load_particles

NOTEBOOK = PROJECT / "notebooks/submission.ipynb"


def test_the_notebook_ends_with_a_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    particles = load_particles()
    few = [f"counts.{name}=1" for name in particles.names]
    few += [f"look_alikes.{name}=1" for name in ("globule", "bead", "filament")]
    run_script(
        "00_make_phantom.py", "shape=[48,96,96]", "train_runs=[TS_1]", "test_runs=[TS_8,TS_9]", *few, cwd=tmp_path
    )
    model = {**MODEL, "class_num": len(particles)}
    for seed in (1, 2):
        torch.manual_seed(seed)
        card = ModelCard(model, particles.to_config(), SPACING, thresholds=dict.fromkeys(particles.names, 0.1))
        save_weights(tmp_path / f"networks/{seed}.safetensors", create_model(**model, pretrained=False), card)
    for name in ("input", "networks", "output"):
        monkeypatch.setenv(f"CZII25D_{name.upper()}", str(tmp_path / name))
    monkeypatch.setenv("CZII25D_BUDGET_HOURS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "is kept without results"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    submission = pd.read_csv(tmp_path / "output/submission.csv")
    assert list(submission.columns) == ["id", "experiment", "particle_type", "x", "y", "z"]
    tests = {path.name for path in (tmp_path / "input/test/static/ExperimentRuns").iterdir()}
    assert len(submission) and set(submission["experiment"]) == tests
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert f"{len(tests)} tomograms, 2 networks" in printed and "2 of 2 networks" in printed
    assert (tmp_path / f"output/{min(tests)}.png").stat().st_size > 10_000
