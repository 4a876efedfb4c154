"""A page of HTML that holds its pictures: what 23 fills in."""

from __future__ import annotations

import base64
import re
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from czii25d.particles import ParticleSet
from czii25d.pipeline.cli import installed_version
from czii25d.plotting import DARK, LIGHT, outline

TEMPLATE = "report.html.jinja"


def render(values: Mapping[str, Any]) -> str:
    """Fill in the page; whatever a file or a run is called, it stays text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return environment.get_template(TEMPLATE).render(values, made=made, version=installed_version())


@dataclass(frozen=True)
class Page:
    """Where a page goes, and the function that draws its pictures and returns what the template takes."""

    folder: Path
    build: Callable[[Album], dict[str, Any]]


@dataclass(frozen=True)
class Picture:
    """A picture as the page holds it: ``data:`` addresses for light and, if it differs, dark paper."""

    light: str
    dark: str | None
    alt: str
    caption: str
    width: int
    height: int


@dataclass(frozen=True)
class Album:
    """The folder of the pictures."""

    folder: Path

    def keep(self, name: str, draw: Callable[[Path], Any], alt: str, caption: str, suffix: str = "") -> Picture:
        """Draw a picture that suits any paper, in a file called by ``name`` as far as files may be."""
        path = self.folder / f"{_file_name(name)}{suffix}.png"
        draw(path)
        content = path.read_bytes()
        width, height = struct.unpack(">II", content[16:24])  # a PNG's header
        return Picture(_data(content), None, alt, caption, width, height)

    def keep_both(self, name: str, draw: Callable[[Path, Mapping[str, Any]], Any], alt: str, caption: str) -> Picture:
        """Draw a picture for light paper and for dark."""
        light = self.keep(name, lambda path: draw(path, LIGHT), alt, caption)
        dark = self.keep(name, lambda path: draw(path, DARK), alt, caption, "_dark")
        return replace(light, dark=dark.light)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)[:100].lstrip(".")


def _data(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names the rows."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    total: bool = False


def page_values(
    particles: ParticleSet | None, title: str, note: str | None, tiles: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Return what the template takes for any page; ``tiles`` are numbers and what they are."""
    symbols = {
        particle.name: {"color": particle.color, "path": _svg_path(outline(channel))}
        for channel, particle in enumerate(particles or ())
    }
    return {"title": title, "note": note, "tiles": tiles, "symbols": symbols, "training": None, "picks": None}


def _svg_path(corners: NDArray[np.float64]) -> str:
    return "M" + "L".join(f"{x:.2f},{y:.2f}" for x, y in corners) + "Z"


def plural(count: int, what: str) -> str:
    """Return ``1 run``, ``2 runs``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
