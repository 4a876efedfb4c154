"""What stands around the package: containers, experiments, documented commands."""

from __future__ import annotations

import itertools
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
from czii25d.pipeline.app import RUNS_AS_WORDS, load_config, translate_flags, translate_runs
from czii25d.pipeline.cli import COMMANDS, Command
from czii25d.pipeline.train import create_schedule, optimizer_factory

COMMAND = r"(?:python (?:\w+\.py|-m czii25d\.pipeline\.\w+)|czii25d \w+)[^\n&]*"  # in a page
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
    narrower = ["model.decoder_channels=[8,8,8]"] if experiment == "reproduce_4th_place" else []
    with hydra.initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        cfg = hydra.compose(
            "train",
            [f"experiment={experiment}", "model.pretrained=false", "model.class_num=6", *narrower],
        )
    kwargs = {k: v for k, v in cfg.model.items() if not k.startswith(("ema", "freeze", "resume", "compile"))}
    net = czii25d.create_model(**kwargs)
    assert len(net.decoder.blocks) == len(cfg.model.decoder_channels)
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


def commands_of(text: str) -> list[str]:
    """Return every command of ours in the ``sh`` blocks of a page, in its order."""
    found = []
    for block in re.findall(r"^ *```sh\n(.*?)^ *```", text, re.M | re.S):
        found += re.findall(COMMAND, block)
    return found


def documented_commands() -> list[str]:
    """Return every command of ours in the README and the documentation."""
    pages = (PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md")))
    return sorted({command for page in pages for command in commands_of(page.read_text())})


def parse_command(command: str) -> tuple[Command, list[list[str]]]:
    """Return what a command runs, and its overrides: one list, or for a sweep a list for each of its jobs."""
    words = translate_flags(shlex.split(command, comments=True))
    if words[0] == "czii25d":
        known, overrides = COMMANDS[words[1]], words[2:]
    else:
        script, overrides = (" ".join(words[1:3]), words[3:]) if words[1] == "-m" else (words[1], words[2:])
        [known] = [each for each in COMMANDS.values() if each.script == script]
    if known.config in RUNS_AS_WORDS:
        overrides = translate_runs(overrides)
    if "-m" not in overrides:
        return known, [overrides]
    choices = []
    for key, _, values in (each.partition("=") for each in overrides):
        if key == "-m" or key.startswith("hydra"):  # launchers and sweepers are plugins, which need not be installed
            continue
        values = re.sub(r"^tag\(\w+,interval\(([^,]+),.*", r"\1", values)  # of a search, one end
        several = values.split(",") if re.fullmatch(r"[^\[\]{}()]+", values) else [values]
        choices.append([f"{key}={value}" for value in several])
    return known, [list(job) for job in itertools.product(*choices)]


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_have_keys_that_exist(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known, jobs = parse_command(command)
    for overrides in jobs:
        for file in re.findall(r"^particles=(.*\.yaml)$", "\n".join(overrides), re.M):  # a table of the reader's own
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).write_text("ribosome: {radius: 150.0}\n")
        assert load_config(known.config, overrides)


def test_there_are_documented_commands() -> None:
    assert len(documented_commands()) > 15
