"""attention: the encoder's visible tokens, the decoder's whole sequence, a batch of differing lengths, a bias of pairs
(shifted windows, relative positions) and a rotation."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.bench.micro import attention_peers as peers
from maefast.bench.micro.op import Inputs, Op
from maefast.bench.micro.shapes import Shape
from maefast.ops import Rope, attention


def encoder(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    length, heads = shape.prefix + shape.keep, max(1, shape.width // 64)
    return dense(shape.batch, length, heads, shape.width // heads, dtype, generator)


def decoder(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    length, heads = shape.prefix + shape.tokens, shape.decoder_heads
    return dense(shape.batch, length, heads, shape.decoder_width // heads, dtype, generator)


def dense(batch, length, heads, width, dtype, generator) -> Inputs:
    """qkv as a linear layer gives it."""
    qkv = torch.randn((batch, length, 3, heads, width), generator=generator, device=generator.device)
    return {"qkv": qkv.to(dtype)}


def eager(inputs: Inputs) -> Tensor:
    """As in timm: split the heads, then scaled_dot_product_attention on the strided views."""
    q, k, v = inputs["qkv"].permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def tuned(inputs: Inputs) -> Tensor:
    """One copy first, so that torch's kernel reads rows that follow one another."""
    q, k, v = inputs["qkv"].permute(2, 0, 3, 1, 4).contiguous().unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def ours(inputs: Inputs, backend: str | None) -> Tensor:
    return attention(inputs["qkv"], backend=backend)


# --- differing lengths --------------------------------------------------------------------------------------------


