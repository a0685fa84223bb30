"""transformer_block: one node for a pre-norm block, against its definition in float64, forward and every gradient."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import maefast
from maefast import masking, ops
from maefast.ops import BlockWeights, _dispatch, _transformer_block_form, transformer_block
from maefast.ops._transformer_block_form import NAMES

from .common import TOLERANCE, backends, property_test, relative_error

BACKENDS = backends("attention", reference=False, cuda=False)
KEEP = ("lean", "all", "nothing")


def make_weights(width=32, hidden=80, three=False, scales=False, seed=0, without=()) -> BlockWeights:
    """Products that keep the variance. without: names of biases that are None."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    def matrix(*shape):
        return randn(*shape) / math.sqrt(shape[1])

    qkv, bias = [matrix(width, width) for _ in range(3)], [randn(width) for _ in range(3)]
    made = {
        "norm1_weight": 1 + 0.3 * randn(width),
        "norm1_bias": randn(width),
        "qkv_weight": tuple(qkv) if three else torch.cat(qkv),
        "qkv_bias": (bias[0], None, bias[2]) if three else torch.cat(bias),
        "proj_weight": matrix(width, width),
        "proj_bias": randn(width),
        "norm2_weight": 1 + 0.3 * randn(width),
        "norm2_bias": randn(width),
        "fc1_weight": matrix(hidden, width),
        "fc1_bias": randn(hidden),
        "fc2_weight": matrix(width, hidden),
        "fc2_bias": randn(width),
        "scale1": randn(width) if scales else None,
        "scale2": randn(width) if scales else None,
    }
    return BlockWeights(**{name: None if name in without else value for name, value in made.items()})


def leaves(weights: BlockWeights) -> list[torch.Tensor]:
    parts = [part if isinstance(part, tuple) else (part,) for part in weights]
    return [t for part in parts for t in part if t is not None]


def to(weights: BlockWeights, device, dtype, trainable=True) -> BlockWeights:
    def one(t):
        if isinstance(t, tuple):
            return tuple(one(part) for part in t)
        return t if t is None else t.detach().to(device, dtype, copy=True).requires_grad_(trainable)

    return BlockWeights(*map(one, weights))


def step(weights, x, delta, heads, device, dtype, autocast=None, seed=1, **options):
    """Outputs and gradients of x, delta and every weight under random cotangents."""
    weights = to(weights, device, dtype)
    inputs = [t.detach().to(device, dtype, copy=True).requires_grad_() for t in (x, delta) if t is not None]
    options = {k: v.to(device) if isinstance(v, (torch.Tensor, ops.TokenMask)) else v for k, v in options.items()}
    with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
        outs = transformer_block(*inputs, *([None] * (2 - len(inputs))), weights, heads, **options)
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(t.shape, generator=generator).to(t) for t in outs]
    return [*outs, *torch.autograd.grad(outs, [*inputs, *leaves(weights)], cotangents)]


def check(got, want, tolerance) -> None:
    assert len(got) == len(want)
    for at, (a, b) in enumerate(zip(got, want)):
        error = relative_error(a, b)
        assert error <= tolerance, f"tensor {at}: relative error {error:.3g}"


FORMS = ["all", "tail", "masked", "packed"]


