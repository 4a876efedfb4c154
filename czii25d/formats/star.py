"""STAR files, read and written by ``starfile``; what it does not check is checked here."""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import starfile
from numpy.typing import NDArray

from czii25d.errors import InputError, did_you_mean
from czii25d.files import write_aside

# Words that starfile, as RELION, cannot tell from a missing value, or that end a cell.
_NOT_A_WORD = re.compile(r"[\s\"'#]|^$|^(nan|NaN|<NA>)$")


def read_star(path: Path, text_columns: Iterable[str] = ()) -> dict[str, Any]:
    """Return a STAR file's blocks by name: loops as frames, other blocks as dictionaries.

    Parameters
    ----------
    text_columns
        What is read as text even where it looks like a number.

    Raises
    ------
    InputError
        If it is no STAR file.
    """
    linecache.clearcache()  # starfile reads through it, and a failed read leaves the old lines there
    try:
        blocks = starfile.read(path, always_dict=True, parse_as_string=list(text_columns))
    except OSError:
        raise
    except Exception as error:  # the parser fails in as many ways as a file can be wrong
        found = f"{type(error).__name__}: {error}"
        raise InputError(path, "a STAR file", found, "copy or export it again") from None
    finally:
        linecache.clearcache()
    blocks = {name: block for name, block in blocks.items() if block is not None}
    if not blocks:
        raise InputError(path, "a STAR file", "no data block in it", "copy or export it again")
    return blocks


def write_star(path: Path, blocks: Mapping[str, pd.DataFrame | Mapping[str, Any]], comment: str | None = None) -> None:
    """Write blocks as a STAR file, ``comment`` before each, numbers with six decimals."""
    text = starfile.to_string(dict(blocks), float_format="%.6f")
    _, text = text.split("\n", 1)  # the time at which it was written: equal picks are to make equal files
    if comment is not None:
        text = re.sub(r"^data_(?=\w*$)", f"# {comment}\n\ndata_", text, flags=re.MULTILINE)
    with write_aside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_word(name: str, where: object) -> str:
    """Return a name that can stand in a cell of a STAR file, else raise `InputError`."""
    if _NOT_A_WORD.search(name):
        raise InputError(where, "names without spaces, quotes and #", repr(name), "rename it; STAR cannot hold it")
    return name


def numbers(table: pd.DataFrame, columns: Iterable[str], where: object) -> NDArray[np.float64]:
    """Return ``(N, K)`` finite numbers of the named columns; `InputError` if one is missing or holds anything else."""
    columns = list(columns)
    missing = [name for name in columns if name not in table]
    if missing:
        raise InputError(
            where,
            f"the columns {', '.join(columns)}",
            f"no {', '.join(missing)} among {', '.join(map(str, table.columns))}"
            f"{did_you_mean(missing[0], map(str, table.columns))}",
            "export it with these columns, or give another format",
        )
    values = np.stack([pd.to_numeric(table[name], errors="coerce").to_numpy(np.float64) for name in columns], axis=1)
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        row, column = wrong[0]
        found = repr(table[columns[column]].iloc[row])
        raise InputError(f"{where}, row {row + 1}", f"a finite number as {columns[column]}", found, "correct that row")
    return values