def ragged(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Each sample keeps a number of tokens of its own, from a half to one and a half times the common one.

    The total is that of the common one, so that peers which compile for a total compile once.
    """
    device, middle = generator.device, shape.prefix + shape.keep
    least, most = (middle + 1) // 2, middle + middle // 2
    half = torch.randint(least, most + 1, (shape.batch // 2,), generator=generator, device=device)
    lengths = [*half.tolist(), *(2 * middle - half).tolist(), *[middle] * (shape.batch % 2)]
    heads = max(1, shape.width // 64)
    qkv = torch.randn((sum(lengths), 3, heads, shape.width // heads), generator=generator, device=device)
    longest = max(lengths)
    valid = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    place = torch.full((shape.batch, longest), -1)
    place[valid] = torch.arange(sum(lengths))
    return {
        "qkv": qkv.to(dtype),
        "lengths": lengths,
        "cu": torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device),
        "longest": longest,
        "source": place.clamp(min=0).flatten().to(device),  # packed row of each padded one
        "target": valid.flatten().nonzero().flatten().to(device),  # padded row of each packed one
        "mask": valid[:, None, None].to(device),
    }


def one_by_one(inputs: Inputs) -> Tensor:
    """A loop over the samples."""
    outputs = []
    for qkv in inputs["qkv"].split(inputs["lengths"]):
        q, k, v = qkv.permute(1, 2, 0, 3)[:, None].unbind(0)
        outputs.append(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1))
    return torch.cat(outputs)


def padded(inputs: Inputs) -> Tensor:
    """Padded to the longest and masked; the copies in and out are part of it."""
    mask = inputs["mask"]
    full = inputs["qkv"][inputs["source"]].unflatten(0, (mask.shape[0], mask.shape[-1]))
    q, k, v = full.permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(0, 1)[inputs["target"]]


def packed(inputs: Inputs, backend: str | None) -> Tensor:
    return attention(inputs["qkv"], cu_seqlens_q=inputs["cu"], max_seqlen_q=inputs["longest"], backend=backend)


# --- positions ----------------------------------------------------------------------------------------------------


def windows(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """The 64 windows of each image have a bias of their own, heads of 32 (Liu et al., 2021)."""
    inputs = dense(shape.batch, shape.tokens, shape.width // 32, 32, dtype, generator)
    return {**inputs, "bias": random_bias(min(64, shape.batch), shape, shape.width // 32, dtype, generator)}


def relative(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """One bias for all sequences (Bao et al., 2022)."""
    inputs = encoder(shape, dtype, generator)
    return {**inputs, "bias": random_bias(1, shape, inputs["qkv"].shape[3], dtype, generator)}


def random_bias(groups: int, shape: Shape, heads: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    length = shape.prefix + shape.keep
    bias = torch.randn((groups, heads, length, length), generator=generator, device=generator.device)
    return bias.to(dtype)


def rotary(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Angles of the patches; the prefix stays as it is."""
    inputs = encoder(shape, dtype, generator)
    device, half = generator.device, inputs["qkv"].shape[-1] // 2
    speeds = 100.0 ** -(torch.arange(half, device=device) / half)
    angle = torch.arange(shape.keep, device=device)[:, None] * torch.cat([speeds, speeds])
    angle = torch.cat([angle.new_zeros(shape.prefix, 2 * half), angle])
    return {**inputs, "cos": angle.cos(), "sin": angle.sin()}


def masks(inputs: Inputs) -> Tensor:
    """The bias of each sequence, [B, H, S, S], a view where one serves all."""
    batch, groups = inputs["qkv"].shape[0], inputs["bias"].shape[0]
    return inputs["bias"] if groups == 1 else inputs["bias"].repeat(batch // groups, 1, 1, 1)


def biased_eager(inputs: Inputs) -> Tensor:
    """As in Swin and BEiT: scores, bias, softmax, product."""
    q, k, v = inputs["qkv"].permute(2, 0, 3, 1, 4).unbind(0)
    bias = inputs["bias"]
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    scores = (scores.unflatten(0, (-1, len(bias))) + bias).flatten(0, 1)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def biased_tuned(inputs: Inputs) -> Tensor:
    q, k, v = inputs["qkv"].permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=masks(inputs)).transpose(1, 2)


def biased(inputs: Inputs, backend: str | None) -> Tensor:
    return attention(inputs["qkv"], bias=inputs["bias"], backend=backend)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return (x * cos + torch.cat([-high, low], -1) * sin).to(x.dtype)


def rotary_eager(inputs: Inputs) -> Tensor:
    """As in DINOv3: q and k rotated in float32, each by itself."""
    q, k, v = inputs["qkv"].permute(2, 0, 3, 1, 4).unbind(0)
    q, k = (rotated(t, inputs["cos"], inputs["sin"]) for t in (q, k))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def rotary_tuned(inputs: Inputs) -> Tensor:
    """q and k rotated at once, then one copy, so that torch's kernel reads rows that follow one another."""
    parts = inputs["qkv"].permute(2, 0, 3, 1, 4)
    q, k = rotated(parts[:2], inputs["cos"], inputs["sin"]).unbind(0)
    return F.scaled_dot_product_attention(q, k, parts[2].contiguous()).transpose(1, 2)


def turned(inputs: Inputs, backend: str | None) -> Tensor:
    return attention(inputs["qkv"], rope=Rope(inputs["cos"], inputs["sin"], False), backend=backend)


# --- what it takes ------------------------------------------------------------------------------------------------


def encoder_rows(shape: Shape) -> tuple[int, float, int]:
    """(rows, the sum over samples of their squared length, width)."""
    length = shape.prefix + shape.keep
    return shape.batch * length, shape.batch * length**2, shape.width


def decoder_rows(shape: Shape) -> tuple[int, float, int]:
    length = shape.prefix + shape.tokens
    return shape.batch * length, shape.batch * length**2, shape.decoder_width


def ragged_rows(shape: Shape) -> tuple[int, float, int]:
    """The square in expectation: lengths are drawn evenly from `least` to `most` (`ragged`)."""
    middle = shape.prefix + shape.keep
    count = middle + middle // 2 - (middle + 1) // 2 + 1
    return shape.batch * middle, shape.batch * (middle**2 + (count**2 - 1) / 12), shape.width


def flops(rows, shape: Shape) -> tuple[int, int]:
    """Two products forward; five backward, the scores once more among them."""
    _, squares, width = rows(shape)
    return int(4 * squares * width), int(10 * squares * width)


def traffic(rows, shape: Shape, item: int) -> tuple[int, int]:
    """q, k, v in and the result out; those four and its gradient in, three gradients out."""
    count, _, width = rows(shape)
    return 4 * count * width * item, 8 * count * width * item


def bias_bytes(groups: int, shape: Shape, heads: int, item: int) -> int:
    return groups * heads * (shape.prefix + shape.keep) ** 2 * item


def windows_traffic(shape: Shape, item: int) -> tuple[int, int]:
    """The bias in, and its gradient out."""
    forward, backward = traffic(encoder_rows, shape, item)
    bias = bias_bytes(min(64, shape.batch), shape, shape.width // 32, item)
    return forward + bias, backward + 2 * bias


def relative_traffic(shape: Shape, item: int) -> tuple[int, int]:
    forward, backward = traffic(encoder_rows, shape, item)
    bias = bias_bytes(1, shape, max(1, shape.width // 64), item)
    return forward + bias, backward + 2 * bias


RAW = ("attention", "attention_backward")
OPS = [
    Op(
        name,
        RAW,
        make,
        plain,
        better,
        call,
        leaves=("qkv",),
        traffic=partial(traffic, rows),
        flops=partial(flops, rows),
        more=more,
        automatic=("cuda",),
        waits=waits,
    )
    for name, rows, make, plain, better, call, more, waits in (
        ("attention (encoder)", encoder_rows, encoder, eager, tuned, ours, peers.DENSE, ()),
        ("attention (decoder)", decoder_rows, decoder, eager, tuned, ours, peers.DENSE, ()),
        ("attention (ragged)", ragged_rows, ragged, one_by_one, padded, packed, peers.RAGGED, ("maefast-reference",)),
    )
]
OPS += [
    Op(
        name,
        RAW,
        make,
        plain,
        better,
        call,
        leaves=leaves,
        traffic=moved,
        flops=partial(flops, encoder_rows),
        named=True,
    )
    for name, make, plain, better, call, leaves, moved in (
        ("attention (windows)", windows, biased_eager, biased_tuned, biased, ("qkv", "bias"), windows_traffic),
        ("attention (relative)", relative, biased_eager, biased_tuned, biased, ("qkv", "bias"), relative_traffic),
        ("attention (rotary)", rotary, rotary_eager, rotary_tuned, turned, ("qkv",), partial(traffic, encoder_rows)),
    )
]


def bench_attention(report):
    report()
