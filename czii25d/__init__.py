"""Find protein particles in cryo-electron tomograms and say what each one is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# pandas loads pyarrow where it is there, as with starfile, and pyarrow starts a thread of an allocator that we do not
# use. It has ended processes by a segmentation fault (https://github.com/apache/arrow/issues/44342).
os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")

if TYPE_CHECKING:
    from czii25d.metrics import score
    from czii25d.models import create_model
    from czii25d.models.checkpoint import load_model
    from czii25d.picker import Picker

__all__ = ["Picker", "create_model", "load_model", "score"]

_HOME = {
    "Picker": "czii25d.picker",
    "create_model": "czii25d.models",
    "load_model": "czii25d.models.checkpoint",
    "score": "czii25d.metrics",
}


def __getattr__(name: str) -> Any:
    """Import public names when they are first used: preparing data needs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'czii25d' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
