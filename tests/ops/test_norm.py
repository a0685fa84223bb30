"""add_norm: residual add and LayerNorm in one pass, every gradient, mixed precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from maefast import ops
from maefast.ops import _registry

from .common import assert_close, backends, compare, dtypes_of, property_test

BACKENDS = backends("add_norm")


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("output", ["both", "residual", "normed"])
@given(data=st.data())
@property_test
def test_norm_and_every_gradient(where, output, data):
    backend, device = where
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))
    # Rows of a few values are ill-conditioned: the norm of two values is a sign.
    shape = [*data.draw(st.lists(st.integers(1, 6), max_size=2)), data.draw(st.integers(8, 70))]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    inputs = {"x": torch.randn(shape, generator=generator) + 0.5}
    if data.draw(st.booleans()):
        inputs["delta"] = torch.randn(shape, generator=generator)
    inputs["weight"], inputs["bias"] = (torch.randn(shape[-1], generator=generator) for _ in range(2))

    def call(backend, device, x, weight, bias, delta=None):
        residual, y = ops.add_norm(x, delta, weight, bias, backend=backend)
        if output == "both":
            return residual + 2 * y
        return residual * 1 if output == "residual" else y

    compare(call, inputs, backend, device, dtype)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("width", [1, 8, 192, 512, 768, 1024, 1280])
def test_equals_layer_norm(where, width):
    backend, device = where
    torch.manual_seed(0)
    x, delta = (torch.randn(7, width, device=device) * 3 + 5 for _ in range(2))
    weight, bias = torch.randn(width, device=device), torch.randn(width, device=device)
    residual, y = ops.add_norm(x, delta, weight, bias, 1e-6, backend=backend)
    assert torch.equal(residual, x + delta)
    want = F.layer_norm((x + delta).double(), (width,), weight.double(), bias.double(), 1e-6)
    assert_close(y, want, torch.float32)
    same, alone = ops.add_norm(x, None, weight, bias, 1e-6, backend=backend)
    assert same is x
    assert_close(alone, F.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-6), torch.float32)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_mixed_precision(where, low):
    """A float32 stream takes a 16-bit delta and hands out 16-bit y; the stream itself stays float32."""
    backend, device = where
    torch.manual_seed(0)
    x = torch.randn(5, 48, device=device, requires_grad=True)
    delta = torch.randn(5, 48, device=device).to(low).requires_grad_()
    weight, bias = (torch.randn(48, device=device, requires_grad=True) for _ in range(2))
    with torch.autocast(device, low):
        residual, y = ops.add_norm(x, delta, weight, bias, backend=backend)
    assert residual.dtype is torch.float32
    assert y.dtype is low
    assert torch.equal(residual, x + delta)
    doubles = [t.detach().double().requires_grad_() for t in (x, delta, weight, bias)]
    ref = ops.add_norm(*doubles, backend="reference")
    assert_close(y, ref[1], low)
    seeds = torch.randn_like(residual), torch.randn(5, 48, device=device).to(low)
    got = torch.autograd.grad([residual, y], [x, delta, weight, bias], seeds)
    want = torch.autograd.grad(ref, doubles, [s.double() for s in seeds])
    for grad, wanted, leaf in zip(got, want, (x, delta, weight, bias)):
        assert grad.dtype is leaf.dtype
        assert_close(grad, wanted, leaf.dtype)


@pytest.mark.parametrize("where", BACKENDS)
def test_runs_agree_bit_for_bit(where):
    backend, device = where
    leaves = [torch.randn(s, device=device, requires_grad=True) for s in ((997, 96), (997, 96), (96,), (96,))]
    runs = []
    for _ in range(2):
        residual, y = ops.add_norm(*leaves, backend=backend)
        runs.append([residual, y, *torch.autograd.grad((residual * y).sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("where", BACKENDS)
def test_outputs_written_in_place(where):
    """y may be; the residual stream, which the backward reads, is guarded."""
    backend, device = where
    leaves = [torch.randn(s, device=device, requires_grad=True) for s in ((2, 3, 8), (2, 3, 8), (8,), (8,))]
    _, y = ops.add_norm(*leaves, backend=backend)
    want = torch.autograd.grad(2 * y.sum(), leaves)
    residual, y = ops.add_norm(*leaves, backend=backend)
    for got, wanted in zip(torch.autograd.grad(y.mul_(2).sum(), leaves), want):
        torch.testing.assert_close(got, wanted)
    residual, y = ops.add_norm(*leaves, backend=backend)
    residual.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        torch.autograd.grad(y.sum(), leaves)


X, W = torch.randn(2, 3, 4), torch.randn(4)
BAD = [
    (lambda: ops.add_norm(X, X[:1], W, W), ValueError, "delta must have the shape"),
    (lambda: ops.add_norm(X, None, W[:3], W), ValueError, "weight must hold 4"),
    (lambda: ops.add_norm(X, None, W, W[:3]), ValueError, "bias must hold 4"),
    (lambda: ops.add_norm(X, None, W, W, 0.0), ValueError, "eps must be positive"),
    (lambda: ops.add_norm(X, None, W, W, float("nan")), ValueError, "eps must be positive"),
    (lambda: ops.add_norm(X.int(), None, W, W), TypeError, "float32"),
    (lambda: ops.add_norm(X, X.to("meta"), W, W), ValueError, "one device"),
    (lambda: ops.add_norm(X, None, W, W, dtype=torch.float64), TypeError, "16 bits beside float32"),
    (lambda: ops.add_norm(X[..., :0], None, W[:0], W[:0]), ValueError, "at least one channel"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("where", backends("add_norm", reference=False))
def test_opcheck(where):
    backend, device = where
    x, delta, grad = (torch.rand(5, 6, device=device) for _ in range(3))
    weight, bias = torch.rand(6, device=device), torch.rand(6, device=device)
    run = _registry.raw("add_norm", backend)
    for added in (None, delta):
        torch.library.opcheck(run, (x, added, weight, bias, 1e-6, torch.float32))
    torch.library.opcheck(run, (x, delta, weight, bias, 1e-6, torch.float32, bias))
    mean, rstd = run(x, None, weight, bias, 1e-6, torch.float32)[2:]
    for passed, need, more in ((None, False, ()), (grad, True, ()), (grad, True, (bias, torch.float16, True))):
        args = (grad, passed, x, mean, rstd, weight, need, *more)
        torch.library.opcheck(_registry.raw("add_norm_backward", backend), args)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(where, dynamic):
    backend, device = where

    def step(x, delta, weight, bias):
        residual, y = ops.add_norm(x, delta, weight, bias, backend=backend)
        return (residual * ops.add_norm(y, None, weight, bias, backend=backend)[1]).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        inputs = [torch.randn(s, device=device, requires_grad=True) for s in ((2, rows, 8), (2, rows, 8), (8,), (8,))]
        got = torch.autograd.grad(compiled(*inputs), inputs)
        want = torch.autograd.grad(step(*inputs), inputs)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b)
