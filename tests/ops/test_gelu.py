"""bias_gelu: erf and tanh forms, both gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from maefast import ops
from maefast.ops import _registry

from .common import assert_close, backends, compare, dtypes_of, property_test

BACKENDS = backends("bias_gelu")
FORMS = ["none", "tanh"]


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
@property_test
def test_gelu_and_every_gradient(where, form, data):
    backend, device = where
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))
    shape = [*data.draw(st.lists(st.integers(1, 6), max_size=2)), data.draw(st.integers(1, 70))]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    inputs = {"x": 2 * torch.randn(shape, generator=generator)}
    if data.draw(st.booleans()):
        inputs["bias"] = torch.randn(shape[-1], generator=generator)
    compare(
        lambda backend, device, x, bias=None: ops.bias_gelu(x, bias, form, backend=backend),
        inputs,
        backend,
        device,
        dtype,
    )


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_tails_and_special_values(where, form):
    """Far tails keep their relative accuracy where GELU is large, go to 0 where it vanishes, and NaN stays NaN."""
    backend, device = where
    x = torch.tensor([[-40.0, -12, -6, -1e-3, -0.0, 0, 1e-30, 1e-3, 6, 12, 40, 1e20]], device=device)
    out = ops.bias_gelu(x, None, form, backend=backend).cpu()
    want = F.gelu(x.cpu().double(), approximate=form)
    torch.testing.assert_close(out.double(), want, rtol=2e-6, atol=1e-7)
    odd = torch.full((1, 20), float("nan"), device=device)
    assert ops.bias_gelu(odd, None, form, backend=backend).isnan().all()


@pytest.mark.parametrize("where", backends("bias_gelu", reference=False))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_largest_numbers(where, form, dtype):
    """GELU is x or 0, the slope 1 or 0, however far out."""
    backend, device = where
    sizes = [14.0, 40, 1e3, 6e4] + ([] if dtype is torch.float16 else [1e10, 1e18, 1e20, 1e30, 1e37, 3e38])
    x = torch.tensor([sizes, [-s for s in sizes]], device=device, dtype=dtype).requires_grad_()
    out = ops.bias_gelu(x, None, form, backend=backend)
    (slope,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out, x.clamp(min=0), rtol=0, atol=1e-34)
    torch.testing.assert_close(slope, (x > 0).to(dtype), rtol=0, atol=1e-30)


@pytest.mark.parametrize("where", BACKENDS)
def test_no_columns(where):
    backend, device = where
    x = torch.zeros(3, 0, device=device, requires_grad=True)
    out = ops.bias_gelu(x, None, backend=backend)
    assert out.shape == torch.autograd.grad(out.sum(), x)[0].shape == (3, 0)
    assert ops.bias_gelu(x, torch.zeros(0, device=device), backend=backend).shape == (3, 0)


@pytest.mark.parametrize("where", BACKENDS)
def test_runs_agree_bit_for_bit(where):
    backend, device = where
    leaves = [torch.randn(s, device=device, requires_grad=True) for s in ((997, 96), (96,))]
    runs = []
    for _ in range(2):
        out = ops.bias_gelu(*leaves, backend=backend)
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("where", BACKENDS)
def test_non_contiguous_input(where):
    backend, device = where
    x = torch.randn(6, 8, device=device).t()[:, ::2]
    bias = torch.randn(6, device=device)[::2]
    got = ops.bias_gelu(x, bias, backend=backend)
    assert_close(got, F.gelu((x + bias).double()), torch.float32)


@pytest.mark.parametrize("where", BACKENDS)
def test_output_written_in_place(where):
    backend, device = where
    x = torch.randn(2, 3, 8, device=device, requires_grad=True)
    (want,) = torch.autograd.grad(2 * ops.bias_gelu(x, None, backend=backend).sum(), x)
    (got,) = torch.autograd.grad(ops.bias_gelu(x, None, backend=backend).mul_(2).sum(), x)
    torch.testing.assert_close(got, want)


X, B = torch.randn(2, 3, 4), torch.randn(4)
BAD = [
    (lambda: ops.bias_gelu(X, B[:3]), ValueError, "bias must hold 4"),
    (lambda: ops.bias_gelu(X, B, "sigmoid"), ValueError, "approximate must be one of"),
    (lambda: ops.bias_gelu(X.int(), None), TypeError, "float32"),
    (lambda: ops.bias_gelu(X, B.to("meta")), ValueError, "one device"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("where", backends("bias_gelu", reference=False))
def test_opcheck(where):
    backend, device = where
    x, grad, bias = torch.rand(5, 6, device=device), torch.rand(5, 6, device=device), torch.rand(6, device=device)
    for tanh in (False, True):
        torch.library.opcheck(_registry.raw("bias_gelu", backend), (x, bias, tanh))
        torch.library.opcheck(_registry.raw("bias_gelu_backward", backend), (grad, x, bias, tanh, True))
        torch.library.opcheck(_registry.raw("bias_gelu_backward", backend), (grad, x, bias, tanh, True, True))
        torch.library.opcheck(_registry.raw("bias_gelu_backward", backend), (grad, x, None, tanh, False))


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(where, dynamic):
    backend, device = where
    step = lambda x, bias: ops.bias_gelu(x, bias, backend=backend).square().sum()  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        inputs = [
            torch.randn(2, rows, 8, device=device, requires_grad=True),
            torch.randn(8, requires_grad=True, device=device),
        ]
        got = torch.autograd.grad(compiled(*inputs), inputs)
        for a, b in zip(got, torch.autograd.grad(step(*inputs), inputs)):
            torch.testing.assert_close(a, b)
