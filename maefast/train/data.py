"""The training data: augmentation, decoded-image cache, and a loader that can start at any step."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from . import seeds
from .errors import SKIP_BAD, BadImage, TrainError
from .images import ImageSet
from .pixels import Decoder, Image, crop, to_array

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as MAE uses
GREY_MEAN, GREY_STD = (0.449,), (0.226,)

# Bicubic resizing first shrinks by an integer factor while more than this many times too large. At 3 the
# result cannot be told from a full bicubic filter and large photographs cost a fraction of the time.
REDUCING_GAP = 3.0


@dataclass(frozen=True)
class Augment:
    """Random-resized-crop (bicubic) and horizontal flip, the only augmentation MAE uses.

    `size` is (height, width). A crop covers `scale` of the image's area; its aspect ratio, relative to that of
    `size`, lies in `ratio` (drawn uniformly in the logarithm). If no such box fits in ten draws, the largest centred
    box with a permitted aspect ratio is taken. A crop smaller than `size` is enlarged.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of a crop of an image of width x height pixels."""
        shape = self.size[1] / self.size[0]
        low, high = (math.log(r * shape) for r in self.ratio)
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(low, high))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
                return left, top, left + w, top + h
        aspect = min(max(width / height, math.exp(low)), math.exp(high))
        w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        box = self.box(image.width, image.height, rng)
        size = (self.size[1], self.size[0])
        # Cut first: with resize(box=...) the filter would also see pixels outside of the box.
        image = crop(image, box).resize(size, Image.Resampling.BICUBIC, reducing_gap=REDUCING_GAP)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < self.flip else image


class TrainImages(Dataset):
    """Samples addressed by (position in the run, epoch, image index).

    A sample is (uint8 or uint16 [C, H, W], mask noise float32 [patches], bad), where `bad` lists the files that could
    not be read as (path, reason). With `skip_bad` the next readable image in the list stands in for a bad one.
    Errors travel as data because an exception raised in a worker loses its type and its clean message.
    """

    def __init__(
        self,
        images: ImageSet,
        augment: Augment,
        decoder: Decoder,
        *,
        patches: int,
        seed: int,
        skip_bad: bool,
        cache: int,
    ):
        self.images, self.augment, self.patches, self.seed = images, augment, patches, seed
        self.decoder, self.skip_bad = decoder, skip_bad
        self.cache_bytes = cache
        self._cache: dict[int, Image.Image] = {}
        self._cached = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, where: tuple[int, int, int]):
        position, epoch, index = where
        image, bad = self._readable(index)
        rng = seeds.generator(self.seed, seeds.AUGMENT, epoch, index)
        pixels = None
        if image is not None:
            pixels = to_array(self.augment(image, rng), self.decoder.channels, self.decoder.bits)
        return pixels, seeds.mask_noise(self.seed, position, self.patches), bad

    def _readable(self, index: int) -> tuple[Image.Image | None, list[tuple[str, str]]]:
        bad = []
        for offset in range(len(self.images) if self.skip_bad else 1):
            try:
                return self._decode((index + offset) % len(self.images)), bad
            except BadImage as error:
                bad.append((str(error.path), error.reason))
        return None, bad

    def _decode(self, index: int) -> Image.Image:
        image = self._cache.get(index)
        if image is None:
            image = self.decoder(self.images.path(index))
            size = image.width * image.height * (1 if image.mode == "L" else 4)  # PIL keeps RGB in 32 bits
            # Fill up, never evict: with a fresh permutation each epoch any evicting cache would only churn.
            if self._cached + size <= self.cache_bytes:
                self._cache[index] = image
                self._cached += size
        return image


class Positions(Sampler):
    """Batches of (position, epoch, index) for one process, from any position of the run on.

    The run reads one endless stream of positions; position p is image permutation(epoch)[p mod n] of epoch p div n.
    Micro-batch k takes the next batch x processes positions, rank r the r-th slice of `batch` of them, so all
    processes together see what one process with their joint batch would.
    """

    def __init__(self, count: int, seed: int, *, batch: int, rank: int, world: int, start: int, micro_batches: int):
        self.count, self.seed, self.batch, self.rank, self.world = count, seed, batch, rank, world
        self.start, self.micro_batches = start, micro_batches

    def __len__(self) -> int:
        return self.micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        epoch, order = -1, None
        for k in range(self.micro_batches):
            first = self.start + (k * self.world + self.rank) * self.batch
            batch = []
            for position in range(first, first + self.batch):
                if position // self.count != epoch:
                    epoch = position // self.count
                    order = seeds.permutation(self.seed, epoch, self.count)
                batch.append((position, epoch, int(order[position % self.count])))
            yield batch


@dataclass
class Batch:
    """images uint8 or uint16 [B, C, H, W]; noise float32 [B, patches]; bad: (path, reason) of unreadable files met."""

    images: torch.Tensor
    noise: torch.Tensor
    bad: list[tuple[str, str]]

    def pin_memory(self) -> Batch:
        return Batch(self.images.pin_memory(), self.noise.pin_memory(), self.bad)


def collate(samples: list) -> Batch:
    bad = [entry for sample in samples for entry in sample[2]]
    pixels = [sample[0] for sample in samples]
    if any(p is None for p in pixels):
        return Batch(torch.empty(0), torch.empty(0), bad)
    noise = np.stack([sample[1] for sample in samples])
    return Batch(torch.from_numpy(np.stack(pixels)), torch.from_numpy(noise), bad)


_GRACE = 60  # seconds that a worker goes on after SIGTERM, while the main process finishes its step and saves


def _worker_init(_: int) -> None:
    # Ctrl-C and a scheduler's SIGUSR1 reach the whole group; the main process finishes its step and ends the workers.
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # whose default is to end the process
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))
    torch.set_num_threads(1)


class Loader:
    """Iterates `Batch`es, measures the time spent waiting for them, and collects the unreadable files.

    Without --skip-bad an unreadable file raises BadImage.
    """

    def __init__(self, dataset: TrainImages, positions: Positions, *, workers: int, pin: bool):
        self.dataset = dataset
        self.bad: dict[str, str] = {}
        self.waited = 0.0
        loader = DataLoader(
            dataset,
            batch_sampler=positions,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin,
            worker_init_fn=_worker_init,
            prefetch_factor=4 if workers else None,
            # Under "forkserver" (the default from Python 3.14 on) workers would outlive a killed run: torch's watchdog
            # in them looks at their parent, which then is the server, and the server lives as long as they do.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        )
        self._iterator = iter(loader)  # starts the workers
        # torch's handler raises for a lost worker wherever the main thread is, in mid-step too. Without it `next` does.
        self._on_child = None
        if workers and hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
            self._on_child = signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def close(self) -> None:
        """End the workers, whatever holds on to this object, and put the signal handler back."""
        workers = getattr(self._iterator, "_workers", ())
        if workers:
            self._iterator._shutdown_workers()
        for worker in workers:
            if worker.is_alive():
                worker.kill()  # torch's terminate() would wait for `_GRACE`
        self._iterator = iter(())
        if self._on_child is not None:
            signal.signal(signal.SIGCHLD, self._on_child)
            self._on_child = None

    def next(self) -> Batch:
        began = time.perf_counter()
        try:
            batch = next(self._iterator)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise TrainError(
                f"a process that loads images was lost, killed for its memory perhaps (fewer --workers, a smaller "
                f"--cache-mb): {error}"
            ) from error
        self.waited += time.perf_counter() - began
        self.bad.update(batch.bad)
        if not len(batch.images):
            path, reason = batch.bad[0]
            if self.dataset.skip_bad:
                raise TrainError(f"none of the {len(self.dataset)} images can be read; the first: {path}: {reason}")
            raise BadImage(path, reason, SKIP_BAD)
        return batch


def normaliser(channels: int, device: torch.device | str = "cpu"):
    """(mean, std) as float32 [C, 1, 1] on the 0..1 scale, for colour or grey images."""
    if channels not in (1, 3):
        raise TrainError(f"image files give 1 or 3 channels; the model wants {channels}")
    mean, std = (MEAN, STD) if channels == 3 else (GREY_MEAN, GREY_STD)
    return tuple(torch.tensor(v, dtype=torch.float32, device=device).view(-1, 1, 1) for v in (mean, std))


def normalise(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """uint8 or uint16 [B, C, H, W] -> float32, (images / 255 - mean) / std; 65535 for sixteen bits."""
    white = 65535 if images.dtype is torch.uint16 else 255
    return images.to(torch.float32).div_(white).sub_(mean).div_(std)
