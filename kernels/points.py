"""Triton kernels of the points family: the distances of a cloud of up to 16384 points stay in a program's registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import OPTIONS, check_dtypes, guard, power

FARTHER = torch.iinfo(torch.int64).max  # behind every distance and index


@triton.jit
def distance_to(points, n, inside, query, COORDINATES: tl.constexpr):
    """Squared distances of the points [N, D] to the one at pointer `query`."""
    total = tl.zeros(n.shape, tl.float32)
    for d in tl.static_range(COORDINATES):
        x = tl.load(points + n * COORDINATES + d, mask=inside, other=0.0) - tl.load(query + d)
        total += x * x
    return total


@triton.jit
def farthest_points_kernel(points, out, size, count, start, COORDINATES: tl.constexpr, BLOCK: tl.constexpr):
    """A cloud a program; its points come from the first-level cache."""
    b = tl.program_id(0).to(tl.int64)
    cloud = points + b * size * COORDINATES
    n = tl.arange(0, BLOCK)
    inside = n < size
    nearest = tl.where(inside, float("inf"), -1.0)
    at = tl.zeros([], tl.int32) + start
    for s in range(count):
        tl.store(out + b * count + s, at.to(tl.int64))
        distance = distance_to(cloud, n, inside, cloud + at * COORDINATES, COORDINATES)
        nearest = tl.where(inside, tl.minimum(nearest, distance), -1.0)
        at = tl.argmax(nearest, 0).to(tl.int32)  # the first of equal ones


@triton.jit
def knn_kernel(
    queries, points, index, distance, each, size, k, FARTHER: tl.constexpr, COORDINATES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A query a program. A distance and its index are one number, ordered as (distance, index): k minima in turn."""
    q = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    inside = n < size
    cloud = points + q // each * size * COORDINATES
    far = distance_to(cloud, n, inside, queries + q * COORDINATES, COORDINATES)
    key = (far.to(tl.int32, bitcast=True).to(tl.int64) << 32) | n.to(tl.int64)
    key = tl.where(inside, key, FARTHER)
    for i in range(k):
        least = tl.min(key, 0)
        tl.store(index + q * k + i, least & 0xFFFFFFFF)
        tl.store(distance + q * k + i, (least >> 32).to(tl.int32).to(tl.float32, bitcast=True))
        key = tl.where(key == least, FARTHER, key)


def _options(size: int) -> dict:
    block = power(size)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256)), **OPTIONS}


def farthest_points(points: Tensor, count: int, start: int) -> Tensor:
    """points [B, N, D] -> int64 [B, count]."""
    check_dtypes("farthest_points", points)
    batch, size, coordinates = points.shape
    out = torch.empty((batch, count), dtype=torch.int64, device=points.device)
    with guard(points):
        farthest_points_kernel[(batch,)](points, out, size, count, start, COORDINATES=coordinates, **_options(size))
    return out


def knn(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """queries [B, Q, D], points [B, N, D] -> index int64 [B, Q, k], squared distance [B, Q, k]."""
    check_dtypes("knn", queries, points)
    batch, each, coordinates = queries.shape
    size = points.shape[1]
    index = torch.empty((batch, each, k), dtype=torch.int64, device=points.device)
    distance = torch.empty((batch, each, k), dtype=torch.float32, device=points.device)
    with guard(points):
        knn_kernel[(batch * each,)](
            queries, points, index, distance, each, size, k, FARTHER=FARTHER, COORDINATES=coordinates, **_options(size)
        )
    return index, distance


OPS = {"farthest_points": farthest_points, "knn": knn}
