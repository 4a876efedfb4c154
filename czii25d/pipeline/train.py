"""Train one fold."""

from __future__ import annotations

import inspect
import logging
import netrc
import os
import shutil
import sys
import time
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf
from timm.optim._optim_factory import create_optimizer_v2, list_optimizers
from timm.optim._param_groups import param_groups_weight_decay
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch import nn

from czii25d.data.augment import Augmentation
from czii25d.data.datamodule import TomogramDataModule, split_runs
from czii25d.data.dataset import Sampling
from czii25d.errors import InputError, did_you_mean
from czii25d.files import write_aside
from czii25d.geometry import Shape3D
from czii25d.losses import Mixer, create_loss, on_labelled
from czii25d.models import create_model
from czii25d.models.checkpoint import SHAPING_KEYS, ModelCard, copy_weights, load_checkpoint, read_card
from czii25d.particles import ParticleSet
from czii25d.pipeline.app import keep_freed_memory, load_config
from czii25d.pipeline.members import inference_options
from czii25d.pipeline.regions import regions_key
from czii25d.pipeline.report import write_report
from czii25d.training.callbacks import (
    EndTogether,
    EpochLog,
    HeldOutPicks,
    LastCheckpoint,
    TopCheckpoints,
    WholeFiles,
)
from czii25d.training.module import HeatmapModule
from czii25d.training.muon import Muon

logger = logging.getLogger(__name__)

NOT_FOR_THE_CONSTRUCTOR = ("ema", "ema_decay", "ema_warmup", "freeze_backbone_epochs", "resume_path", "compile")
MAY_CHANGE_ON_RESUME = (
    *("resume", "paths", "wandb", "trainer", "infer", "hydra", "data.num_workers", "data.cache"),
    *("model.compile", "save_every_minutes", "keep_best"),
)
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
SET_BY_LIGHTNING = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")
BEST_BY = ("fbeta_ranked", "fbeta", "fbeta_fixed")  # as `HeatmapModule` logs them, under val/
SCHEDULES = ("cosine", "tanh")  # of timm's, those that need no settings of their own


def train(cfg: DictConfig) -> float | None:
    """Train one fold, or on every run, and return the score of ``best.ckpt``, which a sweep can maximise.

    Leaves ``best.ckpt`` (highest ``val/<best_by>`` of the held-out runs), ``last.ckpt``, ``config.yaml``,
    ``metrics.csv`` and ``held_out/``, the last validation's picks, in ``<paths.saved_models>/<wandb.name>/``. Told to
    end by a signal, it saves and exits, see `czii25d.training.callbacks.LastCheckpoint`.

    Returns
    -------
    score
        The highest ``val/<best_by>``; ``None`` when nothing was held out or validated.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        logging.getLogger("czii25d").setLevel(logging.WARNING)  # the first process speaks for all
    folder = training_folder(cfg)
    checkpoint = find_checkpoint(cfg, folder)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    check_before_work(cfg)
    particles = ParticleSet.from_config(cfg.particles).first(cfg.model.class_num)
    data = create_data(cfg, particles)
    trained, held_out = [v.name for v in data.dataset.volumes], [volume.name for volume, _ in data.held_out]
    module = create_module(cfg, data, particles)
    logger.info("%s: training on %s; held out: %s", cfg.wandb.name, ", ".join(trained), ", ".join(held_out) or "none")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # no news of devices and advertisements
    trainer = create_trainer(cfg, folder, judged=bool(held_out))
    if trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()
    if trainer.is_global_zero and not cfg.trainer.fast_dev_run:
        if cfg.resume is False and folder.exists():  # only now that everything else is known to be right
            shutil.rmtree(folder)
        with write_aside(folder / "config.yaml") as config:
            OmegaConf.save(cfg, config, resolve=True)
    fit(trainer, module, data, checkpoint)
    best = getattr(trainer.checkpoint_callback, "best_model_score", None)  # of the first of them, `judged`
    score = None if best is None else float(best)
    if score is not None and trainer.is_global_zero:
        logger.info("best val/%s of the held-out runs: %.4f; checkpoints in %s", cfg.best_by, score, folder)
    if isinstance(trainer.logger, WandbLogger) and trainer.is_global_zero and not cfg.trainer.fast_dev_run:
        show_on_wandb(cfg, folder, trainer.logger)
    return score


def fit(trainer: L.Trainer, module: HeatmapModule, data: TomogramDataModule, checkpoint: str | None) -> None:
    """Run the training, and leave a process that can run another one."""
    environment = {key: os.environ.get(key) for key in SET_BY_LIGHTNING}
    # A checkpoint may come from elsewhere: never run what it says.
    safe = {"weights_only": True} if "weights_only" in inspect.signature(trainer.fit).parameters else {}
    with warnings.catch_warnings():
        # Lightning advises on workers and logging intervals; what matters of it is in our keys' comments.
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", "Grad strides do not match")  # of depthwise weights, with several processes
        try:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, **safe)
        except RuntimeError as error:
            if trainer.world_size == 1 or not is_lost_connection(error):
                raise
            time.sleep(2)  # the process that started the others says what has happened, and ends them
            raise InputError(
                f"process {trainer.global_rank} of {trainer.world_size}",
                "a connection to the other processes of the training",
                "none any more",
                "see why the first of them ended, and start the same command again to go on",
            ) from error
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # how Lightning answers to Ctrl-C
                raise KeyboardInterrupt from None
            raise
    if trainer.interrupted:
        raise KeyboardInterrupt
    if trainer.world_size > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        for process in getattr(trainer.strategy.launcher, "procs", []):
            process.wait()
        for key, value in environment.items():  # else the next training of a sweep waits for processes long gone
            os.environ.pop(key, None)
            os.environ.update({key: value} if value is not None else {})


def is_lost_connection(error: RuntimeError) -> bool:
    """Tell whether a collective operation failed because another process is gone."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "closed by peer" in str(error)


