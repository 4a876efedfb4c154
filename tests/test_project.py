"""What stands around the package: containers, experiments, documented commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import hydra
import numpy as np
import pytest
import yaml
from conftest import PROJECT

import czii25d
from czii25d.particles import conf_dir
from czii25d.pipeline.app import load_config, translate_flags
from czii25d.pipeline.train import create_schedule, optimizer_factory

EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))


def test_compose_file_gives_a_gpu_a_mount_and_an_idle_service() -> None:
    service = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())["services"]["dev"]
    [device] = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and "gpu" in device["capabilities"]
    assert ".:/workspace" in service["volumes"]
    assert "profiles" not in service  # `docker compose up` starts it
    dockerfile = (PROJECT / service["build"]["dockerfile"]).read_text()
    assert "tensorrt" in dockerfile
    assert re.search(r"^USER dev$", dockerfile, re.M), "not root"
    assert "WORKDIR /workspace" in dockerfile and "sleep" in dockerfile
    for line in dockerfile.splitlines():
        if line.startswith("COPY"):
            for source in line.split()[2:-1]:
                assert (PROJECT / source).exists(), line


def test_the_service_that_predicts_gives_keys_that_exist() -> None:
    service = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())["services"]["predict"]
    mounts = [re.search(r":(/[^:]+)(:ro)?$", volume)[1] for volume in service["volumes"]]  # type: ignore[index]
    python, script, *overrides = service["entrypoint"]
    assert python == "python" and (PROJECT / Path(script).relative_to("/workspace")).is_file()
    assert {override.split("=")[1] for override in overrides} <= set(mounts)
    with hydra.initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        assert hydra.compose("predict", overrides).checkpoints == "/data/models"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_builds_its_network_optimizer_and_schedule(experiment: str) -> None:
    with hydra.initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        cfg = hydra.compose(
            "train",
            [
                f"experiment={experiment}",
                "model.pretrained=false",
                "model.decoder_channels=[8,8,8]",
                "model.class_num=6",
            ],
        )
    kwargs = {k: v for k, v in cfg.model.items() if not k.startswith(("ema", "freeze", "resume", "compile"))}
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


def documented_commands() -> list[str]:
    """Return every command of ours in the README and the documentation."""
    found = []
    for page in (PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))):
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.M | re.S):
            found += re.findall(r"python (?:\w+\.py|-m czii25d\.pipeline\.\w+)[^\n&]*", block)
    return sorted(set(found))


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_have_keys_that_exist(command: str) -> None:
    words = translate_flags(shlex.split(command, comments=True)[1:])
    script = PROJECT / (f"{words[1].replace('.', '/')}.py" if words[0] == "-m" else words[0])
    [name] = re.findall(r'^    run\(\w+, "(\w+)"\)$', script.read_text(), re.M)
    overrides = words[2:] if words[0] == "-m" else words[1:]
    if sweep := "-m" in overrides:
        overrides.remove("-m")
    overrides = [override for override in overrides if not override.startswith(("hydra/", "hydra."))]
    if sweep:  # the first value of each
        overrides = [re.sub(r"=tag\(\w+,interval\(([^,]+),.*", r"=\1", override) for override in overrides]
        overrides = [re.sub(r"=([^\[\]{},]+),.*", r"=\1", override) for override in overrides]
    assert load_config(name, overrides)


def test_there_are_documented_commands() -> None:
    assert len(documented_commands()) > 15
