"""IMOD's models: the binary ``.mod``, and the text that ``model2point`` writes and ``point2model`` reads.

Conventions
-----------
- One tomogram in a file; each object of a model is a particle, its points are the picks.
- Coordinates are in voxels of the tomogram. They run from 0 to NX and NY in x and y, so the first voxel's centre is at
  0.5, but from -0.5 in z, where the first slice is at 0 (IMOD's specification, "Model Coordinate Conventions").
- Numbers of the binary file are big-endian, coordinates 32-bit floats: 1e-3 angstrom is kept up to about 2000 voxels.
- The score is each point's "value" (VALUE1 in its contour's general storage), which 3dmod can show as colour.
- The text's columns are ``x y z``, ``contour x y z``, ``object contour x y z``, or the last with the score
  behind, which is this project's own. It names no particles: objects are numbered by the table of particles.

Sources: https://bio3d.colorado.edu/imod/doc/binspec.html, https://bio3d.colorado.edu/imod/doc/man/model2point.html
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from czii25d.errors import InputError
from czii25d.files import write_aside
from czii25d.formats.base import (
    Context,
    TomogramGrid,
    files_for,
    frame_of,
    join,
    locations_of,
    scores_of,
)
from czii25d.geometry import Spacing3D, xyz_angstrom_to_zyx_voxel, zyx_voxel_to_xyz_angstrom

logger = logging.getLogger(__name__)

CENTER_XYZ = np.array([0.5, 0.5, 0.0])  # of the first voxel, in model coordinates
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7")  # after Okabe & Ito
NAME_BYTES = 63  # of an object's 64, the last being 0
UNITS = {1: 1e10, -3: 1e7, -6: 1e4, -9: 10.0, -10: 1.0, -12: 0.01}  # angstroms in what the header's pixel size counts
NANOMETER = -9
Z_FROM_MINUS_HALF, NEW_TO_3DMOD, FLIPPED_YZ = 1 << 10, 1 << 11, 1 << 16  # flags of the model
OPEN_CONTOURS, SCATTERED = 1 << 3, 1 << 9  # flags of an object
VALUE, MINMAX = 10, 11  # types in general storage
FLOAT_VALUE, ONE_POINT, FLOAT_INDEX, NO_INDEX = 1 << 2, 1 << 7, 1, 1 << 4  # and their flags
_HEADER = struct.Struct(">128s3i i I 4i 3f 3f 3i i i f i i 3f")
_OBJECT = struct.Struct(">64s 64x i I i i 3f i 8B i i")
_CONTOUR = struct.Struct(">i I i i")
_MESH = struct.Struct(">i i I h h")
_STORE = np.dtype([("type", ">i2"), ("flags", ">u2"), ("index", ">i4"), ("value", ">f4")])


@dataclass
class _Object:
    name: str
    points: list[NDArray[np.float64]] = field(default_factory=list)  # of each contour, (N, 3) x y z
    values: list[NDArray[np.float64]] = field(default_factory=list)  # of each contour, (N,), NaN where there is none


def read_model(path: Path, context: Context) -> pd.DataFrame:
    """Read a ``.mod`` file, or a folder of ``<run>.mod``; see `czii25d.formats.read_picks`."""
    return join(_read_model_file(file, run, context) for file, run in _files(path, ".mod", context))


def read_text(path: Path, context: Context) -> pd.DataFrame:
    """Read a text file of points, or a folder of ``<run>.txt``; see `czii25d.formats.read_picks`."""
    return join(_read_text_file(file, run, context) for file, run in _files(path, ".txt", context))


def _files(path: Path, suffix: str, context: Context) -> Iterator[tuple[Path, str]]:
    files = sorted(path.glob(f"*{suffix}")) if path.is_dir() else [path]
    if not files:
        raise InputError(path, f"files called <run>{suffix}", "none", "correct the path")
    for file in files:
        yield file, context.run if context.run is not None and file == path else file.stem


def _read_model_file(path: Path, run: str, context: Context) -> pd.DataFrame:
    try:
        objects, spacing = _parse(path.read_bytes(), path)
    except (struct.error, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(path, "a whole IMOD model", f"a cut one ({error})", "copy it again") from None
    spacing = _choose_spacing(path, run, spacing, context)
    frames = []
    for number, item in enumerate(objects, start=1):
        points = np.concatenate([np.empty((0, 3)), *item.points])
        values = np.concatenate([np.empty(0), *item.values])
        particle = context.particle or item.name or context.name_of_class(number, path)
        scored = len(values) > 0 and not np.isnan(values).any()
        frames.append(frame_of(run, particle, _to_angstrom(points, spacing), values if scored else None))
    return join(frames)


def _choose_spacing(path: Path, run: str, stated: Spacing3D | None, context: Context) -> Spacing3D:
    """Return the given voxel spacing, else the model's own."""
    if stated is None or context.has_grid(run):
        given = context.grid(run, path).voxel_spacing
        if stated is not None and not np.allclose(stated, given, rtol=0.01):
            logger.warning("%s: says %s angstrom per voxel (z, y, x), taken as %s, as given", path, stated, given)
        return given
    return stated


