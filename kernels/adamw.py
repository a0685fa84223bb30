"""Triton kernel of the adamw family: one step of AdamW over up to 16 tensors in a launch.

The addresses go as arguments of the launch, which a CUDA graph keeps; each program picks its tensor's by a chain of
selects. A table of addresses in device memory would make it one launch instead of ten for a ViT-B, but gradients move,
so it would be copied from the host again, which a capture allows only from memory that is kept for it. One launch a
tensor would make it 150, most of them for a thousand numbers.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import OPTIONS, ceil_div, check_dtypes, guard, power

TENSORS = 16  # a launch
BLOCK = 2048  # elements a program: 16 a thread
ALIGNED = 16  # elements: a whole number of these keeps accesses 16 bytes wide


@triton.jit
def adamw_kernel(
    weights, grads, averages, squares, highests, shadows, steps, sizes, lr, grad_scale, found_inf,
    decay, beta1, rest1, log_beta1, beta2, rest2, log_beta2, eps,
    HIGHEST: tl.constexpr, SHADOW: tl.constexpr, LR_TENSOR: tl.constexpr, SCALED: tl.constexpr, FOUND: tl.constexpr,
    MAXIMIZE: tl.constexpr, UNIT: tl.constexpr, TENSORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one tensor, which has (sizes[i] - 3) / 2 * UNIT elements. rest = 1 - beta; decay: of the weights."""
    block = tl.program_id(0)
    weight, grad, exp_avg, exp_avg_sq, step = weights[0], grads[0], averages[0], squares[0], steps[0]
    highest = highests[0] if HIGHEST else None
    shadow = shadows[0] if SHADOW else None
    count = ((sizes[0] - 3) // 2).to(tl.int64)
    first = block * 0
    end = tl.cdiv(count * UNIT, BLOCK).to(tl.int32)
    for i in tl.static_range(1, TENSORS):
        past = block >= end
        weight = tl.where(past, weights[i], weight)
        grad = tl.where(past, grads[i], grad)
        exp_avg = tl.where(past, averages[i], exp_avg)
        exp_avg_sq = tl.where(past, squares[i], exp_avg_sq)
        if HIGHEST:
            highest = tl.where(past, highests[i], highest)
        if SHADOW:
            shadow = tl.where(past, shadows[i], shadow)
        step = tl.where(past, steps[i], step)
        own = ((sizes[i] - 3) // 2).to(tl.int64)
        count = tl.where(past, own, count)
        first = tl.where(past, end, first)
        end += tl.cdiv(own * UNIT, BLOCK).to(tl.int32)
    at = (block - first).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count * UNIT
    # 1 - beta^t from the logarithm, in float64: no digits are lost where the power is near 1.
    t = tl.load(step).to(tl.float64)
    correction1 = (1.0 - tl.exp(t * log_beta1)).to(tl.float32)
    correction2 = (1.0 - tl.exp(t * log_beta2)).to(tl.float32)
    rate = tl.load(lr) if LR_TENSOR else lr
    p = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    live = inside
    if FOUND:
        finite = tl.load(found_inf) == 0.0
        live = at < tl.where(finite, count, 0) * UNIT
    g = tl.load(grad + at, mask=live, other=0.0).to(tl.float32)
    if SCALED:
        g = g / tl.load(grad_scale)
        tl.store(grad + at, g.to(grad.dtype.element_ty), mask=live)
    if MAXIMIZE:
        g = -g
    m = beta1 * tl.load(exp_avg + at, mask=live, other=0.0).to(tl.float32) + rest1 * g
    v = beta2 * tl.load(exp_avg_sq + at, mask=live, other=0.0).to(tl.float32) + rest2 * g * g
    tl.store(exp_avg + at, m.to(exp_avg.dtype.element_ty), mask=live)
    tl.store(exp_avg_sq + at, v.to(exp_avg_sq.dtype.element_ty), mask=live)
    if HIGHEST:
        old = tl.load(highest + at, mask=live, other=0.0).to(tl.float32)
        v = tl.where((v > old) | (v != v), v, old)  # NaN wins, as in torch.maximum
        tl.store(highest + at, v.to(highest.dtype.element_ty), mask=live)
    new = p - rate * decay * p
    new -= (rate / correction1) * m / (tl.sqrt_rn(v) / tl.sqrt_rn(correction2) + eps)
    tl.store(weight + at, new.to(weight.dtype.element_ty), mask=live)
    if SHADOW:
        if FOUND:
            new = tl.where(finite, new, p)
        tl.store(shadow + at, new.to(shadow.dtype.element_ty), mask=inside)


def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    shadows: list[Tensor],
    steps: list[Tensor],
    lr_tensor: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """In place; every list is as long as `params`, or empty where that is allowed."""
    check_dtypes("adamw", *params, *grads, *shadows)
    torch._foreach_add_(steps, 1)
    scalars = {"decay": weight_decay, "eps": eps}
    for name, beta in (("1", beta1), ("2", beta2)):
        scalars |= {f"beta{name}": beta, f"rest{name}": 1 - beta}
        scalars[f"log_beta{name}"] = math.log(beta) if beta > 0 else -math.inf
    rate = lr if lr_tensor is None else lr_tensor
    flags = {
        "HIGHEST": bool(max_exp_avg_sqs),
        "SHADOW": bool(shadows),
        "LR_TENSOR": lr_tensor is not None,
        "SCALED": grad_scale is not None,
        "FOUND": found_inf is not None,
        "MAXIMIZE": bool(maximize),
    }
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, shadows, steps)
    # The tensors of one launch share their dtypes and whether their number of elements is a multiple of ALIGNED.
    kinds: dict[tuple, list[int]] = {}
    for i, (param, grad) in enumerate(zip(params, grads)):
        if param.numel():
            copy = shadows[i].dtype if shadows else None
            kinds.setdefault((param.dtype, grad.dtype, copy, param.numel() % ALIGNED == 0), []).append(i)
    for (*_, even), members in kinds.items():
        unit, size = ALIGNED if even else 1, min(TENSORS, power(len(members)))
        for start in range(0, len(members), size):
            chosen = members[start : start + size]
            counts = [params[i].numel() for i in chosen]
            spare = size - len(chosen)
            chosen += chosen[:1] * spare  # tensors without elements, for which there is no program
            picked = [tuple([tensors[i] for i in chosen]) if tensors else None for tensors in lists]
            # Never 1, never a multiple of 16: Triton would compile another kernel for each mixture of those.
            sizes = tuple([2 * (count // unit) + 3 for count in counts] + [3] * spare)
            grid = (sum(ceil_div(count, BLOCK) for count in counts),)
            with guard(params[0]):
                adamw_kernel[grid](
                    *picked, sizes, rate, grad_scale, found_inf, **scalars, **flags,
                    UNIT=unit, TENSORS=size, BLOCK=BLOCK, num_warps=4, **OPTIONS,
                )  # fmt: skip
    if found_inf is not None:
        torch._foreach_sub_(steps, [(found_inf.reshape(()) != 0).float()] * len(steps))


OPS = {"adamw": adamw}
