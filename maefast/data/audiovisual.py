"""Clips of video with their sound: files of video, arrays or folders of frames with a recording beside them, and a ball
whose height is heard as a demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.data.blob import Where, ending
from maefast.data.clips import ClipBatch, Clips, CroppedClips, Videos, read_video
from maefast.data.collection import DEMO, Collection, Made
from maefast.data.fbank import read_wave
from maefast.data.spectrograms import SpectrogramBatch, Spectrograms
from maefast.data.video_files import CODED, CodedVideo, read_sound
from maefast.nn.patches import Reconstruction
from maefast.recipe import Batch, Picture

_BALLS = 512  # of the demo


@dataclass
class AudioVisualBatch(Batch):
    """clips: uint8 [B, 3, T, H, W]. spectrograms: float32 [B, 1, S, mels], of the same time. Either may be None: there
    is none."""

    clips: Tensor | None = None
    spectrograms: Tensor | None = None


class Sounding(NamedTuple):
    """frames: uint8 [n, h, w, 3], or what gives slices of it; wave: float32 [S], over the same time. starts: int
    [n + 1], the sample that sounds as each frame appears, and as the last one ends; None: evenly spread."""

    frames: Any
    wave: np.ndarray
    starts: np.ndarray | None = None


@dataclass(frozen=True)
class AudioVisual:
    """A recipe wants `AudioVisualBatch`es of these `clips` and this `sound`.

    `--data` names what `Clips` reads. Sound is the .wav of the same name beside it ("a.wav" of "a.mp4", "a.npy" or the
    folder "a"), whose frames are spread over it evenly; or else the first sound track of a file of video, by the times
    of both: silence stands where it has begun too late or is over. A sample's sound begins with its first frame and
    lasts `sound.seconds`, but no longer than its frames.
    """

    clips: Clips
    sound: Spectrograms
    unit = "clip"
    options = ("crop_scale", "crop_ratio", "flip")

    def open(self, options: Any) -> Collection:
        if options.data == DEMO:
            return Collection(_Both(self, options), self._demo(), options)
        return Collection(_Both(self, options), _Recorded(self.sound.bank.rate, options), options)

    def check(self, batch: Any) -> None:
        """Raise unless it is a batch of such clips, such sound, or both."""
        if not isinstance(batch, AudioVisualBatch):
            raise TypeError(f"an AudioVisualBatch is wanted, got {type(batch).__name__}")
        clips, sound = batch.clips, batch.spectrograms
        if clips is None and sound is None:
            raise ValueError("clips, spectrograms or both are wanted, got neither")
        if clips is not None:
            self.clips.check(ClipBatch(clips))
        if sound is not None:
            self.sound.check(SpectrogramBatch(sound))
        if None not in (clips, sound) and len(clips) != len(sound):
            raise ValueError(f"as many spectrograms as clips are wanted, got {len(sound)} and {len(clips)}")

    def _demo(self) -> Made:
        make = partial(heard_ball, self.clips.frames, self.clips.size, self.sound.samples, self.sound.bank.rate)
        return Made("a ball whose height is heard", _BALLS, lru_cache(maxsize=_BALLS)(make), "ball {}".format)


class _Both:
    """`AudioVisual` with the crops that the options of a run name, as a `Kind`."""

    def __init__(self, wants: AudioVisual, options: Any) -> None:
        self.sound, self.pictures, self.unit = wants.sound, CroppedClips(wants.clips, options), wants.unit

    def sample(self, raw: Sounding, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        span = self.pictures.span(len(raw.frames), rng.random())
        return self.pictures.cropped(raw.frames[span], rng), self.sound.sample(self._heard(raw, span), rng)

    def example(self, raw: Sounding) -> tuple[np.ndarray, np.ndarray]:
        span = self.pictures.span(len(raw.frames), 0.5)
        return self.pictures.cropped(raw.frames[span]), self.sound.example(self._heard(raw, span))

    def _heard(self, raw: Sounding, span: slice) -> np.ndarray:
        """What is heard from the first frame until the one after the last would be shown."""
        first, behind = span.start, span.stop - 1 + span.step
        if raw.starts is None:
            each = len(raw.wave) / len(raw.frames)
            start, stop = int(first * each), int(behind * each)
        else:
            start, stop = raw.starts[first], raw.starts[min(behind, len(raw.frames))]
        return raw.wave[start : min(stop, start + self.sound.samples)]

    def collate(self, samples: Sequence[tuple[np.ndarray, np.ndarray]], key: np.ndarray) -> AudioVisualBatch:
        clips, sounds = zip(*samples)
        seen, heard = self.pictures.collate(clips, key), self.sound.collate(sounds, key)
        return AudioVisualBatch(seen.clips, heard.spectrograms, key=key)


class _Recorded(Videos):
    """Videos with their sound."""

    def __init__(self, rate: int, options: Any) -> None:
        super().__init__(options.data, options)
        self._read = partial(read_sounding, rate=rate)


def read_sounding(where: Where, rate: int) -> Sounding:
    """A video with its sound at `rate` samples a second. ValueError: it is no such thing, or mute."""
    frames = read_video(where)
    beside = where.parent / f"{where.name if where.is_dir() else where.stem}.wav" if isinstance(where, Path) else None
    if beside is not None and beside.is_file():
        return Sounding(frames, read_wave(beside, rate))
    if ending(where) not in CODED:
        raise ValueError("no .wav of the same name is beside it")
    return _together(frames, *read_sound(where, rate), rate)


def _together(frames: CodedVideo, wave: np.ndarray, begins: float, rate: int) -> Sounding:
    """What is heard while the frames are shown."""
    times = frames.shown
    shown = times - times[0]
    if not shown[-1]:  # a single frame, shown as long as it sounds
        return Sounding(frames, wave)
    starts = np.round(shown * rate).astype(np.int64)
    heard, at = np.zeros(starts[-1], np.float32), round((begins - times[0]) * rate)
    part = wave[max(0, -at) : max(0, len(heard) - at)]
    if not len(part):
        raise ValueError("its sound and its pictures are not of the same time")
    heard[max(0, at) :][: len(part)] = part
    return Sounding(frames, heard, starts)


def heard_ball(frames: int, size: tuple[int, int], samples: int, rate: int, index: int) -> Sounding:
    """A ball that swings up and down, and a tone, higher where the ball is; a red ball sounds with its overtones, a
    green one without, a blue one trembles. Another one for each index and the same one every time: uint8
    [frames, H, W, 3] and float32 [samples]."""
    rng = np.random.default_rng([index, 2])
    turns, phase, reach, kind = rng.uniform(0.4, 1.6), rng.random(), rng.uniform(0.5, 1.0), index % 3

    def height(time: np.ndarray) -> np.ndarray:
        """In [0, 1] at times in [0, 1]."""
        return 0.5 + 0.5 * reach * np.sin(2 * np.pi * (turns * time + phase))

    rows, columns = np.mgrid[: size[0], : size[1]]
    radius = 0.13 * min(size)
    at = radius + (size[1] - 2 * radius) * rng.random()
    ground = 60 + 60 * columns / size[1] + 30 * np.sin(rng.uniform(0.2, 0.5) * rows + rng.uniform(0, 6))
    tint = rng.uniform(0.6, 1.0, 3)
    colour = np.array([(230, 70, 60), (70, 220, 80), (80, 110, 240)][kind])
    clip = np.empty((frames, *size, 3))
    for frame, level in zip(clip, height((np.arange(frames) + 0.5) / frames)):
        far = np.hypot(rows - (size[0] - radius - level * (size[0] - 2 * radius)), columns - at)
        share = np.clip(radius - far + 0.5, 0, 1)[..., None]
        frame[:] = share * colour + (1 - share) * ground[..., None] * tint
    time = np.arange(samples) / samples
    pitch = 2 * np.pi * np.cumsum(0.02 * 2 ** (3.2 * height(time)))  # up to 0.18 of the rate
    wave = np.sin(pitch)
    if kind == 0:
        wave += 0.7 * np.sin(2 * pitch) + 0.4 * np.sin(pitch / 2)
    if kind == 2:
        wave *= 0.5 + 0.5 * np.sin(2 * np.pi * 20 * np.arange(samples) / rate)
    wave = 0.25 * wave + 0.002 * rng.standard_normal(samples)
    return Sounding(clip.round().astype(np.uint8), wave.astype(np.float32))


def sheet(
    seen: Reconstruction | None, heard: Reconstruction | None, names: Sequence[str], caption: str, frames: int = 2
) -> Picture:
    """Some frames of each clip [B, 3, T, H, W] in [0, 1], and its spectrogram [B, 1, S, mels] below them, time to the
    right and low frequencies at the bottom, in greys from the least to the greatest value. What is hidden is grey."""
    from maefast.data.images.pictures import Sheet, to_pixels

    parts, labels = [], []
    if seen is not None:
        picked = np.linspace(0, seen.original.shape[2] - 1, frames).round().astype(int).tolist()
        parts += ([[column[:, :, i] for i in picked] for column in _columns(seen)],)
        labels += [f"frame {i}" for i in picked]
    if heard is not None:
        low, high = torch.aminmax(heard.original.flatten(1), dim=1)
        low, span = (t.view(-1, 1, 1, 1) for t in (low, (high - low).clamp_min(1e-6)))
        scaled = heard._replace(**{
            name: (getattr(heard, name) - low) / span for name in ("original", "masked", "reconstruction", "pasted")
        })  # fmt: skip
        upright = [column.transpose(2, 3).flip(2).expand(-1, 3, -1, -1) for column in _columns(scaled)]
        if seen is not None:
            upright = [F.interpolate(column.float(), seen.original.shape[3:]) for column in upright]
        parts.append([[column] for column in upright])
        labels.append("sound")
    rows = [torch.stack([image for part in parts for image in part[i]], 1).flatten(0, 1) for i in range(4)]
    return Sheet([to_pixels(row) for row in rows], [f"{name}, {label}" for name in names for label in labels], caption)


def _columns(shown: Reconstruction) -> list[Tensor]:
    """Original, masked, hidden parts alone, and pasted; grey where nothing is."""
    from maefast.data.images.pictures import HIDDEN

    masked = shown.original.masked_fill(shown.mask, HIDDEN)
    hidden = shown.reconstruction.masked_fill(~shown.mask, HIDDEN)
    return [shown.original, masked, hidden, shown.pasted]
