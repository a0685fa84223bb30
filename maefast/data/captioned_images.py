"""Images with captions: files beside each other, token ids or text for a tokenizer of transformers; drawn shapes and
what they are as a demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maefast.data import shapes
from maefast.data.arrays import load_array
from maefast.data.blob import Where
from maefast.data.collection import DEMO, Collection, Files, Made
from maefast.data.cropped import Cropped
from maefast.errors import ConfigError, need
from maefast.ops import _checks
from maefast.recipe import Batch

SPECIAL, PADDING = -1, -2  # in the place of the number of a word
_DRAWN = 2000  # samples of the demo


@dataclass
class CaptionBatch(Batch):
    """images: uint8 [B, 3, H, W]. ids: int64 [B, L], the tokens of each caption, a first special one (the class token)
    included; what lies beyond a caption may hold anything. words: int64 [B, L] on the host, the number of the word that
    a token is a part of, from 0; -1 for special tokens, -2 for what lies beyond."""

    images: Tensor
    ids: Tensor
    words: np.ndarray


class Captioned(NamedTuple):
    """What is read: pixels uint8 [H, W, 3], ids and words int64 [n]."""

    image: np.ndarray
    ids: np.ndarray
    words: np.ndarray


@dataclass(frozen=True)
class CaptionedImages:
    """A recipe wants `CaptionBatch`es: images of `size` (H, W), captions of up to `length` L tokens below `vocabulary`.

    `--data` names a folder: beside each image lies its caption, of the same name with another ending: .txt, a text,
    where a `tokenizer` is named, or else .npy, ids int [n] (each a word of its own, the first and the last special), or
    [2, n], ids and words as in `CaptionBatch`. A longer caption is cut, its last token kept. Images are cropped around
    the centre, unless the options of the run say otherwise; captions name left and right, so nothing is flipped.

    Args:
        tokenizer: a name or folder that transformers.AutoTokenizer knows.
    """

    size: tuple[int, int] = (288, 288)
    length: int = 64
    vocabulary: int = 50265
    tokenizer: str | None = None
    unit = "image"
    options = ("crop_scale", "crop_ratio", "max_pixels")

    def __post_init__(self) -> None:
        _checks.integer("length", self.length, 3)
        _checks.integer("vocabulary", self.vocabulary, 3)

    def open(self, options: Any) -> Collection:
        kind = _Cropped(self, options)
        if options.data == DEMO:
            return Collection(kind, self._demo(), options)
        from maefast.data.images.files import EXTENSIONS

        if self.tokenizer:
            self.known  # noqa: B018 (its errors now, and not in a worker)
        read = partial(self.read, max_pixels=options.max_pixels)
        return Collection(kind, Files(options.data, EXTENSIONS, read, "images with captions", options), options)

    def check(self, batch: Any) -> None:
        """Raise unless it is a batch of such images, each with a word in its caption."""
        if not isinstance(batch, CaptionBatch):
            raise TypeError(f"a CaptionBatch is wanted, got {type(batch).__name__}")
        _checks.tensor("images", batch.images, ndim=4, floating=False)
        _checks.tensor("ids", batch.ids, ndim=2, floating=False)
        if batch.images.dtype is not torch.uint8 or tuple(batch.images.shape[1:]) != (3, *self.size):
            want = f"uint8 [B, 3, {self.size[0]}, {self.size[1]}]"
            raise ValueError(f"images must be {want}, got {batch.images.dtype} {tuple(batch.images.shape)}")
        want = (len(batch.images), self.length)
        if batch.ids.dtype is not torch.int64 or tuple(batch.ids.shape) != want:
            raise ValueError(f"ids must be int64 {list(want)}, got {batch.ids.dtype} {tuple(batch.ids.shape)}")
        words = batch.words
        if not isinstance(words, np.ndarray) or words.dtype.kind != "i":
            raise TypeError(f"words must be a numpy array of ints, got {getattr(words, 'dtype', type(words))}")
        if words.shape != want or words.min() < PADDING or words.max() >= self.length:
            raise ValueError(f"words must be {list(want)}, numbers in [-2, {self.length}), got shape {words.shape}")
        there = words > PADDING
        if not (there[:, 0].all() and (there[:, 1:] <= there[:, :-1]).all()):
            raise ValueError("words: captions begin at the first token, and padding (-2) stands behind them")
        if not (words >= 0).any(1).all():
            raise ValueError(f"words: captions {np.flatnonzero(~(words >= 0).any(1)).tolist()} have no word")
        inside = (batch.ids >= 0) & (batch.ids < self.vocabulary)
        ends = torch.from_numpy(there).to(inside.device, non_blocking=True)
        _checks.holds((inside | ~ends).all(), f"ids must lie in [0, {self.vocabulary})")

    # --- what is read

    def read(self, where: Where, max_pixels: int | None = None) -> Captioned:
        """An image and the caption beside it. ValueError, OSError: there is none, or it is something else."""
        from maefast.data.images.pixels import MAX_PIXELS, Decoder, to_array

        if not isinstance(where, Path):
            raise ValueError("captions lie beside images in a folder; lists, tars and tables are not read")
        decoder = Decoder(3, max_pixels=MAX_PIXELS if max_pixels is None else max_pixels)
        image = to_array(decoder(where), 3).transpose(1, 2, 0)
        beside = where.with_suffix(".txt" if self.tokenizer else ".npy")
        if not beside.is_file():
            raise ValueError(f"no caption {beside.name} beside it")
        told = self.tokens(beside.read_text("utf-8").strip()) if self.tokenizer else given_tokens(beside)
        return Captioned(image, *self._fitted(*told))

    def tokens(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids and words of a text."""
        found = self.known(text, truncation=True, max_length=self.length)
        words = [SPECIAL if word is None else word for word in found.word_ids()]
        return np.array(found["input_ids"]), np.array(words)

    @cached_property
    def known(self) -> Any:
        """The tokenizer. ConfigError: transformers does not know it, or it cannot tell words."""
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise need("transformers", "A tokenizer") from error
        try:
            found = AutoTokenizer.from_pretrained(self.tokenizer)
        except (OSError, ValueError) as error:
            raise ConfigError(f"tokenizer {self.tokenizer!r}: {error}") from error
        if not found.is_fast or len(found) > self.vocabulary:
            what = f"has {len(found)} tokens, more than {self.vocabulary}" if found.is_fast else "cannot tell words"
            raise ConfigError(f"tokenizer {self.tokenizer!r} {what}")
        return found

    def say(self, token: int) -> str:
        """A token in words, or its number."""
        if self.tokenizer:
            return self.known.convert_tokens_to_string([self.known.convert_ids_to_tokens(token)]).strip()
        return shapes.WORDS[token] if self.vocabulary == len(shapes.WORDS) else str(token)

    def _fitted(self, ids: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            raise ValueError(f"its caption has ids from {ids.min()} to {ids.max()}, beyond 0 to {self.vocabulary - 1}")
        if len(ids) > self.length:
            ids, words = (np.append(part[: self.length - 1], part[-1]) for part in (ids, words))
        if not (words >= 0).any():
            raise ValueError("its caption has no word")
        numbers = np.unique(words[words >= 0], return_inverse=True)[1]
        words = words.astype(np.int64)
        words[words >= 0] = numbers
        return ids.astype(np.int64), words

    def _demo(self) -> Made:
        if self.vocabulary != len(shapes.WORDS):
            raise ConfigError(f"the demo's captions have {len(shapes.WORDS)} words, not {self.vocabulary}")

        @cache
        def make(index: int) -> Captioned:
            image, ids = shapes.scene(index, max(self.size))
            return Captioned(image, *self._fitted(ids, own_words(len(ids))))

        return Made("drawn shapes with captions", _DRAWN, make, lambda index: f"scene {index}")


class _Cropped(Cropped):
    """`CaptionedImages` with the crops that the options of a run name, as a `Kind`."""

    def sample(self, raw: Captioned, rng: np.random.Generator) -> Captioned:
        return self._cut(raw, self.augment.box(raw.image.shape[1], raw.image.shape[0], rng))

    def example(self, raw: Captioned) -> Captioned:
        return self._cut(raw, self.centre(raw.image.shape[1], raw.image.shape[0]))

    def _cut(self, raw: Captioned, box: tuple[int, int, int, int]) -> Captioned:
        from maefast import ops

        out = torch.empty(3, *self.wants.size, dtype=torch.uint8)
        ops.resize(torch.from_numpy(np.ascontiguousarray(raw.image)), self.wants.size, box=box, flip=False, out=out)
        return raw._replace(image=out.numpy())

    def collate(self, samples: Sequence[Captioned], key: np.ndarray) -> CaptionBatch:
        ids = np.zeros((len(samples), self.wants.length), np.int64)
        words = np.full_like(ids, PADDING)
        for i, sample in enumerate(samples):
            ids[i, : len(sample.ids)], words[i, : len(sample.ids)] = sample.ids, sample.words
        images = torch.from_numpy(np.stack([sample.image for sample in samples]))
        return CaptionBatch(images, torch.from_numpy(ids), words, key=key)


def own_words(count: int) -> np.ndarray:
    """Each of `count` tokens a word of its own, the first and the last special."""
    words = np.arange(count) - 1
    words[[0, -1]] = SPECIAL
    return words


def given_tokens(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Ids and words of a .npy, see `CaptionedImages`. ValueError: it holds something else."""
    array = np.array(load_array(path))
    if array.dtype.kind not in "iu" or not array.size or not (array.ndim == 1 or (array.ndim == 2 and len(array) == 2)):
        raise ValueError(f"a caption is ids [n] or ids and words [2, n], not {array.dtype} {list(array.shape)}")
    ids, words = (array, own_words(len(array))) if array.ndim == 1 else array
    if words.min() < SPECIAL:
        raise ValueError(f"its caption has words from {words.min()}; special tokens are -1")
    return ids, words
