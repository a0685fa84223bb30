"""feature_loss: forward and gradient of every norm and loss, with and without an index."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from maefast import ops
from maefast.ops import _registry

from .common import assert_close, backends, compare, dtypes_of, property_test

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


def torch_form(pred, target, norm, loss):
    """The loss of each row from torch's own functions."""
    if loss == "cosine":
        return 1 - F.cosine_similarity(pred, target, dim=-1)
    if norm == "layernorm":
        target = F.layer_norm(target, target.shape[-1:], eps=1e-6)
    elif norm == "l2":
        pred, target = F.normalize(pred, dim=-1), F.normalize(target, dim=-1)
    function = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}[loss]
    return function(pred, target, reduction="none").mean(-1)


@pytest.mark.parametrize("where", backends("feature_loss"))
@pytest.mark.parametrize(("norm", "loss"), FORMS)
def test_equals_torch(where, norm, loss):
    backend, device = where
    dtype = torch.float64 if device == "cpu" else torch.float32
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(2, 3, 40, generator=generator).to(device, dtype).requires_grad_()
    target = (torch.randn(9, 40, generator=generator) * 3 + 1).to(device, dtype)
    index = torch.tensor([[8, 0, 3], [3, 1, 2]], device=device)
    want = torch_form(pred, target[index], norm, loss)
    got = ops.feature_loss(pred, target, index=index, norm=norm, loss=loss, reduction="none", backend=backend)
    assert_close(got, want.flatten(), dtype)
    assert_close(*(torch.autograd.grad(out.sum(), pred)[0] for out in (got, want)), dtype)
    for reduction in ("mean", "sum"):
        got = ops.feature_loss(pred, target[index], norm=norm, loss=loss, reduction=reduction, backend=backend)
        assert_close(got, getattr(want, reduction)(), dtype)


@pytest.mark.parametrize("where", backends("feature_loss"))
@pytest.mark.parametrize("gap", [1e-2, 1e-3, 1e-5])
def test_cosine_of_nearly_equal_rows_keeps_its_digits(where, gap):
    """1 minus a product in float32 has no digit left where the rows differ by 1e-4."""
    backend, device = where
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(5, 64, generator=generator)
    target = pred * 3 + gap * torch.randn(5, 64, generator=generator)
    high, low = pred.double().requires_grad_(), pred.to(device).requires_grad_()
    options = {"loss": "cosine", "reduction": "none"}
    got = ops.feature_loss(low, target.to(device), **options, backend=backend)
    u, v = (x / x.norm(dim=-1, keepdim=True) for x in (high, target.double()))
    want = 1 - (u * v).sum(-1)
    # A rounding of a normalised value, 6e-8, against the distance.
    torch.testing.assert_close(got.detach().cpu().double(), want.detach(), rtol=2e-6 / gap, atol=1e-14)
    (grad,), (wanted,) = (torch.autograd.grad(out.sum(), x) for out, x in ((got, low), (want, high)))
    assert float((grad.cpu() - wanted).norm() / wanted.norm()) < 2e-6 / gap


@pytest.mark.parametrize("where", backends("feature_loss"))
def test_cosine_of_zero_rows_is_zero(where):
    backend, device = where
    pred = torch.randn(4, 8, device=device)
    target = torch.randn(4, 8, device=device)
    pred[1] = target[2] = pred[3] = target[3] = 0
    pred.requires_grad_()
    got = ops.feature_loss(pred, target, loss="cosine", reduction="none", backend=backend)
    torch.testing.assert_close(got, 1 - F.cosine_similarity(pred, target))
    torch.testing.assert_close(got[1:], torch.ones_like(got[1:]))
    # Rows between 0 and eps: a cosine whose slope does not blow up.
    small = (pred.detach() * 1e-3).requires_grad_()
    options = {"loss": "cosine", "eps": 0.5, "reduction": "none"}
    got = ops.feature_loss(small, target, **options, backend=backend)
    v = target / target.norm(dim=-1, keepdim=True).clamp(min=0.5)
    torch.testing.assert_close(got, 1 - (small / 0.5 * v).sum(-1))
    (grad,) = torch.autograd.grad(got.sum(), small)
    torch.testing.assert_close(grad, -v / 0.5)


@pytest.mark.parametrize("where", backends("feature_loss"))
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float16,) * 2]
)
def test_mixed_dtypes_compute_in_float32(where, dtypes):
    backend, device = where
    pred = torch.randn(6, 20, device=device).to(dtypes[0]).requires_grad_()
    target = torch.randn(6, 20, device=device).to(dtypes[1])
    out = ops.feature_loss(pred, target, norm="layernorm", loss="smooth_l1", backend=backend)
    assert out.dtype is torch.float32
    high = pred.detach().double().requires_grad_()
    want = ops.feature_loss(high, target, norm="layernorm", loss="smooth_l1", backend="reference")
    assert want.dtype is torch.float64
    assert_close(out, want, torch.float32)
    (grad,), (wanted,) = torch.autograd.grad(out, pred), torch.autograd.grad(want, high)
    assert grad.dtype is dtypes[0]
    assert_close(grad, wanted, dtypes[0])


