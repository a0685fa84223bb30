"""Who serves an attention call: one table, from measurements (`dispatch_data.json`), printed by `maefast doctor`.

Ours for the short sequences of masked autoencoders, what torch already has elsewhere. A rule applies where its kernel
is at hand and takes the call; the first that applies wins. A rule for the CUDA C++ kernel needs evidence, too, that its
tests passed on a device.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.ops import _dispatch, _dispatch_data
from maefast.ops._dispatch_data import AttentionRule as Rule

KERNELS = ("cuda", "triton", "cpu")  # ours, behind the raw op; "reference" is always there
CUDA_LONGEST = 256  # kLongest of csrc/cuda/attention_kernel.cuh


class Call(NamedTuple):
    """What the choice depends on."""

    device: str
    dtype: torch.dtype
    head_dim: int
    max_q: int
    max_k: int
    packed: bool
    cross: bool
    causal: bool
    extras: bool  # biases, rotation or statistics, which no library serves
    scaled: bool = False  # by another factor than 1 / sqrt(head_dim)
    repeatable: bool = False  # gradients are wanted, and the same bits at every run


TABLE = _dispatch_data.DATA.attention


def unavailable(name: str, call: Call) -> str | None:
    """Why backend or library `name` cannot serve the call, or None."""
    if name in KERNELS:
        if call.head_dim % 8 or not 16 <= call.head_dim <= 128:
            return f"the kernels take head widths 16 to 128 in steps of 8, not {call.head_dim}"
        if name == "cpu" and call.dtype is torch.float64:
            return "the C++ attention does not serve float64"
        if name == "cuda":
            if call.extras:
                return "the CUDA C++ kernel has no biases, rotation or statistics"
            if max(call.max_q, call.max_k) > CUDA_LONGEST or call.dtype not in (torch.float16, torch.bfloat16):
                return f"the CUDA C++ kernel takes float16 and bfloat16, up to {CUDA_LONGEST} tokens"
        return _dispatch.unavailable("attention", name, call.device, call.dtype)
    if name == "reference":
        return None
    if call.extras:
        return f"{name} has no biases by head, rotation or statistics"
    if name == "varlen":
        if not call.packed or call.device != "cuda":
            return "varlen_attn takes packed sequences on CUDA"
        if call.dtype not in (torch.float16, torch.bfloat16) or call.head_dim % 8:
            return "varlen_attn takes float16 and bfloat16, head widths in steps of 8"
        if _varlen_attn() is None:
            return "this torch has no torch.nn.attention.varlen"
        if call.scaled and "scale" not in _varlen_parameters():
            return "varlen_attn of this torch takes no scale"
    if name == "xformers":
        if call.device != "cuda":
            return "xformers has attention on CUDA only"
        if call.dtype not in (torch.float32, torch.float16, torch.bfloat16) or call.head_dim % 8:
            return "xformers takes float32, float16 and bfloat16, head widths in steps of 8"
        if (reason := _xformers()[1]) is not None:
            return reason
    return None


def choose(call: Call, asked: str | None) -> str:
    """The backend ("cpu", "triton", "cuda", "reference") or library (a key of LIBRARIES) that serves a call."""
    name = (
        asked
        if isinstance(asked, str) and asked in LIBRARIES
        else _dispatch.check_name(asked, "backend") or _dispatch.forced()
    )
    if name is not None:
        if (reason := unavailable(name, call)) is not None:
            raise RuntimeError(f"backend {name!r} was asked for, but attention cannot use it: {reason}")
        return name
    for rule in TABLE:
        if call.repeatable and call.device == "cuda" and rule.backend in LIBRARIES:
            continue  # their backward may add in the order in which blocks finish
        if _fits(rule, call) and unavailable(rule.backend, call) is None:
            return rule.backend
    return "reference" if call.extras else "sdpa"


def _fits(rule: Rule, call: Call) -> bool:
    if rule.device != call.device or (rule.backend == "cuda" and "attention" not in _dispatch.CUDA_EVIDENCE):
        return False
    return (
        (rule.longest is None or max(call.max_q, call.max_k) <= rule.longest)
        and (rule.packed is None or rule.packed == call.packed)
        and (rule.dtypes is None or call.dtype in rule.dtypes)
        and (rule.widths is None or rule.widths[0] < call.head_dim <= rule.widths[1])
    )


def repeatable(*tensors: Tensor | None) -> bool:
    """Whether gradients will be asked for after ``torch.use_deterministic_algorithms(True)``."""
    if not torch.are_deterministic_algorithms_enabled() or not torch.is_grad_enabled():
        return False
    # A mere warning does not move torch's kernels either. While tracing, nobody can ask, and it counts as the switch.
    if not torch.compiler.is_compiling() and torch.is_deterministic_algorithms_warn_only_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


def why(device: str) -> list[tuple[str, str]]:
    """(backend, reason) of the rules that can apply on "cpu" or "cuda", in order, for `maefast doctor`."""
    if (name := _dispatch.forced()) is not None:
        return [(name, "forced")]
    rows = []
    for rule in TABLE:
        if rule.device != device:
            continue
        if rule.backend in KERNELS and _dispatch.unavailable("attention", rule.backend, device) is not None:
            continue
        if rule.backend == "cuda" and "attention" not in _dispatch.CUDA_EVIDENCE:
            continue
        note = _limits(rule)
        if rule.backend in LIBRARIES and device == "cuda":
            note += "; gradients not bit for bit (not chosen for them after torch.use_deterministic_algorithms(True))"
        rows.append((rule.backend, rule.why + note))
    return rows


def _limits(rule: Rule) -> str:
    """For whom the rule is, in words."""
    parts = [] if rule.longest is None else [f"up to {rule.longest} queries and keys"]
    parts += [] if rule.widths is None else [f"heads {rule.widths[0] + 1} to {rule.widths[1]} wide"]
    parts += [] if rule.dtypes is None else [" and ".join(str(dtype)[6:] for dtype in rule.dtypes)]
    # That the rule of before any measurement is for dense calls, its `why` says.
    parts += [] if rule.packed is None or rule.longest is None else ["packed" if rule.packed else "dense"]
    return "".join(f", {part}" for part in parts)


# --- libraries -----------------------------------------------------------------------------------------------


def _sdpa(q, kv, cu_q, cu_k, max_q, max_k, scale: float, causal: bool) -> Tensor:
    """torch's scaled_dot_product_attention; packed sequences one by one, which reads `cu_seqlens` on the host."""
    parts = q.unbind(-3) if kv is None else (q, *kv.unbind(-3))
    if cu_q is None:
        return _sdpa_dense(*parts, scale, causal)
    lengths = cu_q.diff().tolist()
    lengths_k = lengths if kv is None else cu_k.diff().tolist()
    samples = zip(parts[0].split(lengths), parts[1].split(lengths_k), parts[2].split(lengths_k))
    return torch.cat([_sdpa_dense(*(t[None] for t in sample), scale, causal)[0] for sample in samples])


