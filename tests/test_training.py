"""Training end to end on the miniature project, in this process where possible."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import hydra
import numpy as np
import pytest
import torch
import yaml
import zarr
from conftest import run_script

import czii25d
from czii25d.data.cache import load_volumes
from czii25d.data.datamodule import TomogramDataModule
from czii25d.data.dataset import Delivery
from czii25d.data.predictions import read_predictions
from czii25d.errors import InputError
from czii25d.metrics import DEFAULT_THRESHOLD
from czii25d.models.checkpoint import load_checkpoint, read_card
from czii25d.particles import conf_dir, load_particles
from czii25d.picks import above_thresholds, read_picks_csv
from czii25d.pipeline.train import changed_keys, is_logged_in_to_wandb, train

TINY = [
    "model.backbone=test_convnext",
    "model.pretrained=false",
    "model.decoder_channels=[16,12,8]",
    "model.in_channels=3",
    "model.img_depth=16",
    "model.img_size=32",
    "data.batch_size=2",
    "data.num_workers=0",
    "data.sampling.samples_per_epoch=4",
    "trainer.accelerator=cpu",
    "scheduler.warmup_epochs=1",
    "wandb.name=tiny",
    "wandb.mode=disabled",
]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture
def work(prepared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private working folder with 01 and 02 done."""
    (tmp_path / "input").symlink_to(prepared_dir / "input")
    shutil.copytree(prepared_dir / "output", tmp_path / "output")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compose(*overrides: str):
    with hydra.initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        return hydra.compose("train", [*TINY, *overrides])


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def test_one_fold_leaves_what_it_promises(work: Path) -> None:
    score = train(compose("trainer.max_epochs=2", "data.fold_id=TS_6_4"))
    folder = work / "saved_models/tiny"
    assert {"best.ckpt", "last.ckpt", "config.yaml", "metrics.csv"} <= {path.name for path in folder.iterdir()}
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["backbone"] == "test_convnext"
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert all(float(row["train/loss"]) > 0 and row["val/fbeta"] and row["val/fbeta/ribosome"] for row in rows)
    assert score == max(float(row["val/fbeta_ranked"]) for row in rows)
    assert [row["train/skipped_steps"] for row in rows] == ["0.0", "0.0"]
    assert train(compose("trainer.max_epochs=2", "data.fold_id=TS_6_4")) == score, "a training that has ended, again"
    judged = read_predictions(folder / "held_out")
    card = read_card(folder / "last.ckpt")
    assert card is not None and judged.thresholds == card.thresholds
    assert list(judged.runs) == ["TS_6_4"] and judged.runs["TS_6_4"].open().shape == (24, 40, 56)
    solution = read_picks_csv(folder / "held_out/solution.csv")
    kept = judged.picks_of("TS_6_4")
    assert czii25d.score(solution, kept) == pytest.approx(float(rows[-1]["val/fbeta"]), abs=1e-6)
    net, card = load_checkpoint(folder / "best.ckpt")
    assert card.fold == ["TS_6_4"] and card.offset_voxel == 0 and set(card.thresholds or {}) == set(card.particles)
    assert net(torch.zeros(1, 1, 16, 32, 32)).shape == (1, 6, 16, 32, 32)


