from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import below, parameters
from maefast.data.volumes import VolumeBatch
from maefast.recipe import View

ARGUMENTS = {"img_size": 64}  # the published network on smaller crops: of 160 the plain side needs some 30 GiB


def batch(size: int) -> VolumeBatch:
    return VolumeBatch(torch.randn(size, 1, 64, 64, 64))


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """SparK3D (nnssl's) as published code runs it: dense convolutions times the mask, norms of the seen sites."""
    p, x, cells = parameters(recipe), view.parts, (~view.plan.mask).view(-1, 1, *recipe.grid)

    def seen(y: Tensor) -> Tensor:
        mask = cells
        for dim in (2, 3, 4):
            if y.shape[dim] < recipe.grid[dim - 2]:
                return torch.ones_like(y[:, :1])
            mask = mask.repeat_interleave(y.shape[dim] // recipe.grid[dim - 2], dim)
        return mask.to(y.dtype)

    def norm(y: Tensor, b: dict, mask: Tensor | float = 1.0) -> Tensor:
        mask = mask * torch.ones_like(y[:, :1])
        count, sites = mask.sum((2, 3, 4), keepdim=True), (2, 3, 4)
        away = (y - (y * mask).sum(sites, keepdim=True) / count) * mask
        y = away * (away.square().sum(sites, keepdim=True) / count + 1e-5).rsqrt()
        return (y * b["weight"].view(-1, 1, 1, 1) + b["bias"].view(-1, 1, 1, 1)) * mask if b else y

    def conv(y: Tensor, b: dict, stride: int = 1, sparse: bool = True, act: bool = True) -> Tensor:
        y = F.conv3d(y, b["conv.weight"], b.get("conv.bias"), stride, b["conv.weight"].shape[2] // 2)
        mask = seen(y) if sparse else 1.0
        y = norm(y * mask, below(b, "norm."), mask)
        return F.leaky_relu(y) if act else y

    x, maps = conv(x * seen(x), below(p, "encoder.stem.convs.0.")), []
    for s, stage in enumerate(recipe.encoder.stages):
        for i in range(len(stage.blocks)):
            b, stride = below(p, f"encoder.stages.{s}.blocks.{i}."), 2 if s and not i else 1
            y = conv(conv(x, below(b, "conv1."), stride), below(b, "conv2."), act=False)
            x = F.avg_pool3d(x, 2) if stride == 2 else x
            skip = below(b, "skip.1.") or below(b, "skip.0.")
            x = F.leaky_relu(y + (conv(x * seen(x), skip, act=False) if skip else x * seen(x)))
        maps.append(x)
    for i, y in enumerate(maps):
        y = norm(y, {}, seen(y)) if isinstance(recipe.densify_norms[i], nn.InstanceNorm3d) else y
        y = torch.where(seen(y) > 0, y, p[f"mask_tokens.{i}"])
        proj = below(p, f"densify_projs.{i}.")
        maps[i] = F.conv3d(y, proj["weight"], proj["bias"], padding=1) if proj else y
    x = maps.pop()
    for s in range(len(maps)):
        up = below(p, f"decoder.transpconvs.{s}.")
        x = torch.cat([F.conv_transpose3d(x, up["weight"], up["bias"], 2), maps.pop()], 1)
        for c in range(len(recipe.decoder.stages[s].convs)):
            x = conv(x, below(p, f"decoder.stages.{s}.convs.{c}."), sparse=False)
    pred, target = F.conv3d(x, p["decoder.pred.weight"], p["decoder.pred.bias"]), view.parts

    def rows(y: Tensor) -> Tensor:
        for axis, side in enumerate(recipe.cell, 2):
            y = y.unfold(axis, side, side)
        return y.permute(0, 2, 3, 4, 5, 6, 7, 1).flatten(1, 3).flatten(2)[view.plan.mask]

    target = rows(target)
    if recipe.norm != "none":
        target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
    return {"voxels": F.mse_loss(rows(pred), target)}
