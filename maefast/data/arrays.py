"""Arrays from files."""

from __future__ import annotations

import numpy as np

from maefast.data.blob import Blob, Where, ending, opened


def load_array(where: Where) -> np.ndarray:
    """What is in a .npy (a file is mapped into memory), or the only array of an .npz. ValueError: it holds none, or
    several."""
    if ending(where) == ".npy" and not isinstance(where, Blob):
        return np.load(where, mmap_mode="r")
    with opened(where) as stream:
        loaded = np.load(stream)
        if isinstance(loaded, np.ndarray):
            return loaded
        if len(loaded.files) != 1:
            raise ValueError(f"one array is wanted, the file holds {', '.join(loaded.files) or 'none'}")
        return loaded[loaded.files[0]]


def load_rows(where: Where, width: int, what: str, count: str) -> np.ndarray:
    """float32 [count, width], finite, at least one row, from a .npy. ValueError: `what` is something else."""
    with opened(where) as stream:
        array = np.load(stream)
    if array.dtype.kind != "f" or array.ndim != 2 or array.shape[1] != width or not len(array):
        raise ValueError(f"a {what} is floating [{count}, {width}], not {array.dtype} {list(array.shape)}")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"the {what} holds values that are not finite")
    return array
