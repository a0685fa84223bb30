"""The other ways to compute attention that torch and xformers have, at their best for interleaved qkv.

What a library needs once for a batch, however many layers follow (its mask, int32 starts), is made before the clock
runs and kept with the inputs; copies of the data itself are part of the time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from maefast.bench.micro.op import BOTH, Case, Inputs, Peer

HALF = (torch.float16, torch.bfloat16)


def kept(inputs: Inputs, name: str, make: Callable[[], Any]) -> Any:
    """What a peer needs once for a batch. The warm-up makes it, before any time is taken."""
    if name not in inputs:
        inputs[name] = make()
    return inputs[name]


def starts(inputs: Inputs) -> tuple[Tensor, Tensor, int]:
    """(packed qkv [T, 3, H, D], cu_seqlens, longest) of a dense or a ragged batch."""
    qkv = inputs["qkv"]
    if "cu" in inputs:
        return qkv, inputs["cu"], inputs["longest"]
    batch, length = qkv.shape[:2]
    cu = kept(inputs, "_cu", lambda: length * torch.arange(batch + 1, dtype=torch.int32, device=qkv.device))
    return qkv.flatten(0, 1), cu, length


def lengths(inputs: Inputs) -> list[int]:
    return inputs["lengths"] if "lengths" in inputs else [inputs["qkv"].shape[1]] * inputs["qkv"].shape[0]


# --- scaled_dot_product_attention, one backend at a time ----------------------------------------------------------


def sdpa(backend: str) -> Peer:
    choice = getattr(SDPBackend, backend)

    def run(inputs: Inputs) -> Tensor:
        q, k, v = inputs["qkv"].permute(2, 0, 3, 1, 4).unbind(0)
        with sdpa_kernel(choice):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def unable(case: Case) -> str | None:
        if case.device == "cpu" and backend in ("EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
            return "torch has it on CUDA only"
        if case.device == "cuda" and backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION") and case.dtype not in HALF:
            return "float16 and bfloat16 only"
        return None

    return Peer(run, unable)


# --- FlexAttention ------------------------------------------------------------------------------------------------


@functools.cache
def _flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    # Shapes are static: for a varying number of rows torch 2.13 has written C++ that does not compile.
    return torch.compile(flex_attention, dynamic=False)


def flex(inputs: Inputs) -> Tensor:
    """A packed batch is one sequence whose mask lets a token see its own sample only."""
    qkv = inputs["qkv"]
    if not torch.is_grad_enabled():
        qkv = qkv.detach()  # on a CPU it refuses leaves even where no gradient is asked for
    if "lengths" not in inputs:
        return _flex()(*qkv.permute(2, 0, 3, 1, 4).unbind(0)).transpose(1, 2)
    mask = kept(inputs, "_block_mask", lambda: _by_sample(lengths(inputs), qkv.device))
    return _flex()(*qkv[None].permute(2, 0, 3, 1, 4).unbind(0), block_mask=mask)[0].transpose(0, 1)


def _by_sample(counts: list[int], device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    sample = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)
    rows = len(sample)
    return create_block_mask(lambda b, h, q, k: sample[q] == sample[k], None, None, rows, rows, device=str(device))


def _flex_unable(case: Case) -> str | None:
    if case.device == "cpu" and case.direction == BOTH:
        return "on a CPU FlexAttention has no backward"
    return None


# --- packed sequences ---------------------------------------------------------------------------------------------


def varlen(inputs: Inputs) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    qkv, cu, longest = starts(inputs)
    out = varlen_attn(*qkv.unbind(1), cu, cu, longest, longest)
    return out.view(inputs["qkv"].shape[:-3] + out.shape[-2:])


def _varlen_unable(case: Case) -> str | None:
    try:
        import torch.nn.attention.varlen  # noqa: F401
    except ImportError:
        return "this torch has no torch.nn.attention.varlen"
    if case.device != "cuda":
        return "CUDA only"
    return None if case.dtype in HALF else "float16 and bfloat16 only"


def jagged(inputs: Inputs) -> Tensor:
    """Nested tensors over the packed rows. Their SDPA wants q, k and v contiguous: one copy of each."""
    qkv, cu, longest = starts(inputs)
    options = {"min_seqlen": min(lengths(inputs)), "max_seqlen": longest}
    q, k, v = (torch.nested.nested_tensor_from_jagged(t.contiguous(), cu, **options) for t in qkv.unbind(1))
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
    return out.transpose(1, 2).values()


def xformers(inputs: Inputs) -> Tensor:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    qkv = inputs["qkv"]
    if "lengths" not in inputs:
        return memory_efficient_attention(*qkv.unbind(2))
    mask = kept(inputs, "_diagonal", lambda: BlockDiagonalMask.from_seqlens(lengths(inputs)))
    return memory_efficient_attention(*qkv[None].unbind(2), attn_bias=mask)[0]


def _xformers_unable(case: Case) -> str | None:
    if not _has_xformers():
        return "not installed"
    return None if case.device == "cuda" else "CUDA only"


@functools.cache
def _has_xformers() -> bool:
    try:
        import xformers.ops  # noqa: F401
    except Exception:  # built for another torch, it may fail in any way
        return False
    return True


FLEX = Peer(flex, _flex_unable, compiled=True)
VARLEN = Peer(varlen, _varlen_unable)
XFORMERS = Peer(xformers, _xformers_unable)
DENSE = {
    "sdpa_flash": sdpa("FLASH_ATTENTION"),
    "sdpa_efficient": sdpa("EFFICIENT_ATTENTION"),
    "sdpa_cudnn": sdpa("CUDNN_ATTENTION"),
    "sdpa_math": sdpa("MATH"),
    "varlen": VARLEN,
    "xformers": XFORMERS,
    "flex": FLEX,
}
RAGGED = {"varlen": VARLEN, "xformers": XFORMERS, "jagged": Peer(jagged), "flex": FLEX}
