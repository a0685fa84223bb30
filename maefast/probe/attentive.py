"""A classifier that learns where to look: one query that attends to all frozen tokens, then a linear layer (attentive
probing; Chen et al., 2022, arXiv:2202.03026)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast import ops
from maefast.nn.layers import LayerNorm, Linear

from .accuracy import accuracy, split

DECAYS = (1.0, 0.1, 0.01)
EPOCHS, STEPS = 30, 1000
_HELD, _BATCH, _RATE, _WARM = 0.2, 256, 1e-3, 0.1


@dataclass(frozen=True)
class Attentive:
    """found: int64 [m], the classes of the test samples. weight_decay: what was chosen. grid: (weight decay, accuracy
    on the held-back share of the training part); None where no class had two samples."""

    found: np.ndarray
    weight_decay: float
    grid: Sequence[tuple[float, float | None]]


class AttentivePool(nn.Module):
    """softmax(q K^T / sqrt(d)) V with one learned query q of each head, where K and V are linear in the normalised
    tokens; a batch norm without parameters; a linear layer. [B, T, D] -> [B, classes]."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.heads = next(heads for heads in range(max(1, dim // 64), 0, -1) if dim % heads == 0)
        self.norm = LayerNorm(dim, eps=1e-6)
        self.query = nn.Parameter(torch.randn(self.heads, dim // self.heads) * 0.02)
        self.kv = Linear(dim, 2 * dim)
        self.scale = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.head = Linear(dim, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        kv = self.kv(self.norm(tokens)).unflatten(-1, (2, self.heads, -1))
        query = self.query.expand(len(tokens), 1, -1, -1)
        return self.head(self.scale(ops.attention(query, kv).flatten(1)))


def attentive_probe(
    read: Callable[[np.ndarray], Tensor],
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    seed: int = 0,
    *,
    decays: Sequence[float] = DECAYS,
    epochs: int = EPOCHS,
    steps: int = STEPS,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Attentive:
    """`AttentivePool` trained by AdamW for `epochs`, but at least `steps`: batches of 256, 1e-3 at the peak, a tenth of
    the steps to get there, then half a cosine. Of `decays` the one is taken that is best on a fifth of the training
    part, drawn class by class with `seed`, that it has not seen; of equal ones the strongest. Then all of the training
    part is used. A function of its arguments on a CPU; the weights start, and samples come, as `seed` says.

    Args:
        read: rows -> float32 [b, T, D]. train, test: int [n] and [m], rows. labels: int [n], of `train`.
        progress: called with (steps that are done, steps of all trainings).
    """
    inner, held = split(labels, _HELD, seed)
    decays, grid = sorted(decays, reverse=True), []
    chosen = len(held) > 0 and len(np.unique(labels[inner])) > 1
    last = _length(len(train), epochs, steps)[1]
    total, counted = last + (len(decays) * _length(len(inner), epochs, steps)[1] if chosen else 0), count(1)

    def judged(rows: np.ndarray, classes: np.ndarray, asked: np.ndarray, decay: float) -> np.ndarray:
        step = lambda: progress(next(counted), total)  # noqa: E731
        model = _trained(read, rows, classes, int(labels.max()) + 1, decay, seed, epochs, steps, device, step)
        return _answers(model, read, asked, device)

    if chosen:
        for decay in decays:
            found = judged(train[inner], labels[inner], train[held], decay)
            grid.append((decay, accuracy(found, labels[held]).value))
        best = max(grid, key=lambda entry: entry[1])[0]
    else:
        best = decays[len(decays) // 2]
        grid = [(best, None)]
    return Attentive(judged(train, labels, test, best), best, grid)


def _length(samples: int, epochs: int, steps: int) -> tuple[int, int]:
    """(batches of an epoch, steps of a training); no batch has one sample alone, which has no batch statistics."""
    each = max(1, samples // _BATCH)
    return each, max(epochs, -(-steps // each)) * each


def _trained(read, rows, labels, classes, decay, seed, epochs, steps, device, stepped) -> AttentivePool:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AttentivePool(read(rows[:1]).shape[2], classes)
    model.to(device).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=_RATE)
    each, total = _length(len(rows), epochs, steps)
    rng, step = np.random.default_rng(seed), 0
    for _ in range(total // each):
        for part in np.array_split(rng.permutation(len(rows)), each):
            rate = min((step + 1) / (_WARM * total), 0.5 * (1 + math.cos(math.pi * step / total)))
            for group in optimizer.param_groups:
                group["lr"] = _RATE * min(1.0, rate)
            scores = model(read(rows[part]).to(device))
            loss = F.cross_entropy(scores, torch.from_numpy(labels[part]).to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            stepped()
    return model.eval()


@torch.no_grad()
def _answers(model, read, rows, device) -> np.ndarray:
    parts = [rows[i : i + _BATCH] for i in range(0, len(rows), _BATCH)]
    found = [model(read(part).to(device)).argmax(1).cpu().numpy() for part in parts]
    return np.concatenate(found).astype(np.int64)