def _sdpa_dense(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    if causal and scale <= 0:  # torch scales its -inf too: to +inf or NaN. The sign goes into q, exactly.
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal).transpose(1, 2)


def _varlen_attn():
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def _varlen_parameters() -> Mapping[str, inspect.Parameter]:
    return inspect.signature(_varlen_attn()).parameters


def _varlen(q, kv, cu_q, cu_k, max_q, max_k, scale: float, causal: bool) -> Tensor:
    q, k, v = q.unbind(1) if kv is None else (q, *kv.unbind(1))
    cu_k = cu_q if kv is None else cu_k
    # What it takes has changed since torch 2.10: scale came, is_causal became window_size.
    known = _varlen_parameters()
    options = {"scale": scale} if "scale" in known else {}
    if causal:
        options.update({"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)})
    return _varlen_attn()(q, k, v, cu_q, cu_k, max_q, max_k, **options)


@functools.cache
def _xformers() -> tuple[ModuleType | None, str | None]:
    """(xformers.ops, why it cannot be used)."""
    try:
        module = importlib.import_module("xformers.ops")
    except ModuleNotFoundError as error:
        return None, "xformers is not installed" if error.name == "xformers" else f"xformers does not import: {error}"
    except Exception as error:  # built for another torch or CUDA, it may fail in any way
        return None, f"xformers does not import: {type(error).__name__}: {error}"
    return module, None


def _xformers_attention(q, kv, cu_q, cu_k, max_q, max_k, scale: float, causal: bool) -> Tensor:
    """For those who ask for it by name; not in TABLE before it is measured. Its mask needs the lengths on the host."""
    library, bias = _xformers()[0], importlib.import_module("xformers.ops.fmha.attn_bias")
    parts = q.unbind(-3) if kv is None else (q, *kv.unbind(-3))
    if cu_q is None:
        if max_q and not max_k:
            raise ValueError("xformers does not serve queries without keys")
        mask = bias.LowerTriangularMask() if causal else None
        return library.memory_efficient_attention(*parts, attn_bias=mask, scale=scale)
    lengths = cu_q.diff().tolist()
    lengths_k = lengths if kv is None else cu_k.diff().tolist()
    if any(n and not m for n, m in zip(lengths, lengths_k, strict=True)):
        raise ValueError("xformers does not serve queries without keys")
    kind = bias.BlockDiagonalCausalMask if causal else bias.BlockDiagonalMask
    # Older ones have no `device` and move the mask with each call.
    options = {"device": q.device} if "device" in inspect.signature(kind.from_seqlens).parameters else {}
    mask = kind.from_seqlens(lengths, lengths_k, **options)
    return library.memory_efficient_attention(*(t[None] for t in parts), attn_bias=mask, scale=scale)[0]


LIBRARIES = {"sdpa": _sdpa, "varlen": _varlen, "xformers": _xformers_attention}
