"""gather_tokens and patch_embed: exact copies, a product over visible patches only, and all their gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from maefast import masking, ops
from maefast.ops import _dispatch, _registry

from .common import assert_close, backends, compare, dtypes_of, plans, property_test

GATHER = backends("gather_tokens")
EMBED = backends("patch_rows")


@pytest.mark.parametrize("where", GATHER)
@given(plan=plans(), data=st.data())
@property_test
def test_gather_copies_rows(where, plan, data):
    backend, device = where
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))
    prefix, keep_prefix = data.draw(st.sampled_from([0, 1, 3])), data.draw(st.booleans())
    which = data.draw(st.sampled_from(["visible", "masked"]))
    width = data.draw(st.integers(1, 37))
    x = torch.randn(plan.batch, prefix + plan.num_tokens, width).to(dtype)
    out = ops.gather_tokens(
        x.to(device), plan.to(device), which, prefix=prefix, keep_prefix=keep_prefix, backend=backend
    )
    rows = []
    counts = (plan.cu_visible if which == "visible" else plan.cu_masked).diff().tolist()
    flat = plan.visible if which == "visible" else plan.masked
    for b, ids in enumerate(flat.split(counts)):
        rows.append(x[b, :prefix] if keep_prefix else x[b, :0])
        rows.append(x[b, prefix + ids.long() % plan.num_tokens])
    assert torch.equal(out.cpu().reshape(-1, width), torch.cat(rows))
    lead = prefix if keep_prefix else 0
    assert out.ndim == (2 if plan.keep is None else 3)
    if plan.keep is not None:
        assert out.shape[1] == lead + counts[0]

    def call(backend, device, x):
        return ops.gather_tokens(x, plan.to(device), which, prefix=prefix, keep_prefix=keep_prefix, backend=backend)

    compare(call, {"x": x}, backend, device, dtype)


@pytest.mark.parametrize("where", GATHER)
@pytest.mark.parametrize("keep_prefix", [False, True])
def test_gather_rows_of_nothing(where, keep_prefix):
    backend, device = where
    plan = masking.random(2, 5, keep=[2, 3], backend="reference").to(device)
    x = torch.zeros(2, 6, 0, device=device)
    out = ops.gather_tokens(x, plan, prefix=1, keep_prefix=keep_prefix, backend=backend)
    assert out.shape == (7 if keep_prefix else 5, 0)


@st.composite
def embeddings(draw):
    """(images, weight, bias, pos, prefix, plan) of a 2-D or 3-D patch embedding of odd sizes."""
    volume = draw(st.booleans())
    patch = [draw(st.integers(1, 5)) for _ in range(3 if volume else 2)]
    grid = [draw(st.integers(1, 4)) for _ in patch]
    batch, channels, width = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 19))
    tokens = 1
    for size in grid:
        tokens *= size
    counts = st.integers(0, tokens)
    keep = draw(st.one_of(counts, st.lists(counts, min_size=batch, max_size=batch)))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    plan = masking.random(batch, tokens, keep=keep, generator=generator, backend="reference")
    inputs = {
        "images": torch.randn(batch, channels, *(g * p for g, p in zip(grid, patch)), generator=generator),
        "weight": torch.randn(width, channels, *patch, generator=generator) / 4,
    }
    if draw(st.booleans()):
        inputs["bias"] = torch.randn(width, generator=generator)
    if draw(st.booleans()):
        inputs["pos"] = torch.randn(tokens, width, generator=generator)
    prefix = draw(st.sampled_from([0, 1, 3]))
    if prefix:
        inputs["prefix"] = torch.randn(prefix, width, generator=generator)
    return plan, inputs


@pytest.mark.parametrize("where", EMBED)
@given(case=embeddings(), data=st.data())
@property_test
def test_embed_and_every_gradient(where, case, data):
    backend, device = where
    plan, inputs = case
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))

    def call(backend, device, images, weight, bias=None, **rest):
        return ops.patch_embed(images, weight, bias, plan.to(device), backend=backend, **rest)

    compare(call, inputs, backend, device, dtype)


@pytest.mark.parametrize("where", EMBED)
@pytest.mark.parametrize(
    ("images", "patch"),
    [
        ((2, 3, 32, 32), (16, 16)),
        ((2, 1, 32, 48), (16, 16)),
        ((1, 6, 28, 42), (14, 14)),
        ((2, 3, 4, 32, 32), (2, 16, 16)),
    ],
)
def test_equals_a_convolution(where, images, patch):
    backend, device = where
    torch.manual_seed(0)
    x = torch.randn(images, dtype=torch.float64 if backend in ("reference", "cpu") else torch.float32)
    weight, bias = torch.randn(20, images[1], *patch, dtype=x.dtype), torch.randn(20, dtype=x.dtype)
    conv = F.conv2d if len(patch) == 2 else F.conv3d
    tokens = conv(x, weight, bias, stride=patch).flatten(2).transpose(1, 2)
    pos, cls = torch.randn(1, tokens.shape[1], 20, dtype=x.dtype), torch.randn(1, 1, 20, dtype=x.dtype)
    plan = masking.random(images[0], tokens.shape[1], 0.5)
    want = torch.cat([cls.expand(images[0], -1, -1), ops.gather_tokens(tokens + pos, plan)], 1)
    args = [t.to(device) for t in (x, weight, bias)]
    out = ops.patch_embed(*args, plan.to(device), pos=pos.to(device), prefix=cls.to(device), backend=backend)
    assert_close(out, want, x.dtype)
    everything = ops.patch_embed(*args, backend=backend)
    assert_close(everything, tokens, x.dtype)


@pytest.mark.parametrize("where", EMBED)
def test_non_contiguous_input(where):
    backend, device = where
    plan = masking.random(2, 4, 0.5).to(device)
    images = torch.randn(2, 8, 8, 3, device=device).permute(0, 3, 1, 2)
    weight = torch.randn(4, 4, 3, 5, device=device).permute(3, 2, 0, 1)
    out = ops.patch_embed(images, weight, None, plan, backend=backend)
    assert torch.equal(out, ops.patch_embed(images.contiguous(), weight.contiguous(), None, plan, backend=backend))
    x = torch.randn(2, 6, 4, device=device).transpose(1, 2)[..., ::2]
    got = ops.gather_tokens(x, plan, backend=backend)
    assert torch.equal(got, ops.gather_tokens(x.contiguous(), plan, backend=backend))


@pytest.mark.parametrize("where", EMBED)
def test_autocast_keeps_positions_in_float32(where):
    """The product runs in bfloat16, the sum with float32 positions stays float32, as in eager PyTorch."""
    backend, device = where
    torch.manual_seed(0)
    plan = masking.random(2, 4, 0.5).to(device)
    images, weight = torch.randn(2, 3, 8, 8, device=device), torch.randn(8, 3, 4, 4, device=device, requires_grad=True)
    pos = torch.randn(4, 8, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = ops.patch_embed(images, weight, None, plan, pos=pos, backend=backend)
        eager = F.conv2d(images, weight, stride=4).flatten(2).transpose(1, 2) + pos
    assert out.dtype is eager.dtype is torch.float32
    assert_close(out, ops.gather_tokens(eager.float(), plan), torch.bfloat16)
    out.sum().backward()
    assert weight.grad.dtype is torch.float32


@pytest.mark.parametrize("where", EMBED)
@pytest.mark.parametrize("name", ["pos", "prefix"])
def test_tables_in_float64(where, name, monkeypatch):
    """As a NumPy table of positions gives them: the result is wide, and no kernel is chosen that does not serve it."""
    _, device = where
    choose, asked = _dispatch.choose, []
    monkeypatch.setattr(_dispatch, "choose", lambda *args: asked.append(args[2]) or choose(*args))
    images, weight = torch.randn(2, 3, 8, 8, device=device), torch.randn(16, 3, 4, 4, device=device)
    table = torch.randn(4 if name == "pos" else 1, 16, dtype=torch.float64, device=device)
    out = ops.patch_embed(images, weight, **{name: table})
    assert asked[-1] is torch.float64
    want = ops.patch_embed(images.double(), weight.double(), **{name: table}, backend="reference")
    assert out.dtype is torch.float64
    assert_close(out, want, torch.float32)


@pytest.mark.parametrize("where", EMBED)
def test_runs_agree_bit_for_bit(where):
    backend, device = where
    plan = masking.random(3, 49, 0.6).to(device)
    images = torch.randn(3, 3, 28, 28, device=device, requires_grad=True)
    weight, pos = (torch.randn(s, device=device, requires_grad=True) for s in ((33, 3, 4, 4), (49, 33)))
    runs = []
    for _ in range(2):
        out = ops.patch_embed(images, weight, None, plan, pos=pos, backend=backend)
        runs.append([out, *torch.autograd.grad(out.square().sum(), [images, weight, pos])])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def plan4():
    return masking.random(2, 4, 0.5)


IMAGES, WEIGHT = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 4, 4)
BAD = [
    (lambda: ops.gather_tokens(torch.rand(2, 5, 3), plan4()), ValueError, "for this plan"),
    (lambda: ops.gather_tokens(torch.rand(2, 4, 3), plan4(), prefix=1), ValueError, "for this plan"),
    (lambda: ops.gather_tokens(torch.rand(2, 4, 3), plan4(), prefix=-1), ValueError, "prefix must be at least 0"),
    (lambda: ops.gather_tokens(torch.rand(3, 4, 3), plan4()), ValueError, "for this plan"),
    (lambda: ops.gather_tokens(torch.rand(2, 4), plan4()), ValueError, "3 dimensions"),
    (lambda: ops.gather_tokens(torch.rand(2, 4, 3).int(), plan4()), TypeError, "float32"),
    (lambda: ops.gather_tokens(torch.rand(2, 4, 3), plan4(), "hidden"), ValueError, "which must be one of"),
    (lambda: ops.gather_tokens(torch.rand(2, 4, 3), torch.rand(2, 4)), TypeError, "TokenMask"),
    (lambda: ops.gather_tokens(torch.rand(2, 4, 3, device="meta"), plan4()), ValueError, "one device"),
    (lambda: ops.patch_embed(IMAGES[:, :2], WEIGHT, None, plan4()), ValueError, "expects 3 channels"),
    (lambda: ops.patch_embed(IMAGES[:1], WEIGHT, None, plan4()), ValueError, "but the plan is"),
    (lambda: ops.patch_embed(IMAGES[..., :7], WEIGHT, None, plan4()), ValueError, "multiple of the patch size"),
    (lambda: ops.patch_embed(IMAGES, WEIGHT.double(), None, plan4()), TypeError, "convert one"),
    (lambda: ops.patch_embed(IMAGES, WEIGHT[..., 0], None, plan4()), ValueError, "4 dimensions"),
    (lambda: ops.patch_embed(IMAGES, WEIGHT, torch.rand(4), plan4()), ValueError, "bias must hold 5"),
    (lambda: ops.patch_embed(IMAGES, WEIGHT, None, plan4(), pos=torch.rand(5, 5)), ValueError, "pos must have shape"),
    (lambda: ops.patch_embed(IMAGES, WEIGHT, None, plan4(), prefix=torch.rand(1, 4)), ValueError, "prefix must have"),
    (lambda: ops.patch_embed(IMAGES.int(), WEIGHT, None, plan4()), TypeError, "images must be float32"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("where", backends("gather_tokens", reference=False))
def test_opcheck(where):
    backend, device = where
    plan = masking.random(3, 9, keep=[2, 0, 5]).to(device)
    check = torch.library.opcheck
    for keep_prefix in (False, True):
        rows = plan.total_visible + 3 * 2 * keep_prefix
        x, grad = torch.rand(3, 11, 6, device=device), torch.rand(rows, 6, device=device)
        args = (plan.visible, plan.cu_visible, plan.max_visible, 2, keep_prefix)
        check(_registry.raw("gather_tokens", backend), (x, *args))
        args = (plan.slot, plan.cu_visible, 2, keep_prefix, False)
        check(_registry.raw("gather_tokens_backward", backend), (grad, *args))


@pytest.mark.parametrize("where", backends("patch_rows", reference=False))
def test_opcheck_of_embedding(where):
    backend, device = where
    plan = masking.random(2, 6, keep=[2, 3]).to(device)
    check = torch.library.opcheck
    images, pos, prefix = (torch.rand(s, device=device) for s in ((2, 3, 1, 8, 12), (6, 5), (1, 5)))
    patch = [1, 4, 4]
    check(_registry.raw("patch_rows", backend), (images, plan.visible, patch, torch.float32))
    grad = torch.rand(5, 48, device=device)
    check(_registry.raw("patch_rows_backward", backend), (grad, plan.slot, list(images.shape), patch, torch.float32))
    y = torch.rand(5, 5, device=device)
    check(_registry.raw("place_tokens", backend), (y, plan.visible, plan.cu_visible, 6, pos, prefix))
    grad = torch.rand(7, 5, device=device)
    for need in (True, False):
        args = (grad, plan.slot, plan.cu_visible, 1, need, need, torch.float32)
        check(_registry.raw("place_tokens_backward", backend), args)


@pytest.mark.parametrize("where", EMBED)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(where, dynamic):
    backend, device = where

    def step(images, weight, pos, noise):
        plan = masking.random(images.shape[0], pos.shape[0], 0.5, noise=noise, backend=backend)
        x = ops.patch_embed(images, weight, None, plan, pos=pos, prefix=pos[:1], backend=backend)
        tail = ops.gather_tokens(ops.patch_embed(images, weight, backend=backend), plan, "masked", backend=backend)
        return x.square().sum() + tail.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        images, noise = torch.randn(batch, 3, 8, 8, device=device), torch.rand(batch, 4, device=device)
        inputs = [torch.randn(s, device=device, requires_grad=True) for s in ((5, 3, 4, 4), (4, 5))]
        got = torch.autograd.grad(compiled(images, *inputs, noise), inputs)
        want = torch.autograd.grad(step(images, *inputs, noise), inputs)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b)
