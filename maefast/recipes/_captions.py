"""What recipes of images with captions share: who is hidden, who is shown with whom, and captions in words."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from maefast import masking
from maefast.data.captioned_images import PADDING, CaptionBatch, CaptionedImages
from maefast.nn import Packing
from maefast.ops import TokenMask
from maefast.recipe import Draw


@dataclass(frozen=True)
class Pairs:
    """B captions stand packed, T tokens in all: those with hidden words, and the whole ones behind them.

    Attributes:
        image: of the patches. text: of one half, B captions; texts: of both, 2 B. ids, places: int64 [2 T], tokens and
            where each stands in its caption, from 0.
        rows: int64 [W + B], the W hidden tokens, then the first of each whole caption; telling: how many of them each
            of the 2 B has. image_of: int64 [B], the image that a whole caption is shown with.
    """

    image: TokenMask
    text: Packing
    texts: Packing
    ids: Tensor
    places: Tensor
    rows: Tensor
    telling: Packing
    image_of: Tensor


@dataclass(frozen=True)
class Told:
    """ids: int64 [W], what the hidden tokens were. matched: int64 [B], 1 where a caption has its own image."""

    ids: Tensor
    matched: Tensor


def packed(batch: CaptionBatch) -> tuple[Tensor, Tensor, Packing]:
    """ids and places, int64 [T], of captions, and where each begins."""
    there, device = batch.words > PADDING, batch.ids.device
    at = send(np.flatnonzero(there), device)
    return batch.ids.flatten()[at], at.remainder(there.shape[1]), Packing.of_lengths(there.sum(1), device)


def pairs(
    batch: CaptionBatch, draw: Draw, image: TokenMask, mask_id: int, vocabulary: int, ratio: float, whole: bool
) -> tuple[Pairs, Told]:
    """Words are hidden as `masking.whole_words` says, or, where not `whole`, tokens; exactly half of the captions
    keep their image, the others get another one of the batch. A caption that is alone has no other."""
    (count, length), device = batch.words.shape, batch.ids.device
    there, lengths = batch.words > PADDING, (batch.words > PADDING).sum(1)
    words = batch.words if whole else np.where(batch.words < 0, batch.words, np.arange(length))
    hidden = masking.whole_words(words, ratio, noise=draw.uniform("words", length))
    noise = draw.uniform("replace", 2 * length, device)
    shown = masking.replaced(batch.ids, send(hidden, device), mask_id, vocabulary, noise=noise)
    noise, one = draw.uniform("matched", 2).double(), torch.arange(count)
    own = noise[:, 0].argsort().argsort() < max(count // 2, count == 1)
    other = (one + 1 + (noise[:, 1] * (count - 1)).long()) % count
    ids, places, text = packed(batch)
    covered, *_ = packed(CaptionBatch(batch.images, shown, batch.words))
    told = np.flatnonzero(hidden.numpy()[there])
    firsts = 2 * lengths.sum() - lengths[::-1].cumsum()[::-1]
    plan = Pairs(
        image=image,
        text=text,
        texts=Packing.of_lengths([*lengths, *lengths], device),
        ids=torch.cat([covered, ids]),
        places=places.repeat(2),
        rows=send(np.concatenate([told, firsts]), device),
        telling=Packing.of_lengths([*hidden.sum(1).tolist(), *[1] * count], device),
        image_of=send(torch.where(own, one, other), device),
    )
    return plan, Told(ids[plan.rows[: len(told)]], send(own.long(), device))


def send(values: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """From the host, which does not wait."""
    return torch.as_tensor(values).to(device, non_blocking=True)


def said(wants: CaptionedImages, plan: Pairs, found: Tensor) -> list[str]:
    """Captions in words, [hidden: found] in brackets; found: int64 [W], tokens."""
    words = [wants.say(token) for token in plan.ids[len(plan.ids) // 2 :].tolist()]
    for row, token in zip(plan.rows.tolist(), found.tolist()):
        words[row] = f"[{words[row]}: {wants.say(token)}]"
    ends = plan.text.cu_seqlens.tolist()
    return [" ".join(words[a + 1 : b - 1]) for a, b in pairwise(ends)]


def frequencies(ids: Tensor, vocabulary: int, like: Tensor) -> Tensor:
    """Logits [W, vocabulary] of tokens as often as they are among `ids` [W]."""
    counts = torch.bincount(ids, minlength=vocabulary).to(like.dtype)
    return (counts / len(ids)).log().expand(len(ids), -1)
