"""patch_loss: every normalisation, layout and reduction, with gradients to the prediction and to the target image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from maefast import masking, ops
from maefast.ops import _registry

from .common import assert_close, backends, compare, dtypes_of, property_test

BACKENDS = backends("patch_loss")
NORMS = ["none", "mae", "spark", "videomae", "layernorm"]


@st.composite
def cases(draw):
    """(plan, inputs, options): images and predictions of odd sizes."""
    volume = draw(st.booleans())
    patch = tuple(draw(st.integers(2, 5)) for _ in range(3 if volume else 2))
    grid = [draw(st.integers(1, 4)) for _ in patch]
    batch, channels = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    tokens, values = 1, channels
    for size, p in zip(grid, patch):
        tokens, values = tokens * size, values * p
    counts = st.integers(0, tokens - 1) if tokens > 1 else st.just(0)
    keep = draw(st.one_of(counts, st.lists(counts, min_size=batch, max_size=batch)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    plan = masking.random(batch, tokens, keep=keep, generator=generator, backend="reference")
    options = {
        "norm": draw(st.sampled_from(NORMS)),
        "loss": draw(st.sampled_from(["mse", "smooth_l1"])),
        "beta": draw(st.sampled_from([0.3, 1.0, 2.0])),
        "reduction": draw(st.sampled_from(["mean", "sample_mean", "sum", "none"])),
        "rows": draw(st.sampled_from(["masked", "all"])),
        "layout": draw(st.sampled_from(["ppc", "cpp"])),
    }
    shape = (plan.total_masked, values) if options["rows"] == "masked" else (batch, tokens, values)
    images = torch.randn(batch, channels, *(g * p for g, p in zip(grid, patch)), generator=generator)
    return plan, patch, {"pred": torch.randn(shape, generator=generator), "images": images}, options


@pytest.mark.parametrize("where", BACKENDS)
@given(case=cases(), data=st.data())
@property_test
def test_loss_and_every_gradient(where, case, data):
    backend, device = where
    plan, patch, inputs, options = case
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))

    def call(backend, device, pred, images):
        return ops.patch_loss(pred, images, plan.to(device), patch, backend=backend, **options)

    compare(call, inputs, backend, device, dtype)


def test_reference_gradcheck():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 2, 4, 6, dtype=torch.float64, generator=generator).requires_grad_()
    plan = masking.random(2, 6, keep=2, generator=generator)
    pred = torch.randn(2, 4, 8, dtype=torch.float64, generator=generator).requires_grad_()
    for norm in NORMS:
        for loss in ("mse", "smooth_l1"):
            call = lambda p, i: ops.patch_loss(p, i, plan, 2, norm=norm, loss=loss, backend="reference")  # noqa: B023, E731
            assert torch.autograd.gradcheck(call, (pred, images))


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("norm_pix", [False, True])
def test_equals_mae(where, norm_pix):
    """MAE's loss written out: patchify, normalise, mean over the patch, sum(loss * mask) / sum(mask)."""
    backend, device = where
    torch.manual_seed(0)
    images, pred = torch.randn(3, 3, 32, 48), torch.randn(3, 6, 768)
    plan = masking.random(3, 6, 0.5)
    target = images.reshape(3, 3, 2, 16, 3, 16).permute(0, 2, 4, 3, 5, 1).reshape(3, 6, 768)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    each = ((pred - target) ** 2).mean(-1)
    want = (each * plan.mask).sum() / plan.mask.sum()
    norm = "mae" if norm_pix else "none"
    args = (images.to(device), plan.to(device), 16)
    got = ops.patch_loss(pred.to(device), *args, norm=norm, rows="all", backend=backend)
    assert_close(got, want, torch.float32)
    masked_only = ops.gather_tokens(pred, plan, "masked").to(device)
    assert_close(ops.patch_loss(masked_only, *args, norm=norm, backend=backend), want, torch.float32)


@pytest.mark.parametrize("where", BACKENDS)
def test_equals_videomae(where):
    backend, device = where
    torch.manual_seed(0)
    clip, pred = torch.randn(2, 3, 4, 8, 8), torch.randn(2, 8, 2 * 4 * 4 * 3)
    plan = masking.tube(2, 2, 4, 0.5)
    patches = clip.reshape(2, 3, 2, 2, 2, 4, 2, 4).permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(2, 8, 32, 3)
    target = (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True).sqrt() + 1e-6)
    target = target.flatten(2)
    want = F.mse_loss(pred[plan.mask], target[plan.mask])
    got = ops.patch_loss(
        pred.to(device), clip.to(device), plan.to(device), (2, 4, 4), norm="videomae", rows="all", backend=backend
    )
    assert_close(got, want, torch.float32)


@pytest.mark.parametrize("where", BACKENDS)
def test_flat_patches_stay_finite(where):
    """A patch of one colour has no variance: the target is 0 and no gradient of the prediction is lost."""
    backend, device = where
    images, pred = (
        torch.full((1, 3, 8, 8), 0.7, device=device),
        torch.randn(1, 4, 48, device=device, requires_grad=True),
    )
    plan = masking.random(1, 4, 0.5).to(device)
    for norm in NORMS:
        loss = ops.patch_loss(pred, images, plan, 4, norm=norm, rows="all", backend=backend)
        want = ops.patch_loss(
            pred.cpu().double(), images.cpu().double(), plan.to("cpu"), 4, norm=norm, rows="all", backend="reference"
        )
        # Rounding of the mean is divided by sqrt(eps), so only a coarse bound holds here.
        assert abs(loss.item() - want.item()) < 2e-3 * want.item(), norm
        assert torch.autograd.grad(loss, pred)[0].isfinite().all()


