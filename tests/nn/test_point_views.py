from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from maefast.data.images.batch import normaliser
from maefast.nn.point_views import VIEWS, looked_at, sample_maps, splat, view_frame, view_pixels


def cloud(batch: int = 2, count: int = 20) -> torch.Tensor:
    points = torch.randn(batch, count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return points * torch.tensor([1.0, 0.3, 2.0])


def test_splatting_is_that_of_loops():
    points, size = cloud(), 24
    found = splat(points, view_frame(points, size))
    for b, one in enumerate(points):
        for v, axes in enumerate(VIEWS):
            x, y, depth = (one[:, axis] for axis in axes)
            cell = max(x.max() - x.min(), y.max() - y.min()) / (size - 3)
            rows, columns = (torch.floor((c - c.min()) / cell) for c in (x, y))
            row, column = (size // 2 - 1 - int((c.max() + 2) // 2) + 1 for c in (rows, columns))
            want = torch.zeros(size, size, dtype=torch.float64)
            for r, c, d in zip(rows.long().tolist(), columns.long().tolist(), depth.tolist()):
                for i in range(-2, 3):
                    for j in range(-2, 3):
                        want[min(max(r + row + i, 0), size - 1), min(max(c + column + j, 0), size - 1)] += d
            torch.testing.assert_close(found[b, v], want, rtol=1e-9, atol=1e-9)


def test_clouds_fill_the_longer_side_and_stand_in_the_middle():
    points = cloud()
    frame = view_frame(points, 32)
    pixels = view_pixels(points, frame)
    low, high = pixels.amin(2), pixels.amax(2)
    assert ((high - low).amax(2) >= 28).all()
    assert ((low + high - 32).abs() <= 3).all()
    some = view_pixels(points[:, 3:5], frame)
    assert torch.equal(some, pixels[:, :, 3:5])


def test_order_and_place_of_points_do_not_matter():
    points = cloud()
    found = splat(points, view_frame(points, 16))
    other = points[:, torch.randperm(20)]
    assert torch.equal(splat(other, view_frame(other, 16)), found)
    one = points[:, :1].expand(-1, 4, -1)  # without extent
    assert splat(one, view_frame(one, 16)).isfinite().all()
    far = points.float() + 1e6
    assert view_pixels(far, view_frame(far, 16)).max() < 16


def test_maps_are_read_as_if_enlarged():
    maps = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    pixels = torch.randint(0, 20, (2, 3, 7, 2))
    large = F.interpolate(maps.flatten(0, 1).permute(0, 3, 1, 2), size=(20, 20), mode="bicubic").unflatten(0, (2, 3))
    found = sample_maps(maps, pixels, 20)
    for b in range(2):
        for v in range(3):
            rows, columns = pixels[b, v].T
            torch.testing.assert_close(found[b, v], large[b, v][:, rows, columns].T, rtol=1e-10, atol=1e-10)
    assert sample_maps(maps.bfloat16(), pixels, 20).dtype is torch.float32


def test_what_a_teacher_is_shown():
    points = cloud()
    frame = view_frame(points, 16)
    seen = []

    def teacher(images):
        seen.append(images)
        return torch.arange(6 * 4 * 5.0).view(6, 4, 5), torch.arange(24.0).view(6, 4)

    features, looks = looked_at(teacher, points, frame, *normaliser(3))
    assert (features.shape, looks.shape) == ((2, 3, 2, 2, 5), (2, 3, 2, 2, 1))
    assert features[1, 0, 1, 0].tolist() == [70.0, 71.0, 72.0, 73.0, 74.0]
    blank = (0.5 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(seen[0][:, :, 0, 0], blank.double().expand(6, 3))  # nothing in that corner
    with pytest.raises(ValueError, match="teacher must have a square grid of patches, got 3"):
        looked_at(lambda images: (torch.zeros(6, 3, 5), torch.zeros(6, 3)), points, frame, *normaliser(3))


def test_bad_clouds():
    with pytest.raises(ValueError, match=r"points must be floating and \[B, N, 3\]"):
        view_frame(torch.zeros(2, 3), 16)
    with pytest.raises(ValueError, match="size must be at least 8 pixels, got 4"):
        view_frame(cloud(), 4)
