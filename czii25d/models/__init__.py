"""Networks from tiles to heatmaps, by name of their architecture."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from czii25d.errors import InputError, did_you_mean
from czii25d.models.timm3d3 import Timm3d3

ARCHITECTURES: dict[str, type[nn.Module]] = {"timm3d3": Timm3d3}


def create_model(arch: str = "timm3d3", **kwargs: Any) -> nn.Module:
    """Build a network ``(B, 1, D, H, W) -> (B, class_num, D, H, W)``.

    Parameters
    ----------
    arch
        Name of the architecture: ``"timm3d3"``.
    **kwargs
        Arguments of its class, see `czii25d.models.timm3d3.Timm3d3`.

    Raises
    ------
    InputError
        If the architecture or an argument is unknown, or an argument's value is impossible.
    """
    if arch not in ARCHITECTURES:
        raise InputError(
            "model.arch",
            f"one of {', '.join(ARCHITECTURES)}",
            f"'{arch}'{did_you_mean(str(arch), ARCHITECTURES)}",
            "correct it",
        )
    known = list(inspect.signature(ARCHITECTURES[arch]).parameters)
    for key in kwargs:
        if key not in known:
            raise InputError(
                f"model.{key}",
                f"an argument of {arch} ({', '.join(known)})",
                f"'{key}'{did_you_mean(key, known)}",
                "correct it",
            )
    return ARCHITECTURES[arch](**kwargs)
