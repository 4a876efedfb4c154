"""What is looked for: names, radii, score weights and colours of particles."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, overload

import yaml

from czii25d.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Particle:
    """One kind of particle.

    Parameters
    ----------
    name
        As in the pick files, e.g. ``"apo-ferritin"``.
    radius
        Angstrom. A pick is a hit within half of it.
    weight
        In the score; 0 leaves the particle out of it.
    color
        ``"#RRGGBB"``, for pictures.
    """

    name: str
    radius: float
    weight: float = 1.0
    color: str = "#0072B2"

    def __post_init__(self) -> None:
        if not self.name or not isinstance(self.name, str):
            raise InputError("particles", "a name for each particle", repr(self.name), "name it as its pick file")
        if not (math.isfinite(self.radius) and self.radius > 0):
            raise InputError(
                f"particle {self.name}",
                "a radius above 0 angstrom",
                repr(self.radius),
                "set it to the particle's",
            )
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise InputError(f"particle {self.name}", "a weight of at least 0", repr(self.weight), "raise it")
        if not re.fullmatch(r"#[0-9A-Fa-f]{6}", str(self.color)):
            raise InputError(f"particle {self.name}", "a color like '#0072B2'", repr(self.color), "correct it")


class ParticleSet(Sequence[Particle]):
    """An ordered, named set of particles; a particle's position is its channel in every heatmap."""

    def __init__(self, particles: Iterable[Particle]) -> None:
        self._particles = tuple(particles)
        if not self._particles:
            raise InputError("particles", "at least one", "none", "list what is looked for")
        if len(set(self.names)) != len(self.names):
            twice = sorted({name for name in self.names if self.names.count(name) > 1})
            raise InputError("particles", "each name once", f"{twice} twice", "remove the repetition")

    @property
    def names(self) -> tuple[str, ...]:
        """Names in channel order."""
        return tuple(particle.name for particle in self._particles)

    @property
    def radii(self) -> tuple[float, ...]:
        """Radii in angstrom, in channel order."""
        return tuple(particle.radius for particle in self._particles)

    @overload
    def __getitem__(self, index: int) -> Particle: ...
    @overload
    def __getitem__(self, index: slice) -> ParticleSet: ...
    def __getitem__(self, index: int | slice) -> Particle | ParticleSet:
        if isinstance(index, slice):
            return ParticleSet(self._particles[index])
        return self._particles[index]

    def __len__(self) -> int:
        return len(self._particles)

    def __iter__(self) -> Iterator[Particle]:
        return iter(self._particles)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ParticleSet) and self._particles == other._particles

    def __hash__(self) -> int:
        return hash(self._particles)

    def __repr__(self) -> str:
        return f"ParticleSet({', '.join(self.names)})"

    def channel(self, name: str) -> int:
        """Return the channel of the particle called ``name``; an unknown name raises ``InputError``."""
        if name not in self.names:
            raise InputError(
                f"particle '{name}'{did_you_mean(name, self.names)}",
                f"one of {', '.join(self.names)}",
                repr(name),
                "correct the name or add the particle to the table (particles=...)",
            )
        return self.names.index(name)

    def first(self, class_num: int | None) -> ParticleSet:
        """Return the first ``class_num`` particles, as the published key does; all for ``None``."""
        if class_num is None:
            return self
        if not isinstance(class_num, int) or not 1 <= class_num <= len(self):
            raise InputError(
                "class_num",
                f"1 to {len(self)} ({', '.join(self.names)})",
                str(class_num),
                "lower it or add particles",
            )
        return self[:class_num]

    def to_config(self) -> dict[str, dict[str, Any]]:
        """Return plain dictionaries by name, for checkpoints, JSON and YAML."""
        table = {particle.name: asdict(particle) for particle in self}
        for fields in table.values():
            del fields["name"]
        return table

    @classmethod
    def from_config(cls, table: Mapping[str, Mapping[str, Any]], where: object = "particles") -> ParticleSet:
        """Build a set from fields by name, ``{"ribosome": {"radius": 150.0}}``; ``where`` is their origin."""
        particles = []
        for name, fields in table.items():
            known = ("radius", "weight", "color")
            if not isinstance(fields, Mapping) or set(fields) - set(known) or "radius" not in fields:
                raise InputError(
                    f"{where}: {name}",
                    f"radius and optionally {known[1:]}",
                    repr(fields),
                    "correct that particle",
                )
            try:
                numbers = {key: float(fields[key]) for key in ("radius", "weight") if key in fields}
            except (TypeError, ValueError):
                raise InputError(
                    f"{where}: {name}", "numbers for radius and weight", repr(fields), "correct that particle"
                ) from None
            particles.append(Particle(name, **{**fields, **numbers}))
        return cls(particles)


def conf_dir() -> Path:
    """Return the folder of configuration files: inside an installed package, beside it in a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "conf"


def load_particles(path: Path | None = None) -> ParticleSet:
    """Read a table of particles; the CZII six by default.

    Parameters
    ----------
    path
        YAML, as ``conf/particles/czii.yaml``; or a copick project's JSON configuration, of whose ``pickable_objects``
        those that are particles are taken, in their order (segmentations of membranes and the like are none).

    Raises
    ------
    InputError
        If the file cannot be read, or a particle has no radius.
    """
    return _read_table(path) if path else _czii()


@cache
def _czii() -> ParticleSet:
    return _read_table(conf_dir() / "particles" / "czii.yaml")


def _read_table(path: Path) -> ParticleSet:
    try:
        table = yaml.safe_load(path.read_text())  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        found = "nothing there" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        raise InputError(path, "a table of particles, YAML or a copick configuration", found, "correct it") from None
    if isinstance(table, Mapping) and "pickable_objects" in table:
        table = _of_copick(table["pickable_objects"], path)
    if not isinstance(table, Mapping):
        raise InputError(path, "particles by name, e.g. `ribosome: {radius: 150}`", type(table).__name__, "write it so")
    return ParticleSet.from_config(table, where=path)


def _of_copick(objects: Any, path: Path) -> dict[str, dict[str, Any]]:
    """Return the table of a copick configuration's particles; radii are angstrom there too, colours RGBA bytes."""
    table: dict[str, dict[str, Any]] = {}
    for each in objects if isinstance(objects, list) else [None]:
        if not isinstance(each, Mapping) or not isinstance(each.get("name"), str):
            raise InputError(path, "pickable_objects, each with a name", repr(each), "correct the copick configuration")
        if not each.get("is_particle", True):
            continue
        if each.get("radius") is None:
            raise InputError(f"{path}: {each['name']}", "a radius in angstrom", "none", "add it to the object")
        if each["name"] in table:
            raise InputError(path, "each name once", f"'{each['name']}' twice", "remove the repetition")
        table[each["name"]] = {"radius": each["radius"]}
        if color := each.get("color"):
            table[each["name"]]["color"] = "#" + "".join(f"{int(channel):02X}" for channel in color[:3])
    return table