def show_on_wandb(cfg: DictConfig, folder: Path, wandb: WandbLogger) -> None:
    """Make the training's report and send its pictures."""
    options = {"training": str(folder), "paths": cfg.paths}
    page = write_report(OmegaConf.merge(load_config("report"), options))  # type: ignore[arg-type]
    for picture in sorted(page.parent.glob("*.png")):
        if not picture.stem.endswith("_dark"):
            wandb.log_image(f"report/{picture.stem}", [str(picture)])


def training_folder(cfg: DictConfig) -> Path:
    """Return where the training's files go; ``resume=false`` empties it, so it must be the training's own."""
    name = Path(str(cfg.wandb.name))
    if not name.parts or name.is_absolute() or ".." in name.parts:
        raise InputError("key wandb.name", "the name of a folder in paths.saved_models", f"'{name}'", "name it")
    return Path(cfg.paths.saved_models) / name


def check_before_work(cfg: DictConfig) -> None:
    """Raise `InputError` for what would otherwise show only after data and network have been built."""
    if cfg.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise InputError("key trainer.accelerator", "a GPU that torch sees", "none", "set trainer.accelerator=cpu")
    if cfg.scheduler.sched not in SCHEDULES:
        raise InputError("key scheduler.sched", f"one of {', '.join(SCHEDULES)}", cfg.scheduler.sched, "choose one")
    if 0 < cfg.trainer.max_epochs <= cfg.scheduler.warmup_epochs:
        short = (
            "the learning rate is still rising when training ends: scheduler.warmup_epochs %g, trainer.max_epochs %d"
        )
        logger.warning(short, cfg.scheduler.warmup_epochs, cfg.trainer.max_epochs)
    if cfg.best_by not in BEST_BY:
        raise InputError("key best_by", f"one of {', '.join(BEST_BY)}", str(cfg.best_by), "choose one")
    if cfg.save_every_minutes is not None and cfg.save_every_minutes < 0:
        raise InputError("key save_every_minutes", "at least 0, or null", str(cfg.save_every_minutes), "correct it")
    if not isinstance(cfg.keep_best, int) or cfg.keep_best < 0:
        raise InputError("key keep_best", "a number of checkpoints, 0 for none", str(cfg.keep_best), "correct it")
    if cfg.model.compile not in (False, True, *COMPILE_MODES):
        modes = ", ".join(COMPILE_MODES)
        raise InputError("key model.compile", f"false, true, {modes}", str(cfg.model.compile), "choose one")


