"""The folder for what is made once of a user's data: indices of tars, images of Parquet files by row."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def cache_path(kind: str, key: str, ending: str) -> Path:
    """A file of its own for each key: below $MAEFAST_CACHE, else in the user's folder for caches."""
    given, home = os.environ.get("MAEFAST_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(given) if given else Path(home).expanduser() / "maefast"
    return folder / kind / (hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:32] + ending)
