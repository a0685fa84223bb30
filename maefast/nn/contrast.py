"""Contrast of paired vectors: what belongs together is told from the rest of the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.ops import _checks


def info_nce(a: Tensor, b: Tensor, temperature: float = 0.07) -> Tensor:
    """Each row finds its partner among all rows of the other side, both ways (van den Oord et al., 2018,
    arXiv:1807.03748; CLIP, Radford et al., 2021).

    Args:
        a, b: [B, D], partners in the same row; brought to unit length here, in float32 at least.
        temperature: divides the cosines.

    Returns:
        Scalar, (CE(s) + CE(s^T)) / 2 with s = a b^T / temperature and the diagonal as classes, CE the mean over rows.

    Raises:
        TypeError, ValueError: shapes or dtypes do not fit, or the temperature is not positive.
    """
    a, b = _units(a, b, temperature)
    scores, own = _cosines(a, b) / temperature, torch.arange(len(a), device=a.device)
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.t(), own)) / 2


def nt_xent(a: Tensor, b: Tensor, temperature: float = 0.1) -> Tensor:
    """As `info_nce`, but each row must find its partner among all other rows of both sides (SimCLR, Chen et al., 2020,
    arXiv:2002.05709).

    Returns:
        Scalar, the mean over the 2 B rows.
    """
    a, b = _units(a, b, temperature)
    rows, count = torch.cat([a, b]), len(a)
    itself = torch.eye(2 * count, dtype=torch.bool, device=a.device)
    scores = (_cosines(rows, rows) / temperature).masked_fill(itself, -torch.inf)
    return F.cross_entropy(scores, torch.arange(2 * count, device=a.device).roll(count))


def sup_con(x: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised contrast: each row is told from all other rows of its set, those with its label being right (Khosla et
    al., 2020, arXiv:2004.11362, the loss L_out).

    Args:
        x: [..., N, D], sets of rows; brought to unit length here, in float32 at least.
        labels: integers, [..., N] or [N] for all sets.
        temperature: divides the cosines.

    Returns:
        Scalar, the mean over rows i that have partners P(i) of ``-mean over p in P(i) of log softmax_j(s_ij)[p]``, with
        s the cosines over the temperature and j running over all rows of the set but i; 0 where no row has a partner.

    Raises:
        TypeError, ValueError: shapes or dtypes do not fit, or the temperature is not positive.
    """
    _checks.tensor("x", x)
    _checks.tensor("labels", labels, floating=False)
    if labels.is_floating_point():
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if x.ndim < 2 or 0 in x.shape or labels.shape not in (x.shape[:-1], x.shape[-2:-1]):
        raise ValueError(f"labels must be [..., N] of x [..., N, D], got {tuple(labels.shape)} and {tuple(x.shape)}")
    _checks.same_device(x=x, labels=labels)
    x = _unit(x, temperature)
    itself = torch.eye(x.shape[-2], dtype=torch.bool, device=x.device)
    scores = (_cosines(x, x) / temperature).masked_fill(itself, -torch.inf)
    partners = (labels[..., :, None] == labels[..., None, :]) & ~itself
    counts = partners.sum(-1)
    each = scores.logsumexp(-1) - scores.where(partners, 0).sum(-1) / counts.clamp(min=1)
    has = (counts > 0).expand(each.shape)
    return each.where(has, 0).sum() / has.sum().clamp(min=1)


def _units(a: Tensor, b: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    for name, rows in (("a", a), ("b", b)):
        _checks.tensor(name, rows, ndim=2)
    if a.shape != b.shape or 0 in a.shape:
        raise ValueError(f"a and b must be rows of the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    wide = torch.promote_types(a.dtype, b.dtype)
    return _unit(a.to(wide), temperature), _unit(b.to(wide), temperature)


def _unit(x: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of unit vectors, in their dtype under autocast too: a small temperature makes its rounding large."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.transpose(-1, -2)
