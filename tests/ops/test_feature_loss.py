"""feature_loss: forward and gradient of every norm and loss, with and without an index."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast import ops

from .common import backends, compare, dtypes_of, property_test

FORMS = [(n, k) for n in ("none", "layernorm", "l2") for k in ("mse", "l1", "smooth_l1")] + [("none", "cosine")]


@pytest.mark.parametrize("where", backends("feature_loss"))
@given(data=st.data())
@property_test
def test_every_form(where, data):
    backend, device = where
    norm, loss = data.draw(st.sampled_from(FORMS))
    rows, width = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 70))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))
    index = torch.randint(0, 5, (rows,), generator=generator) if data.draw(st.booleans()) else None
    target = torch.randn(rows if index is None else 5, width, generator=generator).to(dtype)

    def call(backend, device, pred):
        at = None if index is None else index.to(device)
        options = {"norm": norm, "loss": loss, "power": 2.0, "beta": 0.5, "reduction": "none", "index": at}
        return ops.feature_loss(pred, target.to(pred), **options, backend=backend)

    compare(call, {"pred": torch.randn(rows, width, generator=generator)}, backend, device, dtype)


@pytest.mark.parametrize(("norm", "loss"), FORMS)
def test_gradcheck(norm, loss):
    pred = torch.randn(3, 5, dtype=torch.float64).requires_grad_()
    target = torch.randn(3, 5, dtype=torch.float64)
    for backend in ("reference", None):
        assert torch.autograd.gradcheck(
            lambda p: ops.feature_loss(p, target, norm=norm, loss=loss, backend=backend),  # noqa: B023
            (pred,),
        )


@pytest.mark.parametrize(("norm", "loss"), FORMS)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_zero_and_constant_rows(norm, loss, value):
    target = torch.full((2, 6), value)
    for backend in ("reference", None):
        pred = target.clone().requires_grad_()
        out = ops.feature_loss(pred, target, norm=norm, loss=loss, power=1.5, backend=backend)
        (grad,) = torch.autograd.grad(out, pred)
        assert bool(out.isfinite())
        assert bool(grad.isfinite().all())


X = torch.randn(4, 6)
BAD = [
    (lambda: ops.feature_loss(X, X[:3]), ValueError, "target"),
    (lambda: ops.feature_loss(X, X, norm="l2", loss="cosine"), ValueError, "norm"),
    (lambda: ops.feature_loss(X, X, power=0.5), ValueError, "power"),
    (lambda: ops.feature_loss(X, X, index=torch.tensor([0, 1, 2, 4])), ValueError, "index is out of range"),
    (lambda: ops.feature_loss(X, X, index=torch.zeros(4)), TypeError, "index"),
    (lambda: ops.feature_loss(X[:0], X[:0]), ValueError, "no rows"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_clear_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
