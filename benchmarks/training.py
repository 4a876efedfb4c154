"""Time training: the data path alone, the step alone, both together, and 11 itself; print a table in Markdown.

``python benchmarks/training.py OUTPUT [--rounds 15] [OVERRIDE ...]``, OUTPUT being the folder that 01 and 02 wrote. On
a GPU the published settings (batch 32, 16 x 128 x 128, convnext_nano, mixed precision), on a CPU the small preset with
batch 8, both without pretrained weights; overrides are those of 11_train.py. ``--profile`` prints instead where a
step's time goes.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import logging
import os
import platform
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from czii25d.data.datamodule import TomogramDataModule
from czii25d.particles import ParticleSet
from czii25d.pipeline.app import keep_freed_memory, load_config
from czii25d.pipeline.train import create_data, create_module

Batch = tuple[Tensor, Tensor]
WARM_UP_STEPS = 3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS = ["experiment=reproduce_4th_place"] if DEVICE.type == "cuda" else ["experiment=cpu", "data.batch_size=8"]


def batches(data: TomogramDataModule) -> Iterator[Batch]:
    """Yield batches on the device, epoch after epoch, as a training would see them."""
    loader = data.train_dataloader()
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for batch in loader:
            moved = batch if isinstance(batch, tuple) else batch.to(DEVICE)
            yield data.on_after_batch_transfer(moved, 0)


def training_step(cfg, data: TomogramDataModule) -> Callable[[Batch], None]:
    """Return mixing, both passes, the optimizer and the average; 11 also clips gradients and checks them."""
    module = create_module(cfg, data, ParticleSet.from_config(cfg.particles)).to(DEVICE).train()
    optimizer = module.create_optimizer(module.model)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=DEVICE.type == "cuda")
    generator = torch.Generator().manual_seed(0)

    def step(batch: Batch) -> None:
        image, weighted_targets = module.mixer(*batch, generator)
        with torch.autocast(DEVICE.type, torch.float16, enabled=DEVICE.type == "cuda"):
            prediction = module.model(image)
        loss = sum(weight * module.loss(prediction.float(), target) for weight, target in weighted_targets)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if module.model_ema is not None:
            module.model_ema.update(module.model)

    return step


class Clock(L.Callback):
    """Notes when each step of a training has ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())


def seconds_of_11(cfg: Any, data: TomogramDataModule, steps: int) -> float:
    """Return the median seconds of a step of 11's own loop, nothing validated or saved."""
    clock = Clock()
    trainer = L.Trainer(
        accelerator="gpu" if DEVICE.type == "cuda" else "cpu",
        devices=1,
        precision=cfg.trainer.precision,
        max_steps=WARM_UP_STEPS + steps,
        gradient_clip_val=cfg.trainer.gradient_clip_val,
        limit_val_batches=0,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = create_module(cfg, data, ParticleSet.from_config(cfg.particles))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        trainer.fit(module, datamodule=data)
    ends = clock.times[WARM_UP_STEPS - 1 :]
    return statistics.median(after - before for before, after in itertools.pairwise(ends))


def seconds(work: Callable[[], None], count: int) -> float:
    """Return the seconds of one call, of ``count`` in a row."""
    start = time.perf_counter()
    for _ in range(count):
        work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def memory() -> str:
    """Return the peak so far."""
    if DEVICE.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB on the device"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB of the process"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("override", nargs="*")
    parser.add_argument("--rounds", type=int, default=15, help="of a few batches of each kind, in turns")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    keep_freed_memory()
    given = [f"paths.output={arguments.output}", "model.pretrained=false", "data.train_all=true"]
    cfg = load_config("train", [*SETTINGS, *given, *arguments.override])
    data = create_data(cfg, ParticleSet.from_config(cfg.particles))
    before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
    data.move_to(DEVICE)
    cached = (torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0) - before
    stream, step = batches(data), training_step(cfg, data)
    fixed = next(stream)
    step(fixed)  # warm
    if arguments.profile:
        print_profile(step, fixed)
        return
    works = {
        "data path alone": lambda: next(stream),
        "step alone, on one batch": lambda: step(fixed),
        "both": lambda: step(next(stream)),
    }
    # In turns, so that a machine that others use is as busy for each; on a GPU enough in a row to fill its queue.
    count = 10 if DEVICE.type == "cuda" else 1
    rounds = [[seconds(work, count) for work in works.values()] for _ in range(arguments.rounds)]
    gpu = f", {torch.cuda.get_device_name()}" if DEVICE.type == "cuda" else ""
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads ({platform.machine()})"
    print(f"{datetime.date.today()}, {cores}{gpu}, torch {torch.__version__}, {cfg.model.backbone}, batch", end=" ")
    tile = f"{cfg.model.img_depth} x {cfg.model.img_size} x {cfg.model.img_size}"
    print(f"{cfg.data.batch_size} of {tile}, median of {arguments.rounds} rounds\n")
    print("| what | ms a sample | samples a second | steps a second |\n|---|---|---|---|")
    for name, column in zip(works, zip(*rounds, strict=True), strict=True):
        own = statistics.median(column) / cfg.data.batch_size
        print(f"| {name} | {1e3 * own:.2f} | {1 / own:.1f} | {1 / statistics.median(column):.2f} |")
    step_of_11 = seconds_of_11(cfg, data, count * arguments.rounds)
    own = step_of_11 / cfg.data.batch_size
    print(f"| 11 itself, Lightning's loop and all | {1e3 * own:.2f} | {1 / own:.1f} | {1 / step_of_11:.2f} |")
    share = statistics.median(path / alone for path, alone, _ in rounds)
    added = statistics.median(both / alone - 1 for _, alone, both in rounds)
    print(f"\nThe data path takes {share:.1%} of the step's time alone, and adds {added:.1%} to it.")
    print(f"Peak memory: {memory()}; cached volumes {cached / 1e9:.1f} GB.")


def print_profile(step: Callable[[Batch], None], batch: Batch) -> None:
    """Print the operators of three steps by their own time."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE.type == "cuda")
    with profile(activities=activities) as record:
        for _ in range(3):
            step(batch)
    key = f"self_{DEVICE.type}_time_total" if DEVICE.type == "cpu" else "self_device_time_total"
    print(record.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=40))


if __name__ == "__main__":
    main()
