"""The pre-norm transformer block of ViT, with parameter names of timm and MAE, and ways to run a part of it.

Tokens come as [B, S, D], or packed [T, D] with `Packing`.

Blocks hand on a pending sum: (x, delta) stands for x + delta, which the next norm adds in the pass that it makes
anyway. `Block.forward` hides this unless asked for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maefast import ops
from maefast.nn.layers import LayerNorm, Linear
from maefast.nn.watched import plain_tensor, touched, watched_everywhere
from maefast.ops import TokenMask
from maefast.ops._checks import one_of
from maefast.ops._mask_arguments import integers
from maefast.ops.transformer_block import masked_to_all, scaled, wanted


class Packing(NamedTuple):
    """Where packed sequences start, int32 [B+1], and the longest one, known on the host (no sync)."""

    cu_seqlens: Tensor
    max_seqlen: int

    @staticmethod
    def of(plan: TokenMask, prefix: int = 0, masked: bool = False) -> Packing:
        """Of the visible tokens, each sample behind its prefix tokens; with `masked`, of the masked ones too, and the
        longest is then an upper bound."""
        starts = torch.arange(plan.batch + 1, dtype=torch.int32, device=plan.device) * prefix
        if masked:
            most = min(plan.num_tokens, plan.max_visible + plan.max_masked)
            return Packing(plan.cu_present + starts, most + prefix)
        return Packing(plan.cu_visible + starts, plan.max_visible + prefix)

    @staticmethod
    def even(count: int, length: int, device: torch.device | str) -> Packing:
        """Of `count` sequences of one length."""
        return Packing(torch.arange(count + 1, dtype=torch.int32, device=device) * length, length)

    @staticmethod
    def of_lengths(lengths: Sequence[int], device: torch.device | str) -> Packing:
        """Of sequences whose lengths the host knows; it does not wait for the device."""
        starts = [0, *accumulate(map(int, lengths))]
        return Packing(integers(starts, torch.device(device)), max(map(int, lengths)))


BIASES = ("qkv", "qv", "none")


class Attention(nn.Module):
    """Multi-head self-attention with one qkv projection (weight [3D, D], rows q, k, v) and an output projection.

    Args:
        dim, num_heads: D, a multiple of the number of heads (else ValueError).
        bias: what is shifted: "qkv", all of them; "qv", queries and values by parameters of their own, `q_bias` and
            `v_bias` [D], as BEiT and VideoMAE do (a shift of the keys changes no softmax); "none".
    """

    def __init__(self, dim: int, num_heads: int, bias: str = "qkv") -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"width {dim} must be a multiple of the number of heads, got {num_heads}")
        one_of("bias", bias, BIASES)
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=bias == "qkv")
        own = bias == "qv"
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) if own else None for _ in range(2))
        self.proj = Linear(dim, dim)

    def parts_of_bias(self) -> Tensor | tuple[Tensor, None, Tensor] | None:
        """As `ops.BlockWeights` takes it."""
        return self.qkv.bias if self.q_bias is None else (self.q_bias, None, self.v_bias)

    def shift(self) -> Tensor | None:
        """[3D], or None."""
        if self.q_bias is None:
            return self.qkv.bias
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """[B, S, D] -> [B, S, D], or packed [T, D] -> [T, D]."""
        cu_seqlens, longest = packing or (None, None)
        qkv = self.qkv(x) if self.q_bias is None else ops.linear(x, self.qkv.weight, self.shift())
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
        return self.proj(ops.attention(qkv, cu_seqlens_q=cu_seqlens, max_seqlen_q=longest).flatten(-2))

    def of_some(self, queries: Tensor, x: Tensor, masked: TokenMask | None = None) -> Tensor:
        """Of some tokens as queries, [B, Sq, D] or packed masked ones [M, D], to all [B, S, D]; like `queries`."""
        dim = x.shape[-1]
        # split, not two slices: its backward writes the gradient of the weight once.
        weight_q, weight_kv = self.qkv.weight.split([dim, 2 * dim])
        bias = self.shift()
        bias_q, bias_kv = (None, None) if bias is None else bias.split([dim, 2 * dim])
        q = ops.linear(queries, weight_q, bias_q).unflatten(-1, (self.num_heads, -1))
        kv = ops.linear(x, weight_kv, bias_kv).unflatten(-1, (2, self.num_heads, -1))
        if masked is None:
            out = ops.attention(q, kv)
        else:
            out = ops.attention(q, kv.flatten(0, 1), **masked_to_all(masked, x.shape[1]))
        return self.proj(out.flatten(-2))


class Mlp(nn.Module):
    """Two linear layers around an exact (erf) GELU, from `dim` over `hidden` to `out` (None: `dim`)."""

    def __init__(self, dim: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim if out is None else out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(ops.bias_gelu(self.fc1(x, bias=False), self.fc1.bias))


class QuickMlp(Mlp):
    """With CLIP's approximation of the GELU, ``x * sigmoid(1.702 x)``, between the layers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(1.702 * self.fc1(x)) / 1.702)


ACTIVATIONS = {"gelu": Mlp, "quick_gelu": QuickMlp}


