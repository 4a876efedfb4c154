"""The training step, the averaged network, and a validation that predicts whole tomograms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import lightning as L
import pandas as pd
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from czii25d.data.targets import HeatmapTarget
from czii25d.data.volumes import Volume
from czii25d.errors import InputError
from czii25d.inference import InferenceOptions, pick_selected
from czii25d.losses import Loss, Mixer
from czii25d.metrics import DEFAULT_THRESHOLD, evaluate, fit_thresholds
from czii25d.models.checkpoint import ModelCard
from czii25d.particles import ParticleSet
from czii25d.picks import above_thresholds, empty_picks
from czii25d.regions import Selection
from czii25d.runtimes.torch import TorchNetwork
from czii25d.thresholds import ranked_fbeta


class HeatmapModule(L.LightningModule):
    """Trains a heatmap network; the exponential moving average of its weights is what is judged and saved.

    Its attributes ``model`` and ``model_ema`` give checkpoints the key names of the published ones.

    A step is a function of the weights and its place ``(seed, epoch, batch, rank)`` alone, so a training that is
    interrupted between any two steps goes on as if nothing had happened. An optimizer step whose gradients are not
    finite is skipped and counted: weights, average and normalisation statistics stay as they are.

    Parameters
    ----------
    model
        ``(B, 1, D, H, W) -> (B, C, D, H, W)``.
    card
        Goes into every checkpoint, with the thresholds of the last validation.
    loss, mixer
        See `czii25d.losses`.
    create_optimizer
        ``module -> optimizer``.
    create_scheduler
        ``(optimizer, updates per epoch) -> timm scheduler`` that is stepped once per optimizer step.
    held_out
        Volume and reference target of each validation run.
    options
        How whole tomograms are predicted.
    ema_decay
        ``None``: no average, the network itself is judged and saved.
    ema_warmup
        Raise the decay from 0 (``1 - (1 + step)^(-2/3)``) up to ``ema_decay``, for short trainings.
    freeze_backbone_epochs
        Epochs at the start in which the backbone's weights stay.
    seed
        Of mixing and stochastic depth.
    compile_mode
        Of ``torch.compile`` for the training step; ``None``: eager.
    selections
        Of each validation run: where it is judged; ``None``: everywhere.
    """

    PATIENCE = 50  # steps skipped in a row, after which the training stops

    def __init__(
        self,
        model: nn.Module,
        card: ModelCard,
        loss: Loss,
        mixer: Mixer,
        create_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        create_scheduler: Callable[[torch.optim.Optimizer, int], Any],
        held_out: Sequence[tuple[Volume, HeatmapTarget]],
        options: InferenceOptions,
        ema_decay: float | None = 0.999,
        ema_warmup: bool = False,
        freeze_backbone_epochs: int = 0,
        seed: int = 0,
        compile_mode: str | None = None,
        selections: Sequence[Selection | None] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.model_ema = None
        if ema_decay is not None:
            self.model_ema = ModelEmaV3(model, decay=ema_decay, use_warmup=ema_warmup)
            self.model_ema.requires_grad_(False)  # processes that share their gradients would wait for these
        self.card, self.loss, self.mixer = card, loss, mixer
        self.create_optimizer, self.create_scheduler = create_optimizer, create_scheduler
        self.held_out, self.options = held_out, options
        self.selections = [None] * len(held_out) if selections is None else list(selections)
        self.freeze_backbone_epochs, self.seed = freeze_backbone_epochs, seed
        self.particles = ParticleSet.from_config(card.particles)
        self._picks: list[tuple[int, pd.DataFrame]] = []
        self.judged_picks: pd.DataFrame | None = None  # of the last validation, with scores, and what they were
        self.solution: pd.DataFrame | None = None  # judged by
        self._averaged_step = 0
        self._updates_per_epoch = 1
        self._resumed_epochs: float | None = None  # where in its schedule a resumed training stands
        self._schedule_lead = 0  # the schedule's steps less the optimizer's: other processes may have done longer ones
        self.skipped_steps, self.skipped_in_a_row = 0, 0  # of this epoch; up to now
        if compile_mode is not None:
            model.compile(mode=compile_mode)  # in place: neither the average nor the names of the weights change

    @property
    def judged_model(self) -> nn.Module:
        """The network that is validated, saved and shipped."""
        return self.model if self.model_ema is None else self.model_ema.module

    def forward(self, tiles: Tensor) -> Tensor:
        """Predict with the network in training, ``(B, 1, D, H, W) -> (B, C, D, H, W)``."""
        return self.model(tiles)

    def on_train_start(self) -> None:
        """Count from where a resumed training stands."""
        self._averaged_step = self.trainer.global_step
        if self._resumed_epochs is not None:
            self._schedule_lead = round(self._resumed_epochs * self._updates_per_epoch) - self.trainer.global_step
            self.lr_scheduler_step(self.lr_schedulers(), None)
        self._good_buffers = [buffer.clone() for buffer in self.model.buffers()]
        self._freeze_backbone()

    def on_train_epoch_start(self) -> None:
        """Freeze or free the backbone; count skipped steps anew."""
        self.skipped_steps = 0
        self._freeze_backbone()

    def _freeze_backbone(self) -> None:
        backbone = getattr(self.model, "backbone", None)
        if isinstance(backbone, nn.Module) and self.freeze_backbone_epochs:
            frozen = self.current_epoch < self.freeze_backbone_epochs
            if self.trainer.world_size == 1:  # several processes agreed at the start on what they share
                backbone.requires_grad_(not frozen)
            backbone.train(not frozen)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a mixed batch."""
        place = (self.seed, self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(hash((*place, 1)) % 2**63)  # what the network draws on its device: stochastic depth
        generator = torch.Generator().manual_seed(hash(place) % 2**63)
        image, weighted_targets = self.mixer(*batch, generator)
        prediction = self.model(image)
        terms = [weight * self.loss(prediction.float(), target) for weight, target in weighted_targets]
        return torch.stack(terms).sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Skip a step whose gradients are not finite.

        Raises
        ------
        InputError
            If that happens many times in a row.
        """
        backbone = getattr(self.model, "backbone", None)
        if isinstance(backbone, nn.Module) and self.current_epoch < self.freeze_backbone_epochs:
            for weight in backbone.parameters():
                weight.grad = None
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        buffers = list(self.model.buffers())
        largest = torch.nn.utils.get_total_norm(gradients, math.inf)
        if bool(torch.isfinite(largest)):
            self.skipped_in_a_row = 0
            if buffers:
                torch._foreach_copy_(self._good_buffers, buffers)
            return
        if buffers:
            torch._foreach_copy_(buffers, self._good_buffers)
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:  # the scaler of fp16 skips by itself
            optimizer.zero_grad(set_to_none=True)
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.PATIENCE:
            self._stop_for_gradients()

    def _stop_for_gradients(self) -> NoReturn:
        raise InputError(
            f"training, epoch {self.current_epoch + 1}, step {self.trainer.global_step}",
            "a finite loss and finite gradients",
            f"none for {self.skipped_in_a_row} steps",
            "lower opt.lr or set trainer.gradient_clip_val; last.ckpt, if there is one, is of before",
        )

    def on_train_epoch_end(self) -> None:
        """Stop if the last epoch had no step at all, as short trainings may before it has happened often enough.

        Raises
        ------
        InputError
            As `on_before_optimizer_step`.
        """
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None  # fp16 first looks for its scale
        is_last = self.current_epoch + 1 == self.trainer.max_epochs
        if is_last and not scaled and self.skipped_in_a_row >= self._updates_per_epoch:
            self._stop_for_gradients()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Average the weights once per optimizer step that was not skipped."""
        if self.trainer.global_step == self._averaged_step:
            return
        self._averaged_step = self.trainer.global_step
        if self.model_ema is not None and not self.skipped_in_a_row:
            self.model_ema.update(self.model, step=self._averaged_step)

    def configure_optimizers(self) -> Any:
        """Return optimizer and scheduler, stepped once per optimizer step."""
        optimizer = self.create_optimizer(self.model)
        _ = self.trainer.estimated_stepping_batches  # asks for the loader; itself it ends at max_steps
        updates_per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        scheduler = self.create_scheduler(optimizer, updates_per_epoch)
        self._updates_per_epoch = updates_per_epoch
        scheduler.step_update(0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Move timm's scheduler on."""
        scheduler.step_update(self.trainer.global_step + self._schedule_lead)

    def on_validation_epoch_start(self) -> None:
        """Forget the picks of the validation before."""
        self._picks = []

    def validation_step(self, position: int, batch_idx: int) -> None:
        """Pick one held-out tomogram with the very function that prediction uses; none at position -1."""
        if position < 0:
            return
        volume, target = self.held_out[position]
        picks = pick_selected(
            volume,
            TorchNetwork(self.judged_model, self.device),  # in the precision of the trainer, whose autocast is on
            self.particles,
            self.options,
            volume.voxel_spacing,
            self.card.offset_voxel,
            self.selections[position],
        )
        self._picks.append((position, picks.assign(run=target.run)))

    def on_validation_epoch_end(self) -> None:
        """Score the picks of all processes together: at thresholds fitted on them, at the ones before, and at none.

        ``val/fbeta`` is optimistic, its thresholds having seen the tomogram they are judged on;
        ``val/fbeta_fixed`` uses the thresholds of the validation before (`DEFAULT_THRESHOLD` for the first);
        ``val/fbeta_ranked`` chooses no threshold, see `czii25d.thresholds.ranked_fbeta`.
        """
        gathered = self._picks
        if self.trainer.world_size > 1:
            shares: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(shares, self._picks)
            gathered = [item for share in shares for item in share]
        if not gathered:
            return
        picks = pd.concat([frame for _, frame in sorted(gathered, key=lambda item: item[0])], ignore_index=True)
        truth = zip(self.held_out, self.selections, strict=True)
        solution = pd.concat(
            [
                target.picks() if selection is None else selection.keep(target.picks())[0]
                for (_, target), selection in truth
            ]
        )
        before = self.card.thresholds or dict.fromkeys(self.particles.names, DEFAULT_THRESHOLD)
        thresholds = fit_thresholds(solution, picks, self.particles).thresholds
        self.card = replace(self.card, thresholds=thresholds)
        self.table = self._evaluate(solution, picks, thresholds)
        self.judged_picks, self.solution = picks, solution
        values = {f"val/fbeta/{name}": self.table["fbeta"][name] for name in self.particles.names}
        values["val/fbeta"] = self.table["fbeta"]["total"]
        values["val/fbeta_fixed"] = self._evaluate(solution, picks, before)["fbeta"]["total"]
        values["val/fbeta_ranked"] = ranked_fbeta(solution, picks, self.particles)["total"]
        self.log_dict({key: float(value) for key, value in values.items()}, rank_zero_only=False)

    def _evaluate(self, solution: pd.DataFrame, picks: pd.DataFrame, thresholds: dict[str, float]) -> pd.DataFrame:
        kept = above_thresholds(picks, thresholds)
        return evaluate(solution, kept if len(kept) else empty_picks(), particles=self.particles)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds and decodes the network, in plain types that load with ``weights_only``."""
        checkpoint["czii25d"] = self.card.to_dict()
        position = self.trainer.global_step + self._schedule_lead
        checkpoint["schedule_epochs"] = position / self._updates_per_epoch
        checkpoint["skipped_steps"] = [self.skipped_steps, self.skipped_in_a_row]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back the thresholds of the last validation, the count of skipped steps, and the place in the schedule.

        The schedule itself is that of the settings, which may ask for more epochs than the interrupted training's.
        """
        self._resumed_epochs = checkpoint.get("schedule_epochs")
        if self._resumed_epochs is not None:
            checkpoint["lr_schedulers"] = []
        self.skipped_steps, self.skipped_in_a_row = checkpoint.get("skipped_steps", (0, 0))
        self.card = replace(self.card, thresholds=ModelCard.from_dict(checkpoint["czii25d"]).thresholds)
