"""Sequences of embeddings, as a frozen model made them: arrays; thumbnails along ways over photographs as a demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maefast.data.arrays import load_rows
from maefast.data.blob import Where
from maefast.data.collection import DEMO, Collection, Files, Made
from maefast.errors import ConfigError
from maefast.ops import TokenMask, _checks
from maefast.recipe import Batch, Picture

THUMBNAIL = (8, 8, 3)  # of the demo, whose embeddings have as many values
_WAYS = 8  # over each photograph of the demo
_COMPONENTS = 16  # that a picture shows


@dataclass
class EmbeddingBatch(Batch):
    """values: float32 [B, L, D]. lengths: int64 [B], how many embeddings each sequence has, on the host; what lies
    beyond is padding and may hold anything."""

    values: Tensor
    lengths: np.ndarray


@dataclass(frozen=True)
class Embeddings:
    """A recipe wants `EmbeddingBatch`es: sequences of up to `length` L embeddings of `dim` D values.

    `--data` names a folder: each .npy below it is a sequence, floating [n, D]. A training sample is a window of it, of
    a random length from `shortest` to L (LV-MAE draws 10 to 1280 seconds of 5-second segments).
    """

    length: int = 256
    dim: int = 1024
    shortest: int = 2
    unit = "sequence"

    def __post_init__(self) -> None:
        _checks.integer("dim", self.dim, 1)
        _checks.integer("length", self.length, 1)
        _checks.integer("shortest", self.shortest, 1)
        if self.shortest > self.length:
            raise ValueError(f"shortest must be at most the length {self.length}, got {self.shortest}")

    def open(self, options: Any) -> Collection:
        if options.data == DEMO:
            return Collection(self, self._demo(), options)
        return Collection(
            self,
            Files(options.data, (".npy",), partial(read_sequence, dim=self.dim), "sequences (.npy)", options),
            options,
        )

    def check(self, batch: Any) -> None:
        """Raise unless it is a batch of such sequences."""
        if not isinstance(batch, EmbeddingBatch):
            raise TypeError(f"an EmbeddingBatch is wanted, got {type(batch).__name__}")
        _checks.tensor("values", batch.values, ndim=3)
        want, lengths = (self.length, self.dim), batch.lengths
        if tuple(batch.values.shape[1:]) != want:
            raise ValueError(f"values must be [B, {want[0]}, {want[1]}], got {tuple(batch.values.shape)}")
        if not isinstance(lengths, np.ndarray) or lengths.dtype.kind not in "iu":
            raise TypeError(f"lengths must be a numpy array of ints, got {getattr(lengths, 'dtype', type(lengths))}")
        if lengths.shape != (len(batch.values),) or not ((lengths >= 1) & (lengths <= self.length)).all():
            raise ValueError(f"lengths must be {len(batch.values)} numbers in [1, {self.length}], got {lengths}")

    # --- as a `Kind` of samples

    def sample(self, raw: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        count = min(len(raw), int(rng.integers(self.shortest, self.length + 1)))
        start = int(rng.integers(len(raw) - count + 1))
        return raw[start : start + count]

    def example(self, raw: np.ndarray) -> np.ndarray:
        return raw[: self.length]

    def collate(self, samples: Sequence[np.ndarray], key: np.ndarray) -> EmbeddingBatch:
        values = np.zeros((len(samples), self.length, self.dim), np.float32)
        for row, sample in zip(values, samples):
            row[: len(sample)] = sample
        return EmbeddingBatch(torch.from_numpy(values), np.array([len(sample) for sample in samples]), key=key)

    def _demo(self) -> Made:
        from maefast.data.images.files import shipped_photographs

        if self.dim != np.prod(THUMBNAIL):
            raise ConfigError(f"the demo's embeddings have {np.prod(THUMBNAIL)} values, not {self.dim}")
        paths = shipped_photographs()

        @cache
        def make(index: int) -> np.ndarray:
            return thumbnails(paths[index // _WAYS], 2 * self.length, index % _WAYS)

        def label(index: int) -> str:
            return f"{paths[index // _WAYS].stem}, way {index % _WAYS}"

        return Made("thumbnails along ways over photographs", len(paths) * _WAYS, make, label)


def read_sequence(path: Where, dim: int) -> np.ndarray:
    """float32 [n, dim]. ValueError: it is something else."""
    return load_rows(path, dim, "sequence", "n")


def thumbnails(path: Path, steps: int, way: int) -> np.ndarray:
    """What a window sees on a smooth way over a photograph, as 8 x 8 pixels in colour less their mean: float32
    [steps, 192]."""
    from PIL import Image

    rng = np.random.default_rng([way, steps])
    with Image.open(path) as image:
        photo = image.convert("RGB")
        photo.thumbnail((256, 256))
        side = max(8, min(photo.size) // 3)
    turns = 2 + steps // 24
    knots = rng.random((turns, 2)) * (np.array(photo.size) - side)
    at = np.stack([np.interp(np.linspace(0, turns - 1, steps), np.arange(turns), knots[:, i]) for i in (0, 1)], 1)
    seen = [
        np.asarray(photo.resize(THUMBNAIL[1::-1], Image.Resampling.BOX, box=(x, y, x + side, y + side))) for x, y in at
    ]
    values = np.stack(seen).reshape(steps, -1).astype(np.float32) / 255
    return values - values.mean(1, keepdims=True)


def sheet(values: Tensor, pred: Tensor, plan: TokenMask, names: Sequence[str], caption: str) -> Picture:
    """The first principal components of sequences [B, L, D] from top to bottom, segments to the right; what is hidden
    is black, padding white. pred: [M, D], of the masked segments in plan order."""
    from maefast.data.images.pictures import Sheet

    absent, mask, shape = plan.absent[..., None], plan.mask[..., None], values.shape
    true = values.float().masked_fill(absent, 0.0)
    filled = true.flatten(0, 1).index_copy(0, plan.masked.long(), pred.reshape(-1, shape[2]).float()).view(shape)
    rows = true[~plan.absent]
    axes = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:_COMPONENTS]
    spread = ((rows - rows.mean(0)) @ axes[0]).std().clamp_min(1e-6)
    black = torch.zeros((), device=values.device)
    original, filled = (((t - rows.mean(0)) @ axes.T / spread / 4 + 0.5).clamp(0, 1) for t in (true, filled))
    wide, columns = max(1, 128 // shape[1]), []
    for column in (original, original.where(~mask, black), filled.where(mask, black), filled):
        pixels = (255 * column.masked_fill(absent, 1.0)).round().to(torch.uint8)
        columns.append(pixels.transpose(1, 2).repeat_interleave(4, 1).repeat_interleave(wide, 2)[:, None].cpu())
    return Sheet(columns, names, caption)