@pytest.mark.parametrize("where", BACKENDS)
def test_a_flat_channel_has_a_gradient(where):
    """The deviation of one colour is 0 and so is, by convention, its slope: infinite times 0 otherwise."""
    backend, device = where
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 2, 8, 8, generator=generator)
    images[:, 0, :4] = 0.5
    plan = masking.random(1, 4, keep=1, generator=generator, backend="reference")
    pred = torch.randn(1, 3, 32, generator=generator)
    leaves = [t.requires_grad_() for t in (images.to(device), images.double())]
    got, want = (
        torch.autograd.grad(ops.patch_loss(pred.to(t), t, plan.to(t.device), 4, norm="videomae", backend=b), t)[0]
        for t, b in zip(leaves, (backend, "reference"))
    )
    assert want.isfinite().all()
    assert_close(got, want, torch.float32)


@pytest.mark.parametrize("where", BACKENDS)
def test_runs_agree_bit_for_bit(where):
    backend, device = where
    images, pred = torch.randn(4, 3, 64, 64, device=device), torch.randn(4, 12, 768, device=device, requires_grad=True)
    plan = masking.random(4, 16, 0.75).to(device)
    runs = []
    for _ in range(2):
        loss = ops.patch_loss(pred, images, plan, 16, norm="mae", backend=backend)
        runs.append((loss, torch.autograd.grad(loss, pred)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("where", BACKENDS)
def test_non_contiguous_input(where):
    backend, device = where
    plan = masking.random(2, 4, 0.5).to(device)
    images = torch.randn(2, 8, 8, 3, device=device).permute(0, 3, 1, 2)
    pred = torch.randn(2, 5, 48, device=device)[:, 1:]
    got = ops.patch_loss(pred, images, plan, 4, rows="all", backend=backend)
    want = ops.patch_loss(pred.contiguous(), images.contiguous(), plan, 4, rows="all", backend=backend)
    assert torch.equal(got, want)


def plan4():
    return masking.random(2, 4, 0.5)


PRED, IMAGES = torch.randn(2, 2, 48), torch.randn(2, 3, 8, 8)
BAD = [
    (lambda: ops.patch_loss(PRED, IMAGES, plan4(), 3), ValueError, "multiple of the patch size"),
    (lambda: ops.patch_loss(PRED, IMAGES, plan4(), 2), ValueError, "do not fit"),
    (lambda: ops.patch_loss(PRED, IMAGES, plan4(), (2, 4, 4)), ValueError, "does not fit"),
    (lambda: ops.patch_loss(PRED, IMAGES, plan4(), 4, rows="all"), ValueError, "pred must have shape"),
    (lambda: ops.patch_loss(PRED[:, :1], IMAGES, plan4(), 4), ValueError, "pred must have shape"),
    (lambda: ops.patch_loss(PRED[..., 1:], IMAGES, plan4(), 4), ValueError, "pred must have shape"),
    (lambda: ops.patch_loss(PRED, IMAGES, plan4(), 4, norm="pix"), ValueError, "norm must be one of"),
    (lambda: ops.patch_loss(PRED, IMAGES, plan4(), 4, loss="l2"), ValueError, "loss must be one of"),
    (lambda: ops.patch_loss(PRED, IMAGES, plan4(), 4, loss="smooth_l1", beta=0), ValueError, "beta"),
    (lambda: ops.patch_loss(PRED, IMAGES, plan4(), 4, loss="smooth_l1", beta=float("nan")), ValueError, "beta"),
    (lambda: ops.patch_loss(PRED, IMAGES, plan4(), 4, reduction="max"), ValueError, "reduction must be one of"),
    (lambda: ops.patch_loss(PRED[:, :0], IMAGES, masking.random(2, 4, 0.0), 4), ValueError, "masks no token"),
    (
        lambda: ops.patch_loss(torch.randn(2, 2, 1), torch.randn(2, 1, 2, 2), plan4(), 1, norm="mae"),
        ValueError,
        "unbiased variance",
    ),
    (lambda: ops.patch_loss(PRED, IMAGES.byte(), plan4(), 4), TypeError, "images must be"),
    (lambda: ops.patch_loss(PRED.to("meta"), IMAGES, plan4(), 4), ValueError, "one device"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("where", backends("patch_loss", reference=False))
@pytest.mark.parametrize("norm", [0, 1, 2, 3])
def test_opcheck(where, norm):
    backend, device = where
    plan = masking.random(2, 6, keep=[2, 3]).to(device)
    images, pred = torch.rand(2, 3, 1, 8, 12, device=device), torch.rand(7, 48, device=device)
    options = ([1, 4, 4], True, False, norm, 0, 1.0)
    run = _registry.raw("patch_loss", backend)
    torch.library.opcheck(run, (pred, images, plan.masked, *options))
    each, stats = run(pred, images, plan.masked, *options)
    for need in (False, True):
        args = (torch.ones_like(each), pred, images, plan.masked, plan.slot, stats, *options, need)
        torch.library.opcheck(_registry.raw("patch_loss_backward", backend), args)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(where, dynamic):
    backend, device = where

    def step(pred, images, noise):
        plan = masking.random(images.shape[0], 4, keep=1, noise=noise, backend=backend)
        return ops.patch_loss(pred, images, plan, 4, norm="mae", backend=backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        pred = torch.randn(batch, 3, 48, device=device, requires_grad=True)
        images, noise = torch.randn(batch, 3, 8, 8, device=device), torch.rand(batch, 4, device=device)
        got, want = compiled(pred, images, noise), step(pred, images, noise)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, pred), torch.autograd.grad(want, pred))
