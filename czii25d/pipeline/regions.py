"""The key ``regions`` of the scripts: which part of which tomogram is used."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from czii25d.data.regions import RegionTable, read_regions
from czii25d.regions import Selection

logger = logging.getLogger(__name__)


def regions_key(given: Any) -> RegionTable:
    """Return the table that ``regions`` names, or is."""
    return read_regions(OmegaConf.to_object(given) if OmegaConf.is_config(given) else given)  # type: ignore[arg-type]


def keep_selected(picks: pd.DataFrame, selection: Selection | None, what: str) -> pd.DataFrame:
    """Return the picks that the selection keeps, and say how many it drops; ``what`` they are begins the line."""
    if selection is None:
        return picks
    kept, dropped = selection.keep(picks)
    say_dropped(what, len(picks), dropped)
    return kept


def say_dropped(what: str, of: int, dropped: Mapping[str, int]) -> None:
    """Log how many picks were dropped, by reason."""
    if dropped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        logger.info("%s: dropped %d of %d picks: %s", what, sum(dropped.values()), of, reasons)
