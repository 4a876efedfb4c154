"""Model soups: the mean of several networks' weights, one network that costs no more than any of them.

Wortsman et al. 2022, arXiv:2203.05482. It works where the networks lie in one basin of the loss: epochs of one
training, or trainings that started from the same weights; networks trained from scratch apart from each other do not
average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from czii25d.errors import InputError
from czii25d.models.checkpoint import SHAPING_KEYS, ModelCard


def average_weights(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of state dictionaries with the same names and shapes; whole numbers are the first one's."""
    first = states[0]
    return {
        key: torch.stack([state[key].double() for state in states]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value.clone()
        for key, value in first.items()
    }


def greedy_soup(
    states: Sequence[Mapping[str, Tensor]], score: Callable[[Mapping[str, Tensor]], float]
) -> tuple[list[int], list[float], float]:
    """Choose ingredients one by one, the best first; each stays if the soup scores no worse with it (recipe 1 there).

    Parameters
    ----------
    states
        Weights of each network, ``state_dict()``.
    score
        Of weights; higher is better.

    Returns
    -------
    chosen
        Positions of the ingredients.
    scores
        Of every network on its own.
    best
        Of the soup.
    """
    scores = [score(state) for state in states]
    order = sorted(range(len(states)), key=lambda i: -scores[i])
    chosen, best = [order[0]], scores[order[0]]
    for candidate in order[1:]:
        value = score(average_weights([states[i] for i in (*chosen, candidate)]))
        if value >= best:
            chosen, best = [*chosen, candidate], value
    return chosen, scores, best


def soup_card(cards: Mapping[Path, ModelCard]) -> ModelCard:
    """Return the card of a soup: without thresholds, which were fitted to other scores; held out is what all held out.

    Raises
    ------
    InputError
        If the networks differ in architecture, particles, or how their heatmaps are read.
    """
    (first_path, first), *others = cards.items()
    fold = list(first.fold)
    for path, card in others:
        pairs: list[tuple[str, Any, Any]] = [
            (f"model.{key}", first.model.get(key), card.model.get(key)) for key in SHAPING_KEYS
        ]
        pairs += [
            (name, getattr(first, name), getattr(card, name))
            for name in ("particles", "voxel_spacing", "normalization", "contrast", "offset_voxel")
        ]
        for name, expected, found in pairs:
            if expected != found or (name == "particles" and list(expected) != list(found)):
                expected, found = (", ".join(each) if name == "particles" else str(each) for each in (expected, found))
                raise InputError(path, f"the {name} of {first_path}, {expected}", found, "average others of its kind")
        fold = [run for run in fold if run in card.fold]
    radii = [card.nms_radius for card in cards.values()]
    same_radii = all(each == radii[0] for each in radii)
    return replace(first, thresholds=None, nms_radius=radii[0] if same_radii else None, fold=fold)