@pytest.mark.parametrize("where", backends("feature_loss"))
@pytest.mark.parametrize(("norm", "loss"), FORMS)
def test_any_layout_a_target_with_a_gradient_and_two_runs(where, norm, loss):
    backend, device = where
    options = {"norm": norm, "loss": loss, "backend": backend}
    pred = torch.randn(12, 7, 5, device=device).transpose(0, 2).requires_grad_()
    target = torch.randn(5, 7, 24, device=device)[..., ::2].requires_grad_()
    index = torch.arange(70, device=device)[::2].reshape(7, 5).t() % 35
    runs = []
    for x, t, at in ((pred, target, index), (pred.contiguous(), target.contiguous(), index.contiguous())):
        out = ops.feature_loss(x, t, index=at, **options)
        runs.append((out, *torch.autograd.grad(out, (pred,))))
        assert torch.autograd.grad(ops.feature_loss(x, t, **options), (target, pred), allow_unused=True)[0] is None
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("where", backends("feature_loss", reference=False))
@pytest.mark.parametrize("indexed", [False, True])
def test_opcheck_and_bounds(where, indexed):
    backend, device = where
    pred, target = torch.randn(3, 8, device=device), torch.randn(3, 8, device=device)
    index = torch.tensor([2, 0, 2], dtype=torch.int32, device=device) if indexed else None
    forward, backward = (_registry.raw(name, backend) for name in ("feature_loss", "feature_loss_backward"))
    for norm, kind in ((0, 0), (1, 2), (2, 1), (0, 3)):
        each, stats = forward(pred, target, index, norm, kind, 1.0, 1e-6)
        torch.library.opcheck(forward, (pred, target, index, norm, kind, 1.0, 1e-6))
        torch.library.opcheck(backward, (each, pred, target, index, stats, norm, kind, 1.0))
    if backend == "cpu" and indexed:
        with pytest.raises(RuntimeError, match="out of range"):
            forward(pred, target, index + 1, 0, 0, 1.0, 1e-6)
        with pytest.raises(RuntimeError, match="must fit"):
            forward(pred, target[:, :4].contiguous(), index, 0, 0, 1.0, 1e-6)
        with pytest.raises(RuntimeError, match="unknown"):
            forward(pred, target, index, 0, 4, 1.0, 1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("norm", "loss"), [("layernorm", "smooth_l1"), ("none", "cosine")])
def test_compiles_whole(dynamic, norm, loss):
    def call(pred, target, index):
        return ops.feature_loss(pred, target, index=index, norm=norm, loss=loss, power=2.0)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (2, 3):
        pred, target = torch.randn(rows, 5, 16).requires_grad_(), torch.randn(7, 16)
        index = torch.arange(rows * 5) % 7
        want, got = call(pred, target, index), compiled(pred, target, index)
        assert torch.equal(want, got)
        assert torch.equal(*(torch.autograd.grad(out, pred)[0] for out in (want, got)))


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
    (lambda: ops.feature_loss(X, X, index=torch.tensor([0, -1, 2, 3])), ValueError, "index is out of range"),
    (lambda: ops.feature_loss(X, X, index=torch.arange(3)), ValueError, "index must hold one row"),
    (lambda: ops.feature_loss(X[:0], X[:0]), ValueError, "no rows"),
    (lambda: ops.feature_loss(X[:, :0], X[:, :0]), ValueError, "D >= 1"),
    (lambda: ops.feature_loss(X, X[:, :5]), ValueError, "agree in D"),
    (lambda: ops.feature_loss(X.long(), X), TypeError, "pred"),
    (lambda: ops.feature_loss(X, None), TypeError, "target"),
    (lambda: ops.feature_loss(X, X, norm="batch"), ValueError, "norm"),
    (lambda: ops.feature_loss(X, X, loss="huber"), ValueError, "loss"),
    (lambda: ops.feature_loss(X, X, reduction="max"), ValueError, "reduction"),
    (lambda: ops.feature_loss(X, X, loss="smooth_l1", beta=0.0), ValueError, "beta"),
    (lambda: ops.feature_loss(X, X, eps=-1.0), ValueError, "eps"),
    (lambda: ops.feature_loss(X, X, eps=float("inf")), ValueError, "eps must be finite"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_clear_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
