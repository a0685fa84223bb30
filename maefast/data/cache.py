"""The folder for what is made once of a user's data: indices of tars, images of Parquet files by row."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path


def cache_path(kind: str, key: str, ending: str) -> Path:
    """A file of its own for each key: below $MAEFAST_CACHE, else in the user's folder for caches."""
    given, home = os.environ.get("MAEFAST_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(given) if given else Path(home).expanduser() / "maefast"
    return folder / kind / (hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:32] + ending)


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make the file beside its place and move it there: no other process sees a part of it. OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
