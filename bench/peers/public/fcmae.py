"""FCMAE in its public structure: `maefast.models.public_fcmae` with the drop path that its blocks can have."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from maefast.models.public_fcmae import PublicFCMAE


class HostDropPath(nn.Module):
    """One number a sample from the host's generator, as the sparse layers of the public code draw it."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, True

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0 or not self.training:
            return x
        kept = [1.0 if random.uniform(0, 1) > self.drop_prob else 0.0 for _ in x]
        return x * (torch.tensor(kept, device=x.device) / (1 - self.drop_prob))[:, None, None, None]


def small(drop_path: float = 0.0, kind: type[PublicFCMAE] = PublicFCMAE, **changes) -> PublicFCMAE:
    sizes = {"img_size": 96, "depths": (1, 1, 2, 1), "widths": (8, 12, 16, 24), "decoder_embed_dim": 16}
    model = kind(**{**sizes, "norm_pix_loss": True, **changes})
    for stage in model.encoder.stages:
        for block in stage:
            block.drop_path = HostDropPath(drop_path)
    return model
