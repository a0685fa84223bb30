"""Clips of video: arrays or folders of frames, and moving photographs as a demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maefast.data.arrays import load_array
from maefast.data.blob import Where, ending
from maefast.data.collection import DEMO, Collection, Files, Made
from maefast.data.cropped import Cropped
from maefast.data.video_files import CODED, CodedVideo
from maefast.nn.patches import Reconstruction
from maefast.ops import _checks
from maefast.recipe import Batch, Picture

FRAMES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # of a clip that is a folder
_SHIFTS = 8  # ways in which a photograph of the demo moves


@dataclass
class ClipBatch(Batch):
    """clips: uint8 [B, C, T, H, W]."""

    clips: Tensor


@dataclass(frozen=True)
class Clips:
    """A recipe wants `ClipBatch`es: `frames` T of `size` (H, W), every `stride`-th of the video, in colour.

    `--data` names a folder: each .npy or .npz below it is a video, uint8 [frames, height, width, 3], so is each file of
    a codec (.mp4, .webm, ..., see `video_files`), and each folder of images, its frames in the order of their names.
    Crops are those of images (--crop-scale, --crop-ratio, --flip), the same for all frames of a clip.
    """

    frames: int = 16
    size: tuple[int, int] = (224, 224)
    stride: int = 4
    unit = "clip"
    options = ("crop_scale", "crop_ratio", "flip")

    def open(self, options: Any) -> Collection:
        if options.data == DEMO:
            return Collection(CroppedClips(self, options), self._demo(), options)
        return Collection(CroppedClips(self, options), Videos(options.data, options), options)

    def check(self, batch: Any) -> None:
        """Raise unless it is a batch of such clips."""
        if not isinstance(batch, ClipBatch):
            raise TypeError(f"a ClipBatch is wanted, got {type(batch).__name__}")
        check_clips(batch.clips, self.frames, self.size)

    def _demo(self) -> Made:
        from maefast.data.images.files import shipped_photographs

        paths = shipped_photographs()

        def move(index: int) -> np.ndarray:
            return moving_photograph(paths[index // _SHIFTS], self.frames, self.size, index % _SHIFTS)

        def label(index: int) -> str:
            return f"{paths[index // _SHIFTS].stem}, way {index % _SHIFTS}"

        return Made("moving photographs", len(paths) * _SHIFTS, move, label)


class CroppedClips(Cropped):
    """`Clips` with the crops that the options of a run name, as a `Kind`."""

    def sample(self, raw: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 [T, H, W, 3]."""
        return self.cropped(raw[self.span(len(raw), rng.random())], rng)

    def example(self, raw: np.ndarray) -> np.ndarray:
        return self.cropped(raw[self.span(len(raw), 0.5)])

    def span(self, count: int, where: float) -> slice:
        """Which T of `count` frames, see `taken`."""
        return taken(count, self.wants.frames, self.wants.stride, where)

    def cropped(self, frames: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Frames [T, h, w, 3] in the size that is wanted; their centre, or a box drawn by `rng`, flipped or not."""
        height, width = frames.shape[1:3]
        if rng is None:
            return resized(frames, self.centre(width, height), self.wants.size)
        clip = resized(frames, self.augment.box(width, height, rng), self.wants.size)
        return clip[:, :, ::-1] if rng.random() < self.augment.flip else clip

    def collate(self, samples: Sequence[np.ndarray], key: np.ndarray) -> ClipBatch:
        clips = torch.from_numpy(np.stack(samples)).permute(0, 4, 1, 2, 3).contiguous()
        return ClipBatch(clips, key=key)


def check_clips(found: Tensor, frames: int, size: tuple[int, int]) -> None:
    """Raise unless they are uint8 [B, 3, frames, *size]."""
    _checks.tensor("clips", found, ndim=5, floating=False)
    want = (3, frames, *size)
    if tuple(found.shape[1:]) != want or found.dtype is not torch.uint8:
        sizes = ", ".join(map(str, want))
        raise ValueError(f"clips must be uint8 [B, {sizes}], got {found.dtype} {tuple(found.shape)}")


def taken(length: int, frames: int, stride: int, where: float) -> slice:
    """Which `frames` of a video of `length` are a clip, `where` in [0, 1) it may begin; of a short one with a smaller
    stride. ValueError: it has fewer."""
    if length < frames:
        raise ValueError(f"{length} frames, fewer than the {frames} of a clip")
    if frames > 1:
        stride = min(stride, (length - 1) // (frames - 1))
    start = int(where * (length - (frames - 1) * stride))
    return slice(start, start + (frames - 1) * stride + 1, stride)


def resized(clip: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    """The box (left, top, right, bottom) of uint8 [T, h, w, 3] in `size`, bicubic."""
    from PIL import Image

    left, top, right, bottom = box
    cut = clip[:, top:bottom, left:right]
    if cut.shape[1:3] == size:
        return np.ascontiguousarray(cut)
    images = (Image.fromarray(np.ascontiguousarray(frame)) for frame in cut)
    return np.stack([np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC)) for image in images])


class Videos(Files):
    """Arrays, and folders of frames."""

    def __init__(self, data: str | Path, options: Any = None) -> None:
        super().__init__(data, (".npy", ".npz", *CODED, *FRAMES), read_video, "videos", options)

    def _entry(self, path: Path) -> Path:
        return path.parent if path.suffix.lower() in FRAMES else path


def read_video(path: Where) -> np.ndarray | CodedVideo:
    """uint8 [frames, height, width, 3], or what gives slices of it. ValueError: it is something else."""
    if ending(path) in CODED:
        return CodedVideo(path)
    if isinstance(path, Path) and path.is_dir():
        from PIL import Image

        names = sorted(name for name in path.iterdir() if name.suffix.lower() in FRAMES)
        frames = [np.asarray(Image.open(name).convert("RGB")) for name in names]
        if len({frame.shape for frame in frames}) > 1:
            raise ValueError("its frames are not all of one size")
        return np.stack(frames)
    array = load_array(path)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise ValueError(f"a video is uint8 [frames, height, width, 3], not {array.dtype} {list(array.shape)}")
    return array


def moving_photograph(path: Path, frames: int, size: tuple[int, int], way: int) -> np.ndarray:
    """A window that glides over a photograph, another way for each number: uint8 [frames, H, W, 3] a third larger than
    `size`, so that there is something to crop."""
    height, width = (side + side // 3 for side in size)
    photo = _photograph(path, 2 * max(height, width))
    rng = np.random.default_rng([way, frames])
    room = np.array([photo.shape[0] - height, photo.shape[1] - width])
    ends = rng.random((2, 2)) * room
    reach = ends[1] - ends[0]
    most = 3.0 * frames  # pixels, a speed of up to three a frame
    ends[1] = ends[0] + reach * min(1.0, most / max(np.abs(reach).max(), 1e-6))
    path_of = np.linspace(ends[0], ends[1], frames).round().astype(int)
    return np.stack([photo[top : top + height, left : left + width] for top, left in path_of])


@lru_cache(maxsize=32)
def _photograph(path: Path, side: int) -> np.ndarray:
    """In colour, its shorter side `side` pixels."""
    from PIL import Image

    with Image.open(path) as image:
        scale = side / min(image.size)
        sizes = (max(side, round(length * scale)) for length in image.size)
        return np.asarray(image.convert("RGB").resize(tuple(sizes), Image.Resampling.BICUBIC))


def shown_frames(length: int, frames: int = 3) -> list[int]:
    """Some of a clip's frames, the first and the last among them."""
    return np.linspace(0, length - 1, frames).round().astype(int).tolist()


def sheet(shown: Reconstruction, names: Sequence[str], caption: str, frames: int = 3) -> Picture:
    """Some frames of each clip [B, 3, T, H, W] in [0, 1], a row each; what a column does not show is grey."""
    from maefast.data.images.pictures import HIDDEN, Sheet, to_pixels

    picked = shown_frames(shown.original.shape[2], frames)
    masked, hidden = shown.original.masked_fill(shown.mask, HIDDEN), shown.pasted.masked_fill(~shown.mask, HIDDEN)
    columns = [
        to_pixels(column[:, :, picked].transpose(1, 2).flatten(0, 1))
        for column in (shown.original, masked, hidden, shown.pasted)
    ]
    return Sheet(columns, [f"{name}, frame {frame}" for name in names for frame in picked], caption)
