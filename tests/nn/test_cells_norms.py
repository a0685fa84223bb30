"""Batch norms on `Cells` wait for what follows; whoever calls them must not see that."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.nn import Cells, sparsify
from maefast.ops import CellMask

SHAPE = (3, 4, 12, 8)
PLAN = CellMask.all_visible(3, (3, 2))


def images() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def packed(x: Tensor) -> Cells:
    """All cells are visible: what a dense network computes is what is wanted."""
    return Cells.pack(x, PLAN)


def stem() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5)).double()


def pair() -> tuple[nn.Module, nn.Module]:
    model = stem()
    return model, sparsify(copy.deepcopy(model))


def same_buffers(a: nn.Module, b: nn.Module) -> None:
    for (name, one), (_, other) in zip(a.named_buffers(), b.named_buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_statistics_move_at_the_call():
    """Though nobody reads the output: `torch.optim.swa_utils.update_bn` does that."""
    for context in (torch.enable_grad, torch.no_grad):
        dense, sparse = pair()
        with context():
            dense(images())
            sparse(packed(images()))
        same_buffers(dense, sparse)
    dense, sparse = pair()
    torch.optim.swa_utils.update_bn([images(), images() + 1], dense)
    torch.optim.swa_utils.update_bn([packed(images()), packed(images() + 1)], sparse)
    same_buffers(dense, sparse)


def test_a_shared_norm_sees_its_inputs_in_order():
    dense = nn.BatchNorm2d(4).double()
    sparse = copy.deepcopy(dense)
    a, b = images(), images() * 3 + 1
    want = dense(a) + dense(b)
    got = sparse(packed(a)) + sparse(packed(b))
    torch.testing.assert_close(got.dense(), want)
    same_buffers(dense, sparse)


@pytest.mark.parametrize("follow", [F.relu, F.relu6, lambda y: y + y, lambda y: y, torch.sigmoid])
def test_frozen_parts_stay_frozen(follow):
    head, grads = nn.Conv2d(5, 2, 1).double(), []
    for model, x in zip(pair(), (images(), packed(images()))):
        head.zero_grad()
        with torch.no_grad():
            y = model(x)
        y = head(follow(y))
        (y.dense() if isinstance(y, Cells) else y).square().sum().backward()
        assert all(p.grad is None for p in model.parameters())
        grads.append([p.grad.clone() for p in head.parameters()])
    torch.testing.assert_close(*grads)


def test_a_residual_with_gradients_meets_a_norm_without():
    grads = []
    for model, x in zip(pair(), (images(), packed(images()))):
        leaf = torch.rand(3, 5, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        with torch.no_grad():
            y = model(x)
        y = F.relu(y + (packed(leaf) if isinstance(x, Cells) else leaf))
        (y.dense() if isinstance(y, Cells) else y).square().sum().backward()
        assert all(p.grad is None for p in model.parameters())
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("follow", [F.relu, lambda y: y])
def test_without_gradients_what_follows_has_none(follow):
    _, model = pair()
    y = model(packed(images()))
    with torch.no_grad():
        y = follow(y) + 0
    assert not y.rows.requires_grad


def test_weights_are_those_of_the_call():
    for training in (True, False):
        dense, sparse = (model.train(training) for model in pair())
        with torch.no_grad():
            want, got = dense(images()), sparse(packed(images()))
            for buffer in sparse[1].buffers():
                buffer.add_(1)
            for p in sparse.parameters():
                p.mul_(10)
        torch.testing.assert_close(got.dense(), want)
    got = sparse(packed(images()))
    with torch.no_grad():
        sparse[1].weight.mul_(10)
    with pytest.raises(RuntimeError, match="changed in place before its output"):
        _ = got.rows


def test_inference_mode():
    dense, sparse = pair()
    with torch.inference_mode():
        want, got = dense(images()), sparse(packed(images()))
    torch.testing.assert_close(got.dense(), want)
    assert got.rows.is_inference()
    y = sparse(packed(images()))
    with torch.inference_mode():
        _ = y.rows
    y.rows.sum().backward()  # of a call outside of it
    assert sparse[0].weight.grad is not None


# --- copies -------------------------------------------------------------------------------------------------------


def test_a_view_made_contiguous_is_a_copy():
    def halves(x):
        a = x[:, :2].contiguous()
        a = F.relu_(a)
        return torch.cat([x, a], 1)

    def turned(x):
        y = x.permute(0, 2, 3, 1).contiguous()
        y *= 0.5
        return x + y.permute(0, 3, 1, 2)

    for run in (halves, turned):
        torch.testing.assert_close(run(packed(images())).dense(), run(images()))
    x = packed(images())
    _ = x[:, :2]
    assert x.contiguous() is x  # what is no view is no copy, in torch neither


@pytest.mark.parametrize("sides", [(1, 1, 1, 1), (0, 0, 0, 0)])
def test_padding_is_a_copy(sides):
    weight = torch.randn(2, 4, 1 + sum(sides[:2]), 1 + sum(sides[2:]), dtype=torch.float64)
    found = []
    for x in (images(), packed(images())):
        y = F.pad(x, sides)
        x.add_(5)
        found.append(F.conv2d(y, weight))
    torch.testing.assert_close(found[1].dense(), found[0])