@st.composite
def calls(draw, three=None):
    """(weights, x, delta, heads, options): every form, odd sizes, each optional part there or not."""
    form = draw(st.sampled_from(FORMS))
    heads, head_dim = draw(st.sampled_from([(1, 16), (2, 16), (3, 32), (2, 24)]))
    width, seed = heads * head_dim, draw(st.integers(0, 2**16))
    biases = ["qkv_bias", "proj_bias", "fc1_bias", "fc2_bias"]
    weights = make_weights(
        width,
        draw(st.integers(1, 100)),
        three=draw(st.booleans()) if three is None else three,
        scales=draw(st.booleans()),
        seed=seed,
        without=draw(st.lists(st.sampled_from(biases), unique=True)),
    )
    generator = torch.Generator().manual_seed(seed)
    batch, length = draw(st.integers(1, 4)), draw(st.integers(2, 9))
    options = {
        "approximate": draw(st.sampled_from(["none", "tanh"])),
        "eps": (1e-6, draw(st.sampled_from([1e-6, 1e-2]))),
    }
    if draw(st.booleans()):
        options["scale"] = 0.3
    shape = [batch, length, width]
    if form == "tail":
        options["count"] = draw(st.integers(1, length))
    if form == "masked":
        prefix = draw(st.integers(0, 1))
        counts = draw(st.lists(st.integers(0, length - prefix - 1), min_size=batch, max_size=batch))
        plan = masking.random(batch, length - prefix, keep=counts, generator=generator, backend="reference")
        options.update(masked=plan, prefix=prefix)
    if form == "packed":
        lengths = draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch).filter(any))
        options["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).int()
        options["max_seqlen"] = draw(st.sampled_from([None, max(lengths)]))
        shape = [sum(lengths), width]
    if form != "masked" and draw(st.booleans()):
        options["drop1"] = torch.rand(shape[0], generator=generator).round() * 2
        options["drop2"] = torch.rand(shape[0], generator=generator).round() * 2
    x = torch.randn(shape, generator=generator)
    delta = torch.randn(shape, generator=generator) if draw(st.booleans()) else None
    return weights, x, delta, heads, options


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("keep", KEEP)
@given(data=st.data())
@property_test
def test_every_gradient(where, keep, data):
    backend, device = where
    weights, x, delta, heads, options = data.draw(calls())
    got = step(weights, x, delta, heads, device, torch.float32, backend=backend, keep=keep, **options)
    want = step(weights, x, delta, heads, "cpu", torch.float64, backend="reference", **options)
    check(got, want, 3 * TOLERANCE[torch.float32])  # of a chain of ten ops


@given(data=st.data())
@property_test
def test_through_a_library_in_float64(data):
    """The C++ attention does not serve float64: torch's does, inside the node."""
    weights, x, delta, heads, options = data.draw(calls())
    keep = data.draw(st.sampled_from(KEEP))
    got = step(weights, x, delta, heads, "cpu", torch.float64, keep=keep, **options)
    want = step(weights, x, delta, heads, "cpu", torch.float64, backend="reference", **options)
    check(got, want, TOLERANCE[torch.float64])


@pytest.fixture
def apart(monkeypatch):
    """Three weights are used as they are, however small, on a CPU of either library."""
    linear = importlib.import_module("maefast.ops.linear")
    monkeypatch.setattr(linear, "MIN_APART", 0)
    monkeypatch.setattr(linear, "_choice", ("torch", "a test"))
    monkeypatch.setattr(_transformer_block_form, "_FORMS", {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(data=st.data())
@property_test
def test_three_weights_as_they_are(apart, dtype, data):
    weights, x, delta, heads, options = data.draw(calls(three=True))
    keep = data.draw(st.sampled_from(KEEP))
    got = step(weights, x, delta, heads, "cpu", dtype, keep=keep, **options)
    want = step(weights, x, delta, heads, "cpu", torch.float64, backend="reference", **options)
    check(got, want, 3 * TOLERANCE[dtype])
    assert all(form is None or form.apart for form in _transformer_block_form._FORMS.values())


def cases():
    """(form, options) with fixed sizes."""
    yield "all", {}
    yield "tail", {"count": 3}
    yield "masked", {"masked": masking.random(3, 6, keep=[2, 3, 1], backend="reference"), "prefix": 1}
    yield "packed", {"cu_seqlens": torch.tensor([0, 3, 3, 13, 21], dtype=torch.int32), "max_seqlen": 10}
    yield "drop", {"drop1": torch.tensor([0.0, 2.0, 1.0]), "drop2": torch.tensor([1.0, 0.0, 2.0])}


def inputs(form: str, width: int = 32):
    torch.manual_seed(0)
    shape = (21, width) if form == "packed" else (3, 7, width)
    return torch.randn(shape), torch.randn(shape)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("three", [False, True])
@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize(("form", "options"), cases())
def test_autocast(where, low, three, scales, form, options):
    """Dtypes as torch gives them, gradients of float32 weights in float32, and not further from float64 than the ops
    one by one are."""
    backend, device = where
    weights = make_weights(three=three, scales=scales)
    args = weights, *inputs(form), 2
    got = step(*args, device, torch.float32, autocast=low, backend=backend, **options)
    want = step(*args, "cpu", torch.float64, backend="reference", **options)
    by_ops = step(*args, device, torch.float32, autocast=low, backend="reference", **options)
    for at, (a, b, c) in enumerate(zip(got, want, by_ops, strict=True)):
        assert a.dtype is c.dtype, at
        error, usual = relative_error(a, b), relative_error(c, b)
        assert error <= 1.5 * usual + TOLERANCE[low] / 4, f"tensor {at}: {error:.3g} beside {usual:.3g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_in_16_bits(dtype):
    """Without autocast, weights and stream in 16 bits."""
    weights, (x, delta) = make_weights(), inputs("all")
    got = step(weights, x, delta, 2, "cpu", dtype)
    want = step(weights, x, delta, 2, "cpu", torch.float64, backend="reference")
    by_ops = step(weights, x, delta, 2, "cpu", dtype, backend="reference")
    for a, b, c in zip(got, want, by_ops, strict=True):
        assert a.dtype is dtype
        assert relative_error(a, b) <= 1.5 * relative_error(c, b) + TOLERANCE[dtype] / 4


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize(("form", "options"), cases())
def test_settings_agree_and_repeat(form, options, autocast):
    """What is kept changes nothing but memory; two runs agree bit for bit."""
    args = make_weights(), *inputs(form), 2, "cpu", torch.float32, autocast
    first = step(*args, **options)
    for keep in (*KEEP, "lean"):
        for a, b in zip(step(*args, keep=keep, **options), first, strict=True):
            assert torch.equal(a, b)


def kept_bytes(keep: str, autocast: bool) -> list[int]:
    """Memory that the graph holds beside parameters and inputs, by address."""
    weights = to(make_weights(64, 256), "cpu", torch.float32)
    x, delta = (t.requires_grad_() for t in inputs("all", 64))
    found = {}

    def note(t):
        if not t.is_leaf or not t.requires_grad:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = transformer_block(x, delta, weights, 2, keep=keep)
        alive = list(found.values())
    assert all(t.requires_grad for t in out)
    return alive


def test_what_is_kept():
    """In values a token, of width D: two residual streams, qkv, attention, pre-activation; statistics beside them."""
    rows, width = 21, 64
    lean, every, nothing = (sum(kept_bytes(keep, False)) / (4 * rows * width) for keep in KEEP)
    assert lean == pytest.approx(1 + 1 + 3 + 1 + 4, rel=0.02)
    assert every == pytest.approx(lean + 1 + 1 + 4, rel=0.02)
    assert nothing == pytest.approx(1, rel=0.02)


def test_a_weight_is_cast_once_a_step():
    casts = 2 * (3 * 64 * 64 + 64 * 64 + 2 * 64 * 256)
    rows = 21 * 64 * (4 + 4 + 3 * 2 + 2 + 4 * 2)
    assert sum(kept_bytes("lean", True)) == pytest.approx(casts + rows, rel=0.02)


def test_equals_torch():
    """norm_first TransformerEncoderLayer with the same weights."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 80, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True).double()
    attn = layer.self_attn
    weights = BlockWeights(
        layer.norm1.weight, layer.norm1.bias, attn.in_proj_weight, attn.in_proj_bias, attn.out_proj.weight,
        attn.out_proj.bias, layer.norm2.weight, layer.norm2.bias, layer.linear1.weight, layer.linear1.bias,
        layer.linear2.weight, layer.linear2.bias,
    )  # fmt: skip
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    r, delta = transformer_block(x, None, weights, 2)
    torch.testing.assert_close(r + delta, layer(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["lean", "nothing"])
def test_one_output_alone(form):
    """The other's gradient is missing, not zero."""
    for at in (0, 1):
        results = []
        for options in ({"keep": form}, {"backend": "reference"}):
            weights, (x, delta) = to(make_weights(), "cpu", torch.float64), (t.double() for t in inputs("all"))
            x, delta = x.requires_grad_(), delta.requires_grad_()
            out = transformer_block(x, delta, weights, 2, **options)[at]
            tensors = [x, delta, *leaves(weights)]
            results.append(torch.autograd.grad(out.sin().sum(), tensors, allow_unused=True))
        for a, b in zip(*results, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("keep", KEEP)
def test_no_graph_without_gradients(keep):
    weights, (x, delta) = to(make_weights(), "cpu", torch.float32, trainable=False), inputs("all")
    out = transformer_block(x, delta, weights, 2, keep=keep)
    assert not any(t.requires_grad for t in out)
    with torch.inference_mode():
        again = transformer_block(x.clone(), delta.clone(), weights, 2, keep=keep)
    assert all(torch.equal(a, b) for a, b in zip(out, again))


def test_backward_inside_autocast():
    """Its dtypes are those of the forward."""
    weights, (x, delta) = to(make_weights(), "cpu", torch.float32), inputs("all")
    grads = []
    for enabled in (False, True):
        out = sum(transformer_block(x, delta, weights, 2))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(out.sum(), leaves(weights)))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["all", "packed"])
def test_batched_gradients(form, dtype):
    """`is_grads_batched`, through our attention and through a library."""
    options = dict(cases())[form]
    weights, (x, delta) = to(make_weights(), "cpu", dtype), (t.to(dtype) for t in inputs(form))
    out = sum(transformer_block(x, delta, weights, 2, **options))
    many = torch.randn(3, *out.shape, dtype=dtype)
    found = torch.autograd.grad(out, leaves(weights), many, is_grads_batched=True, retain_graph=True)
    for at, one in enumerate(many):
        for got, want in zip(found, torch.autograd.grad(out, leaves(weights), one, retain_graph=True)):
            torch.testing.assert_close(got[at], want)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("form", "options"), [case for case in cases() if case[0] in ("all", "tail", "packed")])
def test_compiles_whole(form, options, dynamic):
    torch._dynamo.reset()
    weights, (x, delta) = to(make_weights(), "cpu", torch.float32), inputs(form)

    def run(x, delta):
        return sum(transformer_block(x, delta, weights, 2, **options))

    want = torch.autograd.grad(run(x, delta).sin().sum(), leaves(weights))
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, delta).sin().sum(), leaves(weights))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_strides_do_not_matter():
    weights, (x, delta) = to(make_weights(three=True), "cpu", torch.float32), inputs("all")
    want = transformer_block(x, delta, weights, 2)

    def strided(t):
        if isinstance(t, tuple):
            return tuple(strided(part) for part in t)
        return t if t is None else t.repeat_interleave(2, -1)[..., ::2] if t.ndim == 1 else t.t().contiguous().t()

    got = transformer_block(
        x.transpose(0, 1).contiguous().transpose(0, 1), delta, BlockWeights(*map(strided, weights)), 2
    )
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


