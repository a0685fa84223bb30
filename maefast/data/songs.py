"""Synthesised bird song, as a demo of recordings."""

from __future__ import annotations

import numpy as np

KINDS = ("sweep", "trill", "warble", "buzz")


def song(index: int, samples: int, rate: int) -> np.ndarray:
    """A wave, float32 [samples] in [-1, 1], another one for each index and the same one every time: calls of one kind
    (`kind`), each with its overtones, over a noise that falls with the frequency."""
    rng = np.random.default_rng([index, 1])
    wave = 0.003 * _pink(rng, samples)
    at = int(rng.uniform(0, 0.2) * rate)
    pitch, span = rng.uniform(0.12, 0.35), rng.uniform(0.05, 0.15)  # of the rate
    while at < samples:
        count = min(int(rng.uniform(0.3, 0.9) * rate), samples - at)
        low = pitch * rng.uniform(0.8, 1.1)
        call = _call(rng, kind(index), count, low, min(span, 0.48 - low))
        wave[at : at + count] += rng.uniform(0.1, 0.4) * call
        at += count + int(rng.uniform(0.02, 0.15) * rate)
    return np.clip(wave, -1.0, 1.0).astype(np.float32)


def kind(index: int) -> str:
    return KINDS[index % len(KINDS)]


def _call(rng: np.random.Generator, kind: str, count: int, low: float, span: float) -> np.ndarray:
    """One call, [count]; frequencies in cycles a sample."""
    time = np.linspace(0.0, 1.0, count, endpoint=False)
    loud = np.sin(np.pi * time) ** 0.5
    if kind == "sweep":  # up or down, bent
        way = time if rng.random() < 0.5 else 1 - time
        pitch = low + span * way ** rng.uniform(0.5, 2.0)
    elif kind == "trill":  # short falling notes with pauses
        beat = (time * rng.integers(3, 7)) % 1.0
        pitch, loud = low + span * (1 - beat), loud * np.maximum(0.0, np.sin(np.pi * np.minimum(1.0, beat * 1.4)))
    elif kind == "warble":
        pitch = low + span * (0.5 + 0.5 * np.sin(2 * np.pi * (time * rng.uniform(1, 4) + rng.random())))
    else:  # a steady tone, its loudness modulated fast: bands beside it
        pitch = np.full(count, low)
        loud = loud * (0.5 + 0.5 * np.sin(2 * np.pi * np.arange(count) * rng.uniform(0.005, 0.015)))
    phase = 2 * np.pi * np.cumsum(pitch)
    out = np.sin(phase)
    for overtone, share in ((0.5, 0.3), (2.0, 0.15)):
        out += share * np.sin(overtone * phase) * (overtone * pitch < 0.49)
    return loud * out


def _pink(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Noise whose power falls as 1/f, of variance 1."""
    spectrum = np.fft.rfft(rng.standard_normal(samples)) / np.sqrt(np.arange(1, samples // 2 + 2))
    noise = np.fft.irfft(spectrum, samples)
    return noise / noise.std()
