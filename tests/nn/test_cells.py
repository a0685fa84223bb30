"""sparsify: plain convnets on packed cells equal themselves with every layer multiplied by the mask."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import maefast
from maefast import Cells, masking
from maefast.nn import DropPath, UnknownSparseOp
from maefast.ops import CellMask
from tests.nn.common import Odd, assert_equals_masked


class Residual(nn.Module):
    def __init__(self, width, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(width, width, 1, stride), nn.BatchNorm2d(width)) if stride > 1 else None

    def forward(self, x):
        identity = x if self.down is None else self.down(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Squeeze(nn.Module):
    """Mobile block: depthwise convolutions and a squeeze-excite gate."""

    def __init__(self, width, stride):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU6())
        self.spatial = nn.Conv2d(2 * width, 2 * width, 3, stride, 1, groups=2 * width, bias=False)
        self.norm = nn.BatchNorm2d(2 * width)
        self.pool, self.gate = nn.AdaptiveAvgPool2d(1), nn.Conv2d(2 * width, 2 * width, 1)
        self.project = nn.Conv2d(2 * width, width, 1)

    def forward(self, x):
        y = F.hardswish(self.norm(self.spatial(self.expand(x))))
        y = y * torch.sigmoid(F.conv2d(self.pool(y), self.gate.weight, self.gate.bias))
        return self.project(y)


class Dense(nn.Module):
    """Concatenation, halves, average pooling, a bare function."""

    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 5, padding="same")
        self.pool, self.mix = nn.AvgPool2d(3, 2, 1), nn.Conv2d(3 * width, 2 * width, 1)

    def forward(self, x):
        y = torch.cat([x, F.silu(self.a(x)), F.gelu(self.b(x))], 1)
        first, second = torch.chunk(self.mix(y), 2, 1)
        return self.pool(first * 0.5 + second / 2 - 0.25 * first)


class Next(nn.Module):
    """The permuted form of a ConvNeXt block."""

    def __init__(self, width):
        super().__init__()
        self.dw, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gamma, self.act = nn.Parameter(torch.ones(width)), nn.GELU()

    def forward(self, x):
        y = self.dw(x).permute(0, 2, 3, 1)
        y = self.gamma * self.down(self.act(self.up(self.norm(y))))
        y = y.permute(0, 3, 1, 2)
        return x + (y if isinstance(y, Cells) else y * self.dw.active.map(y))


NETS = {
    "residual": lambda: [Residual(8), Residual(8, 2), Residual(8, 2)],
    "squeeze": lambda: [Squeeze(8, 1), Squeeze(8, 2)],
    "dense": lambda: [Dense(8), Dense(8)],
    "next": lambda: [Next(8), nn.Conv2d(8, 8, 2, 2), Next(8)],
    "pools": lambda: [nn.MaxPool2d(3, 2, 1), nn.Dropout(0.0), nn.Identity(), nn.AvgPool2d(2, ceil_mode=True)],
}


def net(name, stem=None):
    torch.manual_seed(0)
    model = nn.Sequential(stem or nn.Conv2d(3, 8, 7, 2, 3), *NETS[name]()).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(batch=3, grid=(3, 2), cell=16, ragged=True):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, grid[0] * cell, grid[1] * cell, generator=generator, dtype=torch.float64)
    keep = [4, 1, 6][:batch] if ragged else 3
    return images, masking.cells(batch, grid, keep=keep, generator=generator)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_equals_every_layer_times_the_mask(name, ragged):
    dense, images = net(name), None
    sparse = maefast.sparsify(copy.deepcopy(dense))
    assert sparse.state_dict().keys() == dense.state_dict().keys()
    images, plan = inputs(ragged=ragged)
    assert_equals_masked(dense, sparse, images, plan)


@pytest.mark.parametrize("name", [n for n in NETS if n != "next"])
def test_tensors_pass_as_before(name):
    dense = net(name).eval()
    sparse = maefast.sparsify(copy.deepcopy(dense))
    images, _ = inputs()
    assert torch.equal(sparse(images), dense(images))


def test_levels_coarser_than_a_cell_become_dense():
    """Cells of 4 pixels at a stride of 8: all sites are active from there on, masked ones having been zeros."""
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 1, 1))
    model = maefast.sparsify(model.double())
    images, plan = inputs(grid=(4, 4), cell=4)
    out = model(Cells.pack(images, plan))
    assert out.plan.total == 3 * 4
    keep = (~plan.mask)[:, None]
    x = model[0](images * keep.repeat_interleave(4, 2).repeat_interleave(4, 3)) * keep
    want = model[3](F.batch_norm(model[1](x), None, None, model[2].weight, model[2].bias, True))
    torch.testing.assert_close(out.dense(), want, rtol=1e-10, atol=1e-10)


def test_running_statistics_move_once():
    """However many readers the output of a norm has."""
    norm = maefast.sparsify(nn.Sequential(nn.BatchNorm2d(3))).double()
    images, plan = inputs()
    x = norm(Cells.pack(images, plan))
    total = F.relu(x) + x * 2 + F.relu6(x)
    once = nn.BatchNorm1d(3).double()
    rows = once(Cells.pack(images, plan).rows.reshape(-1, 3))
    torch.testing.assert_close(total.rows.reshape(-1, 3), rows.relu() + 2 * rows + F.relu6(rows))
    torch.testing.assert_close(norm[0].running_mean, once.running_mean)
    torch.testing.assert_close(norm[0].running_var, once.running_var)
    assert int(norm[0].num_batches_tracked) == 1


def test_group_and_instance_norms_take_the_sites_of_a_sample():
    images, plan = inputs()
    for norm in (nn.GroupNorm(3, 3), nn.InstanceNorm2d(3, affine=True)):
        out = maefast.sparsify(nn.Sequential(norm.double()))(Cells.pack(images, plan))
        rows = Cells.pack(images, plan).rows.flatten(1, 2).split(plan.cu_cells.diff().tolist())
        want = [F.group_norm(r.reshape(1, -1, 3).mT, 3) for r in rows]
        torch.testing.assert_close(out.rows.reshape(-1, 3), torch.cat([w[0].mT for w in want]))


def test_sync_batch_norm_of_one_process_is_a_batch_norm():
    images, plan = inputs()
    plain, sync = nn.BatchNorm2d(3).double(), nn.SyncBatchNorm(3, momentum=None).double()
    plain.momentum = None
    sync = maefast.sparsify(nn.Sequential(sync))[0]
    assert isinstance(sync, nn.SyncBatchNorm)
    for _ in range(2):
        torch.testing.assert_close(sync(Cells.pack(images, plan)).rows, plain(Cells.pack(images, plan)).rows)
    torch.testing.assert_close(sync.running_var, plain.running_var)
    sync.eval(), plain.eval()
    torch.testing.assert_close(sync(Cells.pack(images, plan)).rows, plain(Cells.pack(images, plan)).rows)


@pytest.mark.parametrize("name", ["ResNet", "ConvNext", "ConvNextV2"])
def test_networks_of_transformers(name):
    """Networks that were not written for this run as they are; what an all-visible plan gives is the dense result."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
    config = getattr(transformers, f"{name}Config")(**sizes, **({"embedding_size": 8} if name == "ResNet" else {}))
    model = maefast.sparsify(getattr(transformers, f"{name}Model")(config).double().eval())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    want = model(images)
    out = model(Cells.pack(images, CellMask.all_visible(2, (2, 2))))
    torch.testing.assert_close(out.last_hidden_state.dense(), want.last_hidden_state, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.pooler_output, want.pooler_output, rtol=1e-9, atol=1e-9)
    masked = masking.cells(2, (2, 2), 0.5)
    keep = masked.upsampled_mask((64, 64))
    first, second = (model(Cells.pack(x, masked)).last_hidden_state for x in (images, images * keep + 7.0 * ~keep))
    assert torch.equal(first.rows, second.rows)


