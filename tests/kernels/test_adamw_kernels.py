"""adamw: the Triton kernel against float64 plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import maefast
from maefast.kernels import adamw
from maefast.ops.adamw import adamw_reference
from maefast.optim import AdamW, shadow_of
from tests.kernels.support import INTERPRET, assert_close, property_test, random_tensor

NAMES = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "shadows", "steps")
SHADOW = torch.float16 if INTERPRET else torch.bfloat16


def make(counts, dtype, grad_dtype, *, shadow, amsgrad, seed, step):
    lists = {name: [] for name in NAMES}
    for i, count in enumerate(counts):
        at = seed + 10 * i
        lists["params"].append(random_tensor(count, seed=at, dtype=dtype))
        lists["grads"].append(random_tensor(count, seed=at + 1, dtype=grad_dtype))
        lists["exp_avgs"].append(random_tensor(count, seed=at + 2, dtype=dtype))
        lists["exp_avg_sqs"].append(random_tensor(count, seed=at + 3, dtype=dtype).abs() + 0.5)
        lists["steps"].append(torch.tensor(float(step + i)))
        if amsgrad:
            lists["max_exp_avg_sqs"].append(random_tensor(count, seed=at + 4, dtype=dtype).abs() + 1)
        if shadow:
            lists["shadows"].append(torch.empty(count, dtype=SHADOW))
    return lists


def check(lists, device, dtype, lr=0.1, betas=(0.9, 0.95), eps=1e-8, decay=0.1, maximize=False, scale=None, found=None):
    low = {name: [t.to(device, copy=True) for t in tensors] for name, tensors in lists.items()}
    high = {name: [t.double() for t in tensors] for name, tensors in lists.items()}
    there = [None if t is None else torch.tensor(t, device=device) for t in (scale, found)]
    rate = (lr.to(device), 0.0) if isinstance(lr, torch.Tensor) else (None, lr)
    adamw.adamw(*(low[name] for name in NAMES), *rate, *betas, eps, decay, maximize, *there)
    here = [None if t is None else torch.tensor(t, dtype=torch.float64) for t in (scale, found)]
    for i in range(len(lists["params"])):
        row = [high[name][i] if high[name] else None for name in NAMES]
        adamw_reference(*row, lr, *betas, eps, decay, maximize, *here)
    for name in NAMES:
        for i, (a, b) in enumerate(zip(low[name], high[name])):
            if name == "shadows":
                assert torch.equal(a, low["params"][i].to(a.dtype)), f"shadow {i}"
            else:
                assert_close(a, b, f"{name} {i}", torch.float32 if name == "steps" else a.dtype)


@given(st.data())
@property_test(25)
def test_adamw(device, dtype, data):
    draw = data.draw
    counts = draw(st.lists(st.sampled_from([0, 1, 5, 16, 48, 100, 2048, 2064, 4100]), min_size=1, max_size=5))
    other = draw(st.sampled_from([dtype, torch.float32]))
    shadow = draw(st.booleans()) and dtype is torch.float32
    options = {"shadow": shadow, "amsgrad": draw(st.booleans()), "seed": draw(st.integers(0, 999))}
    check(
        make(counts, dtype, other, step=draw(st.sampled_from([0, 1, 1000])), **options),
        device,
        dtype,
        lr=draw(st.sampled_from([0.0, 0.3, torch.tensor(0.25)])),
        betas=draw(st.sampled_from([(0.9, 0.999), (0.0, 0.0)])),
        eps=draw(st.sampled_from([0.0, 1e-3])),
        decay=draw(st.sampled_from([0.0, 0.1])),
        maximize=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 4.0, 3.0])),
        found=draw(st.sampled_from([None, 0.0, 1.0])),
    )


@pytest.mark.parametrize("half", [torch.float16] if INTERPRET else [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_16_bits(device, half):
    lists = make([64, 3], torch.float32, half, shadow=True, amsgrad=False, seed=0, step=1)
    check(lists, device, torch.float32)
    check(lists, device, torch.float32, scale=2.0)


def test_more_tensors_than_a_launch_takes(device, dtype):
    """Several launches, each mixing sizes; the last is not full. Kinds of tensors apart."""
    counts = [1 + 7 * i for i in range(20)] + [16 * (i + 1) for i in range(18)]
    lists = make(counts, dtype, dtype, shadow=dtype is torch.float32, amsgrad=True, seed=3, step=2)
    check(lists, device, dtype)


def test_nothing_but_empty_tensors(device, dtype):
    lists = make([0, 0], dtype, dtype, shadow=False, amsgrad=False, seed=0, step=4)
    check(lists, device, dtype)


def test_early_corrections_keep_their_digits(device):
    """1 - 0.9999 at the first step, in float32, would lose four of seven digits."""
    lists = make([64], torch.float32, torch.float32, shadow=False, amsgrad=False, seed=0, step=0)
    check(lists, device, torch.float32, betas=(0.9999, 0.9999), decay=0.0)


def test_optimizer(device):
    """Four steps of the optimizer on this backend, gradients absent in turn, one weight in channels-last memory."""
    shapes = [(3, 5), (7,), (1,), (0,), (40, 33), (2, 3, 4, 4)]
    ours, theirs = ([nn.Parameter(random_tensor(*s, seed=i).to(device)) for i, s in enumerate(shapes)] for _ in "ab")
    ours[5].data = ours[5].data.contiguous(memory_format=torch.channels_last)
    lr = torch.tensor(0.05, device=device)
    mine, other = AdamW(ours, lr=lr, shadow=SHADOW), torch.optim.AdamW(theirs, lr=0.05)
    for step in range(4):
        for i, (a, b) in enumerate(zip(ours, theirs)):
            grad = random_tensor(*a.shape, seed=100 * step + i).to(device)
            a.grad, b.grad = (None, None) if (step + i) % 3 == 0 else (grad, grad.clone())
        with maefast.backend("triton"):
            mine.step()
        other.step()
    for i, (a, b) in enumerate(zip(ours, theirs)):
        assert_close(a, b, f"weight {i}")
        assert torch.equal(shadow_of(a, SHADOW), a.to(SHADOW))


def test_arguments_have_names_of_their_own():
    """A tuple named as a variable of Triton's own launching function would be taken for that."""
    assert not {"params", "specialization", "options", "backend"} & set(adamw.adamw_kernel.arg_names)
