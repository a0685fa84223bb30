"""What the op tests share: backends at hand, random plans, and the comparison rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from maefast import masking
from maefast.ops import TokenMask, _dispatch, token_mask
from maefast.ops.mask import ABSENT
from tests.budget import examples

property_test = settings(
    max_examples=examples(8, 25),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

# Relative error of a kernel against the float64 reference. The 16-bit bounds are a few roundings of the dtype:
# values are computed in float32 and rounded once, sums are rounded once at the end.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def backends(op: str, *, reference: bool = True, cuda: bool = True) -> list:
    """(backend, device) parameters for raw op `op`; what this machine cannot run is skipped with the reason.

    cuda=False: the CUDA C++ kernel serves only a part of the contract and has tests of its own in tests/ops/cuda.
    """
    params = []
    for name, device in (("reference", "cpu"), ("cpu", "cpu"), ("triton", "cuda"), ("cuda", "cuda")):
        if (name == "reference" and not reference) or (name == "cuda" and not cuda):
            continue
        marks = [pytest.mark.gpu] if device == "cuda" else []
        if device == "cpu" and (reason := _dispatch.unavailable(op, name, device)) is not None:
            marks.append(pytest.mark.skip(reason=reason))
        if name == "cuda" and torch.cuda.is_available() and op not in _dispatch.CUDA_OPS:
            marks.append(pytest.mark.skip(reason=f"{op} has no CUDA C++ kernel here"))
        params.append(pytest.param((name, device), id=name, marks=marks))
    return params


def dtypes_of(backend: str) -> list[torch.dtype]:
    every = [torch.float32, torch.float16, torch.bfloat16]
    return every if backend in ("triton", "cuda") else [*every, torch.float64]


@st.composite
def plans(draw, max_batch: int = 4, max_tokens: int = 23, absent: bool = False) -> TokenMask:
    """Plans of odd sizes: one token, all visible, none visible, ragged counts, both orders. absent: some tokens are
    neither visible nor masked, or all of a sample's."""
    batch = draw(st.integers(1, max_batch))
    tokens = draw(st.integers(1, max_tokens))
    if absent:
        ragged = draw(st.booleans())
        pair = st.integers(0, tokens).flatmap(lambda k: st.tuples(st.just(k), st.integers(0, tokens - k)))
        pairs = draw(st.lists(pair, min_size=batch, max_size=batch)) if ragged else [draw(pair)] * batch
        scores = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**16))))
        keep, hide = map(list, zip(*pairs))
        order = draw(st.sampled_from(["score", "position"]))
        return token_mask(scores, keep, hide=hide, order=order, backend="reference")
    counts = st.integers(0, tokens)
    keep = draw(st.one_of(counts, st.lists(counts, min_size=batch, max_size=batch)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    order = draw(st.sampled_from(["score", "position"]))
    return masking.random(batch, tokens, keep=keep, generator=generator, order=order, backend="reference")


def check_invariants(plan: TokenMask) -> None:
    """What every plan promises: each token once or absent, the inverse, counts that add up."""
    both = torch.cat([plan.visible, plan.masked]).long()
    slot = plan.slot.long()
    assert torch.equal(both.sort().values, torch.where(slot != ABSENT)[0])
    assert len(both) + plan.total_absent == plan.batch * plan.num_tokens
    assert torch.equal(slot[plan.visible.long()], torch.arange(plan.total_visible, device=plan.device))
    assert torch.equal(~slot[plan.masked.long()], torch.arange(plan.total_masked, device=plan.device))
    for flat, cu, most in (
        (plan.visible, plan.cu_visible, plan.max_visible),
        (plan.masked, plan.cu_masked, plan.max_masked),
    ):
        sample = torch.div(flat, plan.num_tokens, rounding_mode="floor").long()
        counts = torch.bincount(sample, minlength=plan.batch)
        assert torch.equal(counts, cu.diff().long())
        assert int(counts.max()) == most
        assert bool((sample.diff() >= 0).all())
    for tensor in (plan.visible, plan.masked, plan.slot, plan.cu_visible, plan.cu_masked):
        assert tensor.dtype is torch.int32


def relative_error(out: Tensor, ref: Tensor) -> float:
    """||out - ref|| / ||ref|| in float64; NaN (an output that was never written) stays NaN and fails."""
    out, ref = out.detach().double().cpu(), ref.detach().double().cpu()
    assert out.shape == ref.shape, (out.shape, ref.shape)
    if out.numel() == 0:
        return 0.0
    scale = ref.norm()
    return float((out - ref).norm() / scale) if scale > 0 else float(out.norm())


def assert_close(out: Tensor, ref: Tensor, dtype: torch.dtype, what: str = "output") -> None:
    error = relative_error(out, ref)
    assert error <= TOLERANCE[dtype], f"{what}: relative error {error:.3g} in {dtype}"


def compare(call, inputs: dict[str, Tensor], backend: str, device: str, dtype: torch.dtype, seed: int = 0) -> None:
    """`call(backend, device, **inputs)` against the same call on the reference in float64: output and gradients.

    The float64 side starts from the inputs as rounded to `dtype`, so only the kernel's own error is left.
    """
    rounded = {name: value.to(dtype) for name, value in inputs.items()}
    low = {name: value.to(device).requires_grad_() for name, value in rounded.items()}
    high = {name: value.double().requires_grad_() for name, value in rounded.items()}
    out, ref = call(backend, device, **low), call("reference", "cpu", **high)
    assert_close(out, ref, dtype)
    weights = torch.randn(ref.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    grads = torch.autograd.grad(out, list(low.values()), weights.to(device), allow_unused=True)
    wanted = torch.autograd.grad(ref, list(high.values()), weights.double(), allow_unused=True)
    for name, grad, want in zip(inputs, grads, wanted):
        if grad is None and want is None:
            continue  # the output does not depend on it
        want = torch.zeros_like(high[name]) if want is None else want
        assert grad is not None, f"{name} got no gradient"
        assert grad.dtype is low[name].dtype
        assert_close(grad, want, dtype, f"gradient of {name}")