def test_regions_restrict_what_is_learned_and_judged(work: Path) -> None:
    """Labels that are wrong, but outside the region, change nothing; nor do picks there count."""
    region = "regions={TS_5_4: {x: [0, 300]}, TS_69_2: {x: [0, 560]}, TS_6_4: {y: [0, 200], margin: 10}}"
    base = [region, "trainer.max_epochs=1", "data.fold_id=TS_6_4", "loss.mixup=0.5", "data.sampling.kind=balanced"]
    score = train(compose(*base))
    before = weights(work / "saved_models/tiny/last.ckpt")
    assert score is not None and np.isfinite(score)
    group = zarr.open_group(str(work / "output/heatmaps/TS_5_4.zarr"))
    recipe = dict(group.attrs["czii25d"])
    end = {name: 300 + 4 * sigma for name, sigma in recipe["sigma_angstrom"].items()}  # what lies beyond is not seen
    near = {name: [row for row in rows if row[0] < end[name]] for name, rows in recipe["picks"].items()}
    assert sum(map(len, near.values())) < 9
    wrong = {name: [*rows, [end[name] + 5, 100.0, 90.0]] for name, rows in near.items()}
    group.attrs["czii25d"] = {**recipe, "picks": wrong}
    train(compose(*base, "resume=false"))
    after = weights(work / "saved_models/tiny/last.ckpt")
    assert all(torch.equal(before[key], after[key]) for key in before)
    train(compose(*base[1:], "resume=false"))
    assert not torch.equal(
        before["model.segmentation_head.weight"],
        weights(work / "saved_models/tiny/last.ckpt")["model.segmentation_head.weight"],
    )
    with pytest.raises(InputError, match=r"TS_5_4.*a region with a voxel beyond its margin"):
        train(compose("regions={TS_5_4: {y: [0, 60], margin: 60}}", "resume=false", "data.fold_id=TS_6_4"))
    with pytest.raises(InputError, match=r"picks of each of the 6 particles, within the regions, found none of apo"):
        train(
            compose(
                "regions={TS_5_4: {x: [500, 560]}, TS_69_2: {x: [500, 560]}}", "resume=false", "data.fold_id=TS_6_4"
            )
        )


def test_the_average_is_what_is_judged_and_shipped(work: Path) -> None:
    train(compose("trainer.max_epochs=1", "model.ema_decay=1.0"))  # an average that never moves
    state = weights(work / "saved_models/tiny/last.ckpt")
    trained = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    averaged = {k.removeprefix("model_ema.module."): v for k, v in state.items() if k.startswith("model_ema.module.")}
    assert trained.keys() == averaged.keys()
    moved = [k for k in trained if not torch.equal(trained[k], averaged[k])]
    assert moved
    shipped = load_checkpoint(work / "saved_models/tiny/last.ckpt")[0].state_dict()
    assert all(torch.equal(shipped[k], averaged[k]) for k in averaged)


def test_the_average_follows_its_definition(work: Path) -> None:
    """Decay 0 keeps no memory: the average equals the network after every step, the last one included."""
    train(compose("trainer.max_epochs=1", "model.ema_decay=0.0"))
    state = weights(work / "saved_models/tiny/last.ckpt")
    for key, value in state.items():
        if key.startswith("model.") and value.is_floating_point():
            torch.testing.assert_close(state["model_ema.module." + key.removeprefix("model.")], value)


def test_mixing_freezing_and_other_options_change_the_weights(work: Path) -> None:
    base = ["trainer.max_epochs=1", "data.train_all=true"]

    def last(*overrides: str) -> dict[str, torch.Tensor]:
        train(compose(*base, "resume=false", *overrides))
        return weights(work / "saved_models/tiny/last.ckpt")

    plain = last("loss.mixup=0")
    again = last("loss.mixup=0")
    assert all(torch.equal(plain[k], again[k]) for k in plain), "a training repeats exactly"
    head = "model.segmentation_head.weight"
    for option in ("loss.mixup=1", "loss.cutmix=1", "loss.name=balanced_mse", "opt.opt=sgd", "scheduler.sched=tanh"):
        other = last(*([] if option == "loss.mixup=1" else ["loss.mixup=0"]), option)
        assert not torch.equal(plain[head], other[head]), option
    start = last("loss.mixup=0", "opt.lr=1e-12")
    frozen = last("loss.mixup=0", "model.freeze_backbone_epochs=1")
    backbone = [k for k in plain if k.startswith("model.backbone.") and k.endswith("weight")]
    torch.testing.assert_close({k: frozen[k] for k in backbone}, {k: start[k] for k in backbone})
    assert not torch.allclose(frozen[head], start[head])
    assert not (work / "saved_models/tiny/best.ckpt").exists(), "nothing is held out, so nothing is chosen"


def test_resume_with_other_settings_is_refused(work: Path) -> None:
    train(compose("trainer.max_epochs=1"))
    with pytest.raises(InputError, match=r"opt\.lr: 0\.001 -> 0\.01.*resume=false"):
        train(compose("trainer.max_epochs=2", "opt.lr=0.01"))
    assert changed_keys(compose(), compose("data.num_workers=3", "trainer.max_epochs=9")) == []


