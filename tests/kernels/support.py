"""Random plans and the comparison rule of the kernel tests."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from maefast.ops.mask import TokenMask, token_mask

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

# The interpreter's bfloat16 arithmetic is wrong in places, so bfloat16 waits for a GPU.
DTYPES = [torch.float32, torch.float16, *([] if INTERPRET else [torch.bfloat16])]

# Error against float64 plain PyTorch: sums and norms in float32; one rounding of the output in a 16-bit dtype.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def property_test(examples: int):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


def random_plan(batch: int, tokens: int, keep: int | list[int], seed: int, device: str = "cpu") -> TokenMask:
    scores = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed))
    return token_mask(scores, keep, backend="reference").to(device)


def random_tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(out: Tensor, ref: Tensor, what: str, dtype: torch.dtype | None = None) -> None:
    """||out - ref|| <= tolerance * ||ref||; elements nobody wrote are NaN and fail. `dtype` if not out's."""
    assert tuple(out.shape) == tuple(ref.shape), f"{what}: {tuple(out.shape)} instead of {tuple(ref.shape)}"
    low, high = out.detach().double().cpu(), ref.detach().double().cpu()
    error = (low - high).norm() / high.norm().clamp(min=1e-30)
    if high.numel() == 0 or bool((low == high).all()):
        return
    bound = TOLERANCE[dtype or out.dtype]
    assert bool(error <= bound), f"{what}: relative error {float(error):.3g}, allowed {bound}"
