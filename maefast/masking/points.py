"""Masks of point clouds."""

from __future__ import annotations

import torch
from torch import Tensor

from maefast.masking.counts import drawn, keeps
from maefast.ops import _checks
from maefast.ops._mask_arguments import check_map
from maefast.ops.mask import TokenMask


def near(
    centres: Tensor,
    ratio: float | None = None,
    *,
    keep: int | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    rule: str = "complement",
    backend: str | None = None,
) -> TokenMask:
    """The groups nearest to a random one of each sample are masked, itself included: the block masking of Point-MAE
    (Pang et al., 2022). Tokens are ordered by position.

    Args:
        centres: [B, G, 3], of the groups, in any unit.
        ratio, keep, rule: as in `random`; Point-MAE masks int(ratio * G).
        noise: [B], uniform in [0, 1): which group.
    """
    _checks.tensor("centres", centres, ndim=3)
    batch, groups, axes = centres.shape
    if axes != 3:
        raise ValueError(f"centres must have shape [B, G, 3], got {list(centres.shape)}")
    check_map("centres", centres[..., 0])
    count = keeps(groups, ratio, keep, rule)
    noise = drawn(noise, (batch,), generator, centres.device)
    _checks.same_device(centres=centres, noise=noise)
    chosen = (noise.detach().float() * groups).long().clamp(0, groups - 1)
    centres = centres.detach().float()
    first = centres.gather(1, chosen[:, None, None].expand(batch, 1, 3))
    away = (centres - first).square().sum(2)
    # The chosen group itself goes first even where others share its place.
    away = away.scatter(1, chosen[:, None], -1.0)
    return TokenMask.from_scores(-away, count, order="position", backend=backend)
