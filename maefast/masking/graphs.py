"""Masked nodes of graphs, which stay where they are: a graph without them would be another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from maefast.masking.counts import drawn, keep_count
from maefast.ops import _checks


@dataclass(frozen=True)
class NodeMask:
    """Which nodes of a batch are masked, and what stands in their place. Nodes are counted through all graphs.

    Attributes:
        masked: int64 [M], graph by graph, in a graph those with the token first. visible: int64 [V], ascending.
        token: bool [N], nodes that show the mask token, in place of their features.
        source: int64 [N], whose features the others show: their own, or if replaced those of another node.
    """

    masked: Tensor
    visible: Tensor
    token: Tensor
    source: Tensor

    def to(self, device: torch.device | str) -> NodeMask:
        """Without waiting for the device."""
        return NodeMask(*(moved(getattr(self, entry.name), device) for entry in fields(self)))


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on a device, without waiting for it."""
    if torch.device(device).type == "cuda":  # from pageable memory the copy could wait
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def nodes(
    sizes: Sequence[int],
    ratio: float,
    replace: float = 0.0,
    *,
    noise: Tensor | None = None,
    donor_noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> NodeMask:
    """Uniformly random nodes of each graph are masked, int(ratio * N) of N (GraphMAE, Hou et al., 2022).

    int(replace * M) of these M show the features of as many different nodes of the graph, drawn among all, masked ones
    and themselves included; the others show the mask token.

    Args:
        sizes: N of each of G graphs. ratio, replace: shares in [0, 1].
        noise: [G, largest N] on the host, used instead of drawing; the highest of a graph are masked.
        donor_noise: the same for the choice of replacements; wanted with noise where replace > 0.

    Raises:
        TypeError, ValueError: no graph; a number or a shape that does not fit.
    """
    if not isinstance(sizes, (list, tuple)):
        raise TypeError(f"sizes must be a list or a tuple of ints, got {type(sizes).__name__}")
    if not len(sizes):
        raise ValueError("sizes must name at least one graph")
    for size in sizes:
        _checks.integer("sizes", size)
    keep_count(0, ratio)  # checks it
    if not (isinstance(replace, (int, float)) and 0 <= replace <= 1):
        raise ValueError(f"replace must be a finite number in [0, 1], got {replace!r}")
    widest = (len(sizes), max(sizes))
    if sum(sizes) >= 2**31:
        raise ValueError(f"sizes must come to less than 2**31 nodes, got {sum(sizes)}")
    if donor_noise is None and noise is not None and replace:
        raise ValueError("donor_noise must be given with noise where replace is above 0")
    for name, given in (("noise", noise), ("donor_noise", donor_noise)):
        if isinstance(given, Tensor) and given.device.type != "cpu":
            raise ValueError(f"{name} must be on the host, where nodes are chosen, got {given.device}")
    scores = others = drawn(noise, widest, generator, None).detach().double().cpu().numpy()
    if replace:
        generator = generator if donor_noise is None else None
        others = drawn(donor_noise, widest, generator, None, name="donor_noise").detach().double().cpu().numpy()
    masked, visible, start = [], [], 0
    source = np.arange(sum(sizes))
    token = np.zeros(len(source), dtype=bool)
    for size, row, other in zip(sizes, scores, others):
        keep = keep_count(size, ratio, "complement")
        swap = int(replace * (size - keep))
        order = start + row[:size].argsort(kind="stable")
        hidden = order[keep:]
        token[hidden[: len(hidden) - swap]] = True
        source[hidden[len(hidden) - swap :]] = start + other[:size].argsort(kind="stable")[:swap]
        masked.append(hidden)
        visible.append(np.sort(order[:keep]))
        start += size
    rows = (np.concatenate(masked), np.concatenate(visible), token, source)
    return NodeMask(*map(torch.from_numpy, rows))
