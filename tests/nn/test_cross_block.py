"""Blocks with cross-attention against the formula, streams and decoders against such blocks one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from maefast import masking
from maefast.nn import Block, ContextAttention, CrossBlock, CrossDecoder, CrossFusion, sincos_interleaved
from maefast.nn.patches import frame_differences, patchify


def scattered(module):
    torch.manual_seed(0)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def attended(attention, x, c):
    """Head by head."""
    dim = x.shape[-1]
    shift_q, shift_v = (0, 0) if attention.q_bias is None else (attention.q_bias, attention.v_bias)
    k, v = F.linear(c, attention.kv.weight, attention.kv.bias).split(dim, -1)
    q, v, out, width = attention.q(x) + shift_q, v + shift_v, [], dim // attention.num_heads
    for head in range(attention.num_heads):
        part = slice(head * width, (head + 1) * width)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / width**0.5
        out.append(scores.softmax(-1) @ v[..., part])
    return attention.proj(torch.cat(out, -1))


@pytest.mark.parametrize("bias", ["qkv", "qv", "none"])
def test_a_block_is_its_formula(bias):
    block = scattered(CrossBlock(16, 24, 2, bias=bias))
    x, c = torch.randn(3, 5, 16).double(), torch.randn(3, 7, 24).double()
    after = x + attended(block.cross_attn, block.cross_norm1(x), block.cross_norm2(c))
    want = Block.forward(block, after)
    torch.testing.assert_close(block(x, c), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(block(x, c, count=2), want[:, -2:], rtol=0, atol=1e-12)
    rest = torch.randn_like(x)
    one, two = block(x - rest, c, delta=rest, pending=True)
    torch.testing.assert_close(one + two, want, rtol=0, atol=1e-12)


def test_a_dropped_path():
    block = scattered(CrossBlock(16, 16, 2, drop_path=0.999999)).train()
    x, c = torch.randn(3, 5, 16).double(), torch.randn(3, 7, 16).double()
    torch.testing.assert_close(block(x, c), x, rtol=0, atol=0)


def test_streams_see_what_the_layer_before_made():
    fusion = scattered(CrossFusion((16, 24), 2, 2))
    a, b = torch.randn(3, 5, 16).double(), torch.randn(3, 7, 24).double()
    found = fusion(a, b)
    for mine, theirs in zip(*(stream["blocks"] for stream in fusion.streams)):
        a, b = mine(a, b), theirs(b, a)
    for stream, x, y in zip(fusion.streams, (a, b), found):
        torch.testing.assert_close(stream["norm"](x), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_decoder_looks_at_the_deepest_state_first(depth):
    decoder = scattered(CrossDecoder(16, 6, sincos_interleaved(8, 9), 8, depth, 1, embed_bias=False, bias="qv"))
    plan = masking.random(2, 9, 0.6)
    latent, *states = (torch.randn(2, plan.keep, 16).double() for _ in range(depth))
    pos, seen = decoder.pos_embed, plan.ids_keep
    x = torch.cat([decoder.embed(latent) + pos[seen], decoder.mask_token + pos[plan.ids_masked]], 1)
    x = decoder.blocks[0](x)
    for block, state in zip(decoder.blocks[1:], states[::-1]):
        x = block(x, decoder.embed(state) + pos[seen])
    want = decoder.pred(decoder.norm(x[:, plan.keep :]))
    torch.testing.assert_close(decoder(latent, plan, states), want, rtol=0, atol=1e-12)


def test_bad_input():
    with pytest.raises(ValueError, match="width 16 must be a multiple of the number of heads, got 3"):
        ContextAttention(16, 16, 3)
    with pytest.raises(ValueError, match="bias must be one of"):
        ContextAttention(16, 16, 2, bias="q")
    decoder = CrossDecoder(16, 6, sincos_interleaved(8, 9), 8, 2, 1)
    plan = masking.random(2, 9, 0.6)
    with pytest.raises(ValueError, match="2 blocks look at 1 states, got 0"):
        decoder(torch.zeros(2, plan.keep, 16), plan)
    ragged = masking.random(2, 9, [0.3, 0.6])
    with pytest.raises(ValueError, match="as many visible and masked tokens are wanted in every sample"):
        decoder(torch.zeros(ragged.total_visible, 16), ragged, [torch.zeros(1)])


@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_frame_differences_are_a_loop(group):
    clips = torch.randn(2, 3, 8, 4, 6, dtype=torch.float64)
    want = clips.clone()
    for t in range(8):
        if t % group:
            want[:, :, t] = clips[:, :, t] - clips[:, :, t // group * group]
    patch, rows = (2, 2, 3), patchify(clips, (2, 2, 3))
    found = frame_differences(rows, patch, 8, group)
    assert torch.equal(found, patchify(want, patch))
    torch.testing.assert_close(frame_differences(found, patch, 8, group, back=True), rows, rtol=0, atol=1e-15)


def test_groups_that_do_not_fit():
    for frames, group in ((8, 3), (7, 1), (8, 0), (10, 2)):
        with pytest.raises(ValueError, match="frames of tubelets of 2 do not make 16 rows"):
            frame_differences(torch.zeros(1, 16, 24), (2, 2, 2), frames, group)
