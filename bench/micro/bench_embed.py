"""patch_embed and gather_tokens: from images, or from all tokens, to the visible ones."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.bench.micro.op import Inputs, Op
from maefast.bench.micro.shapes import Shape
from maefast.ops import gather_tokens, patch_embed, token_mask


def plan_of(shape: Shape, generator: torch.Generator):
    """A plan, and the int64 [B, keep] and [B, N] indices that eager code works with."""
    noise = torch.rand(shape.batch, shape.tokens, generator=generator, device=generator.device)
    plan = token_mask(noise, shape.keep, backend="reference")  # a fault of token_mask is bench_mask's to find
    return plan, plan.ids_keep, plan.ids_restore


# --- patch_embed -------------------------------------------------------------------------------------------


def make_embed(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    def normal(*sizes):
        return torch.randn(sizes, generator=generator, device=generator.device).to(dtype)

    plan, ids_keep, _ = plan_of(shape, generator)
    return {
        "images": normal(shape.batch, shape.channels, *shape.size),
        "weight": normal(shape.width, shape.channels, *shape.patch) / math.sqrt(shape.values),
        "bias": normal(shape.width),
        "pos": normal(1, shape.tokens, shape.width),
        "prefix": normal(1, shape.prefix, shape.width) if shape.prefix else None,
        "plan": plan,
        "ids_keep": ids_keep,
    }


def eager_embed(inputs: Inputs) -> Tensor:
    """A strided convolution over all patches, plus positions, then the visible ones by torch.gather."""
    weight, ids_keep = inputs["weight"], inputs["ids_keep"]
    convolve = F.conv3d if weight.ndim == 5 else F.conv2d
    x = convolve(inputs["images"], weight, inputs["bias"], stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    x = x + inputs["pos"]
    x = torch.gather(x, 1, ids_keep.unsqueeze(-1).expand(-1, -1, x.shape[2]))
    return with_prefix(x, inputs["prefix"])


def tuned_embed(inputs: Inputs) -> Tensor:
    """The patches as rows, the visible rows first, one matrix product over them."""
    weight, ids_keep = inputs["weight"], inputs["ids_keep"]
    rows = patches(inputs["images"], weight.shape[2:], channels_last=False)
    rows = rows.flatten(0, 1).index_select(0, flat(ids_keep, rows.shape[1]))
    x = F.linear(rows, weight.flatten(1), inputs["bias"]).view(*ids_keep.shape, -1)
    x = x + inputs["pos"][0][ids_keep]
    return with_prefix(x, inputs["prefix"])


def with_prefix(x: Tensor, prefix: Tensor | None) -> Tensor:
    return x if prefix is None else torch.cat([prefix.expand(x.shape[0], -1, -1), x], 1)


def patches(images: Tensor, patch: tuple[int, ...], channels_last: bool) -> Tensor:
    """Pixels of every patch: [B, N, K], K ordered (pixels, C) or (C, pixels)."""
    batch, channels, *size = images.shape
    shape = [batch, channels]
    for n, p in zip(size, patch, strict=True):
        shape += [n // p, p]
    grid, inner = range(2, len(shape), 2), range(3, len(shape), 2)
    order = (0, *grid, *inner, 1) if channels_last else (0, *grid, 1, *inner)
    return images.reshape(shape).permute(order).reshape(batch, -1, channels * math.prod(patch))


def flat(ids: Tensor, tokens: int) -> Tensor:
    """[B, n] positions as flat indices into B*N."""
    return (ids + torch.arange(ids.shape[0], device=ids.device)[:, None] * tokens).flatten()


def ours_embed(inputs: Inputs, backend: str) -> Tensor:
    names = ("images", "weight", "bias", "plan")
    return patch_embed(*(inputs[n] for n in names), pos=inputs["pos"], prefix=inputs["prefix"], backend=backend)


def embed_flops(shape: Shape) -> tuple[int, int]:
    """Of the visible patches; backward, of the weight alone."""
    product = 2 * shape.batch * shape.keep * shape.values * shape.width
    return product, product


def embed_traffic(shape: Shape, item: int) -> tuple[int, int]:
    pixels, weight = shape.batch * shape.keep * shape.values, shape.values * shape.width
    tokens = shape.batch * (shape.prefix + shape.keep) * shape.width
    return (pixels + weight + shape.tokens * shape.width + tokens) * item, (tokens + pixels + weight) * item


# --- gather_tokens -----------------------------------------------------------------------------------------


def make_gather(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    plan, ids_keep, _ = plan_of(shape, generator)
    x = torch.randn(shape.batch, shape.tokens, shape.width, generator=generator, device=generator.device)
    return {"x": x.to(dtype), "plan": plan, "ids_keep": ids_keep}


def eager_gather(inputs: Inputs) -> Tensor:
    x = inputs["x"]
    return torch.gather(x, 1, inputs["ids_keep"].unsqueeze(-1).expand(-1, -1, x.shape[2]))


def tuned_gather(inputs: Inputs) -> Tensor:
    """Whole rows by index_select: no index is expanded over the channels."""
    x, ids_keep = inputs["x"], inputs["ids_keep"]
    return x.flatten(0, 1).index_select(0, flat(ids_keep, x.shape[1])).view(*ids_keep.shape, -1)


def gather_traffic(shape: Shape, item: int) -> tuple[int, int]:
    visible = shape.batch * shape.keep
    rows, index = visible * shape.width * item, visible * 4
    everything = shape.batch * shape.tokens * shape.width * item
    return 2 * rows + index, rows + everything + shape.batch * shape.tokens * 4


OPS = [
    Op(
        "patch_embed",
        ("patch_rows", "place_tokens"),
        make_embed,
        eager_embed,
        tuned_embed,
        ours_embed,
        leaves=("weight", "bias", "prefix"),
        traffic=embed_traffic,
        flops=embed_flops,
    ),
    Op(
        "gather_tokens",
        ("gather_tokens", "gather_tokens_backward"),
        make_gather,
        eager_gather,
        tuned_gather,
        lambda inputs, backend: gather_tokens(inputs["x"], inputs["plan"], backend=backend),
        leaves=("x",),
        traffic=gather_traffic,
    ),
]


def bench_embed(report):
    report()
