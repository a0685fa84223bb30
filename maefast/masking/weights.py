"""Sampling in proportion to weights, and several plans, or a group of samples, from one permutation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maefast.masking.counts import drawn, keeps
from maefast.masking.scales import wide
from maefast.ops import _checks
from maefast.ops._mask_arguments import check_map, check_size
from maefast.ops.mask import TokenMask


def weighted(
    weights: Tensor,
    ratio: float | Sequence[float] | None = None,
    *,
    keep: int | Sequence[int] | Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    rule: str = "floor",
    order: str = "score",
    backend: str | None = None,
) -> TokenMask:
    """Visible tokens are drawn one by one without replacement, in proportion to weights, as ``torch.multinomial``
    does: MaskAlign (Xue et al., 2023), where the weights are a teacher's attention.

    Each token waits for an exponential time of rate `weight`, and the first `keep` are visible (Efraimidis and
    Spirakis, 2006). Tokens of weight zero come after all others, in uniformly random order among themselves; a row of
    zeros is sampled uniformly.

    Args:
        weights: [B, N], finite, >= 0; need not sum to one. Plans have no gradient.
        ratio, keep, rule, order: as in `random`.
        noise: [B, N], uniform in [0, 1), used instead of drawing.

    Raises:
        ValueError: a weight that is negative or not finite (on a GPU as a device-side assertion, without a sync).
    """
    _checks.tensor("weights", weights, ndim=2)
    check_map("weights", weights)
    count = keeps(weights.shape[1], ratio, keep, rule)
    noise = drawn(noise, tuple(weights.shape), generator, weights.device)
    _checks.same_device(weights=weights, noise=noise)
    weights, noise = wide(weights.detach()), noise.detach().float()
    noise = noise.clamp(max=1 - 2**-24)  # float64 may have rounded to 1, whose wait is infinite, the rank of a zero
    _checks.holds(torch.isfinite(weights) & (weights >= 0), "weights must be finite and not negative")
    # In logarithms, which stay below 800 for any float64, so that no small weight overflows to the rank of a zero.
    waits = torch.log(-torch.log1p(-noise)) - torch.log(weights).float()
    scores = torch.where(weights > 0, waits, 1000 * (1 + noise))
    return TokenMask.from_scores(scores, count, order=order, backend=backend)


def disjoint(
    batch: int,
    num_tokens: int,
    ratio: float | None = None,
    *,
    views: int = 2,
    step: int | None = None,
    keep: int | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    rule: str = "floor",
    order: str = "score",
    backend: str | None = None,
) -> list[TokenMask]:
    """Plans that share no visible token: view i keeps the i-th run of `keep` tokens of one random permutation of each
    sample. LUT (arXiv 2310.13593), two views; DMJD (arXiv 2301.00230).

    Args:
        batch, num_tokens: B, N. ratio, keep, rule, order: as in `random`, one for all samples and views.
        views: how many plans.
        step: how much further along the permutation each view begins. None: `keep`. With less, the next view sees
            keep - step tokens again, as DMJD does where not every token is to be masked in one of two views.
        noise: [B, N]; its order is the permutation, so that view 0 is the plan of `random`.

    Raises:
        ValueError: views x keep exceeds num_tokens (with a step, what the last view ends at); step beyond keep.
    """
    check_size(batch, num_tokens)
    _checks.integer("views", views, 1)
    count = keeps(num_tokens, ratio, keep, rule)
    _checks.integer("keep", count)
    if step is None:
        step = count
        if views * count > num_tokens:
            raise ValueError(f"views x keep must not exceed num_tokens, got {views} x {count} > {num_tokens}")
    _checks.integer("step", step)
    if step > count or (views - 1) * step + count > num_tokens:
        raise ValueError(
            f"step must not exceed keep, nor (views - 1) x step + keep num_tokens, got {step} with {views} views of"
            f" {count} of {num_tokens}"
        )
    noise = drawn(noise, (batch, num_tokens), generator, device)
    rank = TokenMask.from_scores(noise, num_tokens, backend=backend).ids_restore
    return [
        TokenMask.from_scores(((rank - i * step) % num_tokens).float(), count, order=order, backend=backend)
        for i in range(views)
    ]


def mixing(
    batch: int,
    num_tokens: int,
    group: int = 4,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    order: str = "score",
    backend: str | None = None,
) -> TokenMask:
    """Each place is visible in one sample of a group, chosen at random, N / group places in each: the samples of a
    group are mixed into one that is whole. MixedAE (arXiv 2303.17152).

    Groups are samples that follow each other. The first of a group keeps the first run of a random permutation of the
    places, the next one the next run, and so on.

    Args:
        batch, num_tokens: B, N. group: samples in a group, divides both.
        noise: [B / group, N]; its order is the permutation of each group. order: see `token_mask`.

    Raises:
        ValueError: group does not divide batch and num_tokens.
    """
    check_size(batch, num_tokens)
    _checks.integer("group", group, 1)
    if batch % group or num_tokens % group:
        raise ValueError(f"group must divide batch and num_tokens, got {group} for {batch} and {num_tokens}")
    noise = drawn(noise, (batch // group, num_tokens), generator, device)
    rank, keep = TokenMask.from_scores(noise, num_tokens, backend=backend).ids_restore, num_tokens // group
    starts = torch.arange(group, device=rank.device)[:, None] * keep
    scores = ((rank[:, None] - starts) % num_tokens).flatten(0, 1).float()
    return TokenMask.from_scores(scores, keep, order=order, backend=backend)