def create_data(cfg: DictConfig, particles: ParticleSet) -> TomogramDataModule:
    """Open the runs' volumes and targets, split by fold."""
    volumes = Path(cfg.paths.output) / "volumes" / "train"
    names = cfg.data.runs
    if names is None:
        names = sorted(path.name for path in volumes.glob("[!.]*") if path.is_dir())
        if not names:
            raise InputError(volumes, "volumes of the training runs", "none", "run 01_create_dataset.py first")
    fold_id = cfg.data.fold_id
    train_runs, held_out = split_runs(
        list(names), fold_id if isinstance(fold_id, int | str) else list(fold_id), cfg.data.train_all
    )
    return TomogramDataModule(
        volumes_dir=volumes,
        heatmaps_dir=Path(cfg.paths.output) / "heatmaps",
        train_runs=train_runs,
        held_out_runs=held_out,
        particles=particles,
        tile_shape=nominal_tile(cfg),
        sampling=Sampling(**cfg.data.sampling),
        augmentation=Augmentation(**cfg.data.augment),
        normalization=cfg.data.normalization,
        batch_size=cfg.data.batch_size,
        num_workers=cfg.data.num_workers,
        seed=cfg.seed,
        regions=regions_key(cfg.regions),
        cache=cfg.data.cache,
        reconstructions=list(cfg.data.reconstructions),
    )


def nominal_tile(cfg: DictConfig) -> Shape3D:
    """Return the ``(D, H, W)`` of a training tile."""
    return (cfg.model.img_depth, cfg.model.img_size, cfg.model.img_size)


def create_module(cfg: DictConfig, data: TomogramDataModule, particles: ParticleSet) -> HeatmapModule:
    """Build network, loss, optimizer, schedule and averaging."""
    model_kwargs: dict[str, Any] = OmegaConf.to_container(cfg.model)  # type: ignore[assignment]
    for key in NOT_FOR_THE_CONSTRUCTOR:
        model_kwargs.pop(key, None)
    if cfg.model.resume_path:
        model_kwargs |= {"pretrained": False, "pretrained_path": None}
    model_kwargs["class_num"] = len(particles)
    model = create_model(**model_kwargs)
    if cfg.model.resume_path:
        start_from(cfg.model.resume_path, model, particles, model_kwargs)
    options = inference_options(cfg.infer, nominal_tile(cfg))
    card = ModelCard(
        model={key: value for key, value in model_kwargs.items() if "pretrained" not in key},
        particles=particles.to_config(),
        voxel_spacing=data.voxel_spacing,
        normalization=cfg.data.normalization,
        offset_voxel=0.0,
        thresholds=None,
        nms_radius=options.nms_radius_by_name(particles),  # thresholds are fitted under it
        fold=[target.run for _, target in data.held_out],
        czii25d_version=version("czii25d"),
    )
    loss = create_loss(cfg.loss.name, cfg.loss.background)
    return HeatmapModule(
        model=model,
        card=card,
        loss=on_labelled(loss) if data.is_partly_labelled else loss,
        mixer=Mixer(cfg.loss.mixup, cfg.loss.cutmix, cfg.loss.mix_alpha),
        create_optimizer=optimizer_factory(cfg),
        create_scheduler=partial(create_schedule, cfg),
        held_out=data.held_out,
        options=options,
        ema_decay=cfg.model.ema_decay if cfg.model.ema else None,
        ema_warmup=cfg.model.ema_warmup,
        freeze_backbone_epochs=cfg.model.freeze_backbone_epochs,
        seed=cfg.seed,
        compile_mode={False: None, True: "default"}.get(cfg.model.compile, cfg.model.compile),
        selections=data.held_out_selections,
    )


