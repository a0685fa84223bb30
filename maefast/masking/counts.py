"""What the samplers share: how many tokens stay, and the noise that decides which."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from maefast import graphs
from maefast.ops import _checks


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
        count = int(num_tokens * (1 - ratio))
    elif rule == "round":
        count = round(num_tokens * (1 - ratio))
    elif rule == "complement":
        count = num_tokens - int(ratio * num_tokens)
    else:
        raise ValueError(f"rule must be 'floor', 'round' or 'complement', got {rule!r}")
    # A number to torch.compile too, which cannot hand what it makes of a symbolic ratio to an autograd.Function.
    return operator.index(count)


def listed(ratio):
    """A tensor [B] of ratios as a list; whatever else is given as it is, so that numbers and lists wait for no device.
    Digits are those of float32 at most: 0.6 means 0.6, not the 0.60000002 that float32 has for it, which hides one
    token more."""
    if not (isinstance(ratio, Tensor) and ratio.ndim == 1):
        return ratio
    fixed("mask ratio", ratio)
    if ratio.dtype is torch.float64:
        return ratio.tolist()
    return [float(str(value)) for value in ratio.detach().float().cpu().numpy()]


def keeps(num_tokens: int, ratio: float | Sequence[float] | Tensor | None, keep, rule: str):
    """Exactly one of `ratio` and `keep`; a ratio may be given for each sample."""
    if (ratio is None) == (keep is None):
        raise ValueError("give exactly one of `ratio` and `keep`")
    if keep is None:
        ratio = listed(ratio)
        each = isinstance(ratio, (list, tuple))
        keep = [keep_count(num_tokens, r, rule) for r in ratio] if each else keep_count(num_tokens, ratio, rule)
    fixed("keep", keep)
    return keep


def fixed(name: str, counts: object) -> None:
    """A ragged plan is counted on the host and copied from there, which a graph cannot replay."""
    if graphs.recording() and (
        isinstance(counts, Tensor) or (isinstance(counts, (list, tuple)) and len(set(counts)) > 1)
    ):
        raise ValueError(
            f"a graphed step needs one mask ratio or count for all samples, because its shapes are fixed: {name}"
        )


def drawn(noise: Tensor | None, shape: tuple[int, ...], generator, device, draw=torch.rand, name="noise") -> Tensor:
    """The noise given, checked, or a draw of it on `device`."""
    device = check_generator(generator, device)
    if noise is None:
        if generator is None:  # torch.compile cannot trace rand(generator=None) at a dynamic batch size
            return draw(shape, device=device)
        return draw(shape, generator=generator, device=device)
    if generator is not None:
        raise ValueError(f"give `{name}` or `generator`, not both")
    _checks.tensor(name, noise)
    if tuple(noise.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(noise.shape)}")
    return noise


def check_generator(generator: object, device: object) -> torch.device | None:
    """Checks both; the device where to draw."""
    device = _checks.device("device", device)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        if device is not None and device.type not in (generator.device.type, "meta"):
            raise ValueError(f"generator is on {generator.device}, but device is {device}")
    return device