def _parse(content: bytes, path: Path) -> tuple[list[_Object], Spacing3D | None]:
    """Return the objects of a binary model, and its voxel spacing where it states one."""
    if content[:8] != b"IMODV1.2":
        found = repr(content[:8])
        raise InputError(path, "an IMOD model (IMODV1.2)", found, "save it with 3dmod, or give its format")
    (_, *_, flags, _, _, _, _, _, _, _, _, _, z_scale, _, _, _, _, _, pixel_size, units, _, _, _, _) = (
        _HEADER.unpack_from(content, 8)
    )
    if flags & FLIPPED_YZ:
        raise InputError(path, "a model in the order x, y, z", "one with y and z flipped", "run imodtrans -Y on it")
    objects: list[_Object] = []
    position = 8 + _HEADER.size
    image_scale = None
    while (kind := content[position : position + 4]) != b"IEOF":
        if len(kind) < 4:
            raise InputError(path, "an IMOD model that ends in IEOF", "its end before", "copy it again; it is cut")
        position += 4
        if kind == b"OBJT":
            objects.append(_Object(_text(_OBJECT.unpack_from(content, position)[0])))
            position += _OBJECT.size
        elif kind == b"CONT":
            count, *_ = _CONTOUR.unpack_from(content, position)
            position += _CONTOUR.size
            points = np.frombuffer(content, ">f4", 3 * count, position).reshape(-1, 3).astype(np.float64)
            objects[-1].points.append(points)
            objects[-1].values.append(np.full(count, np.nan))
            position += points.size * 4
        elif kind == b"MESH":
            vertices, indices, *_ = _MESH.unpack_from(content, position)
            position += _MESH.size + 12 * vertices + 4 * indices
        else:
            (size,) = struct.unpack_from(">i", content, position)
            if size < 0:
                raise InputError(path, "chunks of an IMOD model", f"one of {size} bytes", "copy it again")
            position += 4
            if kind == b"COST":
                _read_values(content[position : position + size], objects[-1].values[-1])
            elif kind == b"MINX":  # of the image the model was last loaded on; its pixel spacing is in angstrom
                image_scale = struct.unpack_from(">3f", content, position + 36)
            position += size
    if image_scale is not None and min(image_scale) > 0 and tuple(image_scale) != (1.0, 1.0, 1.0):
        x, y, z = (float(side) for side in image_scale)
        return objects, (z, y, x)
    if units not in UNITS or not pixel_size > 0:
        return objects, None
    side = float(pixel_size) * UNITS[units]
    return objects, (side * float(z_scale if z_scale > 0 else 1), side, side)