def start_from(path: str, model: nn.Module, particles: ParticleSet, model_kwargs: dict[str, Any]) -> None:
    """Give a new network the weights of a checkpoint, and its heads to the particles of the same names."""
    kwargs = {key: value for key, value in model_kwargs.items() if "pretrained" not in key}
    if read_card(path) is not None:
        kwargs.pop("class_num")  # may be another one, as names tell which head is whose
    trained, card = load_checkpoint(path, **kwargs)
    kept = copy_weights(trained, list(card.particles), model, particles.names)
    fresh = [name for name in particles.names if name not in kept]
    dropped = [name for name in card.particles if name not in kept]
    said = [f"heads kept: {', '.join(kept) or 'none'}"]
    said += [f"new: {', '.join(fresh)}"] if fresh else []
    said += [f"dropped: {', '.join(dropped)}"] if dropped else []
    logger.info("starting from the weights of %s; %s", path, "; ".join(said))


def optimizer_factory(cfg: DictConfig) -> Any:
    """Return ``module -> optimizer``: Muon, or one of timm's optimizers."""
    name = str(cfg.opt.opt).lower()
    known = ["muon", *map(str, list_optimizers())]
    if name not in known:
        raise InputError(
            "key opt.opt",
            "muon or an optimizer of timm",
            f"'{cfg.opt.opt}'{did_you_mean(name, known)}",
            "choose one",
        )
    if cfg.opt.lr <= 0:
        raise InputError("key opt.lr", "a learning rate above 0", str(cfg.opt.lr), "raise it")
    if name == "muon":  # ours, not timm's, see czii25d.training.muon
        return lambda module: Muon(param_groups_weight_decay(module, cfg.opt.weight_decay), cfg.opt.lr)
    # One pass over the weights instead of many; with fp16 Lightning cannot clip gradients that it unscales.
    clips_fp16 = cfg.trainer.gradient_clip_val and str(cfg.trainer.precision) in ("16", "16-mixed")
    fused: Any = {"fused": True} if name in ("adam", "adamw") and not clips_fp16 else {}
    return partial(create_optimizer_v2, opt=name, lr=cfg.opt.lr, weight_decay=cfg.opt.weight_decay, **fused)


