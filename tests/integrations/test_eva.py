"""timm's ViTs whose attention knows positions, by structure: rotary positions (EVA-02), relative positions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import maefast
from maefast.bench.peers.public.eva import Eva, EvaBlock, RelPosBias, RelPosBlock, VisionTransformerRelPos, angles
from tests.integrations.blocks import accelerated, build, compare, is_fast, is_fused, pretend, tokens
from tests.integrations.common import DropIn

TABLE = angles(2, 16, half=False).double()
FUSED = "fused attention, residual + norm, bias + GELU"


class TestEva(DropIn):
    """One projection, biases of queries and values beside it, layer scale."""

    sweeps = True
    replaced = 2
    options_of_model = {"init_values": 0.5}  # noqa: RUF012
    kind: type[nn.Module] = Eva

    def make(self):
        return self.kind(**self.options_of_model)

    def inputs(self, dtype):
        return (torch.randn(3, 3, 32, 32, dtype=dtype),), {}

    def loss(self, out):
        return out.float().sub(1).square().mean() if out.dtype is torch.bfloat16 else out.sub(1).square().mean()


class TestHalves(TestEva):
    """Three projections, rotated by halves; patches are dropped, so that each sample has its own table."""

    options_of_model = {"qkv_fused": False, "rotate_half": True, "drop_path": 0.3}  # noqa: RUF012

    def make(self):
        model = super().make()
        model.patch_drop = True
        return model


class TestRelPos(TestEva):
    kind = VisionTransformerRelPos


class TestSharedRelPos(TestRelPos):
    options_of_model = {"shared": True}  # noqa: RUF012


def ran(fast: nn.Module) -> str:
    return " ".join(note.runs for note in maefast.report(fast).replaced)


@pytest.mark.parametrize("options", [{}, {"qkv_fused": False}, {"rotate_half": True}, {"num_prefix_tokens": 0}])
def test_rotations(options):
    """With a table, of every sample too, and without one."""
    block = build(EvaBlock(32, 2, **options))
    fast = accelerated(block)
    assert is_fused(fast)
    x = tokens(4 + block.attn.num_prefix_tokens)
    table = angles(2, 16, block.attn.rotate_half).double()
    for rope in (None, table, torch.stack([table, table.flip(0)])[:, None]):
        compare(block, fast, x, rope=rope)
        compare(block, fast, x, rope)
    assert "as it was" not in ran(fast)


@pytest.mark.parametrize("options", [{"gated": True}, {"scale_norm": True}, {"attn_drop": 0.5}])
def test_attentions_that_run_as_they_were(options):
    """They are given the table."""
    block = build(EvaBlock(32, 2, **options))
    fast = accelerated(block)
    assert is_fast(fast)
    assert "attention as it was" in str(maefast.report(fast))
    compare(block, fast, tokens(5), rope=TABLE)


@pytest.mark.parametrize(
    ("rope", "count"),
    [
        (TABLE.expand(2, 4, 32), 5),  # of each head
        (TABLE[:1], 5),  # one place for all
        (TABLE.clone().requires_grad_(), 5),
        (torch.cat([TABLE, TABLE], 1), 5),  # too wide: refused
        (TABLE, 7),
    ],
)
def test_tables_that_are_not_served(rope, count):
    """The answer, or the error, is the block's own."""
    block = build(EvaBlock(32, 2))
    fast, x, found = accelerated(block), tokens(count), []
    for net in (block, fast):
        try:
            found.append(net(x, rope=rope))
        except RuntimeError as error:
            found.append(str(error))
    want, got = found
    assert got == want if isinstance(want, str) else torch.equal(got, want)
    assert isinstance(want, str) or "called with rope" in ran(fast)


def test_masks_are_left_to_the_block():
    block = build(EvaBlock(32, 2))
    fast = accelerated(block)
    compare(block, fast, tokens(5), rope=TABLE, attn_mask=torch.randn(5, 5).double())
    compare(block, fast, tokens(5), rope=TABLE, is_causal=True)
    assert "called with attn_mask" in ran(fast)
    assert "called with is_causal" in ran(fast)
    assert "fast" not in ran(fast)


def test_what_changes_later():
    block = build(EvaBlock(32, 2))
    fast = accelerated(block)
    for change in (
        lambda m: m.attn.k_bias.normal_(),
        lambda m: setattr(m.attn, "num_prefix_tokens", 3),
        lambda m: setattr(m.attn, "rotate_half", True),
        lambda m: setattr(m.attn, "fused_attn", False),
        lambda m: setattr(m.attn, "scale", 3.0),
        lambda m: setattr(m.attn, "qkv_bias_separate", True),
        lambda m: setattr(m.attn.qkv, "bias", nn.Parameter(torch.ones(96).double())),
        lambda m: m.attn.register_forward_hook(lambda module, args, out: out * 2),
    ):
        for net in (block, fast):
            torch.manual_seed(3)
            change(net)
        compare(block, fast, tokens(4 + block.attn.num_prefix_tokens), rope=TABLE)


def test_relative_positions():
    own, shared = RelPosBlock(32, 2, RelPosBias((2, 3), 2), init_values=0.5), RelPosBlock(32, 2)
    bias = torch.randn(1, 2, 6, 6).double()
    for block in (build(own), build(shared)):
        fast = accelerated(block)
        assert is_fused(fast)
        compare(block, fast, tokens(6))
        compare(block, fast, tokens(6), shared_rel_pos=bias)  # not read where the block has its own
        assert "as it was" not in ran(fast)
    compare(block, fast, tokens(6), shared_rel_pos=bias.expand(2, -1, -1, -1))
    assert "called with shared_rel_pos" in ran(fast)


def test_positions_that_a_module_adds():
    block = RelPosBlock(32, 2, RelPosBias((2, 3), 2))
    block.attn.fused_attn = False
    block = build(block)
    fast = accelerated(block)
    assert is_fast(fast)
    assert not is_fused(fast)
    assert "because a module of its own adds the positions to the scores" in str(maefast.report(fast))
    compare(block, fast, tokens(6))


def test_a_table_that_changes():
    block = build(RelPosBlock(32, 2, RelPosBias((2, 3), 2)))
    fast = accelerated(block)
    for change in (
        lambda m: m.attn.rel_pos.relative_position_bias_table.data.mul_(3),
        lambda m: m.attn.rel_pos.requires_grad_(False),
        lambda m: setattr(m.attn, "rel_pos", copy.deepcopy(m.attn.rel_pos)),
        lambda m: m.attn.rel_pos.register_buffer("relative_position_index", torch.zeros(36, dtype=torch.long)),
        lambda m: setattr(m.attn, "rel_pos", None),
    ):
        for net in (block, fast):
            change(net)
        compare(block, fast, tokens(6))


def post_norm(self, x, shared_rel_pos=None):
    x = x + self.norm1(self.attn(x, shared_rel_pos=shared_rel_pos))
    return x + self.norm2(self.mlp(x))


def test_other_blocks_stay():
    block = pretend("ResPostRelPosBlock", post_norm, like=RelPosBlock(32, 2))
    fast = accelerated(block)
    assert not is_fast(fast)
    assert "output 0 differs" in str(maefast.report(fast))
