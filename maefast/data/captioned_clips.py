"""Clips of video with embeddings of their captions, and with scores that say where a caption is to be seen; clips of
moving shapes that are made, with captions, as a demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maefast.data.blob import Where, opened
from maefast.data.clips import ClipBatch, check_clips, read_video, resized, shown_frames, taken
from maefast.data.clips import sheet as sheet_of_clips
from maefast.data.collection import DEMO, Collection, Files, Made
from maefast.data.cropped import Box, Cropped
from maefast.data.moving_shapes import MovingShape
from maefast.nn.patches import Reconstruction
from maefast.ops import _checks
from maefast.recipe import Picture

_COUNT = 256  # clips of the demo


@dataclass
class CaptionedClipBatch(ClipBatch):
    """clips: uint8 [B, C, T, H, W]. text: floating [B, D], the embedding of a caption of each. scores: floating [B, T',
    S], how well each of the S positions of T' tubelet slots fits it; None where a teacher says so."""

    text: Tensor
    scores: Tensor | None = None


class Captioned(NamedTuple):
    """What is read of one video: frames uint8 [F, H, W, 3]; texts float32 [K, D], of its K captions; scores [K, F', h,
    w], maps of any resolution for F' frames spread evenly over the video, or None."""

    frames: Any
    texts: np.ndarray
    scores: np.ndarray | None


@dataclass(frozen=True)
class CaptionedClips:
    """A recipe wants `CaptionedClipBatch`es: `frames` T of `size` (H, W), every `stride`-th of the video, a `text` D
    wide and, if `scored`, scores on a `grid` (T', rows, columns).

    `--data` names a folder, a list or tars of .npz files, a video each, with the arrays of `Captioned`: "video", uint8
    [F, H, W, 3], or the name of a video's file beside it; "texts", floating [K, D]; "scores", floating [K, F', h, w].
    Of several captions a training sample takes one at random, an example the first. Scores are cropped, flipped and
    averaged over the frames of a tubelet as the clip is. A caption that names a direction wants --flip 0.
    """

    frames: int = 16
    size: tuple[int, int] = (224, 224)
    stride: int = 4
    grid: tuple[int, int, int] = (8, 14, 14)
    text: int = 512
    scored: bool = True
    unit = "clip"
    options = ("crop_scale", "crop_ratio", "flip")

    def __post_init__(self) -> None:
        _checks.integer("text", self.text, 1)

    def open(self, options: Any) -> Collection:
        if options.data == DEMO:
            return Collection(_Cropped(self, options), self._demo(), options)
        read = partial(read_captioned, text=self.text, scored=self.scored)
        files = Files(options.data, (".npz",), read, "captioned videos (.npz)", options)
        return Collection(_Cropped(self, options), files, options)

    def check(self, batch: Any) -> None:
        """Raise unless it is a batch of such clips."""
        if not isinstance(batch, CaptionedClipBatch):
            raise TypeError(f"a CaptionedClipBatch is wanted, got {type(batch).__name__}")
        check_clips(batch.clips, self.frames, self.size)
        self._check_rows("text", batch.text, (len(batch), self.text))
        if self.scored:
            if batch.scores is None:
                raise ValueError("scores are wanted: give them with the clips, or the recipe a teacher")
            self._check_rows("scores", batch.scores, (len(batch), self.grid[0], self.grid[1] * self.grid[2]))

    def _check_rows(self, name: str, rows: Any, want: tuple[int, ...]) -> None:
        _checks.tensor(name, rows, ndim=len(want))
        if tuple(rows.shape) != want:
            raise ValueError(f"{name} must be {list(want)}, got {tuple(rows.shape)}")

    def _demo(self) -> Made:
        size = (self.size[0] + self.size[0] // 3, self.size[1] + self.size[1] // 3)  # something to crop

        @cache
        def make(index: int) -> Captioned:
            shape = MovingShape(index)
            video, where = shape.video(self.frames, size)
            return Captioned(video, shape.embedding(self.text)[None], where[None] if self.scored else None)

        return Made("moving shapes", _COUNT, make, lambda index: MovingShape(index).caption)


class _Cropped(Cropped):
    """`CaptionedClips` with the crops that the options of a run name, as a `Kind`."""

    def sample(self, raw: Captioned, rng: np.random.Generator) -> tuple[np.ndarray | None, ...]:
        """(uint8 [T, H, W, 3], float32 [D], float32 [T', S] or None)."""
        where, caption = rng.random(), int(rng.integers(len(raw.texts)))
        height, width = raw.frames.shape[1:3]
        made = self._made(raw, where, caption, self.augment.box(width, height, rng))
        if rng.random() >= self.augment.flip:
            return made
        clip, text, scores = made
        grid = self.wants.grid
        if scores is not None:
            scores = np.ascontiguousarray(scores.reshape(grid)[:, :, ::-1]).reshape(grid[0], -1)
        return np.ascontiguousarray(clip[:, :, ::-1]), text, scores

    def example(self, raw: Captioned) -> tuple[np.ndarray | None, ...]:
        height, width = raw.frames.shape[1:3]
        return self._made(raw, 0.5, 0, self.centre(width, height))

    def _made(self, raw: Captioned, where: float, caption: int, box: Box) -> tuple[np.ndarray | None, ...]:
        frames = taken(len(raw.frames), self.wants.frames, self.wants.stride, where)
        clip, scores = resized(raw.frames[frames], box, self.wants.size), None
        if raw.scores is not None:
            maps = raw.scores[caption]
            numbers = np.arange(len(raw.frames))[frames] * len(maps) // len(raw.frames)
            scores = on_grid(maps[numbers], box, raw.frames.shape[1:3], self.wants.grid)
        return clip, raw.texts[caption], scores

    def collate(self, samples: Sequence[tuple[np.ndarray | None, ...]], key: np.ndarray) -> CaptionedClipBatch:
        clips, text, scores = zip(*samples)
        clips = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).contiguous()
        scores = None if scores[0] is None else torch.from_numpy(np.stack(scores))
        return CaptionedClipBatch(clips, torch.from_numpy(np.stack(text)), scores, key=key)


