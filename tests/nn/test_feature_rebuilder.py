from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from maefast.nn.feature_rebuilder import FeatureRebuilder
from maefast.nn.segmentation import ConvPyramid, PyramidHead, segmentation_loss


def made(channels=(3, 4, 5, 6), scales=(8, 4, 2, 1), **changes):
    torch.manual_seed(0)
    how = {"grid": (2, 3), "embed_dim": 16, "depth": 1, "num_heads": 2, **changes}
    rebuilder = FeatureRebuilder(channels, scales, **how).double()
    maps = [
        torch.randn(2, width, 2 * scale, 3 * scale, dtype=torch.double, requires_grad=True)
        for width, scale in zip(channels, scales)
    ]
    mask = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[0, 0, 0], [0, 0, 1]]], dtype=torch.bool)
    return rebuilder, maps, mask


def test_maps_are_as_they_were_where_nothing_is_hidden():
    rebuilder, maps, mask = made()
    for given, found in zip(maps, rebuilder(maps, mask)):
        scale = given.shape[2] // 2
        hidden = F.interpolate(mask[:, None].double(), scale_factor=scale, mode="nearest").bool().expand_as(given)
        assert found.shape == given.shape
        assert torch.equal(found[~hidden], given[~hidden])
        assert not (found[hidden] == given[hidden]).any()
    none = rebuilder(maps, torch.zeros_like(mask))
    assert all(torch.equal(given, found) for given, found in zip(maps, none))


def test_hidden_cells_are_not_looked_at():
    rebuilder, maps, mask = made()
    want = rebuilder(maps, mask)
    changed = []
    for given in maps:
        scale = given.shape[2] // 2
        hidden = mask.repeat_interleave(scale, 1).repeat_interleave(scale, 2)[:, None]
        changed.append(torch.where(hidden, torch.randn_like(given), given))
    assert all(torch.equal(one, other) for one, other in zip(want, rebuilder(changed, mask)))


def test_gradients_reach_all_parts():
    rebuilder, maps, mask = made()
    sum(one.square().sum() for one in rebuilder(maps, mask)).backward()
    for name, parameter in rebuilder.named_parameters():
        assert not parameter.requires_grad or parameter.grad.norm() > 0, name
    assert all(one.grad.norm() > 0 for one in maps)


def test_a_map_finer_than_the_grid():
    rebuilder, maps, mask = made((5,), (4,))
    (found,) = rebuilder(maps, mask)
    assert found.shape == maps[0].shape
    hidden = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(found)
    assert torch.equal(found[~hidden], maps[0][~hidden])


def test_refusals():
    rebuilder, maps, mask = made()
    for arguments, error, reason in (
        ((maps[:3], mask), ValueError, "maps must be 4, got 3"),
        (([*maps[:3], maps[3][:, :5]], mask), ValueError, r"maps\[3\] must be \[B, 6, 2, 3\], got \(2, 5, 2, 3\)"),
        ((maps, mask.double()), ValueError, r"mask must be bool \[2, 2, 3\]"),
        ((maps, mask[:1]), ValueError, r"mask must be bool \[2, 2, 3\]"),
        (([*maps[:3], 3], mask), TypeError, r"maps\[3\]"),
    ):
        with pytest.raises(error, match=reason):
            rebuilder(*arguments)
    with pytest.raises(ValueError, match="scales"):
        FeatureRebuilder((3, 4), (3, 1))
    with pytest.raises(ValueError, match="scales"):
        FeatureRebuilder((3, 4), (1,))


def test_the_pyramid_and_its_head():
    encoder, decoder = ConvPyramid((4, 6, 8), (2, 4, 8)), PyramidHead((4, 6, 8), 5, 7)
    maps = encoder(torch.randn(2, 3, 16, 24))
    assert [tuple(one.shape) for one in maps] == [(2, 4, 8, 12), (2, 6, 4, 6), (2, 8, 2, 3)]
    assert decoder(maps).shape == (2, 5, 8, 12)


def test_loss_of_pixels():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 4, 6, dtype=torch.double), torch.randint(0, 5, (2, 4, 6))
    labels[0, :2] = 255
    weight = torch.rand(2, 1, 1, dtype=torch.double)
    want = 0.0
    for sample in range(2):
        for row in range(4):
            for column in range(6):
                if (label := int(labels[sample, row, column])) != 255:
                    scores = logits[sample, :, row, column].log_softmax(0)
                    want -= float(scores[label] * weight[sample]) / 48
    assert segmentation_loss(logits, labels, weight).item() == pytest.approx(want, rel=1e-12)
    assert segmentation_loss(logits[:, :, :2, :3].bfloat16(), labels).dtype is torch.float32
    with pytest.raises(ValueError, match="labels must be of 2 images"):
        segmentation_loss(logits, labels[:1])
    with pytest.raises(ValueError, match="labels"):
        segmentation_loss(logits, labels[0])
