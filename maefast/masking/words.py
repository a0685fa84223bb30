"""Which words of texts are hidden. Nothing is dropped: a hidden token is replaced, so that this is no plan."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maefast.masking.counts import drawn
from maefast.ops import _checks


def whole_words(
    words: np.ndarray | Tensor,
    ratio: float,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Words are hidden whole (BERT, Devlin et al., 2019): in random order, each that still fits into
    ``max(1, round(ratio * tokens))`` hidden tokens, tokens being those of the text with its special ones. Where none
    fits, the first of the order is hidden nevertheless, so that a text with words has something to say.

    Args:
        words: int [B, L], the number of the word that a token is a part of, in [0, L); -1 special, never hidden; -2
            padding. On the host, where all of this runs.
        ratio: in [0, 1]. noise: [B, L] on the host; that of a word is in the column of its number, the lowest first.

    Returns:
        bool [B, L] on the host, True: hidden.

    Raises:
        TypeError, ValueError: shapes, dtypes or values do not fit.
    """
    words = _words(words)
    _checks.number("ratio", ratio)
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must lie in [0, 1], got {ratio}")
    scores = drawn(noise, tuple(words.shape), generator, None).detach()
    if scores.device.type != "cpu":
        raise ValueError(f"noise must be on the host, as the words are, got {scores.device}")
    hidden = np.zeros(words.shape, bool)
    for row, mask, order in zip(words, hidden, scores.argsort(1).numpy()):
        parts = np.bincount(row[row >= 0], minlength=len(row))
        left = max(1, round(ratio * int((row > -2).sum())))
        there = order[parts[order] > 0]
        chosen = []
        for word in there:
            if parts[word] <= left:
                chosen.append(word)
                left -= parts[word]
            if not left:
                break
        mask[:] = np.isin(row, chosen or there[:1])
    return torch.from_numpy(hidden)


def replaced(ids: Tensor, hidden: Tensor, mask_id: int, vocabulary: int, *, noise: Tensor) -> Tensor:
    """Hidden tokens as a model sees them (BERT): eight of ten are the token `mask_id`, one is any token, one itself.

    Args:
        ids: int64 [B, L]. hidden: bool [B, L]. noise: [B, 2 L] in [0, 1), for what becomes of a token and which any
            token is.

    Returns:
        int64 [B, L]; nothing waits for the device.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit.
    """
    _checks.integer("vocabulary", vocabulary, 1)
    _checks.integer("mask_id", mask_id)
    if mask_id >= vocabulary:
        raise ValueError(f"mask_id must lie in [0, vocabulary {vocabulary}), got {mask_id}")
    for name, value, dtype in (("ids", ids, torch.int64), ("hidden", hidden, torch.bool)):
        _checks.tensor(name, value, ndim=2, floating=False)
        if value.dtype is not dtype:
            raise TypeError(f"{name} must be {dtype}, got {value.dtype}")
    _checks.tensor("noise", noise, ndim=2)
    _checks.same_device(ids=ids, hidden=hidden, noise=noise)
    if hidden.shape != ids.shape or tuple(noise.shape) != (len(ids), 2 * ids.shape[1]):
        raise ValueError(f"hidden and noise must be [B, L] and [B, 2 L] for ids {list(ids.shape)}")
    kind, which = noise.detach().split(ids.shape[1], 1)
    some = torch.where(kind < 0.9, (which * vocabulary).long().clamp(0, vocabulary - 1), ids)
    return torch.where(hidden, some.masked_fill(kind < 0.8, mask_id), ids)


def _words(words: object) -> np.ndarray:
    if isinstance(words, Tensor):
        _checks.tensor("words", words, ndim=2, floating=False)
        if words.is_floating_point() or words.is_complex():
            raise TypeError(f"words must be integers, got {words.dtype}")
        if words.device.type != "cpu":
            raise ValueError(f"words must be on the host, got {words.device}")
        words = words.numpy()
    if not isinstance(words, np.ndarray):
        raise TypeError(f"words must be an array or a tensor, got {type(words).__name__}")
    if words.dtype.kind not in "iu":
        raise TypeError(f"words must be integers, got {words.dtype}")
    if words.ndim != 2 or not words.size:
        raise ValueError(f"words must be [B, L] with at least one token, got shape {list(words.shape)}")
    if words.min() < -2 or words.max() >= words.shape[1]:
        raise ValueError(f"words must lie in [-2, {words.shape[1]}), got {words.min()} to {words.max()}")
    return words
