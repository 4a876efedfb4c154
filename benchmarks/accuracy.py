"""Train several recipes for an equal budget on the same runs; judge them on a held-out run and on unseen data.

python benchmarks/accuracy.py OUTPUT --unseen NAME=OUTPUT ... --budget 480 --recipes ours published flexible_unet unet

OUTPUT is what 01, 02 and 03 left (paths.output). The budget is seconds of training of a recipe and seed: on a GPU as
the clock has it; on a CPU the seconds that all cores computed, divided by their number, so that a busy machine
gives nobody less. Thresholds are fitted to the held-out run and used as they are on the unseen data. Every result is
kept in --work; the same command goes on where it was, and prints the tables again. The peers need MONAI (pip install
monai).
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import logging
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import lightning as L
import pandas as pd
import torch
from scipy import stats
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from czii25d.data.volumes import Volume, open_volume
from czii25d.files import write_aside
from czii25d.geometry import Shape3D
from czii25d.inference import InferenceOptions, pick_volume
from czii25d.metrics import evaluate, fit_thresholds
from czii25d.particles import ParticleSet
from czii25d.picks import above_thresholds, read_picks_csv
from czii25d.pipeline.app import keep_freed_memory, load_config
from czii25d.pipeline.train import create_data, create_module
from czii25d.runtimes.torch import TorchNetwork
from czii25d.training.module import HeatmapModule

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPOCHS = 16  # one of them warm-up, as the published 4 of 64; validation is ours, after the last
WARM_UP_STEPS = 3
CALIBRATION = 0.05  # of the budget, spent beforehand to find out how long a step takes
OVERLAP = 0.25
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Parameters
    ----------
    what
        For people.
    overrides
        Of ``conf/train.yaml``.
    network
        What is trained instead of the configuration's network: ``class number -> module``.
    sigma_voxel
        Of the heatmaps of all classes; ``None``: as 02 made them.
    tile
        ``(D, H, W)`` if it is not the configuration's.
    """

    what: str
    overrides: tuple[str, ...]
    network: Callable[[int], nn.Module] | None = None
    sigma_voxel: float | None = None
    tile: Shape3D | None = None


def flexible_unet(class_num: int) -> nn.Module:
    """Build the 1st place's network: MONAI's FlexibleUNet on resnet34, its decoder read at half the resolution."""
    from monai.networks.nets.flexible_unet import FlexibleUNet

    network = FlexibleUNet(
        in_channels=1,
        out_channels=class_num,
        backbone="resnet34",
        spatial_dims=3,
        decoder_channels=(256, 128, 64, 32, 16),
        norm=("batch", {"eps": 1e-3, "momentum": 0.1}),
    )
    return HalfResolution(network, class_num)


class HalfResolution(nn.Module):
    """Leaves out a FlexibleUNet's last block, predicts from the one before, and interpolates."""

    def __init__(self, network: Any, class_num: int) -> None:
        super().__init__()
        self.encoder, self.decoder, self.skip_connect = network.encoder, network.decoder, network.skip_connect
        self.decoder.blocks = self.decoder.blocks[:-1]
        self.head = nn.Conv3d(32, class_num, 3, padding=1)

    def forward(self, tiles: Tensor) -> Tensor:
        """``(B, 1, D, H, W) -> (B, C, D, H, W)``."""
        coarse = self.head(self.decoder(self.encoder(tiles), self.skip_connect))
        return nn.functional.interpolate(coarse, scale_factor=2, mode="trilinear")


def unet(class_num: int) -> nn.Module:
    """Build the first of the 2nd place's networks: MONAI's UNet with 48, 64, 80, 80 channels."""
    from monai.networks.nets.unet import UNet

    return UNet(3, 1, class_num, (48, 64, 80, 80), (2, 2, 1), num_res_units=1)


OURS = ("experiment=cpu",)
# What the published recipe cannot have here: pretrained weights; batches of 32 and an average over thousands of steps
# in a training of hundreds. Everything else is its own.
PUBLISHED = (
    "experiment=reproduce_4th_place",
    "trainer.accelerator=auto",
    "trainer.precision=32-true",
    "model.pretrained=false",
    "model.ema_warmup=true",
    "data.batch_size=8",
)
# The peers' networks, optimizers, mixup and tiles (as large as a CPU allows); all else is ours: turns and flips,
# balanced sampling, targets, loss, average.
PEER = (*OURS, "data.batch_size=4")
ADAM = ("opt.lr=1e-3", "opt.weight_decay=0")
PEER_TILE = (32, 96, 96)

