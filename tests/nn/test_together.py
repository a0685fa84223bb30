"""Encoders whose tokens share blocks in one packed batch, and means of visible tokens."""

from __future__ import annotations

import pytest
import torch

from maefast import masking
from maefast.nn import Encoder, PatchEmbed, encode_together, pool_visible, position_table
from maefast.ops import TokenMask


def encoders(depth=2):
    torch.manual_seed(0)
    one = Encoder(PatchEmbed(8, 3, 16), position_table("sincos", 16, (4, 4)), 16, depth, 2).double()
    other = Encoder(PatchEmbed(8, 1, 16), position_table("sincos", 16, (2, 3)), 16, 0, 2).double()
    return one, other


@pytest.mark.parametrize("ratio", [0.5, [0.25, 0.75, 0.5]])
def test_packed_is_each_alone(ratio):
    one, other = encoders()
    parts = torch.randn(3, 3, 32, 32).double(), torch.randn(2, 1, 16, 24).double()
    plans = masking.random(3, 16, ratio), masking.random(2, 6, 0.5)
    found = encode_together((one, other), parts, plans, one.blocks)
    torch.testing.assert_close(found[0], one(parts[0], plans[0]), rtol=0, atol=1e-12)
    tail, alone = other.norm, encoders()[1]
    alone.blocks, alone.norm = one.blocks, tail
    torch.testing.assert_close(found[1], alone(parts[1], plans[1]), rtol=0, atol=1e-12)


def test_no_blocks():
    one, other = encoders(0)
    parts = torch.randn(3, 3, 32, 32).double(), torch.randn(2, 1, 16, 24).double()
    plans = masking.random(3, 16, 0.5), masking.random(2, 6, 0.5)
    found = encode_together((one, other), parts, plans, one.blocks)
    torch.testing.assert_close(found[1], other(parts[1], plans[1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_means_of_visible_tokens(prefix):
    x = torch.randn(3, prefix + 8, 4).double().requires_grad_()
    plan = masking.random(3, 8, [0.25, 0.5, 1.0])
    rows, want = [], []
    for sample in range(3):
        shown = [at for at in plan.visible.tolist() if at // 8 == sample]
        mine = torch.cat([x[sample, :prefix], x[sample, [prefix + at % 8 for at in shown]]])
        rows.append(mine)
        want.append(mine[prefix:].mean(0) if shown else torch.zeros(4).double())
    found = pool_visible(torch.cat(rows), plan, prefix)
    torch.testing.assert_close(found, torch.stack(want), rtol=0, atol=1e-14)
    dense = TokenMask.all_visible(3, 8)
    torch.testing.assert_close(pool_visible(x, dense, prefix), x[:, prefix:].mean(1), rtol=0, atol=0)
