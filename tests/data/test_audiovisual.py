"""Clips with their sound: what belongs to the same time, where sound is looked for, the demo's balls."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from maefast.data.audiovisual import AudioVisual, AudioVisualBatch, Sounding, heard_ball, read_sounding, sheet
from maefast.data.clips import Clips
from maefast.data.collection import DEMO
from maefast.data.fbank import Fbank
from maefast.data.spectrograms import Spectrograms
from maefast.data.video_files import read_sound
from maefast.errors import BadFile
from maefast.nn.patches import Reconstruction

OPTIONS = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0, "seed": 0, "skip_bad": False}
BANK = Fbank(rate=2000, mels=6)  # frames of 50 samples, every 20


def wants(frames=4, stride=2, seconds=0.2, roll=False):
    return AudioVisual(Clips(frames, (8, 8), stride), Spectrograms(20, BANK, seconds, roll=roll))


def opened(data, **how):
    return wants(**how).open(SimpleNamespace(data=str(data), **OPTIONS))


def numbered(frames=40):
    return np.broadcast_to(np.arange(frames, dtype=np.uint8)[:, None, None, None], (frames, 8, 8, 3))


def test_sound_is_of_the_same_time(monkeypatch):
    """40 frames, 100 samples each: a clip that begins with frame n sounds from sample 100 n on."""
    kind = opened(DEMO).kind
    raw, heard = Sounding(numbered(), np.arange(4000, dtype=np.float32)), []
    monkeypatch.setattr(type(kind.sound), "sample", lambda self, wave, rng: heard.append(wave))
    for seed in range(20):
        clip, _ = kind.sample(raw, np.random.default_rng(seed))
        first = int(clip[0, 0, 0, 0])
        assert clip[:, 0, 0, 0].tolist() == [first, first + 2, first + 4, first + 6]
        assert np.array_equal(heard[-1], raw.wave[100 * first : 100 * first + 400])  # 0.2 seconds
    kind = opened(DEMO, stride=1, seconds=0.22).kind
    for seed in range(20):
        clip, _ = kind.sample(raw, np.random.default_rng(seed))
        first = int(clip[0, 0, 0, 0])
        assert np.array_equal(heard[-1], raw.wave[100 * first : 100 * (first + 4)])  # no longer than it is seen


def test_arrays_with_a_recording_beside_them(tmp_path):
    wave = np.random.default_rng(0).standard_normal(4000).astype(np.float32) * 0.1
    np.save(tmp_path / "a.npy", numbered())
    wavfile.write(tmp_path / "a.wav", 2000, wave)
    (tmp_path / "b.c").mkdir()
    from PIL import Image

    for index, frame in enumerate(numbered()[:10]):
        Image.fromarray(np.ascontiguousarray(frame)).save(tmp_path / "b.c" / f"{index:02d}.png")
    wavfile.write(tmp_path / "b.c.wav", 2000, wave[:1000])
    for name, count in (("a.npy", 40), ("b.c", 10)):
        found = read_sounding(tmp_path / name, 2000)
        assert np.array_equal(found.frames, numbered()[:count])
        assert np.array_equal(found.wave, wave[: 100 * count])
    source = opened(tmp_path)
    assert [source.entries.label(index) for index in range(len(source))] == ["a.npy", "b.c"]
    batch, _ = source.collate([source[place, 0, place] for place in range(2)])
    assert batch.clips.shape == (2, 3, 4, 8, 8)
    assert batch.spectrograms.shape == (2, 1, 20, 6)
    wants().check(batch)
    assert len(batch) == 2
    np.save(tmp_path / "mute.npy", numbered())
    with pytest.raises(BadFile, match=r"mute\.npy: no \.wav of the same name is beside it"):
        opened(tmp_path).entries[2]


def test_sound_within_a_video(tmp_path):
    av = pytest.importorskip("av")
    path, rate = tmp_path / "a.mkv", 8000
    tone = (0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)).astype(np.float32)
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("mpeg4", rate=10)
        sound = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        pictures.width = pictures.height = 16
        pictures.pix_fmt = "yuv420p"
        for number in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 20 * number, np.uint8), format="rgb24")
            frame.pts = number
            container.mux(pictures.encode(frame))
        frame = av.AudioFrame.from_ndarray((tone * 32767).astype(np.int16)[None], "s16", "mono")
        frame.rate = rate
        for packet in (*pictures.encode(), *sound.encode(frame), *sound.encode()):
            container.mux(packet)
    found = read_sounding(path, rate)
    assert len(found.frames) == 10
    np.testing.assert_allclose(found.wave, tone, atol=1e-3)
    assert abs(len(read_sounding(path, 2000).wave) - 2000) <= 8
    wavfile.write(tmp_path / "a.wav", rate, -tone)  # beside it, it comes first
    np.testing.assert_allclose(read_sounding(path, rate).wave, -tone, atol=1e-3)
    (tmp_path / "a.wav").unlink()
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("mpeg4", rate=10)
        pictures.width = pictures.height = 16
        pictures.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        for packet in (*pictures.encode(frame), *pictures.encode()):
            container.mux(packet)
    with pytest.raises(ValueError, match="no sound in it"):
        read_sounding(path, rate)


def record(path, rate, wave, layout="mono", codec="pcm_s16le", begins=0.0, times=None):
    """A video of 100 grey frames, 25 a second or shown at `times` (in 100ths), with a sound of these samples [C, S]."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        pictures, sound = container.add_stream("mpeg4", rate=100), container.add_stream(codec, rate=rate, layout=layout)
        pictures.width = pictures.height = 16
        pictures.pix_fmt, pictures.time_base = "yuv420p", Fraction(1, 100)
        for number in range(100):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 2 * number, np.uint8), format="rgb24")
            frame.pts = 4 * number if times is None else times[number]
            container.mux(pictures.encode(frame))
        packed = (np.ascontiguousarray(wave.T).reshape(1, -1) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(packed, "s16", layout)
        frame.rate, frame.time_base, frame.pts = rate, Fraction(1, rate), round(begins * rate)
        for packet in (*pictures.encode(), *sound.encode(frame), *sound.encode()):
            container.mux(packet)


@pytest.mark.parametrize(("layout", "channels"), [("mono", 1), ("stereo", 2), ("5.1", 6)])
def test_channels_are_averaged(tmp_path, layout, channels):
    tone = 0.8 * np.sin(2 * np.pi * 440 * np.arange(32000) / 8000)
    record(tmp_path / "a.mkv", 8000, np.tile(tone, (channels, 1)), layout)
    wave, begins = read_sound(tmp_path / "a.mkv", 8000)
    assert begins == 0
    np.testing.assert_allclose(wave, tone, atol=1e-3)


@pytest.mark.parametrize(("seconds", "begins"), [(4, 0.0), (2, 0.0), (8, 0.0), (3, 0.5)])
def test_a_track_is_laid_beside_the_pictures_by_its_times(tmp_path, seconds, begins):
    """A click after one second, at frame 25, however long the track is and when it begins."""
    wave = np.zeros((1, seconds * 8000))
    wave[0, round((1 - begins) * 8000)] = 0.5
    record(tmp_path / "a.mkv", 8000, wave, begins=begins)
    found = read_sounding(tmp_path / "a.mkv", 8000)
    assert len(found.wave) == found.starts[-1] == 32000
    assert found.wave.argmax() == found.starts[25] == 8000


def test_a_track_of_frames_at_uneven_times(tmp_path):
    times = [number if number < 50 else 50 + 5 * (number - 50) for number in range(100)]
    wave = np.zeros((1, 4 * 8000))
    wave[0, 8000] = 0.5
    record(tmp_path / "a.mkv", 8000, wave, times=times)
    found = read_sounding(tmp_path / "a.mkv", 8000)
    assert found.starts[[0, 50, 60]].tolist() == [0, 4000, 8000]
    kind = opened(DEMO, stride=1, seconds=0.2).kind
    heard = kind._heard(found, slice(60, 64, 1))
    assert len(heard) == 400  # of the 1600 samples that are shown
    assert heard.argmax() == 0


def test_a_track_of_another_time_is_refused(tmp_path):
    record(tmp_path / "a.mkv", 8000, np.ones((1, 800)), begins=6.0)
    with pytest.raises(ValueError, match="not of the same time"):
        read_sounding(tmp_path / "a.mkv", 8000)


def test_a_higher_ball_sounds_higher():
    for index in range(6):
        ball = heard_ball(8, (32, 40), 4000, 16000, index)
        again = heard_ball(8, (32, 40), 4000, 16000, index)
        assert np.array_equal(ball.frames, again.frames)
        assert np.array_equal(ball.wave, again.wave)
        assert ball.frames.shape == (8, 32, 40, 3)
        assert np.abs(ball.wave).max() <= 1
        spread = ball.frames.astype(float).std(3)  # the ball is the most colourful part
        rows = np.array([np.average(np.arange(32), weights=(part**4).sum(1)) for part in spread])
        pieces = ball.wave.reshape(8, 500) * np.hanning(500)
        loudest = np.abs(np.fft.rfft(pieces, axis=1)).argmax(1)
        if np.ptp(rows) > 6:
            assert np.corrcoef(rows, np.log(loudest))[0, 1] < -0.8


def test_pictures_tell_hidden_from_silent():
    sound, mask = torch.zeros(1, 1, 4, 6), torch.zeros(1, 1, 4, 6, dtype=torch.bool)
    sound[..., -1], mask[:, :, :2] = 1, True  # the rest is silent
    masked, hidden = sheet(None, Reconstruction(sound, sound, sound, sound, mask), ["a"], "").columns[1:3]
    assert bool((masked[..., :2] == 128).all())
    assert bool((hidden[..., 2:] == 128).all())
    assert not masked[:, :, 1:, 2:].any()


def test_bad_batches():
    kind, clips, sound = wants(), torch.zeros(2, 3, 4, 8, 8, dtype=torch.uint8), torch.zeros(2, 1, 20, 6)
    kind.check(AudioVisualBatch(clips, sound))
    kind.check(AudioVisualBatch(clips))
    kind.check(AudioVisualBatch(spectrograms=sound))
    with pytest.raises(TypeError, match="an AudioVisualBatch is wanted, got Tensor"):
        kind.check(clips)
    with pytest.raises(ValueError, match="clips, spectrograms or both are wanted"):
        kind.check(AudioVisualBatch())
    with pytest.raises(ValueError, match="as many spectrograms as clips are wanted, got 1 and 2"):
        kind.check(AudioVisualBatch(clips, sound[:1]))