class HiddenState(nn.Module):
    """The feature map of a network of transformers."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x).last_hidden_state


PADS = {  # those that pad as TensorFlow does, more on the right and at the bottom
    "MobileNetV1": {"depth_multiplier": 0.25},
    "MobileNetV2": {"depth_multiplier": 0.25},
    "EfficientNet": {
        "width_coefficient": 0.25,
        "depth_coefficient": 0.1,
        "hidden_dim": 320,
        "depth_divisor": 4,
        "drop_connect_rate": 0.0,
        "dropout_rate": 0.0,
    },
}


@pytest.mark.parametrize("name", PADS)
def test_networks_of_transformers_that_pad(name):
    """In training, where batch norms keep values at a scale that a difference shows in."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    network = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**PADS[name]))
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.1)
    dense = HiddenState(network).double().train()
    sparse = maefast.sparsify(copy.deepcopy(dense))
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    everything, half = CellMask.all_visible(4, (2, 2)), masking.cells(4, (2, 2), 0.5)
    keep = half.upsampled_mask((64, 64))
    first, second = (copy.deepcopy(sparse)(Cells.pack(x, half)) for x in (images, images * keep + 7.0 * ~keep))
    assert torch.equal(first.rows, second.rows)
    if (
        name != "EfficientNet"
    ):  # whose gates are 1x1 convolutions of pooled values, which the plain reference would mask
        assert_equals_masked(copy.deepcopy(dense), copy.deepcopy(sparse), images, half, gradients=1e-7)
    all_cells = Cells.pack(images, everything)
    want, got = dense(images), sparse(all_cells).dense()
    pooled = (copy.deepcopy(net)(x).pooler_output for net, x in ((dense.network, images), (sparse.network, all_cells)))
    torch.testing.assert_close(*pooled, rtol=1e-8, atol=1e-8)
    assert want.abs().max() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    weight = torch.randn_like(want)
    (want * weight).sum().backward()
    (got * weight).sum().backward()
    largest = max(p.grad.abs().max().item() for p in dense.parameters() if p.grad is not None)
    for (key, p), q in zip(sparse.named_parameters(), dense.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-8 * largest, msg=key)


