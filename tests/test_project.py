"""What stands around the package: containers, experiments, documented commands, parity with the published network."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path

import hydra
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import PROJECT

import czii25d
from czii25d.particles import conf_dir
from czii25d.picks import read_picks_json
from czii25d.pipeline.train import create_schedule, optimizer_factory

EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))


def test_compose_file_gives_a_gpu_a_mount_and_an_idle_service() -> None:
    service = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())["services"]["dev"]
    [device] = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and "gpu" in device["capabilities"]
    assert ".:/workspace" in service["volumes"]
    dockerfile = (PROJECT / service["build"]["dockerfile"]).read_text()
    assert re.search(r"^USER dev$", dockerfile, re.M), "not root"
    assert "WORKDIR /workspace" in dockerfile and "sleep" in dockerfile
    for line in dockerfile.splitlines():
        if line.startswith("COPY"):
            for source in line.split()[2:-1]:
                assert (PROJECT / source).exists(), line


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_builds_its_network_optimizer_and_schedule(experiment: str) -> None:
    with hydra.initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        cfg = hydra.compose(
            "train", [f"experiment={experiment}", "model.pretrained=false", "model.decoder_channels=[8,8,8]"]
        )
    kwargs = {k: v for k, v in cfg.model.items() if not k.startswith(("ema", "freeze", "resume"))}
    net = czii25d.create_model(**kwargs)
    optimizer = optimizer_factory(cfg)(net)
    schedule = create_schedule(cfg, optimizer, 10)
    rates = []
    for step in range(10 * cfg.trainer.max_epochs):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    top = int(np.argmax(rates))
    assert rates[0] < 1e-6 and max(rates) == pytest.approx(cfg.opt.lr, rel=0.05) and rates[-1] < 0.02 * cfg.opt.lr
    assert (np.diff(rates[: top + 1]) >= 0).all() and (np.diff(rates[top:]) <= 1e-12).all()


def test_readme_names_only_keys_and_files_that_exist() -> None:
    text = (PROJECT / "README.md").read_text()
    for name in set(re.findall(r"\b\d\d_\w+\.py\b", text)):
        assert (PROJECT / name).is_file(), name
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (PROJECT / path).exists(), path
    keys = set(re.findall(r"\b(?:data|model|opt|loss|scheduler|trainer|wandb|infer|heatmap)\.\w+(?==)", text))
    assert len(keys) > 15
    groups = {key.split(".")[0] for key in keys}
    known = {f"{g}.{k}" for g in groups for k in yaml.safe_load((conf_dir() / g / "default.yaml").read_text())}
    assert keys <= known, keys - known


@pytest.mark.data
def test_network_agrees_with_the_published_one(reference_dir: Path) -> None:
    for entry in json.loads((reference_dir / "reference/network_parity.json").read_text()):
        names = ("backbone", "in_channels", "class_num", "img_depth", "img_size")
        net = czii25d.create_model("timm3d3", **{name: entry[name] for name in names}, pretrained=False).eval()
        state = net.state_dict()
        assert {key: list(value.shape) for key, value in state.items()} == entry["state_dict"]
        for key, value in state.items():
            if value.is_floating_point() and key != "stem.conv.weight":
                value.copy_(torch.from_numpy(published_weight(key, tuple(value.shape))))
        x = np.random.default_rng(entry["input"]["seed"]).standard_normal(entry["input"]["shape"]).astype(np.float32)
        with torch.inference_mode():
            output = net(torch.from_numpy(x)).flatten()
        torch.testing.assert_close(output[entry["index"]], torch.tensor(entry["value"]), atol=1e-4, rtol=0)
        assert output.mean().item() == pytest.approx(entry["mean"], abs=1e-4)


def published_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights as the reference states them: a function of the key alone."""
    draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("running_var"):
        return 1 + 0.1 * np.abs(draw)
    if name.endswith("running_mean"):
        return 0.1 * draw
    if len(shape) <= 1:
        return 1 + 0.1 * draw if name.endswith("weight") else 0.1 * draw
    return (draw / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


@pytest.mark.data
def test_score_agrees_with_the_competition(reference_dir: Path) -> None:
    columns = ["experiment", "particle_type", "x", "y", "z"]
    for case in json.loads((reference_dir / "reference/metric_cases.json").read_text()):
        solution, submission = (pd.DataFrame(case[name], columns=columns) for name in ("solution", "submission"))
        value = czii25d.score(solution, submission, case["distance_multiplier"], case["beta"])
        assert value == pytest.approx(case["score"], abs=1e-9)


@pytest.mark.data
def test_the_competitions_own_pick_files_are_read_as_they_are(reference_dir: Path) -> None:
    folder = reference_dir / "data/real/czii_TS_5_4/overlay/ExperimentRuns/TS_5_4/Picks"
    counts = {path.stem: len(read_picks_json(path, path.stem)) for path in folder.glob("*.json")}
    assert counts["apo-ferritin"] == 46 and counts["ribosome"] == 31 and len(counts) == 6
