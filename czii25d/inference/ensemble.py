"""Several networks and several views of a tile as one predictor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from czii25d.errors import InputError

View = Literal["flip_z", "flip_y", "flip_x", "rot90", "rot180", "rot270"]
_FLIPS: dict[str, int] = {"flip_z": -3, "flip_y": -2, "flip_x": -1}
_QUARTER_TURNS: dict[str, int] = {"rot90": 1, "rot180": 2, "rot270": 3}


class Predictor(Protocol):
    """Turns tiles ``(B, 1, D, H, W)`` into heatmaps ``(B, C, D, H, W)``, float32, on the tiles' device."""

    @property
    def device(self) -> torch.device:
        """Where tiles are expected."""

    def __call__(self, tiles: Tensor) -> Tensor:
        """Return the heatmaps of tiles, in memory that later calls leave alone."""


@dataclass(frozen=True)
class Member:
    """A network's part in an ensemble.

    Parameters
    ----------
    predictor
        The network.
    channels
        Which of its channels comes first, second, ... in the common order; ``None``: it has that order.
    weight
        Of its heatmaps in the mean, above 0.
    """

    predictor: Predictor
    channels: Sequence[int] | None = None
    weight: float = 1.0


class Ensemble:
    """The weighted mean of networks that take the same tiles, over views of each tile.

    Parameters
    ----------
    members
        At least one, all on one device.
    views
        Each is predicted besides the tile itself, turned back, and averaged. A quarter turn needs square tiles,
        unless a network takes any.

    Raises
    ------
    InputError
        If a view is unknown.
    """

    def __init__(self, members: Sequence[Member], views: Sequence[View] = ()) -> None:
        for view in views:
            if view not in get_args(View):
                raise InputError(
                    "key infer.tta", f"some of {', '.join(get_args(View))}", repr(view), "choose among them"
                )
        self.members, self.views = list(members), list(dict.fromkeys(views))
        self.device = self.members[0].predictor.device
        self.weight = sum(member.weight for member in members)
        self._orders = [_reordering(member.channels) for member in members]

    def __call__(self, tiles: Tensor) -> Tensor:
        """Predict ``(B, C, D, H, W)`` float32 heatmaps."""
        if not self.views and len(self.members) == 1 and self._orders[0] is None:
            return self.members[0].predictor(tiles)
        total: Tensor | None = None
        for view in (None, *self.views):
            heatmap = _turn_back(self._mean(_turn(tiles, view)), view)
            total = heatmap if total is None else total.add_(heatmap)
        assert total is not None
        return total / (1 + len(self.views)) if self.views else total

    def _mean(self, tiles: Tensor) -> Tensor:
        total: Tensor | None = None
        for member, order in zip(self.members, self._orders, strict=True):
            heatmap = member.predictor(tiles)
            heatmap = (heatmap if order is None else heatmap[:, order]) * (member.weight / self.weight)
            total = heatmap if total is None else total.add_(heatmap)
        assert total is not None
        return total


def merge_slabs(
    streams: Sequence[Iterable[tuple[int, Tensor]]], weights: Sequence[float]
) -> Iterator[tuple[int, Tensor]]:
    """Average several predictions of one volume that come in slabs of different depths.

    Parameters
    ----------
    streams
        As `czii25d.inference.predict_slabs` yields them; each covers the volume without gaps.
    weights
        Of each, above 0.

    Yields
    ------
    z, heatmap
        The slab's first plane and the weighted mean, ``(C, d, H, W)``.
    """
    if len(streams) == 1:
        yield from streams[0]
        return
    iterators = [iter(stream) for stream in streams]
    left: list[Tensor | None] = [None] * len(streams)
    z = 0
    while True:
        for index, iterator in enumerate(iterators):
            if left[index] is None:
                left[index] = next(iterator, (z, None))[1]
        ready = [slab for slab in left if slab is not None]
        if len(ready) < len(left):
            if ready:
                raise ValueError("the predictions do not end at the same plane")
            return
        depth = min(slab.shape[1] for slab in ready)
        parts = [slab[:, :depth] * (weight / sum(weights)) for slab, weight in zip(ready, weights, strict=True)]
        yield z, torch.stack(parts).sum(0) if len(parts) > 2 else parts[0] + parts[1]
        left = [slab[:, depth:] if slab.shape[1] > depth else None for slab in ready]
        z += depth


def _reordering(channels: Sequence[int] | None) -> list[int] | None:
    return None if channels is None or list(channels) == sorted(channels) else list(channels)


def _turn(tiles: Tensor, view: str | None) -> Tensor:
    if view in _FLIPS:
        return tiles.flip(_FLIPS[view])
    return tiles if view is None else torch.rot90(tiles, _QUARTER_TURNS[view], (-2, -1))


def _turn_back(heatmaps: Tensor, view: str | None) -> Tensor:
    if view in _FLIPS:
        return heatmaps.flip(_FLIPS[view])
    return heatmaps if view is None else torch.rot90(heatmaps, -_QUARTER_TURNS[view], (-2, -1))
