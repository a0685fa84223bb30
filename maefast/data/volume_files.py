"""Files of volumes: .npy, .npz, TIFF, and NIfTI where nibabel is installed."""

from __future__ import annotations

import gzip

import numpy as np

from maefast.data.arrays import load_array
from maefast.data.blob import Blob, Where, ending, opened
from maefast.errors import TrainError, need

ENDINGS = (".npy", ".npz", ".tif", ".tiff", ".nii", ".gz")  # the last one of .nii.gz


def read_volume(where: Where, channels: int = 1) -> np.ndarray:
    """Numbers [C, depth, height, width], as they are stored. Arrays are mapped into memory where they can be.

    Args:
        channels: C. Arrays are [C, depth, height, width] or [depth, height, width, C] (the former, if both would do),
            and so are the axes of a TIFF; without the axis of channels where there is one. NIfTI is turned to its
            closest canonical orientation, and its axes are (z, y, x) then, those of channels behind them first.

    Raises:
        ValueError: it is something else; says what it is. TrainError: the package that reads it is missing.
    """
    kind = ending(where)
    try:
        if kind in (".npy", ".npz"):
            return channels_first(load_array(where), channels)
        if kind in (".tif", ".tiff"):
            return channels_first(_tiff(where), channels)
        if kind == ".nii" or str(where).lower().endswith(".nii.gz"):
            return channels_first(_nifti(where), channels)
    except (ValueError, OSError, MemoryError, TrainError):
        raise
    except Exception as error:  # decoders have errors of their own
        raise ValueError(f"{type(error).__name__}: {error}") from error
    raise ValueError(f"a volume is a file that ends in .npy, .npz, .tif, .nii or .nii.gz, not in {kind or 'nothing'}")


def channels_first(array: np.ndarray, channels: int) -> np.ndarray:
    """A view [channels, depth, height, width]. ValueError: it is something else."""
    if array.dtype.kind in "fiu" and 0 not in array.shape:
        if array.ndim == 3 and channels == 1:
            return array[None]
        if array.ndim == 4 and array.shape[0] == channels:
            return array
        if array.ndim == 4 and array.shape[3] == channels:
            return array.transpose(3, 0, 1, 2)
    raise ValueError(
        f"a volume is numbers [{channels}, depth, height, width] or [depth, height, width, {channels}], not "
        f"{array.dtype} {list(array.shape)}"
    )


def _tiff(where: Where) -> np.ndarray:
    try:
        import tifffile
    except ImportError as error:
        raise need("tifffile", "Reading TIFFs of volumes", "data") from error
    with opened(where) as file, tifffile.TiffFile(file) as tiff:
        if not tiff.series:
            raise ValueError("a TIFF without an image")
        return tiff.series[0].asarray()


def _nifti(where: Where) -> np.ndarray:
    try:
        import nibabel
    except ImportError as error:
        raise TrainError("Reading NIfTI needs the package 'nibabel': pip install nibabel") from error
    if isinstance(where, Blob):
        data = where.read()
        image = nibabel.Nifti1Image.from_bytes(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    else:
        image = nibabel.load(where)
    array = np.asanyarray(nibabel.as_closest_canonical(image).dataobj)
    return array.T  # (x, y, z[, C]) -> ([C,] z, y, x)
