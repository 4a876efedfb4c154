"""The benchmark of accuracy on tiny data: every recipe can be built, and the tables are printed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import PROJECT
from test_documentation import SMALLER

from czii25d.pipeline.app import load_config

TINY = [key for key in SMALLER["train"] if not key.startswith(("trainer.max_epochs", "data.sampling", "scheduler"))]


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    import accuracy

    return accuracy


def test_every_recipe_is_a_configuration(accuracy: ModuleType) -> None:
    for recipe in accuracy.RECIPES.values():
        cfg = load_config("train", [*recipe.overrides])
        assert cfg.opt.lr > 0 and recipe.what


@pytest.mark.parametrize("name", ["flexible_unet", "unet"])
def test_the_peers_predict_a_heatmap_for_each_class(accuracy: ModuleType, name: str) -> None:
    pytest.importorskip("monai", reason="the peers need MONAI")
    network = accuracy.RECIPES[name].network(5).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 1, 32, 64, 96)).shape == (1, 5, 32, 64, 96)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_recipes_are_trained_once_and_compared(
    accuracy: ModuleType,
    prepared_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = prepared_dir / "output"
    narrow = accuracy.Recipe("sigma 2", tuple(TINY), sigma_voxel=2, tile=(16, 32, 64))
    recipes = {"ours": accuracy.Recipe("tiny", tuple(TINY)), "ours, narrow": narrow}
    monkeypatch.setattr(accuracy, "RECIPES", recipes)
    monkeypatch.setattr(accuracy, "EPOCHS", 2)
    command = ["accuracy.py", str(output), "--held-out=TS_6_4", "--unseen", f"again={output}", "--budget=0.01"]
    command += ["--seeds", "0", "1", f"--work={tmp_path}", "--recipes", *recipes]
    monkeypatch.setattr(sys, "argv", command)
    accuracy.main()
    first = capsys.readouterr().out
    results = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert sorted(results) == [f"ours{name}.{seed}.0.01.json" for name in (",_narrow", "") for seed in (0, 1)]
    for result in results.values():
        assert result["samples"] == 2 * 2  # two epochs of a step at least
        assert set(result["scores"]) == {"held out", "again"}
        assert all(0 <= score <= 1 for scores in result["scores"].values() for score in scores.values())
    assert re.search(r"^\| ours \(tiny\) \| .* ± .* \|$", first, re.M)
    [difference] = re.findall(r"^\| ours, narrow \| .* \| (\S+) ± \S+ \|$", first.split("less that of")[1], re.M)

    def mean(name: str) -> float:
        totals = [score["total"] for seed in (0, 1) for score in results[f"{name}.{seed}.0.01.json"]["scores"].values()]
        return sum(totals) / len(totals)

    assert float(difference) == pytest.approx(mean("ours,_narrow") - mean("ours"), abs=6e-4)
    monkeypatch.setattr(accuracy, "run", None)  # everything is kept, nothing is trained again
    accuracy.main()
    assert capsys.readouterr().out == first
    monkeypatch.setitem(accuracy.RECIPES, "ours", accuracy.Recipe("tiny", (*TINY, "opt.lr=0.5")))
    with pytest.raises(SystemExit, match=r"ours\.0\.0\.01\.json: expected a result of this recipe"):
        accuracy.main()
