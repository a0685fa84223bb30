"""Samplers that make plans. Each is a map of scores and a count: the lowest scores of a sample stay visible.

    random   uniform noise a token                                 MAE (He et al., 2021)
    tube     noise shared along time                               VideoMAE (Tong et al., 2022)
    block    rectangles masked until an exact count is reached     BEiT (Bao et al., 2021)
    grid     one token of each cell of a regular grid stays        MAE, ablation "grid-wise sampling"
    cells    random cells of a convnet's map, as a CellMask        SparK (Tian et al., 2023)

Your own sampler is `from_scores(scores, keep)`. With `noise` given, nothing is drawn, so that a run can be
replayed; with `generator`, only that generator is advanced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from maefast import graphs
from maefast.ops import _checks
from maefast.ops.cells import CellMask
from maefast.ops.mask import TokenMask, _check_size

from_scores = TokenMask.from_scores
from_bool = TokenMask.from_bool
from_indices = TokenMask.from_indices
from_ids_restore = TokenMask.from_ids_restore


def keep_count(num_tokens: int, ratio: float, rule: str = "floor") -> int:
    """How many of `num_tokens` stay visible at mask ratio `ratio`.

    Rules of published systems, which differ by one at some sizes: "floor" = int(N * (1 - r)) (MAE, FCMAE), "round"
    = round(N * (1 - r)) (SparK), "complement" = N - int(r * N) (VideoMAE).

    Raises:
        TypeError: num_tokens not an int.
        ValueError: negative num_tokens, ratio not finite or outside [0, 1], or unknown rule.
    """
    _checks.integer("num_tokens", num_tokens)
    if not (isinstance(ratio, (int, float)) and 0 <= ratio <= 1):  # false for NaN and infinity too
        raise ValueError(f"mask ratio must be a finite number in [0, 1], got {ratio!r}")
    if not isinstance(rule, str):
        raise TypeError(f"rule must be a str, got {type(rule).__name__}")
    if rule == "floor":
        return int(num_tokens * (1 - ratio))
    if rule == "round":
        return round(num_tokens * (1 - ratio))
    if rule == "complement":
        return num_tokens - int(ratio * num_tokens)
    raise ValueError(f"rule must be 'floor', 'round' or 'complement', got {rule!r}")


def _keep(num_tokens: int, ratio: float | Sequence[float] | None, keep, rule: str):
    """Exactly one of `ratio` and `keep`; a ratio may be given for each sample."""
    if (ratio is None) == (keep is None):
        raise ValueError("give exactly one of `ratio` and `keep`")
    if keep is None:
        each = isinstance(ratio, (list, tuple))
        keep = [keep_count(num_tokens, r, rule) for r in ratio] if each else keep_count(num_tokens, ratio, rule)
    _fixed("keep", keep)
    return keep


def _fixed(name: str, counts: object) -> None:
    """A ragged plan is counted on the host and copied from there, which a graph cannot replay."""
    if graphs.recording() and (
        isinstance(counts, Tensor) or (isinstance(counts, (list, tuple)) and len(set(counts)) > 1)
    ):
        raise ValueError(
            f"a graphed step needs one mask ratio or count for all samples, because its shapes are fixed: {name}"
        )


def _noise(noise: Tensor | None, shape: tuple[int, ...], generator, device) -> Tensor:
    device = _generator(generator, device)
    if noise is None:
        if generator is None:  # torch.compile cannot trace rand(generator=None) at a dynamic batch size
            return torch.rand(shape, device=device)
        return torch.rand(shape, generator=generator, device=device)
    if generator is not None:
        raise ValueError("give `noise` or `generator`, not both")
    _checks.tensor("noise", noise)
    if tuple(noise.shape) != shape:
        raise ValueError(f"noise must have shape {list(shape)}, got {list(noise.shape)}")
    return noise


def _generator(generator: object, device: object) -> torch.device | None:
    """Checks both; the device where to draw."""
    device = _checks.device("device", device)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        if device is not None and device.type not in (generator.device.type, "meta"):
            raise ValueError(f"generator is on {generator.device}, but device is {device}")
    return device


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
    _check_size(batch, num_tokens)
    scores = _noise(noise, (batch, num_tokens), generator, device)
    if hide is not None:
        _fixed("hide", hide)
    return from_scores(scores, _keep(num_tokens, ratio, keep, rule), hide=hide, order=order, backend=backend)


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
    scores = _noise(noise, (batch, tokens_per_frame), generator, device)
    count = _keep(tokens_per_frame, ratio, keep, rule)
    if not isinstance(count, int):
        raise TypeError("tube masking takes one ratio or keep (an int) for the whole batch")
    # Ranks instead of the noise itself: two equal noise values must not split a tube at the threshold.
    rank = from_scores(scores, count, backend=backend).ids_restore.float()
    scores = rank[:, None, :].expand(batch, frames, tokens_per_frame).reshape(batch, -1)
    return from_scores(scores, frames * count, order="position", backend=backend)


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
    are masked. Stride 2 masks three quarters.
    """
    height, width = _checks.grid("grid_size", grid_size)
    _check_size(batch, height * width)
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
    return from_scores(scores, count, order="position", backend=backend)


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
    _check_size(batch, num_tokens)
    count = _keep(num_tokens, ratio, keep, rule)
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
    _generator(generator, None)
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
    return from_scores(scores.to(device), count, order="position", backend=backend)


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


def cells(
    batch: int,
    grid_size: tuple[int, int],
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
        grid_size: (GH, GW), for example (7, 7) for cells of 32 x 32 pixels at 224. ratio, keep, noise [B, GH*GW],
            generator, rule: as in `random`; SparK rounds the count, FCMAE takes "floor".
    """
    rows, columns = _checks.grid("grid_size", grid_size)
    plan = random(
        batch,
        rows * columns,
        ratio,
        keep=keep,
        noise=noise,
        generator=generator,
        device=device,
        rule=rule,
        order="position",
        backend=backend,
    )
    return CellMask(plan, (rows, columns))
