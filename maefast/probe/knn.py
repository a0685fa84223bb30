"""k nearest neighbours by cosine similarity with weighted votes (Wu et al., CVPR 2018, arXiv:1805.01978; as DINO's)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

K, TEMPERATURE = 20, 0.07
_CHUNK = 1024  # queries at a time


@torch.no_grad()
def knn(
    train: Tensor,
    labels: np.ndarray,
    test: Tensor,
    k: int = K,
    temperature: float = TEMPERATURE,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """The class of each test sample by the votes of its `k` nearest training samples, each of weight
    exp(cosine / temperature).

    Args:
        train, test: float [n, D] and [m, D]. labels: int [n], from 0 on.
        k: of fewer training samples, all vote.

    Returns:
        int64 [m]; of equal votes the smaller class.
    """
    bank = F.normalize(train.to(device, torch.float32), dim=1)
    known = torch.from_numpy(np.asarray(labels, dtype=np.int64)).to(device)
    k, classes, found = min(k, len(bank)), int(known.max()) + 1, []
    for queries in test.split(_CHUNK):
        near, index = (F.normalize(queries.to(device, torch.float32), dim=1) @ bank.T).topk(k, dim=1)
        weight = ((near - near[:, :1]) / temperature).exp()  # relative to the nearest: nothing overflows
        votes = F.one_hot(known[index], classes).to(weight.dtype)
        found.append(torch.einsum("mk,mkc->mc", weight, votes).argmax(1).cpu())
    return torch.cat(found).numpy() if found else np.zeros(0, dtype=np.int64)
