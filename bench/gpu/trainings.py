"""Two steps of training: ViT-MAE, Hugging Face's VideoMAE accelerated, SparK and FCMAE, each against the same model on
plain PyTorch in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import maefast
from maefast import models
from maefast.integrations import _worth
from maefast.models.resnet import ResNet
from maefast.models.spark import SparK

# Relative difference of the losses, the second one after an update; and of the norm of all gradients. AdamW's first
# update is the sign of a gradient, which magnifies the rounding of small ones.
AGREE = {torch.float32: (1e-5, 1e-3), torch.bfloat16: (1e-2, 5e-2)}  # as maefast.bench.step
DTYPES = tuple(AGREE)
STEPS = 2


class Task(NamedTuple):
    """loss(model, *data): the same numbers for both sides. ours(model): what is trained against the model itself."""

    model: nn.Module
    data: tuple[Tensor, ...]
    loss: Callable[..., Tensor]
    ours: Callable[[nn.Module], nn.Module] = lambda model: model


def _masked(model: nn.Module, batch: int, ratio: float) -> Task:
    generator = torch.Generator().manual_seed(1)
    height, width = model.img_size
    images = torch.randn(batch, 3, height, width, generator=generator)
    noise = torch.rand(batch, model.num_patches, generator=generator)
    return Task(model, (images, noise), lambda model, images, noise: model(images, ratio, noise)[0])


def vit_mae(toy: bool) -> Task:
    sizes = {"depth": 1, "decoder_depth": 1} if toy else {"depth": 2, "decoder_depth": 2}
    if toy:
        sizes |= {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2}
        sizes |= {"decoder_embed_dim": 32, "decoder_num_heads": 2}
    return _masked(models.create("mae_base", norm_pix_loss=True, **sizes), 2 if toy else 4, 0.75)


def videomae(toy: bool) -> Task:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    wide, narrow, heads, side, patch, frames = (32, 32, 2, 16, 8, 4) if toy else (384, 192, 6, 112, 16, 8)
    config = VideoMAEConfig(
        image_size=side,
        patch_size=patch,
        num_frames=frames,
        tubelet_size=2,
        hidden_size=wide,
        num_hidden_layers=1 if toy else 2,
        num_attention_heads=heads,
        intermediate_size=2 * wide,
        decoder_hidden_size=narrow,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=heads // 2,
        decoder_intermediate_size=2 * narrow,
    )
    tokens = (side // patch) ** 2 * frames // 2
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, frames, 3, side, side, generator=generator)
    order = torch.rand(2, tokens, generator=generator).argsort(1).argsort(1)

    def ours(model: nn.Module) -> nn.Module:
        model = maefast.accelerate(model)
        report = maefast.integrations.report(model)
        assert report.replaced, f"nothing was accelerated: {report}"
        return model

    masked = order >= max(1, tokens // 10)
    return Task(VideoMAEForPreTraining(config), (pixels, masked), lambda m, x, masked: m(x, masked).loss, ours)


def spark(toy: bool) -> Task:
    # Without drop path: its draws depend on the layout.
    encoder = ResNet((1, 1, 1, 1), width=8) if toy else ResNet((1, 1, 1, 1), width=64)
    return _masked(SparK(encoder, img_size=64, decoder_width=32 if toy else 256), 2 if toy else 4, 0.5)


def fcmae(toy: bool) -> Task:
    sizes = {"depths": (1, 1, 1, 1), "widths": (8, 8, 16, 16) if toy else (96, 192, 384, 768)}
    model = models.create("fcmae", img_size=64, decoder_embed_dim=16 if toy else 512, norm_pix_loss=True, **sizes)
    return _masked(model, 2 if toy else 4, 0.5)


EARLY = {"vit_mae": vit_mae, "videomae": videomae}
LATE = {"fcmae": fcmae, "spark": spark}
TASKS = {**EARLY, **LATE}


def train(model: nn.Module, task: Task, device: str, dtype: torch.dtype) -> list[float]:
    """[loss, norm of all gradients, loss after an update], with AdamW."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    model = model.to(device, wide).train()
    data = [x.to(device, wide) if x.is_floating_point() else x.to(device) for x in task.data]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    found: list[float] = []
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = task.loss(model, *data)
        loss.backward()
        found.append(loss.item())
        if not step:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            found.append(float(torch.stack([g.double().norm() for g in grads]).norm()))
        optimizer.step()
    return found


def errors(name: str, device: str, dtype: torch.dtype, toy: bool, backend: str | None = None) -> dict[str, Any]:
    """Relative errors of the losses and of the gradients' norm. `backend`: None for what users get."""
    torch.manual_seed(0)
    task = TASKS[name](toy)
    for parameter in task.model.parameters():  # zero tables and biases would hide what they do
        if parameter.requires_grad and parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    plain = copy.deepcopy(task.model)
    with maefast.backend("reference"):
        want = train(plain, task, "cpu", torch.float64)
    with maefast.backend(backend), _worth.always():
        got = train(task.ours(task.model), task, device, dtype)
    names = ("loss", "gradient norm", "loss after an update")
    return {name: abs(a - b) / abs(b) for name, a, b in zip(names, got, want, strict=True)}


def too_large(found: dict[str, float], dtype: torch.dtype) -> str:
    """What is beyond `AGREE`, or ''."""
    loss, norm = AGREE[dtype]
    bounds = {"loss": loss, "gradient norm": norm, "loss after an update": norm}
    return "; ".join(f"{n}: off by {e:.3g}, allowed {bounds[n]:g}" for n, e in found.items() if not e <= bounds[n])
