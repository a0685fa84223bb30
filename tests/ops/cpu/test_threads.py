"""The number of threads never changes a bit of a result: sums over the batch are cut by size alone."""

from __future__ import annotations

import pytest
import torch

from maefast.ops import token_mask
from tests.ops.cpu.common import needs_cpu_ops, randn, raw

pytestmark = needs_cpu_ops


@pytest.fixture
def on_threads():
    """Calls a function with 1, 2, 3 and 5 threads; returns the results."""
    before = torch.get_num_threads()

    def run(call):
        results = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            out = call()
            results.append(out if isinstance(out, tuple) else (out,))
        return results

    yield run
    torch.set_num_threads(before)


# Batches that are cut into one piece, into several because there are few tokens, and because there are many samples.
SIZES = [(6, 50, 96), (40, 3, 200), (150, 20, 40)]


def calls(batch: int, tokens: int, width: int, dtype: torch.dtype) -> dict:
    keep = [(7 * b) % (tokens + 1) for b in range(batch)]
    scores = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(0))
    plan = token_mask(scores, keep, backend="reference")
    lists = plan.visible, plan.masked, plan.cu_visible
    prefix, rows = 1, plan.total_visible + batch
    full, packed = randn(batch, 1 + tokens, width, dtype=dtype), randn(rows, width, dtype=dtype)
    token, pos = randn(width, dtype=dtype, seed=1), randn(1 + tokens, width, dtype=dtype, seed=2)
    images = randn(batch, 3, 1, 4, 6 * tokens, dtype=dtype)
    patch = [1, 4, 6]
    pred = randn(plan.total_masked, 72, dtype=dtype)
    loss_args = patch, True, False, 1, 0, 1.0
    each, stats = raw("patch_loss", pred, images, plan.masked, *loss_args)
    flat, wide = full.flatten(0, 1), torch.float64 if dtype is torch.float64 else torch.float32
    weight = randn(width, dtype=wide, seed=3)
    narrow = torch.float16 if dtype is torch.float32 else dtype
    mean, rstd = raw("add_norm", flat, None, weight, weight, 1e-6, dtype)[2:]
    grad_args = torch.ones_like(each), pred, images, plan.masked, plan.slot, stats, *loss_args
    restore_args = plan.visible, plan.masked, plan.slot, plan.cu_visible, 1 + tokens, prefix
    return {
        "token_mask": lambda: raw("token_mask", scores, plan.cu_visible, plan.total_visible, False),
        "gather": lambda: raw("gather_tokens", full, plan.visible, plan.cu_visible, plan.max_visible, prefix, True),
        "gather_backward": lambda: raw(
            "gather_tokens_backward", packed, plan.slot, plan.cu_visible, prefix, True, False
        ),
        "patch_rows": lambda: raw("patch_rows", images, plan.visible, patch, torch.float32),
        "place": lambda: raw(
            "place_tokens", packed[batch:], plan.visible, plan.cu_visible, tokens, pos[1:].contiguous(), pos[:1]
        ),
        "place_backward": lambda: raw(
            "place_tokens_backward", packed, plan.slot, plan.cu_visible, prefix, True, True, dtype
        ),
        "restore": lambda: raw("restore_tokens", packed, *lists, token, pos, prefix, False, False),
        "restore_backward": lambda: raw("restore_tokens_backward", full, *restore_args, False, False, True, dtype),
        "patch_loss": lambda: raw("patch_loss", pred, images, plan.masked, *loss_args),
        "add_norm": lambda: raw("add_norm", flat, flat, weight, weight, 1e-6, dtype),
        "add_norm_backward": lambda: raw("add_norm_backward", flat, flat, flat, mean, rstd, weight, True),
        "add_norm_backward_all": lambda: raw(
            "add_norm_backward", flat, flat, flat, mean, rstd, weight, True, weight, narrow, True
        ),
        "bias_gelu": lambda: raw("bias_gelu", flat, weight, False),
        "bias_gelu_backward": lambda: raw("bias_gelu_backward", flat, flat, weight, False, True, True),
        "patch_loss_backward": lambda: raw("patch_loss_backward", *grad_args, True),
    }


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_threads_change_nothing(size, dtype, on_threads):
    for name, call in calls(*size, dtype).items():
        first, *others = on_threads(call)
        for other in others:
            for a, b in zip(first, other):
                assert torch.equal(a, b), name
