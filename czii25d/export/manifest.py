"""The JSON beside an ONNX file or engine: what it came from and how its heatmaps are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from czii25d.errors import InputError
from czii25d.files import write_aside
from czii25d.geometry import Shape3D
from czii25d.models.checkpoint import ModelCard

FORMAT_VERSION = 1
_CURE = "export it again with export_trt.py"


@dataclass(frozen=True)
class Manifest:
    """What an exported network is.

    Parameters
    ----------
    card
        How its heatmaps are read: particles in channel order, thresholds, coordinate offset, normalisation, ...
    sources
        Of each network inside: ``checkpoint`` (its file's name), ``sha256`` and ``weight`` in the mean.
    tile_shape
        ``(D, H, W)``.
    precision
        In which it computes: ``fp32``, ``fp16`` or ``bf16``.
    batch
        Smallest, likeliest and largest number of tiles at once; ``None``: any.
    largest_error
        Of its heatmaps beside those of torch in float32, as a share of their range, by kind of tile and runtime.
    versions
        Of the libraries that made it.
    gpu
        An engine's: the GPU it was built on and for.
    options
        An engine's: how it was built.
    """

    card: ModelCard
    sources: list[dict[str, Any]]
    tile_shape: Shape3D
    precision: str
    batch: tuple[int, int, int] | None = None
    largest_error: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    gpu: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def manifest_path(path: Path | str) -> Path:
    """Return where the manifest of a file lies."""
    return Path(f"{path}.json")


def write_manifest(path: Path | str, manifest: Manifest) -> None:
    """Write the manifest beside the file ``path``, bound to its content by a hash."""
    content = {
        "format_version": FORMAT_VERSION,
        "file": Path(path).name,
        "sha256": content_hash(path),
        **asdict(manifest),
        "card": manifest.card.to_dict(),
    }
    with write_aside(manifest_path(path)) as partial:
        partial.write_text(json.dumps(content, indent=2))


def read_manifest(path: Path | str) -> Manifest:
    """Read the manifest of the file ``path``.

    Raises
    ------
    InputError
        If the file or its manifest is missing, or the two do not belong together.
    """
    path, beside = Path(path), manifest_path(path)
    if not path.is_file():
        raise InputError(path, "a file", "none", "correct the path")
    try:
        content = json.loads(beside.read_text())
    except FileNotFoundError:
        raise InputError(beside, f"what export_trt.py wrote beside {path.name}", "no file", "copy it too") from None
    except ValueError as error:
        raise InputError(beside, "the JSON that export_trt.py wrote", f"malformed JSON ({error})", _CURE) from None
    if not isinstance(content, Mapping) or content.get("format_version") != FORMAT_VERSION:
        found = repr(content.get("format_version")) if isinstance(content, Mapping) else "no JSON object"
        raise InputError(beside, f"a manifest of format version {FORMAT_VERSION}", found, _CURE)
    if content.get("sha256") != content_hash(path):
        raise InputError(beside, f"the manifest of {path.name} as it is", "that of another file", "copy both again")
    try:
        values = {item.name: content[item.name] for item in fields(Manifest)}
        d, h, w = values["tile_shape"]
        batch = values["batch"]
        card = ModelCard.from_dict(values["card"], beside)
        return Manifest(**{**values, "card": card, "tile_shape": (d, h, w), "batch": batch and tuple(batch)})
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(beside, "a whole manifest", f"{type(error).__name__}: {error}", _CURE) from None


def content_hash(path: Path | str) -> str:
    """Return the SHA-256 of a file of any size."""
    sha = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            sha.update(block)
    return sha.hexdigest()
