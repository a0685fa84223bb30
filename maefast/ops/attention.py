"""The one seam through which every model's attention goes. Served by torch's SDPA for now."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.ops import _checks


def attention(
    q: Tensor,
    kv: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Multi-head attention ``softmax(q k^T * scale) v`` (Vaswani et al., 2017), dense or packed.

    Args:
        q: self-attention: interleaved qkv, [B, S, 3, H, D] or packed [T, 3, H, D];
            cross-attention: queries, [B, Sq, H, D] or packed [Tq, H, D].
        kv: None, or interleaved keys and values, [B, Sk, 2, H, D] or packed [Tk, 2, H, D].
        cu_seqlens_q: int32 [B+1], where each packed sequence starts; required for packed input.
        cu_seqlens_k: the same for `kv`; cross-attention only.
        scale: defaults to 1 / sqrt(D).

    Returns:
        [B, Sq, H, D] or packed [Tq, H, D], dtype of the input.

    Raises:
        TypeError, ValueError: shapes do not fit; packed input without `cu_seqlens`.

    Packed sequences are attended one by one, which reads `cu_seqlens` on the host.
    """
    cross = kv is not None
    _checks.tensor("q", q, ndim=(3, 4) if cross else (4, 5))
    if not cross and q.shape[-3] != 3:
        raise ValueError(f"self-attention takes interleaved qkv [..., 3, H, D], got {tuple(q.shape)}")
    if cross:
        _checks.tensor("kv", kv, ndim=q.ndim + 1)
        if kv.shape[-3] != 2 or kv.shape[-2:] != q.shape[-2:]:
            want = f"[..., 2, {q.shape[-2]}, {q.shape[-1]}]"
            raise ValueError(f"kv must be interleaved {want} to go with q, got {tuple(kv.shape)}")
        _checks.same_device(q=q, kv=kv)
    packed = q.ndim == (3 if cross else 4)
    if not packed:
        if cu_seqlens_q is not None or cu_seqlens_k is not None:
            raise ValueError("cu_seqlens go with packed input; this input has a batch dimension")
        return attention_reference(*_split(q, kv), scale)
    if cu_seqlens_q is None or (cross and cu_seqlens_k is None):
        raise ValueError("packed input needs cu_seqlens_q" + (" and cu_seqlens_k" if cross else ""))
    starts_q = _starts("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    starts_k = _starts("cu_seqlens_k", cu_seqlens_k, kv.shape[0]) if cross else starts_q
    if len(starts_q) != len(starts_k):
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k differ in length: {len(starts_q)} and {len(starts_k)}")
    parts = []
    for i in range(len(starts_q) - 1):
        own = q[None, starts_q[i] : starts_q[i + 1]]
        keys = kv[None, starts_k[i] : starts_k[i + 1]] if cross else None
        parts.append(attention_reference(*_split(own, keys), scale)[0])
    return torch.cat(parts)


def _split(q: Tensor, kv: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Views q, k, v as [B, S, H, D]."""
    return q.unbind(-3) if kv is None else (q, *kv.unbind(-3))


def _starts(name: str, cu_seqlens: Tensor, total: int) -> list[int]:
    _checks.tensor(name, cu_seqlens, ndim=1, floating=False)
    starts = cu_seqlens.tolist()
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != total or sorted(starts) != starts:
        raise ValueError(f"{name} must rise from 0 to the {total} packed rows, got {starts}")
    return starts


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """[B, Sq, H, D] from q [B, Sq, H, D], k and v [B, Sk, H, D], by torch's scaled_dot_product_attention."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
