"""The pages of docs/: their commands run on tiny data, their links lead somewhere, and the site stands by itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import PROJECT, SHAPE, make_run
from test_mrc import write as write_mrc
from test_predict_score import save
from test_project import commands_of, parse_command

import czii25d
from czii25d.formats import read_picks, write_picks
from czii25d.geometry import xyz_angstrom_to_zyx_voxel, zyx_voxel_to_xyz_angstrom
from czii25d.picks import make_picks, read_picks_csv
from czii25d.pipeline.app import load_config

DOCS = PROJECT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
RUNS = ("TS_5_4", "TS_69_2", "TS_6_4", "TS_6_6", "TS_73_6", "TS_86_3", "TS_99_9")
# What makes a documented command last a second, by configuration; it goes behind the command's own keys.
PREDICT_SMALL = ["infer.runtime=torch", "infer.precision=fp32", "infer.floor=0.001"]
SMALLER = {
    "train": [
        "model.backbone=test_convnext",
        "model.pretrained=false",
        "model.decoder_channels=[16,12,8]",
        "model.in_channels=3",
        "model.img_size=32",
        "data.batch_size=2",
        "data.num_workers=0",
        "data.sampling.samples_per_epoch=4",
        "trainer.accelerator=cpu",
        "trainer.devices=1",
        "trainer.precision=32",
        "trainer.max_epochs=1",
        "scheduler.warmup_epochs=0",
        "wandb.mode=disabled",
    ],
    "predict": PREDICT_SMALL,
    "fit_thresholds": PREDICT_SMALL,
    "report": ["pictured_runs=1"],
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def run_commands(text: str, change: Callable[[str], str] = str) -> None:
    """Run the commands of a page, or of a part of it, in their order, where we are."""
    for command in commands_of(text):
        known, jobs = parse_command(change(command))
        if known.config == "export":  # takes seconds; tests/test_export.py runs it
            continue
        module, _, function = known.function.partition(":")
        for overrides in jobs:
            cfg = load_config(known.config, [*overrides, *SMALLER.get(known.config, [])])
            getattr(import_module(f"czii25d.pipeline.{module}"), function)(cfg)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)


# ---- the tasks -------------------------------------------------------------------------------------------------------


def test_from_the_competitions_data_to_a_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, run in enumerate(RUNS):
        make_run(tmp_path / "input", run, seed)
    make_run(tmp_path / "input", "TS_0_0", 9, split="test")
    text = (DOCS / "competition.md").read_text()
    run_commands(text)
    assert f"| {' | '.join(sorted(RUNS))} |" in text and f"| {' | '.join(map(str, range(7)))} |" in text
    cards = {fold: yaml.safe_load((tmp_path / f"saved_models/fold{fold}/config.yaml").read_text()) for fold in (2, 6)}
    assert cards[6]["data"]["fold_id"] == 6
    [*thresholds] = json.loads((tmp_path / "output/out_of_fold/thresholds.json").read_text())["runs"]
    assert sorted(thresholds) == [sorted(RUNS)[fold] for fold in (2, 3, 4, 6)]
    submission = pd.read_csv(tmp_path / "output/predictions/submission.csv")
    assert list(submission.columns) == ["id", "experiment", "particle_type", "x", "y", "z"]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tomograms of a lab in ``data/``, and a network that has not learned anything."""
    monkeypatch.chdir(tmp_path)
    for seed, run in enumerate(("TS_0001", "TS_0002", "TS_0003")):
        volume = np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)
        (tmp_path / "data/batch1").mkdir(parents=True, exist_ok=True)
        write_mrc(tmp_path / "data/batch1" / f"{run}.mrc", volume, (7.84,) * 3)
    save(tmp_path / "saved_models/cpu/net.safetensors", 1, voxel_spacing=(7.84,) * 3, thresholds={"apo-ferritin": 0.2})
    return tmp_path


def test_a_cluster_picks_each_tomogram_once(lab: Path) -> None:
    [table] = blocks("cluster.md", "csv")
    rows = [line.replace("batch1/", "data/batch1/").replace("batch2/", "data/batch1/") for line in table.splitlines()]
    (lab / "tomograms.csv").write_text("\n".join([*rows, "TS_0003,data/batch1/TS_0003.mrc,", ""]))
    [script] = [block for block in blocks("cluster.md", "sh") if "#SBATCH" in block]
    assert "--array=0-7" in script

    def as_the_second_of_eight(command: str) -> str:
        return command.replace("$SLURM_ARRAY_TASK_ID", "1").replace("$SLURM_ARRAY_TASK_COUNT", "8")

    run_commands((DOCS / "cluster.md").read_text(), as_the_second_of_eight)
    parts = sorted((lab / "output/predictions/runs").glob("*.csv"))
    assert [path.name.split(".")[0] for path in parts] == ["TS_0001", "TS_0002", "TS_0003"], (
        "no share counts in the key"
    )
    assert all(re.fullmatch(r"TS_\d+\.[0-9a-f]{12}\.csv", path.name) for path in parts)
    assert all(
        set(json.loads(path.with_suffix(".json").read_text())) == {"seconds", "tiles", "memory_gb"} for path in parts
    )
    scored = read_picks_csv(lab / "output/predictions/scored_picks.csv", scored=True)
    assert len(scored) == sum(len(read_picks_csv(path, scored=True)) for path in parts)
    back = read_picks("particles.star", grids=grids_of(lab / "tomograms.csv"))
    np.testing.assert_allclose(back[["x", "y", "z"]], scored[["x", "y", "z"]], atol=1e-3)


