"""The table that says which part of which tomogram is used: ``regions.yaml``.

By run, or ``others`` for those that are not named, any of these; what is absent does not limit:

```yaml
TS_1: {y: [0, 4014.08]}                                  # ranges of x, y, z in angstrom; null: no end
TS_2: {polygon: [[500, 400], [5200, 900], [3100, 5600]], z: [300, 1500]}   # corners x, y in angstrom
TS_3: {mask: masks/TS_3.mrc, margin: 100}                # not 0: used. margin: angstrom left out at borders and faces
others: {margin: 50, avoid: membranes/TS_4.mrc, avoid_distance: 80}        # no picks in, or that near to, a structure
```

JSON, which is YAML too, does as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from czii25d.data.tomogram import describe_source, load_npy, open_tomogram, wrap_array
from czii25d.errors import InputError, did_you_mean
from czii25d.geometry import Shape3D, Spacing3D
from czii25d.regions import AXES, Region, Selection

OTHER_RUNS = "others"
LIMITS = (*AXES, "polygon", "mask")  # what chooses voxels; the other keys only drop picks
KEYS = (*LIMITS, "margin", "avoid", "avoid_distance")
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class RegionTable:
    """The regions of runs, not yet laid over a tomogram.

    Parameters
    ----------
    entries
        By run, or ``others``; checked by `read_regions`.
    where
        The file, for messages.
    folder
        Where relative paths start.
    """

    entries: Mapping[str, Entry]
    where: str = "regions"
    folder: Path = Path()

    def entry(self, run: str) -> Entry | None:
        """Return what is said of a run; ``None``: it is used whole."""
        return self.entries.get(run, self.entries.get(OTHER_RUNS)) or None

    def limits(self, run: str) -> dict[str, Any]:
        """Return all that tells a run's region from another, in terms of JSON; empty: the whole tomogram."""
        found = {key: value for key, value in (self.entry(run) or {}).items() if key in LIMITS}
        if "mask" in found:
            found["mask"] = describe_source(_open_mask(self.folder / found["mask"], (1.0, 1.0, 1.0)))
        return found

    def select(self, run: str, shape: Shape3D, voxel_spacing: Spacing3D) -> Selection | None:
        """Return what is used of a tomogram; ``None``: all of it.

        Parameters
        ----------
        shape
            ``(D, H, W)``.
        voxel_spacing
            Angstrom per voxel along z, y, x.

        Raises
        ------
        InputError
            If a mask cannot be read or is of another shape, or nothing of the tomogram is left.
        """
        entry = self.entry(run)
        if entry is None:
            return None
        where = f"{self.where}: {run}"
        masks = {key: self._mask(entry[key], voxel_spacing) for key in ("mask", "avoid") if key in entry}
        ranges = {axis: tuple(entry[axis]) for axis in AXES if axis in entry}
        region = Region.of(shape, voxel_spacing, ranges, entry.get("polygon"), masks.get("mask"), where)
        margin = float(entry.get("margin", 0))
        if 2 * margin >= min(size * side for size, side in zip(shape, voxel_spacing, strict=True)):
            sides = " x ".join(f"{size * side:.0f}" for size, side in zip(shape, voxel_spacing, strict=True))
            expected = f"less than half of the tomogram, {sides} angstrom (z, y, x)"
            raise InputError(f"{where}: margin", expected, f"{margin:g}", "lower it")
        avoid = None
        if "avoid" in masks:
            avoid = Region.of(shape, voxel_spacing, mask=masks["avoid"], where=f"{where}: avoid")
        return Selection(region, margin, avoid, float(entry.get("avoid_distance", 0)))

    def _mask(self, given: Any, voxel_spacing: Spacing3D) -> NDArray[Any]:
        if isinstance(given, np.ndarray):
            return given
        array = _open_mask(self.folder / given, voxel_spacing).array
        # A Zarr would decode whole chunks for every box that is looked at.
        return array if isinstance(array, np.ndarray) else np.asarray(array[...]) != 0


def read_regions(given: Path | str | Mapping[str, Any] | None) -> RegionTable:
    """Read a table of regions, a YAML or JSON file, or take it as a dictionary; ``None``: every run is used whole.

    Raises
    ------
    InputError
        If it cannot be read, or an entry is not right.
    """
    if given is None:
        return RegionTable({})
    content: Any
    if isinstance(given, Mapping):
        content, where, folder = given, "key regions", Path()
    else:
        path = Path(given)
        where, folder = str(path), path.parent
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(path, "a table of regions", error.strerror or str(error), "correct the path") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(path, "YAML or JSON", f"{type(error).__name__}: {error}", "correct it") from None
    if not isinstance(content, Mapping) or not content:
        raise InputError(where, "regions by run", f"{type(content).__name__}", "write RUN: {y: [0, 4000]}")
    entries = {str(run): check_entry(entry, f"{where}: {run}") for run, entry in content.items()}
    return RegionTable(entries, where, folder)


def check_entry(entry: Any, where: str) -> Entry:
    """Return what is said of one run, once it has been checked; see the module."""
    if not isinstance(entry, Mapping):
        raise InputError(where, f"some of {', '.join(KEYS)}", repr(entry), "write RUN: {y: [0, 4000]}")
    for key, value in entry.items():
        if key not in KEYS:
            found = f"'{key}'{did_you_mean(str(key), KEYS)}"
            raise InputError(where, f"some of {', '.join(KEYS)}", found, "correct it")
        wanted, is_right = _EXPECTED[key]
        if not is_right(value):
            raise InputError(f"{where}: {key}", wanted, repr(value), "correct it")
    if "avoid_distance" in entry and "avoid" not in entry:
        raise InputError(where, "avoid, a mask of the structure", "avoid_distance alone", "add it")
    return entry


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_range(value: Any) -> bool:
    ends = list(value) if isinstance(value, list | tuple) else []
    return len(ends) == 2 and all(end is None or _is_number(end) for end in ends)


def _is_polygon(value: Any) -> bool:
    corners = list(value) if isinstance(value, list | tuple) else []
    return len(corners) >= 3 and all(
        isinstance(corner, list | tuple) and len(corner) == 2 and all(map(_is_number, corner)) for corner in corners
    )


def _is_mask(value: Any) -> bool:
    return (isinstance(value, str | Path) and bool(str(value))) or (isinstance(value, np.ndarray) and value.ndim == 3)


def _is_distance(value: Any) -> bool:
    return _is_number(value) and value >= 0


_EXPECTED = {
    **dict.fromkeys(AXES, ("two numbers in angstrom, or null for no end", _is_range)),
    "polygon": ("at least three corners [x, y] in angstrom", _is_polygon),
    **dict.fromkeys(("mask", "avoid"), ("the file of a mask", _is_mask)),
    **dict.fromkeys(("margin", "avoid_distance"), ("angstrom, at least 0", _is_distance)),
}


def _open_mask(path: Path, voxel_spacing: Spacing3D) -> Any:
    """Open a mask; its voxels are the tomogram's, whatever its header says."""
    if path.suffix.lower() == ".npy" and path.is_file():
        array = load_npy(path)
        return wrap_array(array.view(np.uint8) if array.dtype == bool else array, voxel_spacing, str(path))
    return open_tomogram(path, voxel_spacing)