def create_schedule(cfg: DictConfig, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Any:
    """Return one of timm's schedules, to be stepped once per optimizer step."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=cfg.scheduler.sched,
        num_epochs=cfg.trainer.max_epochs,
        warmup_epochs=cfg.scheduler.warmup_epochs,
        warmup_lr=cfg.scheduler.warmup_lr,
        min_lr=cfg.scheduler.min_lr,
        warmup_prefix=False,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler


def create_trainer(cfg: DictConfig, folder: Path, judged: bool) -> L.Trainer:
    """Build Lightning's trainer with our callbacks; ``judged`` ones also keep what ``best_by`` chooses."""
    arguments: dict[str, Any] = OmegaConf.to_container(cfg.trainer, resolve=True)  # type: ignore[assignment]
    on_cpu = arguments["accelerator"] == "cpu" or (arguments["accelerator"] == "auto" and not torch.cuda.is_available())
    if on_cpu and isinstance(arguments["devices"], list):
        arguments["devices"] = len(arguments["devices"])  # a CPU has processes, not device numbers
    if on_cpu and arguments["devices"] == "auto":
        arguments["devices"] = 1
    terminal = sys.stderr.isatty() and arguments["enable_progress_bar"]
    arguments["enable_progress_bar"] = terminal
    callbacks: list[Callback] = [EpochLog(folder / "metrics.csv"), EndTogether()]
    if terminal:
        callbacks.append(RichProgressBar())
    if judged and not cfg.trainer.fast_dev_run:
        callbacks.append(HeldOutPicks(folder / "held_out"))
    if judged:
        chosen: dict[str, Any] = {
            "monitor": f"val/{cfg.best_by}",
            "mode": "max",
            "auto_insert_metric_name": False,
            "enable_version_counter": False,
        }
        callbacks.append(ModelCheckpoint(folder, "best", **chosen))
        if cfg.keep_best:
            callbacks.append(
                TopCheckpoints(
                    folder / "top", "epoch{epoch:04d}", save_top_k=cfg.keep_best, save_weights_only=True, **chosen
                )
            )
    callbacks.append(LastCheckpoint(folder / "last.ckpt", cfg.save_every_minutes))
    try:
        return L.Trainer(
            **arguments,
            callbacks=callbacks,
            plugins=[WholeFiles()],
            logger=create_logger(cfg),
            enable_model_summary=False,
            use_distributed_sampler=False,  # EpochSampler and the validation loader deal out the samples themselves
        )
    except (TypeError, ValueError) as error:
        raise InputError("keys trainer.*", "arguments of lightning.Trainer", str(error), "correct them") from None


def create_logger(cfg: DictConfig) -> Logger | bool:
    """Return the wandb logger, or ``False``; never asks for a login."""
    mode = cfg.wandb.mode
    if mode == "auto":
        mode = "online" if is_logged_in_to_wandb() else "disabled"
    if mode not in ("online", "offline", "disabled"):
        raise InputError("key wandb.mode", "auto, online, offline or disabled", repr(mode), "choose one")
    if mode == "disabled":
        return False
    if mode == "online" and not is_logged_in_to_wandb():
        raise InputError(
            "key wandb.mode",
            "a login for mode online",
            "none",
            "run `wandb login`, or set wandb.mode=offline",
        )
    folder = Path(cfg.paths.output) / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    return WandbLogger(
        name=cfg.wandb.name,
        project=cfg.wandb.project,
        save_dir=folder,
        offline=mode == "offline",
        config=resolved,
    )


def is_logged_in_to_wandb() -> bool:
    """Tell whether a key is at hand, without asking anybody."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def find_checkpoint(cfg: DictConfig, folder: Path) -> str | None:
    """Return the checkpoint to go on from; refuse one of a training with other settings.

    Raises
    ------
    InputError
        If ``resume`` names no checkpoint, or the folder holds a training with other settings.
    """
    if cfg.resume is False:
        return None
    path = folder / "last.ckpt" if cfg.resume == "auto" else Path(str(cfg.resume))
    if not path.is_file():
        if cfg.resume != "auto":
            raise InputError("key resume", "auto, false or a checkpoint", str(cfg.resume), "correct the path")
        return None
    check_resumable(path, cfg)
    saved = path.with_name("config.yaml")
    if saved.is_file():
        changed = changed_keys(OmegaConf.load(saved), cfg)
        if changed:
            raise InputError(
                path.parent,
                "the settings of the interrupted training",
                "; ".join(changed),
                "choose another wandb.name, restore them, or start over with resume=false",
            )
    logger.info("going on from %s", path)
    return str(path)


def check_resumable(path: Path, cfg: DictConfig) -> None:
    """Refuse a file that holds no training, or that of another network."""
    card = read_card(path)  # a readable file, or one clear line
    lightning = card is not None and path.suffix != ".safetensors"
    content = torch.load(path, "cpu", weights_only=True, mmap=True) if lightning else {}
    if card is None or not {"loops", "optimizer_states"} <= set(content):
        raise InputError(
            path,
            "a training of 11_train.py to go on with",
            "weights alone",
            "set model.resume_path to start a new training from them",
        )
    stored = card.model
    for key in SHAPING_KEYS:
        own = cfg.model.get(key)
        if key == "class_num" and own is None:  # all of the table, whose names the settings hold
            continue
        if (OmegaConf.to_container(own) if OmegaConf.is_config(own) else own) != stored.get(key):
            raise InputError(
                path,
                f"a training of this network, model.{key} {own}",
                str(stored.get(key)),
                "restore the key, or start over with resume=false",
            )


def changed_keys(saved: Any, cfg: DictConfig) -> list[str]:
    """Return ``key: old -> new`` for every setting that a resumed training must keep."""
    from czii25d.pipeline.app import leaves

    old = dict(leaves(OmegaConf.to_container(saved, resolve=True)))
    new = dict(leaves(OmegaConf.to_container(cfg, resolve=True)))
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in dict.fromkeys((*old, *new))
        if old.get(key) != new.get(key) and not key.startswith(MAY_CHANGE_ON_RESUME)
    ]
