"""What a training tells, keeps and withstands: epochs, picks, checkpoints, signals, dead processes."""

from __future__ import annotations

import csv
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import Tensor

from czii25d.data.predictions import PredictedRun, write_record
from czii25d.errors import INPUT_ERROR
from czii25d.files import write_aside
from czii25d.picks import above_thresholds, write_scored_picks_csv, write_solution_csv, write_submission_csv
from czii25d.training.module import HeatmapModule

logger = logging.getLogger(__name__)

TERMINATED = 128 + signal.SIGTERM  # exit status of a training that was told to end and has saved


class EpochLog(L.Callback):
    """Prints a line per epoch with the time left, and keeps ``metrics.csv`` whole, also over interruptions.

    The rows travel in the checkpoint: a resumed training goes on with the table of the epochs that it keeps.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        self._loss = torch.zeros(2)  # sum and number of the epoch's finite losses

    def state_dict(self) -> dict[str, Any]:
        """Return the rows, and what the next one has so far."""
        return {"rows": self.rows, "loss": self._loss.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back the rows of a checkpoint."""
        self.rows = list(state_dict["rows"])
        self._loss = torch.tensor(state_dict.get("loss", [0.0, 0.0]))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; the time left is reckoned from the epochs of this sitting."""
        self._start, self._first_epoch = time.monotonic(), trainer.current_epoch
        self._epoch_start = self._start
        self._loss = self._loss.to(pl_module.device)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the epoch's clock."""
        self._epoch_start = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the loss of all processes to the epoch's, unless it is not finite."""
        loss: Tensor = trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")
        pl_module.log("train/loss_step", loss, on_step=True, on_epoch=False)
        loss = torch.stack([loss, torch.ones_like(loss)]).float()
        self._loss += torch.where(loss.isfinite().all(), loss, 0.0)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add a row, write the table, print the line."""
        now = time.monotonic()
        seconds = now - self._epoch_start
        loss, count = self._loss.tolist()
        self._loss.zero_()
        skipped = getattr(pl_module, "skipped_steps", 0)
        told = {"train/loss": loss / count if count else float("nan"), "train/skipped_steps": float(skipped)}
        pl_module.log_dict({"train/loss_epoch": told["train/loss"], "train/skipped_steps": told["train/skipped_steps"]})
        values = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        row = {"epoch": trainer.current_epoch, "step": trainer.global_step, "seconds": round(seconds, 2)}
        row |= told | dict(sorted(values.items()))
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
        if skipped:
            fbeta += f" · {skipped} step{'s'[: skipped > 1]} skipped, gradients not finite"
        line = "epoch %d/%d · loss %.5f%s · %.0f s · %s left"
        logger.info(line, done, total, row["train/loss"], fbeta, seconds, duration(left))


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


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, whatever file system they lie on.

    Lightning writes to the system's folder for temporary files and then moves: a copy, where that is another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write aside and rename."""
        with write_aside(path) as partial:
            torch.save(checkpoint, partial)


class TopCheckpoints(ModelCheckpoint):
    """The best few checkpoints, to be averaged; a class of its own, as Lightning tells callbacks apart by class."""