RECIPES = {
    "ours": Recipe("experiment=cpu", OURS),
    "published": Recipe("the 4th place's, from scratch", PUBLISHED, sigma_voxel=6),
    "flexible_unet": Recipe(
        "MONAI FlexibleUNet-resnet34, 1st place",
        (*PEER, "opt.opt=Adam", *ADAM, "loss.mixup=1"),
        flexible_unet,
        tile=PEER_TILE,
    ),
    "flexible_unet, trained as ours": Recipe("Muon, mixup 0.5", PEER, flexible_unet, tile=PEER_TILE),
    "unet": Recipe(
        "MONAI UNet 48/64/80/80, 2nd place",
        (*PEER, "opt.opt=AdamW", *ADAM, "loss.mixup=0"),
        unet,
        tile=PEER_TILE,
    ),
    "unet, trained as ours": Recipe("Muon, mixup 0.5", PEER, unet, tile=PEER_TILE),
    # One line each: what becomes worse without it, or what was tried and not kept.
    "ours, AdamW": Recipe("AdamW at its own learning rate", (*OURS, "opt.opt=AdamW", "opt.lr=2e-3")),
    "ours, four stages": Recipe("decoder 128/96/64", (*OURS, "model.decoder_channels=[128,96,64]")),
    "ours, sigma 6 voxels": Recipe("one width of heatmaps for all classes, as published", OURS, sigma_voxel=6),
    "ours, published loss": Recipe("weighted_mse", (*OURS, "loss.name=weighted_mse", "loss.background=0.1")),
    "ours, noise": Recipe(
        "noise added",
        (
            *OURS,
            "data.augment.noise_prob=0.5",
            "data.augment.noise_range=1.0",
            "data.augment.noise_tilt=60",
            "data.augment.noise_pink=1",
        ),
    ),
    "ours, focal loss": Recipe("focal_mse", (*OURS, "loss.name=focal_mse")),
    "ours, soft Dice": Recipe("soft_dice", (*OURS, "loss.name=soft_dice")),
    "ours, stochastic depth": Recipe("model.drop_path_rate=0.1", (*OURS, "model.drop_path_rate=0.1")),
    "ours, depth 32": Recipe("tiles of 32 x 64 x 64", (*OURS, "model.img_depth=32", "data.batch_size=4")),
    "ours, grid": Recipe("tiles of a grid, as published", (*OURS, "data.sampling.kind=grid")),
    "ours, no mixup": Recipe("loss.mixup=0", (*OURS, "loss.mixup=0")),
    "ours, mixup always": Recipe("loss.mixup=1", (*OURS, "loss.mixup=1")),
    "ours, no EMA": Recipe("the last weights", (*OURS, "model.ema=false")),
    "ours, 128": Recipe("tiles of 16 x 128 x 128", (*OURS, "model.img_size=128", "data.batch_size=2")),
    "ours, global": Recipe("the published constants for normalisation", (*OURS, "data.normalization=global")),
    "ours, upright": Recipe(
        "neither turned nor mirrored in z", (*OURS, "data.augment={rotate_prob: 0, flip_z_prob: 0}")
    ),
    "ours, convnext_atto": Recipe("another backbone", (*OURS, "model.backbone=convnext_atto")),
    "ours, published decoder": Recipe("decoder 1024/768/256", (*OURS, "model.decoder_channels=[1024,768,256]")),
}