def on_grid(maps: np.ndarray, box: Box, size: tuple[int, int], grid: tuple[int, int, int]) -> np.ndarray:
    """Maps [T, h, w] of frames of `size` (height, width) within `box`, averaged over the frames of each tubelet and
    resampled (bilinear, with antialiasing): float32 [T', rows * columns]."""
    from PIL import Image

    across, down = maps.shape[2] / size[1], maps.shape[1] / size[0]
    left, top, right, bottom = box
    box = (left * across, top * down, right * across, bottom * down)
    maps = maps.astype(np.float32).reshape(grid[0], -1, *maps.shape[1:]).mean(1)
    images = (Image.fromarray(one).resize(grid[:0:-1], Image.Resampling.BILINEAR, box=box) for one in maps)
    return np.stack([np.asarray(image).reshape(-1) for image in images])


def read_captioned(path: Where, text: int, scored: bool) -> Captioned:
    """From an .npz, see `CaptionedClips`. ValueError: it is something else."""
    with opened(path) as stream:
        loaded = np.load(stream)
        if isinstance(loaded, np.ndarray):
            raise ValueError("an .npz with the arrays video, texts and scores is wanted")
        names = ("video", "texts", "scores") if scored else ("video", "texts")
        if lacking := [name for name in names if name not in loaded.files]:
            raise ValueError(f"no array {', '.join(lacking)} in it; it holds {', '.join(loaded.files) or 'none'}")
        video, texts, *scores = (loaded[name] for name in names)
    if video.dtype.kind == "U" and video.ndim == 0 and isinstance(path, Path):
        video = read_video(path.parent / str(video))
    if video.dtype != np.uint8 or len(video.shape) != 4 or video.shape[3] != 3:
        raise ValueError(f"video must be uint8 [frames, height, width, 3], not {video.dtype} {list(video.shape)}")
    if texts.dtype.kind != "f" or texts.ndim != 2 or texts.shape[1] != text or not len(texts):
        raise ValueError(f"texts must be floating [captions, {text}], not {texts.dtype} {list(texts.shape)}")
    maps = scores[0] if scores else None
    if maps is not None and (
        maps.dtype.kind != "f" or maps.ndim != 4 or len(maps) != len(texts) or 0 in maps.shape or len(video) < 1
    ):
        raise ValueError(f"scores must be floating [{len(texts)}, frames, h, w], not {maps.dtype} {list(maps.shape)}")
    for name, array in (("texts", texts), ("scores", maps)):
        if array is not None and not np.isfinite(array).all():
            raise ValueError(f"{name} holds values that are not finite")
    return Captioned(video, texts.astype(np.float32), maps)


def sheet(
    shown: Reconstruction, scores: Tensor | None, grid: tuple[int, int, int], names: Sequence[str], caption: str
) -> Picture:
    """`maefast.data.clips.sheet` with a column of scores [B, T', S], from the lowest of a frame, black, to its highest,
    white; without it where there are none."""
    base, length = sheet_of_clips(shown, names, caption), shown.original.shape[2]
    if scores is None:
        return base
    slots = [frame * grid[0] // length for frame in shown_frames(length)]
    maps = scores.detach().float().cpu()[:, slots]
    low, high = maps.amin(2, keepdim=True), maps.amax(2, keepdim=True)
    maps = ((maps - low) / (high - low).clamp_min(1e-6)).view(-1, 1, *grid[1:])
    pixels = torch.nn.functional.interpolate(maps, tuple(shown.original.shape[3:]))
    heat = (255 * pixels).round().to(torch.uint8).expand(-1, 3, -1, -1)
    return replace(
        base, columns=[base.columns[0], heat, *base.columns[1:]], labels=(base.labels[0], "scores", *base.labels[1:])
    )