class LastCheckpoint(Checkpoint):
    """Keeps the checkpoint that an interrupted training goes on from.

    It is written at the end of every epoch, every so many minutes between two optimizer steps, and when the job is
    told to end (``SIGTERM``, ``SIGUSR1``, ``SIGUSR2``): the step is finished, the checkpoint written, and the process
    exits with `TERMINATED`. If the job's launcher had a handler for that signal, as submitit has, that handler is
    called once the checkpoint is there; when it returns, the training goes on.

    A signal during a validation ends the job at once; what is written before an epoch's last step is then what it goes
    on from. Nothing is written while steps are being skipped for their gradients, see `HeatmapModule`.

    Parameters
    ----------
    path
        The file.
    every_minutes
        ``None``: at the ends of epochs, and when told to end.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    BEFORE_VALIDATION_SECONDS = 60.0  # what a signal during a validation may cost

    def __init__(self, path: Path, every_minutes: float | None = None) -> None:
        self.path, self.every_minutes = path, every_minutes
        self._told = 0  # the signal that has come
        self._validating = self._between_steps = False
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Note whose handlers there are, before Lightning adds its own."""
        self._handlers = {number: signal.getsignal(number) for number in self.SIGNALS}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock and listen; Lightning's own handlers give way, as they end a training without saving."""
        self._saved_at = time.monotonic()
        self._trainer = trainer
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                signal.signal(number, self._listen)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Between two optimizer steps: save if it is time, end if told to."""
        accumulate = trainer.accumulate_grad_batches
        if batch_idx % accumulate or getattr(pl_module, "skipped_in_a_row", 0):
            return
        is_last = batch_idx + accumulate >= trainer.num_training_batches and self._validates(trainer)
        told = self._agree(trainer, self._told or int(self._is_due(is_last)))
        if told and batch_idx > 0:  # at 0 the end of the epoch before has been saved
            self._between_steps = True
            self._save(trainer)
            self._between_steps = False
        if told > 1:
            self._end(trainer, told)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here there is nothing to save."""
        self._validating = trainer.state.fn == "fit"

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here there is."""
        self._validating = False

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save, and end if told to."""
        if not getattr(pl_module, "skipped_in_a_row", 0):
            self._save(trainer)
        if told := self._agree(trainer, self._told):
            self._end(trainer, told)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Between two steps, let the batch that has been fetched count as one to come."""
        if self._between_steps:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                counts["ready"] = counts["completed"]
            progress["is_last_batch"] = False

    def _listen(self, number: int, frame: Any) -> None:
        self._told = self._told or number
        if self._validating:
            self._end(self._trainer, number)

    def _is_due(self, is_last_before_validation: bool) -> bool:
        if self.every_minutes is None:
            return False
        seconds = self.every_minutes * 60
        if is_last_before_validation:
            seconds = min(seconds, self.BEFORE_VALIDATION_SECONDS)
        return time.monotonic() - self._saved_at >= seconds

    @staticmethod
    def _validates(trainer: L.Trainer) -> bool:
        every = trainer.check_val_every_n_epoch
        return every is not None and (trainer.current_epoch + 1) % every == 0

    @staticmethod
    def _agree(trainer: L.Trainer, value: int) -> int:
        """Return the largest value of any process: all save, or end, at the same step."""
        if trainer.world_size == 1:
            return value
        mine = torch.tensor(value, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(mine, reduce_op="max"))

    def _save(self, trainer: L.Trainer) -> None:
        if not getattr(trainer, "fast_dev_run", False):
            trainer.save_checkpoint(self.path)
            self._saved_at = time.monotonic()

    def _end(self, trainer: L.Trainer, number: int) -> None:
        self._told = 0
        handler = self._handlers.get(number)
        if callable(handler):
            handler(number, None)  # submitit's puts the job into the queue again and exits
            return
        if self._validating and isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
            trainer.strategy.launcher.kill(signal.SIGKILL)  # they may wait for this process in a collective operation
        if trainer.is_global_zero:
            where = f"{self.path} is written" if self.path.exists() else "no step to save yet"
            name = signal.Signals(number).name
            logger.info("told to end (%s), %s; start the same command again to go on", name, where)
        raise SystemExit(TERMINATED if trainer.is_global_zero else 0)  # Lightning kills the first when another fails


class EndTogether(L.Callback):
    """Ends a training of several processes with one line when one of them dies, rather than have the others wait.

    Every process looks at its neighbours: the first one of a machine at those it has started, those at it.
    """

    INTERVAL_SECONDS = 0.2
    GRACE_SECONDS = 3.0

    def __init__(self) -> None:
        self._over = threading.Event()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start to look."""
        if trainer.world_size == 1:
            return
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher) and launcher.procs:
            thread = threading.Thread(target=self._watch_children, args=(launcher,), daemon=True)
        else:
            thread = threading.Thread(target=self._watch_parent, args=(os.getppid(),), daemon=True)
        thread.start()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop looking."""
        self._over.set()

    def _watch_children(self, launcher: _SubprocessScriptLauncher) -> None:
        while not self._over.wait(self.INTERVAL_SECONDS):
            for rank, process in enumerate(launcher.procs, start=1):
                status = process.poll()
                if status == INPUT_ERROR and self._over.wait(self.GRACE_SECONDS):
                    return  # this process ends for the same reason, which it has told
                if status:
                    logger.error(
                        "error: process %d of the training has died (status %d), so the others end too; "
                        "start the same command again to go on",
                        rank,
                        status,
                    )
                    launcher.kill(signal.SIGKILL)
                    os._exit(2)  # the main thread may wait for the dead process for ever

    def _watch_parent(self, parent: int) -> None:
        while not self._over.wait(self.INTERVAL_SECONDS):
            if os.getppid() != parent:
                os._exit(2)


def duration(seconds: float) -> str:
    """Return ``1 h 05 min``, ``12 min`` or ``40 s``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
