"""CSV: the competition's columns or this project's, all runs and particles in one file; see `czii25d.picks`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from czii25d.formats.base import Context
from czii25d.picks import read_picks_csv, write_scored_picks_csv, write_submission_csv


def read(path: Path, context: Context) -> pd.DataFrame:
    """Read a CSV file; its scores are read if it has that column."""
    with path.open("rb") as file:
        header = file.readline().decode("utf-8", "replace")
    scored = "score" in [name.strip().strip('"') for name in header.split(",")]
    return read_picks_csv(path, scored, context.run, context.particle)


def write(path: Path, picks: pd.DataFrame, context: Context) -> list[Path]:
    """Write a CSV file, with scores if the picks have them."""
    (write_scored_picks_csv if "score" in picks else write_submission_csv)(path, picks)
    return [path]
