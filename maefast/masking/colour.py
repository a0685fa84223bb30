"""Masks from filtered noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maefast.masking.counts import drawn, keeps
from maefast.ops import _checks
from maefast.ops._mask_arguments import check_size
from maefast.ops.mask import TokenMask

SIGMAS = {"red": 1.0, "blue": 1.0, "green": (0.5, 2.0), "purple": (0.5, 2.0)}


def coloured(
    batch: int,
    grid_size: tuple[int, int],
    ratio: float | None = None,
    *,
    keep: int | None = None,
    colour: str = "green",
    sigma: float | tuple[float, float] | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    rule: str = "floor",
    order: str = "score",
    backend: str | None = None,
) -> TokenMask:
    """ColorMAE (Hinojosa et al., 2024): the largest values of filtered noise stay visible.

    With white noise W and Gaussians G: red = G*W, blue = W - G*W, green = G1*W - G2*W, purple = W - green. The paper
    crops maps made in advance; here each plan has noise of its own, filtered on the device, with the grid as a torus.
    The scores of `from_scores` are the negated map, so that the order "score" is that of ``torch.topk``.

    Args:
        grid_size: (rows, columns) of tokens.
        ratio, keep, rule: as in `random`.
        sigma: of the Gaussian, in tokens; green and purple take two, the narrow one first. Defaults: `SIGMAS` (the
            paper's are unknown to us).
        noise: [B, rows, columns], normal, used instead of drawing.

    Raises:
        TypeError, ValueError: unknown colour, sigmas not positive, finite and (two) ascending, noise of another shape.
    """
    height, width = _checks.grid("grid_size", grid_size)
    check_size(batch, height * width)
    _checks.one_of("colour", colour, tuple(SIGMAS))
    sigma = SIGMAS[colour] if sigma is None else sigma
    two = isinstance(SIGMAS[colour], tuple)
    if two and (not isinstance(sigma, (tuple, list)) or len(sigma) != 2):
        raise TypeError(f"sigma must be two numbers for {colour}, got {sigma!r}")
    for value in sigma if two else (sigma,):
        _checks.positive("sigma", value)
        if not value < math.inf:
            raise ValueError(f"sigma must be finite, got {value}")
    if two and not sigma[0] < sigma[1]:
        raise ValueError(f"sigma must be ascending (narrow, wide), got {sigma!r}")
    count = keeps(height * width, ratio, keep, rule)
    white = drawn(noise, (batch, height, width), generator, device, torch.randn).detach().float()
    rows = torch.fft.fftfreq(height, device=white.device)[:, None]
    columns = torch.fft.rfftfreq(width, device=white.device)
    squared = rows.square() + columns.square()
    low = [torch.exp(-2 * (math.pi * s) ** 2 * squared) for s in (sigma if two else (sigma,))]
    passed = low[0] - low[1] if two else low[0]
    if colour in ("blue", "purple"):
        passed = 1 - passed
    filtered = torch.fft.irfft2(torch.fft.rfft2(white) * passed, s=(height, width))
    return TokenMask.from_scores(-filtered.flatten(1), count, order=order, backend=backend)