def grids_of(tomograms: Path | str) -> object:
    from czii25d.pipeline.convert import read_grids

    return read_grids(str(tomograms), None, None)


def test_picks_go_to_relion_and_back(lab: Path) -> None:
    rng = np.random.default_rng(3)
    extent = np.array(SHAPE)[::-1] * 7.84
    frames = [
        make_picks(run, name, rng.uniform(0.05, 0.95, (6, 3)) * extent).assign(score=rng.uniform(0.1, 1, 6))
        for run in ("TS_0001", "TS_0003")
        for name in ("ribosome", "apo-ferritin")
    ]
    planted = pd.concat(frames, ignore_index=True)
    write_picks("output/predictions/scored_picks.csv", planted)
    [code] = blocks("relion.md", "python")
    source = 'find_tomograms("data/batch1/*.mrc")'
    code = code.replace('find_tomograms("/data/*.mrc")', source)
    assert source in code
    exec(code, {})  # our own page
    shutil.copy("ribosomes.star", "refined.star")
    run_commands((DOCS / "relion.md").read_text(), lambda command: command.replace("/data/", "data/batch1/"))
    best = planted[(planted["particle"] == "ribosome") & (planted["score"] > 0.3)]
    expected = best[["x", "y", "z"]].to_numpy()
    for found in (read_picks("ribosomes.star", grids=grids_of("data/batch1")), read_picks("refined.csv")):
        assert 0 < len(best) == len(found) and set(found["particle"]) == {"ribosome"}
        np.testing.assert_allclose(found[["x", "y", "z"]], expected, atol=2e-3)
    for found in (read_picks("relion4.star"), read_picks("check")):
        sides = [frame.sort_values("x")[["x", "y", "z", "score"]].to_numpy() for frame in (found, planted)]
        np.testing.assert_allclose(*sides, atol=2e-3)
    assert re.search(r"^data_particles$", Path("relion5.star").read_text(), re.M)
    assert "opticsGroup1" in Path("relion5.star").read_text()


def test_the_readmes_own_particles_are_learned_and_found(lab: Path) -> None:
    readme = (PROJECT / "README.md").read_text()
    section = readme[readme.index("## Train, with your own particles") : readme.index("## Documentation")]
    [table] = re.findall(r"^```yaml\n(.*?)^```", section, re.M | re.S)
    (lab / "my.yaml").write_text(table)
    rng = np.random.default_rng(5)
    extent = np.array(SHAPE)[::-1] * 7.84
    frames = [
        make_picks(run, name, rng.uniform(0.05, 0.95, (6, 3)) * extent)
        for run in ("TS_0001", "TS_0002", "TS_0003")
        for name in ("ribosome", "proteasome")
    ]
    write_picks("picks.star", pd.concat(frames), "relion5", grids=grids_of("data/batch1"), pixel_size=1.96)
    run_commands(section, lambda command: command.replace("/data/", "data/batch1/"))
    picker = czii25d.Picker.load("saved_models/mine", floor=0.001, thresholds=0.001, runtime="torch")
    assert picker.particles.names == ("ribosome", "proteasome") and picker.particles.radii == (150.0, 75.0)
    picks = picker.pick("data/batch1/TS_0001.mrc")
    assert list(picks.columns) == ["run", "particle", "x", "y", "z", "score"]


