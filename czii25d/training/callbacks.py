"""What a training tells and keeps: a line and a CSV row per epoch, and the picks of the held-out runs."""

from __future__ import annotations

import csv
import logging
import time
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch

from czii25d.data.predictions import PredictedRun, write_record
from czii25d.errors import InputError
from czii25d.files import write_aside
from czii25d.picks import above_thresholds, write_scored_picks_csv, write_solution_csv, write_submission_csv
from czii25d.training.module import HeatmapModule

logger = logging.getLogger(__name__)


class EpochLog(L.Callback):
    """Prints a line per epoch with the time left, and keeps ``metrics.csv`` whole, also over interruptions.

    The rows travel in the checkpoint: a resumed training goes on with the table of the epochs that it keeps.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back the rows of a checkpoint."""
        self.rows = list(state_dict["rows"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; the time left is reckoned from the epochs of this sitting."""
        self._start, self._first_epoch = time.monotonic(), trainer.current_epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the epoch's clock."""
        self._epoch_start = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add a row, write the table, print the line."""
        now = time.monotonic()
        seconds = now - self._epoch_start
        values = {k: v.item() for k, v in trainer.callback_metrics.items() if k != "train/loss_step"}
        row = {"epoch": trainer.current_epoch, "step": trainer.global_step, "seconds": round(seconds, 2)}
        row |= {key.removesuffix("_epoch"): value for key, value in sorted(values.items())}
        validated = pl_module.trainer.check_val_every_n_epoch
        if validated and (trainer.current_epoch + 1) % validated:  # callback_metrics still hold the last validation's
            row = {key: value for key, value in row.items() if not key.startswith("val/")}
        self.rows.append(row)
        if not trainer.is_global_zero:
            return
        columns = list(dict.fromkeys(key for each in self.rows for key in each))
        with write_aside(self.path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        done, total = trainer.current_epoch + 1, trainer.max_epochs or 0
        left = (now - self._start) / (done - self._first_epoch) * max(0, total - done)
        fbeta = f" · F4 {row['val/fbeta']:.4f} (held out)" if "val/fbeta" in row else ""
        loss = row.get("train/loss", float("nan"))
        logger.info("epoch %d/%d · loss %.5f%s · %.0f s · %s left", done, total, loss, fbeta, seconds, duration(left))


class HeldOutPicks(L.Callback):
    """Keeps the last validation's picks and truth in a folder, in the files of 21, so that they can be shown."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the picks of all processes."""
        module = cast(HeatmapModule, pl_module)
        if not trainer.is_global_zero or module.judged_picks is None:
            return
        assert module.solution is not None and module.card.thresholds is not None
        thresholds = module.card.thresholds
        runs = [PredictedRun(target.run, volume.folder) for volume, target in module.held_out]
        with write_aside(self.folder) as partial:
            partial.mkdir()
            write_scored_picks_csv(partial / "scored_picks.csv", module.judged_picks)
            write_submission_csv(partial / "submission.csv", above_thresholds(module.judged_picks, thresholds))
            write_solution_csv(partial / "solution.csv", module.solution)
            write_record(partial, module.particles, thresholds, [str(self.folder.parent)], runs)


class StopWhenNotFinite(L.Callback):
    """Stops a training whose loss is NaN or infinite for many steps in a row, and keeps the checkpoints it has."""

    def __init__(self, patience: int = 50) -> None:
        self.patience, self._count = patience, 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the steps without a finite loss."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self._count = 0 if bool(torch.isfinite(loss)) else self._count + 1
        if self._count >= self.patience:
            raise InputError(
                f"training, step {trainer.global_step}",
                "a finite loss",
                f"none for {self._count} steps",
                "lower opt.lr or set trainer.gradient_clip_val; the last good checkpoint is kept",
            )


def duration(seconds: float) -> str:
    """Return ``1 h 05 min``, ``12 min`` or ``40 s``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
