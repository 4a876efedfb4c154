"""Write files and folders whole or not at all."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def write_aside(path: Path | str) -> Iterator[Path]:
    """Yield a hidden sibling of ``path`` to write to; rename it into place when the block ends well.

    The block may create a file or a folder. When it raises, what it wrote is removed and whatever stood at
    ``path`` before is untouched. A partial left by a killed process is removed at the next attempt.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    _remove(partial)
    if old.exists() and not path.exists():  # killed between the two renames below
        old.rename(path)
    _remove(old)
    try:
        yield partial
        if path.exists() and (path.is_dir() or partial.is_dir()):  # a folder cannot be renamed over another
            path.rename(old)
            partial.rename(path)
            _remove(old)
        else:
            partial.replace(path)
    except BaseException:
        _remove(partial)
        raise
