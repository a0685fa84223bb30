"""Masks by scores of tokens, frame by frame."""

from __future__ import annotations

from torch import Tensor

from maefast.masking.counts import keeps
from maefast.ops import _checks
from maefast.ops._mask_arguments import check_size
from maefast.ops.mask import TokenMask


def guided(
    scores: Tensor,
    ratio: float | None = None,
    *,
    keep: int | None = None,
    mask: str = "highest",
    rule: str = "complement",
    backend: str | None = None,
) -> TokenMask:
    """In every frame the tokens with the highest scores are masked, as many in each: TGM (Fan et al., ECCV 2024,
    arXiv:2408.00759), where the scores say how well a patch fits the caption; motion, saliency or attention do as well,
    and uniform noise makes random masking. Nothing is drawn. Tokens are ordered by position, frame by frame.

    Args:
        scores: [B, T, S], of the S tokens of each of T frames (tubelet slots). Of equal ones the token that comes first
            stays visible; NaN counts as the one to be masked. Plans have no gradient.
        ratio, keep, rule: of one frame, as in `tube`.
        mask: "highest" or "lowest" scores.

    Raises:
        TypeError, ValueError: wrong dtype or shape, a keep outside [0, S], or more than one for the batch.
    """
    _checks.tensor("scores", scores, ndim=3)
    _checks.one_of("mask", mask, ("highest", "lowest"))
    batch, frames, tokens = scores.shape
    if min(scores.shape) < 1:
        raise ValueError(f"scores must have at least one sample, frame and token, got shape {tuple(scores.shape)}")
    check_size(batch, frames * tokens)
    count = keeps(tokens, ratio, keep, rule)
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError("guided masking takes one ratio or keep (an int) for the whole batch")
    ordered = scores.detach() if mask == "highest" else -scores.detach()
    rank = TokenMask.from_scores(ordered.flatten(0, 1), count, backend=backend).ids_restore
    return TokenMask.from_scores(rank.view(batch, -1).float(), frames * count, order="position", backend=backend)
