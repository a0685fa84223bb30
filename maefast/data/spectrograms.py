"""Spectrograms of recordings: log-mel filter banks of .wav files, arrays of them, and synthesised song as a demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maefast.data import songs
from maefast.data.arrays import load_rows
from maefast.data.blob import Where, ending
from maefast.data.collection import DEMO, Collection, Files, Made
from maefast.data.fbank import Fbank, read_wave
from maefast.nn.patches import Reconstruction
from maefast.ops import _checks
from maefast.recipe import Batch, Picture

PADDINGS = ("clip", "batch")
_SONGS = 256  # of the demo


@dataclass
class SpectrogramBatch(Batch):
    """spectrograms: float32 [B, 1, T, mels], logarithms of mel energies."""

    spectrograms: Tensor


@dataclass(frozen=True)
class Spectrograms:
    """A recipe wants `SpectrogramBatch`es: `frames` T of `bank.mels` filters, of clips of `seconds`.

    `--data` names a folder: each .wav below it is a recording, of any rate and number of channels, and each .npy a
    spectrogram, floating [frames, mels]. A training sample is a window of it. Those of recordings are filled with zeros
    up to `seconds`, rolled in time by a random amount, made louder or softer by a factor of Beta(10, 10) + 0.5, and go
    through `bank`, as in Bird-MAE.

    Args:
        padding: which minimum fills the frames that a sample lacks: that of the "clip", or of the whole "batch", as
            Bird-MAE does, where samples depend on those beside them and so on the number of processes.
        roll: training samples of recordings are rolled in time.

    Raises:
        ValueError: a clip has more frames than T, or none; unknown padding.
    """

    frames: int = 512
    bank: Fbank = field(default_factory=Fbank)
    seconds: float = 5.0
    padding: str = "clip"
    roll: bool = True
    unit = "recording"

    def __post_init__(self) -> None:
        _checks.one_of("padding", self.padding, PADDINGS)
        found = self.bank.frames(self.samples)
        if not 1 <= found <= self.frames:
            raise ValueError(f"{self.seconds} seconds are {found} frames, which must lie in [1, {self.frames}]")

    @property
    def samples(self) -> int:
        """Values of the wave of a clip."""
        return int(self.bank.rate * self.seconds)

    def open(self, options: Any) -> Collection:
        if options.data == DEMO:
            return Collection(self, self._demo(), options)
        read = partial(read_recording, rate=self.bank.rate, mels=self.bank.mels)
        return Collection(self, Files(options.data, (".wav", ".npy"), read, "recordings", options), options)

    def check(self, batch: Any) -> None:
        """Raise unless it is a batch of such spectrograms."""
        if not isinstance(batch, SpectrogramBatch):
            raise TypeError(f"a SpectrogramBatch is wanted, got {type(batch).__name__}")
        _checks.tensor("spectrograms", batch.spectrograms, ndim=4)
        want, found = (1, self.frames, self.bank.mels), tuple(batch.spectrograms.shape)
        if found[1:] != want:
            raise ValueError(f"spectrograms must be [B, {', '.join(map(str, want))}], got {found}")

    # --- as a `Kind` of samples

    def sample(self, raw: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """float32 [up to T, mels]."""
        if raw.ndim == 2:
            return self._window(raw, self.frames, rng.random())
        wave = self._clip(raw, rng.random())
        if self.roll:
            wave = np.roll(wave, rng.integers(self.samples))
        return self.bank(wave * (rng.beta(10, 10) + 0.5))

    def example(self, raw: np.ndarray) -> np.ndarray:
        return self._window(raw, self.frames, 0.5) if raw.ndim == 2 else self.bank(self._clip(raw, 0.5))

    def collate(self, samples: Sequence[np.ndarray], key: np.ndarray) -> SpectrogramBatch:
        out = np.empty((len(samples), 1, self.frames, self.bank.mels), np.float32)
        least = [sample.min() for sample in samples]
        if self.padding == "batch":
            least = [min(least)] * len(least)
        for row, sample, fill in zip(out[:, 0], samples, least):
            row[: len(sample)], row[len(sample) :] = sample, fill
        return SpectrogramBatch(torch.from_numpy(out), key=key)

    def _clip(self, wave: np.ndarray, where: float) -> np.ndarray:
        """A window of a recording, filled with zeros, without its mean."""
        wave = self._window(wave, self.samples, where)
        wave = np.pad(wave, (0, self.samples - len(wave)))
        return wave - wave.mean()

    @staticmethod
    def _window(raw: np.ndarray, length: int, where: float) -> np.ndarray:
        start = int(where * max(0, len(raw) - length + 1))
        return raw[start : start + length]

    def _demo(self) -> Made:
        make = lru_cache(maxsize=_SONGS)(partial(songs.song, samples=self.samples * 3 // 2, rate=self.bank.rate))
        return Made("synthesised song", _SONGS, make, lambda index: f"{songs.kind(index)} {index}")


def read_recording(path: Where, rate: int, mels: int) -> np.ndarray:
    """A .wav as a wave [samples], see `read_wave`, or a .npy as a spectrogram [frames, mels]. ValueError: neither."""
    if ending(path) == ".wav":
        return read_wave(path, rate)
    return load_rows(path, mels, "spectrogram", "frames")


def sheet(shown: Reconstruction, names: Sequence[str], caption: str) -> Picture:
    """Spectrograms [B, 1, T, mels], time to the right and low frequencies at the bottom, in greys from the least to the
    greatest value of each original. What is hidden is one grey."""
    from maefast.data.images.pictures import HIDDEN, Sheet

    low, high = torch.aminmax(shown.original.flatten(1), dim=1)
    low, span = (t.view(-1, 1, 1, 1) for t in (low, (high - low).clamp_min(1e-6)))
    grey = low + HIDDEN * span
    masked = shown.original.where(~shown.mask, grey)
    rebuilt = shown.reconstruction.where(shown.mask, grey)
    columns = [
        (255 * (column - low) / span).round().clamp(0, 255).to(torch.uint8).transpose(2, 3).flip(2).cpu().contiguous()
        for column in (shown.original, masked, rebuilt, shown.pasted)
    ]
    return Sheet(columns, names, caption)
