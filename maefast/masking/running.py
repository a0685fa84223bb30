"""Dual masking of video: few positions are encoded, and only a part of the others is decoded."""

from __future__ import annotations

import torch
from torch import Tensor

from maefast.masking.counts import drawn
from maefast.masking.uniform import tube
from maefast.ops import _checks
from maefast.ops.mask import ABSENT, TokenMask


def running_cells(
    batch: int,
    frames: int,
    grid_size: tuple[int, int],
    ratio: float = 0.5,
    *,
    path: str = "clockwise",
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """VideoMAE V2's choice of what is decoded (Wang et al., 2023): in each cell of 2 x 2 positions two that follow one
    another on a path through the cell, moved by one step each frame, from one of four starts a sample.

    Args:
        frames, grid_size: T' tubelet frames of (rows, columns) positions, both even.
        ratio: share that is not decoded: 0, 0.25, 0.5 or 0.75.
        path: "clockwise", so that two are neighbours and rotate; or "rows", top left, top right, bottom left, bottom
            right, and moved backwards: the authors' code, in which rows and diagonals take turns.
        noise: [B] or [B, 1], uniform in [0, 1): the start.

    Returns:
        bool [B, T', rows, columns], True where decoded. In 4 frames in a row each position is decoded 4 x (1 - ratio)
        times, whatever the start.
    """
    _checks.integer("batch", batch, 1)
    _checks.integer("frames", frames, 1)
    height, width = _checks.grid("grid_size", grid_size)
    if height % 2 or width % 2:
        raise ValueError(f"grid_size must be even, whole cells of 2 x 2, got {(height, width)}")
    if batch * frames * height * width >= 2**31:
        raise ValueError(f"batch x frames x grid_size must stay below 2**31, got {batch} x {frames} x {grid_size}")
    decoded = _decoded(ratio)
    _checks.one_of("path", path, ("clockwise", "rows"))
    if isinstance(noise, Tensor) and noise.ndim == 2 and noise.shape[1] == 1:
        noise = noise[:, 0]
    noise = drawn(noise, (batch,), generator, device).detach()
    start = (noise.float() * 4).long().clamp(0, 3)
    row = torch.arange(height, device=noise.device)[:, None] % 2
    column = torch.arange(width, device=noise.device) % 2
    step = torch.arange(frames, device=noise.device)[:, None, None] + start[:, None, None, None]
    if path == "rows":
        return (2 * row + column + step + 1) % 4 >= 4 - decoded
    turn = torch.where(row == 0, column, 3 - column)  # 0 1 / 3 2
    return (turn - step) % 4 < decoded


def _decoded(ratio: object) -> int:
    """Positions of a cell."""
    _checks.number("ratio", ratio)
    if ratio not in (0, 0.25, 0.5, 0.75):
        raise ValueError(f"ratio must be 0, 0.25, 0.5 or 0.75 (of the four positions of a cell), got {ratio}")
    return 4 - int(4 * ratio)


def only(plan: TokenMask, chosen: Tensor, *, hide: int | None = None, backend: str | None = None) -> TokenMask:
    """`plan`, of whose masked tokens those not chosen become absent. Tokens are ordered by position.

    Args:
        chosen: bool [B, N] or of any shape [B, ...] with N positions, True where a masked token stays so.
        hide: how many stay masked in every sample, where that is known; otherwise counting them costs a sync.

    Raises:
        ValueError: another shape or device; a `hide` that does not match (on a GPU as a device-side assertion).
    """
    if not isinstance(plan, TokenMask):
        raise TypeError(f"plan must be a TokenMask, got {type(plan).__name__}")
    _checks.tensor("chosen", chosen, floating=False)
    if chosen.dtype is not torch.bool:
        raise TypeError(f"chosen must be bool, got {chosen.dtype}")
    if chosen.ndim < 2 or chosen.shape[0] != plan.batch or chosen[:1].numel() != plan.num_tokens:
        raise ValueError(
            f"chosen must hold {plan.batch} samples of {plan.num_tokens} positions, got {list(chosen.shape)}"
        )
    _checks.same_device(chosen=chosen, plan=plan.slot)
    slot = plan.slot.view(plan.batch, plan.num_tokens)
    masked = (slot < 0) & (slot != ABSENT)
    absent = (slot == ABSENT) | (masked & ~chosen.flatten(1))
    return TokenMask.from_bool(masked, plan.keep, absent=absent, hide=hide, backend=backend)


def dual(
    batch: int,
    frames: int,
    grid_size: tuple[int, int],
    ratio: float = 0.9,
    decoder_ratio: float = 0.5,
    *,
    path: str = "clockwise",
    noise: Tensor | None = None,
    cell_noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> TokenMask:
    """VideoMAE V2's dual masking as one plan: visible = the encoder's tubes, masked = decoded and not visible, absent
    = the rest.

    Over a multiple of four frames every position is decoded equally often, so the masked count is known and the same
    for all samples: nothing waits for the device. For other numbers of frames it is counted (one sync on a GPU).

    Args:
        frames, grid_size, decoder_ratio, path: as in `running_cells`. ratio: as in `tube`.
        noise: [B, rows * columns], of the tubes. cell_noise: [B], the start. A draw takes `noise` first.
    """
    height, width = _checks.grid("grid_size", grid_size)
    if generator is not None and (noise is not None or cell_noise is not None):
        raise ValueError("give `noise` and `cell_noise`, or `generator`, not both")
    decoded = _decoded(decoder_ratio)
    plan = tube(batch, frames, height * width, ratio, noise=noise, generator=generator, device=device, backend=backend)
    draw = {"noise": cell_noise, "generator": generator, "device": plan.device}
    chosen = running_cells(batch, frames, (height, width), decoder_ratio, path=path, **draw)
    hide = (plan.num_tokens - plan.keep) * decoded // 4 if frames % 4 == 0 else None
    return only(plan, chosen, hide=hide, backend=backend)
