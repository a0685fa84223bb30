"""adamw: every backend against the definition in float64, and the definition against a loop written by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast import ops
from maefast.ops import _registry

from .common import assert_close, backends, dtypes_of, property_test

BACKENDS = backends("adamw")
NAMES = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "shadows", "steps")
# A gradient of another dtype than its parameter: what kernels read, and what is converted for them.
OTHER = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
]


def make(shapes, dtype, *, grad=None, shadow=None, amsgrad=False, seed=0, step=3):
    """Lists of tensors on the CPU, of a run that is under way; v is as large as the gradients squared."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda shape: torch.randn(shape, generator=generator)  # noqa: E731
    return {
        "params": [randn(s).to(dtype) for s in shapes],
        "grads": [randn(s).to(grad or dtype) for s in shapes],
        "exp_avgs": [randn(s).to(dtype) for s in shapes],
        "exp_avg_sqs": [(0.5 + randn(s).abs()).to(dtype) for s in shapes],
        "max_exp_avg_sqs": [(1.0 + randn(s).abs()).to(dtype) for s in shapes] if amsgrad else [],
        "shadows": [torch.empty(s, dtype=shadow) for s in shapes] if shadow else [],
        "steps": [torch.tensor(float(step + i)) for i in range(len(shapes))],
    }


def copied(lists, device="cpu", dtype=None):
    def one(name, t):
        keep = dtype is None or name in ("steps", "shadows")
        return t.detach().clone().to(device) if keep else t.detach().to(device, dtype, copy=True)

    return {name: [one(name, t) for t in tensors] for name, tensors in lists.items()}


def check(backend, device, lists, dtype, **options):
    """Runs `lists` on the backend and in float64 on the reference; returns both."""
    low, high = copied(lists, device), copied(lists, dtype=torch.float64)
    there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    ops.adamw(**low, backend=backend, **there)
    ops.adamw(**high, backend="reference", **options)
    for name in NAMES:
        if name == "shadows":
            continue
        for i, (a, b) in enumerate(zip(low[name], high[name])):
            bound = torch.float32 if name == "steps" else a.dtype if name == "grads" else dtype
            assert_close(a, b, bound, f"{name}[{i}]")
    for shadow, param in zip(low["shadows"], low["params"]):
        assert torch.equal(shadow, param.to(shadow.dtype))
    return low, high


@pytest.mark.parametrize("where", BACKENDS)
@given(data=st.data())
@property_test
def test_step_in_every_dtype(where, data):
    backend, device = where
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))
    shapes = data.draw(st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=5))
    wide = dtype in (torch.float32, torch.float64)
    lists = make(
        shapes,
        dtype,
        shadow=data.draw(st.sampled_from([None, torch.bfloat16, torch.float16])) if wide else None,
        amsgrad=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 2**16)),
        step=data.draw(st.integers(0, 1000)),
    )
    options = {
        "lr": data.draw(st.sampled_from([0.0, 1e-3, 0.3, torch.tensor(0.25), torch.tensor([0.25])])),
        "betas": data.draw(st.sampled_from([(0.9, 0.95), (0.0, 0.0), (0.3, 0.999)])),
        "eps": data.draw(st.sampled_from([1e-8, 0.1, 0.0])),
        "weight_decay": data.draw(st.sampled_from([0.0, 0.05, 0.5])),
        "maximize": data.draw(st.booleans()),
        "grad_scale": data.draw(st.sampled_from([None, torch.tensor(4.0), torch.tensor([3.0])])),
        "found_inf": data.draw(st.sampled_from([None, torch.tensor(0.0), torch.tensor([1.0])])),
    }
    check(backend, device, lists, dtype, **options)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize(("dtype", "grad"), OTHER, ids=str)
