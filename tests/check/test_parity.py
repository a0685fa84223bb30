"""When two models count as equal."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from maefast.check import parity
from maefast.errors import ConfigError

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.useless = nn.Parameter(torch.zeros(4))  # its gradient is zero

    def forward(self, x):
        y = self.last(self.first(x).relu()) + 0 * self.useless
        return {"y": y, "order": y.argsort(1), "loss": y.square().mean()}


def pair():
    torch.manual_seed(0)
    model = Net()
    return model, copy.deepcopy(model)


def compare(own, fast, narrow=False, training=True):
    return parity.compare(own, fast, lambda model: model(X), "cpu", narrow, training)


@pytest.mark.parametrize("narrow", [False, True])
def test_the_same(narrow):
    found = compare(*pair(), narrow)
    assert all(d.equal for d in found)
    if not narrow:
        assert [d.value for d in found] == [0.0] * 4


@pytest.mark.parametrize(("by", "narrow", "equal"), [(1e-6, False, True), (1e-2, False, False), (1e-1, True, False)])
def test_a_scale(by, narrow, equal):
    own, fast = pair()
    with torch.no_grad():
        fast.last.weight *= 1 + by
    found = compare(own, fast, narrow)
    assert found[0].equal == equal
    assert [d.equal for d in found if d.what == "random numbers"] == [True]


def test_a_gradient_where_there_should_be_none():
    own, fast = pair()
    fast.useless.register_hook(lambda g: g + 1)
    found = compare(own, fast)
    assert [(d.where, d.equal) for d in found[2:]] == [("useless", False)] * 2


def test_not_a_number():
    own, fast = pair()
    with torch.no_grad():
        fast.last.bias[0] = float("nan")
    assert not compare(own, fast)[0].equal
    with torch.no_grad():
        own.last.bias[0] = float("nan")  # in the same places: nothing is tested
    with pytest.raises(ConfigError, match=r"the model's outputs .output 0. are NaN or infinite"):
        compare(own, fast)


@pytest.mark.parametrize("narrow", [False, True])
def test_gradients_that_are_not_finite(narrow):
    own, fast = pair()
    for model in (own, fast):
        model.first.bias.register_hook(lambda g: g / 0)
    with pytest.raises(ConfigError, match=r"the model's gradients of the loss .first.bias. are NaN or infinite"):
        compare(own, fast, narrow)
    fast.first.bias._backward_hooks.clear()
    own.first.bias._backward_hooks.clear()
    fast.first.bias.register_hook(lambda g: g / 0)
    assert [d.equal for d in compare(own, fast, narrow)] == [True, True, False, False]


def test_scores_of_what_is_masked_may_be_infinite():
    own, fast = pair()
    for model in (own, fast):
        model.register_forward_hook(lambda m, given, out: {**out, "y": out["y"].masked_fill(X[:, :4] > 0, -torch.inf)})
    assert all(d.equal for d in compare(own, fast, training=False))


def test_shapes_and_dtypes():
    own, fast = pair()
    for change, says in (
        (lambda out: {**out, "y": out["y"].double()}, "output 0 is torch.float64 [3, 4] instead of torch.float32 [3"),
        (lambda out: {**out, "y": out["y"][:1]}, "output 0 is torch.float32 [1, 4] instead of"),
        (lambda out: {"y": out["y"], "loss": out["loss"]}, "2 tensors instead of 3"),
    ):
        handle = fast.register_forward_hook(lambda module, given, out, change=change: change(out))
        found = compare(own, fast)[0]
        handle.remove()
        assert found.where.startswith(says)
        assert not found.equal


def test_it_leaves_no_trace():
    own, fast = pair()
    for p in own.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(own.state_dict())
    compare(own, fast)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in own.parameters())
    assert all(p.grad is None for p in fast.parameters())
