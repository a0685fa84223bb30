"""Operands of elementwise functions on `Cells`, their in-place forms, and the batch norm that waits for them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maefast import Cells, masking
from maefast.nn import UnknownSparseOp
from maefast.ops import CellMask
from maefast.ops.cell_norm import BatchNorm

SHAPE = (3, 4, 6, 4)


def plan(ragged: bool = True) -> CellMask:
    return masking.cells(3, (3, 2), keep=[4, 1, 6] if ragged else 3, generator=torch.Generator().manual_seed(1))


# --- operands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (),
        (1,),
        (4, 1, 1),
        (1, 4, 1, 1),
        (3, 4, 1, 1),
        (3, 1, 1, 1),
        (1, 1, 6, 4),
        (6, 4),
        SHAPE,
        (4, 6, 1),
        (3, 1, 6, 4),
    ],
)
def test_tensors_that_broadcast(shape, ragged, channels_last):
    """Numbers, values of channels or samples, whole maps: on either side, with gradients."""
    cells = plan(ragged)
    x = torch.rand(SHAPE, dtype=torch.float64)
    seen = cells.upsampled_mask(SHAPE[2:])
    for swap in (False, True):
        grads = []
        for sparse in (False, True):
            other = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
            value, left = other, Cells.pack(x, cells) if sparse else x
            if channels_last:
                value = other if other.ndim < 3 else other.expand((1,) * (4 - other.ndim) + shape).permute(0, 2, 3, 1)
                left = left.permute(0, 2, 3, 1)
                if other.ndim == 2:
                    value = other[:, :, None]
            out = value / left if swap else left / value
            out = out.permute(0, 3, 1, 2) if channels_last else out
            out = out.dense() if sparse else out * seen
            (out * x).sum().backward()
            grads.append((out.detach(), other.grad))
        torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("shape", [(5, 1, 1), (2, 4, 1, 1), (3, 4, 3, 2), (1, 1, 1, 1, 1), (3, 4, 6, 5)])
def test_tensors_that_do_not_broadcast(shape):
    with pytest.raises(UnknownSparseOp, match="does not go with"):
        Cells.pack(torch.zeros(SHAPE), plan()) + torch.zeros(shape)


def test_cells_of_one_channel_are_gates():
    cells = plan()
    x, gate = torch.rand(SHAPE), torch.rand(3, 1, 6, 4)
    for out in (Cells.pack(x, cells) * Cells.pack(gate, cells), Cells.pack(gate, cells) * Cells.pack(x, cells)):
        torch.testing.assert_close(out.rows, Cells.pack(x * gate, cells).rows)
    with pytest.raises(UnknownSparseOp, match="in place"):
        Cells.pack(gate, cells).mul_(Cells.pack(x, cells))


# --- in place -----------------------------------------------------------------------------------------------------


def test_parts_and_wholes_share_their_values():
    """As views of torch do: an in-place function on either is seen by the other, with the gradient."""

    def run(x):
        y = x * 2
        part = y[:, 1:3]
        part.mul_(3).add_(1)
        y[:, :2].sub_(0.5)
        y.neg_()
        first = y.narrow(1, 2, 2)
        first += y[:, :2]
        last = y.permute(0, 2, 3, 1)
        return torch.cat([y, part, first, F.silu(last, inplace=True).permute(0, 3, 1, 2)], 1)

    cells, grads = plan(), []
    seen = cells.upsampled_mask(SHAPE[2:])
    for sparse in (False, True):
        x = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = run(Cells.pack(x, cells)).dense() if sparse else run(x) * seen
        out.square().sum().backward()
        grads.append((out.detach(), x.grad))
    torch.testing.assert_close(grads[1], grads[0])


def test_a_norm_waits_with_the_values_of_then():
    x, norm = Cells.pack(torch.rand(SHAPE), plan()), nn.BatchNorm2d(4)
    want = F.relu(norm(x.clone()))
    part, normed = x[:, :2], norm(x)
    part.add_(1)
    torch.testing.assert_close(F.relu(normed).rows, want.rows)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 1), nn.MaxPool2d(3, 1, 1), nn.Identity()])
def test_parts_of_what_an_op_gave_away(layer):
    """The memory of an op's result is never written to: it may be part of what the backward pass needs."""
    x, results = torch.rand(SHAPE), []
    for sparse in (False, True):
        leaf = x.clone().requires_grad_()
        y = layer(Cells.pack(leaf, CellMask.all_visible(3, (3, 2))) if sparse else leaf * 1)
        y.permute(0, 2, 3, 1)[..., 1:3].mul_(y[:, :1].permute(0, 2, 3, 1).clone())
        out = y.dense() if sparse else y
        out.square().sum().backward()
        results.append((out.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0])


