"""Masks of point clouds."""

from __future__ import annotations

import torch
from torch import Tensor

from maefast.masking.counts import drawn, keeps
from maefast.masking.scales import scaled, wide
from maefast.ops import _checks
from maefast.ops._mask_arguments import check_map, check_size
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
    centres = wide(centres.detach())
    first = centres.gather(1, chosen[:, None, None].expand(batch, 1, 3))
    away = scaled(centres - first, (1, 2)).square().sum(2)
    # The chosen group itself goes first even where others share its place.
    away = away.scatter(1, chosen[:, None], -1.0)
    return TokenMask.from_scores(-away, count, order="position", backend=backend)


def children(
    plan: TokenMask,
    index: Tensor,
    num_tokens: int,
    *,
    bug_compat: bool = False,
    backend: str | None = None,
) -> TokenMask:
    """The plan of a finer scale: what belongs to a visible group is visible, all else is masked (Point-M2AE, Zhang et
    al., 2022; I2P-MAE, Zhang et al., 2023). Groups overlap, so that samples see different numbers of tokens, whose
    count costs a sync on a GPU. Tokens are ordered by position.

    Args:
        plan: of G groups. index: int64 [B, G, K], which of the finer scale's tokens belong to each, as
            `maefast.nn.point_groups.PointScales` has it.
        num_tokens: N of the finer scale.
        bug_compat: as the authors' code does, token 0 of sample 0 is visible too wherever a group of any sample is
            masked.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit; a position outside [0, num_tokens) (on a GPU as a
        device-side assertion).
    """
    if not isinstance(plan, TokenMask):
        raise TypeError(f"plan must be a maefast.ops.TokenMask, got {type(plan).__name__}")
    _checks.tensor("index", index, ndim=3, floating=False)
    if index.dtype is not torch.int64:
        raise TypeError(f"index must be int64, got {index.dtype}")
    if tuple(index.shape[:2]) != (plan.batch, plan.num_tokens) or index.shape[2] < 1:
        raise ValueError(f"index must be [{plan.batch}, {plan.num_tokens}, K] for this plan, got {list(index.shape)}")
    _checks.same_device(index=index, plan=plan.slot)
    _checks.integer("num_tokens", num_tokens, 1)
    check_size(plan.batch, num_tokens)
    bug_compat = _checks.flag("bug_compat", bug_compat)
    inside = (index >= 0) & (index < num_tokens)
    _checks.holds(inside, f"index: a position lies outside [0, {num_tokens})")
    seen = (plan.slot >= 0).view(plan.batch, plan.num_tokens, 1)
    # What belongs to masked groups goes to a column that is dropped, so that no two writes disagree.
    index = torch.where(seen & inside, index, num_tokens).flatten(1)
    masked = torch.ones(plan.batch, num_tokens + 1, dtype=torch.bool, device=index.device)
    masked = masked.scatter(1, index, False)[:, :num_tokens]
    if bug_compat and plan.total_masked:
        masked = masked.clone()
        masked[0, 0] = False
    return TokenMask.from_bool(masked.contiguous(), backend=backend)