def test_my_own_particle_is_learned_in_one_half_and_picked_in_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    shape = np.array((24, 256, 32))
    volume = rng.normal(size=shape).astype(np.float32)
    y = np.linspace(8, 248, 21)  # far enough from each other for the baseline
    centers = np.stack([rng.uniform(6, 18, 21), y, rng.uniform(6, 26, 21)], 1)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    for center in centers:
        volume[((grid - center) ** 2).sum(-1) < 4.8**2] -= 3
    (tmp_path / "tomograms").mkdir()
    write_mrc(tmp_path / "tomograms/empiar_11658_171.mrc", volume, (31.36,) * 3)
    write_picks("ribosomes.csv", make_picks("empiar_11658_171", "ribosome", centers[:, ::-1] * 31.36))
    tables = blocks("own_particle.md", "yaml")
    for name, table in zip(("ribosome", "train_here", "pick_here"), tables, strict=True):
        (tmp_path / f"{name}.yaml").write_text(table)
    run_commands((DOCS / "own_particle.md").read_text())
    here = yaml.safe_load(tables[2])["empiar_11658_171"]["y"][0]
    assert here == 128 * 31.36
    truth = read_picks_csv(tmp_path / "output/solution.csv")
    assert len(truth) == (centers[:, 1] * 31.36 >= here).sum() and truth["y"].min() >= here
    scored = read_picks_csv(tmp_path / "output/predictions/scored_picks.csv", scored=True)
    assert len(scored) and scored["y"].min() >= here and set(scored["particle"]) == {"ribosome"}
    assert (tmp_path / "output/predictions/report/report.html").is_file()
    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    [command] = re.findall(r"^python benchmarks/ribosomes.py (.*)$", (DOCS / "own_particle.md").read_text(), re.M)
    monkeypatch.setattr(sys, "argv", ["ribosomes.py", *command.split()])
    import_module("ribosomes").main()
    assert (tmp_path / "recall.png").is_file()
    [baseline] = re.findall(r"^\| Laplacian of Gaussian, recall .* \| ([\d.]+) \|$", capsys.readouterr().out, re.M)
    assert float(baseline) > 0.8, "what is planted, at four times as many picks"


# ---- coordinates -----------------------------------------------------------------------------------------------------


def test_the_page_of_coordinates_says_what_the_code_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS / "figures"))
    figure = import_module("coordinates")
    text = (DOCS / "coordinates.md").read_text()
    rows = {
        cells[0]: float(cells[3])
        for line in text.splitlines()
        if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 4
        and re.fullmatch(r"[\d.]+", cells[3])
    }
    stored = figure.stored_x()
    named = {"RELION 4": "relion4", "RELION 5": "relion5", "IMOD, x and y": "imod"}
    assert {name: rows[name] for name in named} == {name: stored[key] for name, key in named.items()}
    assert rows["crYOLO's CBOX, x and y; a box of 4 voxels"] == stored["cbox"] and len(rows) == 8
    [code] = blocks("coordinates.md", "python")
    spacing = (10.0, 10.0, 10.0)
    found = xyz_angstrom_to_zyx_voxel([(35.0, 20.0, 0.0)], spacing), zyx_voxel_to_xyz_angstrom([(0, 0, 0)], spacing)
    assert [f"# {value.tolist()}" for value in found] == re.findall(r"# \[\[.*?\]\]", code)
    figure.draw(tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 20_000


# ---- links and the site ----------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Return a page's anchors as GitHub makes them of its headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)]*)\)", page.read_text()):
        target = (page.parent / link).resolve() if link else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


def test_the_navigation_holds_every_page() -> None:
    text = (PROJECT / "mkdocs.yml").read_text()
    named = re.findall(r"^ +- .*: (\w+\.md)$", text, re.M)
    assert sorted(named) == sorted({page.name for page in PAGES} | {"index.md", "changelog.md"})


class Assets(HTMLParser):
    """What a page loads by itself, and where its links lead."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        loaded = values.get("src") or (values.get("href") if tag == "link" and values.get("rel") != "canonical" else "")
        self.loaded += [loaded] if loaded else []
        self.linked += [values["href"]] if tag == "a" and values.get("href") else []  # type: ignore[list-item]


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra docs")
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "-f",
        PROJECT / "mkdocs.yml",
        "-d",
        tmp_path,
    ]
    environment = {
        **os.environ,
        "NO_MKDOCS_2_WARNING": "1",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    pages = {path.name: Assets(path) for path in tmp_path.glob("*.html")}
    assert {f"{page.stem}.html" for page in PAGES} | {"index.html", "changelog.html"} <= set(pages)
    for name, page in pages.items():
        assert not [url for url in page.loaded if re.match(r"(https?:)?//", url)], name
        for url in page.loaded + page.linked:
            file = url.split("#")[0].split("?")[0]
            if file and name != "404.html" and not re.match(r"(https?:)?//|mailto:|data:", file):
                assert (tmp_path / file).exists(), f"{name}: {url}"
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(.?(https?:)?//|@import", style.read_text()), style
    text = (tmp_path / "api.html").read_text()
    for name in (
        "Picker.pick",
        "create_model",
        "load_model",
        "read_picks",
        "write_picks",
        "ParticleSet",
        "pick_volume",
    ):
        assert re.search(rf'id="czii25d\.[\w.]*{re.escape(name)}"', text), name
