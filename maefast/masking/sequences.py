"""Masks of sequences of different lengths; what lies beyond a length is absent from the plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.masking.counts import drawn, fixed, keep_count
from maefast.masking.scales import scaled
from maefast.ops import _checks
from maefast.ops._mask_arguments import check_size, counts_of, integers
from maefast.ops.mask import TokenMask


def ragged(
    lengths: Sequence[int] | Tensor,
    num_tokens: int,
    ratio: float,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    rule: str = "floor",
    order: str = "score",
    backend: str | None = None,
) -> TokenMask:
    """Uniformly random tokens of each sequence are masked: keep_count(length, ratio) stay (LV-MAE, arXiv 2504.03501).

    Args:
        lengths: B ints in [0, num_tokens]; a tensor on a GPU costs a sync. num_tokens: L, padding included.
        noise: [B, L], finite within the lengths. rule, order: as in `random`.
    """
    lengths = _lengths(lengths, num_tokens)
    check_size(len(lengths), num_tokens)
    scores = drawn(noise, (len(lengths), num_tokens), generator, device).detach()
    return _within(scores, lengths, ratio, rule, order, backend)


def similar(
    x: Tensor,
    lengths: Sequence[int] | Tensor,
    ratio: float,
    *,
    order: str = "paper",
    rule: str = "floor",
    backend: str | None = None,
) -> TokenMask:
    """Masked by likeness (cosine) to the segment before, LV-MAE's semantic masking (arXiv 2504.03501). Nothing is
    drawn. Tokens are ordered by position.

    Args:
        x: [B, L, D], embeddings; what is beyond the lengths is not looked at.
        lengths, rule: as in `ragged`.
        order: "paper" masks the segments least like the one before, "release" (the published code) keeps those. The
            first segment, which has none before it, is the last to be masked in both.
    """
    _checks.tensor("x", x, ndim=3)
    _checks.one_of("order", order, ("paper", "release"))
    if min(x.shape) < 1:
        raise ValueError(f"x must have at least one sample, segment and feature, got shape {list(x.shape)}")
    check_size(*x.shape[:2])
    lengths = _lengths(lengths, x.shape[1])
    if len(lengths) != x.shape[0]:
        raise ValueError(f"lengths has {len(lengths)} numbers for a batch of {x.shape[0]}")
    x = scaled(x.detach(), 2)
    likeness = torch.nan_to_num(F.cosine_similarity(x[:, 1:], x[:, :-1], dim=2))
    scores = F.pad(likeness if order == "release" else -likeness, (1, 0), value=-2.0)
    return _within(scores, lengths, ratio, rule, "position", backend)


def _lengths(lengths: object, num_tokens: int) -> list[int]:
    _checks.integer("num_tokens", num_tokens, 1)
    if isinstance(lengths, Tensor):
        if lengths.ndim != 1:
            raise ValueError(f"lengths must have one dimension, got shape {list(lengths.shape)}")
    elif not isinstance(lengths, (list, tuple)):
        raise TypeError(f"lengths must be ints or a tensor of them, got {type(lengths).__name__}")
    if not len(lengths):
        raise ValueError("lengths must name at least one sample")
    count = len(lengths)
    each = counts_of(lengths, count, num_tokens, name="lengths")
    return each if isinstance(each, list) else [each] * count


def _within(scores: Tensor, lengths: list[int], ratio: float, rule: str, order: str, backend) -> TokenMask:
    keep = [keep_count(length, ratio, rule) for length in lengths]
    hide = [length - count for length, count in zip(lengths, keep)]
    fixed("lengths", lengths)
    position = torch.arange(scores.shape[1], device=scores.device)
    inside = position < integers(lengths, scores.device)[:, None]
    scores = torch.where(inside, scores, float("inf"))
    return TokenMask.from_scores(scores, keep, hide=hide, order=order, backend=backend)
