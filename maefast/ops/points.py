"""Point clouds into groups: `farthest_points` chooses centres, `knn` finds the points around them."""

from __future__ import annotations

import torch
from torch import Tensor

from maefast.ops import _checks, _dispatch, _registry

_raw_op = _registry.family("points")

COORDINATES = 16  # of a point, at most
TRITON_POINTS = 16384  # of a cloud, at most: the kernels hold one in registers


def farthest_points(points: Tensor, count: int, *, start: int = 0, backend: str | None = None) -> Tensor:
    """Indices of `count` points of each cloud, each the farthest from those before it (Eldar et al., 1997; PointNet++).

    The first is `start`; of equally far points the one of lowest index is taken. Distances are squared Euclidean, in
    float32 (float64 for float64), summed coordinate by coordinate, so all backends choose the same points.

    Args:
        points: [B, N, D], any floating dtype, 1 to 16 coordinates, finite. No gradient flows.
        count: 1 to N.

    Returns:
        int64 [B, count].

    Raises:
        TypeError, ValueError: wrong shapes or dtypes, empty clouds, count or start outside the cloud.
    """
    points = _cloud("points", points)
    size = points.shape[1]
    _checks.integer("count", count, 1)
    _checks.integer("start", start)
    if count > size or start >= size:
        raise ValueError(f"count = {count} and start = {start} must fit a cloud of {size} points")
    name = _dispatch.choose("farthest_points", points.device.type, points.dtype, backend, size <= TRITON_POINTS)
    run = farthest_points_reference if name == "reference" else _registry.raw("farthest_points", name)
    return run(points, count, start)


def farthest_points_reference(points: Tensor, count: int, start: int) -> Tensor:
    """The definition."""
    batch, size, _ = points.shape
    rows = torch.arange(batch, device=points.device)
    nearest = points.new_full((batch, size), float("inf"))
    at, found = torch.full_like(rows, start), []
    for _ in range(count):
        found.append(at)
        nearest = torch.minimum(nearest, squared_distance(points, points[rows, at][:, None]))
        at = nearest.argmax(1)  # the first of equal ones
    return torch.stack(found, 1)


def knn(queries: Tensor, points: Tensor, k: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The `k` nearest points of each query, nearest first; of equally near ones that of lowest index first.

    Distances as in `farthest_points`. The kernels need no memory beyond the output: no [Q, N] matrix is made.

    Args:
        queries: [B, Q, D]. points: [B, N, D], of the same dtype. Finite. No gradient flows.
        k: 1 to N.

    Returns:
        indices int64 [B, Q, k] and squared distances [B, Q, k] in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: wrong shapes or dtypes, empty clouds, k above N.
    """
    queries, points = _cloud("queries", queries), _cloud("points", points)
    check_pair("queries", queries, "points", points)
    _checks.integer("k", k, 1)
    if k > points.shape[1]:
        raise ValueError(f"k = {k} exceeds the {points.shape[1]} points of a cloud")
    fits = points.shape[1] <= TRITON_POINTS
    name = _dispatch.choose("knn", points.device.type, points.dtype, backend, fits)
    run = knn_reference if name == "reference" else _registry.raw("knn", name)
    return run(queries, points, k)


def knn_reference(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The definition."""
    distance = squared_distance(queries[:, :, None], points[:, None])
    nearest = distance.sort(dim=2, stable=True)
    return nearest.indices[:, :, :k].contiguous(), nearest.values[:, :, :k].contiguous()


@_raw_op("farthest_points(Tensor points, int count, int start) -> Tensor")
def _farthest_points_fake(points, count, start):
    return points.new_empty((points.shape[0], count), dtype=torch.int64)


@_raw_op("knn(Tensor queries, Tensor points, int k) -> (Tensor, Tensor)")
def _knn_fake(queries, points, k):
    shape = (*queries.shape[:2], k)
    return queries.new_empty(shape, dtype=torch.int64), queries.new_empty(shape)


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Of the last dimension's coordinates, summed in their order; a and b broadcast."""
    total = None
    for x, y in zip(a.unbind(-1), b.unbind(-1)):
        square = (x - y) * (x - y)
        total = square if total is None else total + square
    return total


def _cloud(name: str, points: Tensor) -> Tensor:
    """Contiguous, in the dtype of the arithmetic, without gradient."""
    check_cloud(name, points)
    wide = torch.float64 if points.dtype is torch.float64 else torch.float32
    return points.detach().to(wide).contiguous()


def check_cloud(name: str, points: Tensor) -> None:
    """`points` is [B, N, D] with at least one point."""
    _checks.tensor(name, points, ndim=3)
    if min(points.shape) < 1 or points.shape[2] > COORDINATES:
        raise ValueError(
            f"{name} must be [B, N, D] of at least one cloud, one point and 1 to {COORDINATES} coordinates, got"
            f" {tuple(points.shape)}"
        )


def check_pair(first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Two sets of clouds can be compared."""
    _checks.same_device(**{first: a, second: b})
    if a.dtype is not b.dtype:
        raise TypeError(f"{first} is {a.dtype} but {second} is {b.dtype}: convert one")
    if a.shape[0] != b.shape[0] or a.shape[2] != b.shape[2]:
        raise ValueError(
            f"{first} and {second} must agree in batch and coordinates, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
