from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from maefast import masking
from maefast.nn import Groups
from maefast.nn.point_groups import PointNet, check_scales, flat_members, group_points, point_scales
from maefast.nn.point_scales import FeaturePropagation, ScaleDecoder, ScaleEncoder, interpolation
from maefast.ops import TokenMask


def cloud(batch: int = 2, count: int = 30) -> torch.Tensor:
    return torch.randn(batch, count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_scales_are_groups_of_the_centres_before():
    points = cloud()
    scales = point_scales(points, (12, 6), (5, 3))
    first = group_points(points, 12, 5)
    second = group_points(first.centres, 6, 3)
    for mine, theirs in zip(scales.groups, (first, second)):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs))
    rows = torch.arange(2)[:, None, None]
    for before, groups, index in zip((points, first.centres), scales.groups, scales.index):
        assert torch.equal(before[rows, index] - groups.centres[:, :, None], groups.points)
    flat = flat_members(scales.index[1], 12)
    assert torch.equal(first.centres.flatten(0, 1)[flat].view(2, 6, 3, 3), first.centres[rows, scales.index[1]])


@pytest.mark.parametrize(
    ("groups", "sizes", "match"),
    [
        ((), (), "at least one"),
        ((4, 2), (3,), "as many scales"),
        ((8, 4), (4, 9), "4 groups of 9 points do not fit 8 points"),
        ((31,), (4,), "31 groups of 4 points do not fit 30 points"),
        ((4, 0), (4, 1), "0 groups of 1 points do not fit"),
    ],
)
def test_scales_that_do_not_fit(groups, sizes, match):
    with pytest.raises(ValueError, match=match):
        check_scales(30, groups, sizes)
    with pytest.raises(ValueError, match=match):
        point_scales(cloud(), groups, sizes)


@pytest.mark.parametrize("training", [True, False])
def test_rows_that_are_named_equal_rows_that_are_repeated(training):
    net = PointNet(4, 6, (4, 8, 5)).double().train(training)
    rows, index = torch.randn(7, 4, dtype=torch.float64), torch.randint(0, 7, (5, 3))
    torch.testing.assert_close(net.tokens(rows, index), net.tokens(rows[index]), rtol=1e-12, atol=1e-12)


def test_interpolation_is_that_of_loops():
    fine, coarse = cloud(2, 9), cloud(2, 5).flip(1)
    fine[:, 0] = coarse[:, 2]  # at a coarse point it is that point's
    states = torch.randn(2, 5, 4, dtype=torch.float64)
    found = interpolation(fine, coarse)
    assert (found > 0).sum(2).unique().tolist() == [3]
    for b in range(2):
        for n in range(9):
            away = (coarse[b] - fine[b, n]).square().sum(1)
            near = away.argsort()[:3]
            weights = 1 / (away[near] + 1e-8)
            want = (weights[:, None] * states[b, near]).sum(0) / weights.sum()
            torch.testing.assert_close(found[b, n] @ states[b], want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((found @ states)[:, 0], states[:, 2], rtol=1e-6, atol=1e-6)
    assert (interpolation(fine, coarse[:, :2]) > 0).all()


def test_propagation_of_a_ragged_plan():
    layer = FeaturePropagation(4, 6, depth=2).double()
    plan = masking.from_bool(torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 0, 1]]).bool())
    latent, coarse = torch.randn(4, 4, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64)
    weights = interpolation(cloud(2, 5), cloud(2, 3))
    full = torch.zeros(2, 5, 4, dtype=torch.float64)
    full[~plan.mask] = latent
    x = layer.fuse["net"](torch.cat([full, weights @ coarse], 2).flatten(0, 1))
    for part in layer.extraction["operation"]:
        x = F.gelu(part.net2(part.net1(x)) + x)
    found = layer(latent, plan, coarse, weights)
    torch.testing.assert_close(found.flatten(0, 1), x, rtol=1e-11, atol=1e-11)


def make(**options) -> ScaleEncoder:
    torch.manual_seed(0)
    return ScaleEncoder((8, 16), (1, 2), 1, **options).double().eval()


def plans_of(scales, mask: torch.Tensor) -> list[TokenMask]:
    coarse = masking.from_bool(mask)
    return [masking.children(coarse, scales.index[1], scales.groups[0].centres.shape[1]), coarse]


@pytest.mark.parametrize("embed_all", [True, False])
def test_encoder_packed_equals_one_by_one(embed_all):
    points = cloud(3)
    encoder, scales = make(embed_all=embed_all), point_scales(points, (12, 6), (5, 3))
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 0, 1, 1], [0, 0, 0, 0, 1, 1]]).bool()
    plans = plans_of(scales, mask)
    assert plans[0].keep is None
    found = encoder(scales, plans)
    alone = []
    for i in range(3):
        one = point_scales(points[i : i + 1], (12, 6), (5, 3))
        alone.append(encoder(one, plans_of(one, mask[i : i + 1])))
    for scale in (0, 1):
        want = torch.cat([a[scale].flatten(0, 1) for a in alone])
        torch.testing.assert_close(found[scale], want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("embed_all", [True, False])
def test_encoder_does_not_see_what_is_hidden(embed_all):
    """In eval mode; in training the statistics of the batch norms are of all groups, as published."""
    encoder, scales = make(embed_all=embed_all), point_scales(cloud(), (12, 6), (5, 3))
    plans = plans_of(scales, torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]]).bool())
    hidden = plans[0].mask[..., None, None]
    points = torch.where(hidden, torch.randn_like(scales.groups[0].points), scales.groups[0].points)
    other = scales._replace(groups=(Groups(points, scales.groups[0].centres), scales.groups[1]))
    for mine, theirs in zip(encoder(scales, plans), encoder(other, plans)):
        assert torch.equal(mine, theirs)


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="depths must name at least one block for each of 2 scales"):
        ScaleEncoder((8, 16), (1,), 1)
    with pytest.raises(ValueError, match="depths must name at least one block"):
        ScaleEncoder((8, 16), (1, 0), 1)
    with pytest.raises(ValueError, match="up_depths must name 1 propagations"):
        ScaleDecoder((16, 8), (1, 1), 1, ())
