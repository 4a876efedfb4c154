"""13: average the weights of several checkpoints into one network."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig
from torch import Tensor, nn

from czii25d.data.targets import open_target
from czii25d.data.volumes import open_volume
from czii25d.errors import InputError
from czii25d.inference import pick_selected
from czii25d.models.checkpoint import ModelCard, load_checkpoint, save_weights
from czii25d.models.soup import average_weights, greedy_soup, soup_card
from czii25d.particles import ParticleSet
from czii25d.pipeline.members import CHECKPOINT_SUFFIXES, choose_device, find_network_files, inference_options
from czii25d.pipeline.regions import regions_key
from czii25d.runtimes.torch import TorchNetwork
from czii25d.thresholds import ranked_fbeta

logger = logging.getLogger(__name__)

METHODS = ("uniform", "greedy")


def make_soup(cfg: DictConfig) -> dict[str, Any]:
    """Average the weights of several checkpoints, all or those that help, and write them as safetensors.

    Returns
    -------
    report
        ``ingredients`` (paths) and, for a greedy soup, ``scores`` of each checkpoint and ``score`` of the soup.

    Raises
    ------
    InputError
        If there are fewer than two checkpoints, they do not fit together, or a greedy soup has no run to judge by.
    """
    if cfg.method not in METHODS:
        raise InputError("key method", f"one of {', '.join(METHODS)}", str(cfg.method), "choose one")
    target = Path(cfg.target)
    if target.suffix != ".safetensors":
        raise InputError("key target", "a .safetensors file", str(target), "rename it")
    paths = list(dict.fromkeys(find_network_files(cfg.checkpoints)))
    if wrong := [path for path in paths if path.suffix not in CHECKPOINT_SUFFIXES]:
        raise InputError("key checkpoints", "checkpoints", str(wrong[0]), "leave it out")
    if len(paths) < 2:
        raise InputError("key checkpoints", "at least two", str(paths[0]), "name more, or train with keep_best=5")
    loaded = {path: load_checkpoint(path) for path in paths}
    card = soup_card({path: own for path, (_, own) in loaded.items()})
    network = loaded[paths[0]][0]
    states = [model.state_dict() for model, _ in loaded.values()]
    states[0] = {key: value.clone() for key, value in states[0].items()}  # the network is about to get other weights
    chosen, report = list(range(len(paths))), {}
    if cfg.method == "greedy":
        chosen, scores, best = greedy_soup(states, judge(cfg, network, card))
        for path, score in zip(paths, scores, strict=True):
            logger.info("%s: %.4f", path, score)
        logger.info("greedy soup of %d: %.4f, optimistic, being chosen by it", len(chosen), best)
        report = {"scores": scores, "score": best}
    network.load_state_dict(average_weights([states[i] for i in chosen]))
    save_weights(target, network, card)
    logger.info(
        "%s: the mean of %s; it has no thresholds yet: fit them with 12_fit_thresholds.py",
        target,
        ", ".join(str(paths[i]) for i in chosen),
    )
    return {"ingredients": [str(paths[i]) for i in chosen], **report}


def judge(cfg: DictConfig, network: nn.Module, card: ModelCard) -> Callable[[Mapping[str, Tensor]], float]:
    """Return weights -> F-beta without threshold on the runs that all checkpoints held out, as training validates."""
    if not card.fold:
        raise InputError(
            "key method",
            "for a greedy soup, a run that all checkpoints held out",
            "none",
            "take checkpoints of one fold, or method=uniform",
        )
    output = Path(cfg.paths.output)
    regions = regions_key(cfg.regions)
    volumes = [open_volume(output / "volumes" / "train" / run, card.normalization) for run in card.fold]
    selections = [
        None if regions is None else regions.select(volume.name, volume.shape, volume.voxel_spacing)
        for volume in volumes
    ]
    truth = [open_target(output / "heatmaps" / f"{run}.zarr").picks() for run in card.fold]
    solution = pd.concat(
        [
            picks if selection is None else selection.keep(picks)[0]
            for picks, selection in zip(truth, selections, strict=True)
        ]
    )
    options = inference_options(cfg.infer, card.tile_shape, card.nms_radius)
    device, particles = choose_device(cfg.infer.device), ParticleSet.from_config(card.particles)

    def score(state: Mapping[str, Tensor]) -> float:
        network.load_state_dict(state)
        predictor = TorchNetwork(network, device)
        picks = [
            pick_selected(
                volume, predictor, particles, options, volume.voxel_spacing, card.offset_voxel, selection
            ).assign(run=volume.name)
            for volume, selection in zip(volumes, selections, strict=True)
        ]
        return ranked_fbeta(solution, pd.concat(picks, ignore_index=True), particles)["total"]

    return score