def test_gradient_of_another_dtype(where, dtype, grad):
    backend, device = where
    if torch.float64 in (dtype, grad) and backend in ("triton", "cuda"):
        pytest.skip("the GPU kernels do not serve float64")
    lists = make([(7, 9), (130,)], dtype, grad=grad)
    check(backend, device, lists, dtype, lr=0.1)
    check(backend, device, lists, dtype, lr=0.1, grad_scale=torch.tensor(8.0))


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("shadow", [torch.bfloat16, torch.float16], ids=str)
def test_shadow_is_the_rounded_parameter(where, shadow):
    """Bit for bit, special values and halfway cases too; also where the step is left out."""
    backend, device = where
    special = [0.0, -0.0, math.inf, math.nan, 1e-40, 65519.9, 65520.0, 1e30, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11]
    for found_inf in (None, torch.tensor(1.0, device=device)):
        lists = copied(make([(len(special),), (1000,)], torch.float32, shadow=shadow), device)
        lists["params"][0].copy_(torch.tensor(special))
        ops.adamw(**lists, lr=0.0, found_inf=found_inf, backend=backend)
        for copy, param in zip(lists["shadows"], lists["params"]):
            torch.testing.assert_close(copy, param.to(shadow), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(lists["params"][0].cpu(), torch.tensor(special), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_nothing_changes_where_a_gradient_is_not_finite(where, amsgrad):
    backend, device = where
    lists = copied(make([(5, 6), (3,)], torch.float32, amsgrad=amsgrad), device)
    lists["grads"][0][0, 0] = math.inf
    before = copied(lists, device)
    one = torch.tensor(1.0, device=device)
    ops.adamw(**lists, lr=0.1, grad_scale=2 * one, found_inf=one, backend=backend)
    for name, tensors in lists.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, before[name])), name


@pytest.mark.parametrize("where", BACKENDS)
def test_nan_stays(where):
    backend, device = where
    lists = copied(make([(40,)], torch.float32, amsgrad=True), device)
    lists["grads"][0][3] = math.nan
    ops.adamw(**lists, lr=0.1, backend=backend)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"):
        assert lists[name][0].isnan().nonzero().tolist() == [[3]], name


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_whose_square_overflows(where, dtype):
    """(1 - beta2) g^2 is finite; the order of the product must keep it so."""
    backend, device = where
    lists = make([(40,)], dtype)
    lists["grads"][0][::3] = 1e20
    lists["grads"][0][1::3] = -4e20
    low, _ = check(backend, device, lists, dtype, lr=0.1, betas=(0.9, 0.999))
    assert low["exp_avg_sqs"][0].isfinite().all()


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "gaps": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
}


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("param", ["contiguous", *LAYOUTS])
@pytest.mark.parametrize("grad", ["contiguous", *LAYOUTS])
@pytest.mark.parametrize("same_state", [True, False])
def test_any_layout(where, param, grad, same_state):
    backend, device = where
    lists = make([(4, 5, 2, 3)], torch.float32, shadow=torch.bfloat16, amsgrad=True)
    placed = copied(lists, device)
    place = LAYOUTS.get(param, torch.Tensor.contiguous)
    for name in NAMES[:6]:
        if name in ("params", "shadows") or same_state:
            placed[name] = [place(t) for t in placed[name]]
    placed["grads"] = [LAYOUTS.get(grad, torch.Tensor.contiguous)(t) for t in placed["grads"]]
    scale = torch.tensor(4.0)
    strides = {name: [t.stride() for t in placed[name]] for name in NAMES}
    ops.adamw(**placed, lr=0.1, grad_scale=scale.to(device), backend=backend)
    ops.adamw(**lists, lr=0.1, grad_scale=scale, backend="reference")
    for name in NAMES:
        assert [t.stride() for t in placed[name]] == strides[name]
        for a, b in zip(placed[name], lists[name]):
            assert_close(a, b, torch.bfloat16 if name == "shadows" else torch.float32, name)


@pytest.mark.parametrize("where", BACKENDS)
def test_autograd_sees_what_was_written(where):
    backend, device = where
    lists = copied(make([(6,)], torch.float32, shadow=torch.bfloat16, amsgrad=True), device)
    weight = lists["params"][0].requires_grad_()
    used = (weight * weight).sum() + (lists["shadows"][0].float() * 2).sum()
    before = {name: lists[name][0]._version for name in NAMES}
    ops.adamw(**lists, lr=0.1, backend=backend)
    for name in NAMES:
        assert (lists[name][0]._version > before[name]) == (name != "grads"), name
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        used.backward()


@pytest.mark.parametrize("where", BACKENDS)
def test_runs_agree_bit_for_bit(where):
    backend, device = where
    shapes = [(997, 33), (5,), (), (64, 64)]
    runs = []
    for threads in (1, 3):
        lists = copied(make(shapes, torch.float32, shadow=torch.bfloat16), device)
        had = torch.get_num_threads()
        torch.set_num_threads(threads)
        ops.adamw(**lists, lr=0.1, backend=backend)
        torch.set_num_threads(had)
        runs.append(lists)
    for name in NAMES:
        assert all(torch.equal(a, b) for a, b in zip(runs[0][name], runs[1][name]))


