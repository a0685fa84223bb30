"""farthest_points and knn: the Triton kernels choose what the definition chooses, to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast.kernels import points
from maefast.ops.points import farthest_points_reference, knn_reference
from tests.kernels.support import property_test, random_tensor


def check(batch, size, coordinates, queries, seed, coarse, device):
    cloud, other = (random_tensor(batch, n, coordinates, seed=seed + i) for i, n in enumerate((size, queries)))
    if coarse:  # many equal distances
        cloud, other = cloud.round(), other.round()
    generator = torch.Generator().manual_seed(seed)
    count, k, start = (int(torch.randint(size, (), generator=generator)) for _ in range(3))
    got = points.farthest_points(cloud.to(device), count + 1, start)
    assert torch.equal(got.cpu(), farthest_points_reference(cloud, count + 1, start))
    got = points.knn(other.to(device), cloud.to(device), k + 1)
    for a, b in zip(got, knn_reference(other, cloud, k + 1)):
        assert torch.equal(a.cpu(), b)


@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**16), st.booleans()
)
@property_test(30)
def test_points(device, batch, size, coordinates, queries, seed, coarse):
    check(batch, size, coordinates, queries, seed, coarse, device)


def test_a_cloud_of_several_warps(device):
    check(2, 700, 3, 3, 0, False, device)


def test_infinite_distances(device):
    cloud = torch.tensor([[[1e30], [0.0], [-1e30], [1e30]]])
    got = points.knn(cloud.to(device), cloud.to(device), 4)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, knn_reference(cloud, cloud, 4)))


def test_refuses_float64(device):
    cloud = torch.zeros(1, 4, 3, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match="float64"):
        points.farthest_points(cloud, 1, 0)
    with pytest.raises(TypeError, match="float64"):
        points.knn(cloud, cloud, 1)
