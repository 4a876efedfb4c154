"""The whole chain on a small phantom: two folds are trained, 12 fits their thresholds, 21 picks with them."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from test_training import pytestmark as pytestmark

from czii25d.metrics import DEFAULT_THRESHOLD
from czii25d.models.checkpoint import read_card
from czii25d.picks import above_thresholds
from czii25d.pipeline.app import load_config
from czii25d.pipeline.dataset import create_dataset
from czii25d.pipeline.mask import create_mask
from czii25d.pipeline.phantom import make_phantom
from czii25d.pipeline.predict import predict
from czii25d.pipeline.solution import create_solution
from czii25d.pipeline.thresholds import fit_out_of_fold
from czii25d.pipeline.train import train

SHAPE = "shape=[32,112,96]"
COUNTS = (
    "counts={apo-ferritin: 4, beta-galactosidase: 3, ribosome: 3, thyroglobulin: 3, virus-like-particle: 1, "
    "beta-amylase: 3}"
)
FEW = "look_alikes={globule: 6, bead: 3, filament: 1}"


def test_12_fits_thresholds_on_the_phantom_and_21_picks_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_phantom(load_config("phantom", [SHAPE, COUNTS, FEW, "train_runs=[TS_1,TS_2]"]))
    create_dataset(load_config("create_dataset"))
    create_mask(load_config("create_mask"))
    create_solution(load_config("create_solution"))
    short = ["experiment=demo", "trainer.max_epochs=4", "data.sampling.samples_per_epoch=96"]
    for fold in ("TS_1", "TS_2"):
        train(load_config("train", [*short, f"data.fold_id={fold}", f"wandb.name={fold}"]))
    own = read_card(tmp_path / "saved_models/TS_1/best.ckpt")
    fit_out_of_fold(load_config("fit_thresholds", ["checkpoints=saved_models", "bootstrap.samples=200"]))
    report = json.loads(Path("output/out_of_fold/thresholds.json").read_text())
    assert set(report["runs"]) == {"TS_1", "TS_2"}
    cards = [read_card(tmp_path / f"saved_models/{fold}/best.ckpt") for fold in ("TS_1", "TS_2")]
    fitted = cards[0].thresholds if cards[0] else None
    assert fitted and own and fitted != own.thresholds and cards[1] and cards[1].thresholds == fitted
    predict(load_config("predict", ["checkpoints=saved_models"]))
    scored = pd.read_csv("output/predictions/scored_picks.csv")
    submitted = pd.read_csv("output/predictions/submission.csv")
    thresholds = dict.fromkeys(own.particles, DEFAULT_THRESHOLD) | fitted  # a particle that was never hit has none
    kept = above_thresholds(scored.rename(columns={"particle_type": "particle"}), thresholds)
    assert 0 < len(submitted) < len(scored) and set(submitted["experiment"]) == {"TS_9"}
    assert submitted["particle_type"].value_counts().to_dict() == kept["particle"].value_counts().to_dict()