def test_starts_with_strides():
    weights, (x, delta) = to(make_weights(), "cpu", torch.float32), inputs("packed")
    cu = torch.tensor([0, 3, 3, 13, 21], dtype=torch.int32)
    want = transformer_block(x, delta, weights, 2, cu_seqlens=cu)
    got = transformer_block(x, delta, weights, 2, cu_seqlens=cu.repeat_interleave(2)[::2])
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("packed", [False, True])
def test_no_samples_to_drop(backend, packed):
    weights = to(make_weights(), "cpu", torch.float32)
    x = torch.zeros(*((0,) if packed else (0, 5)), 32, requires_grad=True)
    cu = torch.zeros(2, dtype=torch.int32) if packed else None
    drop = torch.zeros(0)
    outs = transformer_block(x, None, weights, 2, drop1=drop, drop2=drop, cu_seqlens=cu, backend=backend)
    assert [out.shape for out in outs] == [x.shape, x.shape]
    grads = torch.autograd.grad(sum(out.sum() for out in outs), [x, *leaves(weights)])
    assert not any(grad.any() for grad in grads)


def test_starts_are_checked_once(monkeypatch):
    """A plan serves many blocks; a start that is written to is checked anew."""
    calls = []
    checks = ops.attention.__globals__["_checks"]
    monkeypatch.setattr(checks, "holds", lambda fits, message: calls.append(bool(fits)))
    weights, (x, _) = make_weights(), inputs("packed")
    cu = torch.tensor([0, 3, 3, 13, 21], dtype=torch.int32)
    for _ in range(3):
        transformer_block(x, None, weights, 2, cu_seqlens=cu, max_seqlen=10)
    assert calls == [True]
    cu[1] = 2
    transformer_block(x, None, weights, 2, cu_seqlens=cu, max_seqlen=11)
    assert calls == [True, True]