def test_a_pooled_map_becomes_a_row_of_features():
    images, plan = inputs()
    pooled = F.avg_pool2d(Cells.pack(images, plan), (48, 32))
    want = F.avg_pool2d(images * plan.upsampled_mask((48, 32)), (48, 32)).flatten(1)
    for got in (pooled.view(3, 3), pooled.reshape(pooled.shape[:2]), torch.reshape(pooled, (3, -1))):
        torch.testing.assert_close(got, want)


def test_drop_path_drops_whole_samples():
    torch.manual_seed(0)
    images, plan = inputs(ragged=True)
    x = Cells.pack(images.abs() + 1, plan)
    out = DropPath(0.5)(x)
    ratio = (out.rows / x.rows).flatten(1)
    sample = torch.div(plan.cells, plan.tokens.num_tokens, rounding_mode="floor")
    for b in range(3):
        assert set(ratio[sample == b].unique().tolist()) in ({0.0}, {2.0})


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Fold((4, 4), 2), r"1.up \(Fold\): not known"),
        (nn.Conv2d(8, 8, 3, 1, 1, padding_mode="reflect"), "padding_mode 'reflect'"),
        (nn.Upsample(scale_factor=2), r"1.up \(Upsample\)"),
        (nn.BatchNorm1d(8), r"\(BatchNorm1d\)"),
        (nn.AdaptiveAvgPool2d(2), "pooling to 2"),
        (nn.MaxPool2d(3, 2, 1, return_indices=True), "return_indices"),
    ],
)
def test_unknown_modules_are_named(module, message):
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ModuleDict({"up": module}))
    with pytest.raises(UnknownSparseOp, match=message):
        maefast.sparsify(model)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x: F.interpolate(x, scale_factor=2), r"in 1 \(Odd\): interpolate is not known"),
        (lambda x: F.pad(x, (1, 1, 1, 1)).relu(), r"in 1 \(Odd\): of a map that was padded"),
        (lambda x: x.view(2, -1), r"in 1 \(Odd\): packed cells .* have no Tensor.view as"),
        (lambda x: x.mean(), r"in 1 \(Odd\): the mean of cells is over both sides"),
        (lambda x: x.permute(1, 0, 2, 3), "permuted between"),
        (lambda x: x + torch.zeros(3, 8, 12, 4, dtype=torch.float64), "does not go with cells"),
        (lambda x: torch.cat([x, x], 2), "along their channels only"),
        (lambda x: F.linear(x, torch.zeros(8, 8)), r"permute\(0, 2, 3, 1\) first"),
        (lambda x: F.conv2d(x.permute(0, 2, 3, 1), torch.zeros(8, 8, 1, 1)), "takes"),
        (lambda x: F.adaptive_avg_pool2d(x, 3), "only to 1"),
        (lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True), "leaves the grid of the mask"),
        (lambda x: F.conv_transpose2d(x, torch.zeros(8, 8, 3, 3, dtype=x.dtype), stride=2), "lies on no cells"),
        (lambda x: torch.linalg.vector_norm(x, 1, dim=(2, 3)), "is the 2-norm"),
    ],
)
def test_unknown_functions_name_the_module(run, message):
    model = maefast.sparsify(nn.Sequential(nn.Conv2d(3, 8, 4, 4), Odd(run)).double())
    images, plan = inputs()
    with pytest.raises(UnknownSparseOp, match=message):
        model(Cells.pack(images, plan))


def test_cells_of_different_plans_are_not_mixed():
    images, plan = inputs()
    _, other = inputs(ragged=False)
    with pytest.raises(ValueError, match="different plans"):
        Cells.pack(images, plan) + Cells.pack(images, other)
    with pytest.raises(ValueError, match="no multiple of the grid"):
        Cells.pack(torch.zeros(3, 3, 50, 32), plan)
    assert not hasattr(Cells.pack(images, plan), "unfold")
    assert "CellMask(batch=3, grid=3x2" in repr(Cells.pack(images, plan))


def test_whole_samples_without_a_plan_of_their_own():
    """A map that is one cell: every op of the packed layout also serves dense maps."""
    images, _ = inputs()
    whole = CellMask.all_visible(3, (1, 1))
    conv = nn.Conv2d(3, 6, 3, 1, 1).double()
    torch.testing.assert_close(conv(Cells.pack(images, whole)).dense(), conv(images), rtol=1e-12, atol=1e-12)


def test_a_norm_added_in_place_takes_the_values_of_then():
    """``x += norm(shortcut)``: afterwards x is the sum, which must not be what the norm waits for."""
    torch.manual_seed(0)
    plan = CellMask.all_visible(2, (2, 2))
    norm = nn.BatchNorm2d(4)
    x, shortcut = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    cells = Cells.pack(x, plan)
    cells += norm(Cells.pack(shortcut, plan))
    torch.testing.assert_close(cells.dense(), x + norm(shortcut))
