"""Masks of images with channels of their own tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from maefast.masking.counts import drawn, keep_count
from maefast.ops import _checks
from maefast.ops._mask_arguments import check_size
from maefast.ops.mask import TokenMask


def channels(
    batch: int,
    num_channels: int,
    num_patches: int,
    ratio: float = 0.75,
    *,
    mode: str = "patch",
    shared: bool = False,
    present: Tensor | None = None,
    noise: Tensor | None = None,
    channel_noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> TokenMask:
    """ChA-MAEViT's masks (NeurIPS 2025): patches of each channel, whole channels, or both. Tokens are channel by
    channel, N = C * P, and ordered by position.

    "patch" keeps floor((1 - ratio) * P) patches of each channel, drawn apart. "channel" removes k ~ U{0..C-1} whole
    channels, C being the present ones, and ignores ratio. "both" removes what either does. Counts are known on the
    host in "patch" without `present`; the others count them, one sync on a GPU.

    Args:
        num_channels, num_patches: C, P.
        shared: one set of removed channels for the batch, not one a sample; not with `present`.
        present: bool [B, C]; the tokens of other channels are absent. A sample needs one present.
        noise: [B, C, P], of the patches.
        channel_noise: [B, C+1], or [1, C+1] if shared, uniform in [0, 1): k, then the order of the channels.
            A draw takes `noise` first, if the mode has it.
    """
    _checks.integer("num_channels", num_channels, 1)
    _checks.integer("num_patches", num_patches, 1)
    check_size(batch, num_channels * num_patches)
    _checks.one_of("mode", mode, ("patch", "channel", "both"))
    shared = _checks.flag("shared", shared)
    if generator is not None and (noise is not None or channel_noise is not None):
        raise ValueError("give `noise` and `channel_noise`, or `generator`, not both")
    count = keep_count(num_patches, ratio)
    if present is not None:
        _checks.tensor("present", present, ndim=2, floating=False)
        if present.dtype is not torch.bool or present.shape != (batch, num_channels):
            raise ValueError(
                f"present must be bool [{batch}, {num_channels}], got {present.dtype} {list(present.shape)}"
            )
        if shared:
            raise ValueError("shared must be False where `present` gives each sample its own channels")
        _checks.holds(present.any(1), "present: a sample has no channel")
    shape = (batch, num_channels, num_patches)
    masked = None
    if mode != "channel":
        noise = drawn(noise, shape, generator, device)
        rows = noise.reshape(batch * num_channels, num_patches)
        plan = TokenMask.from_scores(rows, count, order="position", backend=backend)
        masked, device = plan.mask.view(shape), noise.device
    if mode != "patch":
        draw = drawn(
            channel_noise, (1 if shared else batch, num_channels + 1), generator, device, name="channel_noise"
        ).detach()
        if masked is not None and draw.device != masked.device:
            raise ValueError(f"channel_noise is on {draw.device} but noise on {masked.device}: move them to one device")
        removed = _removed(draw.float(), present)[:, :, None].expand(shape)
        masked = removed if masked is None else masked | removed
    masked = masked.flatten(1)
    if present is None:
        return TokenMask.from_bool(masked, num_channels * count if mode == "patch" else None, backend=backend)
    absent = ~present.to(masked.device)[:, :, None].expand(shape).flatten(1)
    return TokenMask.from_bool(masked, absent=absent, backend=backend)


def _removed(draw: Tensor, present: Tensor | None) -> Tensor:
    """bool [B or 1, C]: the first k of the present channels in the order of the noise."""
    number, order = draw[:, :1], draw[:, 1:]
    total = draw.shape[1] - 1
    if present is None:
        k = (number * total).long().clamp(0, total - 1)
    else:
        present = present.to(draw.device)
        total = present.sum(1, keepdim=True)
        k = torch.minimum((number * total).long().clamp(min=0), total - 1)
        order = torch.where(present, order, float("inf"))
    return order.argsort(dim=1, stable=True).argsort(dim=1) < k
