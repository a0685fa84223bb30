from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from maefast.nn.cameras import first_at_rest, rays_of
from maefast.nn.modulated import ModulatedBlock, fourier
from maefast.nn.vm_decoder import VMDecoder
from maefast.nn.vm_field import LINES, PLANES, VMRenderer, distortion, sample_vm


def field(batch=2, channels=5, side=6):
    generator = torch.Generator().manual_seed(4)
    planes = torch.randn(batch, 3, channels, side, side, dtype=torch.double, generator=generator)
    lines = torch.randn(batch, 3, channels, side, dtype=torch.double, generator=generator)
    return planes.requires_grad_(), lines.requires_grad_(), generator


def test_points_in_the_middle_of_cells_read_them():
    planes, lines, _ = field(1)
    middle = (torch.arange(6).double() + 0.5) / 3 - 1
    for cell in ((0, 1, 2), (5, 3, 0)):
        point = middle[list(cell)].view(1, 1, 3)
        on_planes, on_lines = sample_vm(planes, lines, point)
        for i, ((column, row), axis) in enumerate(zip(PLANES, LINES)):
            torch.testing.assert_close(on_planes[0, i, :, 0], planes[0, i, :, cell[row], cell[column]])
            torch.testing.assert_close(on_lines[0, i, :, 0], lines[0, i, :, cell[axis]])
    assert not sample_vm(planes, lines, torch.full((1, 1, 3), 3.0).double())[0].any()


def test_gradients_of_a_field():
    planes, lines, generator = field(1, 2, 3)
    points = torch.rand(1, 4, 3, dtype=torch.double, generator=generator) * 2 - 1
    assert torch.autograd.gradcheck(lambda p, l: sample_vm(p, l, points), (planes, lines))


def test_refusals():
    planes, lines, _ = field()
    with pytest.raises(ValueError, match=r"points \[B, P, 3\] are wanted"):
        sample_vm(planes, lines, torch.zeros(3, 1, 3).double())
    with pytest.raises(ValueError, match=r"lines \[B, 3, C, R\]"):
        sample_vm(planes, lines[:, :, :4], torch.zeros(2, 1, 3).double())
    with pytest.raises(ValueError, match="other tokens must be given to a cross block"):
        ModulatedBlock(8, 2)(torch.zeros(1, 2, 8), torch.zeros(1, 8), torch.zeros(1, 3, 8))


def test_a_wall_is_where_it_stands():
    """A density that is high everywhere: all weight on the first sample within the cube."""
    renderer = VMRenderer(box=0.5, density_dim=1, colour_dim=1, hidden=4).double()
    planes, lines = torch.full((1, 3, 2, 4, 4), 30.0).double(), torch.full((1, 3, 2, 4), 30.0).double()
    edges = torch.linspace(0, 2, 81, dtype=torch.double)[None]
    start, ahead = torch.tensor([[[0.0, 0.0, -1.0]]]).double(), torch.tensor([[[0.0, 0.0, 1.0]]]).double()
    seen = renderer(planes, lines, start, ahead, edges)
    assert seen.weights.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert seen.depth.item() == pytest.approx(0.5, abs=0.15)  # zeros beyond the border are half a cell away
    away = renderer(planes, lines, start, -ahead, edges)
    assert not away.colours.any()


def test_distortion_is_the_double_sum():
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(3, 4, 7, dtype=torch.double, generator=generator)
    edges = torch.rand(3, 1, 8, dtype=torch.double, generator=generator).sort().values
    middles, widths = (edges[..., 1:] + edges[..., :-1]) / 2, edges.diff()
    apart = (middles[..., :, None] - middles[..., None, :]).abs()
    want = (weights[..., :, None] * weights[..., None, :] * apart).sum((-1, -2)) + (weights**2 * widths).sum(-1) / 3
    torch.testing.assert_close(distortion(weights, middles, widths), want.mean(), rtol=1e-12, atol=0)


def test_rays():
    turn = torch.linalg.qr(torch.randn(2, 3, 3, 3, dtype=torch.double))[0]
    poses = torch.cat([turn, torch.randn(2, 3, 3, 1, dtype=torch.double)], 3)
    moved = first_at_rest(poses)
    torch.testing.assert_close(moved[:, 0, :, :3], torch.eye(3).double().expand(2, 3, 3))
    torch.testing.assert_close(moved[:, 0, 2, 3], -poses[:, 0, :, 3].norm(dim=1))
    assert moved[:, 0, :2, 3].abs().max() < 1e-12
    for one, other in ((poses, moved),):  # distances between cameras stay
        apart = [(p[:, 1, :, 3] - p[:, 2, :, 3]).norm(dim=1) for p in (one, other)]
        torch.testing.assert_close(*apart)
    which = torch.tensor([[0, 4 * 6 + 13], [5, 2 * 24 + 23]])
    origins, directions = rays_of(poses, torch.tensor([3.0, 4.0]).double(), which, (4, 6))
    pixel = torch.tensor([(1 + 0.5 - 3) / 3, (2 + 0.5 - 2) / 3, 1.0]).double()  # 13 is row 2, column 1
    torch.testing.assert_close(origins[0, 1], poses[0, 1, :, 3])
    torch.testing.assert_close(directions[0, 1], F.normalize(turn[0, 1] @ pixel, dim=0))


def test_fourier_codes():
    found = fourier(torch.tensor([[0.5, 2.0]]), 2, torch.pi)
    angle = torch.pi * torch.tensor([[0.5, 1.0, 2.0, 4.0]])
    torch.testing.assert_close(found, torch.cat([angle.sin(), angle.cos()], 1))


def test_cells_of_planes_and_lines_lie_where_they_are_read():
    """The token of cell (i, j) of plane k decides about that square of it, and no other."""
    torch.manual_seed(0)
    decoder = VMDecoder(4, resolution=6, patch=3, channels=2, dim=8, depth=0, num_heads=2).double()
    latent, camera = torch.randn(1, 5, 8).double(), torch.ones(1, 2).double()
    planes, lines = decoder(latent, camera)
    assert planes.shape == (1, 3, 2, 6, 6)
    assert lines.shape == (1, 3, 2, 6)
    with torch.no_grad():
        decoder.decoder_pos_embed[0, 1 + 4 + 2] += 1  # plane 1, cell (1, 0)
        decoder.decoder_pos_embed[0, 1 + 12 + 2 * 2 + 1] += torch.arange(8).double()  # line 2, cell 1
    changed = decoder(latent, camera)
    where = ((changed[0] - planes).abs().sum(2) > 0)[0].nonzero()
    assert {tuple(row) for row in where.tolist()} <= {(1, 3 + i, j) for i in range(3) for j in range(3)}
    assert ((changed[1] - lines).abs().sum(2) > 0)[0].nonzero().tolist() == [[2, 3], [2, 4], [2, 5]]
