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
    scores, own = a @ b.t() / temperature, torch.arange(len(a), device=a.device)
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
    scores = (rows @ rows.t() / temperature).masked_fill(itself, -torch.inf)
    return F.cross_entropy(scores, torch.arange(2 * count, device=a.device).roll(count))


def _units(a: Tensor, b: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    for name, rows in (("a", a), ("b", b)):
        _checks.tensor(name, rows, ndim=2)
    if a.shape != b.shape or 0 in a.shape:
        raise ValueError(f"a and b must be rows of the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return F.normalize(a.to(wide), dim=1), F.normalize(b.to(wide), dim=1)
