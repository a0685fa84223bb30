"""chamfer: forward and both gradients, groups of any sizes, ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast import ops
from maefast.ops import _registry
from maefast.ops.chamfer import chamfer_reference

from .common import backends, compare, dtypes_of, property_test

BACKENDS = backends("chamfer")


@st.composite
def cases(draw):
    groups, coordinates = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    sets = {name: torch.randn(groups, draw(st.integers(1, 40)), coordinates, generator=generator) for name in "ab"}
    if draw(st.booleans()):
        sets = {name: points.round() for name, points in sets.items()}  # many equal distances
    return sets, draw(st.sampled_from(["mean", "sum", "none"]))


@given(case=cases())
@property_test
def test_reference_equals_cdist(case):
    sets, reduction = case
    a, b = (points.double() for points in sets.values())
    distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    want = distance.min(2).values.mean(1) + distance.min(1).values.mean(1)
    want = {"mean": want.mean(), "sum": want.sum(), "none": want}[reduction]
    torch.testing.assert_close(
        ops.chamfer(a, b, reduction=reduction, backend="reference"), want, rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("where", BACKENDS)
@given(case=cases(), data=st.data())
@property_test
def test_chamfer_and_every_gradient(where, case, data):
    backend, device = where
    sets, reduction = case

    def call(backend, device, a, b):
        return ops.chamfer(a, b, reduction=reduction, backend=backend)

    dtype = data.draw(st.sampled_from(dtypes_of(backend)))
    # In float32, which every dtype but float64 is computed in, other points may be nearest than in float64.
    sets = {name: (points * 64).round() / 64 for name, points in sets.items()}
    compare(call, sets, backend, device, dtype)


@pytest.mark.parametrize("where", backends("chamfer", reference=False))
def test_equal_distances_go_to_the_first(where):
    backend, device = where
    a, b = torch.zeros(1, 3, 2, device=device), torch.tensor([[[1.0, 0], [0, 1], [-1, 0]]], device=device)
    grads = {}
    for name in (backend, "reference"):
        leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
        ops.chamfer(*leaves, backend=name).backward()
        grads[name] = [leaf.grad.cpu() for leaf in leaves]
    assert all(torch.equal(x, y) for x, y in zip(*grads.values()))
    assert not bool(grads[backend][1][0, 1:, :].abs().sum() == 0)


def test_gradcheck():
    a, b = (torch.randn(2, n, 3, dtype=torch.float64).requires_grad_() for n in (4, 6))
    for backend in ("reference", None):
        assert torch.autograd.gradcheck(lambda a, b: ops.chamfer(a, b, backend=backend), (a, b))  # noqa: B023


@pytest.mark.parametrize("where", BACKENDS)
def test_runs_agree_bit_for_bit_and_zero_on_itself(where):
    backend, device = where
    a, b = (torch.randn(64, n, 3, device=device).requires_grad_() for n in (32, 32))
    runs = []
    for _ in range(2):
        out = ops.chamfer(a, b, backend=backend)
        runs.append([out, *torch.autograd.grad(out, (a, b))])
    assert all(torch.equal(x, y) for x, y in zip(*runs))
    assert ops.chamfer(a, a, backend=backend).item() == 0


def test_large_sets_on_a_cpu():
    a, b = torch.randn(1, 1500, 3), torch.randn(1, 1100, 3)
    want = sum(d.mean(1) for d in chamfer_reference(a, b))
    torch.testing.assert_close(ops.chamfer(a, b, reduction="none"), want)


A = torch.randn(2, 5, 3)
BAD = [
    (lambda: ops.chamfer(A, A[:1]), ValueError, "must agree in batch and coordinates"),
    (lambda: ops.chamfer(A, A[..., :2]), ValueError, "must agree in batch and coordinates"),
    (lambda: ops.chamfer(A, A.double()), TypeError, "convert one"),
    (lambda: ops.chamfer(A, A[:, :0]), ValueError, "b must be"),
    (lambda: ops.chamfer(A[0], A), ValueError, "a"),
    (lambda: ops.chamfer(A, A, reduction="max"), ValueError, "reduction"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_clear_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("where", backends("chamfer", reference=False))
def test_opcheck_and_bounds(where):
    backend, device = where
    a, b = torch.randn(2, 4, 3, device=device), torch.randn(2, 6, 3, device=device)
    out = _registry.raw("chamfer", backend)(a, b)
    torch.library.opcheck(_registry.raw("chamfer", backend), (a, b))
    torch.library.opcheck(_registry.raw("chamfer_backward", backend), (*out[:2], a, b, *out[2:]))
    if backend == "cpu":
        with pytest.raises(RuntimeError, match="out of range"):
            _registry.raw("chamfer_backward", backend)(*out[:2], a, b, out[2] + 6, out[3])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(ops.chamfer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for groups in (2, 3):
        a, b = torch.randn(groups, 5, 3).requires_grad_(), torch.randn(groups, 7, 3)
        want, got = ops.chamfer(a, b), compiled(a, b)
        assert torch.equal(want, got)
        assert torch.equal(*(torch.autograd.grad(out, a)[0] for out in (want, got)))
