"""farthest_points and knn: the same points on every backend, ties and all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast import ops
from maefast.ops import _registry
from maefast.ops.points import knn_reference

from .common import backends, property_test


@st.composite
def clouds(draw):
    """Points of a coarse grid among others, so that many distances are equal."""
    batch, size, width = draw(st.integers(1, 3)), draw(st.integers(1, 70)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    points = torch.randn(batch, size, width, generator=generator)
    return points.round() if draw(st.booleans()) else points


def dtypes(backend):
    return [torch.float32, torch.float16, torch.bfloat16, *([] if backend in ("triton", "cuda") else [torch.float64])]


@given(points=clouds(), data=st.data())
@property_test
def test_farthest_reference_equals_a_loop(points, data):
    size = points.shape[1]
    count, start = data.draw(st.integers(1, size)), data.draw(st.integers(0, size - 1))
    got = ops.farthest_points(points, count, start=start, backend="reference")
    assert got.dtype is torch.int64
    for cloud, found in zip(points, got.tolist()):
        chosen = [start]
        while len(chosen) < count:
            squares = [sum((x - x[c]) ** 2 for x in cloud.T) for c in chosen]
            least = torch.stack(squares).amin(0).tolist()
            chosen.append(least.index(max(least)))
        assert found == chosen


@pytest.mark.parametrize("where", backends("farthest_points", reference=False))
@given(points=clouds(), data=st.data())
@property_test
def test_farthest_points(where, points, data):
    backend, device = where
    points = points.to(data.draw(st.sampled_from(dtypes(backend))))
    count, start = (data.draw(st.integers(low, points.shape[1] - 1 + low)) for low in (1, 0))
    got = ops.farthest_points(points.to(device), count, start=start, backend=backend).cpu()
    assert torch.equal(got, ops.farthest_points(points, count, start=start, backend="reference"))


@given(points=clouds(), data=st.data())
@property_test
def test_knn_reference_equals_a_loop(points, data):
    queries = torch.randn(points.shape[0], 3, points.shape[2], generator=torch.Generator().manual_seed(0)).round()
    k = data.draw(st.integers(1, points.shape[1]))
    index, distance = ops.knn(queries, points, k, backend="reference")
    for b in range(len(points)):
        for q in range(3):
            far = [((queries[b, q] - p).double() ** 2).sum().item() for p in points[b]]
            order = sorted(range(len(far)), key=lambda n: (far[n], n))[:k]
            if bool((points == points.round()).all()):  # exact sums
                assert index[b, q].tolist() == order
            torch.testing.assert_close(
                distance[b, q].double(), torch.tensor([far[n] for n in order]).double(), rtol=1e-6, atol=0
            )


@pytest.mark.parametrize("where", backends("knn", reference=False))
@given(points=clouds(), data=st.data())
@property_test
def test_knn(where, points, data):
    backend, device = where
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    queries = torch.randn(points.shape[0], data.draw(st.integers(1, 9)), points.shape[2], generator=generator)
    if data.draw(st.booleans()):
        queries = points[:, :9].clone()
    dtype, k = data.draw(st.sampled_from(dtypes(backend))), data.draw(st.integers(1, points.shape[1]))
    queries, points = queries.to(dtype), points.to(dtype)
    got = [t.cpu() for t in ops.knn(queries.to(device), points.to(device), k, backend=backend)]
    want = ops.knn(queries, points, k, backend="reference")
    assert got[1].dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("where", backends("knn"))
def test_strided_input_and_no_gradient(where):
    backend, device = where
    points = torch.randn(2, 3, 40, device=device).mT.requires_grad_()
    index, distance = ops.knn(points[:, ::2], points, 4, backend=backend)
    assert torch.equal(index[:, :, 0].cpu(), torch.arange(0, 40, 2).expand(2, -1))
    assert not distance.requires_grad
    found = ops.farthest_points(points, 5, backend=backend)
    assert torch.equal(found, ops.farthest_points(points.detach().contiguous(), 5, backend=backend))


def test_infinite_distances_are_ranked_too():
    points = torch.tensor([[[1e30], [0.0], [-1e30], [1e30]]])
    want = knn_reference(points, points, 4)
    got = ops.knn(points, points, 4)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


P = torch.randn(2, 6, 3)
BAD = [
    (lambda: ops.farthest_points(P, 7), ValueError, "must fit a cloud of 6 points"),
    (lambda: ops.farthest_points(P, 0), ValueError, "count"),
    (lambda: ops.farthest_points(P, 2, start=6), ValueError, "must fit a cloud of 6 points"),
    (lambda: ops.farthest_points(P[0], 2), ValueError, "points"),
    (lambda: ops.farthest_points(P.int(), 2), TypeError, "points"),
    (lambda: ops.farthest_points(torch.randn(1, 4, 17), 2), ValueError, "1 to 16 coordinates"),
    (lambda: ops.farthest_points(P[:, :0], 1), ValueError, "at least one cloud, one point"),
    (lambda: ops.knn(P, P, 7), ValueError, "k = 7 exceeds the 6 points"),
    (lambda: ops.knn(P[:1], P, 2), ValueError, "must agree in batch and coordinates"),
    (lambda: ops.knn(P[..., :2], P, 2), ValueError, "must agree in batch and coordinates"),
    (lambda: ops.knn(P.double(), P, 2), TypeError, "convert one"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_clear_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("where", backends("knn", reference=False))
def test_opcheck(where):
    backend, device = where
    points = torch.randn(2, 20, 3, device=device)
    torch.library.opcheck(_registry.raw("farthest_points", backend), (points, 4, 1))
    torch.library.opcheck(_registry.raw("knn", backend), (points[:, :5].contiguous(), points, 3))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    def groups(points):
        centers = ops.farthest_points(points, 4)
        centers = points.gather(1, centers[..., None].expand(-1, -1, 3))
        return ops.knn(centers, points, 5)

    torch._dynamo.reset()
    compiled = torch.compile(groups, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        points = torch.randn(batch, 30, 3)
        assert all(torch.equal(a, b) for a, b in zip(groups(points), compiled(points)))
