"""Transformer parts in plain PyTorch, as a careful user writes them: what recipes are tested and timed against.

Parameters come in a dict by their names in a recipe, see `parameters`; nothing here is maefast's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attention(
    x: Tensor, heads: int, qkv: Tensor, shift: Tensor | None, proj: Tensor, bias: Tensor, keys: Tensor | None = None
) -> Tensor:
    """Self-attention of x [B, S, D] to all tokens, or to those where `keys`, bool [B, S], is True."""
    q, k, v = F.linear(x, qkv, shift).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    seen = None if keys is None else keys[:, None, None]
    return F.linear(F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2), proj, bias)


def block(x: Tensor, p: Mapping[str, Tensor], heads: int, eps: float = 1e-6, keys: Tensor | None = None) -> Tensor:
    """A pre-norm block of `maefast.nn` in eval mode, with the parameters under their names in it."""
    width = x.shape[-1]
    shift = p.get("attn.qkv.bias")
    if "attn.q_bias" in p:
        shift = torch.cat([p["attn.q_bias"], torch.zeros_like(p["attn.q_bias"]), p["attn.v_bias"]])
    y = F.layer_norm(x, (width,), p["norm1.weight"], p["norm1.bias"], eps)
    y = attention(y, heads, p["attn.qkv.weight"], shift, p["attn.proj.weight"], p["attn.proj.bias"], keys)
    x = x + y * p.get("gamma_1", 1)
    y = F.layer_norm(x, (width,), p["norm2.weight"], p["norm2.bias"], eps)
    y = F.linear(F.gelu(F.linear(y, p["mlp.fc1.weight"], p["mlp.fc1.bias"])), p["mlp.fc2.weight"], p["mlp.fc2.bias"])
    return x + y * p.get("gamma_2", 1)


def blocks(
    x: Tensor,
    p: Mapping[str, Tensor],
    prefix: str,
    heads: int,
    each: Tensor | None = None,
    eps: float = 1e-6,
    keys: Tensor | None = None,
) -> list[Tensor]:
    """The outputs of all blocks under `prefix`, as "encoder.blocks.", in turn; `each` is added to every input."""
    count, out = len({name.removeprefix(prefix).split(".")[0] for name in p if name.startswith(prefix)}), []
    for i in range(count):
        x = block(x if each is None else x + each, below(p, f"{prefix}{i}."), heads, eps, keys)
        out.append(x)
    return out


def below(p: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}


def parameters(recipe: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(recipe.named_parameters()), **dict(recipe.named_buffers())}


def norm(x: Tensor, p: Mapping[str, Tensor], name: str, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)


def linear(x: Tensor, p: Mapping[str, Tensor], name: str) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))
