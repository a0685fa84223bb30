"""Random plans and the comparison rule of the kernel tests."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from maefast.ops.mask import TokenMask, token_mask
from tests.budget import examples

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

# The interpreter's bfloat16 arithmetic is wrong in places, so bfloat16 waits for a GPU.
DTYPES = [torch.float32, torch.float16, *([] if INTERPRET else [torch.bfloat16])]

# Error against float64 plain PyTorch: sums and norms in float32; one rounding of the output in a 16-bit dtype. The
# interpreter divides and takes powers as NumPy does, to half a unit; a device has ex2.approx and a division of 2 units.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
ON_A_DEVICE = {**TOLERANCE, torch.float32: 3e-6}


def property_test(most: int):
    """Triton's interpreter, which is slow, tries half of the examples at most."""
    return settings(
        max_examples=examples(max(8, most // 3), max(8, most // 2) if INTERPRET else most),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


def random_plan(
    batch: int, tokens: int, keep: int | list[int], seed: int, device: str = "cpu", absent: bool = False
) -> TokenMask:
    """absent: a random part of the tokens that are not visible is not masked either."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch, tokens, generator=generator)
    hide = None
    if absent:
        kept = [keep] * batch if isinstance(keep, int) else keep
        hide = [int(torch.randint(0, tokens - k + 1, (), generator=generator)) for k in kept]
    return token_mask(scores, keep, hide=hide, backend="reference").to(device)


def random_tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bound(out: Tensor, dtype: torch.dtype | None = None) -> float:
    """The relative error that a result may have where it was computed; `dtype` if not its own."""
    return (ON_A_DEVICE if out.is_cuda else TOLERANCE)[dtype or out.dtype]


def assert_close(out: Tensor, ref: Tensor, what: str, dtype: torch.dtype | None = None) -> None:
    """||out - ref|| <= tolerance * ||ref||; elements nobody wrote are NaN and fail. `dtype` if not out's.

    The error is printed in any case, for `pytest -rP`: on a device's first run, by how much a bound is missed or kept
    tells more than that it is.
    """
    assert tuple(out.shape) == tuple(ref.shape), f"{what}: {tuple(out.shape)} instead of {tuple(ref.shape)}"
    low, high = out.detach().double().cpu(), ref.detach().double().cpu()
    error = (low - high).norm() / high.norm().clamp(min=1e-30)
    if high.numel() == 0 or bool((low == high).all()):
        return
    allowed = bound(out, dtype)
    print(f"{what}: relative error {float(error):.3g} of {allowed} in {str(dtype or out.dtype)[6:]}")
    assert bool(error <= allowed), f"{what}: relative error {float(error):.3g}, allowed {allowed}"