def test_another_dtype_of_the_same_weights_is_another_kind():
    weights, (x, delta) = make_weights(), inputs("all")
    transformer_block(x, delta, weights, 2)
    for t in leaves(weights):
        t.data = t.data.double()
    assert transformer_block(x.double(), delta.double(), weights, 2)[0].dtype is torch.float64
    with pytest.raises(TypeError, match=r"qkv_weight is torch.float64 but the tokens are torch.float32"):
        transformer_block(x, delta, weights, 2)


def test_names():
    assert BlockWeights._fields == NAMES


W, X = make_weights(), torch.zeros(2, 5, 32)
PLAN = masking.random(2, 5, keep=2, backend="reference")
BAD = [
    (lambda: transformer_block([1], None, W, 2), TypeError, "x must be a torch.Tensor"),
    (lambda: transformer_block(X[0, 0], None, W, 2), ValueError, "x must have 2 or 3 dimensions"),
    (lambda: transformer_block(X.int(), None, W, 2), TypeError, "x must be float"),
    (lambda: transformer_block(X, X[:1], W, 2), ValueError, "delta must have the shape of x"),
    (lambda: transformer_block(X, 3, W, 2), TypeError, "delta must be a torch.Tensor"),
    (lambda: transformer_block(X, None, tuple(W), 2), TypeError, "weights must be maefast.ops.BlockWeights"),
    (
        lambda: transformer_block(X, None, W, 3),
        ValueError,
        "num_heads must divide the width of x, 32",
    ),
    (lambda: transformer_block(X, None, W, 2, eps=0.0), ValueError, "eps must be positive"),
    (lambda: transformer_block(X, None, W, 2, eps=torch.ones(3)), TypeError, "eps must be a number"),
    (lambda: transformer_block(X, None, W, 2, scale="x"), TypeError, "scale must be a number"),
    (lambda: transformer_block(X, None, W, 2, approximate="relu"), ValueError, "approximate must be one of"),
    (lambda: transformer_block(X, None, W, 2, keep="some"), ValueError, "keep must be one of"),
    (lambda: transformer_block(X, None, W, 2, backend="what"), ValueError, "unknown backend 'what'"),
    (lambda: transformer_block(X[0], None, W, 2), ValueError, "packed input needs cu_seqlens"),
    (
        lambda: transformer_block(X, None, W, 2, cu_seqlens=torch.tensor([0, 2], dtype=torch.int32)),
        ValueError,
        "x must have 2 dimensions",
    ),
    (
        lambda: transformer_block(X[0], None, W, 2, cu_seqlens=torch.tensor([0, 7], dtype=torch.int32)),
        ValueError,
        "cu_seqlens must rise from 0 to the 5 packed rows",
    ),
    (lambda: transformer_block(X, None, W, 2, count=6), ValueError, r"count must lie in \[1, 5\]"),
    (lambda: transformer_block(X, None, W, 2, count=0), ValueError, r"count must lie in \[1, 5\]"),
    (lambda: transformer_block(X, None, W, 2, count=2, masked=PLAN), ValueError, "count or masked, not both"),
    (lambda: transformer_block(X, None, W, 2, masked=PLAN, prefix=1), ValueError, r"x must be \[2, 1 prefix \+ 5, D\]"),
    (lambda: transformer_block(X, None, W, 2, masked=3), TypeError, "masked must be a maefast.ops.TokenMask"),
    (lambda: transformer_block(X, None, W, 2, drop1=torch.ones(3)), ValueError, "drop1 must hold 2 factors"),
    (lambda: transformer_block(X, None, W, 2, masked=PLAN, drop2=torch.ones(2)), ValueError, "drop2 does not go with"),
    (
        lambda: transformer_block(X, None, W._replace(norm1_bias=None), 2),
        TypeError,
        "norm1_bias must be a torch.Tensor",
    ),
    (lambda: transformer_block(X, None, W._replace(fc1_weight=X), 2), ValueError, "fc1_weight must have 2 dimensions"),
    (
        lambda: transformer_block(X, None, W._replace(fc2_weight=W.fc1_weight), 2),
        ValueError,
        r"fc2_weight must be \[32, 80\]",
    ),
    (
        lambda: transformer_block(X, None, W._replace(qkv_weight=W.proj_weight), 2),
        ValueError,
        r"qkv_weight must be \[96, 32\], got \[32, 32\]",
    ),
    (
        lambda: transformer_block(X, None, W._replace(proj_weight=W.proj_weight.to("meta")), 2),
        ValueError,
        "proj_weight is on meta but x is on cpu",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_forced_backend_is_used_or_raises():
    with maefast.backend("reference"):
        x = X.clone().requires_grad_()
        assert "TransformerBlock" not in type(transformer_block(x, None, W, 2)[0].grad_fn).__name__
    if _dispatch.unavailable("attention", "triton", "cpu") is not None:
        with pytest.raises(RuntimeError, match="backend 'triton' was asked for"):
            transformer_block(X, None, W, 2, backend="triton")