def test_in_place_keeps_the_dtype():
    x = Cells.pack(torch.rand(SHAPE).bfloat16(), plan())
    y = Cells.pack(torch.rand(SHAPE), plan())
    assert x.mul_(2.5).dtype is torch.bfloat16
    x += Cells(y.rows, x.plan)
    assert x.dtype is torch.bfloat16
    assert x.zero_().rows.sum() == 0
    assert x.fill_(2).rows.eq(2).all()
    with pytest.raises(UnknownSparseOp, match="cannot become"):
        Cells.pack(torch.zeros(SHAPE), plan()).long().add_(0.5)
    with pytest.raises(UnknownSparseOp, match="plain tensor"):
        torch.zeros(SHAPE).add_(x)
    with pytest.raises(UnknownSparseOp, match="clone them first"):
        x.detach().add_(1)


def test_what_torch_gives_back_itself_is_the_same_object():
    x = Cells.pack(torch.rand(SHAPE), plan())
    for same in (x.float(), x.to(torch.float32), x.contiguous(), x.type_as(x), F.dropout(x, 0.5, False), +x):
        assert same is x
    assert x.clone() is not x
    assert x.type() == "torch.FloatTensor"
    assert x.to(x.clone().double()).dtype is torch.float64
    assert (x.is_floating_point(), torch.is_floating_point(x), x.is_complex()) == (True, True, False)
    assert torch.numel(x) == x.numel() == x.nelement() == 288


# --- a batch norm that waits --------------------------------------------------------------------------------------

FUSED = {
    "relu": F.relu,
    "torch.relu": torch.relu,
    "x.relu()": lambda x: x.relu(),
    "x.relu_()": lambda x: x.relu_(),
    "torch.relu_": torch.relu_,
    "inplace": lambda x: F.relu(x, inplace=True),
    "relu6": F.relu6,
    "nn.ReLU6": nn.ReLU6(),
    "nn.ReLU6 in place": nn.ReLU6(inplace=True),
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("plus", ["none", "+", "add", "x.add", "add_", "+=", "other +="])
def test_residuals_and_relus_join_a_norm(name, plus, monkeypatch):
    acts = []
    run = BatchNorm.__call__
    monkeypatch.setattr(BatchNorm, "__call__", lambda norm, act, other: acts.append(act) or run(norm, act, other))
    torch.manual_seed(0)
    x, y = torch.randn(2, *SHAPE, dtype=torch.float64)
    cells = CellMask.all_visible(3, (3, 2))
    results = []
    for sparse in (False, True):
        norm = nn.BatchNorm2d(4).double()
        leaf, other = x.clone().requires_grad_(), y.clone().requires_grad_()
        a, b = (Cells.pack(leaf, cells), Cells.pack(other, cells)) if sparse else (leaf, other * 1)
        out = norm(a)
        if plus == "+":
            out = out + b
        elif plus == "add":
            out = torch.add(b, out)
        elif plus == "x.add":
            out = out.add(b)
        elif plus == "add_":
            out.add_(b)
        elif plus == "+=":
            out += b
        elif plus == "other +=":
            b += out
            out = b
        out = FUSED[name](out)
        out = out.dense() if sparse else out
        (out * y).sum().backward()
        results.append((out.detach(), leaf.grad, other.grad, norm.weight.grad, norm.running_var))
    assert acts == ["relu6" if "6" in name else "relu"]
    torch.testing.assert_close(results[1], results[0])


def test_other_functions_run_the_norm_once():
    cells = CellMask.all_visible(3, (3, 2))
    x, norm = torch.rand(SHAPE, dtype=torch.float64), nn.BatchNorm2d(4).double()
    out = norm(Cells.pack(x, cells))
    total = torch.sigmoid(out) * out + (-out).exp() - out.clamp(min=0.2) / (1 + out**2) + abs(2 - out)
    want = F.batch_norm(x, None, None, training=True)
    want = torch.sigmoid(want) * want + (-want).exp() - want.clamp(min=0.2) / (1 + want**2) + abs(2 - want)
    torch.testing.assert_close(total.dense(), want)
    assert int(norm.num_batches_tracked) == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2, 3)))


# --- draws --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [F.dropout, F.alpha_dropout, torch.rand_like, torch.bernoulli, F.rrelu])
def test_random_functions_draw_for_every_seen_value(draw):
    x = Cells.pack(torch.full(SHAPE, 0.5), plan())
    out = draw(x, training=True) if draw in (F.rrelu, F.alpha_dropout) else draw(x)
    assert out.rows.shape == x.rows.shape
    assert draw in (F.rrelu, torch.rand_like) or len(out.rows.unique()) == 2
    assert torch.empty_like(x).shape == x.shape


def test_dropout2d_drops_channels_of_a_sample():
    torch.manual_seed(0)
    cells = plan()
    for run in (nn.Dropout2d(0.5), nn.Dropout2d(0.5, inplace=True)):
        out = run(Cells.pack(torch.ones(SHAPE), cells))
        sample = torch.div(cells.cells, 6, rounding_mode="floor")
        for b in range(3):
            values = out.rows[sample == b].flatten(0, 2)
            assert (values == values[0]).all()
            assert set(values[0].tolist()) <= {0.0, 2.0}
    x = Cells.pack(torch.ones(SHAPE), cells)
    assert nn.Dropout2d(0.5).eval()(x) is x
