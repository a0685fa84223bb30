"""sparsify and Cells on volumes: 3-D convnets equal themselves with every layer multiplied by the mask."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import maefast
from maefast import Cells, masking
from maefast.nn import UnknownSparseOp
from maefast.ops import CellMask
from tests.nn.common import Odd, assert_equals_masked


class Residual(nn.Module):
    """A block of a 3-D ResNet, with batch norms, or of a residual U-Net encoder, with instance norms."""

    def __init__(self, cin, cout, stride, norm=nn.BatchNorm3d, act=nn.ReLU):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv3d(cin, cout, 3, stride, 1, bias=False), norm(cout)
        self.conv2, self.norm2 = nn.Conv3d(cout, cout, 3, 1, 1, bias=False), norm(cout)
        self.act = act(inplace=True)
        pool = [nn.AvgPool3d(stride)] if stride != 1 else []
        self.skip = nn.Sequential(*pool, nn.Conv3d(cin, cout, 1, bias=False), norm(cout))

    def forward(self, x):
        out = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        out += self.skip(x)
        return self.act(out)


class UNet(nn.Module):
    """Two levels down and up; skip connections by concatenation, the second one by addition."""

    def __init__(self, width):
        super().__init__()
        norm = lambda c: nn.InstanceNorm3d(c, affine=True)  # noqa: E731
        self.first, self.second = Residual(width, width, 1, norm), Residual(width, 2 * width, 2, norm, nn.LeakyReLU)
        self.low = Residual(2 * width, 2 * width, (2, 1, 2), norm)
        self.up2 = nn.ConvTranspose3d(2 * width, 2 * width, (2, 1, 2), (2, 1, 2))
        self.up1 = nn.ConvTranspose3d(2 * width, width, 2, 2, bias=False)
        self.join = nn.Conv3d(2 * width, width, 3, padding=1)

    def forward(self, x):
        first = self.first(x)
        second = self.second(first)
        up = self.up2(self.low(second)) + second
        return F.relu(self.join(torch.cat((self.up1(up), first), 1)))


class Pieces(nn.Module):
    """Squeeze-excite, depthwise convolution, halves, padding by itself, pools, a channel shuffle."""

    def __init__(self, width):
        super().__init__()
        self.depthwise = nn.Conv3d(width, width, 3, padding=1, groups=width)
        self.norm, self.pool = nn.BatchNorm3d(width), nn.AdaptiveAvgPool3d(1)
        self.gate = nn.Parameter(torch.randn(width))
        self.valid, self.max = nn.Conv3d(width, width, 3, (1, 2, 1)), nn.MaxPool3d(3, 2, 1)

    def forward(self, x):
        y = self.norm(self.depthwise(x))
        y = F.silu(y) * torch.sigmoid(self.pool(y) * self.gate[:, None, None, None])
        batch, channels, *sides = y.shape
        y = y.view(batch, 2, channels // 2, *sides).transpose(1, 2).reshape(batch, channels, *sides)
        first, second = y.chunk(2, dim=1)
        y = torch.cat([first * 0.5, second - first], 1)
        return self.max(self.valid(F.pad(y, (1, 1, 0, 1, 1, 1))))


NETS = {
    "resnet": lambda: [nn.MaxPool3d(3, 2, 1), Residual(8, 8, 1), Residual(8, 8, 2)],
    "unet": lambda: [UNet(8)],
    "pieces": lambda: [nn.Dropout3d(0.0), Pieces(8)],
    "flat kernels": lambda: [nn.Conv3d(8, 8, (1, 3, 3), (1, 2, 2), (0, 1, 1)), nn.AvgPool3d((1, 2, 2)), nn.PReLU(8)],
}


def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(2, 8, 3, 1, 1), *NETS[name]()).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(ragged=True):
    generator = torch.Generator().manual_seed(1)
    volumes = torch.randn(3, 2, 16, 24, 8, generator=generator, dtype=torch.float64)
    keep = [4, 1, 6] if ragged else 3
    return volumes, masking.cells(3, (2, 3, 1), keep=keep, generator=generator)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("active", ["all", "some", "ragged"])
@pytest.mark.parametrize("name", NETS)
def test_equals_every_layer_times_the_mask(name, active, train):
    dense = net(name).train(train)
    sparse = maefast.sparsify(copy.deepcopy(dense))
    assert sparse.state_dict().keys() == dense.state_dict().keys()
    volumes, plan = inputs(active == "ragged")
    if active == "all":
        plan = CellMask.all_visible(3, (2, 3, 1))
    assert torch.equal(sparse(volumes), dense(volumes)) or not train
    assert_equals_masked(dense.train(train), sparse, volumes, plan, gradients=1e-8)


def test_all_visible_is_the_dense_network():
    dense = net("unet")
    volumes, _ = inputs()
    out = maefast.sparsify(copy.deepcopy(dense))(Cells.pack(volumes, CellMask.all_visible(3, (2, 3, 1))))
    torch.testing.assert_close(out.dense(), dense(volumes), rtol=1e-10, atol=1e-10)


def test_masked_voxels_do_not_reach_visible_ones():
    sparse = maefast.sparsify(net("unet"))
    volumes, plan = inputs()
    keep = plan.upsampled_mask(volumes.shape[2:])
    first, second = (sparse(Cells.pack(x, plan)).rows for x in (volumes, torch.where(keep, volumes, 7.0)))
    assert torch.equal(first, second)


def test_levels_coarser_than_a_cell_become_dense():
    model = nn.Sequential(nn.Conv3d(2, 4, 4, 4), nn.Conv3d(4, 4, 3, 4, 1), nn.MaxPool3d(2)).double()
    volumes, plan = torch.randn(2, 2, 32, 32, 32, dtype=torch.float64), masking.cells(2, (4, 4, 4), 0.5)
    out = maefast.sparsify(copy.deepcopy(model))(Cells.pack(volumes, plan))
    assert out.plan.grid == (1, 1, 1)
    keep = plan.upsampled_mask((32, 32, 32))
    want = model[1](model[0](volumes * keep) * plan.upsampled_mask((8, 8, 8)))
    torch.testing.assert_close(out.dense(), model[2](want), rtol=1e-10, atol=1e-10)
    assert out.view(2, 4).shape == (2, 4)


def test_what_stands_for_the_volume():
    volumes, plan = inputs()
    x = Cells.pack(volumes, plan)
    assert x.shape == volumes.shape
    assert x.ndim == x.dim() == 5
    assert x.numel() == volumes.numel()
    last = x.permute(0, 2, 3, 4, 1)
    assert last.shape == (3, 16, 24, 8, 2)
    assert last.movedim(-1, 1).shape == x.shape
    norm, linear = nn.LayerNorm(2).double(), nn.Linear(2, 5).double()
    torch.testing.assert_close(linear(norm(last)).rows, linear(norm(x.rows)))
    sites = x.rows.flatten(1, 3).split(plan.cu_cells.diff().tolist())
    torch.testing.assert_close(x.mean((2, 3, 4)), torch.stack([s.flatten(0, 1).mean(0) for s in sites]))
    torch.testing.assert_close(
        F.adaptive_max_pool3d(x, 1).flatten(), torch.stack([s.amax((0, 1)) for s in sites]).flatten()
    )
    torch.testing.assert_close(last.amax((1, 2, 3), keepdim=True).shape, torch.Size((3, 1, 1, 1, 2)))
    assert torch.equal((x + volumes).rows, 2 * x.rows)
    assert torch.equal(torch.cat([x, volumes], 1).rows, torch.cat([x.rows, x.rows], -1))
    assert torch.equal(x[:, 1:].rows, x.rows[..., 1:])
    dropped = F.dropout3d(x, 0.5)
    ratio = (dropped.rows / x.rows).flatten(1, 3)
    assert all(set(r.unique().tolist()) <= {0.0, 2.0} for r in ratio)
    assert all(len(r.unique(dim=0)) == 1 for r in ratio)


def test_running_whole_under_compile():
    """torch.compile does not look into the list that torch.cat is given, so without one."""
    model = maefast.sparsify(nn.Sequential(Residual(2, 8, 1), Residual(8, 8, 2, nn.InstanceNorm3d)))
    volumes, plan = inputs()
    step = lambda v: model(Cells.pack(v, plan)).dense()  # noqa: E731
    volumes = volumes.float()
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="eager")(volumes), step(volumes))


# --- what is refused -----------------------------------------------------------------------------------------------

IMAGES = torch.randn(3, 2, 16, 16, dtype=torch.float64)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda x: F.conv2d(x, torch.zeros(2, 2, 1, 1)),
            r"in 0 \(Odd\): conv2d takes maps of 2 sides.*\(B, C, D, H, W\)",
        ),
        (lambda x: F.max_pool2d(x, 2), "max_pool2d takes maps of 2 sides"),
        (lambda x: F.adaptive_avg_pool2d(x, 1), "adaptive_avg_pool2d takes maps of 2 sides"),
        (lambda x: F.conv_transpose2d(x, torch.zeros(2, 2, 2, 2), stride=2), "takes maps of 2 sides"),
        (lambda x: F.conv3d(x, torch.zeros(2, 2, 3, 3, 3).double()), "lies on no cells"),
        (lambda x: F.interpolate(x, scale_factor=2), "interpolate is not known"),
        (lambda x: x.mean((2, 3)), r"over all sides of the map \(2, 3, 4\)"),
        (lambda x: x.permute(0, 1, 3, 2, 4), r"between \(B, C, D, H, W\) and \(B, D, H, W, C\) only"),
        (lambda x: F.linear(x, torch.zeros(2, 2)), r"permute\(0, 2, 3, 4, 1\) first"),
        (lambda x: x + IMAGES, "does not go with cells"),
        (lambda x: torch.cat([x, IMAGES], 1), "cannot be concatenated"),
        (lambda x: x.view(3, -1), "have no Tensor.view as"),
    ],
)
def test_unknown_functions_name_the_module(run, message):
    volumes, plan = inputs()
    with pytest.raises(UnknownSparseOp, match=message):
        maefast.sparsify(nn.Sequential(Odd(run)))(Cells.pack(volumes, plan))


def test_sides_are_not_mixed():
    volumes, plan = inputs()
    flat = masking.cells(3, (2, 2), 0.5)
    with pytest.raises(ValueError, match="x must have 4 dimensions"):
        Cells.pack(volumes, flat)
    with pytest.raises(ValueError, match="x must have 5 dimensions"):
        Cells.pack(IMAGES, plan)
    with pytest.raises(UnknownSparseOp, match=r"conv3d takes maps of 3 sides, and these are \(B, C, H, W\)"):
        nn.Conv3d(2, 2, 1).double()(Cells.pack(IMAGES, flat))
    for module in (
        nn.Conv3d(2, 2, 3, 1, 1, padding_mode="replicate"),
        nn.Upsample(scale_factor=2),
        nn.AdaptiveAvgPool3d(2),
    ):
        with pytest.raises(UnknownSparseOp):
            maefast.sparsify(nn.Sequential(module))


@pytest.mark.gpu
def test_a_u_net_on_a_gpu():
    """What a device makes of cells of volumes (by plain PyTorch, norms by Triton), against float64 on the CPU."""
    torch.manual_seed(0)
    exact = maefast.sparsify(UNet(8)).double()
    plan, volumes = masking.cells(2, (3, 2, 3), 0.6), torch.randn(2, 8, 12, 8, 12, dtype=torch.double)
    device = torch.device("cuda")
    network = copy.deepcopy(exact).float().to(device)
    want = exact(Cells.pack(volumes, plan)).dense()
    found = network(Cells.pack(volumes.float().to(device), plan.to(device))).dense()
    torch.testing.assert_close(found.double().cpu(), want, rtol=1e-4, atol=1e-4)
    want.square().mean().backward()
    found.square().mean().backward()
    for (name, mine), theirs in zip(network.named_parameters(), exact.parameters()):
        error = (mine.grad.double().cpu() - theirs.grad).norm() / theirs.grad.norm().clamp_min(1e-8)
        assert error < 1e-3, f"gradient of {name}: {error:.1e}"
