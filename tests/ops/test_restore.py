"""restore_tokens: the un-shuffle, both orders, position tables, and deterministic sums in the backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast import masking, ops
from maefast.ops import _registry

from .common import assert_close, backends, compare, dtypes_of, plans, property_test

BACKENDS = backends("restore_tokens")


def by_hand(x, plan, mask_token, pos, pos_on, prefix, order):
    """One sample and one token at a time."""
    counts = plan.cu_visible.diff().tolist()
    samples = x.reshape(-1, x.shape[-1]).split([prefix + c for c in counts])
    table = torch.zeros(prefix + plan.num_tokens, x.shape[-1], dtype=x.dtype)
    if pos is not None:
        table[-pos.shape[0] :] = pos
    visible = (plan.visible % plan.num_tokens).split(counts)
    masked = (plan.masked % plan.num_tokens).split([plan.num_tokens - c for c in counts])
    out = torch.empty(plan.batch, prefix + plan.num_tokens, x.shape[-1], dtype=x.dtype)
    for b in range(plan.batch):
        full = {}
        for row, n in zip(samples[b][prefix:], visible[b].tolist()):
            full[n] = row + table[prefix + n] if pos_on == "all" else row
        for n in masked[b].tolist():
            full[n] = mask_token + table[prefix + n]
        ids = range(plan.num_tokens) if order == "position" else [*visible[b].tolist(), *masked[b].tolist()]
        lead = samples[b][:prefix] + table[:prefix] if pos_on == "all" else samples[b][:prefix]
        out[b] = torch.cat([lead, torch.stack([full[n] for n in ids])])
    return out


@st.composite
def cases(draw, absent: bool = False):
    plan = draw(plans(absent=absent))
    prefix, width = draw(st.sampled_from([0, 1, 3])), draw(st.integers(1, 37))
    pos_on = draw(st.sampled_from(["all", "masked"]))
    rows = draw(st.sampled_from([None, 0, prefix] if pos_on == "all" else [None, 0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    inputs = {
        "x": torch.randn(plan.total_visible + plan.batch * prefix, width, generator=generator),
        "mask_token": torch.randn(width, generator=generator),
    }
    if rows is not None:
        inputs["pos"] = torch.randn(rows + plan.num_tokens, width, generator=generator)
    orders = ["visible_first"] if plan.total_absent else ["position", "visible_first"]
    options = {"prefix": prefix, "pos_on": pos_on, "order": draw(st.sampled_from(orders))}
    return plan, inputs, options


@given(case=cases())
@property_test
def test_reference_equals_a_loop(case):
    plan, inputs, options = case
    out = ops.restore_tokens(
        inputs["x"], plan, inputs["mask_token"], pos=inputs.get("pos"), backend="reference", **options
    )
    assert torch.equal(out, by_hand(inputs["x"], plan, inputs["mask_token"], inputs.get("pos"), **options))


@pytest.mark.parametrize("where", BACKENDS)
@given(case=cases(), data=st.data())
@property_test
def test_restore_and_every_gradient(where, case, data):
    backend, device = where
    plan, inputs, options = case
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))

    def call(backend, device, x, mask_token, pos=None):
        return ops.restore_tokens(x, plan.to(device), mask_token, pos=pos, backend=backend, **options)

    compare(call, inputs, backend, device, dtype)


@pytest.mark.parametrize("where", BACKENDS)
def test_equals_mae_unshuffle(where):
    backend, device = where
    torch.manual_seed(0)
    x, mask_token, pos = torch.randn(3, 6, 8), torch.randn(1, 1, 8), torch.randn(1, 17, 8)
    plan = masking.random(3, 16, keep=5)
    full = torch.cat([x[:, 1:], mask_token.expand(3, 11, 8)], 1)
    full = full.gather(1, plan.ids_restore[:, :, None].expand(-1, -1, 8))
    want = torch.cat([x[:, :1], full], 1) + pos
    args = (x.to(device), plan.to(device), mask_token.to(device))
    assert torch.equal(ops.restore_tokens(*args, pos=pos.to(device), prefix=1, backend=backend).cpu(), want)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_mixed_precision_keeps_the_wide_dtype(where, low):
    """Under autocast x is 16-bit and the tables float32: the stream is float32, as eager's cat makes it."""
    backend, device = where
    plan = masking.random(3, 16, keep=5).to(device)
    x = torch.randn(3, 6, 8, device=device).to(low).requires_grad_()
    mask_token, pos = (torch.randn(s, device=device, requires_grad=True) for s in ((8,), (17, 8)))
    out = ops.restore_tokens(x, plan, mask_token, pos=pos, prefix=1, backend=backend)
    want = ops.restore_tokens(x.float(), plan, mask_token, pos=pos, prefix=1, backend="reference")
    assert out.dtype is torch.float32
    assert torch.equal(out, want)
    weights = torch.randn_like(out)
    got = torch.autograd.grad(out, [x, mask_token, pos], weights)
    ref = torch.autograd.grad(want, [x, mask_token, pos], weights)
    assert got[0].dtype is low
    for a, b, dtype in zip(got, ref, (low, torch.float32, torch.float32)):
        assert_close(a, b, dtype)


