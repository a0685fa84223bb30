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
