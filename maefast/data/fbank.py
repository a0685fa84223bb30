"""Log-mel filter banks as Kaldi computes them, and recordings (.wav) to compute them of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from maefast.data.blob import Where, opened
from maefast.errors import need

WINDOWS = ("hanning", "povey", "hamming", "rectangular")
_FLOOR = float(np.finfo(np.float32).eps)  # energies below it count as it


@dataclass(frozen=True)
class Fbank:
    """Logarithms of mel energies, a frame every `shift` ms, as Kaldi's compute-fbank-feats without dither makes them.

    A frame is `length` ms of the wave that lie wholly within it. Its mean is subtracted, x[i] - preemphasis * x[i-1]
    taken (x[-1] = x[0]), the window applied, zeros added up to a power of two. The power spectrum (without its last
    bin) is summed with triangles that are equal and evenly spaced in mel(f) = 1127 ln(1 + f / 700).

    Args:
        rate: samples a second. mels: filters. window: "hanning", or "povey", which is hanning**0.85, Kaldi's own.
        low, high: Hz, where the first filter begins and the last one ends; a `high` of 0 or less counts from rate / 2.
    """

    rate: int = 32000
    mels: int = 128
    window: str = "hanning"
    length: float = 25.0
    shift: float = 10.0
    preemphasis: float = 0.97
    low: float = 20.0
    high: float = 0.0

    def __post_init__(self) -> None:
        if self.window not in WINDOWS:
            raise ValueError(f"window must be one of {', '.join(WINDOWS)}, got {self.window!r}")
        if self.rate < 1 or self.mels < 1 or self.hop < 1 or self.size < 2:
            raise ValueError(f"rate, mels and a window of two samples are needed, got {self}")
        if not 0 <= self.low < self.top <= self.rate / 2:
            raise ValueError(f"0 <= low < high <= rate / 2 must hold, got {self.low} and {self.top} at {self.rate} Hz")

    @property
    def size(self) -> int:
        """Samples of a frame."""
        return int(self.rate * self.length / 1000)

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        return int(self.rate * self.shift / 1000)

    @property
    def top(self) -> float:
        return self.high if self.high > 0 else self.rate / 2 + self.high

    def frames(self, samples: int) -> int:
        """How many frames a wave of so many samples has."""
        return 0 if samples < self.size else 1 + (samples - self.size) // self.hop

    def samples(self, frames: int) -> int:
        """The shortest wave of so many frames."""
        return self.size + (frames - 1) * self.hop

    def __call__(self, wave: np.ndarray) -> np.ndarray:
        """A wave [S] in [-1, 1] -> float32 [frames, mels]; computed in float64.

        Raises:
            ValueError: not one dimension, or shorter than a frame.
        """
        wave = np.asarray(wave, dtype=np.float64)
        if wave.ndim != 1 or len(wave) < self.size:
            raise ValueError(f"a wave of at least {self.size} samples is needed, got shape {list(wave.shape)}")
        frames = np.lib.stride_tricks.sliding_window_view(wave, self.size)[:: self.hop]
        frames = frames - frames.mean(1, keepdims=True)
        frames[:, 1:] -= self.preemphasis * frames[:, :-1]  # the right side is a copy, so of what was there before
        frames[:, 0] -= self.preemphasis * frames[:, 0]
        window, filters = _tables(self)
        spectrum = np.fft.rfft(frames * window, 2 * filters.shape[1])[:, :-1]
        energy = (spectrum.real**2 + spectrum.imag**2) @ filters.T
        return np.log(np.maximum(energy, _FLOOR)).astype(np.float32)


def mel(hertz: np.ndarray | float) -> np.ndarray:
    return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)


@lru_cache(maxsize=8)
def _tables(bank: Fbank) -> tuple[np.ndarray, np.ndarray]:
    """The window [size] and the filters [mels, half of the next power of two]."""
    half = 1 << (bank.size - 1).bit_length() - 1
    turn = 2 * np.pi * np.arange(bank.size) / (bank.size - 1)
    hanning = 0.5 - 0.5 * np.cos(turn)
    window = {
        "hanning": hanning,
        "povey": hanning**0.85,
        "hamming": 0.54 - 0.46 * np.cos(turn),
        "rectangular": np.ones(bank.size),
    }[bank.window]
    edges = np.linspace(mel(bank.low), mel(bank.top), bank.mels + 2)
    at, width = mel(np.arange(half) * bank.rate / (2 * half)), edges[1] - edges[0]
    rise, fall = (at - edges[:-2, None]) / width, (edges[2:, None] - at) / width
    return window, np.maximum(0.0, np.minimum(rise, fall))


def read_wave(where: Where, rate: int) -> np.ndarray:
    """A .wav file as float32 [S] in [-1, 1] at `rate` samples a second: the mean of its channels, resampled by a
    polyphase filter. ValueError: it is no such file, or empty."""
    try:
        from scipy.io import wavfile
        from scipy.signal import resample_poly
    except ImportError as error:
        raise need("scipy", "reading recordings") from error
    with opened(where) as file:
        found, wave = wavfile.read(file)
    if wave.size == 0:
        raise ValueError("the recording is empty")
    if wave.dtype.kind == "u":  # 8 bits without a sign
        wave = (wave.astype(np.float32) - 128) / 128
    elif wave.dtype.kind == "i":
        wave = wave / np.float32(-float(np.iinfo(wave.dtype).min))
    wave = wave.astype(np.float32).reshape(len(wave), -1).mean(1)
    if not np.isfinite(wave).all():
        raise ValueError("the recording holds values that are not finite")
    if found != rate:
        common = np.gcd(found, rate)
        wave = resample_poly(wave, rate // common, found // common).astype(np.float32)
    return wave
