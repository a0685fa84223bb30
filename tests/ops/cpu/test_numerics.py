"""Every C++ CPU kernel against a plain PyTorch computation: exact where only copies, one sum or one rounding occur,
else float64. Outputs start as NaN (see ../conftest.py), so an element that is never written fails."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast import _native
from maefast.ops import embed, loss, mask, restore, token_mask
from tests.ops.common import TOLERANCE, relative_error
from tests.ops.cpu.common import (
    FLOATS,
    WIDENING,
    WIDTHS,
    close,
    identical,
    needs_cpu_ops,
    plan_of,
    plans,
    property_test,
    randn,
    raw,
)

pytestmark = needs_cpu_ops


def test_fresh_outputs_are_poisoned():
    """A plan that names one token twice leaves the other row as it was allocated: it must be NaN, not old memory."""
    ints = lambda *values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    out = raw("restore_tokens", randn(2, 3), ints(0, 0), ints(), ints(0, 2), randn(3), None, 0, False, False)
    assert out[0, 1].isnan().all()
    assert not out[0, 0].isnan().any()


@pytest.mark.skipif("MAEFAST_CPU_ISA" not in os.environ, reason="no instruction set was asked for")
def test_instruction_set():
    assert _native.C.current_isa() == os.environ["MAEFAST_CPU_ISA"]


# --- conversions -------------------------------------------------------------------------------------------


def convert(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [n] through the row conversion of patch_rows: one token that is one line of n pixels."""
    index = torch.zeros(1, dtype=torch.int32)
    return raw("patch_rows", x.view(1, 1, 1, 1, -1), index, [1, 1, x.numel()], dtype).view(-1)


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_conversion_is_torchs(source, target):
    """All 65536 patterns of 16 bits; for wider types their neighbours, ties, overflows and subnormals."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    if source in (torch.float16, torch.bfloat16):
        x = every.view(source)
    else:
        x = torch.cat([every.view(dtype).to(source) for dtype in (torch.float16, torch.bfloat16)])
        ulp = 2.0 ** torch.arange(-30, -3, dtype=source)
        near = torch.cat([x[::7, None] * (1 + ulp), x[::7, None] * (1 - ulp)]).flatten()
        x = torch.cat([x, near, torch.tensor([65519.0, 65520.0, 65535.0, 3e38, 6e-8, 2.9e-8, 1e-45], dtype=source)])
    identical(convert(x, target), x.to(target), f"{source} to {target}")


# --- token_mask --------------------------------------------------------------------------------------------


@property_test
@given(plan=plans(tokens=(1, 2, 3, 17, 63, 64, 196, 197)), data=st.data())
def test_token_mask(plan, data):
    scores = randn(plan.batch, plan.num_tokens, seed=data.draw(st.integers(0, 99)))
    kind = data.draw(st.sampled_from(["normal", "uniform", "ties", "special", "equal", "skewed"]))
    if kind == "uniform":
        scores = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1))
    elif kind == "ties":
        scores = scores.round()
    elif kind == "special":
        values = torch.tensor([0.0, -0.0, float("nan"), -float("nan"), float("inf"), -float("inf"), 1e-42, -1e-42, 1.0])
        scores = values[(scores.abs() * 1000).long() % len(values)]
    elif kind == "equal":
        scores = torch.full_like(scores, 0.5)
    elif kind == "skewed":
        scores = (scores * 20).exp()
    args = plan.cu_visible, plan.total_visible, data.draw(st.booleans())
    for dtype in FLOATS:
        wanted = mask.token_mask_reference(scores.to(dtype), *args)
        for out, ref, name in zip(raw("token_mask", scores.to(dtype), *args), wanted, ("visible", "masked", "slot")):
            identical(out, ref, f"{name} in {dtype}, {kind}")


@pytest.mark.parametrize("tokens", [1536, 1537, 4096, 4097, 8192])
@pytest.mark.parametrize("kind", ["uniform", "ties"])
@pytest.mark.parametrize("by_position", [False, True])
def test_token_mask_long_rows(tokens, kind, by_position):
    scores = torch.rand(3, tokens, generator=torch.Generator().manual_seed(tokens))
    scores = (scores * 50).floor() if kind == "ties" else scores
    cu = torch.tensor([0, tokens // 4, tokens // 4 + tokens, tokens // 4 + tokens + 1], dtype=torch.int32)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        args = scores.to(dtype), cu, int(cu[-1]), by_position
        for out, ref in zip(raw("token_mask", *args), mask.token_mask_reference(*args)):
            identical(out, ref)


# --- gather_tokens -----------------------------------------------------------------------------------------


@property_test
@given(plan=plans(), data=st.data())
def test_gather_tokens(plan, data):
    prefix, keep_prefix, masked = (
        data.draw(st.sampled_from([0, 1, 3])),
        data.draw(st.booleans()),
        data.draw(st.booleans()),
    )
    dtype, width = data.draw(st.sampled_from(FLOATS)), data.draw(st.sampled_from(WIDTHS))
    index, cu, most = (
        (plan.masked, plan.cu_masked, plan.max_masked) if masked else (plan.visible, plan.cu_visible, plan.max_visible)
    )
    x = randn(plan.batch, prefix + plan.num_tokens, width, dtype=dtype).requires_grad_()
    ref = embed.gather_tokens_reference(x, index, cu, prefix, keep_prefix)
    identical(raw("gather_tokens", x.detach(), index, cu, most, prefix, keep_prefix), ref.detach())
    grad = randn(*ref.shape, dtype=dtype, seed=1)
    (wanted,) = torch.autograd.grad(ref, x, grad)
    identical(raw("gather_tokens_backward", grad, plan.slot, cu, prefix, keep_prefix, masked), wanted, "grad x")


# --- patch_rows --------------------------------------------------------------------------------------------


@st.composite
def patched_images(draw):
    """(image shape [B, C, T, H, W], patch, plan); any channels, tubelets, sides that differ."""
    patch = [draw(st.sampled_from([1, 2])), draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 3, 5, 8, 14, 16, 17]))]
    grid = [draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))]
    batch, channels = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4, 5]))
    shape = [batch, channels, *(p * g for p, g in zip(patch, grid))]
    return shape, patch, plan_of(draw, batch, grid[0] * grid[1] * grid[2])


@property_test
@given(case=patched_images(), data=st.data())
def test_patch_rows(case, data):
    shape, patch, plan = case
    source, target = data.draw(st.sampled_from(FLOATS)), data.draw(st.sampled_from(FLOATS))
    images = randn(*shape, dtype=source)
    rows = raw("patch_rows", images, plan.visible, patch, target)
    identical(rows, embed.patch_rows_reference(images, plan.visible, patch).to(target))
    leaf = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    grad = randn(*rows.shape, dtype=target, seed=1)
    (wanted,) = torch.autograd.grad(embed.patch_rows_reference(leaf, plan.visible, patch), leaf, grad.double())
    out = raw("patch_rows_backward", grad, plan.slot, shape, patch, source)
    identical(out, wanted.to(target).to(source), "grad images")


# --- place_tokens ------------------------------------------------------------------------------------------


@property_test
@given(plan=plans(batches=(1, 2, 5, 70)), data=st.data())
def test_place_tokens(plan, data):
    (narrow, wide), width = data.draw(st.sampled_from(WIDENING)), data.draw(st.sampled_from(WIDTHS))
    prefix, has_pos = data.draw(st.sampled_from([0, 1, 3])), data.draw(st.booleans())
    has_pos |= prefix == 0
    n = plan.num_tokens
    y = randn(plan.total_visible, width, dtype=narrow)
    pos = randn(n, width, dtype=wide, seed=1) if has_pos else None
    lead = randn(prefix, width, dtype=wide, seed=2) if prefix else None
    out = raw("place_tokens", y, plan.visible, plan.cu_visible, n, pos, lead)
    call = embed.place_tokens_reference
    identical(out, call(y.to(wide), plan.visible, plan.cu_visible, n, pos, lead), "place_tokens")

    high = [None if x is None else x.double().requires_grad_() for x in (y, pos, lead)]
    ref = call(high[0], plan.visible, plan.cu_visible, n, *high[1:])
    grad = randn(*ref.shape, dtype=wide, seed=3)
    some = [x for x in high if x is not None]
    wanted = iter(torch.autograd.grad(ref, some, grad.double(), allow_unused=True))
    wanted = [None if x is None else next(wanted) for x in high]
    needs = [x is not None and data.draw(st.booleans()) for x in high[1:]]
    grads = raw("place_tokens_backward", grad, plan.slot, plan.cu_visible, prefix, *needs, narrow)
    identical(grads[0], wanted[0].to(wide).to(narrow), "grad y")
    for out, ref, need, name in zip(grads[1:], wanted[1:], needs, ("pos", "prefix")):
        assert out.dtype is wide
        assert need or out.shape == (0,)
        if need:
            close(out, ref, f"grad {name}")


# --- restore_tokens ----------------------------------------------------------------------------------------


@property_test
@given(plan=plans(batches=(1, 2, 5, 70)), data=st.data())
def test_restore_tokens(plan, data):
    (narrow, wide), width = data.draw(st.sampled_from(WIDENING)), data.draw(st.sampled_from(WIDTHS))
    prefix = data.draw(st.sampled_from([0, 1, 3]))
    pos_rows, pos_on_masked = data.draw(
        st.sampled_from(
            [(0, False), (plan.num_tokens, False), (plan.num_tokens, True), (plan.num_tokens + prefix, False)]
        )
    )
    modes = prefix, data.draw(st.booleans()), pos_on_masked
    x = randn(plan.total_visible + plan.batch * prefix, width, dtype=narrow)
    token = randn(width, dtype=wide, seed=1)
    pos = randn(pos_rows, width, dtype=wide, seed=2) if pos_rows else None
    lists = plan.visible, plan.masked, plan.cu_visible
    call = restore.restore_tokens_reference
    out = raw("restore_tokens", x, *lists, token, pos, *modes)
    identical(out, call(x, *lists, token, pos, *modes), "restore_tokens")

    high = [None if t is None else t.double().requires_grad_() for t in (x, token, pos)]
    ref = call(high[0], *lists, high[1], high[2], *modes)
    grad = randn(*ref.shape, dtype=wide, seed=3)
    some = [t for t in high if t is not None]
    wanted = iter(torch.autograd.grad(ref, some, grad.double(), allow_unused=True, materialize_grads=True))
    wanted = [None if t is None else next(wanted) for t in high]
    need_token, need_pos = data.draw(st.booleans()), pos is not None and data.draw(st.booleans())
    grads = raw(
        "restore_tokens_backward",
        grad,
        plan.visible,
        plan.masked,
        plan.slot,
        plan.cu_visible,
        pos_rows if need_pos else 0,
        *modes,
        need_token,
        narrow,
    )
    identical(grads[0], wanted[0].to(wide).to(narrow), "grad x")
    for out, ref, need, name in zip(grads[1:], wanted[1:], (need_token, need_pos), ("mask token", "pos")):
        assert out.dtype is wide
        assert need or out.shape == (0,)
        if need:
            close(out, ref, f"grad {name}")


# --- patch_loss --------------------------------------------------------------------------------------------


@property_test
@given(case=patched_images(), data=st.data())
def test_patch_loss(case, data):
    shape, patch, plan = case
    pixels = patch[0] * patch[1] * patch[2]
    values = pixels * shape[1]
    norms = [0, 3] + [1] * (values > 1) + [2] * (pixels > 1)
    norm, kind = data.draw(st.sampled_from(norms)), data.draw(st.sampled_from([0, 1]))
    if plan.total_masked == 0:
        norm = 0  # torch warns about the variance of nothing
    packed, channels_first = data.draw(st.booleans()), data.draw(st.booleans())
    beta = data.draw(st.sampled_from([0.1, 1.0, 2.5]))
    dtypes = data.draw(st.sampled_from(FLOATS)), data.draw(st.sampled_from(FLOATS))
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    # Far from zero mean: a one-pass variance would lose its digits here.
    images = (randn(*shape) * 3 + data.draw(st.sampled_from([0.0, 100.0]))).to(dtypes[1])
    pred = randn(plan.total_masked if packed else plan.batch * plan.num_tokens, values, dtype=dtypes[0], seed=1)
    args = patch, packed, channels_first, norm, kind, beta

    # How much the normalisation amplifies a rounding depends on the pixels (mean against spread): plain PyTorch in the
    # same dtypes shows it, and the kernel may be off by a small multiple of that.
    ref, *wanted = loss_and_grads(pred.double(), images.double(), plan, args)
    same = loss_and_grads(pred, images, plan, args)
    bound = lambda one, two: 3 * relative_error(one, two)  # noqa: E731

    out, stats = raw("patch_loss", pred, images, plan.masked, *args)
    assert out.dtype is wide
    close(out, ref, "loss", bound(same[0], ref))
    check_stats(stats, loss.patch_targets(images.to(wide), patch)[plan.masked.long()], norm)
    weight = randn(plan.total_masked, dtype=wide, seed=2)
    for need_images in (False, True):
        grads = raw("patch_loss_backward", weight, pred, images, plan.masked, plan.slot, stats, *args, need_images)
        assert [g.dtype for g in grads] == list(dtypes)
        close(grads[0], wanted[0], "grad pred", bound(same[1], wanted[0]))
        if need_images:
            # With two values in a group the target is (+-const) and the gradient all cancellation: what counts is the
            # error against the terms that cancel, the gradient of the target times 1 / denominator.
            rows = wanted[0] if packed else wanted[0][plan.masked.long()]
            terms = float((rows.norm(dim=1) * stats[..., 1].amax(1)).norm())
            error = float((grads[1].double() - wanted[1]).norm())
            limit = TOLERANCE[dtypes[1]] + bound(same[2], wanted[1])
            assert error <= max(terms, float(wanted[1].norm())) * limit, (error, terms)
        else:
            assert grads[1].shape == (0,)


def loss_and_grads(pred, images, plan, args):
    pred, images = pred.clone().requires_grad_(), images.clone().requires_grad_()
    out = loss.patch_loss_reference(pred, images, plan.masked, *args)
    weight = randn(plan.total_masked, dtype=torch.float64, seed=2).to(out.dtype)
    return out, *torch.autograd.grad(out, (pred, images), weight)


def check_stats(stats, target, norm):
    """stats [M, G, 2] = (mean, 1 / denominator) of target [M, pixels, C]."""
    shape = target.shape[0], target.shape[2] if norm == 2 else 1, 2
    assert stats.dtype is target.dtype
    assert stats.shape == shape
    if norm == 0:
        assert bool((stats == torch.tensor([0, 1])).all())
        return
    dims = 1 if norm == 2 else (1, 2)

    def measure(t):
        var = t.var(dims, correction=0 if norm == 3 else 1)
        below = var.sqrt() + 1e-6 if norm == 2 else (var + 1e-6).sqrt()
        return t.mean(dims).view(shape[:2]), below.reciprocal().view(shape[:2])

    for out, ref, same in zip(stats.unbind(-1), measure(target.double()), measure(target)):
        close(out, ref, "stats", 3 * relative_error(same, ref))


@pytest.mark.parametrize("norm", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("contrast", [1.0, 1e-3, 3e-6])
def test_patch_loss_in_float64(norm, kind, channels_first, contrast):
    """Every mode to 12 digits, also where the spread of the pixels is as small as the epsilons."""
    plan = token_mask(torch.rand(2, 6, generator=torch.Generator().manual_seed(0)), 2, backend="reference")
    images = randn(2, 3, 1, 6, 15, dtype=torch.float64) * contrast
    for packed in (False, True):
        args = [1, 3, 5], packed, channels_first, norm, kind, 0.7
        pred = randn(plan.total_masked if packed else 12, 45, dtype=torch.float64, seed=1)
        ref, grad_pred, grad_images = loss_and_grads(pred, images, plan, args)
        out, stats = raw("patch_loss", pred, images, plan.masked, *args)
        weight = randn(plan.total_masked, dtype=torch.float64, seed=2)
        grads = raw("patch_loss_backward", weight, pred, images, plan.masked, plan.slot, stats, *args, True)
        close(out, ref, "loss")
        close(grads[0], grad_pred, "grad pred")
        close(grads[1], grad_images, "grad images")


@pytest.mark.parametrize("norm", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_patch_loss_of_a_constant_patch(norm, dtype):
    """Zero variance: the target is zero; the gradient is finite (torch's of sqrt(var) is not, for norm 2)."""
    images = torch.full((1, 3, 1, 4, 4), 0.25, dtype=dtype)
    index, slot = torch.zeros(1, dtype=torch.int32), torch.full((1,), -1, dtype=torch.int32)
    pred = randn(1, 48, dtype=dtype)
    args = [1, 4, 4], True, False, norm, 0, 1.0
    out, stats = raw("patch_loss", pred, images, index, *args)
    close(out, (pred.double() ** 2).mean(1))
    grad_pred, grad_images = raw(
        "patch_loss_backward", torch.ones(1, dtype=dtype), pred, images, index, slot, stats, *args, True
    )
    close(grad_pred, pred.double() * 2 / 48)
    g = (-pred.double() * 2 / 48).view(16, 3)
    centred = g - (g.mean(0) if norm == 2 else g.mean())
    wanted = centred * (1e6 if norm == 2 else 1e3)
    close(grad_images.view(3, 16).T, wanted, "grad images")


def test_patch_loss_passes_nan_on():
    images, index = torch.rand(1, 1, 1, 2, 4), torch.tensor([0, 1], dtype=torch.int32)
    slot = torch.tensor([-1, -2], dtype=torch.int32)
    pred = randn(2, 4)
    pred[0, 1] = float("nan")
    for kind in (0, 1):
        args = [1, 2, 2], True, False, 0, kind, 1.0
        out, stats = raw("patch_loss", pred, images, index, *args)
        grad, _ = raw("patch_loss_backward", torch.ones(2), pred, images, index, slot, stats, *args, False)
        assert out.isnan().tolist() == [True, False]
        assert torch.equal(grad.isnan(), pred.isnan())


@pytest.mark.parametrize("need_sum", [False, True])
def test_transpose_sum(need_sum):
    """Whole registers and blocks of columns, and what is left of them; the same bits for any number of threads."""
    threads = torch.get_num_threads()
    for rows, width in ((1, 1), (3, 70), (16, 64), (37, 45), (50, 200), (0, 5), (4, 0)):
        x = randn(rows, width)
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(raw("transpose_sum", x, need_sum))
        torch.set_num_threads(threads)
        (out, total), again = results
        assert torch.equal(out, x.t())
        assert out.is_contiguous()
        assert torch.equal(total, again[1])
        if need_sum:
            close(total, x.double().sum(0))
        else:
            assert total.numel() == 0
