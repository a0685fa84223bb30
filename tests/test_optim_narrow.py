"""maefast.optim.AdamW(state_dtype=torch.bfloat16): what is stored, how it is rounded, what comes back from files."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from maefast.ops import _narrow
from maefast.ops._narrow import round_at_random
from maefast.optim import AdamW, shadow_of
from tests.test_optim import parameters, train

BF16 = {"state_dtype": torch.bfloat16}


def step(number):
    return torch.tensor(float(number))


def by_numpy(values, number):
    """`round_at_random` in unsigned integers, which wrap by definition."""
    bits = values.numpy().view(np.uint32)
    dice = bits ^ np.uint32(number * 0x9E3779B9 % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        dice ^= dice >> np.uint32(shift)
        dice = dice * np.uint32(factor)
    dice ^= dice >> np.uint32(16)
    return torch.from_numpy(((bits + (dice & np.uint32(0xFFFF))) & np.uint32(0xFFFF0000)).view(np.float32))


@pytest.mark.parametrize("number", [0, 1, 70_001])
def test_rounding_is_the_documented_one(number):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(number)) * 10.0 ** torch.linspace(-40, 37, 1000)
    rounded = round_at_random(values, step(number))
    assert rounded.dtype is torch.bfloat16
    assert torch.equal(rounded.float(), by_numpy(values, number))
    # Cut and laid out in another way, the same.
    table = values.view(40, 25)
    assert torch.equal(round_at_random(table.t(), step(number)).t().reshape(-1), rounded)
    assert torch.equal(torch.cat([round_at_random(part, step(number)) for part in values.chunk(7)]), rounded)


def test_rounding_has_no_bias_and_goes_to_a_neighbour():
    value, steps = torch.tensor([0.7, -3.3e-9, 1.003, 1e-40]), 4000
    rounded = torch.stack([round_at_random(value, step(i)).double() for i in range(steps)])
    for column, exact in zip(rounded.T, value.double()):
        below, above = column.min(), column.max()
        assert len(column.unique()) == 2
        assert below < exact < above
        deviation = ((above - exact) * (exact - below) / steps).sqrt()
        assert abs(column.mean() - exact) < 4 * deviation
        pairs = ((column[1:] == above) == (column[:-1] == above)).double().mean()  # one step tells nothing of the next
        share = float((column == above).double().mean())
        assert abs(pairs - (share**2 + (1 - share) ** 2)) < 0.05


def test_what_bfloat16_holds_stays():
    held = torch.randn(500).to(torch.bfloat16).float()
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    special[4] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # a NaN that would run over
    for number in range(3):
        assert torch.equal(round_at_random(held, step(number)).float(), held)
        rounded = round_at_random(special, step(number))
        assert torch.equal(rounded[:4].float(), special[:4])
        assert rounded[:2].signbit().tolist() == [False, True]
        assert rounded[4].isnan()


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "maximize": True}, {"shadow": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("at_once", [1, 50, 2**24])
def test_a_step_is_one_in_float32_and_rounded(monkeypatch, options, at_once):
    monkeypatch.setattr(_narrow, "AT_ONCE", at_once)
    narrow, wide = AdamW(parameters(), **options, **BF16), AdamW(parameters(), **options)
    pairs = list(zip(narrow.param_groups[0]["params"], wide.param_groups[0]["params"]))
    for number in range(4):
        for optimizer in (narrow, wide):
            train(optimizer, number, number + 1)
        for mine, other in pairs:
            assert torch.equal(mine, other)
            for name, exact in wide.state[other].items():
                if name != "step":
                    rounded = round_at_random(exact, step(number + 1))
                    assert torch.equal(narrow.state[mine][name], rounded)
                    exact.copy_(rounded)
            if "shadow" in options and mine.numel():
                assert torch.equal(shadow_of(mine, torch.bfloat16), mine.detach().bfloat16())


def test_other_dtypes_keep_their_moments():
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        mine, other = AdamW(parameters(dtype), **BF16), AdamW(parameters(dtype))
        for optimizer in (mine, other):
            train(optimizer, 0, 3)
        for a, b in zip(mine.param_groups[0]["params"], other.param_groups[0]["params"]):
            assert mine.state[a]["exp_avg"].dtype is dtype
            assert torch.equal(a, b)


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_a_run_goes_on_bit_for_bit(how):
    whole, first = AdamW(parameters(), **BF16), AdamW(parameters(), **BF16)
    train(whole, 0, 8)
    train(first, 0, 4)
    if how == "state_dict":
        again = AdamW([nn.Parameter(p.detach().clone()) for p in first.param_groups[0]["params"]], **BF16)
        again.load_state_dict(first.state_dict())
    else:
        again = copy.deepcopy(first) if how == "deepcopy" else pickle.loads(pickle.dumps(first))
    train(again, 4, 8)
    for a, b in zip(whole.param_groups[0]["params"], again.param_groups[0]["params"]):
        assert torch.equal(a, b)
        for name, value in whole.state[a].items():
            assert again.state[b][name].dtype is value.dtype
            assert torch.equal(again.state[b][name], value)


def test_to_and_from_torchs():
    params = parameters()
    theirs = torch.optim.AdamW(params)
    train(theirs, 0, 3)
    ours = AdamW(params, **BF16)
    ours.load_state_dict(theirs.state_dict())
    for param in params:
        assert torch.equal(ours.state[param]["exp_avg"], theirs.state[param]["exp_avg"].bfloat16())
    theirs.load_state_dict(ours.state_dict())
    assert all(theirs.state[param]["exp_avg_sq"].dtype is torch.float32 for param in params)
    train(theirs, 3, 4)


def test_a_step_that_a_scaler_skips_changes_nothing():
    optimizer = AdamW(parameters(), **BF16)
    train(optimizer, 0, 2)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.found_inf = torch.ones(())
    train(optimizer, 2, 3)
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            assert torch.equal(value, before[index][name])


def test_an_average_that_falls_slowly_does_not_stand_still():
    """v of a gradient that was large once: by rounding to the nearest it would stay there for ever."""
    weight = nn.Parameter(torch.zeros(1000))
    optimizer = AdamW([weight], lr=0.0, betas=(0.9, 0.999), **BF16)
    weight.grad = torch.linspace(1.0, 2.0, 1000)
    optimizer.step()
    start = optimizer.state[weight]["exp_avg_sq"].float()
    weight.grad = torch.zeros(1000)
    for _ in range(1000):
        optimizer.step()
    left = optimizer.state[weight]["exp_avg_sq"].float() / start
    assert float(left.mean()) == pytest.approx(0.999**1000, rel=0.02)
    assert torch.equal((start * 0.999).bfloat16().float(), start)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"state_dtype must be torch\.bfloat16 or None, got torch\.float16"):
        AdamW(parameters(), state_dtype=torch.float16)
