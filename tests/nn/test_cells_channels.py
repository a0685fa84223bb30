"""What goes along the channels of `Cells`, what they are reduced to, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maefast
from maefast import Cells, masking
from maefast.nn import UnknownSparseOp
from maefast.nn.sparsify import activations
from maefast.ops import CellMask
from tests.nn.common import Odd

SHAPE = (3, 8, 6, 4)


def plan(ragged: bool = True) -> CellMask:
    return masking.cells(3, (3, 2), keep=[4, 1, 6] if ragged else 3, generator=torch.Generator().manual_seed(1))


def compare(run, ragged: bool = True, over_sites: bool = False) -> None:
    """The result and the gradient of `run` on cells and on the map; what is over sites equals with all of them seen."""
    cells = CellMask.all_visible(3, (3, 2)) if over_sites else plan(ragged)
    seen = cells.upsampled_mask(SHAPE[2:])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, dtype=torch.float64, generator=generator)
    results = []
    for sparse in (False, True):
        leaf = x.clone().requires_grad_()
        out = run(Cells.pack(leaf, cells) if sparse else leaf * 1)
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.dtype.is_floating_point]
        total, values = 0, []
        for o in outs:
            dense = o if isinstance(o, Tensor) else o.dense()
            if isinstance(o, Cells) and o.channels_last:
                dense = dense.permute(0, 2, 3, 1)
            if sparse:
                assert over_sites or tuple(o.shape) == tuple(dense.shape)
            if not over_sites:
                mask = seen.permute(0, 2, 3, 1) if dense.shape[1:3] == SHAPE[2:] else seen
                dense = dense * mask
            values.append(dense.detach())
            total = total + (dense * torch.arange(1.0, dense.numel() + 1).view(dense.shape)).sum()
        total.backward()
        results.append((values, leaf.grad))
    torch.testing.assert_close(results[1], results[0])


def last(run):
    """The same of (B, H, W, C)."""
    return lambda x: run(x.permute(0, 2, 3, 1))


PER_SITE = {
    "slice": lambda x: x[:, 2:5],
    "slice with all": lambda x: x[:, :4, :, :],
    "ellipsis": lambda x: x[..., :, :],
    "step": lambda x: x[:, ::2],
    "list": lambda x: x[:, [3, 1, 1]],
    "index": lambda x: x[:, torch.tensor([7, 0])],
    "bool": lambda x: x[:, torch.arange(8) > 4],
    "slice of the last": last(lambda x: x[..., 1:3]),
    "narrow": lambda x: x.narrow(1, 2, 3),
    "torch.narrow": lambda x: torch.narrow(x, -3, 0, 1),
    "index_select": lambda x: x.index_select(1, torch.tensor([1, 4])),
    "chunk": lambda x: x.chunk(3, 1),
    "torch.chunk": lambda x: torch.chunk(x, 2, dim=1),
    "chunk by names": lambda x: x.chunk(chunks=2, dim=1),
    "narrow from the end": lambda x: x.narrow(dim=1, start=-3, length=3),
    "flip by name": lambda x: x.flip(dims=(1,)),
    "permute by name": lambda x: x.permute(dims=(0, 2, 3, 1)),
    "chunk of the last": last(lambda x: x.chunk(2, -1)),
    "split": lambda x: x.split(3, 1),
    "torch.split": lambda x: torch.split(x, [1, 5, 2], 1),
    "tensor_split": lambda x: x.tensor_split([2, 3], dim=1),
    "cat": lambda x: torch.cat([x, x * 2], 1),
    "cat with a map": lambda x: torch.cat([x, torch.ones(3, 2, 6, 4, dtype=x.dtype)], 1),
    "concat": last(lambda x: torch.concat((x, x.sigmoid()), dim=-1)),
    "flip": lambda x: x.flip(1),
    "torch.flip": lambda x: torch.flip(x, [1]),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 4),
    "nn.ChannelShuffle": nn.ChannelShuffle(2),
    "shuffle by view": lambda x: x.view(3, 2, 4, 6, 4).transpose(1, 2).contiguous().view(3, 8, 6, 4),
    "shuffle by reshape": lambda x: x.reshape(3, 4, -1, 6, 4).transpose(2, 1).flatten(1, 2),
    "unflatten": lambda x: x.unflatten(1, (2, -1)).sum(1),
    "sum of groups": lambda x: (x.view(-1, 2, 4, 6, 4) * torch.arange(24.0).view(3, 2, 4, 1, 1)).sum(dim=2),
    "groups times groups": lambda x: torch.mul(x.view(3, 2, 4, 6, 4), x.view(3, 2, 4, 6, 4) + 1).unbind(1),
    "stack": lambda x: (torch.stack([x, x * 2], dim=1) * torch.rand(3, 2, 1, 1, 1).round()).sum(1),
    "same view": lambda x: x.view(3, 8, 6, 4),
    "same reshape": lambda x: torch.reshape(x, (3, -1, 6, 4)),
    "permute": lambda x: torch.permute(x, (0, 2, 3, 1)),
    "permute=": lambda x: torch.permute(x, dims=(0, 2, 3, 1)),
    "movedim": lambda x: torch.movedim(x, 1, -1),
    "moveaxis": last(lambda x: x.moveaxis(-1, 1)),
    "transpose": last(lambda x: x.transpose(2, 2)),
    "expand_as": lambda x: x[:, :1].expand_as(x) * x,
    "expand": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    "softmax": lambda x: x.softmax(1),
    "F.softmax": lambda x: F.softmax(x, dim=1),
    "nn.Softmax2d": nn.Softmax2d(),
    "log_softmax": last(lambda x: torch.log_softmax(x, -1)),
    "softmin": lambda x: F.softmin(x, 1),
    "cumsum": lambda x: x.cumsum(1),
    "normalize": lambda x: F.normalize(x),
    "normalize of the last": last(lambda x: F.normalize(x, 2.0, -1)),
    "glu": nn.GLU(1),
    "rms_norm": last(lambda x: F.rms_norm(x, (8,), torch.arange(8.0, dtype=x.dtype))),
    "layer_norm": last(lambda x: F.layer_norm(x, (8,))),
    "prelu": nn.PReLU(8).double(),
    "prelu of one weight": last(nn.PReLU().double()),
    "mean": lambda x: x.mean(1, keepdim=True),
    "mean of the last": last(lambda x: torch.mean(x, dim=(-1,), keepdim=True)),
    "sum": lambda x: x.sum([1], True),
    "amax": lambda x: x.amax(1, keepdim=True),
    "max": lambda x: torch.max(x, dim=1, keepdim=True)[0],
    "min": lambda x: x.min(1, True)[0],
    "maximum": lambda x: torch.max(x, -x),
    "var": lambda x: x.var(1, unbiased=False, keepdim=True),
    "std": lambda x: torch.std(x, dim=1, keepdim=True),
    "var_mean": lambda x: torch.var_mean(x, dim=1, correction=0, keepdim=True),
    "norm": lambda x: x.norm(dim=1, keepdim=True),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, 1, 1, True),
    "logsumexp": lambda x: x.logsumexp(1, keepdim=True),
    "detach": lambda x: x.detach() * x,
    "argmax": lambda x: x.argmax(1, keepdim=True) * x,
    "pad of channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x).masked_fill(x > 1, 1.0),
}


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", PER_SITE)
def test_sites_by_themselves(name, ragged):
    torch.manual_seed(0)
    run = PER_SITE[name]

    def seeded(x):
        torch.manual_seed(0)
        return run(x)

    compare(seeded, ragged)


@pytest.mark.parametrize("kind", sorted(activations(), key=lambda kind: kind.__name__))
def test_activations_of_torch(kind):
    """Every one whose function is in the table, along channels where it has a dimension."""
    args = {nn.Threshold: (0.1, 2.0), nn.GLU: (1,), nn.RReLU: (0.3, 0.3)}.get(kind, ())
    if kind in (nn.Softmax, nn.Softmin, nn.LogSoftmax):
        args = (1,)
    compare(maefast.sparsify(nn.Sequential(kind(*args).double())))


OVER_SITES = {
    "mean": lambda x: x.mean((2, 3)),
    "mean keepdim": lambda x: x.mean([-1, -2], keepdim=True),
    "mean of the last": last(lambda x: torch.mean(x, dim=(1, 2), keepdim=True)),
    "sum": lambda x: x.sum((2, 3)),
    "amax": lambda x: x.amax((2, 3)),
    "amin": last(lambda x: torch.amin(x, (1, 2), True)),
    "norm": lambda x: x.norm(p=2, dim=(2, 3), keepdim=True),
    "norm of the last": last(lambda x: x.norm(p=2, dim=(1, 2), keepdim=True)),
    "adaptive_avg_pool2d": nn.AdaptiveAvgPool2d(1),
    "adaptive_max_pool2d": nn.AdaptiveMaxPool2d((1, 1)),
    "gate": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid().expand_as(x),
    "gate in place": lambda x: x.clone().mul_(x.mean((2, 3), keepdim=True)),
}


@pytest.mark.parametrize("name", OVER_SITES)
def test_over_the_sites_of_a_sample(name):
    compare(OVER_SITES[name], over_sites=True)


def test_masked_sites_are_in_no_reduction():
    cells = plan()
    seen = cells.upsampled_mask(SHAPE[2:])
    images = torch.rand(SHAPE, dtype=torch.float64) + 1
    x = Cells.pack(images, cells)
    torch.testing.assert_close(x.sum((2, 3)), (images * seen).sum((2, 3)))
    torch.testing.assert_close(x.amin((2, 3)), images.masked_fill(~seen, 9.0).amin((2, 3)))
    torch.testing.assert_close(F.adaptive_max_pool2d(-x, 1)[..., 0, 0], -x.amin((2, 3)))


# --- what is refused ----------------------------------------------------------------------------------------------


MIXED = {
    **{f"x.{name}()": lambda x, name=name: getattr(x, name)() for name in ("sum", "mean", "flatten", "item", "numpy")},
    "x.cumsum(2)": lambda x: x.cumsum(2),
    "x.softmax(-1)": lambda x: x.softmax(-1),
    "x.sort": lambda x: x.sort(2),
    "x.roll": lambda x: torch.roll(x, 1, 2),
    "x.flip": lambda x: x.flip(2, 3),
    "x.T": lambda x: x.T,
    "x @ y": lambda x: x @ x,
    "x.matmul": lambda x: torch.matmul(x, x),
    "einsum": lambda x: torch.einsum("bchw,bchw->b", x, x),
    "len": len,
    "iter": list,
    "bool": bool,
    "float": float,
    "in": lambda x: 1.0 in x,
    "x[0]": lambda x: x[0],
    "x[:, 0]": lambda x: x[:, 0],
    "x[None]": lambda x: x[None],
    "x[:, :, 1:]": lambda x: x[:, :, 1:],
    "x[x > 0]": lambda x: x[x > 0],
    "x[:, :2] = 0": lambda x: x.__setitem__((slice(None), slice(2)), 0),
    "view": lambda x: x.view(3, -1),
    "view of tokens": lambda x: x.view(3, 8, -1),
    "tokens": lambda x: x.flatten(2).transpose(1, 2),
    "folded groups": lambda x: x.reshape(12, 2, *x.shape[2:]),
    "view of pixels": lambda x: x.view(3, 8, 3, 4, 2, 4),
    "transpose": lambda x: x.transpose(2, 3),
    "stack": lambda x: torch.stack([x, x]),
    "mean without keepdim": lambda x: x.mean(1),
    "max": lambda x: x.max(),
    "var": lambda x: x.var((2, 3)),
    "norm": lambda x: x.norm(p=1, dim=(2, 3)),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "where": lambda x: torch.where(x > 0),
    "out": lambda x: torch.sigmoid(x, out=x),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "crop": lambda x: F.pad(x, (-1, -1, -1, -1)),
    "pad and add": lambda x: F.pad(x, (1, 1, 1, 1)) + 1,
    "pad and norm": lambda x: nn.BatchNorm2d(8).double()(F.pad(x, (1, 1, 1, 1))),
    "pad and look": lambda x: F.pad(x, (1, 1, 1, 1)).dense(),
    "pad of ones": lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1), value=1.0), torch.ones(1, 8, 3, 3, dtype=x.dtype)),
    "valid convolution": lambda x: F.conv2d(x, torch.ones(1, 8, 3, 3, dtype=x.dtype)),
    "expand": lambda x: x.expand(3, 8, 4, 4),
    "prelu of the last": lambda x: F.prelu(x.permute(0, 2, 3, 1), torch.ones(8, dtype=x.dtype)),
    "dropout2d of the last": lambda x: F.dropout2d(x.permute(0, 2, 3, 1)),
    "groups": lambda x: x.view(3, 2, 4, *x.shape[2:]).mean(2),
    "groups -": lambda x: -x.view(3, 2, 4, *x.shape[2:]),
    "groups with a dtype": lambda x: x.view(3, 2, 4, *x.shape[2:]).sum(1, dtype=torch.float32),
    "groups softmax": lambda x: torch.softmax(x.view(3, 2, 4, *x.shape[2:]), 1),
    "a list": lambda x: x * [1],
    "other cells": lambda x: x + Cells.pack(torch.zeros(3, 8, 12, 8), plan(False)),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_sites_names_the_module(name):
    model = maefast.sparsify(nn.Sequential(nn.Conv2d(3, 8, 4, 4), Odd(MIXED[name])).double())
    images = torch.rand(3, 3, 48, 32, dtype=torch.float64)
    with pytest.raises(UnknownSparseOp, match=r"in 1 \(Odd\): |in the model \(BatchNorm2d\): of a map that was padded"):
        model(Cells.pack(images, plan()))


def test_equality_with_nothing_is_false():
    x = Cells.pack(torch.rand(SHAPE), plan())
    assert (x == None) is False  # noqa: E711
    assert x in [x]
    assert (x == x).rows.all()
    assert len({x, x}) == 1
