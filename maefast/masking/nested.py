"""Two thresholds on one noise: tokens that are dropped, and more that are hidden."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maefast.masking.counts import drawn
from maefast.ops import _checks
from maefast.ops._mask_arguments import check_size
from maefast.ops.mask import TokenMask


class Nested(NamedTuple):
    """plan: the kept tokens are visible, in order of position, the dropped ones masked. hidden: bool [B, N], those that
    are hidden: all dropped ones, and some of the kept."""

    plan: TokenMask
    hidden: Tensor


def nested(
    batch: int,
    num_tokens: int,
    drop: int,
    hide: int,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Nested:
    """The `drop` tokens of lowest noise are dropped, the `hide` of lowest noise hidden (Vec2Face, Wu et al., 2025).

    Args:
        batch: B. num_tokens: N. drop, hide: 0 <= drop <= hide <= N, at least one token is kept. noise: [B, N], finite.

    Raises:
        TypeError, ValueError: numbers or shapes that do not fit.
    """
    check_size(batch, num_tokens)
    _checks.integer("drop", drop)
    _checks.integer("hide", hide)
    if not drop <= hide <= num_tokens or drop == num_tokens:
        raise ValueError(f"drop {drop} and hide {hide} must rise to num_tokens {num_tokens}, and one token be kept")
    scores = drawn(noise, (batch, num_tokens), generator, device).detach()
    # The plan keeps the lowest scores. Ranks break ties as the plan does not have to.
    rank = scores.argsort(dim=1, stable=True).argsort(dim=1)
    plan = TokenMask.from_scores(-rank.float(), num_tokens - drop, order="position", backend=backend)
    return Nested(plan, rank < hide)
