from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from maefast.nn.fusion import LayerFusion


def test_layers_are_added():
    torch.manual_seed(0)
    fusion = LayerFusion(6, 2).double()
    x, *states = torch.randn(3, 2, 4, 6, dtype=torch.double)
    want = x.clone()
    for norm, layer, state in zip(fusion.norms, fusion.maps, states):
        normal = F.layer_norm(state, (6,), norm.weight, norm.bias, 1e-6)
        want += normal @ layer.weight.t() + layer.bias
    torch.testing.assert_close(fusion(x, states), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(LayerFusion(6, 0)(x, []), x)
    with pytest.raises(ValueError, match="those of 2 blocks, got 1"):
        fusion(x, states[:1])


def test_the_dtype_is_that_of_x():
    x = torch.randn(2, 6, dtype=torch.bfloat16)
    assert LayerFusion(6, 1)(x, [x.float()]).dtype is torch.bfloat16