@pytest.mark.parametrize("where", BACKENDS)
def test_runs_agree_bit_for_bit(where):
    backend, device = where
    plan = masking.random(5, 196, 0.75).to(device)
    leaves = [torch.randn(s, device=device, requires_grad=True) for s in ((5, 50, 96), (96,), (197, 96))]
    runs = []
    for _ in range(2):
        out = ops.restore_tokens(leaves[0], plan, leaves[1], pos=leaves[2], prefix=1, backend=backend)
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("where", BACKENDS)
def test_frozen_tables_get_no_gradient(where):
    backend, device = where
    plan = masking.random(2, 9, 0.5).to(device)
    x = torch.randn(2, 4, 6, device=device, requires_grad=True)
    out = ops.restore_tokens(
        x, plan, torch.zeros(6, device=device), pos=torch.zeros(9, 6, device=device), backend=backend
    )
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def plan4():
    return masking.random(2, 4, 0.5)


X, TOKEN = torch.randn(2, 2, 3), torch.randn(3)
BAD = [
    (lambda: ops.restore_tokens(X, plan4(), TOKEN, prefix=1), ValueError, "for this plan"),
    (lambda: ops.restore_tokens(X[:1], plan4(), TOKEN), ValueError, "for this plan"),
    (lambda: ops.restore_tokens(X.reshape(-1, 3)[:3], plan4(), TOKEN), ValueError, "rows, got 3"),
    (lambda: ops.restore_tokens(X, masking.random(2, 4, keep=[1, 3]), TOKEN), ValueError, "packed rows"),
    (lambda: ops.restore_tokens(X, plan4(), torch.randn(4)), ValueError, "mask_token must hold 3"),
    (lambda: ops.restore_tokens(X, plan4(), TOKEN, pos=torch.randn(3, 3)), ValueError, "pos must have shape"),
    (lambda: ops.restore_tokens(X, plan4(), TOKEN, pos=torch.randn(4, 2)), ValueError, "pos must have shape"),
    (lambda: ops.restore_tokens(X, plan4(), TOKEN, order="shuffled"), ValueError, "order must be one of"),
    (lambda: ops.restore_tokens(X, plan4(), TOKEN, pos_on="visible"), ValueError, "pos_on must be one of"),
    (lambda: ops.restore_tokens(X, plan4(), TOKEN, prefix=-1), ValueError, "prefix must be at least 0"),
    (lambda: ops.restore_tokens(X.int(), plan4(), TOKEN), TypeError, "float32"),
    (lambda: ops.restore_tokens(X, plan4(), TOKEN.to("meta")), ValueError, "one device"),
    (lambda: ops.restore_tokens(X, plan4(), 0.0), (TypeError, AttributeError), "."),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("where", backends("restore_tokens", reference=False))
@pytest.mark.parametrize("visible_first", [False, True])
def test_opcheck(where, visible_first):
    backend, device = where
    plan = masking.random(3, 9, keep=[2, 0, 5]).to(device)
    x, token, pos = (torch.rand(s, device=device) for s in ((7 + 3, 6), (6,), (10, 6)))
    torch.library.opcheck(
        _registry.raw("restore_tokens", backend),
        (x, plan.visible, plan.masked, plan.cu_visible, token, pos, 1, visible_first, False),
    )
    grad = torch.rand(3, 10, 6, device=device)
    for rows, need in ((10, True), (0, False)):
        args = (grad, plan.visible, plan.masked, plan.slot, plan.cu_visible, rows, 1, visible_first, False, need)
        torch.library.opcheck(_registry.raw("restore_tokens_backward", backend), (*args, torch.float32))


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(where, dynamic):
    backend, device = where

    def step(x, token, pos, noise):
        plan = masking.random(x.shape[0], pos.shape[0], keep=3, noise=noise, backend=backend)
        first = ops.restore_tokens(x, plan, token, pos=pos, backend=backend)
        other = ops.restore_tokens(x, plan, token, pos=pos, order="visible_first", backend=backend)
        return first.square().sum() + other.square().mean()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        inputs = [torch.randn(s, device=device, requires_grad=True) for s in ((batch, 3, 5), (5,), (8, 5))]
        noise = torch.rand(batch, 8, device=device)
        got = torch.autograd.grad(compiled(*inputs, noise), inputs)
        want = torch.autograd.grad(step(*inputs, noise), inputs)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b)