def test_parts_of_one_list_agree_with_the_whole():
    """A thread's share begins and ends anywhere in a tensor."""
    whole = make([(1,), (1000,), (0,), (37,), (8, 9)], torch.float32)
    single = copied(whole)
    ops.adamw(**whole, lr=0.1)
    for i in range(5):
        ops.adamw(**{name: tensors[i : i + 1] for name, tensors in single.items()}, lr=0.1)
    for name in NAMES:
        assert all(torch.equal(a, b) for a, b in zip(whole[name], single[name]))


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_reference_is_the_loop(amsgrad, maximize):
    lists = make([(4,)], torch.float64, amsgrad=amsgrad, step=0)
    state = [[float(t) for t in lists[name][0]] for name in NAMES[:4]]
    high = [float(t) for t in lists["max_exp_avg_sqs"][0]] if amsgrad else [0.0] * 4
    lr, beta1, beta2, eps, decay = 0.1, 0.9, 0.95, 1e-3, 0.2
    for t in (1, 2, 3):
        ops.adamw(
            **{**lists, "grads": [lists["grads"][0] * t]},
            **{"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": decay, "maximize": maximize},
            backend="reference",
        )
        p, g0, m, v = state
        for i in range(4):
            g = (-t if maximize else t) * g0[i]
            p[i] -= lr * decay * p[i]
            m[i] += (1 - beta1) * (g - m[i])
            v[i] += (1 - beta2) * (g * g - v[i])
            high[i] = max(high[i], v[i]) if amsgrad else v[i]
            m_hat, v_hat = m[i] / (1 - beta1**t), high[i] / (1 - beta2**t)
            p[i] -= lr * m_hat / (math.sqrt(v_hat) + eps)
        for name, want in zip(("params", "exp_avgs", "exp_avg_sqs"), (p, m, v)):
            torch.testing.assert_close(lists[name][0], torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-14)
        assert float(lists["steps"][0]) == t


def bad(**changes):
    lists = make([(2, 3), (4,)], torch.float32)
    return lambda: ops.adamw(**{**lists, "lr": 0.1, **changes})


X, Y = torch.zeros(2, 3), torch.zeros(4)
BAD = [
    (bad(grads=[X]), ValueError, "grads must hold 2"),
    (bad(grads=X), TypeError, "grads must be a list"),
    (bad(grads=[X, X]), ValueError, r"grads\[1\] must have shape \(4,\)"),
    (bad(grads=[X, 3.0]), TypeError, r"grads\[1\] must be a torch.Tensor"),
    (bad(params=[X.int(), Y]), TypeError, r"params\[0\] must be float32"),
    (bad(exp_avgs=[X, Y.double()]), TypeError, r"exp_avgs\[1\] must be torch.float32"),
    (bad(shadows=[X, Y]), TypeError, r"shadows\[0\] must have 16 bits"),
    (bad(steps=[torch.tensor(1.0), torch.ones(2)]), ValueError, r"steps\[1\] must be one float32"),
    (bad(max_exp_avg_sqs=[X]), ValueError, "max_exp_avg_sqs must hold 2"),
    (bad(grads=[X, Y.to("meta")]), ValueError, "one device"),
    (bad(grads=[X.to_sparse(), Y]), TypeError, r"grads\[0\] must be a dense"),
    (bad(betas=(0.9, 1.0)), ValueError, r"betas\[1\] must lie in"),
    (bad(betas=0.9), ValueError, "betas must be two numbers"),
    (bad(betas=(0.9, "x")), TypeError, r"betas\[1\] must be a number"),
    (bad(eps=X), TypeError, "eps must be a number"),
    (bad(weight_decay=-1.0), ValueError, "weight_decay must be 0 or more"),
    (bad(lr=float("nan")), ValueError, "lr must be 0 or more"),
    (bad(lr=None), TypeError, "lr must be"),
    (bad(lr="fast"), TypeError, "lr must be"),
    (bad(lr=torch.ones(2)), ValueError, "lr must hold one number"),
    (bad(found_inf=torch.ones(2)), ValueError, "found_inf must hold one number"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_no_parameters():
    ops.adamw([], [], [], [], [], lr=0.1)


@pytest.mark.parametrize("where", backends("adamw", reference=False))
def test_opcheck(where):
    backend, device = where
    lr, one = torch.tensor(0.1, device=device), torch.tensor(1.0, device=device)
    for amsgrad, tensor, scale in ((False, None, None), (True, lr, one)):
        lists = copied(make([(5, 6), (7,)], torch.float32, shadow=torch.bfloat16, amsgrad=amsgrad), device)
        args = (*(lists[name] for name in NAMES), tensor, 0.1, 0.9, 0.95, 1e-8, 0.01, False, scale, scale)
        torch.library.opcheck(_registry.raw("adamw", backend), args)
