"""Multi-head attention over short sequences, dense or packed: self-attention from interleaved qkv, cross-attention from
q and interleaved kv. Which library or kernel serves a call is decided in `_attention_table`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from maefast.ops import _attention_table, _autograd, _checks, _registry
from maefast.ops.positions import Rope, check_bias, check_device, check_rope, rotated

_raw_op = _registry.family("attention")


class AttentionStats(NamedTuple):
    """What a query's attention looks like, [..., Sq, H] in float32 (float64 for float64), with gradients.

    lse: log of the sum of exponentials of its scores. entropy: -sum p log p, in nats. mass: share of its attention
    on marked keys, or None. -inf, 0 and 0 for a query that sees no key.
    """

    lse: Tensor
    entropy: Tensor
    mass: Tensor | None


def attention(
    q: Tensor,
    kv: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    key_bias: Tensor | None = None,
    bias: Tensor | None = None,
    rope: Rope | None = None,
    marked: Tensor | None = None,
    stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, AttentionStats]:
    """``softmax(q k^T * scale + key_bias + bias) v`` for each head (Vaswani et al., 2017).

    Args:
        q: self-attention: interleaved qkv, [B, S, 3, H, D] or packed [T, 3, H, D]; cross-attention: queries,
            [B, Sq, H, D] or packed [Tq, H, D] (for example only the masked tokens of a decoder).
        kv: None, or interleaved keys and values, [B, Sk, 2, H, D] or packed [Tk, 2, H, D].
        cu_seqlens_q: int32 [B+1], where each packed sequence starts, rising from 0 to T; required for packed input.
        cu_seqlens_k: the same for `kv`; cross-attention only.
        max_seqlen_q, max_seqlen_k: longest sequence, if known; otherwise read from `cu_seqlens` (on a GPU a sync).
        scale: defaults to 1 / sqrt(D).
        causal: query i attends to keys 0..i only; self-attention only.
        key_bias: added to the scores of each key and head, [B, Sk, H] or packed [Tk, H]. -inf rules the key out: its
            weight and its gradients are exactly 0. So does what overflows to it on the way to base 2, anything below
            about -2.3e38, such as `torch.finfo(torch.float32).min`. +inf and NaN give NaN.
        bias: added to the scores of each pair, [G, H, Sq, Sk], [H, Sq, Sk] for G = 1, or with one head for all; float32
            or the dtype of q, dense input only. Sequence b takes group b % G: the windows of an image (Liu et al.,
            2021), or one for all (Bao et al., 2022; see `relative_bias`). -inf rules the pair out as with `key_bias`.
            Its gradient is summed in float32 (float64 for float64), in a fixed order.
        rope: `Rope`: q and k are rotated before the products, self-attention only. In float32, and rounded once where a
            kernel multiplies 16-bit numbers.
        marked: bool [B, Sk] or packed [Tk]; with `stats`, their share of the attention is returned.
        stats: also return AttentionStats.

    Returns:
        [B, Sq, H, D] or packed [Tq, H, D] in the input's dtype; with `stats` a pair. float16 and bfloat16 are computed
        in float32 inside. On a CPU, and with backend "triton" or "cuda", gradients are the same bits at every run. On a
        GPU the automatic choice may be a library whose backward adds in no fixed order; after
        ``torch.use_deterministic_algorithms(True)`` it is a kernel of ours where one serves the call, and elsewhere
        torch's own, which then follows that switch. A kernel's backward finds the weights again from the log-sum-exp,
        whose 24 bits leave them off by about 1e-7 of it (1e-4 at scores of 1000), on a CPU beyond 256 keys only.

        A query that sees no key, because its sequence has none or all are ruled out, gets zeros; its log-sum-exp is
        -inf, its entropy and mass are 0. Nothing flows back through it, whatever the gradients of its statistics (those
        of a loss of lse = -inf may be infinite).

    Raises:
        TypeError, ValueError: wrong shape, dtype or device; head width not a multiple of 8 or above 128 (backends
        other than the reference and torch's); packed input without `cu_seqlens`, or one that does not fit; `bias` with
        packed input; `rope` with cross-attention or with tensors that require grad.
    """
    cross = kv is not None
    _check_heads(q, kv)
    packed = q.ndim == (3 if cross else 4)
    causal, stats = _checks.flag("causal", causal), _checks.flag("stats", stats)
    if causal and cross:
        raise ValueError("causal attention is defined for self-attention only")
    if packed:
        batch, max_q, max_k = _check_packed(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        cu_seqlens_q = cu_seqlens_q.contiguous()
        cu_seqlens_k = None if cu_seqlens_k is None else cu_seqlens_k.contiguous()
    else:
        if cu_seqlens_q is not None or cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_q and cu_seqlens_k go with packed input; this q has a batch dimension")
        batch, max_q = q.shape[:2]
        max_k = kv.shape[1] if cross else max_q
        if cross and kv.shape[0] != batch:
            raise ValueError(f"q has {batch} sequences and kv {kv.shape[0]}")
    keys = (kv if cross else q).shape[: 1 if packed else 2]
    _check_extras(q, keys, key_bias, marked, stats)
    if bias is not None or rope is not None:
        check_device(q, bias, rope)
    if bias is not None:
        bias = check_bias(bias, q.dtype, batch, q.shape[-2], max_q, max_k, packed)
    tokens = q.shape[: 1 if packed else 2]
    turn = (None, None, False) if rope is None else check_rope(rope, q.dtype, tokens, q.shape[-1], cross)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    else:
        _checks.number("scale", scale)
        scale = float(scale)

    call = _attention_table.Call(
        device=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        max_q=max_q,
        max_k=max_k,
        packed=packed,
        cross=cross,
        causal=causal,
        extras=key_bias is not None or bias is not None or rope is not None or stats,
        scaled=scale != q.shape[-1] ** -0.5,
        repeatable=_attention_table.repeatable(q, kv),
    )
    name = _attention_table.choose(call, backend)
    if name in _attention_table.LIBRARIES:
        return _attention_table.LIBRARIES[name](q, kv, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, causal)
    if not packed:  # one view of all rows; equal lengths need no cu_seqlens
        q, kv, key_bias, marked = (t if t is None else t.flatten(0, 1) for t in (q, kv, key_bias, marked))
    args = (cu_seqlens_q, cu_seqlens_k, batch, max_q, max_k, scale, causal, stats)
    if name == "reference":
        out, lse, entropy, mass = attention_reference(q, kv, key_bias, marked, *args, bias, *turn)
    else:
        out, lse, entropy, mass = _autograd.apply(_Attention, q, kv, key_bias, bias, marked, *args, *turn, name)
    if not packed:
        out = out.unflatten(0, (batch, max_q))
    if not stats:
        return out
    found = [lse, entropy, mass] if marked is not None else [lse, entropy]
    if not packed:
        found = [t.unflatten(0, (batch, max_q)) for t in found]
    return out, AttentionStats(*found, *([None] if marked is None else []))


def _check_heads(q: Tensor, kv: Tensor | None) -> None:
    cross = kv is not None
    _checks.tensor("q", q, ndim=(3, 4) if cross else (4, 5))
    if not cross and q.shape[-3] != 3:
        raise ValueError(f"q must be interleaved qkv [..., 3, H, D] for self-attention, got {tuple(q.shape)}")
    if q.shape[-1] < 1 or q.shape[-2] < 1:
        raise ValueError(f"q must have at least one head of width one, got shape {tuple(q.shape)}")
    if not cross:
        return
    _checks.tensor("kv", kv, ndim=q.ndim + 1)
    if kv.shape[-3] != 2 or kv.shape[-2:] != q.shape[-2:]:
        want = f"[..., 2, {q.shape[-2]}, {q.shape[-1]}]"
        raise ValueError(f"kv must be interleaved {want} to go with q, got {tuple(kv.shape)}")
    if kv.dtype is not q.dtype:
        raise TypeError(f"q is {q.dtype} but kv is {kv.dtype}")
    _checks.same_device(q=q, kv=kv)


def _check_packed(q, kv, cu_q, cu_k, max_q, max_k) -> tuple[int, int, int]:
    """(number of sequences, longest query and key sequence) of packed input."""
    if cu_q is None or (kv is not None and cu_k is None):
        raise ValueError("packed input needs cu_seqlens_q" + (" and cu_seqlens_k" if kv is not None else ""))
    if kv is None and cu_k is not None:
        raise ValueError("self-attention takes cu_seqlens_q alone")
    max_q = check_starts("cu_seqlens_q", cu_q, q, max_q)
    if kv is None:
        return cu_q.shape[0] - 1, max_q, max_q
    _check_cu("cu_seqlens_k", cu_k)
    if cu_q.shape != cu_k.shape:
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k differ in length: {cu_q.shape[0]} and {cu_k.shape[0]}")
    return cu_q.shape[0] - 1, max_q, check_starts("cu_seqlens_k", cu_k, kv, max_k)


def check_starts(name: str, cu: Tensor, rows: Tensor, longest: int | None) -> int:
    """`cu` rises from 0 to the number of rows: checked at once on a CPU, by device-side assertion on a GPU. Once for
    each tensor, as long as nobody writes into it: a plan serves many blocks. Returns the longest sequence."""
    compiling = torch.compiler.is_compiling()
    if not compiling and isinstance(cu, Tensor) and not cu.is_inference():
        known = cu.__dict__.get("_maefast_starts")
        if known is not None and known[:4] == (cu._version, rows.shape[0], rows.device, longest):
            return known[4]
    _check_cu(name, cu)
    if longest is not None:
        _checks.integer(name.replace("cu_", "max_").replace("lens", "len"), longest)
    _checks.same_device(q=rows, **{name: cu})
    lengths = cu.diff()
    total = rows.shape[0]
    if compiling:  # sizes may be symbols there
        message = f"{name} must rise from 0 to the number of packed rows in steps of at most its max_seqlen"
    else:
        steps = "" if longest is None else f" in steps of at most {longest}"
        message = f"{name} must rise from 0 to the {total} packed rows{steps}"
    fits = (lengths >= 0).all() & (cu[0] == 0) & (cu[-1] == total)
    if longest is not None:
        fits = fits & (lengths <= longest).all()
    _checks.holds(fits, message)
    found = int(lengths.max()) if longest is None else longest
    if not compiling and not cu.is_inference():
        cu._maefast_starts = (cu._version, total, rows.device, longest, found)
    return found


def _check_cu(name: str, cu: Tensor) -> None:
    _checks.tensor(name, cu, ndim=1, floating=False)
    if cu.dtype is not torch.int32:
        raise TypeError(f"{name} must be int32, got {cu.dtype}")
    if cu.shape[0] < 2:
        raise ValueError(f"{name} must hold at least two starts, got {cu.shape[0]}")


def _check_extras(q: Tensor, keys: torch.Size, key_bias: Tensor | None, marked: Tensor | None, stats: bool) -> None:
    _checks.same_device(q=q, key_bias=key_bias, marked=marked)
    if key_bias is not None:
        _checks.tensor("key_bias", key_bias)
        if tuple(key_bias.shape) != (*keys, q.shape[-2]):
            raise ValueError(f"key_bias must be {[*keys, q.shape[-2]]} (keys, heads), got {list(key_bias.shape)}")
    if marked is not None:
        _checks.tensor("marked", marked, floating=False)
        if not stats:
            raise ValueError("marked keys are only used for the statistics: give stats=True")
        if marked.dtype is not torch.bool or tuple(marked.shape) != tuple(keys):
            raise ValueError(f"marked must be bool {list(keys)}, got {marked.dtype} {list(marked.shape)}")


def attention_reference(
    q: Tensor,
    kv: Tensor | None,
    key_bias: Tensor | None,
    marked: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    batch: int,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
    stats: bool,
    bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition on packed rows, differentiable: (out [Tq, H, D], lse, entropy, mass [Tq, H]).

    Sequences are attended one by one; equal lengths (no cu_q) in one batch. 16-bit input is computed in float32. bias:
    [G, H, Sq, Sk]. cos, sin: [Tq, D], or [Sq, D] for all sequences.
    """
    dtype = q.dtype
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    q, k, v = (t.to(wide) for t in (q.unbind(1) if kv is None else (q, *kv.unbind(1))))
    if cos is not None:
        if cu_q is None and cos.shape[0] != q.shape[0]:
            cos, sin = cos.repeat(batch, 1), sin.repeat(batch, 1)
        q, k = (rotated(t, cos, sin, interleaved) for t in (q, k))
    if cu_q is None:
        keys = [t if t is None else t.unflatten(0, (batch, max_k)) for t in (k, v, key_bias, marked)]
        results = [t.flatten(0, 1) for t in _attend(q.unflatten(0, (batch, max_q)), *keys, scale, causal, bias)]
    else:
        own = [q.split(cu_q.diff().tolist())]
        lengths_k = (cu_q if kv is None else cu_k).diff().tolist()
        own += [[None] * batch if t is None else t.split(lengths_k) for t in (k, v, key_bias, marked)]
        found = [_attend(*(t if t is None else t[None] for t in sample), scale, causal) for sample in zip(*own)]
        results = [torch.cat([t[0] for t in column]) for column in zip(*found)]
    return results[0].to(dtype), *results[1:]


def _as_added(bias: Tensor, wide: torch.dtype) -> Tensor:
    """-inf where it is that in base 2, as the kernels add it."""
    bias = bias.to(wide)
    return bias.masked_fill(bias.float() * math.log2(math.e) == float("-inf"), float("-inf"))


def _attend(q, k, v, key_bias, marked, scale: float, causal: bool, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    """One batch of equal lengths: q [B, Sq, H, D], k and v [B, Sk, H, D] -> out, lse, entropy, mass."""
    scores = torch.einsum("bqhd,bkhd->bqhk", q, k) * scale
    if key_bias is not None:
        scores = scores + _as_added(key_bias, q.dtype).transpose(1, 2)[:, None]
    if bias is not None:
        groups = bias.shape[0]
        scores = scores.unflatten(0, (q.shape[0] // groups, groups)) + _as_added(bias, q.dtype).transpose(1, 2)
        scores = scores.flatten(0, 1)
    if causal:
        later = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later[:, None], float("-inf"))
    # -inf is replaced where it would meet another or a 0, so that derivatives of any order are 0 there instead of NaN.
    ruled_out = scores == float("-inf")
    top = scores.detach().amax(-1) if k.shape[1] else scores.new_full(scores.shape[:-1], float("-inf"))
    blind = top == float("-inf")  # sees no key
    t = (scores - top.masked_fill(blind, 0)[..., None]).masked_fill(ruled_out, 0)
    e = t.exp().masked_fill(ruled_out, 0)
    total = e.sum(-1).masked_fill(blind, 1)
    p = e / total[..., None]
    out = torch.einsum("bqhk,bkhd->bqhd", p, v)
    lse = top + total.log()
    entropy = total.log() - (p * t).sum(-1)
    mass = torch.zeros_like(lse) if marked is None else (p * marked[:, None, None]).sum(-1)
    return out, lse, entropy, mass


@_raw_op(
    "attention(Tensor q, Tensor? kv, Tensor? cu_q, Tensor? cu_k, SymInt batch, SymInt max_q, SymInt max_k,"
    " float scale, bool causal, Tensor? key_bias, Tensor? marked, bool stats, Tensor? bias=None, Tensor? cos=None,"
    " Tensor? sin=None, bool interleaved=False) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _attention_fake(
    q, kv, cu_q, cu_k, batch, max_q, max_k, scale, causal, key_bias, marked, stats, bias=None, cos=None, sin=None,
    interleaved=False,
):  # fmt: skip
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    rows, heads, width = q.shape[0], q.shape[-2], q.shape[-1]
    row = lambda wanted: q.new_empty((rows, heads) if wanted else (0,), dtype=wide)  # noqa: E731
    return q.new_empty((rows, heads, width)), row(True), row(stats), row(stats and marked is not None)


@_raw_op(
    "attention_backward(Tensor grad, Tensor? grad_lse, Tensor? grad_entropy, Tensor? grad_mass, Tensor q,"
    " Tensor? kv, Tensor out, Tensor lse, Tensor entropy, Tensor mass, Tensor? cu_q, Tensor? cu_k, SymInt batch,"
    " SymInt max_q, SymInt max_k, float scale, bool causal, Tensor? key_bias, Tensor? marked, bool need_key_bias,"
    " Tensor? bias=None, Tensor? cos=None, Tensor? sin=None, bool interleaved=False, bool need_bias=False)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _attention_backward_fake(
    grad, grad_lse, grad_entropy, grad_mass, q, kv, out, lse, entropy, mass, cu_q, cu_k, batch, max_q, max_k, scale,
    causal, key_bias, marked, need_key_bias, bias=None, cos=None, sin=None, interleaved=False, need_bias=False,
):  # fmt: skip
    return (
        q.new_empty(q.shape),
        q.new_empty((0,) if kv is None else kv.shape),
        q.new_empty(key_bias.shape if need_key_bias else (0,), dtype=torch.float32),
        q.new_empty(bias.shape if need_bias else (0,), dtype=torch.float32),
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q, kv, key_bias, bias, marked, cu_q, cu_k, batch, max_q, max_k, scale, causal, stats, cos, sin,
        interleaved, name,
    ):  # fmt: skip
        q, kv = q.contiguous(), None if kv is None else kv.contiguous()
        key_bias = None if key_bias is None else key_bias.float().contiguous()
        marked = None if marked is None else marked.contiguous()
        args = (batch, max_q, max_k, scale, causal)
        run = _registry.raw("attention", name)
        out, lse, entropy, mass = run(q, kv, cu_q, cu_k, *args, key_bias, marked, stats, bias, cos, sin, interleaved)
        if ctx is not None:
            ctx.save_for_backward(q, kv, out, lse, entropy, mass, cu_q, cu_k, key_bias, marked, bias, cos, sin)
            ctx.args, ctx.stats, ctx.interleaved, ctx.backend = args, stats, interleaved, name
            ctx.set_materialize_grads(False)
        return out, lse, entropy, mass

    @staticmethod
    @_autograd.once("attention")
    def backward(ctx, grad, grad_lse, grad_entropy, grad_mass):
        q, kv, out, lse, entropy, mass, cu_q, cu_k, key_bias, marked, *places = ctx.saved_tensors
        grad = torch.zeros_like(out) if grad is None else grad.contiguous()
        # Statistics that were not asked for are empty; torch.compile hands their gradients on as zeros all the same.
        given = (ctx.stats, ctx.stats, ctx.stats and marked is not None)
        extra = [
            t.contiguous() if use and t is not None else None
            for use, t in zip(given, (grad_lse, grad_entropy, grad_mass))
        ]
        need_q, need_kv, need_key_bias, need_bias = ctx.needs_input_grad[:4]
        run = _registry.raw("attention_backward", ctx.backend)
        found = run(
            grad, *extra, q, kv, out, lse, entropy, mass, cu_q, cu_k, *ctx.args, key_bias, marked, need_key_bias,
            *places, ctx.interleaved, need_bias,
        )  # fmt: skip
        needs = need_q, need_kv, need_key_bias, need_bias
        return *(t if need else None for t, need in zip(found, needs)), *(None,) * 13
