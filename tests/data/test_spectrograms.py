"""Filter banks against a loop written by hand, recordings from files, batches of spectrograms."""

from __future__ import annotations

import cmath
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from maefast.data import songs
from maefast.data.collection import DEMO
from maefast.data.fbank import WINDOWS, Fbank, read_wave
from maefast.data.spectrograms import SpectrogramBatch, Spectrograms, read_recording, sheet
from maefast.errors import BadFile, ConfigError
from maefast.nn.patches import Reconstruction
from maefast.train import PretrainConfig

SMALL = Fbank(rate=2000, mels=6, length=25.0, shift=10.0)  # frames of 50 samples in 64, every 20


def by_hand(wave: list[float], bank: Fbank) -> list[list[float]]:
    """As the documentation of Kaldi's feat-window and mel-computations has it, value by value."""
    size, hop, padded = int(bank.rate * 0.025), int(bank.rate * 0.01), 1
    while padded < size:
        padded *= 2
    high = bank.high if bank.high > 0 else bank.rate / 2 + bank.high
    to_mel = lambda f: 1127 * math.log(1 + f / 700)  # noqa: E731
    low_mel, step = to_mel(bank.low), (to_mel(high) - to_mel(bank.low)) / (bank.mels + 1)
    out = []
    for start in range(0, len(wave) - size + 1, hop):
        frame = wave[start : start + size]
        middle = sum(frame) / size
        frame = [value - middle for value in frame]
        frame = [value - 0.97 * frame[max(i - 1, 0)] for i, value in enumerate(frame)]
        for i in range(size):
            cosine = math.cos(2 * math.pi * i / (size - 1))
            frame[i] *= {
                "hanning": 0.5 - 0.5 * cosine, "povey": (0.5 - 0.5 * cosine) ** 0.85, "hamming": 0.54 - 0.46 * cosine,
                "rectangular": 1.0,
            }[bank.window]  # fmt: skip
        power = []
        for k in range(padded // 2):
            value = sum(x * cmath.exp(-2j * math.pi * k * i / padded) for i, x in enumerate(frame))
            power.append(abs(value) ** 2)
        row = []
        for b in range(bank.mels):
            left, centre, right = (low_mel + (b + j) * step for j in range(3))
            energy = 0.0
            for k, value in enumerate(power):
                at = to_mel(k * bank.rate / padded)
                if left < at < right:
                    energy += value * ((at - left) / step if at <= centre else (right - at) / step)
            row.append(math.log(max(energy, 2.0**-23)))
        out.append(row)
    return out


@pytest.mark.parametrize("window", WINDOWS)
def test_fbank_is_the_loop_by_hand(window):
    bank = replace(SMALL, window=window)
    wave = np.random.default_rng(0).standard_normal(155) * 0.1
    want = by_hand(wave.tolist(), bank)
    assert len(want) == bank.frames(155) == 6
    np.testing.assert_allclose(bank(wave), want, rtol=0, atol=2e-6)


def test_fbank_with_a_band_of_its_own():
    bank = replace(SMALL, low=100.0, high=-200.0, mels=4)
    wave = np.random.default_rng(1).standard_normal(100)
    np.testing.assert_allclose(bank(wave), by_hand(wave.tolist(), bank), rtol=0, atol=2e-6)


def test_a_tone_lies_in_its_filter_and_silence_at_the_floor():
    bank = Fbank()
    tone = np.sin(2 * np.pi * 4000 * np.arange(16000) / 32000)
    edges = np.linspace(1127 * np.log1p(20 / 700), 1127 * np.log1p(16000 / 700), 130)
    nearest = np.abs(edges[1:-1] - 1127 * np.log1p(4000 / 700)).argmin()
    assert (bank(tone).argmax(1) == nearest).all()
    assert bank(np.zeros(1000)).max() == pytest.approx(math.log(2.0**-23))
    assert bank(np.zeros(160000)).shape == (498, 128)
    assert bank.samples(498) <= 160000 < bank.samples(499)


def test_fbank_agrees_with_torchaudio():
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi")
    wave = torch.randn(16000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.1
    how = {"htk_compat": True, "use_energy": False, "dither": 0.0, "frame_shift": 10}
    want = kaldi.fbank(wave[None], sample_frequency=32000, window_type="hanning", num_mel_bins=128, **how)
    np.testing.assert_allclose(Fbank()(wave.numpy()), want.numpy(), rtol=0, atol=2e-3)  # its filters are float32


def test_refusals_of_fbank():
    with pytest.raises(ValueError, match="window must be one of hanning, povey"):
        Fbank(window="hann")
    with pytest.raises(ValueError, match="low < high <= rate / 2"):
        Fbank(rate=8000, high=5000)
    with pytest.raises(ValueError, match="rate, mels and a window"):
        Fbank(mels=0)
    with pytest.raises(ValueError, match=r"at least 800 samples is needed, got shape \[799\]"):
        Fbank()(np.zeros(799))
    with pytest.raises(ValueError, match=r"got shape \[1, 900\]"):
        Fbank()(np.zeros((1, 900)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
def test_waves_of_any_type(tmp_path, dtype):
    wave = np.sin(np.arange(400) / 9) * 0.5
    stored = {np.uint8: np.round(wave * 128 + 128), np.int16: np.round(wave * 32768), np.float32: wave}.get(dtype)
    stored = np.round(wave * 2**31) if stored is None else stored
    wavfile.write(tmp_path / "a.wav", 8000, np.stack([stored, stored], 1).astype(dtype))
    found = read_wave(tmp_path / "a.wav", 8000)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wave, rtol=0, atol=0.005 if dtype is np.uint8 else 1e-4)


def test_channels_are_averaged_and_rates_changed(tmp_path):
    time = np.arange(8000) / 8000
    pair = np.stack([np.sin(2 * np.pi * 200 * time), np.zeros(8000)], 1).astype(np.float32)
    wavfile.write(tmp_path / "a.wav", 8000, pair)
    found = read_wave(tmp_path / "a.wav", 12000)
    want = 0.5 * np.sin(2 * np.pi * 200 * np.arange(12000) / 12000)
    assert found.shape == (12000,)
    np.testing.assert_allclose(found[200:-200], want[200:-200], atol=5e-3)


# --- as a recipe wants them

WANTS = Spectrograms(frames=32, bank=Fbank(rate=8000, mels=8), seconds=0.3)  # 28 frames, 4 are filled


def test_batches_are_filled_with_a_minimum():
    rng = np.random.default_rng(0)
    samples = [rng.standard_normal((28, 8)).astype(np.float32), rng.standard_normal((32, 8)).astype(np.float32) - 5]
    for padding in ("clip", "batch"):
        batch = replace(WANTS, padding=padding).collate(samples, np.arange(2))
        assert batch.spectrograms.shape == (2, 1, 32, 8)
        np.testing.assert_array_equal(batch.spectrograms[0, 0, :28], samples[0])
        np.testing.assert_array_equal(batch.spectrograms[1, 0], samples[1])
        least = samples[0].min() if padding == "clip" else samples[1].min()
        assert (batch.spectrograms[0, 0, 28:] == float(least)).all()


def test_samples_are_windows_rolled_and_louder():
    wave = songs.song(1, 8000, 8000)
    one, two = (WANTS.sample(wave, np.random.default_rng(seed)) for seed in (0, 0))
    np.testing.assert_array_equal(one, two)
    assert one.shape == (28, 8)
    assert not np.array_equal(one, WANTS.sample(wave, np.random.default_rng(1)))
    rng = np.random.default_rng(5)
    start = int(rng.random() * (8000 - 2400 + 1))
    cut = wave[start : start + 2400] - wave[start : start + 2400].mean()
    cut = np.roll(cut, rng.integers(2400)) * (rng.beta(10, 10) + 0.5)
    np.testing.assert_allclose(WANTS.sample(wave, np.random.default_rng(5)), WANTS.bank(cut), atol=1e-4)
    short = WANTS.example(wave[:1000])
    assert short.shape == (28, 8)
    np.testing.assert_allclose(short, WANTS.bank(np.pad(wave[:1000], (0, 1400)) - wave[:1000].sum() / 2400), atol=1e-3)
    long = np.random.default_rng(2).standard_normal((50, 8)).astype(np.float32)
    assert WANTS.sample(long, np.random.default_rng(0)).shape == (32, 8)
    np.testing.assert_array_equal(WANTS.example(long), long[9:41])


def test_songs_are_the_same_every_time():
    waves = [songs.song(index, 4000, 8000) for index in range(8)]
    assert [songs.kind(index) for index in range(4)] == list(songs.KINDS)
    for index, wave in enumerate(waves):
        assert wave.dtype == np.float32
        assert 0.05 < np.abs(wave).max() <= 1
        np.testing.assert_array_equal(wave, songs.song(index, 4000, 8000))
        assert sum(np.array_equal(wave, other) for other in waves) == 1


def opened(folder, **options):
    return WANTS.open(PretrainConfig(data=str(folder), **options))


def test_folders_of_recordings(tmp_path):
    wavfile.write(tmp_path / "b.wav", 8000, songs.song(0, 4000, 8000))
    (tmp_path / "deep").mkdir()
    np.save(tmp_path / "deep" / "a.npy", np.zeros((40, 8)))
    source = opened(tmp_path)
    assert [source.entries.label(i) for i in range(len(source))] == ["b.wav", "deep/a.npy"]
    batch, names = source.examples(2)
    assert isinstance(batch, SpectrogramBatch)
    assert batch.spectrograms.shape == (2, 1, 32, 8)
    assert batch.spectrograms.dtype is torch.float32
    assert names == ["b.wav", "deep/a.npy"]
    assert len(opened(DEMO)) == 256
    sample, position, bad = opened(DEMO)[3, 0, 7]
    assert (sample.shape, position, bad) == ((28, 8), 3, [])


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no recordings in it"):
        opened(tmp_path)
    for name, array, reason in (
        ("wide", np.zeros((5, 9)), r"floating \[frames, 8\], not float64 \[5, 9\]"),
        ("whole", np.zeros((5, 8), int), "not int64"),
        ("none", np.zeros((0, 8)), r"float64 \[0, 8\]"),
        ("nan", np.full((5, 8), np.nan), "not finite"),
    ):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(ValueError, match=reason):
            read_recording(tmp_path / f"{name}.npy", 8000, 8)
    wavfile.write(tmp_path / "empty.wav", 8000, np.zeros(0, np.float32))
    wavfile.write(tmp_path / "nan.wav", 8000, np.full(9, np.nan, np.float32))
    (tmp_path / "text.wav").write_text("no wave")
    for name in ("empty", "nan", "text"):
        with pytest.raises(ValueError):  # noqa: PT011
            read_recording(tmp_path / f"{name}.wav", 8000, 8)
    with pytest.raises(BadFile, match=r"empty\.wav"):
        opened(tmp_path).examples(7)
    with pytest.raises(ValueError, match="padding must be"):
        replace(WANTS, padding="zero")
    with pytest.raises(TypeError, match="a SpectrogramBatch is wanted"):
        WANTS.check(torch.zeros(1, 1, 32, 8))


def test_pictures_tell_hidden_from_silent():
    sound, mask = torch.full((1, 1, 4, 6), -2.0), torch.zeros(1, 1, 4, 6, dtype=torch.bool)
    sound[..., -1], mask[:, :, :2] = 2, True  # the rest is silent
    masked, hidden = sheet(Reconstruction(sound, sound, sound, sound, mask), ["a"], "").columns[1:3]
    assert bool((masked[..., :2] == 128).all())
    assert bool((hidden[..., 2:] == 128).all())
    assert not masked[:, :, 1:, 2:].any()