def compute_seconds() -> float:
    """Return the clock that the budget is counted by, see above."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


def run(recipe: Recipe, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one recipe and judge it."""
    cfg = load_config("train", overrides(recipe, seed, arguments))
    L.seed_everything(seed, workers=True, verbose=False)
    particles = ParticleSet.from_config(cfg.particles).first(cfg.model.class_num)
    data = create_data(cfg, particles)
    dataset = data.dataset
    tile = recipe.tile or dataset.tile_shape
    if recipe.tile or recipe.sigma_voxel:
        targets = dataset.targets
        if recipe.sigma_voxel:
            sigma = recipe.sigma_voxel * data.voxel_spacing[0]
            targets = [replace(each, sigma_angstrom=dict.fromkeys(particles.names, sigma)) for each in targets]
        data.dataset = type(dataset)(dataset.volumes, targets, tile, dataset.sampling, dataset.augmentation, seed)
    module = create_module(cfg, data, particles)
    if recipe.network:
        module.model = recipe.network(len(particles))
        module.model_ema = ModelEmaV3(module.model, decay=cfg.model.ema_decay, use_warmup=True)
    module.to(DEVICE)
    flops = FlopCounterMode(display=False)
    with flops, torch.no_grad():
        module.model.eval()(torch.zeros(1, 1, *tile, device=DEVICE))
    steps = max(1, int(arguments.budget / seconds_per_step(module, data, cfg, arguments)) // EPOCHS) * EPOCHS
    dataset = data.dataset
    dataset.sampling = replace(dataset.sampling, samples_per_epoch=steps // EPOCHS * data.batch_size)
    begin = compute_seconds()
    trainer = fit(module, data, cfg)
    result: dict[str, Any] = {
        "what": recipe.what,
        "parameters": sum(each.numel() for each in module.model.parameters()),
        "multiply_adds_per_voxel": flops.get_total_flops() / 2 / math.prod(tile),
        "samples": trainer.global_step * data.batch_size,
        "training_seconds": compute_seconds() - begin,
    }
    return result | judge(module, data, tile, particles, arguments)


def overrides(recipe: Recipe, seed: int, arguments: argparse.Namespace) -> list[str]:
    """Return the configuration's overrides of one training."""
    return [
        *recipe.overrides,
        f"paths.output={arguments.output}",
        f"data.fold_id={arguments.held_out}",
        f"data.num_workers={arguments.workers}",
        "data.sampling.samples_per_epoch=null",  # see `run`
        f"trainer.max_epochs={EPOCHS}",
        "scheduler.warmup_epochs=1",
        f"seed={seed}",
    ]


def question(recipe: Recipe, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a result depends on, beside seed and budget."""
    return {
        "overrides": [*recipe.overrides],
        "sigma_voxel": recipe.sigma_voxel,
        "tile": recipe.tile and [*recipe.tile],
        "output": str(arguments.output),
        "held_out": arguments.held_out,
        "unseen": [f"{name}={path}" for name, path in arguments.unseen],
    }


class Stopwatch(L.Callback):
    """Times steps, once memory and kernels are there, and stops the training when it has seen enough of them."""

    def __init__(self, limit: float) -> None:
        self.limit, self.steps, self.begin, self.seconds = limit, 0, 0.0, 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the clock."""
        self.steps += 1
        if self.steps <= WARM_UP_STEPS:
            self.begin = compute_seconds()
        else:
            self.seconds = compute_seconds() - self.begin
            trainer.should_stop = self.seconds >= self.limit


def seconds_per_step(module: HeatmapModule, data: Any, cfg: Any, arguments: argparse.Namespace) -> float:
    """Return the mean seconds of a step, of a short training whose weights are then forgotten."""
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    watch = Stopwatch(CALIBRATION * arguments.budget)
    fit(module, data, cfg, watch)
    module.load_state_dict(weights)
    return watch.seconds / (watch.steps - WARM_UP_STEPS)


def fit(module: HeatmapModule, data: Any, cfg: Any, *callbacks: L.Callback) -> L.Trainer:
    """Train as 11 does, but nothing is validated or saved meanwhile."""
    trainer = L.Trainer(
        accelerator="gpu" if DEVICE.type == "cuda" else "cpu",
        devices=1,
        precision=cfg.trainer.precision if DEVICE.type == "cpu" else "bf16-mixed",
        max_epochs=EPOCHS,
        limit_val_batches=0,
        gradient_clip_val=cfg.trainer.gradient_clip_val,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        trainer.fit(module, datamodule=data)
    return trainer


def judge(
    module: HeatmapModule, data: Any, tile: Shape3D, particles: ParticleSet, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return scores of the held-out run and, at its thresholds, of the unseen data."""
    network = TorchNetwork(module.judged_model.to(DEVICE), DEVICE, torch.bfloat16)
    d, h, w = (round(side * (1 - OVERLAP)) for side in tile)
    batch = max(1, 4 * 16 * 128 * 128 // math.prod(tile))
    options = InferenceOptions(tile, (d, h, w), batch_size=batch)
    normalization = data.held_out[0][0].normalization

    def pick(volume: Volume) -> pd.DataFrame:
        picks = pick_volume(volume, network, particles, options, volume.voxel_spacing)
        return picks.assign(run=volume.name)

    begin = compute_seconds()
    held_out, _ = data.held_out[0]
    picks = pick(held_out)
    result: dict[str, Any] = {"seconds_per_tomogram": compute_seconds() - begin}
    truth = read_picks_csv(arguments.output / "solution.csv")
    fitted = fit_thresholds(truth[truth["run"] == held_out.name], picks, particles)

    def score(truth: pd.DataFrame, picks: pd.DataFrame) -> dict[str, float]:
        return evaluate(truth, above_thresholds(picks, fitted.thresholds), particles=particles)["fbeta"].to_dict()

    result["scores"] = {"held out": score(truth[truth["run"] == held_out.name], picks)}
    for name, output in arguments.unseen:
        folders = sorted((output / "volumes" / "train").glob("[!.]*"))
        frames = [pick(open_volume(folder, normalization)) for folder in folders]
        truth = read_picks_csv(output / "solution.csv")
        result["scores"][name] = score(truth, pd.concat(frames, ignore_index=True))
    return result


def interval(values: Sequence[float]) -> str:
    """Return mean and half the width of Student's confidence interval over seeds, as far as there are several."""
    if len(values) < 2:
        return f"{fmean(values):.3f}"
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return f"{fmean(values):.3f} ± {half:.3f}"


def print_tables(results: Mapping[str, list[dict[str, Any]]], against: str) -> None:
    """Print what each recipe costs and scores, its particles, and its difference from the first."""
    data = list(next(iter(results.values()))[0]["scores"])
    columns = ["recipe", "parameters, M", "multiply-adds a voxel, k", "tiles", "training, s", "a tomogram, s"]
    columns += [f"F4 {name}" for name in data]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for recipe, runs in results.items():
        first = runs[0]
        cells = [
            f"{recipe} ({first['what']})",
            f"{first['parameters'] / 1e6:.1f}",
            f"{first['multiply_adds_per_voxel'] / 1e3:.0f}",
            f"{fmean(each['samples'] for each in runs):.0f}",
            f"{fmean(each['training_seconds'] for each in runs):.0f}",
            f"{fmean(each['seconds_per_tomogram'] for each in runs):.0f}",
            *(interval([each["scores"][name]["total"] for each in runs]) for name in data),
        ]
        print(f"| {' | '.join(cells)} |")
    particles = [name for name in next(iter(results.values()))[0]["scores"]["held out"] if name != "total"]
    print(f"\n| F4 by particle, mean of all data | {' | '.join(particles)} |\n|{'---|' * (1 + len(particles))}")
    for recipe, runs in results.items():
        cells = [
            interval([fmean(scores[particle] for scores in each["scores"].values()) for each in runs])
            for particle in particles
        ]
        print(f"| {recipe} | {' | '.join(cells)} |")
    if against in results and len(results) > 1:
        columns = [f"F4 less that of {against}", *data, "mean of all"]
        print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for recipe, runs in results.items():
            pairs = [
                {name: a["scores"][name]["total"] - b["scores"][name]["total"] for name in data}
                for a, b in itertools.product(runs, results[against])
                if a["seed"] == b["seed"]
            ]
            if recipe != against and pairs:
                cells = [interval([pair[name] for pair in pairs]) for name in data]
                print(f"| {' | '.join([recipe, *cells, interval([fmean(pair.values()) for pair in pairs])])} |")


def main() -> None:
    """Train what has no result yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--held-out", default="TS_99_9")
    parser.add_argument("--unseen", nargs="*", default=[], metavar="NAME=OUTPUT")
    parser.add_argument("--budget", type=float, default=480, help="seconds of training for each recipe and seed")
    parser.add_argument("--recipes", nargs="+", default=["ours", "published", "flexible_unet", "unet"], choices=RECIPES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--workers", type=int, default=0, help="data.num_workers; 0 on a CPU, where they would not count"
    )
    parser.add_argument("--work", type=Path, default=Path("accuracy"), help="folder of the results")
    arguments = parser.parse_args()
    arguments.unseen = [(name, Path(path)) for name, _, path in (each.partition("=") for each in arguments.unseen)]
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if DEVICE.type == "cpu":
        keep_freed_memory()
    arguments.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {}
    for seed, name in itertools.product(arguments.seeds, arguments.recipes):
        path = arguments.work / f"{name.replace(' ', '_')}.{seed}.{arguments.budget:g}.json"
        asked = question(RECIPES[name], arguments)
        if not path.is_file():
            result = run(RECIPES[name], seed, arguments) | {"seed": seed, "asked": asked}
            with write_aside(path) as partial:
                partial.write_text(json.dumps(result, indent=2))
        result = json.loads(path.read_text())
        if result["asked"] != asked:
            told = (
                f"{path}: expected a result of this recipe and data, found another; delete it, or choose another --work"
            )
            raise SystemExit(f"error: {told}")
        results.setdefault(name, []).append(result)
        print(path.name, f"{results[name][-1]['scores']['held out']['total']:.4f}", flush=True)
    gpu = f", {torch.cuda.get_device_name()}" if DEVICE.type == "cuda" else ""
    print(
        f"\n{datetime.date.today()}, {os.cpu_count()} cores ({platform.machine()}){gpu}, torch {torch.__version__}, "
        f"budget {arguments.budget:g} s, seeds {', '.join(map(str, arguments.seeds))}\n"
    )
    print_tables(results, arguments.recipes[0])


if __name__ == "__main__":
    main()