def test_resume_with_other_data_of_the_same_names_is_refused(work: Path) -> None:
    train(compose("trainer.max_epochs=1"))
    group = zarr.open_group(str(work / "output/heatmaps/TS_5_4.zarr"))
    recipe = dict(group.attrs["czii25d"])
    sigmas = {name: sigma * 1.5 for name, sigma in recipe["sigma_angstrom"].items()}
    group.attrs["czii25d"] = {**recipe, "sigma_angstrom": sigmas}
    with pytest.raises(InputError, match=r"resume: expected the content of the runs.*restore the data"):
        train(compose("trainer.max_epochs=2"))


def test_a_training_that_is_prolonged_follows_the_longer_schedule(work: Path) -> None:
    """The learning rate is that of the new settings where the training stands, not the old schedule's end."""
    train(compose("trainer.max_epochs=2"))
    train(compose("trainer.max_epochs=4"))
    schedule = cosine(4)
    state = torch.load(work / "saved_models/tiny/last.ckpt", weights_only=True)
    steps = state["global_step"]
    assert steps == 8, "two batches in each of four epochs"
    assert state["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(schedule(steps), abs=1e-12)
    train(compose("trainer.max_epochs=8"))
    mid = torch.load(work / "saved_models/tiny/last.ckpt", weights_only=True)
    assert mid["global_step"] == 16 and mid["schedule_epochs"] == 8
    train(compose("trainer.max_epochs=16", "trainer.max_steps=24"))
    cut = torch.load(work / "saved_models/tiny/last.ckpt", weights_only=True)
    assert cut["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(cosine(16)(24))
    assert cosine(16)(24) > 1e-4, "where the old schedule had long ended"


def cosine(epochs: int, steps_per_epoch: int = 2, warmup: int = 2, peak: float = 1e-3) -> Callable[[int], float]:
    """Return step -> learning rate: a linear rise, then half a period of the cosine of the whole training."""
    total = epochs * steps_per_epoch
    return lambda step: peak * (step / warmup if step < warmup else 0.5 * (1 + np.cos(np.pi * min(step / total, 1))))


@pytest.mark.parametrize("name", ["", "..", "/tmp/elsewhere", "a/../.."])
def test_a_training_does_not_empty_what_is_not_its_own(work: Path, name: str) -> None:
    (work / "saved_models").mkdir()
    (work / "saved_models/precious").touch()
    with pytest.raises(InputError, match=r"wandb\.name"):
        train(compose("trainer.max_epochs=1", "resume=false", f"wandb.name='{name}'"))
    assert (work / "saved_models/precious").exists()


def test_thresholds_of_the_validation_before_are_judged_as_they_were(work: Path) -> None:
    """``val/fbeta_fixed`` is the score at the thresholds of the last checkpoint but one, the default at first."""
    every = "data.fold_id=TS_6_4"
    train(compose("trainer.max_epochs=1", every))
    folder = work / "saved_models/tiny"
    before = read_card(folder / "last.ckpt")
    judged, solution = (
        read_picks_csv(folder / "held_out/scored_picks.csv", scored=True),
        read_picks_csv(folder / "held_out/solution.csv"),
    )
    first = dict.fromkeys(load_particles().names, DEFAULT_THRESHOLD)
    assert float(last_row(folder)["val/fbeta_fixed"]) == pytest.approx(
        czii25d.score(solution, above_thresholds(judged, first)), abs=1e-6
    )
    assert abs(float(last_row(folder)["val/fbeta_fixed"]) - float(last_row(folder)["val/fbeta"])) > 0.01
    train(compose("trainer.max_epochs=2", every))
    judged = read_picks_csv(folder / "held_out/scored_picks.csv", scored=True)
    after = read_card(folder / "last.ckpt")
    assert before is not None and after is not None and before.thresholds != after.thresholds
    for name, thresholds in (("val/fbeta_fixed", before.thresholds), ("val/fbeta", after.thresholds)):
        kept = above_thresholds(judged, thresholds)
        expected = czii25d.score(solution, kept)  # the file's scores are rounded
        assert float(last_row(folder)[name]) == pytest.approx(expected, abs=1e-3), name


def last_row(folder: Path) -> dict[str, str]:
    return list(csv.DictReader((folder / "metrics.csv").open()))[-1]


def test_training_goes_on_from_given_weights(work: Path) -> None:
    train(compose("trainer.max_epochs=1", "wandb.name=first"))
    train(compose("trainer.max_epochs=1", "opt.lr=1e-12", "model.resume_path=saved_models/first/last.ckpt"))
    first = load_checkpoint(work / "saved_models/first/last.ckpt")[0].segmentation_head.weight
    second = load_checkpoint(work / "saved_models/tiny/last.ckpt")[0].segmentation_head.weight
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.fold_id=7", r"data\.fold_id.*0 to 2"),
        ("data.fold_id=[TS_5_4,TS_5_4]", r"data\.fold_id.*each run once"),
        ("data.runs=[TS_5_4,TS_6_4,TS_5_4]", r"data\.runs.*TS_5_4 twice"),
        ("save_every_minutes=-1", r"save_every_minutes.*at least 0"),
        ("keep_best=-2", r"keep_best.*0 for none"),
        ("model.compile=fast", r"model\.compile.*max-autotune"),
        ("model.arch=timm3d4", r"arch.*timm3d3"),
        ("model.backbone=convnext_nanno", r"backbone.*did you mean"),
        ("opt.opt=AdamV", r"opt\.opt.*did you mean"),
        ("loss.name=dice", r"loss\.name.*weighted_mse"),
        ("scheduler.sched=plateau", r"scheduler\.sched.*cosine"),
        ("model.class_num=5", r"class_num=5"),
        ("model.class_num=9", r"class_num.*1 to 6"),
        ("wandb.mode=loud", r"wandb\.mode"),
        ("resume=nowhere.ckpt", r"resume.*nowhere"),
        ("paths.output=empty", r"01_create_dataset"),
        ("+trainer.max_epoch=3", r"trainer.*max_epoch"),
        ("data.batch_size=0", r"data\.batch_size"),
        ("data.sampling.kind=random", r"sampling\.kind"),
        ("data.normalization=minmax", r"normalization"),
    ],
)
def test_bad_settings_are_one_clear_line(work: Path, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        train(compose("trainer.max_epochs=1", override))
    assert "\n" not in str(error.value)
    assert not (work / "saved_models").exists(), "nothing half-written"


def test_published_command_runs_but_for_accelerator_and_precision(work: Path) -> None:
    """The published overrides, verbatim, compose; on a machine without a GPU only these two change."""
    published = (
        "trainer.accelerator=gpu trainer.devices=[0] data.batch_size=32 trainer.precision=16 data.num_workers=8 "
        "trainer.max_epochs=64 wandb.name=timm3d3_convnext_nano_class6_fold2 opt.lr=1e-3 opt.opt=AdamW "
        "opt.weight_decay=0 scheduler.min_lr=0 model.img_depth=16 model.img_size=128 model.arch=timm3d3 model.ema=True "
        "model.ema_decay=0.999 model.in_channels=5 loss.mixup=0.5 model.backbone=convnext_nano.in12k_ft_in1k "
        "scheduler.warmup_epochs=4 model.class_num=6 trainer.deterministic=warn data.fold_id=2"
    ).split()
    if not torch.cuda.is_available():
        result = run_script("11_train.py", *published, cwd=work, check=False)
        assert result.returncode == 2 and "trainer.accelerator" in result.stderr
    smaller = {  # the same keys with values that two cores can bear
        "trainer.accelerator": "cpu",
        "trainer.precision": "32",
        "data.batch_size": "2",
        "data.num_workers": "1",
        "trainer.max_epochs": "1",
        "model.img_size": "32",
        "model.backbone": "test_convnext",
    }
    command = [f"{k}={smaller.get(k, v)}" for k, v in (item.split("=", 1) for item in published)]
    extra = ["model.pretrained=false", "model.decoder_channels=[16,12,8]", "data.sampling.samples_per_epoch=4"]
    run_script("11_train.py", *command, *extra, cwd=work)
    assert (work / "saved_models/timm3d3_convnext_nano_class6_fold2/best.ckpt").is_file()


def test_sweep_over_folds(work: Path) -> None:
    run_script(
        "11_train.py",
        "-m",
        *TINY,
        "trainer.max_epochs=1",
        "data.fold_id=0,2",
        "wandb.name=fold${data.fold_id}",
        cwd=work,
    )
    folds = [load_checkpoint(work / f"saved_models/fold{fold}/best.ckpt")[1].fold for fold in (0, 2)]
    assert folds == [["TS_5_4"], ["TS_6_4"]]
    assert {path.name for path in work.iterdir()} == {"input", "output", "saved_models"}, "logs stay under output"


def test_wandb_works_offline_without_a_prompt(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(work / "none"))
    assert not is_logged_in_to_wandb()
    with pytest.raises(InputError, match=r"wandb login.*offline"):
        train(compose("wandb.mode=online", "trainer.max_epochs=1"))
    run_script("11_train.py", *TINY[:-1], "wandb.mode=offline", "trainer.max_epochs=1", cwd=work)
    assert list((work / "output/wandb").rglob("*.wandb"))
    sent = {path.stem.rsplit("_", 2)[0] for path in (work / "output/wandb").rglob("media/images/report/*.png")}
    drawn = {path.stem for path in (work / "saved_models/tiny/report").glob("*.png")}
    assert sent == {name for name in drawn if not name.endswith("_dark")} and {"loss", "validation"} < sent


COMPILERS = [
    pytest.param(
        "inductor", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
    ),
    "aot_eager",  # all of torch.compile but the making of kernels, which on a CPU needs a recent C++ compiler
]


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_compiled_step_learns_the_same(work: Path, monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    compiled = []
    compile_in_place = torch.nn.Module.compile

    def compile_with(self: torch.nn.Module, mode: str | None = None) -> None:
        compiled.append(mode)
        compile_in_place(self, mode=mode if compiler == "inductor" else None, backend=compiler)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_with)
    base = ["trainer.max_epochs=1", "data.train_all=true"]
    if compiler == "inductor":
        base += ["trainer.accelerator=gpu"]
    train(compose(*base))
    train(compose(*base, "model.compile=true", "wandb.name=compiled"))
    assert compiled == ["default"]
    one, two = (weights(work / f"saved_models/{name}/last.ckpt") for name in ("tiny", "compiled"))
    assert list(one) == list(two)
    torch.testing.assert_close(one, two, rtol=1e-3, atol=2e-3)  # Adam's first steps follow the signs of gradients


EVERYTHING = [
    *(
        f"data.augment.{name}_prob=0.5"
        for name in ("rotate", "flip_x", "flip_z", "contrast", "noise", "wedge", "paste")
    ),
    *("data.augment.tilt_range=5", "data.augment.stretch_range=0.1", "data.augment.noise_tilt=60"),
    *("data.augment.noise_pink=1", "trainer.max_epochs=1", "data.train_all=true", "loss.mixup=0.5"),
]


def test_tiles_that_the_device_makes_train_the_same_network(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: workers send plans, or boxes, and the tiles are made where the batch comes to."""

    def loss(*overrides: str) -> float:
        train(compose(*EVERYTHING, *overrides))
        return float(list(csv.DictReader((work / "saved_models/tiny/metrics.csv").open()))[-1]["train/loss"])

    expected = loss("data.cache=host", "data.num_workers=1")

    def delivering(delivers: Delivery) -> Callable[[TomogramDataModule, torch.device], None]:
        def move_to(data: TomogramDataModule, device: torch.device) -> None:
            data._on_device = load_volumes(data.dataset.all_volumes, "device", device)
            data.dataset.delivers = delivers

        return move_to

    for delivers in get_args(Delivery)[1:]:
        monkeypatch.setattr(TomogramDataModule, "move_to", delivering(delivers))
        assert loss("resume=false", "data.num_workers=1") == pytest.approx(expected, rel=1e-3), delivers
    assert loss("resume=false", "seed=1") != pytest.approx(expected, rel=1e-3)


def test_learning_lowers_the_loss(work: Path) -> None:
    train(
        compose(
            "trainer.max_epochs=6", "data.sampling.kind=balanced", "data.sampling.samples_per_epoch=16", "loss.mixup=0"
        )
    )
    losses = [float(row["train/loss"]) for row in csv.DictReader((work / "saved_models/tiny/metrics.csv").open())]
    assert np.mean(losses[-2:]) < 0.7 * losses[0]
