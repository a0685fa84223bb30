"""Changed views of clips, against crops and colours made one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from maefast.data.jitter import jitter_clips


def clips(count=2, height=8, width=12):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 3, height, width, generator=generator, dtype=torch.double)


def test_nothing_changes():
    x, noise = clips(), torch.rand(2, 8)
    same = jitter_clips(x, noise, (1.0, 1.0), (1.0, 1.0), flip=0.0, colour=0.0)
    torch.testing.assert_close(same, x, rtol=0, atol=1e-6)
    mirrored = jitter_clips(x, noise, (1.0, 1.0), (1.0, 1.0), flip=1.0, colour=0.0)
    torch.testing.assert_close(mirrored, x.flip(4), rtol=0, atol=1e-6)


def test_a_quarter():
    """Half of each side, at the corner that the noise names, is what interpolation of that corner gives inside."""
    x, noise = clips(), torch.full((2, 8), 0.5)
    for left, top in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        noise[:, 2], noise[:, 3] = left, top
        found = jitter_clips(x, noise, (0.25, 0.25), (1.0, 1.0), flip=0.0, colour=0.0)
        part = x[:, :, :, int(4 * top) : int(4 * top) + 4, int(6 * left) : int(6 * left) + 6]
        want = F.interpolate(part.flatten(1, 2), scale_factor=2, mode="bilinear", align_corners=False).view_as(x)
        torch.testing.assert_close(found[..., 1:-1, 1:-1], want[..., 1:-1, 1:-1], rtol=0, atol=1e-6)


def test_colours():
    x, noise = clips(), torch.full((2, 8), 0.5)
    noise[:, 5:] = torch.tensor([[0.1, 0.8, 0.3], [0.9, 0.2, 0.7]])
    found = jitter_clips(x, noise, (1.0, 1.0), (1.0, 1.0), flip=0.0, colour=0.5)
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.double).view(3, 1, 1, 1)
    for clip, got, (b, c, s) in zip(x, found, (0.5 + noise[:, 5:]).tolist()):
        y = (clip * b).clamp(0, 1)
        y = (c * y + (1 - c) * (y * weights).sum(0).mean()).clamp(0, 1)
        y = (s * y + (1 - s) * (y * weights).sum(0)).clamp(0, 1)
        torch.testing.assert_close(got, y, rtol=0, atol=1e-6)


def test_all_frames_alike_and_each_clip_on_its_own():
    still = clips()[:, :, :1].expand(-1, -1, 3, -1, -1)
    noise = torch.rand(2, 8, generator=torch.Generator().manual_seed(0))
    found = jitter_clips(still, noise)
    assert torch.equal(found[:, :, 0], found[:, :, 2])
    assert ((found >= 0) & (found <= 1)).all()
    torch.testing.assert_close(jitter_clips(still[1:], noise[1:]), found[1:], rtol=0, atol=1e-14)


def test_bad_input():
    x, noise = clips(), torch.rand(2, 8)
    for given, match in (
        ((x[:, :2], noise), r"clips must be \[B, 3, T, H, W\] and noise \[B, 8\]"),
        ((x, noise[:1]), r"clips must be \[B, 3, T, H, W\] and noise \[B, 8\]"),
        ((x, noise, (0.5, 1.2)), "scale must rise from above 0 to at most 1"),
        ((x, noise, (0.5, 1.0), (0.0, 1.0)), "ratio must rise from above 0"),
        ((x, noise, (0.5, 1.0), (1.0, 1.0), 2.0), "flip and colour must lie"),
    ):
        with pytest.raises(ValueError, match=match):
            jitter_clips(*given)