def _read_values(chunk: bytes, values: NDArray[np.float64]) -> None:
    """Put the values of single points into ``values``, ``(N,)``."""
    for item in np.frombuffer(chunk[: len(chunk) // _STORE.itemsize * _STORE.itemsize], _STORE):
        if item["type"] == VALUE and not item["flags"] & NO_INDEX and 0 <= item["index"] < len(values):
            values[item["index"]] = item["value"]


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace").strip()


def _to_angstrom(points_xyz_model: NDArray[np.float64], spacing: Spacing3D) -> NDArray[np.float64]:
    return zyx_voxel_to_xyz_angstrom((points_xyz_model - CENTER_XYZ)[:, ::-1], spacing)


def _to_model(picks: pd.DataFrame, spacing: Spacing3D) -> NDArray[np.float64]:
    return xyz_angstrom_to_zyx_voxel(locations_of(picks), spacing)[:, ::-1] + CENTER_XYZ


def write_model(path: Path, picks: pd.DataFrame, context: Context) -> list[Path]:
    """Write a ``.mod`` file, or ``<run>.mod`` in a folder; see `czii25d.formats.write_picks`."""
    files = []
    for file, own in files_for(path, ".mod", picks):
        content = _model(file, own, context)
        with write_aside(file) as partial:
            partial.write_bytes(content)
        files.append(file)
    return files


def _model(path: Path, picks: pd.DataFrame, context: Context) -> bytes:
    grid = _grid(path, picks, context)
    z, y, x = grid.voxel_spacing
    if abs(y / x - 1) > 1e-3:
        raise InputError(
            path, "one voxel spacing in x and y, as IMOD keeps it", f"{x:g} and {y:g}", "write another format"
        )
    names = list(dict.fromkeys(picks["particle"]))
    d, h, w = grid.shape or (1, 1, 1)
    header = _HEADER.pack(
        *(b"czii25d", w, h, d, len(names), Z_FROM_MINUS_HALF | NEW_TO_3DMOD),
        *(1, 0, 0, 255),  # draw mode, mouse mode, black and white level
        *(0.0, 0.0, 0.0, 1.0, 1.0, z / x),  # offsets, scales
        *(0, -1, -1, 3, 128, x / 10, NANOMETER, 0),  # current object, contour, point; resolution, threshold
        *(0.0, 0.0, 0.0),  # angles
    )
    chunks = [b"IMODV1.2", header]
    for number, name in enumerate(names):
        own = picks[picks["particle"] == name]
        chunks += _object_chunks(path, number, name, own, grid.voxel_spacing, context)
    return b"".join([*chunks, b"IEOF"])


def _object_chunks(
    path: Path, number: int, name: str, picks: pd.DataFrame, spacing: Spacing3D, context: Context
) -> Iterator[bytes]:
    raw = name.encode("utf-8")
    if len(raw) > NAME_BYTES or "\0" in name or name != name.strip():
        raise InputError(path, f"names of at most {NAME_BYTES} bytes", repr(name), "shorten it")
    particle = next((known for known in context.particles or () if known.name == name), None)
    color = particle.color if particle else COLORS[number % len(COLORS)]
    red, green, blue = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
    radius = round(particle.radius / spacing[2]) if particle else 5
    yield b"OBJT"
    yield _OBJECT.pack(raw, 1, OPEN_CONTOURS | SCATTERED, 0, 1, red, green, blue, radius, 1, 3, 1, 1, 0, 0, 0, 0, 0, 0)
    points = _to_model(picks, spacing).astype(">f4")
    yield b"CONT" + _CONTOUR.pack(len(points), 0, 0, 0) + points.tobytes()
    scores = scores_of(picks)
    if scores is None or not len(scores):
        return
    store = np.zeros(len(scores), _STORE)
    store["type"], store["flags"] = VALUE, FLOAT_VALUE | ONE_POINT
    store["index"], store["value"] = np.arange(len(scores)), scores
    yield b"COST" + struct.pack(">i", store.nbytes) + store.tobytes()
    # 3dmod scales its colours by the object's smallest and largest value.
    flags = FLOAT_VALUE | FLOAT_INDEX | NO_INDEX
    yield b"OBST" + struct.pack(">ihHff", 12, MINMAX, flags, scores.min(), scores.max())


def _grid(path: Path, picks: pd.DataFrame, context: Context) -> TomogramGrid:
    if len(picks):
        return context.grid(str(picks["run"].iloc[0]), path)
    return context.grids if isinstance(context.grids, TomogramGrid) else TomogramGrid((1.0, 1.0, 1.0))


def write_text(path: Path, picks: pd.DataFrame, context: Context) -> list[Path]:
    """Write a text file of points, or ``<run>.txt`` in a folder; see `czii25d.formats.write_picks`."""
    names = context.class_names(picks)
    files = []
    for file, own in files_for(path, ".txt", picks):
        points = _to_model(own, _grid(file, own, context).voxel_spacing)
        numbers = [names.index(name) + 1 for name in own["particle"]]
        scores = scores_of(own)
        lines = [
            f"{number:5d} {1:5d} " + " ".join(f"{value:.6f}" for value in point)
            for number, point in zip(numbers, points.tolist(), strict=True)
        ]
        if scores is not None:
            lines = [f"{line} {score:.6f}" for line, score in zip(lines, scores, strict=True)]
        with write_aside(file) as partial:
            partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        files.append(file)
    return files


def _read_text_file(path: Path, run: str, context: Context) -> pd.DataFrame:
    try:
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        widths = {len(row) for row in rows}
        if len(widths - {3, 4, 5, 6}) or len(widths) > 1:
            found = f"{' and '.join(map(str, sorted(widths)))} columns"
            expected = "lines of x y z, contour x y z, or object contour x y z (value)"
            raise InputError(path, expected, found, "write it with model2point -object")
        table = np.array(rows, np.float64).reshape(len(rows), max(widths, default=3))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(path, "numbers", str(error), "write it with model2point -object") from None
    if not np.isfinite(table).all():
        raise InputError(path, "finite numbers", "NaN or infinity", "write it with model2point -object")
    width = table.shape[1]
    if not len(table):
        return join([])
    spacing = context.grid(run, path).voxel_spacing
    first = max(0, min(width, 5) - 3)  # of the coordinates
    locations = _to_angstrom(table[:, first : first + 3], spacing)
    scores = table[:, 5] if width == 6 else None
    objects = table[:, 0].astype(int) if width >= 5 else np.ones(len(table), int)
    picks = frame_of(run, "", locations, scores)
    known = {number: context.name_of_class(number, path) for number in dict.fromkeys(objects.tolist())}
    return picks.assign(particle=[known[number] for number in objects.tolist()])
