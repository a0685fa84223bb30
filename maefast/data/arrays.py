"""Arrays from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def load_array(path: Path) -> np.ndarray:
    """What is in a .npy, mapped into memory, or the only array of an .npz. ValueError: it holds none, or several."""
    if path.suffix.lower() == ".npy":
        return np.load(path, mmap_mode="r")
    with np.load(path) as file:
        if len(file.files) != 1:
            raise ValueError(f"one array is wanted, the file holds {', '.join(file.files) or 'none'}")
        return file[file.files[0]]


def load_rows(path: Path, width: int, what: str, count: str) -> np.ndarray:
    """float32 [count, width], finite, at least one row, from a .npy. ValueError: `what` is something else."""
    array = np.load(path)
    if array.dtype.kind != "f" or array.ndim != 2 or array.shape[1] != width or not len(array):
        raise ValueError(f"a {what} is floating [{count}, {width}], not {array.dtype} {list(array.shape)}")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"the {what} holds values that are not finite")
    return array
