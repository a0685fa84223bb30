"""Uniformly random tokens, tubes of them, and cells of a map of a convnet."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from maefast.masking.counts import drawn, fixed, keeps
from maefast.ops import _checks
from maefast.ops._mask_arguments import check_size
from maefast.ops.cells import CellMask
from maefast.ops.mask import TokenMask


def random(
    batch: int,
    num_tokens: int,
    ratio: float | Sequence[float] | None = None,
    *,
    keep: int | Sequence[int] | Tensor | None = None,
    hide: int | Sequence[int] | Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    rule: str = "floor",
    order: str = "score",
    backend: str | None = None,
) -> TokenMask:
    """Uniformly random tokens are masked.

    The noise is ``torch.rand(batch, num_tokens, device=device)``, the draw that facebookresearch/mae makes, and the
    visible tokens come in noise order, so the same seed gives the same ``ids_keep`` and ``ids_restore``.

    Args:
        batch, num_tokens: B, N.
        ratio: share of tokens masked, one for all or one a sample. keep: or the visible count(s).
        hide: how many of the others are masked, the rest being absent; None: all. See `token_mask`.
        noise: [B, N], used instead of drawing.
        rule: see `keep_count`. order: see `token_mask`.
    """
    check_size(batch, num_tokens)
    scores = drawn(noise, (batch, num_tokens), generator, device)
    if hide is not None:
        fixed("hide", hide)
    return TokenMask.from_scores(scores, keeps(num_tokens, ratio, keep, rule), hide=hide, order=order, backend=backend)


def tube(
    batch: int,
    frames: int,
    tokens_per_frame: int,
    ratio: float | None = None,
    *,
    keep: int | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    rule: str = "complement",
    backend: str | None = None,
) -> TokenMask:
    """The same positions are masked in every frame (tubelet slot); tokens are ordered by position, time first.

    Args:
        frames, tokens_per_frame: T', S; the plan has N = T' * S tokens.
        ratio, keep: of one frame. VideoMAE's default rule keeps S - int(ratio * S).
        noise: [B, S].
    """
    for name, value in (("batch", batch), ("frames", frames), ("tokens_per_frame", tokens_per_frame)):
        _checks.integer(name, value, 1)
    if batch * frames * tokens_per_frame >= 2**31:
        raise ValueError(f"batch x frames x tokens_per_frame must stay below 2**31, got {batch} x {frames} x ...")
    scores = drawn(noise, (batch, tokens_per_frame), generator, device)
    count = keeps(tokens_per_frame, ratio, keep, rule)
    if not isinstance(count, int):
        raise TypeError("tube masking takes one ratio or keep (an int) for the whole batch")
    # Ranks instead of the noise itself: two equal noise values must not split a tube at the threshold.
    rank = TokenMask.from_scores(scores, count, backend=backend).ids_restore.float()
    scores = rank[:, None, :].expand(batch, frames, tokens_per_frame).reshape(batch, -1)
    return TokenMask.from_scores(scores, frames * count, order="position", backend=backend)


def cells(
    batch: int,
    grid_size: Sequence[int],
    ratio: float | Sequence[float] | None = None,
    *,
    keep: int | Sequence[int] | Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    rule: str = "round",
    backend: str | None = None,
) -> CellMask:
    """Random cells of a grid are masked: the plan of a masked convnet. Cells are ordered by position.

    Args:
        grid_size: (GH, GW), for example (7, 7) for cells of 32 x 32 pixels at 224; (GD, GH, GW) of volumes. ratio,
            keep, noise [B, cells of the grid], generator, rule: as in `random`; SparK rounds the count, FCMAE takes
            "floor".
    """
    grid_size = _checks.grid("grid_size", grid_size, solid=True)
    plan = random(
        batch,
        math.prod(grid_size),
        ratio,
        keep=keep,
        noise=noise,
        generator=generator,
        device=device,
        rule=rule,
        order="position",
        backend=backend,
    )
    return CellMask(plan, grid_size)