class Block(nn.Module):
    """``x += attn(norm1(x)); x += mlp(norm2(x))`` (Dosovitskiy et al., 2021), as one op: `ops.transformer_block`.

    Module by module instead where somebody watches one of them (hooks), wraps it or put another in its place.

    Args:
        dim: D. num_heads: divides D. mlp_ratio: hidden width of the MLP over D. eps: of the LayerNorms.
        bias: of the queries, keys and values, see `Attention`.
        drop_path: share of the samples of which a branch is left out in training, the others being scaled by
            1 / (1 - share) (Huang et al., 2016).
        layer_scale: where the learned factors of the branches, `gamma_1` and `gamma_2` [D], start (Touvron et al.,
            2021); None: there are none.
        activation: of the MLP, "gelu" or "quick_gelu", see `QuickMlp`; the latter runs module by module.

    Attributes:
        keep: "lean", "all" or "nothing": what is kept for the backward, see `ops.transformer_block`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        eps: float = 1e-6,
        *,
        bias: str = "qkv",
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        one_of("activation", activation, tuple(ACTIVATIONS))
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path must lie in [0, 1), got {drop_path}")
        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, bias)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = ACTIVATIONS[activation](dim, int(dim * mlp_ratio))
        self.gamma_1, self.gamma_2 = (
            None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale))) for _ in range(2)
        )
        self.drop_path, self.keep = drop_path, "lean"

    def forward(
        self,
        x: Tensor,
        packing: Packing | None = None,
        delta: Tensor | None = None,
        pending: bool = False,
        keep: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, S, D] -> [B, S, D], or packed [T, D] -> [T, D].

        The input is x + delta if `delta` is given; with `pending` the result is a pair whose sum is the output. `keep`:
        for this call.
        """
        return self._run(x, delta, pending, packing, keep=keep)

    def forward_tail(
        self, x: Tensor, count: int, delta: Tensor | None = None, pending: bool = False, keep: str | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The last `count` tokens of the output, computing no more than they need: [B, S, D] -> [B, count, D].

        The other tokens give keys and values only; their queries, output projection and MLP are left out.
        """
        if not 1 <= count <= x.shape[1]:
            raise ValueError(f"count must lie in [1, {x.shape[1]}] (the number of tokens), got {count}")
        return self._run(x, delta, pending, count=None if count == x.shape[1] else count, keep=keep)

    def forward_masked(
        self,
        x: Tensor,
        plan: TokenMask,
        prefix: int = 0,
        delta: Tensor | None = None,
        pending: bool = False,
        keep: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The masked tokens of the output, packed, for samples that mask different numbers of tokens.

        [B, prefix + N, D] in place -> [M, D] in plan order. As in `forward_tail`, the other tokens give keys and
        values only.
        """
        return self._run(x, delta, pending, masked=plan, prefix=prefix, keep=keep)

    def _run(self, x, delta, pending, packing=None, count=None, masked=None, prefix=0, keep=None):
        weights, keep = self._weights(), keep or self.keep
        cu_seqlens, longest = packing or (None, None)
        drops = self._drops(x, packing, masked)
        if weights is None or (masked is not None and drops[0] is not None):
            args = x, delta, packing, count, masked, prefix, drops
            if keep == "nothing" and torch.is_grad_enabled():
                x, delta = checkpoint(self._by_modules, *args, use_reentrant=False)
            else:
                x, delta = self._by_modules(*args)
        else:
            x, delta = ops.transformer_block(
                x,
                delta,
                weights,
                self.attn.num_heads,
                eps=(self.norm1.eps, self.norm2.eps),
                cu_seqlens=cu_seqlens,
                max_seqlen=longest,
                count=count,
                masked=masked,
                prefix=prefix,
                keep=keep,
                drop1=drops[0],
                drop2=drops[1],
            )
        return (x, delta) if pending else x + delta

    def _drops(self, x, packing, masked) -> tuple[Tensor | None, Tensor | None]:
        """Factors of the two branches for each sample or, packed, for each row of what they return."""
        if not (self.training and self.drop_path):
            return None, None
        samples = masked.batch if masked is not None else len(packing[0]) - 1 if packing else len(x)
        stay = 1.0 - self.drop_path
        drops = x.new_empty(2, samples).bernoulli_(stay).div_(stay)
        starts = masked.cu_masked if masked is not None else packing[0] if packing else None
        if starts is not None:
            rows = torch.arange(masked.total_masked if masked is not None else len(x), device=x.device)
            drops = drops[:, torch.bucketize(rows, starts[1:].long(), right=True)]
        return drops.unbind()

    def _weights(self) -> ops.BlockWeights | None:
        """What the op needs, or None where the modules have to be called."""
        norm1, attn, norm2, mlp = map(self._modules.get, ("norm1", "attn", "norm2", "mlp"))
        parts = norm1, attn, norm2, mlp, *attn._modules.values(), *mlp._modules.values()
        if tuple(map(type, parts)) != _PARTS or watched_everywhere() or any(map(touched, parts)):
            return None
        qkv, proj, fc1, fc2 = parts[4:]
        tensors = [t for part in (norm1, qkv, proj, norm2, fc1, fc2) for t in (part.weight, part.bias)]
        scales = self.gamma_1, self.gamma_2
        if not all(t is None or plain_tensor(t) for t in (*tensors, attn.q_bias, attn.v_bias, *scales)):
            return None
        tensors[3] = attn.parts_of_bias()
        return ops.BlockWeights(*tensors, *scales)

    def _by_modules(self, x, delta, packing, count, masked, prefix, drops):
        x, y = (x, self.norm1(x)) if delta is None else self.norm1(x, delta)
        if count is None and masked is None:
            out = self.attn(y, packing)
        else:
            x = wanted(x, count, masked, prefix)
            out = self.attn.of_some(wanted(y, count, masked, prefix), y, masked)
        x, y = self.norm2(x, scaled(out, self.gamma_1, drops[0]))
        return x, scaled(self.mlp(y), self.gamma_2, drops[1])


_PARTS = (LayerNorm, Attention, LayerNorm, Mlp, Linear, Linear, Linear, Linear)
