"""Small models, batches, and the loop that a graphed step stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from maefast import models
from maefast.graphs import capture
from maefast.models.resnet import ResNet
from maefast.models.spark import SparK
from tests.graphs.tape import FakeRecorder

RATE = 2.0**-7  # the same number in float32, which a graph's learning rate is


def make(kind: str = "mae", device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    if kind == "mae":
        small = {"embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_embed_dim": 16, "decoder_num_heads": 2}
        model = models.create("mae_tiny", img_size=16, patch_size=4, decoder_depth=2, norm_pix_loss=True, **small)
    elif kind == "spark":  # batch norms and stochastic depth
        model = SparK(ResNet((1, 1, 1, 1), width=8, drop_path=0.3), img_size=64, decoder_width=32)
    else:
        widths = [8, 8, 16, 16]
        model = models.create("fcmae", img_size=64, depths=[1, 1, 1, 1], widths=widths, decoder_embed_dim=16)
    with torch.no_grad():  # away from zeros, behind which branches would hide
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.to(device)


def adamw(model: nn.Module, lr: float = RATE, **options) -> torch.optim.AdamW:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True, **options)


def batches(model: nn.Module, count: int, size: int = 3, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, *model.img_size, generator=generator).to(device) for _ in range(count)]


def loop(model, optimizer, data, clip=None, autocast=None, generator=None, between=lambda: None) -> list[Tensor]:
    """The losses of a training loop written by hand."""
    losses = []
    kind = next(model.parameters()).device.type
    for images in data:
        optimizer.zero_grad()
        with torch.autocast(kind, autocast, enabled=autocast is not None):
            loss = model(images, generator=generator)[0]
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.detach())
        between()
    return losses


def same(a: nn.Module, b: nn.Module, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> bool:
    """Parameters, buffers and the optimiser's state, bit for bit."""
    pairs = list(zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    for one, other in zip(first.state.values(), second.state.values(), strict=True):
        pairs += [(one[key], other[key]) for key in one]
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.fixture
def taped(monkeypatch):
    """Steps on a CPU are captured on a tape, as on CUDA in a graph."""
    monkeypatch.setattr(capture, "recorder", FakeRecorder)
