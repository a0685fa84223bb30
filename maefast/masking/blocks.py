"""Regular grids and random rectangles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maefast import graphs
from maefast.masking.counts import check_generator, keeps
from maefast.ops import _checks
from maefast.ops._mask_arguments import check_size
from maefast.ops.mask import TokenMask


def grid(
    batch: int,
    grid_size: tuple[int, int],
    stride: int | tuple[int, int] = 2,
    *,
    offset: tuple[int, int] = (0, 0),
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> TokenMask:
    """Tokens at rows ``offset[0] + i*stride[0]`` and columns ``offset[1] + j*stride[1]`` stay visible, all others
    are masked. Stride 2 masks three quarters. Nothing is drawn.

    Args:
        grid_size: (rows, columns) of tokens. stride, offset: of both, or (rows, columns).
    """
    height, width = _checks.grid("grid_size", grid_size)
    check_size(batch, height * width)
    down, across = _checks.pair("stride", stride, 1)
    if not isinstance(offset, (tuple, list)) or len(offset) != 2:
        raise TypeError(f"offset must be two ints, got {offset!r}")
    _checks.pair("offset", offset)
    device = _checks.device("device", device)
    if not (0 <= offset[0] < min(down, height) and 0 <= offset[1] < min(across, width)):
        raise ValueError(f"offset must lie within the stride {(down, across)} and the grid, got {offset}")
    masked = torch.ones(height, width, dtype=torch.bool, device=device)
    rows = slice(offset[0], None, min(down, height))  # a stride beyond the grid keeps one; torch's must fit 64 bits
    masked[rows, offset[1] :: min(across, width)] = False
    count = len(range(offset[0], height, down)) * len(range(offset[1], width, across))
    scores = masked.float().view(1, -1).expand(batch, -1)
    return TokenMask.from_scores(scores, count, order="position", backend=backend)


def block(
    batch: int,
    grid_size: tuple[int, int],
    ratio: float | None = None,
    *,
    keep: int | None = None,
    min_area: int = 16,
    max_area: int | None = None,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    rule: str = "floor",
    backend: str | None = None,
) -> TokenMask:
    """BEiT's blockwise masking with an exact count: random rectangles, log-uniform in aspect ratio, are masked until
    no further one fits into the number that is left; what is left is masked token by token, uniformly.

    Drawn on the host (`generator` must be a CPU generator), then sent to `device` in one copy; tokens are ordered by
    position.

    Args:
        grid_size: (rows, columns) of tokens.
        min_area, max_area: of a rectangle, in tokens. aspect: range of height / width.
    """
    if graphs.recording():
        raise ValueError(
            "block masks are drawn on the host, which a graphed step cannot do: draw them before it and hand the map to"
            " a loss of your own that calls from_bool(map, keep=...)"
        )
    height, width = _checks.grid("grid_size", grid_size)
    num_tokens = height * width
    check_size(batch, num_tokens)
    count = keeps(num_tokens, ratio, keep, rule)
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= num_tokens:
        raise ValueError(f"block masking keeps one count in [0, {num_tokens}] for the whole batch, got {count!r}")
    _checks.integer("min_area", min_area, 1)
    if max_area is not None:
        _checks.integer("max_area", max_area)
    if not isinstance(aspect, (tuple, list)) or len(aspect) != 2:
        raise TypeError(f"aspect must be two numbers, got {aspect!r}")
    for value in aspect:
        _checks.positive("aspect", value)
    if not aspect[0] <= aspect[1] < math.inf:
        raise ValueError(f"aspect must be a range (low, high) of finite numbers, got {aspect}")
    check_generator(generator, None)
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"generator must be one of the CPU, got one on {generator.device}")
    device = _checks.device("device", device)
    maps = [
        _rectangles(height, width, num_tokens - count, min_area, max_area or num_tokens, aspect, generator)
        for _ in range(batch)
    ]
    masked = torch.stack(maps).flatten(1)
    # The rectangles score highest; of the rest the highest noise is masked too, up to the exact count.
    scores = torch.where(masked, 2.0, torch.rand(masked.shape, generator=generator))
    return TokenMask.from_scores(scores.to(device), count, order="position", backend=backend)


def enlarge(plan: TokenMask, grid_size: tuple[int, int], factor: int | tuple[int, int] = 2) -> TokenMask:
    """Every token of a plan as a block of `factor` = (rows, columns) tokens of a finer grid, all visible or all masked:
    the block masks of SimMIM (Xie et al., 2022), ConvMAE and DMJD. Plan order goes corner by corner: first the upper
    left tokens of all visible blocks, in the order of `plan`, last the lower right ones; then the masked ones so.

    Args:
        plan: of rows * columns tokens, none absent, as many visible in each sample. grid_size: (rows, columns).
    """
    if not isinstance(plan, TokenMask):
        raise TypeError(f"plan must be a TokenMask, got {type(plan).__name__}")
    rows, columns = _checks.grid("grid_size", grid_size)
    down, across = _checks.pair("factor", factor, 1)
    if rows * columns != plan.num_tokens or plan.keep is None:
        raise ValueError(f"plan must keep as many of {rows} x {columns} tokens in each sample, got {plan}")
    if 2 * down * across * plan.num_tokens >= 2**24 or down * across * plan.num_tokens * plan.batch >= 2**31:
        raise ValueError(f"factor {factor} makes too many tokens of plan's {plan.batch} x {plan.num_tokens}")
    rank, masked = plan.ids_restore, plan.mask
    corner = torch.arange(down * across, device=plan.device).view(1, 1, down, 1, across)
    score = (rank + masked * (down * across * plan.num_tokens)).view(-1, rows, 1, columns, 1)
    score = (score + corner * plan.num_tokens).flatten(1)
    return TokenMask.from_scores(score.float(), plan.keep * down * across)


def _rectangles(
    height: int,
    width: int,
    target: int,
    min_area: int,
    max_area: int,
    aspect: tuple[float, float],
    generator: torch.Generator | None,
    attempts: int = 10,
) -> Tensor:
    """bool [height, width] with at most `target` True, a union of rectangles."""
    masked = torch.zeros(height, width, dtype=torch.bool)
    left = target
    low, high = math.log(aspect[0]), math.log(aspect[1])
    while left > 0:
        for draw in torch.rand(attempts, 4, generator=generator).tolist():
            area = min_area + draw[0] * (max(min(left, max_area), min_area) - min_area)
            ratio = math.exp(low + draw[1] * (high - low))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if not (1 <= h <= height and 1 <= w <= width):
                continue
            top, start = int(draw[2] * (height - h + 1)), int(draw[3] * (width - w + 1))
            window = masked[top : top + h, start : start + w]
            fresh = h * w - int(window.sum())
            if 0 < fresh <= left:
                window.fill_(True)
                left -= fresh
                break
        else:
            break  # nothing fits any more
    return masked
